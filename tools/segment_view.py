"""One segment file as it was found: its header, its records, where they end, and what is damaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..format.errors import CorruptRecord, FormatError
from ..format.layout import PAGE_BYTES, ZERO_DIGEST, Codec, RecordType, segment_name
from ..format.record import RECORD_TABLE, RecordHeader
from ..format.seal import SealBuilder, SealTable, Trailer
from ..format.segment import SegmentHeader
from ..format.walk import Read, SegmentScan, WalkEndKind, find_seal, scan_unsealed, walk_records

_ZEROS_STEP_BYTES = 1 << 20
_SEARCH_PAGES = 1024
"""Pages behind the header that are tried for a record."""
_SHOWN_COLUMNS = ("raw_length", "stored_length", "record_pages", "version_seq", "record_seq", "written_at_ns", "expires_at_ns", "depth")


@dataclass(slots=True)
class SegmentView:
    """See the module. Offsets and lengths in bytes."""

    segment_id: int
    size_bytes: int
    allocated_bytes: int
    data_end: int
    """End of what was ever written; a preallocated file goes on behind it."""
    header: SegmentHeader | None
    sealed: bool
    table: SealTable
    """The records that could be found, as a seal lists them."""
    foreign: bool = False
    """The header names another store, or another id than the file."""
    blank: bool = False
    """It holds nothing although later segments hold records: it was emptied."""
    damaged: list[tuple[int, int]] = field(default_factory=list)
    """Ranges inside the durable part that hold no record."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is normal after a crash, or harmless."""

    @classmethod
    def unreadable(cls, segment_id: int, problem: str) -> SegmentView:
        """A file that is there and cannot be read."""
        return cls(segment_id, 0, 0, 0, None, False, table_of([]), problems=[problem])

    @property
    def log_end(self) -> int:
        """Offset behind the last record."""
        return self.table.data_end

    @property
    def empty(self) -> bool:
        """Nothing was ever written: a crash between making the file and its first record; the next open removes it."""
        return not self.data_end

    @property
    def state(self) -> str:
        """``unreadable``, ``foreign``, ``empty``, ``damaged``, ``sealed`` or ``open``."""
        if self.foreign:
            return "foreign"
        if self.problems:
            return "damaged" if self.size_bytes or self.blank else "unreadable"
        if self.empty:
            return "empty"
        return "sealed" if self.sealed else "open"

    def mark_blank(self) -> None:
        """Later segments were finished. That goes one after the other, so this one, which is ``empty``, had records once."""
        self.blank = True
        self.notes.clear()
        text = f"{segment_name(self.segment_id)} holds no record in {self.size_bytes} bytes, though later segments were finished"
        self.problems.append(f"{text}; its blocks are lost")


def read_segment(read: Read, *, segment_id: int, store_uuid: bytes, size_bytes: int, allocated_bytes: int, data_end: int) -> SegmentView:
    """Read header, seal or records of a segment. Damage becomes ``problems``.

    A file of another store, or under another name, is read as what its own header says it is.
    """
    view = SegmentView(segment_id, size_bytes, allocated_bytes, data_end, None, False, table_of([]))
    if view.empty:
        view.notes.append(f"{segment_name(segment_id)}: nothing was written into it; the next open removes it")
        return view
    try:
        view.header = SegmentHeader.parse(read(0, PAGE_BYTES), where=segment_name(segment_id))
        store_uuid, segment_id = _identity(view, store_uuid, segment_id)
    except FormatError as error:
        view.problems.append(str(error))
    try:
        found = find_seal(read, size_bytes, store_uuid=store_uuid, segment_id=segment_id)
        durable_bytes = 0
        if found is not None:
            view.sealed, view.table = True, found[1]
            return view
    except CorruptRecord as error:  # the trailer is whole, its table is not: all of the file was durable
        view.sealed, durable_bytes = True, size_bytes
        view.problems.append(str(error))
    except FormatError as error:
        view.sealed = True
        view.problems.append(str(error))
        return view
    _scan(view, read, store_uuid, segment_id, durable_bytes)
    return view


def _identity(view: SegmentView, store_uuid: bytes, segment_id: int) -> tuple[bytes, int]:
    """What to read the file as."""
    header = view.header
    if header is None or (header.store_uuid, header.segment_id) == (store_uuid, segment_id):
        return store_uuid, segment_id
    view.foreign = True
    try:
        header.check_place(store_uuid, segment_id, where=segment_name(segment_id))
    except CorruptRecord as error:
        view.problems.append(f"a segment of another store or place: {error}")
    return header.store_uuid, header.segment_id


def _scan(view: SegmentView, read: Read, store_uuid: bytes, segment_id: int, durable_bytes: int) -> None:
    end = view.size_bytes - view.size_bytes % PAGE_BYTES
    if not durable_bytes:
        end = min(end, -(-view.data_end // PAGE_BYTES) * PAGE_BYTES)
    try:
        scan = scan_unsealed(read, end=end, store_uuid=store_uuid, segment_id=segment_id, durable_bytes=durable_bytes)
    except FormatError as error:  # an intact record of a newer format: what stands before it can be read
        view.problems.append(str(error))
        view.table = table_of(_leading_records(read, end, store_uuid, segment_id))
        return
    view.table = table_of(scan.records)
    view.damaged = scan.damaged
    name = segment_name(view.segment_id)
    view.problems += [f"{name}: bytes {start} to {stop} were durable and hold no record" for start, stop in scan.damaged]
    if not view.sealed:
        view.data_end = _written_end(read, view.log_end, view.data_end)
        _note_end(view, scan, name)


def _written_end(read: Read, start: int, end: int) -> int:
    """Offset behind the last page that holds anything but zeros: a copied file has zeros where the original had holes."""
    while end > start:
        first = max(start, end - _ZEROS_STEP_BYTES)
        filled = np.flatnonzero(np.frombuffer(read(first, end - first), dtype=np.uint8))
        if len(filled):
            return first + (int(filled[-1]) // PAGE_BYTES + 1) * PAGE_BYTES
        end = first
    return start


def _note_end(view: SegmentView, scan: SegmentScan, name: str) -> None:
    if scan.end.kind is WalkEndKind.SEAL:
        view.notes.append(f"{name}: a seal begins at {scan.data_end} and its trailer does not end the file; the next open seals again")
    elif scan.data_end < view.data_end:
        view.notes.append(f"{name}: torn tail of {view.data_end - scan.data_end} bytes from {scan.data_end} on; the next open cuts it off")


def _leading_records(read: Read, end: int, store_uuid: bytes, segment_id: int) -> list[RecordHeader]:
    records: list[RecordHeader] = []
    try:
        for header in walk_records(read, start=PAGE_BYTES, end=end, store_uuid=store_uuid, segment_id=segment_id):
            records.append(header)
    except FormatError:
        return records
    return records


def first_record(read: Read) -> RecordHeader | None:
    """The first whole record near the beginning of a segment, of whatever store; what lies elsewhere than it says is part of a payload."""
    for offset in range(PAGE_BYTES, (1 + _SEARCH_PAGES) * PAGE_BYTES, PAGE_BYTES):
        page = bytes(read(offset, PAGE_BYTES))
        if len(page) < PAGE_BYTES:
            return None
        if not page.startswith(RECORD_TABLE.magic):
            continue
        try:
            header = RecordHeader.parse(page)
        except FormatError:
            continue
        if header.offset == offset:
            return header
    return None


def table_of(records: Sequence[RecordHeader]) -> SealTable:
    """The records as the table of contents that a seal would have."""
    builder = SealBuilder()
    for header in records:
        builder.add(header)
    packed = builder.pack(store_uuid=ZERO_DIGEST, segment_id=0, epoch=1, offset=PAGE_BYTES, record_seq=0, synced_bytes=0, written_at_ns=0)
    toc_bytes = Trailer.parse(packed[-PAGE_BYTES:]).toc_bytes
    return SealTable.parse(packed[PAGE_BYTES : PAGE_BYTES + toc_bytes])


def row_facts(table: SealTable, row: int) -> dict[str, Any]:
    """What a list of records shows of one, as plain values."""
    facts: dict[str, Any] = {
        "offset": int(table.page[row]) * PAGE_BYTES,
        "type": type_name(int(table.type[row])),
        "key": table.key(row).hex(),
        "namespace": bytes(table.namespace[row]).hex(),
        "parent": bytes(table.parent[row]).hex(),
        "codec": codec_name(int(table.codec[row])),
    }
    return facts | {name: int(getattr(table, name)[row]) for name in _SHOWN_COLUMNS}


def type_name(record_type: int) -> str:
    """``block``, ``tombstone`` and so on; the number of an unknown type."""
    try:
        return RecordType(record_type).name.lower().replace("_", " ")
    except ValueError:
        return f"type {record_type}"


def codec_name(codec: int) -> str:
    """``raw``, ``zstd``, ``planes+zstd``; the number of an unknown one."""
    try:
        return Codec(codec).name.lower().replace("_", "+")
    except ValueError:
        return f"codec {codec}"
