"""The capacity is a hard cap: the drive is counted at every allocation, by the formula of docs/design.md section 7."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvlode import BlockSpace, InvalidConfig, KvlodeError, Status
from kvlode.engine.testing import ManualClock
from model import block_bytes, descriptor
from rig import KIB, MIB, Rig, eventually, put_blocks, read

OPTIONS: dict[str, Any] = {"capacity": 4 * MIB - 160 * KIB, "segment_bytes": 128 * KIB, "codec": "raw", "buffer": 2 * MIB}
WAIT_S = 60.0


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(ManualClock(), **OPTIONS)
    yield made
    made.close()


def space_of(rig: Rig, name: str = "model") -> BlockSpace:
    return rig.store.namespace(descriptor(name, block_bytes_max=64 * KIB))


@pytest.mark.parametrize(("size", "count"), [(1, 2500), (4096, 1500), (30_000, 500), (60_001, 250)])
def test_a_store_never_takes_more_than_its_capacity(rig: Rig, size: int, count: int) -> None:
    """Each time about three times the capacity is written; the smallest blocks make the largest index."""
    put_blocks(space_of(rig), 0, count, size)
    assert rig.store.flush(WAIT_S)
    assert rig.counter("segments_freed") > 0, "the store was not filled"
    assert rig.counter("refused_puts") == 0
    rig.assert_within_capacity()
    assert rig.meter.peak_bytes > 0.5 * OPTIONS["capacity"], "the meter counts nothing"


def test_used_blocks_and_deletes_and_reopening_keep_to_the_capacity(rig: Rig) -> None:
    for turn in range(6):
        put_blocks(space_of(rig), 100 * turn, 100 * turn + 100, 20_000)
        recent = [b"filler %d" % number for number in range(100 * turn + 60, 100 * turn + 100)]
        space_of(rig).touch(recent)
        space_of(rig).touch(recent)
        space_of(rig).delete(recent[:10])
        assert rig.store.flush(WAIT_S)
        rig.assert_within_capacity()
        rig.crash(turn, keep="random") if turn % 2 else rig.reopen()
        rig.assert_within_capacity()
    assert rig.meter.peak_bytes > 0


def test_a_store_reopened_with_half_the_capacity_shrinks_to_it(rig: Rig) -> None:
    put_blocks(space_of(rig), 0, 200, 30_000)
    assert rig.store.flush(WAIT_S)
    half = OPTIONS["capacity"] // 2
    rig.reopen(capacity=half)

    def used_bytes() -> int:
        return int(rig.store.stats()["used_bytes"])

    assert eventually(lambda: used_bytes() <= half), f"{used_bytes()} bytes are used, the capacity is {half}"
    rig.meter.peak_bytes = 0
    put_blocks(space_of(rig), 200, 300, 30_000)
    assert rig.store.flush(WAIT_S)
    rig.assert_within_capacity()


def test_what_lies_in_quarantine_counts(rig: Rig) -> None:
    put_blocks(space_of(rig), 0, 200, 30_000)
    assert rig.store.flush(WAIT_S)
    before = int(rig.store.stats()["segments"]["bytes"])
    aside = rig.memory.open("/store/quarantine/0000000000000001.seg", "create")
    aside.preallocate(MIB)
    aside.close()
    put_blocks(space_of(rig), 200, 300, 30_000)
    assert rig.store.flush(WAIT_S)
    assert int(rig.store.stats()["segments"]["bytes"]) <= before - MIB + 2 * OPTIONS["segment_bytes"]
    rig.meter.peak_bytes = 0
    put_blocks(space_of(rig), 300, 400, 30_000)
    assert rig.store.flush(WAIT_S)
    rig.assert_within_capacity()


def test_pins_take_at_most_half_and_the_store_goes_on(rig: Rig) -> None:
    size = 8_000
    names = [b"filler %d" % number for number in range(240)]
    put_blocks(space_of(rig), 0, 240, size)
    assert rig.store.flush(WAIT_S)
    with space_of(rig).pin(names) as held:
        assert 100 < held < 240, held
        pinned = [key for key in names if space_of(rig).digest + key in rig.store._core.pins]
        put_blocks(space_of(rig, "other"), 0, 100, 30_000)
        assert rig.store.flush(WAIT_S)
        present = [key for key in pinned if read(space_of(rig), key, size)[0] is Status.HIT]
        assert len(present) == held, f"{held} blocks were pinned, {len(present)} are left"
    rig.assert_within_capacity()
    assert rig.counter("refused_puts") == 0


def test_a_reader_that_never_lets_go_costs_room_and_not_the_cap(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlode.engine.writer.SEGMENT_WAIT_S", 0.5)
    put_blocks(space_of(rig), 0, 20, 30_000)
    assert rig.store.flush(WAIT_S)
    held = rig.store._core.segments.oldest_live_id()
    assert rig.store._core.segments.pin(held) is not None
    put_blocks(space_of(rig), 20, 80, 30_000)
    rig.store.flush(WAIT_S)
    number = 80
    while space_of(rig).put(b"%d" % number, block_bytes(b"%d" % number, 4, 30_000)) and number < 400:
        rig.store.flush(1.0)
        number += 1
        if rig.counter("refused_no_space"):
            break
    assert rig.segment_exists(held)
    rig.assert_within_capacity()
    rig.store._core.segments.unpin(held)
    rig.store._core.keeper.poke()
    assert eventually(lambda: not rig.segment_exists(held))
    assert eventually(lambda: bool(space_of(rig).put(b"after", block_bytes(b"after", 4, 30_000))))
    assert rig.store.flush(WAIT_S)
    status, out = read(space_of(rig), b"after", 30_000)
    assert status is Status.HIT and np.array_equal(out, block_bytes(b"after", 4, 30_000))
    rig.assert_within_capacity()


# --- capacities that cannot work --------------------------------------------------------------------------------------


def assert_complete(error: KvlodeError, *words: str) -> None:
    """What, where or which option, expected, actual, and what to do."""
    assert error.what and error.expected is not None and error.actual is not None and error.action, str(error)
    for word in words:
        assert word in str(error), f"{word!r} is not in: {error}"


def test_a_block_larger_than_a_segment_names_the_capacity_that_would_do(rig: Rig) -> None:
    with pytest.raises(InvalidConfig) as caught:
        rig.store.namespace(descriptor("large", block_bytes_max=MIB))
    assert_complete(caught.value, "capacity", "/store")
    put_blocks(space_of(rig), 0, 1, 30_000)
    assert rig.store.flush(WAIT_S)


def test_the_capacity_that_an_error_names_does(rig: Rig) -> None:
    put_blocks(space_of(rig), 0, 1, 30_000)
    rig.close()
    rig.index = rig.index.reopen()
    with pytest.raises(InvalidConfig) as caught:
        rig.open(capacity=MIB // 2)
    assert_complete(caught.value, "capacity")
    named = int(str(caught.value.expected).split("at least ")[1].split()[0])
    rig.open(capacity=named)
    status, out = read(space_of(rig), b"filler 0", 30_000)
    assert status is Status.HIT and np.array_equal(out, block_bytes(b"filler 0", 0, 30_000))
    put_blocks(space_of(rig), 1, 60, 30_000)
    assert rig.store.flush(WAIT_S)
    rig.assert_within_capacity()
