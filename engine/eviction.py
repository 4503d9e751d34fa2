"""Emptying the segment that is to be freed: copy forward what the policy keeps, take the other blocks out of the index."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from ..format.errors import DeviceError, FormatError, KvlodeError
from ..format.keys import key_digest
from ..format.layout import PAGE_BYTES, ZERO_DIGEST, RecordType
from ..format.namespace import Namespace
from ..format.seal import SealTable
from ..format.walk import find_seal
from ..gds.device import DeviceFile
from .buffer import Buffer
from .catalog import BATCH_ENTRIES_MAX, Catalog
from .commit import CommitThread
from .config import Clock
from .entry import Entry, Kind
from .heat import HeatTable
from .index import IndexWriteError
from .index_entry import IndexEntry
from .namespaces import NamespaceTable
from .pins import PinTable
from .policies.interface import Candidate, ReclaimPolicy
from .reinsertion import CopyForward, Reinsertion, WriterRoom, file_reader, load_record
from .segments import Segment, SegmentTable
from .stats import Counters

logger = logging.getLogger("kvlode")

COMMIT_WAIT_S = 30.0

_DELETES = [int(RecordType.TOMBSTONE), int(RecordType.NAMESPACE_DROP)]

Place: TypeAlias = tuple[bytes, int, int]
"""A block and where its record lies: ident, segment id, offset."""


class Evictor:
    """Used by the keeper thread alone."""

    def __init__(
        self,
        clock: Clock,
        segments: SegmentTable,
        buffer: Buffer,
        catalog: Catalog,
        commit: CommitThread,
        heat: HeatTable,
        policy: ReclaimPolicy,
        counters: Counters,
        namespaces: NamespaceTable,
        *,
        store_uuid: bytes,
        pins: PinTable,
        copy_bytes_max: int,
        beyond_quota: Callable[[bytes], bool],
    ) -> None:
        self._clock = clock
        self._segments = segments
        self._buffer = buffer
        self._catalog = catalog
        self._commit = commit
        self._heat = heat
        self.policy = policy
        self._counters = counters
        self._namespaces = namespaces
        self._store_uuid = store_uuid
        self._pins = pins
        self._copy_bytes_max = copy_bytes_max
        self._beyond_quota = beyond_quota
        self.age_s: float | None = None
        """Since the newest live block of the segment that was emptied last was put."""

    def empty(self, victim: Segment, room: WriterRoom) -> int:
        """No index entry points into the segment afterwards; returns how many blocks were given up.

        Raises ``IndexWriteError`` when the index was opened anew meanwhile, or has to be: blocks that it did not tell of then were
        not carried forward. It can be tried again.
        """
        opening = self._catalog.opening
        table = self.table_of(victim)
        if table is None:
            return self._drop(self._places_by_scan(victim.segment_id), opening)[0]
        self._learn_namespaces(victim, table)
        places = _block_places(table, victim.segment_id)
        dropped = 0
        while places:  # again for the blocks that were pinned meanwhile
            pinned = {ident for ident, _, _ in places.values() if ident in self._pins}
            self._carry_forward(victim, table, places, pinned, room)
            count, kept = self._drop(list(places.values()), opening, considered=pinned)
            dropped += count
            places = {row: place for row, place in places.items() if place in kept}
        return dropped

    def trim(self, segment: Segment, namespace: bytes) -> int:
        """Give up the blocks of one namespace in a segment, but for pinned ones; returns how many. Raises as ``empty`` does."""
        opening = self._catalog.opening
        table = self.table_of(segment)
        if table is None:
            return 0
        places = [place for place in _block_places(table, segment.segment_id).values() if place[0][:16] == namespace]
        return self._drop(places, opening, considered=set())[0]

    def holds_no_deletes(self, segment: Segment) -> bool:
        """Whether a segment may be freed before older ones: what it deletes would come back in an index that is rebuilt."""
        table = self.table_of(segment)
        return table is not None and not np.isin(table.type, _DELETES).any()

    def _drop(self, places: list[Place], opening: int | None, considered: set[bytes] | None = None) -> tuple[int, set[Place]]:
        """Take blocks out of the index that still point there: how many, and which were kept for pins that are not ``considered`` yet."""

        def drop() -> tuple[int, set[Place]]:
            self._check_opening(opening)
            answer = self._drop_now(places, considered)
            self._check_opening(opening)
            return answer

        return self._commit.call(drop).result(COMMIT_WAIT_S)

    def _check_opening(self, opening: int | None) -> None:
        current = self._catalog.opening
        if current is None or current != opening:
            raise IndexWriteError(
                "a segment cannot be freed while the index is opened anew",
                expected=f"opening {opening}",
                actual=current,
                action="Try again.",
            )

    def _drop_now(self, places: list[Place], considered: set[bytes] | None) -> tuple[int, set[Place]]:
        count = 0
        kept: set[Place] = set()
        for start in range(0, len(places), BATCH_ENTRIES_MAX):
            part = places[start : start + BATCH_ENTRIES_MAX]
            with self._pins.held_still():
                if considered is not None:
                    kept.update(place for place in part if place[0] in self._pins and place[0] not in considered)
                dropped = self._catalog.drop_if_at([place for place in part if place not in kept])
            self._buffer.forget_clean(dropped)
            count += len(dropped)
        return count, kept

    def table_of(self, victim: Segment) -> SealTable | None:
        """The victim's table of contents, or ``None`` when it cannot be read."""
        with self._segments.reading(victim.segment_id) as file:
            if file is None:
                return None
            try:
                found = find_seal(file_reader(file), victim.size_bytes, store_uuid=self._store_uuid, segment_id=victim.segment_id)
            except (FormatError, DeviceError) as error:
                logger.warning("%s", error)
                return None
        return None if found is None else found[1]

    def _places_by_scan(self, segment_id: int) -> list[Place]:
        """Entries of a segment whose table is damaged, by going through the whole index."""
        entries = ((ident, IndexEntry.unpack(value)) for ident, value in self._catalog.index.scan() if ident[:16] != bytes(16))
        return [(ident, segment_id, entry.offset) for ident, entry in entries if entry.segment_id == segment_id]

    def _carry_forward(self, victim: Segment, table: SealTable, places: dict[int, Place], pinned: set[bytes], room: WriterRoom) -> None:
        """Reinsert what the policy keeps of the blocks at these rows."""
        live = self._live(list(places.values()))
        candidates = [self._candidate(table, row, place[0], place[0] in pinned) for row, place in places.items() if place[0] in live]
        chosen = self.policy.choose(candidates, victim.size_bytes)
        chosen = [candidate for candidate in chosen if self._namespaces.get(candidate.ident[:16]) is not None]
        kept = {candidate.position for candidate in chosen}
        self._counters.eviction_ages.observe_many(c.age_s for c in candidates if c.position not in kept)
        self.age_s = min((c.age_s for c in candidates), default=None)
        if chosen:
            self._reinsert(victim, table, chosen, room)

    def _learn_namespaces(self, victim: Segment, table: SealTable) -> None:
        """Blocks of namespaces that this process never opened are carried forward too: the segment describes them itself."""
        for row in range(len(table)):
            if table.type[row] != RecordType.NAMESPACE or self._namespaces.get(bytes(table.namespace[row])) is not None:
                continue
            with self._segments.reading(victim.segment_id) as file:
                if file is None:
                    return
                try:
                    header, payload = load_record(file, self._store_uuid, victim.segment_id, int(table.page[row]) * PAGE_BYTES)
                    self._namespaces.register(Namespace.parse(bytes(payload[: header.raw_length])))
                except (KvlodeError, OSError) as error:
                    logger.warning("a namespace record could not be read, its blocks are not carried forward: %s", error)

    def _live(self, places: list[Place]) -> set[bytes]:
        now_ns = self._clock.now_ns()
        live = set()
        entries = self._catalog.find([ident for ident, _, _ in places])
        for (ident, segment_id, offset), entry in zip(places, entries, strict=True):
            if entry is None or (entry.segment_id, entry.offset) != (segment_id, offset):
                continue
            if entry.expires_at_ns == 0 or now_ns < entry.expires_at_ns:
                live.add(ident)
        return live

    def _candidate(self, table: SealTable, row: int, ident: bytes, pinned: bool) -> Candidate:
        heat = self._heat
        slot = heat.slot(ident[:16], key_digest(ident[16:]))
        hits = 0 if self._beyond_quota(ident[:16]) else heat.count(slot)
        now_s, written_at_s = self._clock.now_ns() / 1e9, int(table.written_at_ns[row]) / 1e9
        parent = bytes(table.parent[row])
        return Candidate(
            position=row,
            ident=ident,
            stored_bytes=int(table.stored_length[row]),
            hits=hits,
            pinned=pinned,
            depth=int(table.depth[row]),
            age_s=max(0.0, now_s - written_at_s),
            idle_s=max(0.0, now_s - max(written_at_s, heat.used_at_s(slot))),
            parent_hits=heat.count(heat.slot(ident[:16], parent)) if parent != ZERO_DIGEST else 0,
        )

    def _reinsert(self, victim: Segment, table: SealTable, chosen: list[Candidate], room: WriterRoom) -> None:
        """Copy blocks forward through the writer and wait until they are indexed at their new place.

        A writer that waits for a segment meanwhile gets one made of the reserve, and places these copies first. When even that
        is used up, what is not placed yet is called off: the writer waits for this segment's room. As long as it does not, no more
        than ``copy_bytes_max`` (and one copy) are in memory at once.
        """
        group = CopyForward(room)
        with self._segments.reading(victim.segment_id) as file:
            if file is None:
                return
            for candidate in chosen:
                group.wait_for_turn(self._copy_bytes_max, COMMIT_WAIT_S)
                self._copy_forward(group, victim, file, int(table.page[candidate.position]) * PAGE_BYTES)
        if not group.finish(COMMIT_WAIT_S):
            self._counters.add("reinsertions_called_off")

    def _copy_forward(self, group: CopyForward, victim: Segment, file: DeviceFile, offset: int) -> None:
        try:
            header, payload = load_record(file, self._store_uuid, victim.segment_id, offset)
        except (FormatError, DeviceError) as error:
            self._counters.add("corrupt_reinsertions")
            logger.error("not copied forward: %s", error)
            return
        entry = Entry(Kind.REINSERT, self._namespaces.get(header.namespace), header.key)
        entry.version_seq = header.version_seq
        entry.size_bytes = payload.size
        entry.on_settled = group.add(payload.size)
        entry.reinsertion = Reinsertion(header, payload, self._wanted(group, entry.ident, victim.segment_id, offset))
        self._heat.halve(self._heat.slot(header.namespace, key_digest(header.key)))
        self._buffer.enqueue_reinsertion(entry)

    def _wanted(self, group: CopyForward, ident: bytes, segment_id: int, offset: int) -> Callable[[], bool]:
        """Asked by the writer when it comes to the copy: no change of the key is pending and the index still points here.

        This keeps a tombstone from ever lying in an earlier segment than a record it kills. What is called off, or given up, between
        this answer and the log stays the block of its key (``CommitThread``): a change of the key can only lie behind it.
        """

        def still_wanted() -> bool:
            if group.called_off or self._buffer.changing(ident):
                return False
            entry = self._catalog.find([ident])[0]
            return entry is not None and (entry.segment_id, entry.offset) == (segment_id, offset)

        return still_wanted


def _block_places(table: SealTable, segment_id: int) -> dict[int, Place]:
    """Where the blocks of a segment lie, by row of its table of contents."""
    rows = [i for i in range(len(table)) if table.type[i] == RecordType.BLOCK]
    return {i: (bytes(table.namespace[i]) + table.key(i), segment_id, int(table.page[i]) * PAGE_BYTES) for i in rows}
