"""The keeper thread: a prepared segment for the writer at any time, and room for the one after it.

The store never grows over its capacity: before a segment is made, the oldest ones are freed. Freeing a segment is:
copy forward what the policy keeps, take the other entries out of the index, wait for readers (and, while other
processes follow, for the grace period), unlink, sync the folder.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from ..format.errors import DeviceError, FormatError, KvlodeError, NoSpace
from ..format.keys import key_digest
from ..format.layout import PAGE_BYTES, RecordType, segment_name
from ..format.namespace import Namespace
from ..format.seal import SealTable
from ..format.segment import SegmentHeader
from ..format.walk import find_seal
from ..gds.device import DeviceFile
from .buffer import Buffer, Entry, Kind
from .capacity import Budget, segment_bytes_for
from .catalog import Catalog
from .commit import CommitThread
from .config import Clock, StoreConfig
from .health import Health
from .heat import HeatTable
from .index_entry import IndexEntry
from .namespaces import NamespaceTable
from .policy import Candidate, ReinsertionPolicy
from .reinsertion import CopyForward, Reinsertion, file_reader, load_record
from .segment_writer import OpenSegment
from .segments import Segment, SegmentTable
from .stats import Counters

logger = logging.getLogger("kvlode")

SPARE_NAME = "spare.new"
IDLE_S = 1.0
LEAVING_S = 0.05
REINSERT_WAIT_S = 30.0
FOLLOWED_AHEAD = 8
"""While others follow, one part in this many of the capacity is freed ahead of the writer."""


class Keeper:
    """See the module. ``open_next`` is called by the writer thread, the rest by the store."""

    def __init__(
        self,
        config: StoreConfig,
        clock: Clock,
        segments: SegmentTable,
        buffer: Buffer,
        catalog: Catalog,
        commit: CommitThread,
        heat: HeatTable,
        policy: ReinsertionPolicy,
        counters: Counters,
        health: Health,
        budget: Budget,
        *,
        store_uuid: bytes,
        epoch: int,
        next_segment_id: int,
        namespaces: NamespaceTable,
        pinned: Callable[[bytes], bool],
        followers_present: Callable[[], bool],
        quarantine_bytes: Callable[[], int],
        on_index_damaged: Callable[[], None],
    ) -> None:
        self._config = config
        self._clock = clock
        self._segments = segments
        self._buffer = buffer
        self._catalog = catalog
        self._commit = commit
        self._heat = heat
        self._policy = policy
        self._counters = counters
        self._health = health
        self.budget = budget
        self._store_uuid = store_uuid
        self._epoch = epoch
        self._next_segment_id = next_segment_id
        self._namespaces = namespaces
        self._pinned = pinned
        self._followers_present = followers_present
        self._quarantine_bytes = quarantine_bytes
        self._on_index_damaged = on_index_damaged
        self._index_marked = False
        self._condition = threading.Condition()
        self._spare_bytes = 0
        self._block_bytes_max = 0
        self._bytes_wanted = 0
        self._writer_waits = False
        self._no_space = False
        self.starved = False
        self._poked = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kvlode-keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float | None) -> bool:
        """End the thread and remove the spare segment."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        if self._spare_bytes and self._health.failure is None:
            try:
                self._discard_spare()
            except DeviceError as error:  # the next open removes it
                logger.warning("%s", error)
        return True

    def register_block_bytes(self, block_bytes_max: int) -> None:
        """A namespace with blocks of this size was opened: later segments hold enough of them."""
        with self._condition:
            self._block_bytes_max = max(self._block_bytes_max, block_bytes_max)

    def poke(self) -> None:
        """Something changed that may give or need room."""
        with self._condition:
            self._poked = True
            self._condition.notify_all()

    def used_bytes(self) -> int:
        """Bytes of segments (open, spare and freed ones that still have their file)."""
        return self._segments.total_bytes() + self._spare_bytes

    # --- for the writer -----------------------------------------------------------------------------------------

    def open_next(self, size_bytes_min: int, deadline_s: float) -> OpenSegment | None:
        """The next segment, named and opened; ``None`` when no room could be made before the deadline (monotonic seconds)."""
        with self._condition:
            self._bytes_wanted = max(self._bytes_wanted, size_bytes_min)
            self._writer_waits = True
            self._no_space, self._poked = False, True
            self._condition.notify_all()
            ready = lambda: self._spare_bytes >= size_bytes_min or self._no_space or self._thread_gone()  # noqa: E731
            self._condition.wait_for(ready, max(0.0, deadline_s - time.monotonic()))
            self._writer_waits = False
            if self._spare_bytes < size_bytes_min:
                self.starved = True
                return None
            segment_id, segment_bytes = self._next_segment_id, self._spare_bytes
            self._segments.device.rename(self._spare_path(), self._segments.path(segment_id))
            self._spare_bytes = 0
            self._next_segment_id += 1
            self._segments.add(Segment(segment_id, segment_bytes, sealed=False))
            self._poked = True
            self._condition.notify_all()
        return self._open_segment(segment_id, segment_bytes)

    def _thread_gone(self) -> bool:
        return self._stopping and not self._thread.is_alive()

    def _open_segment(self, segment_id: int, segment_bytes: int) -> OpenSegment:
        header = SegmentHeader(
            store_uuid=self._store_uuid,
            segment_id=segment_id,
            epoch=self._epoch,
            segment_bytes=segment_bytes,
            first_live_segment=self._segments.oldest_live_id(),
            created_at_ns=self._clock.now_ns(),
        )
        return OpenSegment(self._segments.device.open(self._segments.path(segment_id), "write"), header)

    def _spare_path(self) -> str:
        return f"{self._segments.folder}/{SPARE_NAME}"

    # --- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._condition:
                if self._stopping:
                    return
                self._poked = False
            pause_s = IDLE_S
            try:
                if self._step():
                    continue
                # freed segments leave when a grace period or a reader ends, which nobody announces
                if self._leaving():
                    pause_s = LEAVING_S
            except Exception as error:  # the thread must outlive every error: without it the writer would starve
                self._counters.add("reclaim_errors")
                logger.warning("reclaim: %s", error)
                self._give_up()
            with self._condition:
                self._condition.wait_for(lambda: self._poked or self._stopping, pause_s)

    def _step(self) -> bool:
        """Do the most urgent thing; False when there is nothing to do."""
        if self._health.failure is not None:
            self._give_up()
            return False
        if self._catalog.index.damaged() and not self._index_marked:
            self._index_marked = True
            self._on_index_damaged()
        if self._remove_one():
            return True
        if 0 < self._spare_bytes < self._needed_bytes():
            self._discard_spare()
            return True
        if self._spare_bytes:
            return self._coming_bytes() < self._ahead_bytes() and self._free_oldest()
        return self._provide_spare()

    def _provide_spare(self) -> bool:
        """Make the spare segment, after freeing the oldest when only the reserve is left (see ``_reinsert``)."""
        needed_bytes = self._needed_bytes()
        if self._coming_bytes() < 2 * needed_bytes and self._free_oldest():
            return True
        if self._room_bytes() >= needed_bytes and self._make_spare(needed_bytes):
            return True
        if self._room_bytes() >= needed_bytes and not self._leaving() and self._free_oldest():
            return True  # the file system is full although the capacity is not used up
        self._give_up()
        return False

    def _needed_bytes(self) -> int:
        """Size of the next segment."""
        return max(segment_bytes_for(self._config, self.budget, self._block_bytes_max), self._bytes_wanted)

    def _room_bytes(self) -> int:
        allowance = self.budget.for_segments(self._catalog.index.size_bytes(), self._quarantine_bytes())
        return allowance - self.used_bytes()

    def _coming_bytes(self) -> int:
        """Room now and after the files of freed segments are gone."""
        return self._room_bytes() + sum(segment.size_bytes for segment in self._leaving())

    def _leaving(self) -> list[Segment]:
        """Freed segments that still have their file, for readers or followers."""
        return [segment for segment in self._segments.all() if segment.retired_at_s is not None]

    def _ahead_bytes(self) -> int:
        """Room to keep free beside the spare: one segment, as the reserve of reinsertion; more while freed segments have
        to wait for followers before they give their room back."""
        share_bytes = self.budget.capacity_bytes // FOLLOWED_AHEAD if self._followers_present() else 0
        return max(self._needed_bytes(), share_bytes)

    def _give_up(self) -> None:
        """Nothing can be freed now: let a waiting writer refuse its blocks instead of waiting out its deadline."""
        if self._leaving():
            return  # room appears when the grace of a freed segment ends
        with self._condition:
            self._no_space = True
            self._condition.notify_all()

    def _make_spare(self, size_bytes: int) -> bool:
        """False when the file system has no room for it."""
        device = self._segments.device
        try:
            file = device.open(self._spare_path(), "create")
            try:
                file.preallocate(size_bytes)
            finally:
                file.close()
        except NoSpace as error:
            self._counters.add("no_space_errors")
            logger.warning("no room for a segment: %s", error)
            device.remove(self._spare_path())
            return False
        with self._condition:
            self._spare_bytes = size_bytes
            self.starved = False
            self._condition.notify_all()
        return True

    def _discard_spare(self) -> None:
        with self._condition:
            self._spare_bytes = 0
        self._segments.device.remove(self._spare_path())

    def _remove_one(self) -> bool:
        grace_s = self._config.reclaim_grace_s if self._followers_present() else 0.0
        segment_id = self._segments.claim_removable(self._clock.monotonic_s(), grace_s)
        if segment_id is None:
            return False
        self._commit.call(self._commit.sync_index).result(REINSERT_WAIT_S)
        self._segments.remove(segment_id)
        self._counters.add("segments_freed")
        return True

    # --- freeing a segment --------------------------------------------------------------------------------------

    def _free_oldest(self) -> bool:
        """Start freeing the oldest sealed segment; False when there is none."""
        sealed = [s for s in self._segments.all() if s.sealed and s.retired_at_s is None]
        if not sealed:
            return False
        victim = sealed[0]
        table = self._table(victim)
        if table is None:
            places = self._places_by_scan(victim.segment_id)
        else:
            places = self._carry_forward(victim, table)
        dropped = self._commit.call(lambda: self._catalog.drop_if_at(places)).result(REINSERT_WAIT_S)
        self._segments.retire(victim.segment_id, self._clock.monotonic_s())
        self._counters.add_many({"evicted_blocks": dropped, "segments_retired": 1})
        logger.info("freed segment %s: %d blocks evicted", segment_name(victim.segment_id), dropped)
        return True

    def _table(self, victim: Segment) -> SealTable | None:
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

    def _places_by_scan(self, segment_id: int) -> list[tuple[bytes, int, int]]:
        """Entries of a segment whose table is damaged, by going through the whole index."""
        entries = ((ident, IndexEntry.unpack(value)) for ident, value in self._catalog.index.scan() if ident[:16] != bytes(16))
        return [(ident, segment_id, entry.offset) for ident, entry in entries if entry.segment_id == segment_id]

    def _carry_forward(self, victim: Segment, table: SealTable) -> list[tuple[bytes, int, int]]:
        """Reinsert what the policy keeps; returns the places of all blocks of the victim."""
        self._learn_namespaces(victim, table)
        rows = [i for i in range(len(table)) if table.type[i] == RecordType.BLOCK]
        idents = [bytes(table.namespace[i]) + table.key(i) for i in rows]
        places = [(ident, victim.segment_id, int(table.page[i]) * PAGE_BYTES) for i, ident in zip(rows, idents, strict=True)]
        live = self._live(places)
        candidates = [self._candidate(table, i, ident) for i, ident in zip(rows, idents, strict=True) if ident in live]
        chosen = self._policy.choose(candidates, victim.size_bytes)
        chosen = [candidate for candidate in chosen if self._namespaces.get(candidate.ident[:16]) is not None]
        if chosen:
            self._reinsert(victim, table, chosen)
        return places

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

    def _live(self, places: list[tuple[bytes, int, int]]) -> set[bytes]:
        now_ns = self._clock.now_ns()
        live = set()
        entries = self._catalog.find([ident for ident, _, _ in places])
        for (ident, segment_id, offset), entry in zip(places, entries, strict=True):
            if entry is None or (entry.segment_id, entry.offset) != (segment_id, offset):
                continue
            if entry.expires_at_ns == 0 or now_ns < entry.expires_at_ns:
                live.add(ident)
        return live

    def _candidate(self, table: SealTable, row: int, ident: bytes) -> Candidate:
        slot = self._heat.slot(ident[:16], key_digest(ident[16:]))
        return Candidate(row, ident, int(table.stored_length[row]), self._heat.count(slot), self._pinned(ident))

    def _reinsert(self, victim: Segment, table: SealTable, chosen: list[Candidate]) -> None:
        """Copy blocks forward through the writer and wait until they are indexed at their new place.

        A writer that waits for a segment meanwhile gets one made of the reserve, and places these copies first. When even that
        is used up, what is not placed yet is called off: the writer waits for this segment's room.
        """
        group = CopyForward()
        with self._segments.reading(victim.segment_id) as file:
            if file is None:
                return
            for candidate in chosen:
                self._copy_forward(group, victim, file, int(table.page[candidate.position]) * PAGE_BYTES)
        deadline_s = time.monotonic() + REINSERT_WAIT_S
        while not group.wait(LEAVING_S):
            failed = self._health.failure is not None or time.monotonic() >= deadline_s
            if failed or (self._writer_waits and not self._spare_bytes and not self._use_reserve()):
                group.called_off = True
                self._counters.add("reinsertions_called_off")
                break

    def _use_reserve(self) -> bool:
        return self._room_bytes() >= self._needed_bytes() and self._make_spare(self._needed_bytes())

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
        entry.on_settled = group.settled
        entry.reinsertion = Reinsertion(header, payload, self._wanted(group, entry.ident, victim.segment_id, offset))
        group.add()
        self._heat.halve(self._heat.slot(header.namespace, key_digest(header.key)))
        self._buffer.enqueue_reinsertion(entry)

    def _wanted(self, group: CopyForward, ident: bytes, segment_id: int, offset: int) -> Callable[[], bool]:
        """Asked by the writer right before it places the copy: no change of the key is pending and the index still points here.

        This keeps a tombstone from ever lying in an earlier segment than a record it kills.
        """

        def still_wanted() -> bool:
            if group.called_off or self._buffer.changing(ident):
                return False
            entry = self._catalog.find([ident])[0]
            return entry is not None and (entry.segment_id, entry.offset) == (segment_id, offset)

        return still_wanted
