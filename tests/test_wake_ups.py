"""When a change wakes the writer: the first one, for its clock, and those that make a batch due. Not the ones between."""

from __future__ import annotations

import pytest

from kvlode.engine.buffer import Buffer
from kvlode.engine.entry import Entry, Kind
from kvlode.engine.namespaces import NamespaceTable
from kvlode.engine.testing import ManualClock
from kvlode.gds.buffers import aligned_array
from model import block_bytes, descriptor
from rig import KIB, MIB, Rig, eventually, read

SIZE = 8 * KIB
BATCH_BYTES = 4 * SIZE


class Woken:
    """A buffer whose news are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, memory_bytes: int = MIB) -> None:
        sequence = iter(range(1, 1000))
        self.buffer = Buffer(aligned_array(memory_bytes), serve_clean=True, next_sequence=lambda: next(sequence), batch_bytes=BATCH_BYTES)
        self.namespace = NamespaceTable(None).register(descriptor("woken", block_bytes_max=64 * KIB))
        self.count = 0
        monkeypatch.setattr(self.buffer.changed, "notify_all", self._count)

    def _count(self) -> None:
        self.count += 1

    def put(self, number: int) -> int:
        """How often it woke somebody."""
        before = self.count
        entry = Entry(Kind.BLOCK, self.namespace, b"key %d" % number)
        assert self.buffer.reserve(entry, SIZE, 0.0, now_ns=0)
        self.buffer.publish(entry)
        return self.count - before


def test_only_the_first_change_and_those_of_a_due_batch_wake_the_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    woken = Woken(monkeypatch)
    assert [woken.put(number) for number in range(6)] == [1, 0, 0, 1, 1, 1]


def test_a_small_buffer_is_due_at_a_quarter_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    woken = Woken(monkeypatch, memory_bytes=8 * SIZE)
    assert [woken.put(number) for number in range(3)] == [1, 1, 1]


def test_what_the_writer_took_counts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    woken = Woken(monkeypatch)
    for number in range(4):
        woken.put(number)
    woken.buffer.take(MIB)
    assert [woken.put(number) for number in range(4, 8)] == [1, 0, 0, 1]


def test_a_put_that_somebody_flushes_meanwhile_wakes_the_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    woken = Woken(monkeypatch)
    woken.put(0)
    woken.buffer.flush_target = 2
    assert [woken.put(number) for number in range(1, 3)] == [1, 0]


def test_blocks_are_written_when_they_are_old_enough_although_no_later_put_wakes_the_writer() -> None:
    rig = Rig(ManualClock(), flush_after_s=0.05, batch_bytes=16 * MIB)
    space = rig.store.namespace(descriptor("old", block_bytes_max=64 * KIB))
    for number in range(3):
        assert space.put(b"key %d" % number, block_bytes(b"key", number, SIZE))
    assert eventually(lambda: rig.counter("written_records") >= 3), "nobody asked for a flush, and none came by itself"
    assert read(space, b"key 2", SIZE)[0].name == "HIT"
    rig.close()
