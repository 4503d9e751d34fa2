"""What every device does to a request: look at the buffers, cut it into chunks, gather the chunks into one future."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ..format.errors import DeviceError, device_error
from ..format.layout import round_up_pages
from .device import HostBuffer, IoCounter, IoPath
from .monitor import Monitor

ByteView: TypeAlias = "memoryview[int]"
"""A flat view of bytes."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a request: consecutive bytes of the file, in one or several pieces of memory."""

    offset: int
    length: int
    views: list[ByteView]


def byte_views(buffers: Sequence[HostBuffer], *, writable: bool) -> list[ByteView]:
    """Flat views of the buffers that have bytes. Raises ``ValueError`` for memory that is not contiguous or not writable."""
    views: list[ByteView] = []
    for buffer in buffers:
        view = memoryview(buffer)
        if not view.c_contiguous:
            raise ValueError(f"a buffer of shape {view.shape} and strides {view.strides} is not contiguous")
        if writable and view.readonly:
            raise ValueError("a read-only buffer cannot be read into")
        if view.nbytes:
            views.append(view if view.ndim == 1 and view.format == "B" else view.cast("B"))
    return views


def address_of_view(view: ByteView) -> int:
    """Address of a view's first byte."""
    return int(np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0])


def is_aligned(offset: int, views: Sequence[ByteView], memory_bytes: int, offset_bytes: int) -> bool:
    """Whether O_DIRECT takes the request as it is: addresses multiples of the first, offset and lengths of the second."""
    if offset % offset_bytes or any(view.nbytes % offset_bytes for view in views):
        return False
    return not any(address_of_view(view) % memory_bytes for view in views)


def split(offset: int, views: Sequence[ByteView], chunk_bytes: int, views_max: int) -> Iterator[Chunk]:
    """Cut a request into chunks of about ``chunk_bytes`` (an eighth and a page more at most) and ``views_max`` pieces, in order.

    A request that is only a little longer than some chunks is cut into longer ones: a transfer of one page costs as much work as
    one of megabytes. All cuts but the ends of buffers fall on pages from the start of a chunk, so aligned requests stay aligned.
    """
    total = sum(view.nbytes for view in views)
    count = max(1, -(-(total - chunk_bytes // 8) // chunk_bytes))
    chunk_bytes = round_up_pages(-(-total // count))
    start, length, gathered = offset, 0, list[ByteView]()
    for view in views:
        taken = 0
        while taken < view.nbytes:
            part = view[taken : taken + chunk_bytes - length]
            gathered.append(part)
            taken += part.nbytes
            length += part.nbytes
            if length == chunk_bytes or len(gathered) == views_max:
                yield Chunk(start, length, gathered)
                start, length, gathered = start + length, 0, []
    if length:
        yield Chunk(start, length, gathered)


def rest_of(views: list[ByteView], moved: int) -> list[ByteView]:
    """What is left of the views behind the first ``moved`` bytes."""
    for number, view in enumerate(views):
        if moved < view.nbytes:
            return [view[moved:], *views[number + 1 :]]
        moved -= view.nbytes
    return []


class Gather:
    """The future of a request whose chunks run by themselves.

    It completes when *all* chunks are done, also after a failure: until then the buffers may be written to. It
    cannot be cancelled for the same reason.
    """

    def __init__(self, chunks: int, operation: str, path: str) -> None:
        self.future: Future[int] = Future()
        self.future.set_running_or_notify_cancel()
        self._lock = threading.Lock()
        self._left = chunks
        self._done_bytes = 0
        self._error: BaseException | None = None
        self._operation = operation
        self._path = path

    def add(self, chunk: Future[int]) -> None:
        """Count one chunk's future in."""
        chunk.add_done_callback(self._chunk_done)

    def fail_unsubmitted(self, chunks: int, error: BaseException) -> None:
        """Count chunks as failed that could not even be submitted."""
        self._account(chunks, 0, error)

    def _chunk_done(self, chunk: Future[Any]) -> None:
        if chunk.cancelled():
            self._account(1, 0, DeviceError(self._operation, self._path, detail="the device was closed before it ran"))
            return
        error = chunk.exception()
        self._account(1, 0 if error is not None else chunk.result(), error)

    def _account(self, chunks: int, done_bytes: int, error: BaseException | None) -> None:
        with self._lock:
            self._left -= chunks
            self._done_bytes += done_bytes
            if self._error is None:
                self._error = error
            if self._left:
                return
        if self._error is None:
            self.future.set_result(self._done_bytes)
            return
        # A traceback refers to frames, and frames to the buffers: the device keeps no reference to them.
        self.future.set_exception(self._error.with_traceback(None))
        self._error = None


class Uses:
    """How many operations use a file now: ``close`` waits for them and lets no new one begin.

    Operations of the parent never end in a forked child, so there ``close`` does not wait.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._changed = Monitor()
        self._lock = self._changed.lock
        self._count = 0
        self._closed = False
        self._pid = os.getpid()

    def begin(self, operation: str) -> None:
        """Raises ``DeviceError`` (EBADF) once ``close`` was called."""
        with self._lock:
            if self._closed:
                raise DeviceError(operation, self._path, errno=errno.EBADF, detail="the file is closed")
            self._count += 1

    def end(self) -> None:
        with self._lock:
            self._count -= 1
            if self._closed and self._count == 0:
                self._changed.notify_all()

    def close(self) -> bool:
        """Wait until nothing uses the file; ``False`` when it was closed before."""
        if os.getpid() != self._pid:  # locks of the parent's threads may be held for ever here
            was_closed, self._closed = self._closed, True
            return not was_closed
        with self._lock:
            if self._closed:
                return False
            self._closed = True
        self._changed.wait_for(lambda: self._count == 0)
        return True

    @contextmanager
    def using(self, operation: str) -> Iterator[None]:
        """Keep the file open during a call; errors of the system become device errors."""
        self.begin(operation)
        try:
            yield
        except DeviceError:
            raise
        except OSError as error:
            raise device_error(operation, self._path, error) from error
        finally:
            self.end()


def finished(value: int) -> Future[int]:
    """A future that is done."""
    future: Future[int] = Future()
    future.set_result(value)
    return future


class PathCounters:
    """``Device.counters``: thread-safe counts by path."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[IoPath, IoCounter] = {}

    def add(self, path: IoPath, size_bytes: int, *, write: bool) -> None:
        """Count one transfer."""
        with self._lock:
            counter = self._counters.setdefault(path, IoCounter())
            if write:
                counter.writes += 1
                counter.write_bytes += size_bytes
            else:
                counter.reads += 1
                counter.read_bytes += size_bytes

    def snapshot(self) -> Mapping[IoPath, IoCounter]:
        """Copies that no longer change."""
        with self._lock:
            return {
                path: IoCounter(counter.reads, counter.read_bytes, counter.writes, counter.write_bytes)
                for path, counter in self._counters.items()
            }
