"""Aligned memory, the pool that lends it, page locks in the background, and the lock on a file."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import random
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvlode.format.errors import DeviceError, StoreClosed
from kvlode.gds import os_calls, pagelock
from kvlode.gds.buffers import PAGE_BYTES, SlotPool, address_of, aligned_array
from kvlode.gds.pagelock import page_lock_in_background
from kvlode.gds.posix_lock import take_lock
from rig import eventually

WAIT_S = 30.0
KIB = 1 << 10


def in_background(function: Any) -> tuple[threading.Thread, list[Any]]:
    """Call on a thread; the list gets the result or the error."""
    answers: list[Any] = []

    def run() -> None:
        try:
            answers.append(function())
        except StoreClosed as error:
            answers.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, answers


# --- aligned memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4095, 4096, 5000, (2 << 20) - 1, 2 << 20, 5 << 20])
def test_arrays_start_on_a_page_are_zero_and_have_their_size(size: int) -> None:
    array = aligned_array(size)
    assert array.shape == (size,) and array.dtype == np.uint8
    assert address_of(array) % PAGE_BYTES == 0
    assert not array.any() and array.flags.writeable


def test_sizes_that_mean_nothing_are_refused_and_too_much_is_a_memory_error() -> None:
    for size in (0, -1):
        with pytest.raises(ValueError):
            aligned_array(size)
    with pytest.raises(MemoryError, match="no memory"):
        aligned_array(1 << 60)


def test_the_memory_lives_as_long_as_any_view_of_it() -> None:
    array = aligned_array(4 * PAGE_BYTES)
    array[:] = 7
    view = memoryview(array)[PAGE_BYTES:]
    owner = weakref.ref(array)
    del array
    gc.collect()
    assert owner() is not None and bytes(view[:4]) == b"\7\7\7\7"
    view.release()
    gc.collect()
    assert owner() is None


# --- the pool -------------------------------------------------------------------------------------------------------------


def test_a_pool_lends_what_it_has_and_the_same_memory_again() -> None:
    pool = SlotPool(10_000, 3 * 12_288)
    assert pool.slot_bytes == 12_288, "whole pages"
    slots = [pool.acquire(timeout_s=0) for _ in range(3)]
    assert pool.acquire(timeout_s=0) is None and pool.acquire(1, timeout_s=0.01) is None
    addresses = {address_of(slot) for slot in slots}
    assert len(addresses) == 3 and pool.lent_bytes == 3 * 12_288
    pool.release(slots.pop()[:100])  # a view from its start will do
    again = pool.acquire(timeout_s=0)
    assert address_of(again) in addresses
    for slot in [*slots, again]:
        pool.release(slot)
    assert (pool.lent_bytes, pool.lent_slots) == (0, 0)


def test_what_was_not_lent_cannot_be_given_back() -> None:
    pool = SlotPool(PAGE_BYTES, 2 * PAGE_BYTES)
    slot = pool.acquire()
    with pytest.raises(ValueError, match="not lent"):
        pool.release(aligned_array(PAGE_BYTES))
    with pytest.raises(ValueError, match="not lent"):
        pool.release(slot[1:])
    pool.release(slot)
    with pytest.raises(ValueError, match="given back before"):
        pool.release(slot)
    for slot_bytes, total_bytes in ((0, 1), (1, 0)):
        with pytest.raises(ValueError):
            SlotPool(slot_bytes, total_bytes)


def test_a_request_larger_than_the_pool_is_granted_when_nothing_else_is_lent() -> None:
    pool = SlotPool(PAGE_BYTES, 2 * PAGE_BYTES)
    small = pool.acquire()
    assert pool.acquire(100 * PAGE_BYTES, timeout_s=0) is None
    pool.release(small)
    large = pool.acquire(100 * PAGE_BYTES, timeout_s=0)
    assert large.size == 100 * PAGE_BYTES and pool.lent_bytes == 100 * PAGE_BYTES
    assert pool.acquire(timeout_s=0) is None
    pool.release(large)
    assert pool.acquire(timeout_s=0) is not None


def test_a_large_request_is_not_overtaken_for_ever_by_small_ones() -> None:
    pool = SlotPool(PAGE_BYTES, 4 * PAGE_BYTES)
    held = [pool.acquire() for _ in range(4)]
    large, large_answers = in_background(lambda: pool.acquire(4 * PAGE_BYTES, WAIT_S))
    assert eventually(lambda: len(pool._waiters) == 1)
    small, small_answers = in_background(lambda: pool.acquire(None, WAIT_S))
    assert eventually(lambda: len(pool._waiters) == 2)
    for slot in held[:3]:
        pool.release(slot)
    assert large.is_alive() and small.is_alive(), "the small one came later and would fit"
    pool.release(held[3])
    large.join(WAIT_S)
    assert large_answers[0].size == 4 * PAGE_BYTES and small.is_alive()
    pool.release(large_answers[0])
    small.join(WAIT_S)
    assert small_answers[0].size == PAGE_BYTES


def test_a_large_request_that_gives_up_lets_the_small_ones_behind_it_pass() -> None:
    pool = SlotPool(PAGE_BYTES, 4 * PAGE_BYTES)
    held = pool.acquire()
    large, large_answers = in_background(lambda: pool.acquire(4 * PAGE_BYTES, 0.2))
    assert eventually(lambda: len(pool._waiters) == 1)
    small, small_answers = in_background(lambda: pool.acquire(None, WAIT_S))
    small.join(WAIT_S)
    large.join(WAIT_S)
    assert large_answers == [None] and small_answers[0] is not None
    pool.release(held)
    pool.release(small_answers[0])
    assert pool.lent_bytes == 0


def test_closing_wakes_who_waits_and_leaves_what_is_lent_valid() -> None:
    pool = SlotPool(PAGE_BYTES, PAGE_BYTES)
    slot = pool.acquire()
    waiting, answers = in_background(lambda: pool.acquire(None, WAIT_S))
    assert eventually(lambda: len(pool._waiters) == 1)
    pool.close()
    waiting.join(WAIT_S)
    assert isinstance(answers[0], StoreClosed)
    with pytest.raises(StoreClosed):
        pool.acquire()
    slot[:] = 1
    assert pool.lent_slots == 1
    pool.release(slot)
    assert (pool.lent_slots, pool.lent_bytes) == (0, 0)


def test_memory_that_cannot_be_had_is_not_counted_as_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = SlotPool(PAGE_BYTES, PAGE_BYTES)

    def fails(size_bytes: int) -> np.ndarray:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("kvlode.gds.buffers.aligned_array", fails)
        with pytest.raises(MemoryError):
            pool.acquire()
    assert pool.lent_bytes == 0
    assert pool.acquire(timeout_s=0) is not None


def test_threads_that_borrow_at_random_never_share_memory_nor_exceed_the_total(seed: int) -> None:
    pool = SlotPool(2 * PAGE_BYTES, 8 * PAGE_BYTES)
    wrong: list[str] = []

    def run(number: int) -> None:
        chance = random.Random(seed + number)
        for _ in range(150):
            slot = pool.acquire(chance.choice([None, 1, 3 * PAGE_BYTES, 6 * PAGE_BYTES]), chance.choice([0, 0.001, WAIT_S]))
            if slot is None:
                continue
            if pool.lent_bytes > pool.total_bytes:
                wrong.append(f"{pool.lent_bytes} bytes are lent")
            slot[:] = number
            if not (slot == number).all():
                wrong.append(f"thread {number} found the bytes of another")
            pool.release(slot)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in threads) and not wrong, wrong[:3]
    assert (pool.lent_bytes, pool.lent_slots) == (0, 0)


# --- page locks -----------------------------------------------------------------------------------------------------------


class FakeRuntime:
    """What ``torch.cuda.cudart()`` gives, as far as it is used: remembers what is registered; 0 is success."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.registered: dict[int, int] = {}
        self.go_on = threading.Event()
        self.go_on.set()

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
        assert self.go_on.wait(WAIT_S)
        if self.code == 0:
            self.registered[address] = size_bytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRuntime]:
    fake = FakeRuntime()
    monkeypatch.setattr(pagelock, "cuda_runtime", lambda: fake)
    yield fake
    fake.go_on.set()


def test_memory_is_locked_off_the_callers_thread_and_stays_alive_until_it_is_unlocked(runtime: FakeRuntime) -> None:
    runtime.go_on.clear()
    array = aligned_array(4 * PAGE_BYTES)
    address, owner = address_of(array), weakref.ref(array)
    lock = page_lock_in_background(address, array.size, array)
    assert lock is not None and not lock.locked, "the caller goes on while CUDA works"
    del array
    lock.release()
    gc.collect()
    assert owner() is not None
    runtime.go_on.set()
    assert lock.wait(WAIT_S) in (True, False)  # the registration ended; the release behind it may have, too
    assert eventually(lambda: not runtime.registered and not lock.locked)
    assert eventually(lambda: gc.collect() >= 0 and owner() is None)


def test_a_refusal_leaves_ordinary_memory(runtime: FakeRuntime) -> None:
    runtime.code = 2  # out of memory: the memlock limit
    array = aligned_array(PAGE_BYTES)
    lock = page_lock_in_background(address_of(array), array.size, array)
    assert lock is not None and lock.wait(WAIT_S) is False
    lock.release()


def test_a_pool_unlocks_what_it_lets_go_of(runtime: FakeRuntime) -> None:
    pool = SlotPool(PAGE_BYTES, 4 * PAGE_BYTES, page_lock=True)
    slot, large = pool.acquire(), pool.acquire(2 * PAGE_BYTES)
    expected = {address_of(slot): PAGE_BYTES, address_of(large): 2 * PAGE_BYTES}
    assert eventually(lambda: runtime.registered == expected)
    pool.release(large)
    assert eventually(lambda: runtime.registered == {address_of(slot): PAGE_BYTES})
    pool.release(slot)
    assert runtime.registered, "a free slot stays locked for its next use"
    pool.close()
    assert eventually(lambda: not runtime.registered)


def test_without_cuda_nothing_is_locked_and_cuda_is_not_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    array = aligned_array(PAGE_BYTES)
    never = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: False, cudart=lambda: pytest.fail("CUDA was initialised")))
    monkeypatch.setitem(sys.modules, "torch", never)
    assert pagelock.cuda_runtime() is None
    assert page_lock_in_background(address_of(array), array.size, array) is None
    monkeypatch.delitem(sys.modules, "torch")
    assert pagelock.cuda_runtime() is None


# --- the lock on a file ---------------------------------------------------------------------------------------------------


def test_the_lock_is_the_descriptors_where_the_kernel_has_no_such_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``flock`` instead: the same rules."""
    real = fcntl.fcntl

    def without_ofd(descriptor: int, command: int, argument: Any = 0) -> Any:
        if command == fcntl.F_OFD_SETLK:
            raise OSError(errno.EINVAL, "injected")
        return real(descriptor, command, argument)

    monkeypatch.setattr(os_calls.fcntl, "fcntl", without_ofd)
    path = str(tmp_path / "lock")
    lock = take_lock(path, shared=False)
    assert lock is not None
    Path(path).read_bytes()
    assert take_lock(path, shared=False) is None and take_lock(path, shared=True) is None
    lock.release()
    sharers = [take_lock(path, shared=True) for _ in range(2)]
    assert all(sharers) and take_lock(path, shared=False) is None
    for sharer in sharers:
        sharer.release()
    lock = take_lock(path, shared=False)
    assert lock is not None
    lock.release()


def test_a_lock_that_cannot_be_taken_for_another_reason_is_an_error_and_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(descriptor: int, *, shared: bool) -> bool:
        raise OSError(errno.ENOLCK, "injected")

    monkeypatch.setattr("kvlode.gds.posix_lock.try_lock", fails)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(DeviceError, match="lock") as caught:
        take_lock(str(tmp_path / "lock"), shared=False)
    assert caught.value.errno == errno.ENOLCK
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_file_that_may_only_be_read_can_still_be_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only file system."""
    path = tmp_path / "lock"
    path.touch()
    real = os.open

    def read_only(name: Any, flags: int, *arguments: Any) -> int:
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, "injected")
        return real(name, flags, *arguments)

    monkeypatch.setattr(os, "open", read_only)
    shared = take_lock(str(path), shared=True)
    assert shared is not None
    with pytest.raises(DeviceError, match="open lock"):
        take_lock(str(path), shared=False)
    shared.release()
