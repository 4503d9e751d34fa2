"""Which records carry a tag, by the tables of contents of the segments.

The index does not know tags, and has given up records that are still in the log. Segments are read from the oldest to the newest: a
delete never lies in an earlier segment than what it kills, so one pass tells what carries the tag and what of it is deleted already.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ..format.errors import DeviceError, FormatError, KvlodeError
from ..format.layout import PAGE_BYTES, RecordType
from ..format.namespace import Namespace
from ..format.record import RecordHeader
from ..format.walk import find_seal, scan_unsealed
from ..gds.device import DeviceFile
from .namespaces import NamespaceTable
from .reinsertion import file_reader, load_record, scan_reader
from .segments import Segment, SegmentTable

logger = logging.getLogger("kvlode")

PLACES_MAX = 1 << 16
"""Records that are gathered before they are worked off (and the rest of the segment that the last one is in)."""


@dataclass(frozen=True, slots=True)
class TaggedRecord:
    """A block's record with the tag: where it lies and how long it is."""

    ident: bytes
    version_seq: int
    segment_id: int
    offset: int
    size_bytes: int
    """Header page, payload and padding."""


@dataclass(slots=True)
class Found:
    """What one pass has gathered."""

    records: list[TaggedRecord] = field(default_factory=list)
    killed_below: dict[bytes, int] = field(default_factory=dict)
    """Ident, or digest of a dropped namespace -> ``version_seq`` of its latest delete."""
    through_segment: int = -1
    """Everything up to this segment is gathered; deletes are from all segments."""
    unreadable: dict[int, str] = field(default_factory=dict)
    """Segments that could not be read, and why."""
    leaving: list[int] = field(default_factory=list)
    """Segments that were being removed: what counts of them lies in later ones."""

    @property
    def last_gathered(self) -> int:
        """The last segment of which every record is gathered."""
        return max(self.through_segment, self.records[-1].segment_id if self.records else -1)

    def undeleted(self) -> list[bytes]:
        """Idents of which a record is not known to be deleted, each once."""
        below = self.killed_below
        alive = (r.ident for r in self.records if r.version_seq >= max(below.get(r.ident, 0), below.get(r.ident[:16], 0)))
        return list(dict.fromkeys(alive))


class TagScan:
    """Gathers the records of one tag with a ``version_seq`` below ``below_seq``. For one thread."""

    def __init__(
        self, segments: SegmentTable, namespaces: NamespaceTable, store_uuid: bytes, tag: bytes, below_seq: int, check: Callable[[], None]
    ) -> None:
        self._segments = segments
        self._namespaces = namespaces
        self._store_uuid = store_uuid
        self._tag = tag
        self._below_seq = below_seq
        self._check = check

    def gather(self, after_segment: int, deleted: list[tuple[bytes, int]]) -> Found:
        """The records in sealed segments behind ``after_segment``. ``deleted``: ident and ``version_seq`` of deletes in the open one."""
        found = Found(through_segment=after_segment)
        for segment in self._sealed(after_segment):
            self._check()
            with self._segments.reading(segment.segment_id) as file:
                if file is None:
                    found.leaving.append(segment.segment_id)
                    continue
                try:
                    self._add(found, segment, file)
                except (DeviceError, FormatError) as error:
                    logger.error("a purge could not read segment %016x: %s", segment.segment_id, error)
                    found.unreadable[segment.segment_id] = str(error)
            if len(found.records) < PLACES_MAX:
                found.through_segment = segment.segment_id
        for ident, version_seq in deleted:
            found.killed_below[ident] = max(version_seq, found.killed_below.get(ident, 0))
        return found

    def _sealed(self, after_segment: int) -> Iterator[Segment]:
        """Segments that are sealed meanwhile included: copies that reclaim makes lie in later ones than their sources."""
        last = after_segment
        while True:
            later = [s for s in self._segments.all() if s.sealed and s.segment_id > last]
            if not later:
                return
            last = later[0].segment_id
            yield later[0]

    def _add(self, found: Found, segment: Segment, file: DeviceFile) -> None:
        gathers = len(found.records) < PLACES_MAX
        try:
            sealed = find_seal(file_reader(file), segment.size_bytes, store_uuid=self._store_uuid, segment_id=segment.segment_id)
        except FormatError:
            sealed = None
        if sealed is None:
            headers = self._walked(segment, file)
            self._add_headers(found, headers, gathers)
            described = [(h.namespace, h.offset) for h in headers if h.record_type is RecordType.NAMESPACE]
            self._learn_namespaces({record.ident[:16] for record in found.records}, described, segment, file)
            return
        table = sealed[1]
        wanted = (table.type == RecordType.BLOCK) & (table.tag == np.void(self._tag)) & (table.version_seq < np.uint64(self._below_seq))
        rows = np.flatnonzero(wanted).tolist() if gathers else []
        spaces, keys = table.namespace.tolist(), table.keys
        for row in rows:
            offset, size_bytes = int(table.page[row]) * PAGE_BYTES, int(table.record_pages[row]) * PAGE_BYTES
            ident = bytes(spaces[row]) + keys[row]
            found.records.append(TaggedRecord(ident, int(table.version_seq[row]), segment.segment_id, offset, size_bytes))
        notes = np.flatnonzero(table.type == RecordType.NAMESPACE).tolist()
        described = [(bytes(spaces[row]), int(table.page[row]) * PAGE_BYTES) for row in notes]
        self._learn_namespaces({bytes(spaces[row]) for row in rows}, described, segment, file)
        idents = {record.ident for record in found.records}
        for row in np.flatnonzero((table.type == RecordType.TOMBSTONE) | (table.type == RecordType.NAMESPACE_DROP)).tolist():
            ident = bytes(spaces[row]) + keys[row]  # a drop has no key
            if len(ident) == 16 or ident in idents:
                found.killed_below[ident] = max(int(table.version_seq[row]), found.killed_below.get(ident, 0))

    def _walked(self, segment: Segment, file: DeviceFile) -> list[RecordHeader]:
        """The records of a segment whose table is damaged. Zeros in it may be holes of an earlier purge."""
        scan = scan_unsealed(
            scan_reader(file),
            end=segment.size_bytes - segment.size_bytes % PAGE_BYTES,
            store_uuid=self._store_uuid,
            segment_id=segment.segment_id,
            durable_bytes=segment.size_bytes,
            verify_payloads=False,
        )
        return scan.records

    def _add_headers(self, found: Found, headers: list[RecordHeader], gathers: bool) -> None:
        for header in headers:
            ident = header.namespace + header.key
            if header.record_type in (RecordType.TOMBSTONE, RecordType.NAMESPACE_DROP):
                found.killed_below[ident] = max(header.version_seq, found.killed_below.get(ident, 0))
            elif header.record_type is RecordType.BLOCK and header.tag == self._tag and header.version_seq < self._below_seq and gathers:
                place = (header.segment_id, header.offset, header.record_bytes)
                found.records.append(TaggedRecord(ident, header.version_seq, *place))

    def _learn_namespaces(self, digests: set[bytes], described: Iterable[tuple[bytes, int]], segment: Segment, file: DeviceFile) -> None:
        """A delete is written behind a description of its namespace: those that this process never opened describe themselves.

        ``described``: digest of each namespace record of the segment, and where it lies.
        """
        unknown = {digest for digest in digests if self._namespaces.get(digest) is None}
        for digest, offset in described if unknown else ():
            if digest not in unknown:
                continue
            try:
                header, payload = load_record(file, self._store_uuid, segment.segment_id, offset)
                self._namespaces.register(Namespace.parse(bytes(payload[: header.raw_length])))
            except KvlodeError as error:
                logger.warning("a namespace record could not be read: %s", error)
