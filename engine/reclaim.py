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

from ..format.errors import DeviceError, NoSpace
from ..format.layout import segment_name
from ..format.segment import SegmentHeader
from ..gds.monitor import Monitor
from .capacity import Budget, segment_bytes_for
from .catalog import Catalog
from .commit import CommitThread
from .config import Clock, StoreConfig
from .eviction import COMMIT_WAIT_S, Evictor
from .health import Health
from .housekeeping import Housekeeping
from .index import IndexWriteError
from .reinsertion import WriterRoom
from .segment_writer import OpenSegment
from .segments import Segment, SegmentTable
from .stats import Counters
from .usage import UsageTable

logger = logging.getLogger("kvlode")

SPARE_NAME = "spare.new"
IDLE_S = 1.0
LEAVING_S = 0.05
REMOVAL_PAUSE_S = 0.1
"""Between the removals of two files while there is room."""
FREE_AGAIN_S = 600.0
"""Between two segments that are freed for a full file system although the last one gave it no room."""
FOLLOWED_AHEAD = 8
"""While others follow, one part in this many of the capacity is freed ahead of the writer."""


class Keeper:
    """See the module. ``open_next`` is called by the writer thread, the rest by the store."""

    def __init__(
        self,
        config: StoreConfig,
        clock: Clock,
        segments: SegmentTable,
        catalog: Catalog,
        commit: CommitThread,
        counters: Counters,
        health: Health,
        evictor: Evictor,
        housekeeping: Housekeeping,
        usage: UsageTable,
        budget: Budget,
        *,
        store_uuid: bytes,
        epoch: int,
        next_segment_id: int,
        followers_present: Callable[[], bool],
        quarantine_bytes: Callable[[], int],
        on_index_damaged: Callable[[], None],
        on_filled: Callable[[], None],
    ) -> None:
        self._config = config
        self._clock = clock
        self._segments = segments
        self._catalog = catalog
        self._commit = commit
        self._counters = counters
        self._health = health
        self._evictor = evictor
        self.housekeeping = housekeeping
        self._usage = usage
        self.budget = budget
        self._store_uuid = store_uuid
        self._epoch = epoch
        self._next_segment_id = next_segment_id
        self._followers_present = followers_present
        self._quarantine_bytes = quarantine_bytes
        self._on_index_damaged = on_index_damaged
        self._on_filled = on_filled
        self._index_marked = False
        self._changed = Monitor()
        self._lock = self._changed.lock
        self._writer_room = WriterRoom(self._changed, self._writer_starves, self._out_of_room)
        self._spare_bytes = 0
        self._block_bytes_max = 0
        self._bytes_wanted = 0
        self._writer_waits = False
        self._no_space = False
        self._free_bytes_before, self._free_again_at_s = -1, 0.0
        self._next_removal_s = 0.0
        self.starved = False
        self._poked = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kvlode-keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float | None) -> bool:
        """End the thread and remove the spare segment."""
        with self._lock:
            self._stopping = True
            self._changed.notify_all()
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
        with self._lock:
            self._block_bytes_max = max(self._block_bytes_max, block_bytes_max)

    def reconfigure(self, config: StoreConfig, budget: Budget) -> None:
        """Go on with other options; a smaller capacity is reached by freeing segments, in the background."""
        with self._lock:
            self._config, self.budget = config, budget
        self.housekeeping.limits = config.limits
        self.poke()

    def poke(self) -> None:
        """Something changed that may give or need room."""
        with self._lock:
            self._poked = True
            self._changed.notify_all()

    def used_bytes(self) -> int:
        """Bytes of segments (open, spare and freed ones that still have their file)."""
        return self._segments.total_bytes() + self._spare_bytes

    # --- for the writer -----------------------------------------------------------------------------------------

    def open_next(self, size_bytes_min: int, deadline_s: float) -> OpenSegment | None:
        """The next segment, named and opened; ``None`` when no room could be made before the deadline (monotonic seconds)."""
        with self._lock:
            self._bytes_wanted = max(self._bytes_wanted, size_bytes_min)
            self._writer_waits = True
            self._no_space, self._poked = False, True
            self._changed.notify_all()
        ready = lambda: self._spare_bytes >= size_bytes_min or self._no_space or self._thread_gone()  # noqa: E731
        self._changed.wait_for(ready, max(0.0, deadline_s - time.monotonic()))
        with self._lock:
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
            self._changed.notify_all()
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
            with self._lock:
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
            except IndexWriteError as error:  # it is opened anew in a moment: a waiting writer goes on waiting
                logger.info("reclaim waits for the index: %s", error)
            except Exception as error:  # the thread must outlive every error: without it the writer would starve
                self._counters.add("reclaim_errors")
                logger.warning("reclaim: %s", error)
                self._give_up()
            self._changed.wait_for(lambda: self._poked or self._stopping, pause_s)

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
        if not self._spare_bytes:
            return self._provide_spare()
        if self._coming_bytes() < self._ahead_bytes() and self._free_one():
            return True
        return self.housekeeping.count_one() or (self._catalog.opening is not None and self.housekeeping.trim_one())

    def _provide_spare(self) -> bool:
        """Make the spare segment, after freeing the oldest when only the reserve is left (see ``_reinsert``)."""
        needed_bytes = self._needed_bytes()
        if self._coming_bytes() < 2 * needed_bytes:
            if self._free_one():
                return True
            if self._catalog.opening is None:  # the reserve is for the copies that are made once the index can be read again
                self._give_up()
                return False
        if self._room_bytes() >= needed_bytes and self._make_spare(needed_bytes):
            return True
        wanted = self._writer_waits or self.starved
        full = wanted and self._room_bytes() >= needed_bytes and not self._leaving()
        if full and self._freeing_helps() and self._free_one():
            return True  # the file system is full although the capacity is not used up: blocks that are being put are worth a segment
        self._give_up()
        return False

    def _freeing_helps(self) -> bool:
        """Whether the last segment that was freed for a full file system gave it room. Where others take it, the whole cache
        would go in vain, a segment at a time: then it is tried again only after a while, for they may have stopped."""
        free_bytes, now_s = self._segments.device.free_bytes(self._segments.folder), self._clock.monotonic_s()
        if free_bytes <= self._free_bytes_before and now_s < self._free_again_at_s:
            return False
        self._free_bytes_before, self._free_again_at_s = free_bytes, now_s + FREE_AGAIN_S
        return True

    def _needed_bytes(self) -> int:
        """Size of the next segment."""
        return max(segment_bytes_for(self._config, self.budget, self._block_bytes_max), self._bytes_wanted)

    def _room_bytes(self) -> int:
        """Room for one more segment, after the index has taken in what the open one and that one will hold."""
        allowance = self.budget.for_segments(self._catalog.index.size_bytes(), self._quarantine_bytes())
        filling_bytes = sum(segment.size_bytes for segment in self._segments.all() if not segment.sealed)
        growth_bytes = self.budget.index_growth_bytes(filling_bytes + (self._spare_bytes or self._needed_bytes()))
        room_bytes = allowance - growth_bytes - self.used_bytes()
        kept_bytes = self._config.min_free_disk_bytes
        return min(room_bytes, self._segments.device.free_bytes(self._segments.folder) - kept_bytes) if kept_bytes else room_bytes

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
        with self._lock:
            self._no_space = True
            self._changed.notify_all()

    def _make_spare(self, size_bytes: int) -> bool:
        """False when the file system has no room for it."""
        device = self._segments.device
        if device.status(self._spare_path()) is not None:
            device.remove(self._spare_path())  # of an attempt that failed half-way: its name would be taken for ever
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
        with self._lock:
            self._spare_bytes = size_bytes
            self._free_bytes_before = -1
            self.starved = False
            self._changed.notify_all()
        return True

    def _discard_spare(self) -> None:
        with self._lock:
            self._spare_bytes = 0
        self._segments.device.remove(self._spare_path())

    def _remove_one(self) -> bool:
        """Remove the file of a freed segment; also while the index refuses changes, for the file may be the room that it waits for."""
        grace_s = self._config.reclaim_grace_s if self._followers_present() else 0.0
        if time.monotonic() < self._next_removal_s and self._room_bytes() >= self._needed_bytes() + self._ahead_bytes():
            return False  # nobody needs the room now: a drive that discards a gigabyte answers nobody meanwhile
        segment_id = self._segments.claim_removable(self._clock.monotonic_s(), grace_s)
        if segment_id is None:
            return False
        self._commit.call(self._commit.sync_index).result(COMMIT_WAIT_S)
        self._segments.remove(segment_id)
        self._next_removal_s = time.monotonic() + REMOVAL_PAUSE_S
        self._counters.add("segments_freed")
        return True

    # --- freeing a segment --------------------------------------------------------------------------------------

    def _free_one(self) -> bool:
        """Start freeing the sealed segment that the policy chooses; False when there is none, or the index tells nothing."""
        if self._catalog.opening is None:
            return False
        sealed = [s for s in self._segments.all() if s.sealed and s.retired_at_s is None]
        if not sealed:
            return False
        self._on_filled()
        victim = self.housekeeping.choose_victim(sealed)
        any_order = victim is not sealed[0]
        reason = "room for the next segment" if self._room_bytes() < self._needed_bytes() else "room ahead of the writer"
        began_s, copied_before = time.perf_counter(), self._counters.get("reinserted_blocks")
        dropped = self._evictor.empty(victim, self._writer_room)
        self._counters.latency.observe("reclaim_segment", time.perf_counter() - began_s)
        self._segments.retire(victim.segment_id, self._clock.monotonic_s(), any_order=any_order)
        self._usage.forget_segment(victim.segment_id)
        self._counters.add_many({"evicted_blocks": dropped, "segments_retired": 1})
        self._counters.decisions.note(
            "segment_freed",
            reason,
            policy=self._evictor.policy.name,
            segment=segment_name(victim.segment_id),
            size_bytes=victim.size_bytes,
            evicted_blocks=dropped,
            carried_forward_blocks=self._counters.get("reinserted_blocks") - copied_before,
            age_s=self._evictor.age_s,
        )
        return True

    def _writer_starves(self) -> bool:
        """Whether the writer waits for a segment and there is none."""
        return self._writer_waits and not self._spare_bytes

    def _out_of_room(self) -> bool:
        """Asked while copies wait for the writer. A writer that waits for a segment itself gets one made of the reserve."""
        if self._health.failure is not None:
            return True
        if not self._writer_starves():
            return False
        return self._room_bytes() < self._needed_bytes() or not self._make_spare(self._needed_bytes())
