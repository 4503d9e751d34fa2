"""Sealing a segment anew: which records the new table of contents lists, and how it is written so that no crash costs a block.

Nothing but the old seal is written over: the new one stands where the log ended, also behind a damaged last record. Three
steps, a sync after each. The seal's record page comes first: it says up to where the segment is durable, so while the table and
the trailer are being replaced a walk still takes a gap for damage and goes on behind it. Then table and trailer. Then the
file is cut behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np

from ...format.errors import CorruptRecord, FormatError
from ...format.layout import EPOCH_MAX, PAGE_BYTES, SEQUENCE_COUNTER_BITS, RecordType, round_up_pages
from ...format.record import RecordHeader
from ...format.seal import TOC_MAGIC, SealBuilder, SealTable, Trailer
from ...format.segment import SegmentHeader
from ...format.walk import Read, SegmentScan, WalkEndKind, check_payload, find_seal, parse_placed, scan_unsealed
from ...gds.buffers import aligned_array
from ...gds.device import DeviceFile

_STEP_BYTES = 4 << 20
_REWRITTEN = (RecordType.TOMBSTONE, RecordType.NAMESPACE_DROP)
"""Records that are their header page alone: a row of the table of contents has all that they say."""


@dataclass(frozen=True, slots=True)
class SegmentPlace:
    """Which segment of which store, and what is known about it from outside of the file."""

    store_uuid: bytes
    segment_id: int
    durable_bytes: int = 0
    """Bytes that were durable for certain, for example because the index knows of them."""
    torn: bool = False
    """Whether nobody ever sealed it: its last write may be torn, and is left behind by the rules of recovery."""


@dataclass(slots=True)
class NewSeal:
    """What is to be written, and what is given up. Made by ``prepare_seal``; nothing has been changed then."""

    seal: bytes
    offset: int
    listed: int
    old_bytes: int
    """Size of the file as it was; from ``offset`` on it is replaced."""
    pages: list[tuple[int, bytes]] = field(default_factory=list)
    """Header pages of deletes that are written anew from the old table, with their offsets."""
    left_out: list[tuple[int, int]] = field(default_factory=list)
    """Offset and length of what the old seal or the walk knew and the new table does not list."""


def reader(file: DeviceFile) -> Read:
    """A blocking read function over a device file, short at its end."""

    def read(offset: int, length: int) -> memoryview:
        start = offset - offset % PAGE_BYTES
        area = aligned_array(-(-(offset + length - start) // PAGE_BYTES) * PAGE_BYTES)
        count = file.read(start, [area]).result()
        return memoryview(area.data)[offset - start : max(offset - start, min(count, offset - start + length))]

    return read


def prepare_seal(read: Read, size_bytes: int, place: SegmentPlace, cut: Collection[int], now_ns: int) -> NewSeal:
    """Decide what the segment's new seal lists. ``cut``: offsets of records to leave out; deletes are kept all the same.

    Raises ``UnsupportedFormat`` where the segment holds records of a newer format.
    """
    trailer, table = _old_seal(read, size_bytes, place)
    new = NewSeal(b"", PAGE_BYTES, 0, size_bytes)
    if table is not None and trailer is not None:
        records = _records_of_table(read, table, place, new)
        new.offset = trailer.data_end
    else:
        records = _records_of_walk(read, size_bytes, place, trailer, new)
    sequence = max((header.record_seq for header in records), default=0)
    gone = {header.offset for header in records if header.offset in cut and header.record_type not in _REWRITTEN}
    new.left_out += [(header.offset, header.record_bytes) for header in records if header.offset in gone]
    listed = [header for header in records if header.offset not in gone]
    builder = SealBuilder()
    for header in listed:
        builder.add(header)
    new.listed = len(listed)
    new.seal = builder.pack(
        store_uuid=place.store_uuid,
        segment_id=place.segment_id,
        epoch=_epoch(read, records, sequence),
        offset=new.offset,
        record_seq=sequence + 1,
        synced_bytes=new.offset,
        written_at_ns=now_ns,
    )
    _check_new(new, place)
    return new


def write_seal(file: DeviceFile, new: NewSeal) -> None:
    """Carry out what was prepared; see the module for the order. May raise ``DeviceError`` anywhere: run the repair again then."""
    file.sync()  # what was read may still have been on its way to the drive when the writer died
    for offset, page in new.pages:
        _write(file, offset, page)
    if new.pages:
        file.sync()
    _write(file, new.offset, new.seal[:PAGE_BYTES])
    file.sync()
    _write(file, new.offset + PAGE_BYTES, new.seal[PAGE_BYTES:])
    file.sync()
    file.truncate(new.offset + len(new.seal))
    file.sync()


def _write(file: DeviceFile, offset: int, content: bytes) -> None:
    area = aligned_array(len(content))
    area[:] = np.frombuffer(content, np.uint8)
    file.write(offset, [area]).result()


# --- what to list ------------------------------------------------------------------------------------------------


def _old_seal(read: Read, size_bytes: int, place: SegmentPlace) -> tuple[Trailer | None, SealTable | None]:
    """Trailer and table as far as they are intact."""
    try:
        found = find_seal(read, size_bytes, store_uuid=place.store_uuid, segment_id=place.segment_id)
    except CorruptRecord:
        return Trailer.parse(read(size_bytes - PAGE_BYTES, PAGE_BYTES)), None
    return (None, None) if found is None else found


def _records_of_table(read: Read, table: SealTable, place: SegmentPlace, new: NewSeal) -> list[RecordHeader]:
    """The records at the table's places, as their own headers say; deletes whose page is damaged as the table says."""
    records = []
    for row in range(len(table)):
        offset = int(table.page[row]) * PAGE_BYTES
        try:
            records.append(parse_placed(read(offset, PAGE_BYTES), place.store_uuid, place.segment_id, offset))
            continue
        except CorruptRecord:
            header = _delete_of_row(table, row, place)
        if header is None:
            new.left_out.append((offset, int(table.record_pages[row]) * PAGE_BYTES))
            continue
        page = bytearray(PAGE_BYTES)
        header.pack_into(page)
        new.pages.append((offset, bytes(page)))
        records.append(header)
    return records


def _delete_of_row(table: SealTable, row: int, place: SegmentPlace) -> RecordHeader | None:
    """The tombstone or namespace drop that a row describes; ``None`` for rows of other records, or that contradict themselves."""
    if int(table.type[row]) not in _REWRITTEN:
        return None
    record_seq = int(table.record_seq[row])
    header = RecordHeader(
        record_type=RecordType(int(table.type[row])),
        store_uuid=place.store_uuid,
        segment_id=place.segment_id,
        offset=int(table.page[row]) * PAGE_BYTES,
        epoch=_epoch_of(record_seq),
        version_seq=int(table.version_seq[row]),
        record_seq=record_seq,
        synced_bytes=0,
        namespace=bytes(table.namespace[row]),
        key=table.key(row),
        tag=bytes(table.tag[row]),
        parent=bytes(table.parent[row]),
        depth=int(table.depth[row]),
        element_size=int(table.element_size[row]),
        written_at_ns=int(table.written_at_ns[row]),
        expires_at_ns=int(table.expires_at_ns[row]),
    )
    return header if header.payload_checksum == int(table.payload_checksum[row]) else None


def _records_of_walk(read: Read, size_bytes: int, place: SegmentPlace, trailer: Trailer | None, new: NewSeal) -> list[RecordHeader]:
    """The records of a segment without a table. In a torn one, what was never acknowledged is left behind, as recovery does."""
    end = size_bytes - size_bytes % PAGE_BYTES

    def scan(durable_bytes: int) -> SegmentScan:
        ids = {"store_uuid": place.store_uuid, "segment_id": place.segment_id}
        return scan_unsealed(read, end=end, durable_bytes=durable_bytes, verify_payloads=place.torn, **ids)  # type: ignore[arg-type]

    if trailer is not None:
        found, new.offset = scan(end), trailer.data_end
        new.left_out += [(start, min(stop, trailer.data_end) - start) for start, stop in found.damaged if start < trailer.data_end]
        return [header for header in found.records if header.offset < trailer.data_end]
    found = scan(place.durable_bytes if place.torn else end)
    records = found.records if place.torn else _acknowledged(read, found.records, place.durable_bytes)
    gaps = [(start, min(stop, end) - start) for start, stop in found.damaged if start < end]
    if found.end.kind is WalkEndKind.SEAL:
        new.offset = found.end.offset
    elif gaps and sum(gaps[-1]) == end:
        new.offset = _old_place(read, gaps.pop()[0], end, new)
    else:
        new.offset = max([found.data_end, *(sum(gap) for gap in gaps[-1:])])
    new.left_out += gaps
    return records


def _old_place(read: Read, start: int, end: int, new: NewSeal) -> int:
    """Where the seal goes when the file ends in bytes that are no record: an old table there shows where it stood; zeros are room."""
    if bytes(read(start + PAGE_BYTES, len(TOC_MAGIC))) == TOC_MAGIC:
        return start
    used = start
    for step in range(start, end, _STEP_BYTES):
        written = np.flatnonzero(np.frombuffer(read(step, min(_STEP_BYTES, end - step)), np.uint8))
        if len(written):
            used = step + round_up_pages(int(written[-1]) + 1)
    if used > start:
        new.left_out.append((start, used - start))
    return used


def _acknowledged(read: Read, records: list[RecordHeader], durable_bytes: int) -> list[RecordHeader]:
    """Without records behind the durable part whose payload did not arrive. Those behind a hole count if they are whole: a block
    that nobody acknowledged may be there or not."""
    durable = max([durable_bytes, *(header.synced_bytes for header in records)])
    return [header for header in records if header.offset + header.record_bytes <= durable or _whole(read, header)]


def _whole(read: Read, header: RecordHeader) -> bool:
    try:
        check_payload(read, header)
    except CorruptRecord:
        return False
    return True


# --- the new seal ----------------------------------------------------------------------------------------------------


def _epoch(read: Callable[[int, int], object], records: list[RecordHeader], sequence: int) -> int:
    """Of the last record; without one, the epoch that the segment was made in."""
    if records:
        return max(header.epoch for header in records)
    try:
        return SegmentHeader.parse(read(0, PAGE_BYTES)).epoch
    except FormatError:
        return _epoch_of(sequence)


def _epoch_of(sequence: int) -> int:
    return min(max(1, sequence >> SEQUENCE_COUNTER_BITS), EPOCH_MAX)


def _check_new(new: NewSeal, place: SegmentPlace) -> None:
    """Read the new seal back before it replaces anything. Raises ``CorruptRecord`` when it would not be accepted."""

    def read(offset: int, length: int) -> bytes:
        return new.seal[offset - new.offset :][:length]

    found = find_seal(read, new.offset + len(new.seal), store_uuid=place.store_uuid, segment_id=place.segment_id)
    if found is None or len(found[1]) != new.listed:
        raise CorruptRecord("new-seal", where=f"segment {place.segment_id:016x}", expected=f"{new.listed} records", actual=found)
