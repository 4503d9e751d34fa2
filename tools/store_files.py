"""A store's files, read only: superblock, segments, records. Uses ``format`` and ``gds`` alone, so that a store can be looked
into without its engine and without RocksDB, beside a running writer, and when parts of it are damaged."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..format.errors import DeviceError, FormatError, PathUnavailable, UnsupportedFormat
from ..format.layout import PAGE_BYTES, SEGMENTS_FOLDER, SUPERBLOCK_NAME, parse_segment_name, segment_name
from ..format.namespace import Namespace
from ..format.record import RecordHeader
from ..format.seal import SealTable
from ..format.segment import SegmentHeader
from ..format.superblock import Superblock
from ..format.walk import find_trailer
from ..gds.buffers import aligned_array
from ..gds.posix import PosixDevice
from .segment_reader import SegmentReader, data_ranges
from .segment_view import SegmentView, first_record, read_segment


class StoreFiles:
    """Opens nothing for writing and takes no lock.

    ``path`` is a store's folder or a lone segment file. A store whose superblock is damaged or gone is read by what its
    segments say; ``problems`` tells. Raises ``PathUnavailable`` or ``UnsupportedFormat`` when this is no store, and
    ``OSError`` when it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.superblock: Superblock | None = None
        self.problems: list[str] = []
        self._lone: int | None = None
        self._device = PosixDevice(threads=1)
        try:
            if path.is_file():
                self.store_uuid = self._identify_file()
            else:
                self.store_uuid = self._identify_store()
        except BaseException:
            self._device.close()
            raise

    def close(self) -> None:
        self._device.close()

    def __enter__(self) -> StoreFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- which store this is --------------------------------------------------------------------------------------

    def _identify_store(self) -> bytes:
        place = self.path / SUPERBLOCK_NAME
        try:
            with place.open("rb", buffering=0) as file:
                self.superblock = Superblock.parse(file.read(PAGE_BYTES), where=place)
            return self.superblock.store_uuid
        except (FileNotFoundError, NotADirectoryError) as error:
            problem: Exception = PathUnavailable(
                "this is not a kvlode store",
                where=self.path,
                expected=f"a folder with a file {SUPERBLOCK_NAME}, or a segment file",
                actual=error.strerror,
                action="Name the folder that was given to kvlode.open.",
            )
        except FormatError as error:
            problem = error
        found = Counter(header.store_uuid for segment_id in self.segment_ids() if (header := self.header(segment_id)) is not None)
        if not found:
            raise problem
        self.problems.append(f"{problem}" if isinstance(problem, FormatError) else f"{place} is missing; read by what the segments say")
        return found.most_common(1)[0][0]

    def _identify_file(self) -> bytes:
        """Store and id of a segment file outside of a store: by its header, else by its first whole record."""
        named = parse_segment_name(self.path.name)
        self._lone = named or 0
        with self.reading(self._lone) as read:
            page = bytes(read(0, PAGE_BYTES))
            if not page:
                return bytes(16)
            found: SegmentHeader | RecordHeader | None
            try:
                found = SegmentHeader.parse(page, where=self.path)
            except FormatError:
                found = first_record(read)
        if found is not None:
            self._lone = found.segment_id
            return found.store_uuid
        if named is not None:
            return bytes(16)
        raise UnsupportedFormat(
            "this is neither a kvlode store nor a segment file",
            where=self.path,
            expected="a segment header, or a record",
            action="Name a store's folder, or a file of its folder segments.",
        )

    # --- segments ---------------------------------------------------------------------------------------------------

    def segment_ids(self) -> list[int]:
        """Ids of the segment files, oldest first."""
        if self._lone is not None:
            return [self._lone]
        folder = self.path / SEGMENTS_FOLDER
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            if self.superblock is not None and not self.path.is_dir():
                raise  # the store was there and is gone
            return []
        except NotADirectoryError:
            if self.superblock is None and not self.path.is_dir():
                return []
            action = "A store keeps its segments in a folder of this name: move the file away and put the folder back."
            raise DeviceError("list folder", folder, errno=errno.ENOTDIR, action=action) from None
        return sorted(found for name in names if (found := parse_segment_name(name)) is not None)

    def segment_path(self, segment_id: int) -> Path:
        return self.path if self._lone is not None else self.path / SEGMENTS_FOLDER / segment_name(segment_id)

    @contextmanager
    def reading(self, segment_id: int) -> Iterator[SegmentReader]:
        """A read function over a segment file, short at its end. Raises ``OSError`` when it is not there or may not be read."""
        path = self.segment_path(segment_id)
        size_bytes = os.stat(path).st_size
        file = self._device.open(str(path), "read")
        try:
            yield SegmentReader(file, size_bytes, data_ranges(path, size_bytes))
        finally:
            file.close()

    def header(self, segment_id: int) -> SegmentHeader | None:
        """The header page of a segment; ``None`` when it is damaged or cannot be read, or of a file that went away."""
        try:
            file = self._device.open(str(self.segment_path(segment_id)), "read")
            try:
                area = aligned_array(PAGE_BYTES)
                page = bytes(area[: file.read(0, [area]).result()])
            finally:
                file.close()
            return SegmentHeader.parse(page, where=segment_name(segment_id))
        except (FormatError, OSError):  # ``segments`` tells what cannot be read
            return None

    def segments(self) -> Iterator[SegmentView]:
        """Every segment; those that a running writer frees meanwhile are left out, what cannot be read becomes a problem."""
        for segment_id in self.segment_ids():
            try:
                yield self.segment(segment_id)
            except OSError as error:
                if self.segment_path(segment_id).exists():
                    yield SegmentView.unreadable(segment_id, str(error))
                elif not self.path.exists():
                    raise

    def segment(self, segment_id: int) -> SegmentView:
        """One segment with its records. Damage becomes ``problems``; raises ``OSError`` for a file that cannot be read."""
        path = self.segment_path(segment_id)
        status = os.stat(path)
        ranges = data_ranges(path, status.st_size)
        with self.reading(segment_id) as read:
            view = read_segment(
                read,
                segment_id=segment_id,
                store_uuid=self.store_uuid,
                size_bytes=status.st_size,
                allocated_bytes=status.st_blocks * 512,
                data_end=ranges[-1][1] if ranges else 0,
            )
        if view.empty and self._was_sealed(segment_id):
            view.mark_blank()
        return view

    def _was_sealed(self, segment_id: int) -> bool:
        """Whether a later segment of this store was cut to its seal, and none of them says that this one was freed. Each segment
        is cut only when all before it are sealed; records of a later one alone do not say so."""
        later = [found for found in self.segment_ids() if found > segment_id]
        places = {found: self.header(found) for found in later}
        headers = [h for found, h in places.items() if h is not None and (h.store_uuid, h.segment_id) == (self.store_uuid, found)]
        freed = any(header.first_live_segment > segment_id for header in headers)
        return not freed and any(self._was_cut(header) for header in headers)

    def _was_cut(self, header: SegmentHeader) -> bool:
        try:
            size_bytes = os.stat(self.segment_path(header.segment_id)).st_size
            with self.reading(header.segment_id) as read:
                trailer = find_trailer(read, size_bytes, store_uuid=self.store_uuid, segment_id=header.segment_id)
        except (OSError, FormatError):  # it is told where its turn comes
            return False
        return trailer is not None and size_bytes < header.segment_bytes

    # --- records ----------------------------------------------------------------------------------------------------

    def record(self, segment_id: int, offset: int) -> tuple[bytes, RecordHeader]:
        """Header page of a record, and what it says. Raises ``FormatError`` with the page's damage."""
        with self.reading(segment_id) as read:
            page = bytes(read(offset, PAGE_BYTES))
        return page, RecordHeader.parse(page, where=f"{segment_name(segment_id)} offset {offset}")

    def payload(self, segment_id: int, header: RecordHeader, length: int) -> bytes:
        """The first bytes of a record's payload as stored."""
        with self.reading(segment_id) as read:
            return bytes(read(header.offset + PAGE_BYTES, min(length, header.stored_length)))

    def namespace(self, segment_id: int, table: SealTable, row: int) -> Namespace:
        """The descriptor in a namespace record. Raises ``KvlodeError``."""
        header = self.record(segment_id, int(table.page[row]) * PAGE_BYTES)[1]
        return Namespace.parse(self.payload(segment_id, header, header.raw_length), where=segment_name(segment_id))


def open_files(path: Path) -> tuple[StoreFiles, int | None]:
    """The store at ``path``; and the segment's id when ``path`` is a segment file, inside its store or alone."""
    segment_id = parse_segment_name(path.name)
    if segment_id is None or not path.is_file():
        files = StoreFiles(path)
        return files, files.segment_ids()[0] if path.is_file() else None
    folder = path.resolve().parent
    if folder.name == SEGMENTS_FOLDER and (folder.parent / SUPERBLOCK_NAME).is_file():
        return StoreFiles(folder.parent), segment_id
    files = StoreFiles(path)
    return files, files.segment_ids()[0]


def check_segment(files: StoreFiles, segment_id: int) -> None:
    """Raise ``PathUnavailable`` unless the store has this segment."""
    present = files.segment_ids()
    if segment_id not in present:
        shown = ", ".join(f"{found:x}" for found in present[:3]) + (" ..." if len(present) > 3 else "")
        raise PathUnavailable(
            "there is no such segment",
            where=files.path,
            expected=f"one of {len(present)}: {shown}" if present else "a store with segments",
            actual=segment_name(segment_id),
        )
