"""Passes "segments -> index" and "index -> segments": is every live block found, and does every entry point at a block.

Neither needs memory for each key. The first looks up the rows of one segment after the other and counts how many entries point where
they should. The second counts the entries of each segment in one scan: where both counts are equal nothing dangles, and only
where they differ a second scan names the entries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...format.errors import CorruptRecord, DeviceError, FormatError
from ...format.layout import PAGE_BYTES, RecordType
from ...format.record import RecordHeader
from ...format.walk import check_payload, parse_placed
from .findings import Finding
from .index_view import IndexState, IndexView, Row
from .kills import Kills
from .options import Progress, Stop
from .segment_records import SegmentRecords
from .source import SegmentReader

INDEX_PATH = "index"
LOOKUPS_PER_BATCH = 500
NO_SUCH_SEGMENT = "there is no such segment"
"""What is wrong with an entry whose whole segment is gone; whatever else was in that segment is lost with it."""
_SAME_FIELDS = ("version_seq", "record_seq", "expires_at_ns", "payload_checksum", "raw_length", "stored_length")


@dataclass(frozen=True, slots=True)
class Orphan:
    """A live, sound block without an entry."""

    segment_id: int
    offset: int
    length: int
    ident: bytes
    record_seq: int


@dataclass(slots=True)
class SegmentMatch:
    """What the index knows of one segment."""

    segment_id: int
    entries: int = 0
    """Entries that point at a record of it."""
    first_entry: int | None = None
    """Offset of the first record that has one."""
    orphans: list[Orphan] = field(default_factory=list)


@dataclass(slots=True)
class Lookups:
    """State of the pass "segments -> index"."""

    view: IndexView
    state: IndexState
    kills: Kills
    now_ns: int
    add: Callable[[Finding], None]
    stop: Stop
    live: bool
    behind: int = 0
    """Records behind the checkpoint."""
    live_bytes: int = 0
    """Bytes of records that the index points at."""

    def match(self, reader: SegmentReader, records: SegmentRecords) -> SegmentMatch:
        """Look every block of a segment up. Orphans that are damaged are reported as damage, not as orphans."""
        found = SegmentMatch(records.ref.segment_id)
        covered = self._covered_bytes(records)
        blocks = np.flatnonzero(records.table.type == RecordType.BLOCK).tolist()
        self.behind += sum(offset >= covered for offset in records.offsets)
        for start in range(0, len(blocks), LOOKUPS_PER_BATCH):
            self.stop.check()
            rows = blocks[start : start + LOOKUPS_PER_BATCH]
            idents = [records.ident(row) for row in rows]
            for row, ident, entry in zip(rows, idents, self.view.get_many(idents), strict=True):
                offset, length = records.offsets[row], records.lengths[row]
                if entry is not None and (entry.segment_id, entry.offset) == (found.segment_id, offset):
                    found.entries += 1
                    found.first_entry = offset if found.first_entry is None else found.first_entry
                    self.live_bytes += length
                elif offset >= covered:
                    continue
                if self._match_row(reader, records, row, ident, entry):
                    found.orphans.append(Orphan(found.segment_id, offset, length, ident, int(records.table.record_seq[row])))
        return found

    def _covered_bytes(self, records: SegmentRecords) -> int:
        """The part of a segment that the index must know."""
        checkpoint = self.state.checkpoint
        if checkpoint is None or records.ref.segment_id > checkpoint[0]:
            return 0
        return checkpoint[1] if records.ref.segment_id == checkpoint[0] else 1 << 62

    def _match_row(self, reader: SegmentReader, records: SegmentRecords, row: int, ident: bytes, entry: Row | None) -> bool:
        """Judge one block; True when it is an orphan."""
        table, offset, segment_id = records.table, records.offsets[row], records.ref.segment_id
        if entry is not None and (entry.segment_id, entry.offset) == (segment_id, offset):
            self._compare(records, row, ident, entry)
            return False
        version_seq, record_seq, expires_at_ns = (int(getattr(table, name)[row]) for name in ("version_seq", "record_seq", "expires_at_ns"))
        if self.live or (expires_at_ns and expires_at_ns <= self.now_ns) or self.kills.killed(ident, version_seq):
            return False
        if version_seq < self.state.floors.get(ident[:16], 0):
            return False
        if entry is None:
            return self._sound(reader, records, row)
        if entry.record_seq < record_seq:
            facts = {"key": ident[16:].hex(), "what": "record_seq", "actual": entry.record_seq, "expected": record_seq}
            self.add(Finding("IDX-STALE", INDEX_PATH, segment_id, offset, records.lengths[row], ident, facts))
        return False

    def _compare(self, records: SegmentRecords, row: int, ident: bytes, entry: Row) -> None:
        """An entry and the record that it points to."""
        table = records.table
        place = (INDEX_PATH, records.ref.segment_id, records.offsets[row], records.lengths[row], ident)
        for name in _SAME_FIELDS:
            expected, actual = int(getattr(table, name)[row]), getattr(entry, name)
            if expected != actual:
                facts = {"key": ident[16:].hex(), "what": name, "actual": actual, "expected": expected}
                self.add(Finding("IDX-STALE", *place, facts))
                return
        if self._served_though_deleted(ident, int(table.version_seq[row])):
            self.add(Finding("IDX-DELETED", *place, {"key": ident[16:].hex()}))

    def _served_though_deleted(self, ident: bytes, version_seq: int) -> bool:
        if self.live or version_seq < self.state.floors.get(ident[:16], 0):  # a drop in force is worked off in the background
            return False
        checkpoint = self.state.checkpoint
        known_seq = checkpoint[2] if checkpoint is not None else 0
        return self.kills.killed(ident, version_seq, known_seq)

    def _sound(self, reader: SegmentReader, records: SegmentRecords, row: int) -> bool:
        """Whether an orphan can be read: a damaged block loses its entry when a get meets the damage."""
        try:
            header = parse_placed(
                reader.read(records.offsets[row], PAGE_BYTES), records.store_uuid, records.ref.segment_id, records.offsets[row]
            )
        except FormatError:
            return False  # the walk has reported it
        try:
            check_payload(reader.read, header)
        except CorruptRecord as error:
            self._damaged(records, row, header, error)
            return False
        return True

    def _damaged(self, records: SegmentRecords, row: int, header: RecordHeader, error: CorruptRecord) -> None:
        stripe = str(error.where).rpartition("stripe ")[2]
        facts = {"key": header.key.hex(), "namespace": header.namespace.hex(), "stripe": stripe, "error": str(error)}
        self.add(records.finding("PAY-CRC", row, **facts))


def superseded(orphans: Mapping[bytes, int], records: SegmentRecords) -> set[bytes]:
    """Which of these keys (with the ``record_seq`` of an orphan) have a later record in a segment, in whatever state."""
    table = records.table
    blocks = np.flatnonzero(table.type == RecordType.BLOCK).tolist()
    idents = ((row, records.ident(row)) for row in blocks)
    return {ident for row, ident in idents if ident in orphans and int(table.record_seq[row]) > orphans[ident]}


def report_orphans(matches: Sequence[SegmentMatch], add: Callable[[Finding], None]) -> None:
    """Report orphans, segments in the order of their ids.

    The oldest segments may be on their way out: reclaim takes the entries of one segment after the other out of the index, in the order
    of its records, before it removes the files. It never frees the newest.
    """
    freeing = len(matches) > 1
    for match in sorted(matches, key=lambda one: one.segment_id):
        last = max((orphan.offset for orphan in match.orphans), default=0)
        if freeing and match.orphans and (match.first_entry is None or last < match.first_entry):
            facts = {"count": len(match.orphans)}
            add(Finding("IDX-FREEING", INDEX_PATH, match.segment_id, match.orphans[0].offset, facts=facts))
        else:
            for orphan in match.orphans:
                place = (INDEX_PATH, orphan.segment_id, orphan.offset, orphan.length, orphan.ident)
                add(Finding("IDX-ORPHAN", *place, {"key": orphan.ident[16:].hex()}))
        freeing = freeing and match.entries == 0


def count_entries(view: IndexView, stop: Stop, progress: Progress) -> tuple[Counter[int], list[bytes]]:
    """Entries by segment, and up to a thousand keys whose value has an unknown layout (their number is ``counter[-1]``)."""
    counts: Counter[int] = Counter()
    unknown: list[bytes] = []
    for number, (ident, row) in enumerate(view.scan(), 1):
        if number % LOOKUPS_PER_BATCH == 0:
            stop.check()
            progress.advance(LOOKUPS_PER_BATCH)
        if row is not None:
            counts[row.segment_id] += 1
            continue
        counts[-1] += 1
        if len(unknown) < 1000:
            unknown.append(ident)
    progress.advance(counts.total() % LOOKUPS_PER_BATCH)
    return counts, unknown


def name_dangling(
    view: IndexView, suspects: Container[int], absent: Container[int], missing: Callable[[int, bytes, Row], str | None],
    add: Callable[[Finding], None], stop: Stop,
) -> None:  # fmt: skip
    """Name the entries of ``suspects`` that point at no record of theirs; ``missing`` says what is there instead, if anything is wrong."""
    for number, (ident, row) in enumerate(view.scan()):
        if number % LOOKUPS_PER_BATCH == 0:
            stop.check()
        if row is None or row.segment_id not in suspects:
            continue
        error = NO_SUCH_SEGMENT if row.segment_id in absent else missing(row.segment_id, ident, row)
        if error is not None:
            facts = {"key": ident[16:].hex(), "error": error}
            add(Finding("IDX-DANGLING", INDEX_PATH, row.segment_id, row.offset, ident=ident, facts=facts))


def record_at(reader: SegmentReader, store_uuid: bytes, ident: bytes, row: Row) -> str | None:
    """What lies where an entry points, in words; ``None`` when it is the entry's record. An unreadable page is no evidence."""
    offset = row.offset
    if offset % PAGE_BYTES or not PAGE_BYTES <= offset < reader.ref.size_bytes:
        return f"the file of {reader.ref.size_bytes} bytes holds no record"
    try:
        header = parse_placed(reader.read(offset, PAGE_BYTES), store_uuid, reader.ref.segment_id, offset)
    except FormatError as error:
        return f"no record can be read ({error.what})"
    except DeviceError:
        return None
    if header.record_type is not RecordType.BLOCK or header.namespace + header.key != ident:
        return "another record lies"
    return None
