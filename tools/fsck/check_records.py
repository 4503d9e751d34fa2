"""Passes "record walk" and "payloads": every record of a segment where its table of contents says it is, and as it says.

Segments are read from the newest to the oldest: a tombstone never lies in an earlier segment than what it kills, so whether zeros are
a purge or damage is known when they are met.
"""

from __future__ import annotations

import collections
import contextlib
import queue
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ...format.errors import CorruptRecord, DeviceError, UnsupportedFormat
from ...format.layout import PAGE_BYTES, RecordType
from ...format.record import RecordHeader
from ...format.seal import COLUMN_TABLE, COLUMNS, SealTable
from ...format.stripe import stripe_offsets
from ...format.walk import parse_placed
from ...gds.buffers import SlotPool
from ...gds.threads import WorkerPool
from .check_payloads import RUN_BYTES, BlockCheck, StripeRun, check_descriptor
from .check_segments import SegmentLook
from .findings import Coverage, Finding
from .kills import Kills
from .options import Progress, Stop
from .source import SegmentReader, SegmentRef
from .stream import WINDOWS_AHEAD, ByteStream, extents

_ZEROS = "a page of zeros"


class SegmentRecords:
    """The rows of one segment as the passes want them."""

    def __init__(self, look: SegmentLook, table: SealTable, store_uuid: bytes) -> None:
        self.look = look
        self.ref: SegmentRef = look.ref
        self.table = table
        self.store_uuid = store_uuid
        self.offsets: list[int] = (table.page.astype(np.int64) * PAGE_BYTES).tolist()
        self.lengths: list[int] = (table.record_pages.astype(np.int64) * PAGE_BYTES).tolist()
        rows = np.zeros(len(table), dtype=list(COLUMNS))
        for name, _ in COLUMNS:
            rows[name] = getattr(table, name)
        self._rows = rows.tobytes()

    def __len__(self) -> int:
        return len(self.offsets)

    def ident(self, row: int) -> bytes:
        return bytes(self.table.namespace[row]) + self.table.key(row)

    def finding(self, problem_id: str, row: int, **facts: Any) -> Finding:
        """A finding about the record of a row."""
        place = (self.ref.name, self.ref.segment_id, self.offsets[row], self.lengths[row])
        ident = self.ident(row) if self.table.type[row] == RecordType.BLOCK else None
        return Finding(problem_id, *place, ident=ident, facts=facts)

    def check_header(self, row: int, page: memoryview | bytes) -> tuple[RecordHeader | None, Finding | None]:
        """The header in a page that was read at a row's offset, and what is wrong with it."""
        offset = self.offsets[row]
        try:
            if len(page) < PAGE_BYTES:
                raise CorruptRecord("record-truncated", expected=f"{PAGE_BYTES} bytes", actual=len(page))
            header = parse_placed(page, self.store_uuid, self.ref.segment_id, offset)
        except UnsupportedFormat as error:
            return None, self.finding("REC-UNKNOWN", row, error=str(error))
        except CorruptRecord as error:
            return None, self.damaged_header(row, str(error) if any(page) else _ZEROS)
        return header, self._compare(row, header)

    def damaged_header(self, row: int, error: str) -> Finding:
        kind = int(self.table.type[row])
        name = RecordType(kind).name.lower().replace("_", " ") if kind in set(RecordType) else f"record of type {kind}"
        facts = {"type": name, "key": self.table.key(row).hex(), "namespace": bytes(self.table.namespace[row]).hex(), "error": error}
        return self.finding("REC-HDR-CRC", row, **facts)

    def _compare(self, row: int, header: RecordHeader) -> Finding | None:
        """Table against record: one comparison of packed rows, and the columns one by one only where they differ."""
        values = row_values(header)
        size = COLUMN_TABLE.size_bytes
        if self._rows[row * size : (row + 1) * size] == COLUMN_TABLE.struct.pack(*values) and self.table.key(row) == header.key:
            return None
        for (name, _), value in zip(COLUMNS, values, strict=True):
            listed = getattr(self.table, name)[row]
            plain = bytes(listed) if isinstance(value, bytes) else int(listed)
            if plain != value:
                return self.finding("SEG-SEAL-MISMATCH", row, what=name, expected=_text(plain), actual=_text(value))
        return self.finding("SEG-SEAL-MISMATCH", row, what="key", expected=self.table.key(row).hex(), actual=header.key.hex())


def row_values(header: RecordHeader) -> tuple[Any, ...]:
    """What the table of contents says of a record, in the order of its columns."""
    by_name = {"type": header.record_type, "key_length": len(header.key), "page": header.offset // PAGE_BYTES}
    return tuple(by_name[name] if name in by_name else getattr(header, name) for name, _ in COLUMNS)


def _text(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def undescribed_namespaces(records: SegmentRecords) -> list[Finding]:
    """Namespaces of blocks that no namespace record of the segment describes."""
    table = records.table
    blocks = table.namespace[table.type == RecordType.BLOCK]
    described = set(table.namespace[table.type == RecordType.NAMESPACE].tolist())
    found: list[Finding] = []
    for digest in sorted(set(blocks.tolist()) - described):
        rows = np.flatnonzero((table.type == RecordType.BLOCK) & (table.namespace == np.void(digest)))
        found.append(records.finding("REC-NS-MISSING", int(rows[0]), count=len(rows), namespace=digest.hex()))
    return found


class SegmentReading:
    """The bytes of a segment's records on their way: the first of them are asked for at once. For one thread."""

    def __init__(self, reader: SegmentReader, records: SegmentRecords, slots: SlotPool, on_error: Callable[[DeviceError], None]) -> None:
        self.records = records
        self.stops = [offset + length for offset, length in zip(records.offsets, records.lengths, strict=True)]
        self._runs = collections.deque(extents(records.offsets, self.stops))
        self._open: Callable[[int, int], ByteStream] = lambda start, stop: ByteStream(reader.file, start, stop, slots, on_error)
        self._first = self._open(*self._runs[0][2:]) if self._runs else None
        if self._first is not None:
            self._first.prefetch(WINDOWS_AHEAD)

    def runs(self) -> Iterator[tuple[int, int, ByteStream]]:
        """First row, row behind the last, and the stream of each run of neighbouring records; once."""
        while self._runs:
            first, last, start, stop = self._runs.popleft()
            stream = self._first or self._open(start, stop)
            self._first = None
            with contextlib.closing(stream):
                yield first, last, stream

    def close(self) -> None:
        """Give the memory back of what was not read."""
        self._runs.clear()
        if self._first is not None:
            self._first.close()
            self._first = None


class RecordPass:
    """Checks the records of segments one after the other, newest first. For one thread."""

    def __init__(
        self,
        coverage: Coverage,
        add: Callable[[Finding], None],
        error: Callable[[str], None],
        progress: Progress,
        stop: Stop,
        kills: Kills | None = None,
    ) -> None:
        self.kills = kills if kills is not None else Kills()
        self._coverage = coverage
        self._add = add
        self._error = error
        self._progress = progress
        self._stop = stop
        self._done: queue.SimpleQueue[BlockCheck] = queue.SimpleQueue()
        self._outstanding = 0

    # --- headers only -------------------------------------------------------------------------------------------------

    def walk(self, reader: SegmentReader, records: SegmentRecords) -> None:
        """Header page of every record."""
        for row, (_, page) in enumerate(reader.gather(records.offsets)):
            self._stop.check()
            if isinstance(page, DeviceError):
                self._error(str(page))
                continue
            header, finding = records.check_header(row, page)
            if finding is not None and not self._purged(records, row, header, page):
                self._add(finding)
            self._coverage.records_checked += 1
            self._coverage.bytes_checked += PAGE_BYTES
            self._progress.advance(PAGE_BYTES, records.ref.name)

    def _purged(self, records: SegmentRecords, row: int, header: RecordHeader | None, page: memoryview | bytes) -> bool:
        """Zeros in the place of a deleted block: what a purge leaves."""
        if header is not None or records.table.type[row] != RecordType.BLOCK or any(page):
            return False
        return self.kills.killed(records.ident(row), int(records.table.version_seq[row]))

    # --- every byte ---------------------------------------------------------------------------------------------------

    def prepare(self, reader: SegmentReader, records: SegmentRecords, slots: SlotPool) -> SegmentReading:
        """Begin to read a segment; ``read`` or ``close`` the answer."""
        return SegmentReading(reader, records, slots, lambda error: self._error(str(error)))

    def read(self, reading: SegmentReading, pool: WorkerPool) -> None:
        """Every byte of every record, in the order in which they lie."""
        records, stops = reading.records, reading.stops
        for first, last, stream in reading.runs():
            try:
                for row in range(first, last):
                    self._stop.check()
                    stream.skip(records.offsets[row] - stream.position)
                    self._read_record(stream, records, row, pool)
                    stream.skip(stops[row] - stream.position)
                    self._progress.advance(records.lengths[row], records.ref.name)
                    self._collect(wait=False)
            finally:
                self._collect(wait=True)

    def _read_record(self, stream: ByteStream, records: SegmentRecords, row: int, pool: WorkerPool) -> None:
        piece = stream.take(PAGE_BYTES)
        page, readable = piece.data.tobytes(), piece.readable
        piece.drop()
        if not readable:
            return
        header, finding = records.check_header(row, page)
        if finding is not None and not self._purged(records, row, header, page):
            self._add(finding)
        if header is None or header.record_bytes != records.lengths[row]:
            self._checked(records.lengths[row])
        elif header.record_type is RecordType.BLOCK:
            self._feed(stream, header, records, pool)
        elif header.record_type is RecordType.NAMESPACE:
            payload = stream.take(header.record_bytes - PAGE_BYTES)
            if payload.readable:
                for found in check_descriptor(header, payload.data, records.ref):
                    self._add(found)
                self._checked(header.record_bytes)
            payload.drop()
        else:
            self._checked(header.record_bytes)

    def _feed(self, stream: ByteStream, header: RecordHeader, records: SegmentRecords, pool: WorkerPool) -> None:
        """Hand the stripes of a block to the pool as they arrive, each with the padding behind it."""
        check = BlockCheck(header, records.ref, pool, self._done.put)
        self._outstanding += 1
        offsets = [*stripe_offsets(header.stripes).tolist(), header.record_bytes - PAGE_BYTES]
        first, count = 0, len(offsets) - 1
        while first < count:
            room = min(RUN_BYTES, stream.whole_bytes())
            last = first + 1
            while last < count and offsets[last + 1] - offsets[first] <= room:
                last += 1
            check.feed(StripeRun(first, offsets[first : last + 1], stream.take(offsets[last] - offsets[first])))
            first = last

    def _collect(self, *, wait: bool) -> None:
        """Take the results of blocks that are done; with ``wait``, of all."""
        while self._outstanding:
            try:
                check = self._done.get(block=wait)
            except queue.Empty:
                return
            self._outstanding -= 1
            if check.failure is not None:
                raise check.failure
            if check.readable:
                self._checked(check.header.record_bytes)
            header = check.header
            purged = check.zeros and self.kills.killed(header.namespace + header.key, header.version_seq)
            for finding in check.findings:
                if not purged:
                    self._add(finding)

    def _checked(self, size_bytes: int) -> None:
        self._coverage.records_checked += 1
        self._coverage.bytes_checked += size_bytes
