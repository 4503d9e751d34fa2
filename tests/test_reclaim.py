"""Named interleavings of reclaim, deletes, crashes and lost indexes: what was deleted stays deleted, what is pinned stays."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pytest

from kvlode import BlockSpace, DeviceError, PutState, PutStatus, Status
from kvlode.engine.reinsertion import CopyForward, WriterRoom
from kvlode.engine.testing import ManualClock
from kvlode.gds.monitor import Monitor
from kvlode.gds.testing import LateDevice
from kvlode.gds.wrapping import WrappingDevice
from model import block_bytes, descriptor
from rig import KIB, MIB, Rig, eventually, put_blocks, read

SIZE = 30_000
PAGE_BYTES = 4096
OPTIONS: dict[str, Any] = {"capacity": 3 * MIB, "segment_bytes": 128 * KIB, "serve_clean": False}
OPTIONS |= {"reinsert_hits_min": 2, "write_amplification_max": 2.0}
FILLERS_MAX = 400
"""More than four times what fits into the store."""
Keep = Literal["none", "all", "random"]


class Scene:
    """A small store on a drive that a test can hold up, with a namespace of blocks and one that pushes them out."""

    def __init__(self, wrap: Callable[[Any], Any], **options: Any) -> None:
        self.clock = ManualClock()
        self.rig = Rig(self.clock, wrap=wrap, **(OPTIONS | options))
        self.fillers = 0

    @property
    def late(self) -> LateDevice:
        assert isinstance(self.rig.device, LateDevice)
        return self.rig.device

    @property
    def space(self) -> BlockSpace:
        return self.rig.store.namespace(descriptor("kept", block_bytes_max=64 * KIB))

    @property
    def filler(self) -> BlockSpace:
        return self.rig.store.namespace(descriptor("filler", block_bytes_max=64 * KIB))

    def fill(self, count: int = 1) -> None:
        put_blocks(self.filler, self.fillers, self.fillers + count, SIZE)
        self.fillers += count

    def put(self, key: bytes, version: int, **options: Any) -> None:
        assert self.space.put(key, block_bytes(key, version, SIZE), **options).state is PutState.ACCEPTED
        assert self.rig.store.flush(30.0)

    def fill_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.fill()
            assert self.rig.store.flush(30.0)
            assert self.fillers < FILLERS_MAX, "reclaim never got there"

    def next_victim_is_due(self) -> bool:
        """Whether reclaim reads a segment or is going to, also when it has not come to that yet: one more block might then wait for it."""
        keeper = self.rig.store._core.keeper
        with keeper._lock:
            free_bytes = keeper._coming_bytes() + keeper._spare_bytes
        return bool(self.late.held()) or free_bytes < keeper._needed_bytes() + keeper._ahead_bytes()

    def stop_reclaim_at_payload_of(self, key: bytes) -> int:
        """Fill the store until reclaim reads the payload of a hot block in the oldest segment, and hold it there; the segment's id."""
        entry = self.rig.store._core.catalog.find([self.space.digest + key])[0]
        assert entry is not None
        self.space.touch([key])
        self.space.touch([key])
        self.late.hold("read")
        self.fill_until(self.next_victim_is_due)
        assert self.late.wait_for_held(1)
        while self.late.held()[0].offset != entry.offset + PAGE_BYTES:
            self.late.release(1)
            assert self.late.wait_for_held(1), "reclaim does not copy the block forward"
        return entry.segment_id

    def go_on(self) -> None:
        self.late.hold()
        self.late.release()

    def assert_absent(self, key: bytes) -> None:
        assert self.space.contains([key]) == [False]
        assert read(self.space, key, SIZE)[0] is Status.MISS

    def assert_holds(self, key: bytes, version: int) -> None:
        status, out = read(self.space, key, SIZE)
        assert status is Status.HIT
        assert np.array_equal(out, block_bytes(key, version, SIZE))


def late(device: Any) -> LateDevice:
    return LateDevice(device, holding=())


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene(late)
    yield made
    made.go_on()
    made.rig.close()


def delete(space: BlockSpace, key: bytes) -> None:
    assert space.delete([key]) == 1


def drop(space: BlockSpace, key: bytes) -> None:
    space.drop()


REMOVALS = pytest.mark.parametrize("remove", [delete, drop])
CRASHES = pytest.mark.parametrize("keep", ["none", "all", "random"])


def assert_gone_for_ever(scene: Scene, key: bytes, keep: Keep) -> None:
    """Flushed, then without power, then without an index: the block does not come back, and can be put anew."""
    assert scene.rig.store.flush(30.0)
    scene.assert_absent(key)
    scene.rig.crash(1, keep=keep)
    scene.assert_absent(key)
    scene.rig.crash(2, keep=keep, lose_index=True)
    scene.assert_absent(key)
    scene.put(key, 9)
    scene.rig.crash(3, keep=keep, lose_index=True)
    scene.assert_holds(key, 9)
    scene.rig.assert_within_capacity()


# --- removals that race reinsertion --------------------------------------------------------------------------------


@REMOVALS
@CRASHES
def test_a_block_removed_while_its_copy_is_read_is_not_copied(scene: Scene, remove: Callable[..., None], keep: Keep) -> None:
    scene.put(b"k", 1)
    scene.stop_reclaim_at_payload_of(b"k")
    remove(scene.space, b"k")
    scene.go_on()
    assert_gone_for_ever(scene, b"k", keep)
    assert scene.rig.counter("reinserted_blocks") == 0


@REMOVALS
@CRASHES
def test_a_block_removed_after_its_copy_was_placed_is_removed_with_it(scene: Scene, remove: Callable[..., None], keep: Keep) -> None:
    scene.put(b"k", 1)
    scene.stop_reclaim_at_payload_of(b"k")
    scene.late.hold("write")
    scene.late.release()
    assert scene.late.wait_for_held(1), "the copy was not written"
    remove(scene.space, b"k")
    scene.go_on()
    assert_gone_for_ever(scene, b"k", keep)


@REMOVALS
@CRASHES
def test_a_copy_whose_removal_is_on_its_way_to_the_log_is_called_off(scene: Scene, remove: Callable[..., None], keep: Keep) -> None:
    scene.put(b"k", 1)
    scene.stop_reclaim_at_payload_of(b"k")
    scene.late.hold("read", "write")
    remove(scene.space, b"k")
    assert scene.late.wait_for_held(2), "the removal was not written"
    scene.late.release(1)  # the read, the older of the two
    scene.late.hold()
    assert eventually(lambda: not scene.rig.store._core.buffer.reinsertions)
    scene.go_on()
    assert_gone_for_ever(scene, b"k", keep)
    assert scene.rig.counter("reinserted_blocks") == 0


@CRASHES
def test_a_block_put_anew_while_its_old_copy_is_read_keeps_the_new_bytes(scene: Scene, keep: Keep) -> None:
    scene.put(b"k", 1)
    scene.stop_reclaim_at_payload_of(b"k")
    delete(scene.space, b"k")
    assert scene.space.put(b"k", block_bytes(b"k", 2, SIZE))
    scene.go_on()
    assert scene.rig.store.flush(30.0)
    scene.assert_holds(b"k", 2)
    scene.rig.crash(1, keep=keep, lose_index=True)
    scene.assert_holds(b"k", 2)


@CRASHES
def test_a_copy_that_reaches_the_log_after_it_was_called_off_is_found(scene: Scene, keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.put(b"k", 1)
    victim = scene.stop_reclaim_at_payload_of(b"k")
    core = scene.rig.store._core
    about_to_place, given_up = threading.Event(), threading.Event()
    write_records, retire = core.writer._write_records, core.segments.retire

    def write_when_given_up(records: list[Any]) -> None:  # between the answer that the copy is wanted and its place in the log
        if any(record.entry.ident == scene.space.digest + b"k" for record in records):
            about_to_place.set()
            assert given_up.wait(30.0)
        write_records(records)

    def call_off(group: CopyForward, timeout_s: float) -> bool:
        assert about_to_place.wait(30.0)
        group.called_off = True
        return False

    def retire_and_tell(segment_id: int, now_s: float, **facts: bool) -> None:
        scene.assert_absent(b"k")
        retire(segment_id, now_s, **facts)
        given_up.set()

    monkeypatch.setattr(core.writer, "_write_records", write_when_given_up)
    monkeypatch.setattr(core.segments, "retire", retire_and_tell)
    monkeypatch.setattr(CopyForward, "finish", call_off)
    before = scene.rig.store.events().next
    scene.go_on()
    assert given_up.wait(30.0)
    scene.fill()
    assert scene.rig.store.flush(30.0)
    assert eventually(lambda: scene.rig.segment_of(scene.space, b"k") not in (None, victim)), "in the log, and not in the index"
    told = [(event.kind.value, list(event.keys)) for event in scene.rig.store.events(before).events if b"k" in event.keys]
    assert [kind for kind, _ in told] == ["removed", "stored"]
    scene.assert_holds(b"k", 1)
    scene.rig.crash(1, keep=keep)
    scene.assert_holds(b"k", 1)
    scene.rig.crash(2, keep=keep, lose_index=True)
    scene.assert_holds(b"k", 1)
    delete(scene.space, b"k")
    assert_gone_for_ever(scene, b"k", keep)


# --- pins and copies in memory --------------------------------------------------------------------------------------


def test_a_pin_that_comes_while_its_segment_is_being_freed_still_holds(scene: Scene) -> None:
    scene.put(b"hot", 1)
    scene.put(b"cold", 2)
    victim = scene.stop_reclaim_at_payload_of(b"hot")
    assert scene.rig.segment_of(scene.space, b"cold") == victim
    with scene.space.pin([b"cold"]) as held:
        assert held == 1
        scene.go_on()
        scene.fill_until(lambda: not scene.rig.segment_exists(victim))
        scene.assert_holds(b"cold", 2)
        scene.fill(100)
        assert scene.rig.store.flush(30.0)
        scene.assert_holds(b"cold", 2)
    scene.rig.assert_within_capacity()


def test_copies_are_not_all_in_memory_at_once() -> None:
    scene = Scene(late, capacity=16 * MIB, segment_bytes=MIB, batch_bytes=128 * KIB)
    scene.fill(40)
    assert scene.rig.store.flush(30.0)
    core = scene.rig.store._core
    victim = core.segments.all()[0]
    assert victim.sealed
    peak_bytes = 0

    class Counted(CopyForward):
        def add(self, size_bytes: int) -> Callable[[PutStatus], None]:
            nonlocal peak_bytes
            settled = super().add(size_bytes)
            peak_bytes = max(peak_bytes, self.pending_bytes)
            return settled

    names = [b"filler %d" % number for number in range(40)]
    with pytest.MonkeyPatch.context() as patch, scene.filler.pin(names):
        patch.setattr("kvlode.engine.eviction.CopyForward", Counted)
        room = WriterRoom(Monitor(), wanted=lambda: False, refused=lambda: False)
        assert core.keeper._evictor.empty(victim, room) == 0
    assert scene.rig.counter("reinserted_bytes") > 512 * KIB
    assert peak_bytes <= 192 * KIB
    scene.rig.close()


def test_pinned_blocks_survive_any_number_of_rounds_through_the_store(scene: Scene) -> None:
    names = [b"pinned %d" % i for i in range(20)]
    for version, key in enumerate(names):
        scene.put(key, version)
    with scene.space.pin(names) as held:
        assert held == len(names)
        scene.fill(300)
        assert scene.rig.store.flush(60.0)
        for version, key in enumerate(names):
            scene.assert_holds(key, version)
    scene.rig.assert_within_capacity()


def test_a_block_that_reclaim_gave_up_is_stored_anew_although_a_copy_was_in_memory() -> None:
    scene = Scene(late, serve_clean=True, buffer=16 * MIB, reinsert_hits_min=0)
    scene.put(b"k", 1)
    victim = scene.rig.segment_of(scene.space, b"k")
    assert victim is not None
    scene.fill_until(lambda: not scene.rig.segment_exists(victim))
    scene.put(b"k", 1)
    scene.rig.crash(1)
    scene.assert_holds(b"k", 1)
    scene.rig.close()


def test_a_store_closed_while_a_block_is_copied_forward_ends_at_once() -> None:
    scene = Scene(late)
    scene.put(b"k", 1)
    scene.stop_reclaim_at_payload_of(b"k")
    ended: list[bool] = []
    closing = threading.Thread(target=lambda: ended.append(scene.rig.store.close(20.0)))
    closing.start()
    assert eventually(lambda: scene.rig.store._core.buffer._closed)
    scene.go_on()
    closing.join(30.0)
    assert ended == [True], "the copy waited for a writer that was gone"


# --- blocks that the index does not know ----------------------------------------------------------------------------


def evict_but_keep_the_file(scene: Scene, key: bytes) -> int:
    """Reclaim frees the oldest segment while a reader keeps its file: the index has lost the block, the drive has not."""
    victim = scene.rig.segment_of(scene.space, key)
    assert victim is not None
    segments = scene.rig.store._core.segments
    assert segments.pin(victim) is not None
    scene.fill_until(lambda: segments.get(victim).retired_at_s is not None)  # type: ignore[union-attr]
    scene.assert_absent(key)
    assert scene.rig.segment_exists(victim)
    return victim


def test_a_block_deleted_while_only_its_segment_knows_it_stays_deleted(scene: Scene) -> None:
    scene.put(b"k", 1)
    evict_but_keep_the_file(scene, b"k")
    assert scene.space.delete([b"k"]) == 0
    assert scene.rig.store.flush(30.0)
    scene.rig.crash(lose_index=True)
    scene.assert_absent(b"k")


def test_a_block_deleted_while_the_index_cannot_read_its_entry_stays_deleted(scene: Scene) -> None:
    scene.put(b"k", 1)
    scene.rig.index.damage([scene.space.digest + b"k"])
    scene.space.delete([b"k"])
    assert scene.rig.store.flush(30.0)
    scene.rig.reopen(lose_index=True)
    scene.assert_absent(b"k")


def test_a_block_that_was_given_up_and_not_deleted_may_come_back_whole(scene: Scene) -> None:
    scene.put(b"k", 1)
    evict_but_keep_the_file(scene, b"k")
    scene.rig.crash(lose_index=True)
    status, out = read(scene.space, b"k", SIZE)
    if status is not Status.MISS:  # a later segment may say already that this one was freed
        assert status is Status.HIT and np.array_equal(out, block_bytes(b"k", 1, SIZE))


@CRASHES
def test_a_block_put_anew_after_its_delete_has_the_new_bytes(scene: Scene, keep: Keep) -> None:
    scene.put(b"k", 1)
    delete(scene.space, b"k")
    scene.put(b"k", 2)
    scene.rig.crash(1, keep=keep, lose_index=True)
    scene.assert_holds(b"k", 2)
    delete(scene.space, b"k")
    assert_gone_for_ever(scene, b"k", keep)


@CRASHES
def test_an_expired_block_that_was_put_anew_has_the_new_bytes(scene: Scene, keep: Keep) -> None:
    scene.put(b"k", 1, ttl=5.0)
    scene.clock.advance(6.0)
    assert read(scene.space, b"k", SIZE)[0] is Status.EXPIRED
    scene.put(b"k", 2)
    scene.rig.crash(1, keep=keep, lose_index=True)
    scene.assert_holds(b"k", 2)
    scene.rig.crash(2, keep=keep)
    scene.assert_holds(b"k", 2)


# --- the order in which segments leave ------------------------------------------------------------------------------


@pytest.mark.parametrize("lose_index", [False, True])
def test_a_segment_of_tombstones_does_not_leave_before_what_it_kills(
    scene: Scene, lose_index: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvlode.engine.writer.SEGMENT_WAIT_S", 0.5)
    scene.put(b"k", 1)
    scene.put(b"read", 2)
    first = scene.rig.segment_of(scene.space, b"k")
    assert first is not None
    scene.fill_until(lambda: scene.rig.store._core.writer.open_segment_id > first)
    delete(scene.space, b"k")
    assert scene.rig.store.flush(30.0)
    tombstones = scene.rig.store._core.writer.open_segment_id
    segments = scene.rig.store._core.segments
    assert segments.pin(first) is not None  # a reader that does not let go
    while segments.get(tombstones).retired_at_s is None:  # type: ignore[union-attr]
        scene.fill()  # not flushed: the writer waits for room that the reader holds
        eventually(lambda: segments.get(tombstones).retired_at_s is not None, 0.01)  # type: ignore[union-attr]
        assert scene.fillers < FILLERS_MAX
    assert scene.rig.segment_exists(first) and scene.rig.segment_exists(tombstones)
    scene.rig.crash(lose_index=lose_index)
    scene.assert_absent(b"k")


class LosingUnlinks(WrappingDevice):
    """From the first unlink of a segment on, folders cannot be synced any more: the power cut undoes it."""

    unlinked = False

    def remove(self, path: str) -> None:
        self.unlinked = self.unlinked or path.endswith(".seg")  # first: another thread may be about to sync
        self.inner.remove(path)

    def sync_folder(self, path: str) -> None:
        if self.unlinked:
            raise DeviceError("sync folder", path, errno=errno.EIO)
        self.inner.sync_folder(path)


@pytest.mark.parametrize("lose_index", [False, True])
def test_an_unlink_undone_by_the_power_cut_brings_nothing_deleted_back(lose_index: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlode.engine.writer.SEGMENT_WAIT_S", 0.5)
    scene = Scene(LosingUnlinks)
    scene.put(b"k", 1)
    first = scene.rig.segment_of(scene.space, b"k")
    assert first is not None
    delete(scene.space, b"k")
    assert scene.rig.store.flush(30.0)
    while not scene.rig.device.unlinked:
        scene.fill()
        scene.rig.store.flush(30.0)
        assert scene.fillers < FILLERS_MAX
    assert eventually(lambda: not scene.rig.segment_exists(first))
    path = scene.rig.store._core.segments.path(first)
    assert scene.rig.memory.crash(keep="none").status(path) is not None, "the unlink would not be undone"
    scene.rig.crash(lose_index=lose_index)
    scene.assert_absent(b"k")
    scene.rig.close()


def test_a_hole_in_the_log_hides_what_is_behind_it_for_ever(scene: Scene) -> None:
    scene.put(b"before", 1)
    scene.late.hold("write")
    assert scene.space.put(b"hole", block_bytes(b"hole", 2, SIZE))
    assert scene.late.wait_for_held(1)
    scene.late.hold()
    writes = sum(counter.writes for counter in scene.rig.memory.counters().values())
    assert scene.space.put(b"behind", block_bytes(b"behind", 3, SIZE))
    assert eventually(lambda: sum(counter.writes for counter in scene.rig.memory.counters().values()) > writes)
    scene.rig.crash(keep="all")
    scene.assert_holds(b"before", 1)
    scene.assert_absent(b"hole")
    scene.assert_absent(b"behind")
    scene.space.delete([b"behind"])
    scene.put(b"after", 4)
    scene.rig.crash(lose_index=True)
    scene.assert_absent(b"behind")
    scene.assert_holds(b"before", 1)
    scene.assert_holds(b"after", 4)
