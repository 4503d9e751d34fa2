"""What the store does when something below it fails: the table in docs/design.md section 9, a test or more for each row."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from kvlode import BlockSpace, DeviceError, KvlodeError, PutState, Refusal, Status, StoreClosed, StoreFailed
from kvlode.engine.catalog import BATCH_ENTRIES_MAX, Catalog, Checkpoint
from kvlode.engine.index import IndexWriteError
from kvlode.engine.index_memory import MemoryIndex
from kvlode.engine.jobs import ACCEPTED
from kvlode.engine.reclaim import FREE_AGAIN_S
from kvlode.engine.stats import Counters
from kvlode.engine.testing import ManualClock
from kvlode.gds.testing import Effect, Fault, FaultyDevice, LateDevice
from model import block_bytes, descriptor
from rig import KIB, MIB, Rig, eventually, put_blocks, read

SIZE = 30_000
OPTIONS: dict[str, Any] = {"capacity": 3 * MIB, "segment_bytes": 128 * KIB, "serve_clean": False, "codec": "raw"}
MANY = 400
"""Blocks of ``SIZE``: more than four times what fits into the store."""
WAIT_S = 30.0


def in_segments(path: str) -> bool:
    return path.endswith(".seg")


def spare(path: str) -> bool:
    return path.endswith("spare.new")


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(ManualClock(), wrap=FaultyDevice, **OPTIONS)
    yield made
    made.device.clear()
    made.close()


def space_of(rig: Rig) -> BlockSpace:
    return rig.store.namespace(descriptor(block_bytes_max=64 * KIB))


def inject(rig: Rig, operation: str, effect: Effect = Effect.ERROR, **fields: Any) -> Fault:
    fault: Fault = rig.device.inject(Fault(operation, effect, **fields))
    return fault


def put(rig: Rig, key: bytes, version: int) -> None:
    assert space_of(rig).put(key, block_bytes(key, version, SIZE)).state is PutState.ACCEPTED


def assert_holds(rig: Rig, key: bytes, version: int) -> None:
    status, out = read(space_of(rig), key, SIZE)
    assert status is Status.HIT, f"{key!r}: {status.name}"
    assert np.array_equal(out, block_bytes(key, version, SIZE)), f"{key!r}: wrong bytes"


def status_of(rig: Rig, key: bytes) -> Status:
    return read(space_of(rig), key, SIZE)[0]


# --- no space when a segment is allocated ---------------------------------------------------------------------------


def test_a_full_drive_is_answered_by_reclaim(rig: Rig) -> None:
    put_blocks(space_of(rig), 0, 20, SIZE)
    assert rig.store.flush(WAIT_S)
    before = rig.counter("segments_freed")
    full = inject(rig, "preallocate", errno=errno.ENOSPC, times=3, where=spare)
    put_blocks(space_of(rig), 20, 40, SIZE)
    assert rig.store.flush(WAIT_S)
    assert full.hits == 3 and rig.counter("no_space_errors") == 3
    assert rig.counter("segments_freed") > before
    assert rig.counter("refused_puts") == 0
    assert rig.store.stats()["failure"] is None


def test_a_drive_that_others_fill_costs_no_block_while_nothing_is_put(rig: Rig) -> None:
    put_blocks(space_of(rig), 0, 20, SIZE)
    assert rig.store.flush(WAIT_S)
    assert eventually(lambda: rig.store._core.keeper._spare_bytes > 0)
    opened = rig.counter("segments_opened")
    full = inject(rig, "preallocate", errno=errno.ENOSPC, times=None, where=spare)
    number = 20
    while rig.counter("segments_opened") == opened:  # the spare that is there already is used up
        put_blocks(space_of(rig), number, number + 1, SIZE)
        assert rig.store.flush(WAIT_S)
        number += 1
    before = rig.counter("segments_freed")
    for tries in range(5):  # the keeper looks again, as it does from time to time
        hits = full.hits
        rig.store._core.keeper.poke()
        assert eventually(lambda hits=hits: full.hits > hits), f"no try {tries}"
    assert rig.counter("segments_freed") == before


def test_a_drive_whose_room_others_take_costs_one_segment_and_not_the_whole_cache(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    put_blocks(space_of(rig), 0, 60, SIZE)
    assert rig.store.flush(WAIT_S)
    before = rig.counter("segments_retired")
    monkeypatch.setattr(rig.device, "free_bytes", lambda path: 0)
    inject(rig, "preallocate", errno=errno.ENOSPC, times=None, where=spare)
    refused = 0
    for number in range(60, MANY):
        refused += not space_of(rig).put(b"filler %d" % number, block_bytes(b"filler %d" % number, 4 * number, SIZE))
        refused += not rig.store.flush(WAIT_S)
        if refused == 10:
            break
    assert refused == 10
    retired = rig.counter("segments_retired")
    assert retired - before <= 2
    rig.clock.advance(FREE_AGAIN_S)
    assert eventually(lambda: rig.counter("segments_retired") > retired), "a store that refuses puts does not try again by itself"


def test_a_full_drive_with_nothing_to_free_refuses_puts_until_there_is_room(rig: Rig) -> None:
    assert eventually(lambda: rig.store._core.keeper._spare_bytes > 0)
    full = inject(rig, "preallocate", errno=errno.ENOSPC, times=None, where=spare)
    status, flushed, number = ACCEPTED, True, 0
    while status:
        status = space_of(rig).put(b"%d" % number, block_bytes(b"%d" % number, 4, SIZE))
        flushed = rig.store.flush(WAIT_S) and flushed
        number += 1
        assert number < MANY, "nothing was refused"
    assert full.hits > 0
    assert status.reason is Refusal.NO_SPACE and not flushed
    assert rig.counter("refused_no_space") > 0 and rig.counter("refused_puts") > 0
    assert rig.store.stats()["failure"] is None
    rig.device.clear()
    assert eventually(lambda: bool(space_of(rig).put(b"again", block_bytes(b"again", 4, SIZE)))), "room came back, puts did not"
    assert rig.store.flush(WAIT_S)
    assert_holds(rig, b"again", 4)


# --- a data write or a sync fails -----------------------------------------------------------------------------------

WRITE_FAULTS = pytest.mark.parametrize(
    ("operation", "effect", "code"),
    [
        ("write", Effect.ERROR, errno.EIO),
        ("write", Effect.SHORT, errno.ENOSPC),
        ("sync", Effect.ERROR, errno.EIO),
        ("sync", Effect.ERROR, errno.ENOSPC),
    ],
)


@WRITE_FAULTS
def test_a_failed_write_stops_writing_for_good_and_loses_nothing_that_was_flushed(
    rig: Rig, operation: str, effect: Effect, code: int
) -> None:
    put(rig, b"flushed", 1)
    assert rig.store.flush(WAIT_S)
    fault = inject(rig, operation, effect, errno=code, where=in_segments)
    put(rig, b"dirty", 2)
    assert not rig.store.flush(WAIT_S)
    assert str(rig.store.stats()["failure"])
    assert_holds(rig, b"flushed", 1)
    assert_holds(rig, b"dirty", 2)
    info = space_of(rig).info([b"dirty"])[0]
    assert info is not None and not info.durable, "a block that is nowhere but in memory is called durable"
    assert space_of(rig).put(b"late", b"1").reason is Refusal.STORE_FAILED
    with pytest.raises(StoreFailed) as caught:
        space_of(rig).delete([b"flushed"])
    assert_complete(caught.value)
    assert not rig.store.flush(WAIT_S)
    assert fault.hits == 1, "a failed operation was tried again"
    rig.device.clear()
    rig.crash(keep="none")
    assert_holds(rig, b"flushed", 1)
    assert status_of(rig, b"dirty") is Status.MISS
    put(rig, b"dirty", 3)
    assert rig.store.flush(WAIT_S)
    assert_holds(rig, b"dirty", 3)


def test_a_block_whose_delete_could_not_be_written_stays_hidden_while_the_store_is_open(rig: Rig) -> None:
    put(rig, b"k", 1)
    assert rig.store.flush(WAIT_S)
    inject(rig, "write", where=in_segments)
    assert space_of(rig).delete([b"k"]) == 1
    assert not rig.store.flush(WAIT_S), "nothing was written, and flush says that all is durable"
    assert status_of(rig, b"k") is Status.MISS
    assert space_of(rig).contains([b"k"]) == [False]


def test_nothing_is_synced_again_after_a_failed_sync(rig: Rig) -> None:
    put(rig, b"a", 1)
    assert rig.store.flush(WAIT_S)
    fault = inject(rig, "sync", errno=errno.EIO, where=in_segments)
    put(rig, b"b", 2)
    assert not rig.store.flush(WAIT_S)
    seen = fault.seen
    for _ in range(3):
        assert not rig.store.flush(WAIT_S)
        space_of(rig).put(b"c", b"3")
    rig.close()
    assert fault.seen == seen
    rig.device.clear()
    rig.index = rig.index.reopen()
    rig.open()


def test_a_borrowed_block_is_given_back_when_the_write_fails(rig: Rig) -> None:
    inject(rig, "write", where=in_segments)
    memory = block_bytes(b"lent", 1, SIZE)
    job = space_of(rig).submit_put([b"lent"], [memory], own="borrow")
    assert job.wait(WAIT_S)
    assert job.statuses[0].reason is Refusal.STORE_FAILED
    memory[:] = 0
    assert status_of(rig, b"lent") is Status.MISS, "the caller's memory still answers"


# --- reads ----------------------------------------------------------------------------------------------------------


def test_a_read_that_fails_drops_nothing(rig: Rig) -> None:
    put(rig, b"k", 1)
    assert rig.store.flush(WAIT_S)
    inject(rig, "read", errno=errno.EIO, where=in_segments)
    assert status_of(rig, b"k") is Status.IO_ERROR
    assert rig.counter("read_errors") == 1
    assert_holds(rig, b"k", 1)


def test_one_unreadable_block_does_not_fail_the_others_of_a_list(rig: Rig) -> None:
    for number in range(8):
        put(rig, b"%d" % number, number)
        assert rig.store.flush(WAIT_S)
    first = rig.segment_of(space_of(rig), b"0")
    path = rig.store._core.segments.path(first or 0)
    inject(rig, "read", times=None, where=lambda at: at == path)
    keys = [b"%d" % number for number in range(8)]
    outs = [np.zeros(SIZE, np.uint8) for _ in keys]
    statuses = space_of(rig).get_many_into(keys, outs)
    for number, (key, out, status) in enumerate(zip(keys, outs, statuses, strict=True)):
        assert status is (Status.IO_ERROR if rig.segment_of(space_of(rig), key) == first else Status.HIT)
        assert status is Status.IO_ERROR or np.array_equal(out, block_bytes(key, number, SIZE))
    assert set(statuses) == {Status.IO_ERROR, Status.HIT}


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_is_corrupt_and_then_a_miss(rig: Rig, seed: int) -> None:
    size = 32_768  # whole pages: no byte that is read is padding
    assert space_of(rig).put(b"k", block_bytes(b"k", 4, size))
    assert rig.store.flush(WAIT_S)
    inject(rig, "read", Effect.BIT_FLIP, seed=seed, where=in_segments)
    assert read(space_of(rig), b"k", size)[0] is Status.CORRUPT
    rig.store._core.commit.call(lambda: None).result(WAIT_S)
    assert read(space_of(rig), b"k", size)[0] is Status.MISS
    put(rig, b"k", 2)
    assert rig.store.flush(WAIT_S)
    assert_holds(rig, b"k", 2)


def test_a_deadline_that_passes_gives_the_memory_back_untouched() -> None:
    rig = Rig(ManualClock(), wrap=lambda device: LateDevice(device, holding=()), **OPTIONS)
    put(rig, b"k", 1)
    assert rig.store.flush(WAIT_S)
    rig.device.hold("read")
    out = np.zeros(SIZE, np.uint8)
    assert space_of(rig).get_into(b"k", out, timeout=0.01) is Status.PENDING
    assert rig.device.wait_for_held(1)
    out[:] = 0xA5  # the caller uses its memory for something else
    rig.device.hold()
    rig.device.release()
    assert_holds(rig, b"k", 1)  # reads of one segment are served in turn: the late one has come back, too
    rig.close()
    assert (out == 0xA5).all()


# --- the index ------------------------------------------------------------------------------------------------------


def test_an_index_that_refuses_writes_is_served_from_memory_and_caught_up(rig: Rig) -> None:
    put(rig, b"before", 1)
    assert rig.store.flush(WAIT_S)
    rig.index.fail_next_apply(times=4)
    put(rig, b"a", 2)
    assert space_of(rig).delete([b"before"]) == 1
    assert rig.store.flush(WAIT_S)
    assert rig.counter("index_write_errors") > 0
    assert_holds(rig, b"a", 2)
    assert status_of(rig, b"before") is Status.MISS
    assert rig.store.stats()["failure"] is None
    assert eventually(lambda: rig.store.stats()["index"]["waiting_changes"] == 0)
    assert_holds(rig, b"a", 2)
    assert rig.index.get_many([space_of(rig).digest + b"a"])[0] is not None


@pytest.mark.parametrize("keep_index", [False, True])
def test_what_an_index_refused_until_the_crash_is_read_from_the_log(rig: Rig, keep_index: bool) -> None:
    put(rig, b"deleted", 1)
    assert rig.store.flush(WAIT_S)
    rig.index.fail_next_apply(times=1000)
    put(rig, b"a", 2)
    space_of(rig).delete([b"deleted"])
    assert rig.store.flush(WAIT_S)
    rig.crash(keep_index=keep_index)
    assert_holds(rig, b"a", 2)
    assert status_of(rig, b"deleted") is Status.MISS


def test_an_index_whose_sync_failed_is_opened_anew_and_gets_back_what_it_lost(rig: Rig) -> None:
    put(rig, b"deleted", 1)
    put(rig, b"synced", 2)
    assert rig.store.flush(WAIT_S)
    rig.index.fail_next_sync()
    put(rig, b"lost", 3)
    assert space_of(rig).delete([b"deleted"]) == 1
    assert rig.store.flush(WAIT_S), "everything is durable in the log: the index is derived from it"
    assert rig.counter("index_write_errors") == 1
    assert_holds(rig, b"lost", 3)
    assert status_of(rig, b"deleted") is Status.MISS
    assert eventually(lambda: rig.store.stats()["index"]["waiting_changes"] == 0), "the index stayed as the failed sync left it"
    assert rig.counter("index_reopenings") == 1
    assert rig.index.unsynced_batches == 0
    found = rig.index.get_many([space_of(rig).digest + key for key in (b"synced", b"lost", b"deleted")])
    assert [value is not None for value in found] == [True, True, False]
    assert_holds(rig, b"synced", 2)
    rig.crash()
    assert rig.counter("recovered_records") == 0, "the checkpoint that was lost is not back"


class IndexWithoutHandle(MemoryIndex):
    """Says nothing after a failed sync for as long as it cannot be opened anew."""

    openable = False

    def readable(self) -> bool:
        return not self._broken

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [None] * len(keys) if self._broken else super().get_many(keys)

    def open_anew(self) -> None:
        if not self.openable:
            raise IndexWriteError("the index could not be opened again", actual="refused by the test")
        super().open_anew()


def test_nothing_is_freed_while_the_index_cannot_be_opened_anew(rig: Rig) -> None:
    put(rig, b"held", 1)
    rig.close()
    rig.index = index = IndexWithoutHandle(rig.index.reopen()._entries)
    rig.open()
    with space_of(rig).pin([b"held"]) as held:
        assert held == 1
        index.fail_next_sync()
        status, number = ACCEPTED, 0
        while status:
            status = space_of(rig).put(b"%d" % number, block_bytes(b"%d" % number, 4, SIZE))
            rig.store.flush(WAIT_S)
            number += 1
            assert number < MANY, "segments were freed"
        assert status.reason is Refusal.NO_SPACE
        assert rig.counter("segments_retired") == 0
        index.openable = True
        assert eventually(lambda: bool(space_of(rig).put(b"again", block_bytes(b"again", 4, SIZE))))
        put_blocks(space_of(rig), 0, MANY, SIZE)
        assert rig.store.flush(WAIT_S)
        assert rig.counter("segments_freed") > 0
        assert_holds(rig, b"held", 1)


def test_a_writer_goes_on_waiting_while_the_index_is_opened_anew(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = rig.store._core.keeper
    empty, tries_while_waiting = keeper._evictor.empty, 0

    def empty_after_an_opening(*arguments: Any) -> int:
        nonlocal tries_while_waiting
        tries_while_waiting += keeper._writer_waits
        if tries_while_waiting < 2:
            raise IndexWriteError("a scan was ended: the index was opened anew")
        return empty(*arguments)

    monkeypatch.setattr(keeper._evictor, "empty", empty_after_an_opening)
    put_blocks(space_of(rig), 0, MANY, SIZE)
    assert rig.store.flush(WAIT_S)
    assert tries_while_waiting >= 2
    assert rig.counter("refused_puts") == 0 and rig.counter("reclaim_errors") == 0


class IndexOfOneBatch(MemoryIndex):
    """Takes as many batches as it is allowed to."""

    allowed = 0

    def apply(self, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes] = ()) -> None:
        if self.allowed == 0:
            raise IndexWriteError("index refused a batch")
        self.allowed -= 1
        super().apply(puts, deletes)


@pytest.mark.parametrize("allowed", [0, 1, 2, 3])
def test_a_checkpoint_never_gets_ahead_of_changes_that_waited_with_it(allowed: int) -> None:
    index = IndexOfOneBatch()
    catalog = Catalog(index, Counters())
    commits = [[b"namespace %d: %6d" % (commit, i) for i in range(BATCH_ENTRIES_MAX)] for commit in range(2)]
    for number, keys in enumerate(commits):
        index.allowed = allowed * number
        catalog.change(dict([*((key, b"") for key in keys), Catalog.checkpoint_change(Checkpoint(number + 1, 0, 0))]))
    after_crash = Catalog(index.crash(index.unsynced_batches), Counters()).checkpoint()
    covered = 0 if after_crash is None else after_crash.segment_id
    for keys in commits[:covered]:
        assert None not in index.get_many(keys), f"checkpoint {covered} is in the index, what it covers is not"


def test_a_namespace_dropped_while_its_entries_wait_for_the_index_stays_dropped(rig: Rig) -> None:
    put(rig, b"waits", 1)
    rig.index.fail_next_apply(times=4)
    assert rig.store.flush(WAIT_S)
    space_of(rig).drop()
    assert rig.store.flush(WAIT_S)
    rig.store._core.commit.call(lambda: None).result(WAIT_S)
    assert status_of(rig, b"waits") is Status.MISS
    assert eventually(lambda: rig.store.stats()["index"]["waiting_changes"] == 0)
    assert status_of(rig, b"waits") is Status.MISS
    put(rig, b"waits", 2)
    assert rig.store.flush(WAIT_S)
    assert_holds(rig, b"waits", 2)


def test_a_block_put_after_a_drop_that_waits_for_the_index_stays(rig: Rig) -> None:
    put(rig, b"k", 1)
    assert rig.store.flush(WAIT_S)
    rig.index.fail_next_apply(times=3)
    space_of(rig).drop()
    put(rig, b"k", 2)
    assert rig.store.flush(WAIT_S)
    assert eventually(lambda: rig.store.stats()["index"]["waiting_changes"] == 0)
    rig.store._core.commit.call(lambda: None).result(WAIT_S)
    assert_holds(rig, b"k", 2)


def test_an_index_damaged_while_open_gives_misses_and_is_whole_after_a_rebuild(rig: Rig) -> None:
    put(rig, b"damaged", 1)
    put(rig, b"whole", 2)
    assert rig.store.flush(WAIT_S)
    rig.index.damage([space_of(rig).digest + b"damaged"])
    assert status_of(rig, b"damaged") is Status.MISS
    assert_holds(rig, b"whole", 2)
    rig.reopen(lose_index=True)
    assert_holds(rig, b"damaged", 1)
    assert_holds(rig, b"whole", 2)


# --- files and memory that change under the store ---------------------------------------------------------------------


def test_a_segment_file_that_disappears_is_a_miss_for_its_blocks_alone(rig: Rig) -> None:
    put(rig, b"lost", 1)
    assert rig.store.flush(WAIT_S)
    lost = rig.segment_of(space_of(rig), b"lost")
    assert lost is not None
    put_blocks(space_of(rig), 0, 12, SIZE)
    put(rig, b"kept", 2)
    assert rig.store.flush(WAIT_S)
    rig.memory.remove(rig.store._core.segments.path(lost))
    assert status_of(rig, b"lost") is Status.MISS
    assert_holds(rig, b"kept", 2)
    put(rig, b"lost", 3)
    put_blocks(space_of(rig), 100, 300, SIZE)
    assert rig.store.flush(60.0)
    put(rig, b"kept" * 2, 4)
    assert rig.store.flush(WAIT_S)
    assert_holds(rig, b"kept" * 2, 4)
    rig.assert_within_capacity()


def change_borrowed(rig: Rig) -> tuple[Any, np.ndarray]:
    memory = block_bytes(b"changed", 1, SIZE)
    return space_of(rig).submit_put([b"changed"], [memory], own="borrow"), memory


def change_copied(rig: Rig) -> tuple[Any, np.ndarray]:
    space = space_of(rig)
    job = space.submit_put([b"changed"], [block_bytes(b"changed", 1, SIZE)])
    return job, rig.store._core.buffer.entries[space.digest + b"changed"].spans[0]


@pytest.mark.parametrize("submit", [change_borrowed, change_copied])
def test_bytes_that_change_between_put_and_flush_are_not_stored(submit: Callable[[Rig], tuple[Any, np.ndarray]]) -> None:
    rig = Rig(ManualClock(), **(OPTIONS | {"flush_after_s": 3600.0}))
    put(rig, b"intact", 2)
    job, memory = submit(rig)
    memory[20_000] ^= 1
    assert not rig.store.flush(WAIT_S)
    assert job.statuses[0].state is PutState.REFUSED and job.statuses[0].reason is Refusal.BUFFER_DAMAGED
    assert rig.counter("buffer_damaged_blocks") == 1
    assert status_of(rig, b"changed") is Status.MISS
    assert_holds(rig, b"intact", 2)
    assert rig.store.flush(WAIT_S), "the loss was reported once"
    rig.crash(keep="all", lose_index=True)
    assert status_of(rig, b"changed") is Status.MISS
    assert_holds(rig, b"intact", 2)
    rig.close()


# --- what errors say ----------------------------------------------------------------------------------------------------


def assert_complete(error: KvlodeError) -> None:
    """What, where, expected, actual, and what to do."""
    assert error.what and error.where and error.expected is not None and error.actual is not None and error.action, str(error)


@pytest.mark.parametrize("operation", ["read", "list_folder", "open", "lock", "make_folder", "sync_folder"])
def test_an_error_at_opening_names_the_call_and_the_place_and_leaves_the_store_whole(rig: Rig, operation: str) -> None:
    put(rig, b"k", 1)
    assert rig.store.flush(WAIT_S)
    rig.close()
    rig.index = rig.index.reopen()
    fault = inject(rig, operation, errno=errno.EIO)
    try:
        rig.open()
    except DeviceError as error:
        assert error.where and "/store" in str(error.where) and "Input/output error" in str(error)
        rig.device.clear()
        rig.open()
    assert fault.hits == 1
    rig.device.clear()
    assert_holds(rig, b"k", 1)
    put(rig, b"another", 2)
    assert rig.store.flush(WAIT_S)


def test_a_put_that_fails_half_way_gives_the_job_of_what_was_lent(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host needs it to know when its memory is its own again."""
    buffer = rig.store._core.buffer
    reserve, calls = buffer.reserve, []

    def closing(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            raise StoreClosed("the store is closed")
        return reserve(*args, **options)

    monkeypatch.setattr(buffer, "reserve", closing)
    blocks = [block_bytes(key, 1, 5000) for key in (b"a", b"b", b"c")]
    job = space_of(rig).submit_put([b"a", b"b", b"c"], blocks, own="borrow")
    monkeypatch.undo()
    assert rig.store.flush() and job.wait(30.0)
    assert [status.reason for status in job.statuses] == [None, Refusal.STORE_FAILED, Refusal.STORE_FAILED]
    assert read(space_of(rig), b"a", 5000)[0] is Status.HIT and space_of(rig).contains([b"b", b"c"]) == [False, False]
    monkeypatch.setattr(buffer, "reserve", closing)
    with pytest.raises(StoreClosed):
        space_of(rig).submit_put([b"d"], blocks[:1], own="borrow")
