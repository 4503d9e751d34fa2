"""What ends early or is given up: nobody waits for ever, no delete comes back, and limits hold for blocks that are not written yet."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import numpy as np
import pytest

import kvlode
from kvlode import Refusal, Status, StoreClosed, StoreLocked
from kvlode.engine.buffer import Buffer
from kvlode.engine.entry import Entry, Kind
from kvlode.engine.jobs import refused
from kvlode.engine.namespaces import NamespaceTable
from kvlode.engine.registry import registry
from kvlode.engine.testing import ManualClock, open_on_device
from kvlode.gds.buffers import aligned_array
from kvlode.gds.memory import MemoryDevice
from kvlode.gds.monitor import Outcome
from kvlode.gds.testing import LateDevice
from kvlode.gds.threads import WorkerPool
from model import block_bytes, descriptor
from rig import KIB, MIB, Rig, eventually, put_blocks

SIZE = 60_000
WAIT_S = 30.0
SOON_S = 0.05
"""A deadline that is meant to pass."""
SMALL = {"block_bytes_max": 64 * KIB}


# --- the buffer: a delete that the log did not take ------------------------------------------------------------------------


class Log:
    """A buffer and the two changes of one key that wait in it: a delete, and a block put after it."""

    def __init__(self, *, expires_at_ns: int = 0) -> None:
        sequence = iter(range(1, 100))
        self.buffer = Buffer(aligned_array(MIB), serve_clean=True, next_sequence=lambda: next(sequence))
        self.namespace = NamespaceTable(None).register(descriptor(**SMALL))
        self.delete = Entry(Kind.TOMBSTONE, self.namespace, b"key")
        self.buffer.enqueue_tombstone(self.delete)
        self.block = self.entry(expires_at_ns)
        assert self.reserve(self.block)
        self.buffer.publish(self.block)

    def entry(self, expires_at_ns: int = 0) -> Entry:
        entry = Entry(Kind.BLOCK, self.namespace, b"key")
        entry.expires_at_ns = expires_at_ns
        return entry

    def reserve(self, entry: Entry, size_bytes: int = 100, now_ns: int = 0) -> bool | None:
        return self.buffer.reserve(entry, size_bytes, 0.0, now_ns=now_ns)


def test_a_delete_given_up_with_the_block_put_after_it_still_hides_the_older_block() -> None:
    log = Log()
    log.buffer.settle([log.delete, log.block], refused(Refusal.NO_SPACE))
    assert log.buffer.acquire(log.block.ident) is None
    assert log.buffer.hides(log.block.ident)


def test_a_delete_on_its_way_hides_the_key_when_the_block_after_it_expired_and_the_next_has_no_room() -> None:
    log = Log(expires_at_ns=10)
    assert log.reserve(log.entry(), size_bytes=2 * MIB, now_ns=20) is False
    assert log.buffer.hides(log.block.ident)
    log.buffer.settle([log.delete, log.block])
    assert not log.buffer.hides(log.block.ident), "the index knows of the delete now"


def test_a_durable_block_shows_through_though_the_delete_before_it_was_given_up() -> None:
    log = Log()
    log.buffer.settle([log.delete], refused(Refusal.NO_SPACE))
    log.buffer.settle([log.block])
    log.buffer.forget_clean([log.block.ident])
    assert not log.buffer.hides(log.block.ident), "the index has the block"


# --- keys ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [b"", b"k" * 256, "text"])
def test_a_delete_of_a_key_out_of_bounds_is_refused_and_the_store_goes_on(key: bytes) -> None:
    with open_on_device(MemoryDevice()) as store:
        space = store.namespace(descriptor(**SMALL))
        assert space.put(b"kept", b"1")
        with pytest.raises(kvlode.InvalidKey):
            space.delete([b"kept", key])
        assert store.flush(WAIT_S)
        assert space.contains([b"kept"]) == [True]


# --- pins ------------------------------------------------------------------------------------------------------------------


def test_blocks_that_are_not_written_yet_count_against_the_share_of_pins() -> None:
    rig = Rig(ManualClock(), capacity=16 * MIB, flush_after_s=3600.0, batch_bytes=8 * MIB)
    space = rig.store.namespace(descriptor(**SMALL))
    room_bytes = rig.store._core.pins._room_bytes
    count = room_bytes // (64 * KIB)  # a record of SIZE bytes takes a page for its header besides
    with contextlib.ExitStack() as pins:
        held = 0
        for number in range(count + 8):
            key = b"%d" % number
            assert space.put(key, block_bytes(key, number, SIZE))
            held += pins.enter_context(space.pin([key]))
        assert 0 < held <= count
    rig.close()


# --- closing with a deadline -----------------------------------------------------------------------------------------------


def test_calls_that_nobody_waits_for_are_worked_off_behind_a_shutdown_that_timed_out() -> None:
    pool = WorkerPool("kvlode-test", 1)
    held, ran = threading.Event(), threading.Event()
    pool.run(held.wait)
    cancelled = pool.submit(int)
    pool.run(ran.set)
    assert pool.shutdown(SOON_S) is False
    assert cancelled.cancelled()
    held.set()
    assert ran.wait(WAIT_S)
    assert pool.shutdown(WAIT_S), "the thread has found the stop mark behind the call"


@pytest.mark.parametrize("pool", ["_decode_pool", "_job_pool"])
def test_a_read_ends_though_the_close_beside_it_timed_out(pool: str) -> None:
    store = open_on_device(MemoryDevice(), serve_clean=False)
    space = store.namespace(descriptor(**SMALL))
    keys = [b"filler %d" % number for number in range(8)]
    put_blocks(space, 0, 8, SIZE)
    assert store.flush(WAIT_S)
    held = threading.Event()
    threads: WorkerPool = getattr(store._core, pool)
    for _ in range(threads.threads):
        threads.run(held.wait)
    job = space.submit_get(keys, [np.zeros(SIZE, np.uint8) for _ in keys])
    assert store.close(SOON_S) is False
    held.set()
    assert job.wait(WAIT_S), "nobody waits for ever for a job of a closed store"
    assert Status.PENDING not in job.statuses
    assert threads.shutdown(WAIT_S)


def test_borrowed_memory_comes_back_though_the_writer_outlives_the_close() -> None:
    device = LateDevice(MemoryDevice(), holding=())
    store = open_on_device(device, batch_bytes=128 * KIB)
    space = store.namespace(descriptor(**SMALL))
    device.hold("write")
    keys = [b"%d" % number for number in range(20)]  # many times what the writer stages at once
    job = space.submit_put(keys, [block_bytes(key, 0, SIZE) for key in keys], own="borrow")
    assert store.close(SOON_S) is False
    device.hold()
    device.release()
    assert job.wait(WAIT_S)
    writer = store._core.writer._thread
    assert eventually(lambda: not writer.is_alive())


def test_a_call_to_the_commit_thread_of_a_closed_store_is_refused() -> None:
    store = open_on_device(MemoryDevice())
    assert store.close(WAIT_S)
    with pytest.raises(StoreClosed):
        store._core.commit.call(lambda: None).result(WAIT_S)


# --- files that vanish -----------------------------------------------------------------------------------------------------


def test_a_store_whose_open_segment_is_removed_can_seal_it_all_the_same(tmp_path: Path) -> None:
    store = kvlode.open(tmp_path, capacity="256MiB", buffer="16MiB", serve_clean=False, gds="off")
    space = store.namespace(descriptor(**SMALL))
    assert space.put(b"lost", b"1")
    assert store.flush(WAIT_S)
    for path in (tmp_path / "segments").glob("*.seg"):
        path.unlink()
    assert space.get_into(b"lost", bytearray(1)) is Status.MISS
    core = store._core
    assert store.close(WAIT_S)
    assert core.health.failure is None


def test_a_handle_that_is_closed_twice_leaves_the_other_one_open(tmp_path: Path) -> None:
    first, second = (kvlode.open(tmp_path, capacity="256MiB", buffer="16MiB", gds="off") for _ in range(2))
    assert first.close(WAIT_S) and first.close(WAIT_S)
    with pytest.raises(StoreClosed, match="handle"):
        first.flush()
    space = second.namespace(descriptor(**SMALL))
    assert space.put(b"a", b"1") and second.flush(WAIT_S)
    assert second.close(WAIT_S) and second.close(WAIT_S)
    with pytest.raises(StoreClosed):
        space.put(b"b", b"1")


def test_a_store_that_this_process_is_closing_is_waited_for_and_not_blamed_on_another(tmp_path: Path) -> None:
    options = {"capacity": "256MiB", "buffer": "16MiB", "gds": "off"}
    store = kvlode.open(tmp_path, **options)
    commit = store._core.commit
    held, go_on = threading.Event(), threading.Event()
    commit.call(lambda: held.set() or go_on.wait(WAIT_S))
    assert held.wait(WAIT_S)
    closing = threading.Thread(target=store.close)
    closing.start()
    assert eventually(lambda: store._core.closed_reason is not None)
    with pytest.raises(StoreLocked, match="this process"):
        kvlode.open(tmp_path, lock_timeout_s=SOON_S, **options)
    opened: list[kvlode.DiskStore] = []
    opening = threading.Thread(target=lambda: opened.append(kvlode.open(tmp_path, **options)))
    opening.start()
    go_on.set()
    closing.join(WAIT_S)
    opening.join(WAIT_S)
    assert opened[0].namespace(descriptor(**SMALL)).put(b"a", b"1")
    assert opened[0].close(WAIT_S)


def test_a_flush_takes_no_longer_than_its_deadline_although_it_waits_twice() -> None:
    rig = Rig(ManualClock(), flush_after_s=60.0)
    core = rig.store._core
    waited: list[float | None] = []

    class Recorded(Outcome[bool]):
        def result(self, timeout_s: float | None = None) -> bool:
            waited.append(timeout_s)
            return True

    settled = core.buffer.wait_settled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core.buffer, "wait_settled", lambda ticket, timeout_s: threading.Event().wait(0.1) or settled(ticket, timeout_s))
        patch.setattr(core.commit, "call", lambda function: Recorded())
        assert rig.store.flush(1.0)
    assert waited[0] is not None and waited[0] <= 0.9
    rig.close()


def test_a_batch_of_deletes_is_bounded_by_the_pages_that_they_take() -> None:
    sequence = iter(range(1, 1000))
    buffer = Buffer(aligned_array(MIB), serve_clean=True, next_sequence=lambda: next(sequence))
    namespace = NamespaceTable(None).register(descriptor(**SMALL))
    for number in range(100):
        buffer.enqueue_tombstone(Entry(Kind.TOMBSTONE, namespace, b"%d" % number))
    assert len(buffer.take(16 * KIB)) <= 5


def test_a_closed_store_that_an_interrupt_has_left_in_the_registry_is_not_waited_for(tmp_path: Path) -> None:
    store = kvlode.open(tmp_path, capacity="256MiB", buffer="8MiB")
    left = registry.find(str(tmp_path))
    assert left is not None and store.close(WAIT_S)
    with registry.lock:
        registry.add(left)
    with kvlode.open(tmp_path, capacity="256MiB", buffer="8MiB", lock_timeout_s=1.0) as again:
        assert again.namespace(descriptor()).put(b"a", b"1")
