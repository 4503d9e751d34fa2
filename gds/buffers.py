"""Page-aligned memory: arrays for direct I/O, and a bounded pool of them.

Memory comes from anonymous ``mmap`` (a few pages from the heap), starts on a page (what O_DIRECT and GDS want), and costs
nothing until it is touched. It is never unmapped under a view: an array's memory goes when its last view goes, whatever is closed before.
"""

from __future__ import annotations

import collections
import contextlib
import mmap
import threading
from typing import TypeAlias

import numpy as np

from ..format.errors import StoreClosed
from .pagelock import PageLock, page_lock_in_background

ByteArray: TypeAlias = np.ndarray[tuple[int], np.dtype[np.uint8]]
"""A one-dimensional ``numpy.uint8`` array."""

PAGE_BYTES = mmap.PAGESIZE
_HUGE_PAGE_BYTES = 2 << 20
_FROM_HEAP_BYTES_MAX = 64 << 10
"""Less is cut out of the heap: a mapping of its own costs several calls of the kernel, and every core is told when it goes."""


def aligned_array(size_bytes: int) -> ByteArray:
    """A zeroed array of ``size_bytes`` that starts on a page of its own.

    Large ones ask for huge pages: the first write to fresh memory is then bound by memory, not by page faults.
    Raises ``ValueError`` for a size below 1, ``MemoryError`` when there is no address space left.
    """
    if size_bytes < 1:
        raise ValueError(f"an array of {size_bytes} bytes cannot be made")
    if size_bytes <= _FROM_HEAP_BYTES_MAX:
        area = bytearray(size_bytes + PAGE_BYTES)
        start = -address_of(np.frombuffer(area, dtype=np.uint8)) % PAGE_BYTES
        return np.frombuffer(area, dtype=np.uint8, count=size_bytes, offset=start)
    large = size_bytes >= _HUGE_PAGE_BYTES
    try:  # whole huge pages: the kernel starts other mappings anywhere, and then most of them is small pages
        mapped_bytes = _round_up(size_bytes, _HUGE_PAGE_BYTES) if large else size_bytes
        memory = mmap.mmap(-1, mapped_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for an array of {size_bytes} bytes: {error}") from error
    if large:
        with contextlib.suppress(OSError, AttributeError):  # kernels without huge pages: the array works the same, slower at first touch
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8, count=size_bytes)


def address_of(array: ByteArray) -> int:
    """Address of an array's first byte."""
    return int(array.__array_interface__["data"][0])


class _Waiter:
    """One blocked ``acquire``: in the line until it is granted or gives up."""

    __slots__ = ("size_bytes", "granted")

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.granted = threading.Event()


class SlotPool:
    """At most ``total_bytes`` of aligned memory, lent in slots of ``slot_bytes``.

    A larger request gets memory of its own, counted against the same total. When nothing is lent, any request is
    granted whatever its size, so a pool that is too small is slow, never stuck. Requests are served in the order
    they came (a large one is not overtaken for ever by small ones). All methods may be called from any thread.

    With ``page_lock`` the slots are page-locked for CUDA in the background, where CUDA is in use in this process.
    """

    def __init__(self, slot_bytes: int, total_bytes: int, *, page_lock: bool = False) -> None:
        if slot_bytes < 1 or total_bytes < 1:
            raise ValueError(f"a pool of {total_bytes} bytes in slots of {slot_bytes} bytes cannot be made")
        self.slot_bytes = _round_up(slot_bytes, PAGE_BYTES)
        self.total_bytes = total_bytes
        self._page_lock = page_lock
        self._lock = threading.Lock()
        self._lent: dict[int, int] = {}
        self._lent_bytes = 0
        self._free: list[ByteArray] = []
        self._to_wipe: set[int] = set()
        self._locks: dict[int, PageLock] = {}
        self._waiters: collections.deque[_Waiter] = collections.deque()
        self._closed = False

    @property
    def lent_bytes(self) -> int:
        """Bytes lent out now. More than ``total_bytes`` only for a single request that is larger than the pool."""
        return self._lent_bytes

    @property
    def lent_slots(self) -> int:
        """Slots not yet given back; after ``close`` these are the leaked ones."""
        return len(self._lent)

    def acquire(self, size_bytes: int | None = None, timeout_s: float | None = None) -> ByteArray | None:
        """An array of at least ``size_bytes`` (default: one slot), or ``None`` when the time is over.

        Contents are arbitrary. ``timeout_s`` 0 does not wait, ``None`` waits without end. Give it back with ``release``.
        """
        wanted = self.slot_bytes if size_bytes is None or size_bytes <= self.slot_bytes else _round_up(size_bytes, PAGE_BYTES)
        with self._lock:
            if self._closed:
                raise StoreClosed("the pool of buffers is closed")
            if not self._waiters and self._fits(wanted):
                self._lent_bytes += wanted
                waiter = None
            elif timeout_s is not None and timeout_s <= 0:
                return None
            else:
                waiter = _Waiter(wanted)
                self._waiters.append(waiter)
        if waiter is not None and not waiter.granted.wait(timeout_s) and not self._granted_after_all(waiter):
            return None
        return self._lend(wanted)

    def release(self, slot: ByteArray) -> None:
        """Give an acquired array back. Nothing may use its memory any more; a view of it from its start is accepted too."""
        address = address_of(slot)
        if address in self._to_wipe:
            _owner(slot)[:] = 0
        with self._lock:
            self._to_wipe.discard(address)
            size_bytes = self._lent.pop(address, 0)
            if not size_bytes:
                raise ValueError("this array was not lent by this pool, or was given back before")
            whole = _owner(slot)
            if size_bytes == self.slot_bytes and not self._closed:
                self._free.append(whole)
            else:
                self._unlock(address)
            self._lent_bytes -= size_bytes
            self._grant()

    def wipe(self) -> None:
        """Overwrite what earlier uses have left in the memory: the free slots now, those that are lent when they are given back."""
        with self._lock:
            for array in self._free:
                array[:] = 0
            self._to_wipe |= self._lent.keys()

    def close(self) -> None:
        """Drop the free slots and wake whoever waits (``acquire`` then raises). Lent slots stay valid until their last view is gone."""
        with self._lock:
            self._closed = True
            waiters = list(self._waiters)
            self._waiters.clear()
            for array in self._free:
                self._unlock(address_of(array))
            self._free.clear()
        for waiter in waiters:
            waiter.granted.set()

    def _fits(self, size_bytes: int) -> bool:
        return self._lent_bytes == 0 or self._lent_bytes + size_bytes <= self.total_bytes

    def _grant(self) -> None:
        """Let waiters pass, first come first served. Caller holds the lock."""
        while self._waiters and self._fits(self._waiters[0].size_bytes):
            waiter = self._waiters.popleft()
            self._lent_bytes += waiter.size_bytes
            waiter.granted.set()

    def _granted_after_all(self, waiter: _Waiter) -> bool:
        """The time is over: leave the line, unless the grant came at the same moment."""
        with self._lock:
            if waiter.granted.is_set():
                return True
            self._waiters.remove(waiter)
            self._grant()  # it may have stood in front of smaller ones
            return False

    def _lend(self, size_bytes: int) -> ByteArray:
        """The memory for bytes that were granted."""
        with self._lock:
            if self._closed:
                raise StoreClosed("the pool of buffers was closed while waiting")
            array = self._free.pop() if size_bytes == self.slot_bytes and self._free else None
            if array is not None:
                self._lent[address_of(array)] = size_bytes
                return array
            self._shrink_free()
        array = self._allocate(size_bytes)
        with self._lock:
            self._lent[address_of(array)] = size_bytes
        return array

    def _shrink_free(self) -> None:
        """Keep lent and free memory together within the total. Caller holds the lock."""
        while self._free and self._lent_bytes + len(self._free) * self.slot_bytes > self.total_bytes:
            self._unlock(address_of(self._free.pop(0)))

    def _allocate(self, size_bytes: int) -> ByteArray:
        try:
            array = aligned_array(size_bytes)
        except BaseException:
            with self._lock:
                self._lent_bytes -= size_bytes
                self._grant()
            raise
        if self._page_lock:
            lock = page_lock_in_background(address_of(array), size_bytes, array)
            if lock is not None:
                with self._lock:
                    self._locks[address_of(array)] = lock
        return array

    def _unlock(self, address: int) -> None:
        lock = self._locks.pop(address, None)
        if lock is not None:
            lock.release()


def _owner(view: ByteArray) -> ByteArray:
    """The array that ``aligned_array`` made, from any view of it."""
    array = view
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _round_up(size_bytes: int, multiple: int) -> int:
    return -(-size_bytes // multiple) * multiple
