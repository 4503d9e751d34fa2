"""Reading a segment file without asking the drive for its holes: a preallocated or sparse file costs what it holds."""

from __future__ import annotations

import bisect
import errno
import os
from pathlib import Path

from ..format.layout import PAGE_BYTES, round_up_pages
from ..gds.buffers import aligned_array
from ..gds.device import DeviceFile

EXTENTS_MAX = 1 << 16
"""Beyond so many ranges of data the rest of the file counts as one."""
_WINDOW_BYTES = 256 << 10
_NEAR_BYTES = 16 << 10


def data_ranges(path: Path, size_bytes: int) -> list[tuple[int, int]]:
    """Byte ranges that hold data, in order; the rest are holes. The whole file where the file system does not tell."""
    ranges: list[tuple[int, int]] = []
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe in the place of a file must not hold us up
    try:
        position = 0
        while position < size_bytes:
            if len(ranges) == EXTENTS_MAX:
                ranges.append((position, size_bytes))
                break
            try:
                start = os.lseek(descriptor, position, os.SEEK_DATA)
                position = os.lseek(descriptor, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole follows
                    break
                return [(0, size_bytes)]
            ranges.append((start, min(position, size_bytes)))
    finally:
        os.close(descriptor)
    return ranges


class SegmentReader:
    """A ``format.walk.Read`` over an open file, short at its end. One thread at a time.

    Reads that follow each other closely are served from one larger read; single ones fetch no more than their pages.
    """

    def __init__(self, file: DeviceFile, size_bytes: int, ranges: list[tuple[int, int]]) -> None:
        self._file = file
        self._size_bytes = size_bytes
        self._starts = [start for start, _ in ranges]
        self._ends = [end for _, end in ranges]
        self._window_start = 0
        self._window = memoryview(b"")
        self._last_end = -1

    def __call__(self, offset: int, length: int) -> memoryview:
        end = max(offset, min(offset + length, self._size_bytes))
        near = 0 <= offset - self._last_end <= _NEAR_BYTES
        self._last_end = end
        if self._is_hole(offset, end):
            return memoryview(bytes(end - offset))
        window_end = self._window_start + len(self._window)
        if not self._window_start <= offset <= end <= window_end:
            self._fetch(offset, max(end, offset + _WINDOW_BYTES) if near else end)
        return self._window[offset - self._window_start : end - self._window_start]

    def _fetch(self, offset: int, end: int) -> None:
        start = offset - offset % PAGE_BYTES
        area = aligned_array(round_up_pages(end - start))
        count = self._file.read(start, [area]).result()
        self._window_start, self._window = start, memoryview(area.data)[:count]

    def _is_hole(self, start: int, end: int) -> bool:
        following = bisect.bisect_right(self._ends, start)
        return following == len(self._starts) or self._starts[following] >= end
