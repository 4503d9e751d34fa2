"""Sequential reading through one piece of memory.

``ByteStream.take`` hands out the next bytes of a file as a view of that memory, or as a copy where they lie in two windows.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...format.errors import DeviceError
from ...format.layout import PAGE_BYTES, round_up_pages
from ...gds.buffers import ByteArray, SlotPool
from ...gds.device import DeviceFile

WINDOW_BYTES = (16 << 20) + (256 << 10)
RETRY_BYTES = 64 << 10
"""A window that cannot be read is read again in pieces of this size, so that only the bad ones are lost."""


class Windows:
    """The memory of all streams of a check. Thread-safe; ``close`` it.

    ``decoding``: turns of those who decode. More of them than cores would only drive each other's scratch memory out of the caches.
    """

    def __init__(self, count: int) -> None:
        self.slots = SlotPool(WINDOW_BYTES, count * WINDOW_BYTES)
        self.decoding = threading.Semaphore(os.cpu_count() or 1)

    def close(self) -> None:
        self.slots.close()


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of the file, good until the stream is asked again. ``readable`` is False where the drive gave an error."""

    data: ByteArray
    readable: bool


class ByteStream:
    """The bytes of ``[start, stop)`` of a file in order. For one thread."""

    def __init__(self, file: DeviceFile, start: int, stop: int, windows: Windows, on_error: Callable[[DeviceError], None]) -> None:
        self._file = file
        self._stop = stop
        self._windows = windows
        self._on_error = on_error
        memory = windows.slots.acquire()
        assert memory is not None  # waits without limit: whoever has some reads on without waiting for more
        self._memory = memory
        self._window: ByteArray = memory[:0]
        self._window_start = start - start % PAGE_BYTES
        self._bad: list[tuple[int, int]] = []
        """Ranges of the file in the window (start, stop) that could not be read."""
        self.position = start

    def take(self, length: int) -> Piece:
        """The next ``length`` bytes; fewer only at the end of the file."""
        if not self._fill():
            return Piece(np.empty(0, np.uint8), True)
        start = self.position - self._window_start
        if start + length > self._window.size:
            return self._take_across(length)
        self.position += length
        return Piece(self._window[start : start + length], not self._is_bad(self.position - length, self.position))

    def whole_bytes(self) -> int:
        """How much ``take`` can hand out as one view, all of it readable; 0 where that is not known."""
        return 0 if not self._fill() or self._bad else self._window_stop - self.position

    def peek(self, length: int) -> ByteArray:
        """A view of the next bytes, which ``take`` gives as well; no more than ``whole_bytes``."""
        start = self.position - self._window_start
        return self._window[start : start + length]

    def skip(self, length: int) -> None:
        """Go on behind the next ``length`` bytes."""
        self.position += length

    def _take_across(self, length: int) -> Piece:
        copy = np.empty(length, np.uint8)
        filled, readable = 0, True
        while filled < length and self._fill():
            start = self.position - self._window_start
            part = self._window[start : start + length - filled]
            copy[filled : filled + part.size] = part
            readable = readable and not self._is_bad(self.position, self.position + part.size)
            filled += part.size
            self.position += part.size
        return Piece(copy[:filled], readable)

    @property
    def _window_stop(self) -> int:
        return self._window_start + self._window.size

    def _is_bad(self, start: int, stop: int) -> bool:
        return any(first < stop and start < last for first, last in self._bad)

    def _fill(self) -> bool:
        """Whether ``position`` lies in the window, after reading the one in which it does; False behind the end."""
        if self._window_start <= self.position < self._window_stop:
            return True
        if self.position >= self._stop:
            return False
        self._window_start = self.position - self.position % PAGE_BYTES
        self._bad = []
        memory = self._memory[: min(WINDOW_BYTES, round_up_pages(self._stop - self._window_start))]
        try:
            self._window = memory[: self._file.read_now(self._window_start, [memory])]
        except DeviceError as error:
            self._on_error(error)
            self._read_in_pieces(memory)
        return self.position < self._window_stop  # not, when the file has become shorter

    def _read_in_pieces(self, memory: ByteArray) -> None:
        filled = 0
        for start in range(0, memory.size, RETRY_BYTES):
            part = memory[start : start + RETRY_BYTES]
            place = self._window_start + start
            try:
                count = self._file.read_now(place, [part])
            except DeviceError:
                self._bad.append((place, place + part.size))
                part[:] = 0
                count = part.size
            filled = start + count
            if count < part.size:
                break  # the end of the file
        self._window = memory[:filled]

    def close(self) -> None:
        """Give the memory back."""
        self._window = self._window[:0]
        self._windows.slots.release(self._memory)
