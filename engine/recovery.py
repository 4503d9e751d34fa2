"""Opening after a crash: seal what was torn, tell the index what it missed, choose the next epoch.

What the index knows is bounded by its checkpoint, so only the log after that place is read (at most two segments while
the writer keeps up). Without a usable index the same code reads all segments, mostly their seals.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..format.errors import CorruptRecord, DeviceError, FormatError
from ..format.layout import PAGE_BYTES, RecordType, parse_segment_name, segment_name
from ..format.record import RecordHeader
from ..format.seal import SealBuilder, SealTable, Trailer
from ..format.segment import SegmentHeader
from ..format.walk import SegmentScan, find_seal, scan_unsealed
from ..gds.buffers import aligned_array
from ..gds.device import Device, DeviceFile, OpenMode
from .catalog import Catalog, Checkpoint
from .forward_clock import ForwardClock
from .index import IndexDamaged
from .index_entry import pack_table
from .reinsertion import file_reader, scan_reader
from .segment_writer import index_entry
from .segments import Segment, SegmentTable
from .stats import Counters

logger = logging.getLogger("kvlode")

CHANGES_PER_APPLY = 4096
SEGMENT_NAME_LENGTH = len(segment_name(0))
EPOCH_SHIFT = 40
_BLOCK, _TOMBSTONE, _NAMESPACE_DROP = int(RecordType.BLOCK), int(RecordType.TOMBSTONE), int(RecordType.NAMESPACE_DROP)
_WHEN_UNREADABLE = "Try again. If the drive has lost this segment, move it out of the store's folder: what is left is served."


@dataclass(slots=True)
class SegmentFile:
    """A segment as found on disk at open. ``header`` is ``None`` when its page is damaged or was never written."""

    segment_id: int
    size_bytes: int
    header: SegmentHeader | None
    table: SealTable | None
    """The table of contents of a sealed segment; loaded only where recovery needs it."""
    sealed: bool
    """Whether it was, its seal may be damaged since."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """Where writing goes on."""

    epoch: int
    next_segment_id: int
    records_scanned: int


Changes = dict[bytes, bytes | None]


def list_segments(device: Device, folder: str, store_uuid: bytes) -> list[SegmentFile]:
    """The segments of a store, oldest first. Removes a left-over spare and files that an earlier open had already freed."""
    for name in device.list_folder(folder):
        if name.endswith(".new"):
            device.remove(f"{folder}/{name}")
    live, leftovers = look_at_segments(device, folder, store_uuid)
    for leftover in leftovers:
        logger.info("segment %016x was freed before; its removal had not reached the drive", leftover.segment_id)
        device.remove(f"{folder}/{leftover.segment_id:016x}.seg")
    return live


def look_at_segments(device: Device, folder: str, store_uuid: bytes) -> tuple[list[SegmentFile], list[SegmentFile]]:
    """Live segments and leftovers (SPEC.md part 4.2), each oldest first. Changes nothing."""
    names = {name: segment_id for name in device.list_folder(folder) if (segment_id := parse_segment_name(name)) is not None}
    found = [_look_at(device, f"{folder}/{name}", segment_id, store_uuid) for name, segment_id in names.items()]
    found.sort(key=lambda segment: segment.segment_id)
    first_live = max((s.header.first_live_segment for s in found if s.header is not None), default=0)
    return [s for s in found if s.segment_id >= first_live], [s for s in found if s.segment_id < first_live]


def newest_time_ns(device: Device, folder: str, listing: list[SegmentFile], store_uuid: bytes) -> int:
    """The latest time that sealed segments tell of, 0 for none: when segments were made, and the blocks of the newest were put."""
    times = [found.header.created_at_ns for found in listing if found.header is not None]
    if listing and listing[-1].sealed:
        newest = listing[-1]
        with (
            contextlib.suppress(FormatError),
            contextlib.closing(device.open(f"{folder}/{segment_name(newest.segment_id)}", "read")) as file,
        ):
            sealed = find_seal(file_reader(file), newest.size_bytes, store_uuid=store_uuid, segment_id=newest.segment_id)
            if sealed is not None and len(sealed[1]):
                times.append(int(sealed[1].written_at_ns.max()))
    return max(times, default=0)


def quarantined_ids(device: Device, folder: str) -> list[int]:
    """Ids of the segments that a repair set aside, or kept parts of: names that begin with a segment's. They are never given again."""
    found = (parse_segment_name(name[:SEGMENT_NAME_LENGTH]) for name in device.list_folder(folder))
    return [segment_id for segment_id in found if segment_id is not None]


def _look_at(device: Device, path: str, segment_id: int, store_uuid: bytes) -> SegmentFile:
    file = device.open(path, "read")
    try:
        size_bytes = file.status().size_bytes
        page = aligned_array(PAGE_BYTES)
        count = file.read_now(0, [page])
        header = None
        try:
            header = SegmentHeader.parse(page[:count], where=path)
        except FormatError as error:
            logger.info("%s", error)
        if header is not None and (header.store_uuid, header.segment_id) != (store_uuid, segment_id):
            header = None
        # a file is cut only when its seal is durable: one that was cut and has no seal is damaged, and nothing of it is a torn tail
        cut = header is not None and size_bytes < header.segment_bytes
        return SegmentFile(segment_id, size_bytes, header, None, cut or _has_trailer(file, size_bytes, segment_id, store_uuid))
    finally:
        file.close()


def _has_trailer(file: DeviceFile, size_bytes: int, segment_id: int, store_uuid: bytes) -> bool:
    if size_bytes < 2 * PAGE_BYTES or size_bytes % PAGE_BYTES:
        return False
    page = aligned_array(PAGE_BYTES)
    count = file.read_now(size_bytes - PAGE_BYTES, [page])
    try:
        trailer = Trailer.parse(page[:count], where=file.path)
    except FormatError:
        return False
    return (trailer.store_uuid, trailer.segment_id) == (store_uuid, segment_id)


def recover(
    device: Device,
    segments: SegmentTable,
    catalog: Catalog,
    store_uuid: bytes,
    listing: list[SegmentFile],
    clock: ForwardClock,
    counters: Counters,
    *,
    rebuild: bool = False,
    ids_taken: Iterable[int] = (),
) -> Recovered | None:
    """Bring index and log together. ``None``: the index belongs to another store or is damaged; call again with a fresh one.

    ``ids_taken``: ids of segments that are no longer in the log and are not to be given again.
    """
    checkpoint = None
    if not rebuild:
        try:
            identity = catalog.identity()
            checkpoint = catalog.checkpoint()
            catalog.load_floors()
        except IndexDamaged as error:
            logger.error("%s", error)
            return None
        if (identity is not None and identity != store_uuid) or catalog.index.damaged():
            return None
    changes: Changes = dict([Catalog.identity_change(store_uuid)])
    scanned = 0
    sequence = checkpoint.sequence if checkpoint else 0
    end = checkpoint
    for found in listing:
        tail = _TailScan(device, segments, store_uuid, found, checkpoint, clock, counters)
        for part in tail.changes():
            changes.update(part)
            if len(changes) >= CHANGES_PER_APPLY:
                catalog.change(changes)
                changes = {}
        scanned += tail.records
        sequence = max(sequence, tail.sequence)
        if tail.end_offset and (end is None or found.segment_id >= end.segment_id):
            end = Checkpoint(found.segment_id, tail.end_offset, sequence)
    if end is not None:
        key, value = Catalog.checkpoint_change(end)
        changes[key] = value
    catalog.change(changes)
    catalog.sync()
    catalog.load_floors()
    counters.add("recovered_records", scanned)
    epochs = [found.header.epoch for found in listing if found.header is not None]
    epoch = max([sequence >> EPOCH_SHIFT, *epochs], default=0) + 1
    ids = [*(found.segment_id for found in listing), *([end.segment_id] if end else []), *ids_taken]
    return Recovered(epoch, max(ids, default=0) + 1, scanned)


class _TailScan:
    """What one segment says that the index may not know. Iterate ``changes`` first; the other attributes are set then."""

    def __init__(
        self,
        device: Device,
        segments: SegmentTable,
        store_uuid: bytes,
        found: SegmentFile,
        checkpoint: Checkpoint | None,
        clock: ForwardClock,
        counters: Counters,
    ) -> None:
        self._device = device
        self._segments = segments
        self._store_uuid = store_uuid
        self._found = found
        self._checkpoint = checkpoint
        self._clock = clock
        self._counters = counters
        self.records = 0
        self.sequence = 0
        self.end_offset = 0

    def changes(self) -> Iterator[Changes]:
        """What to apply to the index, in log order.

        Raises ``DeviceError`` when the segment cannot be read or sealed now: to go on without it would bring deleted blocks back,
        and the checkpoint would pass over what was flushed to it.
        """
        found = self._found
        try:
            if not found.sealed:
                yield from self._unsealed()
                return
            self._segments.add(Segment(found.segment_id, found.size_bytes, sealed=True))
            start = self._start_offset()
            if start < found.size_bytes:
                yield from self._sealed(start)
        except DeviceError as error:
            path = self._segments.path(found.segment_id)
            raise type(error)("recovery", path, errno=error.errno, detail=str(error), action=_WHEN_UNREADABLE) from error

    def _start_offset(self) -> int:
        """First byte of this segment that the checkpoint does not cover."""
        checkpoint, segment_id = self._checkpoint, self._found.segment_id
        if checkpoint is None or segment_id > checkpoint.segment_id:
            return 0
        return checkpoint.offset if segment_id == checkpoint.segment_id else self._found.size_bytes

    def _sealed(self, start: int) -> Iterator[Changes]:
        found = self._found
        with self._opened("read") as file:
            table = self._table(file)
            if table is None:
                self._counters.add("damaged_segments")
                self._counters.decisions.note("segment_lost", "its table of contents is damaged", segment=segment_name(found.segment_id))
                scan = self._scan(file, durable_bytes=found.size_bytes)
                yield from self._from_headers([header for header in scan.records if header.offset >= start])
                return
        rows = np.flatnonzero(table.page.astype(np.uint64) * PAGE_BYTES >= start)
        self.records = len(rows)
        if len(rows):
            self.sequence = int(max(table.record_seq[rows].max(), table.version_seq[rows].max()))
        self.end_offset = found.size_bytes
        yield _table_changes(table, rows, found.segment_id)

    def _table(self, file: DeviceFile) -> SealTable | None:
        found = self._found
        try:
            sealed = find_seal(file_reader(file), found.size_bytes, store_uuid=self._store_uuid, segment_id=found.segment_id)
        except CorruptRecord as error:
            logger.error("%s", error)
            return None
        return None if sealed is None else sealed[1]

    def _scan(self, file: DeviceFile, durable_bytes: int) -> SegmentScan:
        found = self._found
        scan = scan_unsealed(
            scan_reader(file),
            end=found.size_bytes - found.size_bytes % PAGE_BYTES,
            store_uuid=self._store_uuid,
            segment_id=found.segment_id,
            durable_bytes=durable_bytes,
        )
        for start, stop in scan.damaged:
            self._counters.add("damaged_ranges")
            facts = {"segment": segment_name(found.segment_id), "start": start, "stop": stop}
            self._counters.decisions.note("segment_lost", "durable bytes hold no record", **facts)
            logger.error("segment %016x: bytes %d to %d were durable and hold no record", found.segment_id, start, stop)
        return scan

    @contextlib.contextmanager
    def _opened(self, mode: OpenMode) -> Iterator[DeviceFile]:
        file = self._device.open(self._segments.path(self._found.segment_id), mode)
        try:
            yield file
        finally:
            file.close()

    # --- segments that a crash left open ----------------------------------------------------------------------------

    def _unsealed(self) -> Iterator[Changes]:
        found = self._found
        with self._opened("write") as file:
            scan = self._scan(file, self._start_offset())
            if not scan.records and not scan.damaged:
                self._device.remove(self._segments.path(found.segment_id))  # never used: its id is not given out again
                return
            size_bytes = self._seal(file, scan) if scan.records else found.size_bytes
        self._segments.add(Segment(found.segment_id, size_bytes, sealed=True))
        self._counters.add("recovered_segments")
        start = self._start_offset()
        yield from self._from_headers([header for header in scan.records if header.offset >= start])
        self.sequence = max([self.sequence, *(max(h.record_seq, h.version_seq) for h in scan.records)])
        self.end_offset = size_bytes

    def _seal(self, file: DeviceFile, scan: SegmentScan) -> int:
        """Write the seal where the log ends, cut the file behind it, make both durable; returns the new size."""
        builder = SealBuilder()
        for header in scan.records:
            builder.add(header)
        last = scan.records[-1]
        self._clock.not_before(max(header.written_at_ns for header in scan.records))
        if self._found.header is None:
            self._write_header(file, scan.records[0])
        file.sync()  # what the scan read may still have been in flight when the writer died
        packed = builder.pack(
            store_uuid=self._store_uuid,
            segment_id=self._found.segment_id,
            epoch=last.epoch,
            offset=scan.data_end,
            record_seq=last.record_seq + 1,
            synced_bytes=scan.data_end,
            written_at_ns=self._clock.now_ns(),
        )
        _write(file, scan.data_end, packed)
        file.sync()  # a file is cut to its seal only when the seal is durable: ``_look_at`` relies on it
        file.truncate(scan.data_end + len(packed))
        file.sync()
        return scan.data_end + len(packed)

    def _write_header(self, file: DeviceFile, first: RecordHeader) -> None:
        """The page was written together with the first records, and alone was lost: a drive may keep any part of what was not synced."""
        found = self._found
        header = SegmentHeader.derived(
            store_uuid=self._store_uuid,
            segment_id=found.segment_id,
            epoch=first.epoch,
            size_bytes=found.size_bytes,
            created_at_ns=first.written_at_ns,
        )
        _write(file, 0, header.pack())

    def _from_headers(self, headers: list[RecordHeader]) -> Iterator[Changes]:
        changes: Changes = {}
        for header in headers:
            _apply(changes, header)
            self.sequence = max(self.sequence, header.record_seq, header.version_seq)
        self.records += len(headers)
        yield changes


def _write(file: DeviceFile, offset: int, data: bytes) -> None:
    area = aligned_array(len(data))
    area[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    file.write(offset, [area[: len(data)]]).result()


def _apply(changes: Changes, header: RecordHeader) -> None:
    """One record's effect on the index, in log order."""
    if header.record_type is RecordType.BLOCK:
        entry = index_entry(header)
        assert entry is not None
        changes[header.namespace + header.key] = entry.pack()
    elif header.record_type is RecordType.TOMBSTONE:
        changes[header.namespace + header.key] = None
    elif header.record_type is RecordType.NAMESPACE_DROP:
        _apply_drop(changes, header.namespace, header.version_seq)


def _apply_drop(changes: Changes, namespace: bytes, floor_seq: int) -> None:
    key, value = Catalog.floor_change(namespace, floor_seq)
    changes[key] = value


def _table_changes(table: SealTable, rows: npt.NDArray[np.intp], segment_id: int) -> Changes:
    """The effect of rows of a table of contents, in log order. Columns are lists: a NumPy scalar a row was most of a rebuild."""
    changes: Changes = {}
    keys, namespaces, numbers = table.keys, table.namespace.tobytes(), rows.tolist()
    for row, kind, value in zip(numbers, table.type[rows].tolist(), pack_table(table, segment_id, rows), strict=True):
        if kind == _BLOCK:
            changes[namespaces[16 * row : 16 * row + 16] + keys[row]] = value
        elif kind == _TOMBSTONE:
            changes[namespaces[16 * row : 16 * row + 16] + keys[row]] = None
        elif kind == _NAMESPACE_DROP:
            _apply_drop(changes, namespaces[16 * row : 16 * row + 16], int(table.version_seq[row]))
    return changes
