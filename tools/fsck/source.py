"""The files that a check reads, on a device: a store's folder or one segment file, and large sequential reads with several in flight."""

from __future__ import annotations

import collections
import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from ...format.errors import DeviceError, PathUnavailable
from ...format.layout import PAGE_BYTES, SEGMENTS_FOLDER, SUPERBLOCK_NAME, parse_segment_name, round_up_pages
from ...gds.buffers import ByteArray, aligned_array
from ...gds.device import Device, DeviceFile

NEAR_BYTES = 64 << 10
"""Pages that lie this close to each other are fetched with one read."""
GATHER_BYTES = 512 << 10
GATHERS_IN_FLIGHT = 32


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """A segment file as it was listed."""

    segment_id: int
    path: str
    """On the device."""
    name: str
    """For messages: relative to the store."""
    size_bytes: int
    allocated_bytes: int


def require_store(path: str, names: Sequence[str] | None) -> None:
    """Raises ``PathUnavailable`` when a folder with these names in it, or (``None``) what is no folder, is no store."""
    if names is None or (SUPERBLOCK_NAME not in names and SEGMENTS_FOLDER not in names):
        raise PathUnavailable(
            "this is not a kvlode store",
            where=path,
            expected=f"a folder with {SUPERBLOCK_NAME} and {SEGMENTS_FOLDER}/",
            actual="no folder" if names is None else ", ".join(names[:5]) or "an empty folder",
            action="Name the folder that was given to kvlode.open, or one of its segment files.",
        )


def list_segments(device: Device, store_path: str) -> tuple[list[SegmentRef], list[str]]:
    """Segments, oldest first, and the other names in ``segments/``. Files that vanish meanwhile are left out."""
    folder = f"{store_path}/{SEGMENTS_FOLDER}"
    try:
        names = device.list_folder(folder)
    except DeviceError as error:
        if error.errno == errno.ENOENT:
            return [], []
        raise
    segments: list[SegmentRef] = []
    others: list[str] = []
    for name in names:
        segment_id = parse_segment_name(name)
        if segment_id is None:
            others.append(name)
            continue
        status = device.status(f"{folder}/{name}")
        if status is not None:
            place = f"{SEGMENTS_FOLDER}/{name}"
            segments.append(SegmentRef(segment_id, f"{folder}/{name}", place, status.size_bytes, status.allocated_bytes))
    return sorted(segments, key=lambda ref: ref.segment_id), others


class SegmentReader:
    """One open segment. ``read`` is what the walkers of ``format.walk`` want; all methods may raise ``DeviceError``."""

    def __init__(self, file: DeviceFile, ref: SegmentRef) -> None:
        self.file = file
        self.ref = ref
        self._window = memoryview(b"")
        self._window_start = 0
        self._previous = -NEAR_BYTES - 1

    def read(self, offset: int, length: int) -> memoryview:
        """Bytes from ``offset``, short at the end of the file. A walk over small records reads a window at a time."""
        near, self._previous = 0 <= offset - self._previous <= NEAR_BYTES, offset
        if not self._window_start <= offset <= offset + length <= self._window_start + len(self._window):
            if not near or length > GATHER_BYTES:
                return self._read_now(offset, length)
            try:
                self._window, self._window_start = self._read_now(offset, GATHER_BYTES), offset
            except DeviceError:  # a window that cannot be read is no reason to give up a page that can
                return self._read_now(offset, length)
        start = offset - self._window_start
        return self._window[start : start + length]

    def read_ahead(self, offset: int, length: int) -> None:
        """Fetch bytes that ``read`` is about to be asked for. What cannot be read now is read when it is asked for."""
        try:
            self._window, self._window_start = self._read_now(offset, length), offset
        except DeviceError:
            self._window = memoryview(b"")

    def _read_now(self, offset: int, length: int) -> memoryview:
        start = offset - offset % PAGE_BYTES
        length = min(length, max(0, self.ref.size_bytes - offset))  # a damaged length must not make memory
        if length == 0:
            return memoryview(b"")
        area = aligned_array(round_up_pages(offset + length - start))
        count = self.file.read(start, [area]).result()
        return memoryview(area.data)[offset - start : min(count, offset - start + length)]

    def data_end(self) -> int:
        """Where the file's data ends, in whole pages: behind it there is nothing but a hole or space that was never written."""
        size_bytes = self.ref.size_bytes - self.ref.size_bytes % PAGE_BYTES
        descriptor_of = getattr(self.file, "fileno", None)
        if self.ref.allocated_bytes == 0 or descriptor_of is None:
            return size_bytes if self.ref.allocated_bytes else 0
        descriptor, position = descriptor_of(), 0
        while position < size_bytes:
            try:
                start = os.lseek(descriptor, position, os.SEEK_DATA)
            except OSError as error:
                return min(size_bytes, round_up_pages(position)) if error.errno == errno.ENXIO else size_bytes
            position = os.lseek(descriptor, start, os.SEEK_HOLE)
        return size_bytes

    def gather(self, offsets: Sequence[int]) -> Iterator[tuple[int, memoryview | DeviceError]]:
        """The page at each offset (growing multiples of a page), in order; short at the end of the file, or why it cannot be read."""
        pending: collections.deque[tuple[list[int], ByteArray, Future[int]]] = collections.deque()
        for group in _near_groups(offsets):
            if len(pending) == GATHERS_IN_FLIGHT:
                yield from self._pages(*pending.popleft())
            area = aligned_array(group[-1] + PAGE_BYTES - group[0])
            pending.append((group, area, self.file.read(group[0], [area])))
        while pending:
            yield from self._pages(*pending.popleft())

    def _pages(self, group: list[int], area: ByteArray, future: Future[int]) -> Iterator[tuple[int, memoryview | DeviceError]]:
        try:
            count = future.result()
        except DeviceError as error:
            if len(group) == 1:
                yield group[0], error
                return
            for offset in group:
                page = aligned_array(PAGE_BYTES)
                yield from self._pages([offset], page, self.file.read(offset, [page]))
            return
        view = memoryview(area.data)
        for offset in group:
            start = offset - group[0]
            yield offset, view[start : min(start + PAGE_BYTES, max(start, count))]


def _near_groups(offsets: Sequence[int]) -> Iterator[list[int]]:
    group: list[int] = []
    for offset in offsets:
        if group and (offset - group[-1] > NEAR_BYTES or offset + PAGE_BYTES - group[0] > GATHER_BYTES):
            yield group
            group = []
        group.append(offset)
    if group:
        yield group


@contextlib.contextmanager
def opened(device: Device, ref: SegmentRef) -> Iterator[SegmentReader | None]:
    """A segment, open for reading; ``None`` when the file is gone. Raises ``DeviceError`` when it cannot be opened."""
    try:
        file = device.open(ref.path, "read")
    except DeviceError as error:
        if error.errno != errno.ENOENT:
            raise
        yield None
        return
    try:
        yield SegmentReader(file, ref)
    finally:
        file.close()


def read_page(device: Device, path: str) -> bytes:
    """The first page of a file, or less when it is shorter. Raises ``DeviceError``."""
    file = device.open(path, "read")
    try:
        area = aligned_array(PAGE_BYTES)
        return bytes(area[: file.read(0, [area]).result()])
    finally:
        file.close()
