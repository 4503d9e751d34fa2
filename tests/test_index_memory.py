"""What the in-memory twin adds: crash states, injected failures and damage."""

from __future__ import annotations

import random

import pytest

from kvlode.engine.index import IndexWriteError
from kvlode.engine.index_memory import MemoryIndex


def test_a_crash_keeps_what_was_synced_and_a_prefix_of_the_batches_since(seed: int) -> None:
    draw = random.Random(seed)
    index = MemoryIndex()
    states: list[dict[bytes, bytes]] = []
    model: dict[bytes, bytes] = {}
    for number in range(12):
        key = b"%d" % draw.randrange(6)
        deletes = [b"%d" % draw.randrange(6)]
        index.apply([(key, b"%d" % number)], deletes)
        model[key] = b"%d" % number
        model.pop(deletes[0], None)
        if number == 4:
            index.sync()
        if number >= 4:
            states.append(dict(model))
    assert index.unsynced_batches == 7
    for kept, state in enumerate(states):
        assert dict(index.crash(keep_batches=kept).scan()) == state
    assert dict(index.crash().scan()) == states[0]
    assert dict(index.scan()) == model, "a crash is a copy; the index itself goes on"
    with pytest.raises(ValueError, match="7 batches"):
        index.crash(keep_batches=8)


def test_what_is_found_after_a_crash_is_durable_itself() -> None:
    index = MemoryIndex()
    index.apply([(b"a", b"1")])
    found = index.crash(keep_batches=1)
    assert found.unsynced_batches == 0
    assert dict(found.crash().scan()) == {b"a": b"1"}


def test_an_injected_failure_applies_nothing_and_passes() -> None:
    index = MemoryIndex()
    index.fail_next_apply(times=2)
    for _ in range(2):
        with pytest.raises(IndexWriteError):
            index.apply([(b"a", b"1")])
    assert index.get_many([b"a"]) == [None]
    assert index.unsynced_batches == 0
    index.apply([(b"a", b"1")])
    assert index.get_many([b"a"]) == [b"1"]
    index.fail_next_apply(OSError("anything"))
    with pytest.raises(OSError, match="anything"):
        index.apply([(b"a", b"2")])


def test_damaged_keys_read_as_absent_and_are_counted() -> None:
    index = MemoryIndex()
    index.apply([(b"a", b"1"), (b"b", b"2")])
    index.damage([b"a"])
    assert index.get_many([b"a", b"b", b"a"]) == [None, b"2", None]
    assert index.damaged() == 2
