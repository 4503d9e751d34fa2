"""Transfers that end late: memory that the caller has back is never touched again, and nothing waits without a bound.

Every read and write of a store is held by the test. A canary stands in memory that the caller took back meanwhile; then the
drive finishes what it had begun.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from device_conformance import PAGE, WAIT_S, content, done, noise, written
from kvlode import CompletionQueue, PutState, Status
from kvlode.engine.testing import open_on_device
from kvlode.format.errors import DeviceError
from kvlode.gds.buffers import aligned_array
from kvlode.gds.memory import MemoryDevice
from kvlode.gds.testing import Fault, FaultyDevice, LateDevice
from model import block_bytes, descriptor
from rig import KIB, MIB, eventually

SIZE = 64 * KIB
CANARY = 0xA5
SOON_S = 0.05
"""A deadline that is meant to pass."""


def our_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("kvlode")}


@pytest.fixture(autouse=True)
def no_thread_is_left_behind() -> Iterator[None]:
    before = our_threads()
    yield
    assert eventually(lambda: our_threads() <= before), our_threads() - before


# --- the device -----------------------------------------------------------------------------------------------------------


def test_a_held_read_has_not_touched_its_buffer_and_a_held_write_not_the_drive() -> None:
    device = LateDevice(MemoryDevice(), holding=())
    device.make_folder("/x")
    file = written(device, "/x/a", noise(1, 2 * PAGE))
    device.hold("read", "write")
    out = aligned_array(2 * PAGE)
    out[:] = CANARY
    read, write = file.read(0, [out]), file.write(0, [noise(2, PAGE)])
    assert not read.cancel() and not read.done() and (out == CANARY).all()
    assert [(held.operation, held.path, held.offset) for held in device.held()] == [("read", "/x/a", 0), ("write", "/x/a", 0)]
    assert device.release(1) == 1
    assert done(read) == 2 * PAGE and np.array_equal(out, noise(1, 2 * PAGE))
    assert not write.done()
    assert device.release() == 1 and done(write) == PAGE
    assert np.array_equal(content(device.inner.open("/x/a", "read"), PAGE), noise(2, PAGE))
    device.hold()
    file.close()


def test_closing_a_file_waits_for_its_held_transfers_and_refuses_new_ones() -> None:
    device = LateDevice(MemoryDevice(), holding=())
    device.make_folder("/x")
    file = written(device, "/x/a", noise(1, PAGE))
    device.hold("read")
    read = file.read(0, [aligned_array(PAGE)])
    closing = threading.Thread(daemon=True, target=file.close)
    closing.start()

    def refused() -> bool:
        try:
            file.write(0, [noise(2, PAGE)])
        except DeviceError:
            return True
        return False

    assert eventually(refused)
    assert closing.is_alive() and not read.done()
    device.release()
    closing.join(WAIT_S)
    assert not closing.is_alive() and done(read) == PAGE


def test_errors_of_the_inner_device_come_late_too() -> None:
    faulty = FaultyDevice(MemoryDevice())
    device = LateDevice(faulty, holding=("read",))
    device.make_folder("/x")
    file = written(device, "/x/a", noise(1, PAGE))
    faulty.inject(Fault("read"))
    read = file.read(0, [aligned_array(PAGE)])
    assert not read.done()
    device.release()
    with pytest.raises(DeviceError):
        done(read)
    device.close()
    file.close()


# --- a store --------------------------------------------------------------------------------------------------------------


class Scene:
    """Eight flushed blocks on a late device; ``store`` has been opened anew, so that they are read from the drive."""

    def __init__(self, codec: str = "raw", *, blocks: int = 8, size: int = SIZE, **options: Any) -> None:
        self.device = LateDevice(MemoryDevice(), holding=())
        self.options = {"codec": codec, "flush_after_s": 60.0, "serve_clean": False} | options
        self.size = size
        self.keys = [b"block %d" % number for number in range(blocks)]
        self.blocks = [block_bytes(key, 1, size) for key in self.keys]
        with self.opened() as store:
            assert all(store.namespace(self.descriptor).submit_put(self.keys, self.blocks).statuses)
            assert store.flush(WAIT_S)
        self.store = self.opened()
        self.space = self.store.namespace(self.descriptor)

    @property
    def descriptor(self) -> Any:
        return descriptor(block_bytes_max=self.size)

    def opened(self) -> Any:
        return open_on_device(self.device, **self.options)

    def outs(self, *, aligned: bool) -> list[np.ndarray]:
        outs = []
        for _ in self.keys:
            area = aligned_array(self.size + PAGE)
            area[:] = CANARY
            outs.append(area[: self.size] if aligned else area[1 : self.size + 1])
        return outs

    def finish(self) -> None:
        self.device.hold()
        self.device.release()
        assert self.store.close(WAIT_S)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("codec", ["raw", "zstd", "planes+zstd"])
def test_after_a_timeout_the_destinations_are_the_callers(codec: str, aligned: bool) -> None:
    scene = Scene(codec)
    scene.device.hold("read")
    outs = scene.outs(aligned=aligned)
    assert scene.space.get_many_into(scene.keys, outs, timeout=SOON_S) == [Status.PENDING] * 8
    assert all((out == CANARY).all() for out in outs), "nothing was delivered before the deadline"
    for out in outs:
        out[:] = 0x5A
    assert scene.device.held(), "the reads are still under way"
    scene.finish()
    assert all((out == 0x5A).all() for out in outs), "a late read was delivered into memory that the caller had back"


def test_a_timeout_delivers_what_the_buffer_holds_and_nothing_else() -> None:
    scene = Scene(serve_clean=True)
    fresh = block_bytes(b"fresh", 1, SIZE)
    assert scene.space.put(b"fresh", fresh)
    scene.device.hold("read")
    outs = scene.outs(aligned=True)[:2]
    assert scene.space.get_many_into([b"fresh", scene.keys[0]], outs, timeout=SOON_S) == [Status.HIT, Status.PENDING]
    assert np.array_equal(outs[0], fresh) and (outs[1] == CANARY).all()
    scene.finish()
    assert np.array_equal(outs[0], fresh) and (outs[1] == CANARY).all()


def test_the_blocks_are_there_for_the_next_read_after_a_timeout() -> None:
    scene = Scene()
    scene.device.hold("read")
    assert scene.space.get_into(scene.keys[0], scene.outs(aligned=True)[0], timeout=SOON_S) is Status.PENDING
    scene.device.hold()
    scene.device.release()
    outs = scene.outs(aligned=True)
    assert scene.space.get_many_into(scene.keys, outs, timeout=WAIT_S) == [Status.HIT] * 8
    assert all(np.array_equal(out, block) for out, block in zip(outs, scene.blocks, strict=True))
    scene.finish()


def test_destinations_of_a_job_are_the_jobs_until_it_is_done() -> None:
    scene = Scene()
    scene.device.hold("read")
    outs = scene.outs(aligned=True)
    queue = CompletionQueue()
    job = scene.space.submit_get(scene.keys, outs, queue=queue)
    assert not job.wait(SOON_S) and not job.done() and job.statuses == [Status.PENDING] * 8
    assert queue.pop() is None
    scene.device.release()
    assert job.wait(WAIT_S) and job.statuses == [Status.HIT] * 8
    assert queue.pop() is job
    assert all(np.array_equal(out, block) for out, block in zip(outs, scene.blocks, strict=True))
    queue.close()
    scene.finish()


def test_cancel_returns_only_when_no_transfer_targets_the_destinations() -> None:
    scene = Scene()
    scene.device.hold("read")
    outs = scene.outs(aligned=True)
    job = scene.space.submit_get(scene.keys, outs)
    assert scene.device.wait_for_held(1)
    assert not job.cancel(timeout=SOON_S) and job.cancelled
    assert not job.done() and job.statuses == [Status.PENDING] * 8, "reads into the destinations are still under way"
    scene.device.hold()
    scene.device.release()
    assert job.cancel() and job.done() and scene.device.held() == []
    assert set(job.statuses) == {Status.CANCELLED}
    for out in outs:
        out[:] = CANARY
    scene.finish()
    assert all((out == CANARY).all() for out in outs), "a destination was touched after cancel had returned"


def test_cancel_does_not_wait_for_a_drive_that_reads_into_memory_of_the_store() -> None:
    scene = Scene()
    scene.device.hold("read")
    outs = scene.outs(aligned=False)
    queue = CompletionQueue()
    job = scene.space.submit_get(scene.keys, outs, queue=queue)
    assert scene.device.wait_for_held(1)
    assert job.cancel(timeout=0) and queue.pop() is job
    assert job.statuses == [Status.CANCELLED] * 8
    for out in outs:
        out[:] = CANARY
    scene.device.hold()
    scene.device.release()
    queue.close()
    scene.finish()
    assert all((out == CANARY).all() for out in outs), "a destination was touched after cancel had returned"


def test_cancel_stops_what_was_not_issued() -> None:
    """Bounce memory for one large read: the second waits for the first, and is never issued."""
    scene = Scene(
        blocks=6, size=4 * MIB, bounce_bytes=8 * MIB, capacity=1 << 30, segment_bytes=32 * MIB, buffer=64 * MIB, batch_bytes=8 * MIB
    )
    scene.device.hold("read")
    outs = scene.outs(aligned=False)
    job = scene.space.submit_get(scene.keys, outs)
    assert scene.device.wait_for_held(1)
    cancelling = threading.Thread(daemon=True, target=job.cancel)
    cancelling.start()
    assert eventually(lambda: job.cancelled)
    issued = len(scene.device.held())
    scene.device.release()
    cancelling.join(WAIT_S)
    assert issued == 1 and job.done()
    assert Status.CANCELLED in job.statuses and set(job.statuses) <= {Status.HIT, Status.CANCELLED}
    assert scene.device.held() == [], "no read was issued after the cancel"
    for status, out, block in zip(job.statuses, outs, scene.blocks, strict=True):
        assert status is Status.CANCELLED or np.array_equal(out, block)
    scene.finish()


def test_borrowed_memory_is_the_jobs_until_it_is_done_and_the_callers_from_then_on() -> None:
    scene = Scene()
    keys = [b"lent %d" % number for number in range(4)]
    lent = [block_bytes(key, 0, SIZE) for key in keys]
    kept = [block.copy() for block in lent]
    scene.device.hold("write")
    job = scene.space.submit_put(keys, lent, own="borrow")
    flushing = threading.Thread(daemon=True, target=scene.store.flush, args=(WAIT_S,))
    flushing.start()
    assert scene.device.wait_for_held(1)
    assert not job.wait(SOON_S) and not job.done()
    assert [status.state for status in job.statuses] == [PutState.ACCEPTED] * 4
    outs = [np.zeros(SIZE, np.uint8) for _ in keys]
    assert scene.space.get_many_into(keys, outs) == [Status.HIT] * 4, "readable from the caller's memory meanwhile"
    scene.device.hold()
    scene.device.release()
    assert job.wait(WAIT_S)
    flushing.join(WAIT_S)
    assert [status.state for status in job.statuses] == [PutState.DURABLE] * 4
    for block in lent:
        block[:] = CANARY
    assert scene.space.get_many_into(keys, outs) == [Status.HIT] * 4
    assert all(np.array_equal(out, block) for out, block in zip(outs, kept, strict=True)), "what is stored is what was put"
    assert all((block == CANARY).all() for block in lent)
    scene.finish()


def test_copied_blocks_are_the_callers_as_soon_as_the_call_returns() -> None:
    scene = Scene()
    scene.device.hold("write")
    block = block_bytes(b"copied", 0, SIZE)
    kept = block.copy()
    assert scene.space.put(b"copied", block)
    block[:] = CANARY
    flushing = threading.Thread(daemon=True, target=scene.store.flush, args=(WAIT_S,))
    flushing.start()
    assert scene.device.wait_for_held(1)
    scene.device.hold()
    scene.device.release()
    flushing.join(WAIT_S)
    out = np.zeros(SIZE, np.uint8)
    assert scene.space.get_into(b"copied", out) is Status.HIT and np.array_equal(out, kept)
    scene.finish()


def test_a_flush_that_the_drive_holds_up_says_false_at_its_deadline_and_true_later() -> None:
    scene = Scene()
    assert scene.space.put(b"slow", block_bytes(b"slow", 0, SIZE))
    scene.device.hold("write")
    assert scene.store.flush(SOON_S) is False
    scene.device.hold()
    scene.device.release()
    assert scene.store.flush(WAIT_S) is True
    scene.finish()


@pytest.mark.parametrize("operation", ["read", "write"])
def test_closing_is_bounded_while_the_drive_does_not_answer(operation: str) -> None:
    scene = Scene()
    outs = scene.outs(aligned=True)
    scene.device.hold(operation)
    job = None
    if operation == "read":
        job = scene.space.submit_get(scene.keys, outs)
    else:
        assert scene.space.put(b"late", block_bytes(b"late", 0, SIZE))
    begun_s = time.monotonic()
    assert scene.store.close(SOON_S) is False
    assert time.monotonic() - begun_s < WAIT_S
    survivor = scene.device.inner.crash()
    scene.device.hold()
    scene.device.release()  # the threads that were left behind end now, see the fixture
    if job is not None:
        assert job.wait(WAIT_S), "nobody waits for ever for a job of a closed store"
        for status, out, block in zip(job.statuses, outs, scene.blocks, strict=True):
            assert status is not Status.HIT or np.array_equal(out, block)
    with open_on_device(survivor, **scene.options) as again:
        space = again.namespace(scene.descriptor)
        found = scene.outs(aligned=True)
        assert space.get_many_into(scene.keys, found) == [Status.HIT] * 8
        assert all(np.array_equal(out, block) for out, block in zip(found, scene.blocks, strict=True))
        assert space.get_into(b"late", found[0]) is Status.MISS
