"""Pass "segment headers and seals": what each segment file is, where its log ends, whether its seal is whole.

The answer for one file is a ``SegmentLook``; it holds no records, so that memory does not grow with the store. ``load_table`` reads
the records of a segment again where a later pass needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...format.errors import CorruptRecord, FormatError, UnsupportedFormat
from ...format.layout import PAGE_BYTES, RecordType, round_up_pages
from ...format.record import RecordHeader
from ...format.seal import SealTable, Trailer
from ...format.walk import SegmentScan, WalkEndKind, find_seal, find_trailer, parse_placed, scan_unsealed
from ..segment_view import table_of
from .check_superblock import FirstPage
from .findings import Finding
from .source import SegmentReader, SegmentRef

SEAL_READ_BYTES = 16 << 10
"""Most seals are smaller: one read fetches trailer, table of contents and record."""


@dataclass(slots=True)
class SegmentLook:
    """One segment with records. ``listed``: its table of contents is good; else its records are found by walking."""

    ref: SegmentRef
    sealed: bool
    listed: bool
    data_end: int
    """End of the log: where the seal stands, or is to stand."""
    durable_bytes: int
    """Everything before this offset was synced."""
    record_count: int = 0
    damaged: list[tuple[int, int]] = field(default_factory=list)
    """Durable ranges (start, stop) without a record, found by walking."""
    bytes_present: int = 0
    """Header page and seal; records are counted when they are walked."""
    bytes_checked: int = 0

    @property
    def log_bytes(self) -> int:
        """From the first record to the end of the log."""
        return self.data_end - PAGE_BYTES

    @property
    def damaged_bytes(self) -> int:
        return sum(stop - start for start, stop in self.damaged)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the segments after this one, the store and its index say about it. Segments are looked at from the newest to the oldest."""

    store_uuid: bytes
    later_committed: bool = False
    """A later segment was cut to its seal. Writes to several segments may be in flight at once, but each one is cut only when
    all before it are durable and sealed: records of a later segment alone, or its seal, do not say so."""
    checkpoint: tuple[int, int] | None = None
    """Segment id and offset: the index knows that the log before this place was durable."""
    live: bool = False

    def was_sealed(self, segment_id: int) -> bool:
        """Whether this segment was durable and sealed once, by what is known of others."""
        return self.later_committed or (self.checkpoint is not None and segment_id < self.checkpoint[0])


@dataclass(slots=True)
class Looked:
    """Result for one file: ``look`` is ``None`` when nothing of it can be used."""

    look: SegmentLook | None = None
    findings: list[Finding] = field(default_factory=list)
    table: SealTable | None = None
    """Its own table of contents, where that is good."""
    unsealed: bool = False
    """Skipped, because a running writer may be filling it."""

    def add(self, problem_id: str, ref: SegmentRef, offset: int | None = None, length: int | None = None, **facts: object) -> None:
        self.findings.append(Finding(problem_id, ref.name, ref.segment_id, offset, length, facts=dict(facts)))


def look_at(reader: SegmentReader, first: FirstPage, around: Surroundings) -> Looked:
    """Judge one segment file. Raises ``DeviceError``."""
    looked = Looked()
    try:
        if not _look_sealed(reader, around, looked):
            if around.live:
                looked.unsealed = True
                return looked
            _look_unsealed(reader, first, around, looked)
    except UnsupportedFormat as error:
        looked.look = None
        looked.add("REC-UNKNOWN", reader.ref, _offset_of(error), error=str(error))
    if looked.look is not None:
        _check_header(first, around, looked)
    return looked


def _offset_of(error: FormatError) -> int:
    """The place that an error of a walk names (``segment ... offset n``); 0 when it names none."""
    place = str(error.where or "").rpartition("offset ")[2].split(" ")[0]
    return int(place) if place.isdigit() else 0


def _check_header(first: FirstPage, around: Surroundings, looked: Looked) -> None:
    ref, look = first.ref, looked.look
    assert look is not None
    look.bytes_present += PAGE_BYTES
    look.bytes_checked += PAGE_BYTES
    error = first.error
    if isinstance(error, UnsupportedFormat):
        looked.add("REC-UNKNOWN", ref, 0, PAGE_BYTES, error=str(error))
        return
    if first.header is not None:
        try:
            first.header.check_place(around.store_uuid, ref.segment_id, where=ref.name)
        except CorruptRecord as wrong:
            error = wrong
    if error is not None:
        looked.add("SEG-HDR-CRC", ref, 0, PAGE_BYTES, error=str(error))


# --- sealed -----------------------------------------------------------------------------------------------------------------


def _look_sealed(reader: SegmentReader, around: Surroundings, looked: Looked) -> bool:
    """Whether the file ends in its own trailer; ``looked`` is filled then."""
    ref = reader.ref
    reader.read_ahead(max(0, ref.size_bytes - SEAL_READ_BYTES), SEAL_READ_BYTES)
    trailer = find_trailer(reader.read, ref.size_bytes, store_uuid=around.store_uuid, segment_id=ref.segment_id)
    if trailer is None:
        return False
    look = looked.look = SegmentLook(ref, sealed=True, listed=True, data_end=trailer.data_end, durable_bytes=ref.size_bytes)
    seal_bytes = ref.size_bytes - trailer.data_end
    look.record_count = trailer.record_count
    look.bytes_present += seal_bytes
    look.bytes_checked += seal_bytes
    try:
        found = find_seal(reader.read, ref.size_bytes, store_uuid=around.store_uuid, segment_id=ref.segment_id)
        looked.table = None if found is None else found[1]
    except CorruptRecord as error:
        look.listed = False
        looked.add("SEG-SEAL-CRC", ref, trailer.data_end, seal_bytes, part="the table of contents", error=str(error))
    try:
        _check_seal_record(reader, trailer, around.store_uuid)
    except CorruptRecord as error:
        looked.add("SEG-SEAL-CRC", ref, trailer.data_end, seal_bytes, part="the seal's record", error=str(error))
    padding = bytes(reader.read(trailer.toc_offset + trailer.toc_bytes, round_up_pages(trailer.toc_bytes) - trailer.toc_bytes))
    if any(padding):
        looked.add("PAY-PAD", ref, trailer.data_end, seal_bytes, count=len(padding) - padding.count(0))
    if not look.listed:
        scan = scan_unsealed(
            reader.read, end=trailer.data_end, store_uuid=around.store_uuid, segment_id=ref.segment_id,
            durable_bytes=trailer.data_end, verify_payloads=False,
        )  # fmt: skip
        look.damaged = scan.damaged
        look.record_count = len(scan.records)
        _add_gaps(scan.damaged, ref, looked, "the table of contents that listed it is damaged as well")
    return True


def _where(ref: SegmentRef, offset: int) -> str:
    return f"segment {ref.segment_id:016x} offset {offset}"


def _check_seal_record(reader: SegmentReader, trailer: Trailer, store_uuid: bytes) -> None:
    offset = trailer.data_end
    header = parse_placed(reader.read(offset, PAGE_BYTES), store_uuid, reader.ref.segment_id, offset)
    expected = (RecordType.SEAL, trailer.toc_bytes, trailer.toc_checksum)
    actual = (header.record_type, header.stored_length, header.raw_checksum)
    if actual != expected:
        raise CorruptRecord("seal", where=_where(reader.ref, offset), expected=expected, actual=actual)


def _add_gaps(damaged: Sequence[tuple[int, int]], ref: SegmentRef, looked: Looked, error: str) -> None:
    for start, stop in damaged:
        looked.add("REC-GAP", ref, start, stop - start, error=error)


# --- not sealed -------------------------------------------------------------------------------------------------------------


def _look_unsealed(reader: SegmentReader, first: FirstPage, around: Surroundings, looked: Looked) -> None:
    ref = reader.ref
    end = reader.data_end()
    cut = was_cut_to_its_seal(first, around)
    scan = scan_unsealed(
        reader.read, end=end, store_uuid=around.store_uuid, segment_id=ref.segment_id,
        durable_bytes=end if cut else _durable_by_checkpoint(ref, around), verify_payloads=not cut,
    )  # fmt: skip
    known = _of_this_place(first, around)
    if not scan.records and scan.end.kind is not WalkEndKind.SEAL and not (known and (scan.damaged or cut)):
        _without_records(reader, first, around, looked, end)
        return
    look = SegmentLook(ref, sealed=False, listed=False, data_end=scan.data_end, durable_bytes=scan.data_end, damaged=scan.damaged)
    looked.look = look
    look.record_count = len(scan.records)
    seal = scan.end.seal
    if seal is not None and seal.offset + seal.record_bytes == ref.size_bytes:
        _trailer_gone(seal, look, looked)
    elif cut:
        expected = f"a seal at its end (it was made with {first.header.segment_bytes} bytes)" if first.header else "more"
        looked.add("SEG-CUT", ref, scan.data_end, None, size=ref.size_bytes, expected=expected)
        look.damaged = [(start, stop) for start, stop in scan.damaged if stop < end]  # the last one is the record that was cut
    else:
        _not_sealed(scan, ref, around, looked)
    look.durable_bytes = look.data_end
    _add_gaps(look.damaged, ref, looked, "no table of contents says what was there")


def was_cut_to_its_seal(first: FirstPage, around: Surroundings) -> bool:
    """Files are preallocated, and truncated only when their seal is durable: so one of another size had a seal."""
    return _of_this_place(first, around) and first.header is not None and 0 < first.ref.size_bytes < first.header.segment_bytes


def _of_this_place(first: FirstPage, around: Surroundings) -> bool:
    header = first.header
    return header is not None and (header.store_uuid, header.segment_id) == (around.store_uuid, first.ref.segment_id)


def _durable_by_checkpoint(ref: SegmentRef, around: Surroundings) -> int:
    if around.checkpoint is None or around.checkpoint[0] != ref.segment_id or around.checkpoint[1] > ref.size_bytes:
        return 0
    return around.checkpoint[1]


def _trailer_gone(seal: RecordHeader, look: SegmentLook, looked: Looked) -> None:
    """The seal's record fits the file exactly: the segment was sealed, and its last page is damaged."""
    look.data_end = seal.offset
    look.bytes_present += seal.record_bytes
    look.bytes_checked += seal.record_bytes
    error = f"the last page is not the trailer that belongs to the seal at {seal.offset}"
    looked.add("SEG-SEAL-CRC", look.ref, seal.offset, seal.record_bytes, part="the trailer", error=error)


def _not_sealed(scan: SegmentScan, ref: SegmentRef, around: Surroundings, looked: Looked) -> None:
    looked.add("SEG-SEAL-MISSING" if around.was_sealed(ref.segment_id) else "SEG-UNSEALED", ref, scan.data_end)
    if scan.end.kind is WalkEndKind.BREAK:
        looked.add("SEG-TAIL-TORN", ref, scan.data_end, error=str(scan.end.error))


def _without_records(reader: SegmentReader, first: FirstPage, around: Surroundings, looked: Looked, end: int) -> None:
    """No record of this place: an unused segment, one of another place, or bytes that mean nothing."""
    ref, header, sealed_once = first.ref, first.header, around.was_sealed(first.ref.segment_id)
    if header is not None and not _of_this_place(first, around):
        _misplaced(header.store_uuid, header.segment_id, first, around, looked)
    elif header is None and first.record_uuid is not None and first.record_uuid != around.store_uuid:
        _misplaced(first.record_uuid, ref.segment_id, first, around, looked)
    elif first.foreign or (sealed_once and not (first.blank and _blank(reader, PAGE_BYTES, end))):
        reason = str(first.error) if first.error is not None else "an intact header is followed by bytes that are no record"
        looked.add("SEG-ALIEN", ref, 0, size=ref.size_bytes, error=reason)
    else:  # a crash explains it where it was not sealed, torn pages included: nothing of it was ever acknowledged
        looked.add("SEG-BLANK" if sealed_once else "SEG-EMPTY", ref, 0, size=ref.size_bytes)


def _misplaced(store_uuid: bytes, segment_id: int, first: FirstPage, around: Surroundings, looked: Looked) -> None:
    expected = f"store {around.store_uuid.hex()} segment {first.ref.segment_id:016x}"
    actual = f"store {store_uuid.hex()} segment {segment_id:016x}"
    looked.add("SEG-HDR-PLACE", first.ref, 0, PAGE_BYTES, expected=expected, actual=actual, store_uuid=store_uuid.hex())


def _blank(reader: SegmentReader, start: int, end: int) -> bool:
    step = 1 << 20
    return not any(any(bytes(reader.read(offset, min(step, end - offset)))) for offset in range(start, end, step))


# --- for later passes -------------------------------------------------------------------------------------------------------


def load_table(reader: SegmentReader, look: SegmentLook, store_uuid: bytes) -> SealTable:
    """The records of a segment as a table of contents: its own, or one made of what a walk finds. Raises ``DeviceError``."""
    ref = look.ref
    if look.listed:
        found = find_seal(reader.read, ref.size_bytes, store_uuid=store_uuid, segment_id=ref.segment_id)
        if found is not None:
            return found[1]
    scan = scan_unsealed(
        reader.read, end=look.data_end, store_uuid=store_uuid, segment_id=ref.segment_id, durable_bytes=look.data_end, verify_payloads=False
    )
    return table_of(scan.records)
