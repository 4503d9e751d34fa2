"""A store's files, read only: superblock, segments, records. Uses ``format`` and ``gds`` alone, so that a store can be looked
into without its engine and without RocksDB, beside a running writer, and when parts of it are damaged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..format.errors import FormatError, PathUnavailable
from ..format.layout import PAGE_BYTES, SEGMENTS_FOLDER, SUPERBLOCK_NAME, RecordType, parse_segment_name, segment_name
from ..format.namespace import Namespace
from ..format.record import RecordHeader
from ..format.seal import SealTable
from ..format.segment import SegmentHeader
from ..format.superblock import Superblock
from ..format.walk import Read, find_seal, scan_unsealed
from ..gds.buffers import aligned_array
from ..gds.posix import PosixDevice


@dataclass(frozen=True, slots=True)
class RecordRow:
    """What a list of records shows of each; from the seal or from the records themselves."""

    offset: int
    record_type: int
    key: bytes
    namespace: bytes
    raw_length: int
    stored_length: int
    record_pages: int
    version_seq: int
    record_seq: int
    written_at_ns: int
    expires_at_ns: int
    codec: int
    depth: int


@dataclass(frozen=True, slots=True)
class SegmentView:
    """One segment file as it was found. ``problems`` says what is damaged; the rows are what could be read."""

    segment_id: int
    size_bytes: int
    allocated_bytes: int
    header: SegmentHeader | None
    sealed: bool
    rows: list[RecordRow]
    problems: list[str]


class StoreFiles:
    """Opens nothing for writing and takes no lock. Raises ``PathUnavailable`` or ``FormatError`` when this is no store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._device = PosixDevice(threads=1)
        try:
            page = (path / SUPERBLOCK_NAME).read_bytes()
        except OSError as error:
            self._device.close()
            raise PathUnavailable(
                "this is not a kvlode store",
                where=path,
                expected=f"a folder with a file {SUPERBLOCK_NAME}",
                actual=error.strerror,
                action="Name the folder that was given to kvlode.open.",
            ) from None
        try:
            self.superblock = Superblock.parse(page, where=path / SUPERBLOCK_NAME)
        except FormatError:
            self._device.close()
            raise

    def close(self) -> None:
        self._device.close()

    def __enter__(self) -> StoreFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def segment_ids(self) -> list[int]:
        """Ids of the segment files, oldest first."""
        try:
            names = os.listdir(self.path / SEGMENTS_FOLDER)
        except FileNotFoundError:
            return []
        return sorted(found for name in names if (found := parse_segment_name(name)) is not None)

    def segment_path(self, segment_id: int) -> Path:
        return self.path / SEGMENTS_FOLDER / segment_name(segment_id)

    @contextmanager
    def reading(self, segment_id: int) -> Iterator[Read]:
        """A read function over a segment file, short at its end."""
        file = self._device.open(str(self.segment_path(segment_id)), "read")

        def read(offset: int, length: int) -> memoryview:
            start = offset - offset % PAGE_BYTES
            area = aligned_array(-(-(offset + length - start) // PAGE_BYTES) * PAGE_BYTES)
            count = file.read(start, [area]).result()
            return memoryview(area.data)[offset - start : min(count, offset - start + length)]

        try:
            yield read
        finally:
            file.close()

    def segments(self) -> Iterator[SegmentView]:
        """Every segment; those that a running writer frees meanwhile are left out."""
        for segment_id in self.segment_ids():
            try:
                yield self.segment(segment_id)
            except OSError:
                if self.segment_path(segment_id).exists():
                    raise

    def segment(self, segment_id: int) -> SegmentView:
        """One segment with its rows. Damage becomes ``problems``; a missing file raises ``DeviceError``."""
        status = os.stat(self.segment_path(segment_id))
        problems: list[str] = []
        with self.reading(segment_id) as read:
            header = self._header(read, segment_id, problems)
            table = self._seal(read, segment_id, status.st_size, problems)
            if table is not None:
                rows = rows_of_table(table)
            else:
                rows = self._rows_by_scan(read, segment_id, _data_end(self.segment_path(segment_id), status.st_size), problems)
        sealed = table is not None
        return SegmentView(segment_id, status.st_size, status.st_blocks * 512, header, sealed, rows, problems)

    def _header(self, read: Read, segment_id: int, problems: list[str]) -> SegmentHeader | None:
        try:
            header = SegmentHeader.parse(read(0, PAGE_BYTES), where=segment_name(segment_id))
            header.check_place(self.superblock.store_uuid, segment_id, where=segment_name(segment_id))
        except FormatError as error:
            problems.append(str(error))
            return None
        return header

    def _seal(self, read: Read, segment_id: int, size_bytes: int, problems: list[str]) -> SealTable | None:
        try:
            found = find_seal(read, size_bytes, store_uuid=self.superblock.store_uuid, segment_id=segment_id)
        except FormatError as error:
            problems.append(str(error))
            return None
        return None if found is None else found[1]

    def _rows_by_scan(self, read: Read, segment_id: int, end: int, problems: list[str]) -> list[RecordRow]:
        try:
            scan = scan_unsealed(read, end=end, store_uuid=self.superblock.store_uuid, segment_id=segment_id, verify_payloads=False)
        except FormatError as error:
            problems.append(str(error))
            return []
        problems += [f"{segment_name(segment_id)}: bytes {start} to {stop} hold no record" for start, stop in scan.damaged]
        return [row_of_header(header) for header in scan.records]

    def record(self, segment_id: int, offset: int) -> tuple[bytes, RecordHeader]:
        """Header page of a record, and what it says. Raises ``FormatError`` with the page's damage."""
        with self.reading(segment_id) as read:
            page = bytes(read(offset, PAGE_BYTES))
        return page, RecordHeader.parse(page, where=f"{segment_name(segment_id)} offset {offset}")

    def payload(self, segment_id: int, header: RecordHeader, length: int) -> bytes:
        """The first bytes of a record's payload as stored."""
        with self.reading(segment_id) as read:
            return bytes(read(header.offset + PAGE_BYTES, min(length, header.stored_length)))

    def namespace(self, segment_id: int, row: RecordRow) -> Namespace:
        """The descriptor in a namespace record. Raises ``KvlodeError``."""
        header = self.record(segment_id, row.offset)[1]
        return Namespace.parse(self.payload(segment_id, header, header.raw_length), where=segment_name(segment_id))


def rows_of_table(table: SealTable) -> list[RecordRow]:
    """Rows of a sealed segment's table of contents."""
    columns = zip(
        (table.page.astype("u8") * PAGE_BYTES).tolist(),
        table.type.tolist(),
        table.keys,
        table.namespace.tolist(),
        table.raw_length.tolist(),
        table.stored_length.tolist(),
        table.record_pages.tolist(),
        table.version_seq.tolist(),
        table.record_seq.tolist(),
        table.written_at_ns.tolist(),
        table.expires_at_ns.tolist(),
        table.codec.tolist(),
        table.depth.tolist(),
        strict=True,
    )
    return [RecordRow(*values) for values in columns]


def row_of_header(header: RecordHeader) -> RecordRow:
    """The row of one record."""
    return RecordRow(
        header.offset,
        int(header.record_type),
        header.key,
        header.namespace,
        header.raw_length,
        header.stored_length,
        header.record_bytes // PAGE_BYTES,
        header.version_seq,
        header.record_seq,
        header.written_at_ns,
        header.expires_at_ns,
        int(header.codec),
        header.depth,
    )


def type_name(record_type: int) -> str:
    """``block``, ``tombstone`` and so on; the number of an unknown type."""
    try:
        return RecordType(record_type).name.lower().replace("_", " ")
    except ValueError:
        return f"type {record_type}"


def _data_end(path: Path, size_bytes: int) -> int:
    """End of what was written of a preallocated file, in whole pages."""
    with path.open("rb", buffering=0) as file:
        position = 0
        while position < size_bytes:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole follows
                break
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
    return -(-position // PAGE_BYTES) * PAGE_BYTES
