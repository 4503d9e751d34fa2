"""A device in memory, with a model of what survives a power cut: for tests, and for stores that need not last.

``MemoryDevice.crash`` gives the device that a machine would find after losing power at this moment: only what was
synced, or a random part of the rest, torn as drives tear it.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Protocol

from ..format.errors import DeviceError, device_error
from .device import DeviceLock, FileStatus, HostBuffer, IoCounter, IoPath, OpenMode
from .memory_files import PAGE_BYTES, FileContent, Keep, NameTree, count_allocated, normal_path
from .threads import WorkerPool
from .transfer import ByteView, PathCounters, Uses, byte_views

UNLIMITED_BYTES = 1 << 60


class DriveClock(Protocol):
    """Time for a limited bandwidth; tests inject one that they move by hand."""

    def now_s(self) -> float: ...

    def wait_until(self, time_s: float) -> None: ...


class RealClock:
    """The monotonic clock."""

    def now_s(self) -> float:
        return time.monotonic()

    def wait_until(self, time_s: float) -> None:
        threading.Event().wait(max(0.0, time_s - time.monotonic()))


class MemoryDevice:
    """See the module. ``capacity_bytes`` limits allocated pages (ENOSPC beyond).

    With ``threads`` 0 a request is done when the call returns, else it runs on threads. ``bandwidth_bytes_s`` lets
    transfers take their turn at that rate on ``clock`` (this needs threads; one is made when none was asked for).
    """

    alignment = PAGE_BYTES
    accepts_device_memory = False

    def __init__(
        self,
        *,
        capacity_bytes: int | None = None,
        threads: int = 0,
        bandwidth_bytes_s: float | None = None,
        clock: DriveClock | None = None,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self._bandwidth_bytes_s = bandwidth_bytes_s
        self._clock: DriveClock = clock or RealClock()
        self._drive_free_at_s = 0.0
        threads = threads or (1 if bandwidth_bytes_s else 0)
        self._pool = WorkerPool("kvlode-memory", threads) if threads else None
        self._counters = PathCounters()
        self._lock = threading.RLock()
        self._names = NameTree()
        self._orphans: list[FileContent] = []
        self._handles: dict[int, int] = {}
        self._used_pages = 0
        self._locks: dict[str, list[MemoryLock]] = {}
        self._powered = True

    # --- power ------------------------------------------------------------------------------------------------

    def crash(self, seed: int | None = None, keep: Keep = "none") -> MemoryDevice:
        """The device after a power cut at this moment, as a new one; this one stays as it is.

        ``keep`` says what happens to unsynced changes: ``none`` survive, ``all`` do, or a ``random`` part decided by
        ``seed``. Locks are gone; capacity and clock stay. Operations still in flight count as not started.
        """
        if keep == "random" and seed is None:
            raise ValueError("a random crash needs a seed, so that a failure can be repeated")
        with self._lock:
            survivor = MemoryDevice(capacity_bytes=self.capacity_bytes)
            survivor._names = self._names.after_crash(keep, random.Random(seed))
            survivor._used_pages = count_allocated(content for _, content in survivor._names.files())
            return survivor

    def power_off(self) -> None:
        """From now on every operation fails with EIO, as for a store that lives on behind a crash."""
        with self._lock:
            self._powered = False

    # --- files ------------------------------------------------------------------------------------------------

    def open(self, path: str, mode: OpenMode) -> MemoryFile:
        with self._calling(f"open for {mode}", path):
            content = self._names.find(path)
            if mode == "create":
                if content is not None:
                    raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
                content = FileContent()
                self._names.set_entry(path, content)
            if content is None:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            self._handles[id(content)] = self._handles.get(id(content), 0) + 1
            return MemoryFile(self, path, content, writable=mode != "read")

    def status(self, path: str) -> FileStatus | None:
        with self._calling("stat", path):
            content = self._names.find(path)
            return None if content is None else _status(content)

    def list_folder(self, path: str) -> list[str]:
        with self._calling("list folder", path):
            return self._names.list_folder(path)

    def make_folder(self, path: str) -> None:
        with self._calling("make folder", path):
            self._names.make_folder(path)

    def remove(self, path: str) -> None:
        with self._calling("remove", path):
            if self._names.find(path) is None:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            self._unlinked(self._names.set_entry(path, None))

    def rename(self, source: str, target: str) -> None:
        with self._calling(f"rename to {target}", source):
            self._unlinked(self._names.rename(source, target))

    def sync_folder(self, path: str) -> None:
        with self._calling("sync folder", path):
            self._names.sync_folder(path)

    def free_bytes(self, path: str) -> int:
        with self._calling("read the free space of", path):
            limit_bytes = UNLIMITED_BYTES if self.capacity_bytes is None else self.capacity_bytes
            return max(0, limit_bytes - self._used_pages * PAGE_BYTES)

    def lock(self, path: str, *, shared: bool = False) -> DeviceLock | None:
        with self._calling("lock", path):
            if self._names.find(path) is None:
                self._names.set_entry(path, FileContent())
            held = self._locks.setdefault(normal_path(path), [])
            if held and not (shared and all(lock.shared for lock in held)):
                return None
            held.append(MemoryLock(self, path, shared))
            return held[-1]

    # --- what happened ----------------------------------------------------------------------------------------

    def counters(self) -> Mapping[IoPath, IoCounter]:
        return self._counters.snapshot()

    def paths(self) -> Mapping[str, IoPath]:
        return {"host": IoPath.MEMORY}

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(30.0)

    # --- for files and locks ----------------------------------------------------------------------------------

    @contextmanager
    def _calling(self, operation: str, path: str) -> Iterator[None]:
        """One operation at a time; errors become device errors."""
        with self._lock:
            try:
                if not self._powered:
                    raise OSError(errno.EIO, "the power is off")
                yield
            except OSError as error:
                raise device_error(operation, path, error) from error

    def _run(self, transfer: Callable[[], int], size_bytes: int) -> Future[int]:
        """The future of a transfer, done at once or on a thread."""
        if self._pool is not None:
            return self._pool.submit(self._transfer_in_turn, transfer, size_bytes)
        future: Future[int] = Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(transfer())
        except DeviceError as error:
            future.set_exception(error.with_traceback(None))
        return future

    def _transfer_in_turn(self, transfer: Callable[[], int], size_bytes: int) -> int:
        if self._bandwidth_bytes_s is not None:
            with self._lock:
                start_s = max(self._clock.now_s(), self._drive_free_at_s)
                self._drive_free_at_s = done_at_s = start_s + size_bytes / self._bandwidth_bytes_s
            self._clock.wait_until(done_at_s)
        return transfer()

    def _charge(self, content: FileContent, pages: range) -> None:
        """Refuse what does not fit. Caller holds the lock and adjusts ``_used_pages`` by ``_changing``."""
        if self.capacity_bytes is None:
            return
        added = sum(page not in content.allocated for page in pages)
        if (self._used_pages + added) * PAGE_BYTES > self.capacity_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def _changing(self, operation: str, path: str, content: FileContent) -> Iterator[None]:
        """A change of a file's content, with its effect on the used space."""
        with self._calling(operation, path):
            before = len(content.allocated)
            yield
            self._used_pages += len(content.allocated) - before

    def _unlinked(self, content: FileContent | None) -> None:
        """A file lost its name: its space is free when nobody has it open."""
        if content is None:
            return
        if self._handles.get(id(content)):
            self._orphans.append(content)
        else:
            self._used_pages -= len(content.allocated)

    def _handle_closed(self, content: FileContent) -> None:
        with self._lock:
            self._handles[id(content)] -= 1
            if self._handles[id(content)]:
                return
            del self._handles[id(content)]
            if any(orphan is content for orphan in self._orphans):
                self._orphans = [orphan for orphan in self._orphans if orphan is not content]
                self._used_pages -= len(content.allocated)

    def _unlock(self, lock: MemoryLock) -> None:
        with self._lock:
            held = self._locks.get(normal_path(lock.path), [])
            if lock in held:
                held.remove(lock)


class MemoryFile:
    """One open file of a ``MemoryDevice``."""

    def __init__(self, device: MemoryDevice, path: str, content: FileContent, *, writable: bool) -> None:
        self.path = path
        self._device = device
        self._content = content
        self._writable = writable
        self._uses = Uses(path)

    def read(self, offset: int, buffers: Sequence[HostBuffer]) -> Future[int]:
        views = byte_views(buffers, writable=True)
        return self._start("read", offset, views, lambda: self._read(offset, views))

    def read_now(self, offset: int, buffers: Sequence[HostBuffer]) -> int:
        return self.read(offset, buffers).result()

    def write(self, offset: int, buffers: Sequence[HostBuffer]) -> Future[int]:
        views = byte_views(buffers, writable=False)
        if not self._writable:
            raise DeviceError("write", self.path, errno=errno.EBADF, detail="the file is open for reading")
        return self._start("write", offset, views, lambda: self._write(offset, views))

    def sync(self) -> None:
        with self._uses.using("sync"), self._device._calling("sync", self.path):
            self._content.sync()

    def preallocate(self, size_bytes: int) -> None:
        with self._change("preallocate"):
            self._device._charge(self._content, self._content.pages_of(0, size_bytes))
            self._content.preallocate(size_bytes)

    def truncate(self, size_bytes: int) -> None:
        with self._change("truncate"):
            self._content.truncate(size_bytes)

    def punch(self, offset: int, length: int) -> None:
        with self._change("punch"):
            self._content.zero(offset, length)

    def status(self) -> FileStatus:
        with self._uses.using("stat"), self._device._calling("stat", self.path):
            return _status(self._content)

    def close(self) -> None:
        if self._uses.close():
            self._device._handle_closed(self._content)

    @contextmanager
    def _change(self, operation: str) -> Iterator[None]:
        if not self._writable:
            raise DeviceError(operation, self.path, errno=errno.EBADF, detail="the file is open for reading")
        with self._uses.using(operation), self._device._changing(operation, self.path, self._content):
            yield

    def _start(self, operation: str, offset: int, views: list[ByteView], transfer: Callable[[], int]) -> Future[int]:
        if offset < 0:
            raise ValueError(f"offset {offset} is negative")
        self._uses.begin(operation)
        try:
            future = self._device._run(transfer, sum(view.nbytes for view in views))
        except BaseException:
            self._uses.end()
            raise
        future.add_done_callback(lambda _: self._uses.end())
        return future

    def _read(self, offset: int, views: list[ByteView]) -> int:
        done = 0
        with self._device._calling("read", self.path):
            for view in views:
                done += self._content.read_into(offset + done, view)
        self._device._counters.add(IoPath.MEMORY, done, write=False)
        return done

    def _write(self, offset: int, views: list[ByteView]) -> int:
        done = 0
        length = sum(view.nbytes for view in views)
        with self._device._changing("write", self.path, self._content):
            self._device._charge(self._content, self._content.pages_of(offset, length))
            for view in views:
                self._content.write(offset + done, view)
                done += view.nbytes
        self._device._counters.add(IoPath.MEMORY, done, write=True)
        return done


class MemoryLock:
    """A lock inside one ``MemoryDevice``."""

    def __init__(self, device: MemoryDevice, path: str, shared: bool) -> None:
        self.path = path
        self.shared = shared
        self._device = device

    def release(self) -> None:
        self._device._unlock(self)

    def abandon(self) -> None:
        """Nothing to drop: memory is copied by ``fork``, so the parent's lock is the parent's."""


def _status(content: FileContent) -> FileStatus:
    return FileStatus(content.size_bytes, len(content.allocated) * PAGE_BYTES)
