"""The records of one segment through a read function: the seal, the unbroken run, resynchronisation, torn tail or damage.

``Read`` takes an offset and a length and returns that many bytes, fewer only at the end of the file. Every length that
is passed to it was bounded by the range the caller gave. Nothing here loops without progress: each step moves at
least one page forward.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from .checksum import Buffer, xxh3_64
from .errors import CorruptRecord, UnsupportedFormat
from .layout import PAGE_BYTES, RecordType
from .record import RECORD_TABLE, RecordHeader, check_place
from .seal import SealTable, Trailer
from .stripe import stripe_offsets

Read: TypeAlias = Callable[[int, int], Buffer]

_SEARCH_BYTES = 1 << 20
_ZERO_PAGE = bytes(PAGE_BYTES)
_MAGIC_WORD = int.from_bytes(RECORD_TABLE.magic, "little")


class WalkEndKind(enum.Enum):
    """Why a run of records ended."""

    SEAL = "a seal record"
    END = "the end of the range"
    ZEROS = "a page of zeros"
    BREAK = "something that is no record of this place"


@dataclass(frozen=True, slots=True)
class WalkEnd:
    """Where a run ended. ``seal`` is set for ``SEAL``, ``error`` for ``BREAK``."""

    kind: WalkEndKind
    offset: int
    seal: RecordHeader | None = None
    error: CorruptRecord | None = None


class RecordWalk(Iterator[RecordHeader]):
    """Iterator over the headers of an unbroken run; ``end`` says how it ended once it is exhausted."""

    def __init__(self, read: Read, start: int, end: int, store_uuid: bytes, segment_id: int, verify_from: int | None) -> None:
        self._read = read
        self._limit = end
        self._place = (store_uuid, segment_id)
        self._verify_from = verify_from
        self.position = start
        """Offset behind the last record that was yielded."""
        self.end: WalkEnd | None = None

    def __next__(self) -> RecordHeader:
        if self.end is not None:
            raise StopIteration
        header = self._step()
        if header is None:
            raise StopIteration
        self.position += header.record_bytes
        return header

    def _step(self) -> RecordHeader | None:
        """The record at ``position``, or ``None`` with ``end`` set."""
        offset = self.position
        if offset + PAGE_BYTES > self._limit:
            self.end = WalkEnd(WalkEndKind.END, offset)
            return None
        page = bytes(self._read(offset, PAGE_BYTES))
        if page == _ZERO_PAGE:
            self.end = WalkEnd(WalkEndKind.ZEROS, offset)
            return None
        try:
            header = parse_placed(page, *self._place, offset)
            if header.record_type == RecordType.SEAL:
                self.end = WalkEnd(WalkEndKind.SEAL, offset, seal=header)
                return None
            self._check_inside(header)
        except CorruptRecord as error:
            self.end = WalkEnd(WalkEndKind.BREAK, offset, error=error)
            return None
        return header

    def _check_inside(self, header: RecordHeader) -> None:
        stop = header.offset + header.record_bytes
        if stop > self._limit:
            raise CorruptRecord("record-end", where=_where(self._place[1], header.offset), expected=f"at most {self._limit}", actual=stop)
        if self._verify_from is not None and stop > self._verify_from:
            check_payload(self._read, header)


def walk_records(read: Read, *, start: int, end: int, store_uuid: bytes, segment_id: int, verify_from: int | None = None) -> RecordWalk:
    """Walk the run of records from ``start`` (a record's offset; ``PAGE_BYTES`` for the first) up to ``end``.

    Yields headers; the seal is not yielded but ends the walk. With ``verify_from`` the payloads of records that end
    behind that offset are read and compared with their checksums, and a mismatch is a break. Raises ``UnsupportedFormat``
    for an intact record of this segment that this version cannot interpret.
    """
    return RecordWalk(read, start, end, store_uuid, segment_id, verify_from)


def parse_placed(page: Buffer, store_uuid: bytes, segment_id: int, offset: int) -> RecordHeader:
    """The header in a page that was read from ``offset``.

    Raises ``CorruptRecord`` for anything but a record of this place, ``UnsupportedFormat`` for an intact one of this place
    that is of a newer version or an unknown type.
    """
    where = _where(segment_id, offset)
    try:
        header = RecordHeader.parse(page, where=where)
    except UnsupportedFormat:
        if _claims_place(bytes(page), store_uuid, segment_id, offset):
            raise
        raise CorruptRecord("own-offset", where=where, expected="a record of this place", actual="one of another place") from None
    check_place(header, store_uuid, segment_id, offset, where=where)
    return header


def _claims_place(page: bytes, store_uuid: bytes, segment_id: int, offset: int) -> bool:
    """Whether the page names this place; these fields lie where they are in every version."""
    expected = store_uuid + segment_id.to_bytes(8, "little") + offset.to_bytes(8, "little")
    start = RECORD_TABLE.offsets["store_uuid"]
    return page[start : start + len(expected)] == expected


def _where(segment_id: int, offset: int) -> str:
    return f"segment {segment_id:016x} offset {offset}"


def check_payload(read: Read, header: RecordHeader) -> None:
    """Read a record's payload, a stripe at a time, and raise ``CorruptRecord`` unless every checksum matches. Decodes nothing.

    Only the stripes of a known type were bounded when the header was parsed; those of a type to skip are bounded here.
    """
    start = header.offset + PAGE_BYTES
    if header.record_type == RecordType.SEAL:
        pieces = [(0, header.stored_length, header.raw_checksum)]
    else:
        lengths, checksums = header.stripes["stored_length"].tolist(), header.stripes["checksum"].tolist()
        pieces = list(zip(stripe_offsets(header.stripes).tolist(), lengths, checksums, strict=True))
    for index, (offset, length, checksum) in enumerate(pieces):
        if offset + length > header.stored_length:
            raise CorruptRecord(
                "stripe-entry",
                where=f"{_where(header.segment_id, header.offset)} stripe {index}",
                expected=f"an end within {header.stored_length} stored bytes",
                actual=offset + length,
            )
        stored = read(start + offset, length)
        actual = xxh3_64(stored)
        if len(stored) != length or actual != checksum:
            raise CorruptRecord(
                "stripe-checksum",
                where=f"{_where(header.segment_id, header.offset)} stripe {index}",
                expected=f"{checksum:016x}",
                actual=f"{actual:016x}",
            )


def resynchronise(read: Read, *, start: int, end: int, store_uuid: bytes, segment_id: int) -> int | None:
    """Offset of the next valid header at or after ``start`` (a multiple of the page), or ``None``.

    Valid means: of this store, this segment and its own offset, with a matching checksum; payloads may contain images
    of other segments. ``end`` bounds the search: a caller that knows where data ends (``SEEK_DATA``) saves reading zeros.
    """
    for chunk_start in range(start, end - PAGE_BYTES + 1, _SEARCH_BYTES):
        chunk = bytes(read(chunk_start, min(_SEARCH_BYTES, end - chunk_start)))
        pages = len(chunk) // PAGE_BYTES
        words: np.ndarray[Any, np.dtype[np.uint64]] = np.frombuffer(chunk, dtype="<u8", count=pages * PAGE_BYTES // 8)
        for page in np.flatnonzero(words[:: PAGE_BYTES // 8] == _MAGIC_WORD).tolist():
            offset = chunk_start + page * PAGE_BYTES
            try:
                header = parse_placed(chunk[page * PAGE_BYTES : (page + 1) * PAGE_BYTES], store_uuid, segment_id, offset)
            except CorruptRecord:
                continue
            if header.record_type == RecordType.SEAL or offset + header.record_bytes <= end:
                return offset
    return None


def find_trailer(read: Read, size_bytes: int, *, store_uuid: bytes, segment_id: int) -> Trailer | None:
    """The trailer that a sealed segment file of ``size_bytes`` ends in; ``None`` when its last page is not its own trailer."""
    if size_bytes % PAGE_BYTES or not size_bytes:
        return None
    try:
        trailer = Trailer.parse(read(size_bytes - PAGE_BYTES, PAGE_BYTES), where=_where(segment_id, size_bytes - PAGE_BYTES))
    except CorruptRecord:
        return None
    mine = (trailer.store_uuid, trailer.segment_id, trailer.file_bytes) == (store_uuid, segment_id, size_bytes)
    return trailer if mine else None


def find_seal(read: Read, size_bytes: int, *, store_uuid: bytes, segment_id: int) -> tuple[Trailer, SealTable] | None:
    """Trailer and table of contents of a sealed segment file of ``size_bytes``; ``None`` when the last page is not its trailer.

    Raises ``CorruptRecord`` when the trailer is intact but the table is not: the segment is sealed, and its records must
    be walked. Records that end behind ``Trailer.synced_bytes`` may be missing after a crash; check their payloads.
    """
    trailer = find_trailer(read, size_bytes, store_uuid=store_uuid, segment_id=segment_id)
    if trailer is None:
        return None
    where = _where(segment_id, size_bytes - PAGE_BYTES)
    toc = read(trailer.toc_offset, trailer.toc_bytes)
    actual = xxh3_64(toc)
    if actual != trailer.toc_checksum:
        raise CorruptRecord("toc-checksum", where=where, expected=f"{trailer.toc_checksum:016x}", actual=f"{actual:016x}")
    table = SealTable.parse(toc, where=where)
    if len(table) != trailer.record_count or table.data_end > trailer.data_end:
        raise CorruptRecord(
            "toc-counts", where=where, expected=(trailer.record_count, trailer.data_end), actual=(len(table), table.data_end)
        )
    return trailer, table


@dataclass(frozen=True, slots=True)
class SegmentScan:
    """What an unsealed segment holds, by the torn-tail table of SPEC.md part 8."""

    records: list[RecordHeader]
    """Every record to keep, in log order; the seal goes behind the last one."""
    end: WalkEnd
    """How the last run of records that was kept ended."""
    damaged: list[tuple[int, int]]
    """Byte ranges inside the durable part that hold no record."""

    @property
    def data_end(self) -> int:
        """Offset behind the last record to keep."""
        return self.records[-1].offset + self.records[-1].record_bytes if self.records else PAGE_BYTES


def scan_unsealed(
    read: Read, *, end: int, store_uuid: bytes, segment_id: int, durable_bytes: int = 0, verify_payloads: bool = True
) -> SegmentScan:
    """Tell torn tail from damage in a segment without a usable seal.

    The durable part ends at the largest ``synced_bytes`` of any valid record of the segment, or at ``durable_bytes`` (what the
    caller knows, a checkpoint). A break inside it is damage: the walk goes on at the next valid header. Behind it the
    first break ends the log, silently and with all that follows; with ``verify_payloads`` a payload that does not match
    its checksums is such a break. ``end`` is the file's size, or where its data ends (``SEEK_DATA``).
    """
    runs = _runs(read, end, store_uuid, segment_id)
    claims = (header.synced_bytes for run in runs for header in (*run.records, run.end.seal) if header is not None)
    durable = max([durable_bytes, *claims])
    records: list[RecordHeader] = []
    damaged: list[tuple[int, int]] = []
    last = runs[0].end
    for run in runs:
        if run.start > PAGE_BYTES:
            if last.offset >= durable:
                break
            damaged.append((last.offset, run.start))
        kept, error = _intact(read, run.records, durable if verify_payloads else None)
        records += kept
        if error is not None:
            offset = run.records[len(kept)].offset
            return SegmentScan(records, WalkEnd(WalkEndKind.BREAK, offset, error=error), damaged)
        last = run.end
    if last.kind is not WalkEndKind.SEAL and last.offset < durable:
        damaged.append((last.offset, durable))
    return SegmentScan(records, last, damaged)


@dataclass(frozen=True, slots=True)
class _Run:
    start: int
    records: list[RecordHeader]
    end: WalkEnd


def _runs(read: Read, limit: int, store_uuid: bytes, segment_id: int) -> list[_Run]:
    """All runs of records up to the seal or the end of the range; the first starts at the first page, even when it is empty."""
    runs: list[_Run] = []
    start: int | None = PAGE_BYTES
    while start is not None:
        walk = walk_records(read, start=start, end=limit, store_uuid=store_uuid, segment_id=segment_id)
        records = list(walk)
        ended = walk.end or WalkEnd(WalkEndKind.END, walk.position)
        runs.append(_Run(start, records, ended))
        if ended.kind in (WalkEndKind.SEAL, WalkEndKind.END):
            break
        start = resynchronise(read, start=ended.offset + PAGE_BYTES, end=limit, store_uuid=store_uuid, segment_id=segment_id)
    return runs


def _intact(read: Read, records: list[RecordHeader], durable: int | None) -> tuple[list[RecordHeader], CorruptRecord | None]:
    """The records before the first one behind ``durable`` whose payload fails its checksums, and that failure."""
    for index, header in enumerate(records):
        if durable is None or header.offset + header.record_bytes <= durable:
            continue
        try:
            check_payload(read, header)
        except CorruptRecord as error:
            return records[:index], error
    return records, None
