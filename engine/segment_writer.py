"""The open end of the log: where the next record goes, what the seal will say, and the buffers of one write."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from ..format.layout import PAGE_BYTES, RecordType
from ..format.record import RecordHeader
from ..format.seal import SealBuilder
from ..format.segment import SegmentHeader
from ..gds.device import DeviceFile
from .arena import Bytes
from .contract import Refusal
from .entry import Entry
from .index_entry import IndexEntry


class OpenSegment:
    """The segment that records are appended to. Used by the writer thread; ``synced_bytes`` is set by the commit thread."""

    def __init__(self, file: DeviceFile, header: SegmentHeader) -> None:
        self.file = file
        self.header = header
        self.segment_id = header.segment_id
        self.position = PAGE_BYTES
        self.synced_bytes = 0
        self.namespaces: set[bytes] = set()
        self.seal = SealBuilder()
        self.header_written = False

    def place(self, header: RecordHeader, record_seq: int) -> RecordHeader:
        """Give a record its place at the end of the segment."""
        placed = header.placed(
            store_uuid=self.header.store_uuid,
            segment_id=self.segment_id,
            epoch=self.header.epoch,
            offset=self.position,
            record_seq=record_seq,
            synced_bytes=self.synced_bytes,
        )
        self.seal.add(placed)
        self.position += placed.record_bytes
        return placed

    def pack_seal(self, record_seq: int, now_ns: int) -> bytes:
        return self.seal.pack(
            store_uuid=self.header.store_uuid,
            segment_id=self.segment_id,
            epoch=self.header.epoch,
            offset=self.position,
            record_seq=record_seq,
            synced_bytes=self.synced_bytes,
            written_at_ns=now_ns,
        )


@dataclass(slots=True)
class Record:
    """A record before it has a place: ``parts`` are its payload; ``in_place`` ones are page-aligned and padded already."""

    header: RecordHeader
    parts: list[Bytes]
    entry: Entry | None = None
    in_place: bool = False

    @property
    def staged_bytes(self) -> int:
        """Room it needs in the staging area."""
        return PAGE_BYTES if self.in_place else self.header.record_bytes


@dataclass(slots=True)
class Dropped:
    """A change that will not be written; it keeps its turn so that tickets settle in order."""

    entry: Entry
    reason: Refusal


@dataclass(slots=True)
class LogBatch:
    """Records written together to one segment, on their way through write, sync and index."""

    segment: OpenSegment
    write: Future[int]
    entries: list[tuple[Entry, IndexEntry | None]]
    dropped: list[Dropped]
    end_offset: int
    last_sequence: int
    starts_segment: bool


@dataclass(slots=True)
class SealWrite:
    """The seal of a finished segment, written after its last record."""

    segment: OpenSegment
    write: Future[int]
    size_bytes: int


class Assembly:
    """Lays records one behind the other: headers and small payloads into staging memory, large raw ones by reference."""

    def __init__(self, staging: Bytes) -> None:
        self._staging = staging
        self._fill_bytes = 0
        self._run_start: int | None = None  # where the staged bytes began that the last buffer consists of
        self.buffers: list[Bytes] = []

    def add_page(self, page: bytes) -> None:
        self._stage(len(page))[:] = np.frombuffer(page, dtype=np.uint8)

    def add(self, record: Record, placed: RecordHeader) -> None:
        payload_bytes = placed.record_bytes - PAGE_BYTES
        if record.in_place:
            placed.pack_into(self._stage(PAGE_BYTES))
            self.buffers += record.parts
            self._run_start = None
            return
        area = self._stage(PAGE_BYTES + payload_bytes)
        placed.pack_into(area[:PAGE_BYTES])
        position = PAGE_BYTES
        for part in record.parts:
            np.copyto(area[position : position + part.size], part)
            position += part.size
        area[position:] = 0

    def _stage(self, size_bytes: int) -> Bytes:
        start, stop = self._fill_bytes, self._fill_bytes + size_bytes
        self._fill_bytes = stop
        if self._run_start is None:
            self._run_start = start
            self.buffers.append(self._staging[start:stop])
        else:
            self.buffers[-1] = self._staging[self._run_start : stop]
        return self._staging[start:stop]


def index_entry(placed: RecordHeader) -> IndexEntry | None:
    """What the index keeps of a block's record; ``None`` for other records."""
    if placed.record_type is not RecordType.BLOCK:
        return None
    return IndexEntry(
        segment_id=placed.segment_id,
        offset=placed.offset,
        record_pages=placed.record_bytes // PAGE_BYTES,
        depth=placed.depth,
        raw_length=placed.raw_length,
        stored_length=placed.stored_length,
        version_seq=placed.version_seq,
        record_seq=placed.record_seq,
        written_at_ns=placed.written_at_ns,
        expires_at_ns=placed.expires_at_ns,
        payload_checksum=placed.payload_checksum,
        parent=placed.parent,
        codec=int(placed.codec),
    )


def staging_bytes(records: list[Record]) -> int:
    """Staging memory that a batch needs, the header page of a new segment included."""
    return PAGE_BYTES + sum(record.staged_bytes for record in records)
