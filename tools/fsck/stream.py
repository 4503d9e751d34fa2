"""Sequential reading at the speed of the drive: large windows, several in flight, recycled memory.

``ByteStream.take`` hands out the next bytes of a file as views into a window, or as a copy where they lie in two. A window's
memory is used again once every piece of it was given back, from whatever thread: that bounds memory and holds the reader
back when checking is slower than reading.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from ...format.errors import DeviceError
from ...format.layout import PAGE_BYTES, round_up_pages
from ...gds.buffers import ByteArray, SlotPool
from ...gds.device import DeviceFile

WINDOW_BYTES = 8 << 20
WINDOWS_IN_FLIGHT = 4
WINDOWS = 10
"""In flight, being checked, and one that is being cut; together the memory of a stream, about 80 MiB."""
WINDOWS_AHEAD = 2
"""Of the next segment, on their way while the last blocks of this one are checked: a drive that waits at every segment loses a fifth."""
RETRY_BYTES = 64 << 10
"""A window that cannot be read is read again in pieces of this size, so that only the bad ones are lost."""


class Window:
    """One read of the file. Thread-safe counting of who still uses its memory."""

    def __init__(self, start: int, memory: ByteArray, release: Callable[[ByteArray], None]) -> None:
        self.start = start
        self.data: ByteArray = memory[:0]
        self.bad: list[tuple[int, int]] = []
        """Ranges of the file (start, stop) that could not be read."""
        self._memory = memory
        self._release = release
        self._lock = threading.Lock()
        self._users = 1

    @property
    def stop(self) -> int:
        return self.start + self.data.size

    def hold(self) -> None:
        with self._lock:
            self._users += 1

    def drop(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
        self.data = self.data[:0]
        self._release(self._memory)

    def is_bad(self, start: int, stop: int) -> bool:
        return any(first < stop and start < last for first, last in self.bad)


@dataclass(slots=True)
class Piece:
    """Bytes of the file; ``drop`` them when they are no longer needed. ``readable`` is False where the drive gave an error."""

    data: ByteArray
    readable: bool
    window: Window | None

    def drop(self) -> None:
        if self.window is not None:
            self.window.drop()


class ByteStream:
    """The bytes of ``[start, stop)`` of a file in order. For one thread; pieces may be dropped by any."""

    def __init__(self, file: DeviceFile, start: int, stop: int, slots: SlotPool, on_error: Callable[[DeviceError], None]) -> None:
        self._file = file
        self._stop = stop
        self._slots = slots
        self._on_error = on_error
        self._next_read = start
        self._reading: collections.deque[tuple[Window, ByteArray, Future[int]]] = collections.deque()
        self._window: Window | None = None
        self.position = start

    def prefetch(self, windows: int) -> None:
        """Ask for the first windows before anybody wants them, as far as there is memory."""
        while len(self._reading) < windows and self._next_read < self._stop and self._start_read(wait=False):
            continue

    def take(self, length: int) -> Piece:
        """The next ``length`` bytes; fewer only at the end of the file."""
        window = self._current()
        if window is None:
            return Piece(np.empty(0, np.uint8), True, None)
        start = self.position - window.start
        if start + length <= window.data.size:
            self.position += length
            window.hold()
            return Piece(window.data[start : start + length], not window.is_bad(self.position - length, self.position), window)
        return self._take_across(length)

    def whole_bytes(self) -> int:
        """How much ``take`` can hand out as one view, all of it readable; 0 where that is not known."""
        window = self._current()
        return 0 if window is None or window.bad else window.stop - self.position

    def skip(self, length: int) -> None:
        """Go on behind the next ``length`` bytes."""
        self.position += length

    def _take_across(self, length: int) -> Piece:
        copy = np.empty(length, np.uint8)
        filled, readable = 0, True
        while filled < length:
            window = self._current()
            if window is None:
                break
            start = self.position - window.start
            part = window.data[start : start + length - filled]
            copy[filled : filled + part.size] = part
            readable = readable and not window.is_bad(self.position, self.position + part.size)
            filled += part.size
            self.position += part.size
        return Piece(copy[:filled], readable, None)

    def _current(self) -> Window | None:
        """The window that holds ``position``; ``None`` behind the end."""
        while self._window is None or self.position >= self._window.stop:
            if self._window is not None:
                self._window.drop()
                self._window = None
            if self.position >= self._stop:
                return None
            self._window = self._next_window()
            if self._window.data.size == 0 or self.position < self._window.start:  # the file has become shorter
                return None
        return self._window

    def _next_window(self) -> Window:
        while len(self._reading) < WINDOWS_IN_FLIGHT and self._next_read < self._stop and self._start_read(wait=not self._reading):
            continue
        if not self._reading:
            return Window(self.position, np.empty(0, np.uint8), lambda _: None)
        window, memory, future = self._reading.popleft()
        wanted = memory.size
        try:
            window.data = memory[: future.result()]
        except DeviceError as error:
            self._on_error(error)
            self._read_in_pieces(window, memory, wanted)
        return window

    def _start_read(self, *, wait: bool) -> bool:
        """Ask for the next window; False when all memory is in use (``wait``: until there is some)."""
        memory = self._slots.acquire(timeout_s=None if wait else 0)
        if memory is None:
            return False
        start = self._next_read - self._next_read % PAGE_BYTES
        length = min(WINDOW_BYTES, round_up_pages(self._stop - start))
        window = Window(start, memory, self._slots.release)
        part = memory[:length]
        self._reading.append((window, part, self._file.read(start, [part])))
        self._next_read = start + length
        return True

    def _read_in_pieces(self, window: Window, memory: ByteArray, wanted: int) -> None:
        filled = 0
        for start in range(0, wanted, RETRY_BYTES):
            part = memory[start : min(start + RETRY_BYTES, wanted)]
            try:
                filled = start + self._file.read(window.start + start, [part]).result()
            except DeviceError:
                window.bad.append((window.start + start, window.start + start + part.size))
                part[:] = 0
                filled = start + part.size
        window.data = memory[:filled]

    def close(self) -> None:
        """Wait for reads in flight and give all memory back."""
        for window, _, future in self._reading:
            future.exception()
            window.drop()
        self._reading.clear()
        if self._window is not None:
            self._window.drop()
            self._window = None


def extents(offsets: list[int], stops: list[int], gap_bytes: int = WINDOW_BYTES) -> Iterator[tuple[int, int, int, int]]:
    """Runs of records that are read in one stream: (first row, row behind the last, start, stop). Large gaps are left out."""
    first = 0
    for row in range(1, len(offsets) + 1):
        if row == len(offsets) or offsets[row] - stops[row - 1] > gap_bytes:
            yield first, row, offsets[first], stops[row - 1]
            first = row
