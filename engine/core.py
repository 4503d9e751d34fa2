"""One open store: all parts wired together, started, and stopped in the right order.

Threads (all of them own daemons, ended by ``close``): writer, commit, keeper, lookup, heat, plus the pools for encoding,
reading, decoding, jobs, and the device's I/O. Lock order: keeper, then segments or buffer; nothing is called back under a lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..format.errors import FormatError, StoreClosed
from ..format.keys import key_digest
from ..format.layout import PAGE_BYTES, QUARANTINE_FOLDER, round_up_pages
from ..format.superblock import Superblock
from ..gds.buffers import SlotPool, aligned_array
from ..gds.device import Device, DeviceLock
from ..gds.monitor import Outcome
from ..gds.threads import WorkerPool
from .admission import Admission
from .buffer import Buffer
from .capacity import Budget
from .catalog import Catalog
from .codec_policy import Resources
from .commit import CommitThread
from .config import MIB, Clock, StoreConfig
from .contract import Refusal, Status
from .delivery import ReadRequest
from .drive_rate import resources_now
from .encoder import Encoder
from .entry import Kind
from .eviction import Evictor
from .health import Health
from .heat_file import SharedHeat
from .housekeeping import Housekeeping
from .index_entry import IndexEntry
from .index_open import mark_for_rebuild, read_ahead
from .jobs import ReadJob
from .lookups import LookupCache
from .miss_ratio import DISTANCE_CAPACITIES, MissRatioSampler
from .namespaces import NamespaceTable
from .pins import PinTable
from .policy_choice import admission_policy_of, reclaim_policy_of
from .reader import EXTENT_BYTES_MAX, Reader
from .reclaim import Keeper
from .recovery import Recovered
from .segments import SegmentTable
from .stats import Counters
from .store_stats import stats_file_of
from .usage import UsageTable
from .writer import Sequence as SequenceNumbers
from .writer import Writer

logger = logging.getLogger("kvlode")
Answer = TypeVar("Answer")

JOB_THREADS = 4
STAGING_SLOTS = 4
FOLLOWERS_NAME = "FOLLOWERS"


@dataclass(slots=True)
class Parts:
    """What opening a store has prepared before its threads start."""

    path: str
    config: StoreConfig
    clock: Clock
    device: Device
    superblock: Superblock
    catalog: Catalog
    segments: SegmentTable
    heat: SharedHeat
    counters: Counters
    budget: Budget
    recovered: Recovered | None
    """``None`` for a follower: it never writes."""
    lock: DeviceLock | None
    owns_device: bool
    """Whether closing the store closes the device (a device that was handed in stays open)."""
    catch_up: Callable[[], None] | None = None


class Core:
    """See the module. Its attributes are the parts; ``space`` and ``reading`` work on them."""

    def __init__(self, parts: Parts) -> None:
        self.path, self.config, self.clock, self.device = parts.path, parts.config, parts.clock, parts.device
        self.superblock, self.catalog, self.segments = parts.superblock, parts.catalog, parts.segments
        self.heat, self._shared_heat = parts.heat.table, parts.heat
        self.counters, self.budget, self.lock = parts.counters, parts.budget, parts.lock
        self.follower = parts.recovered is None
        self.health = Health(lambda error: self.counters.decisions.note("writer_stopped", str(error), kind=type(error).__name__))
        self.closed_reason: str | None = None
        self.reconfiguring = threading.Lock()
        self.opened_with = parts.config
        self._catch_up = parts.catch_up
        self._owns_device = parts.owns_device
        self._jobs: set[ReadJob] = set()
        self._jobs_lock = threading.Lock()
        self.namespaces = NamespaceTable(self.config.forced_codec, self._resources)
        recovered = parts.recovered
        self.sequence = SequenceNumbers(recovered.epoch if recovered else 0)
        self.buffer = Buffer(
            aligned_array(self.config.buffer_bytes if not self.follower else MIB),
            serve_clean=self.config.serve_clean,
            next_sequence=self.sequence,
            batch_bytes=self.config.batch_bytes,
        )
        self.usage = UsageTable()
        self.miss_ratio = MissRatioSampler(DISTANCE_CAPACITIES * self.config.capacity_bytes)
        self.admission = Admission(
            admission_policy_of(self.config), self.config.limits, self.usage, self.config.capacity_bytes, self.clock.monotonic_s
        )
        self.pins = PinTable(self.budget.for_segments(0, 0), self._record_bytes)
        self._encode_pool = WorkerPool("kvlode-encode", self.config.encode_threads)
        self._decode_pool = WorkerPool("kvlode-decode", self.config.encode_threads)
        self.read_pool = WorkerPool("kvlode-read", self.config.io_threads)
        self._job_pool = WorkerPool("kvlode-job", JOB_THREADS)
        self._bounce = SlotPool(EXTENT_BYTES_MAX, max(self.config.bounce_bytes, EXTENT_BYTES_MAX), page_lock=True)
        self._staging = SlotPool(self.config.batch_bytes + 2 * MIB, STAGING_SLOTS * (self.config.batch_bytes + 2 * MIB), page_lock=True)
        self.reader = Reader(
            self.device,
            self.segments,
            self.superblock.store_uuid,
            self.read_pool,
            self._decode_pool,
            self._bounce,
            self.counters,
            self.on_useless,
        )
        self.lookups = LookupCache(self._present)
        if recovered is not None:
            self._wire_writer(recovered)
        self.lookups.start()
        self._stats_file = stats_file_of(self) if parts.owns_device else None
        self._shared_heat.start(self._stats_file)
        self._job_pool.submit(read_ahead, self.path)

    def _wire_writer(self, recovered: Recovered) -> None:
        self.commit = CommitThread(self.buffer, self.catalog, self.segments, self.counters, self.health, self.usage)
        self.evictor = Evictor(
            self.clock,
            self.segments,
            self.buffer,
            self.catalog,
            self.commit,
            self.heat,
            reclaim_policy_of(self.config),
            self.counters,
            self.namespaces,
            store_uuid=self.superblock.store_uuid,
            pins=self.pins,
            copy_bytes_max=self.config.batch_bytes,
            beyond_quota=self.admission.beyond_quota,
        )
        self.keeper = Keeper(
            self.config,
            self.clock,
            self.segments,
            self.catalog,
            self.commit,
            self.counters,
            self.health,
            self.evictor,
            Housekeeping(self.segments, self.usage, self.evictor, self.config.limits, self.counters),
            self.usage,
            self.budget,
            store_uuid=self.superblock.store_uuid,
            epoch=recovered.epoch,
            next_segment_id=recovered.next_segment_id,
            followers_present=self._followers_present,
            quarantine_bytes=self._quarantine_bytes,
            on_index_damaged=lambda: mark_for_rebuild(self.path, self.config),
            on_filled=self._on_filled,
        )
        self.writer = Writer(
            self.config,
            self.clock,
            self.buffer,
            Encoder(self._encode_pool),
            self.catalog,
            self.keeper,
            self.commit.submit,
            self._staging,
            self.sequence,
            self.counters,
            self.health,
        )
        self.admission.on_over_quota = self.keeper.poke
        self.commit.start()
        for namespace, floor_seq in self.catalog.floors.items():
            self.commit.purge(namespace, floor_seq)
        self.keeper.start()
        self.writer.start()

    def _on_filled(self) -> None:
        self.admission.filled = True

    # --- answers for the other parts ----------------------------------------------------------------------------

    def _resources(self) -> Resources | None:
        """What encoding can count on; asked by the writer alone."""
        return resources_now(self.config.cpu_budget, self.writer.drive_rate, self.reader.probe.rate())

    def check_usable(self) -> None:
        if self.closed_reason is not None:
            raise StoreClosed(self.closed_reason, where=self.path, action="Open the store again in this process.")

    def refusal(self) -> Refusal | None:
        """Why a put cannot be accepted now, whatever the block; ``None`` when it can."""
        if self.follower:
            return Refusal.READ_ONLY
        if self.health.failure is not None:
            return Refusal.STORE_FAILED
        return Refusal.NO_SPACE if self.keeper.starved else None

    def slot(self, ident: bytes) -> int:
        """The heat slot of a block."""
        return self.heat.slot(ident[:16], key_digest(ident[16:]))

    def digest_slot(self, namespace: bytes, digest: bytes) -> int:
        return self.heat.slot(namespace, digest)

    def live(self, idents: Sequence[bytes]) -> list[bool]:
        """Presence in the index; a follower first catches up with the writer."""
        if self._catch_up is not None:
            self._catch_up()
        return self.catalog.live(idents, self.clock.now_ns())

    def _present(self, idents: Sequence[bytes]) -> list[bool]:
        """For lookups in the background. The buffer comes first: what leaves it is in the index by then, while a MISS of the index for a
        block that is only in the buffer would be remembered beyond the flush."""
        buffered = [entry is not None and entry.kind is Kind.BLOCK for entry in map(self.buffer.entries.get, idents)]
        found = iter(self.live([ident for ident, known in zip(idents, buffered, strict=True) if not known]))
        return [known or next(found) for known in buffered]

    def find(self, idents: Sequence[bytes]) -> list[IndexEntry | None]:
        if self._catch_up is not None:
            self._catch_up()
        return self.catalog.find(idents)

    def _record_bytes(self, idents: Sequence[bytes]) -> list[int]:
        """Bytes of each block in the log, or what it will take there while it is in the buffer alone; 0 for an absent one."""
        sizes = []
        for ident, entry in zip(idents, self.find(idents), strict=True):
            buffered = self.buffer.entries.get(ident) if entry is None else None
            if buffered is not None and buffered.kind is Kind.BLOCK:
                sizes.append(PAGE_BYTES + round_up_pages(buffered.size_bytes))
            else:
                sizes.append(0 if entry is None else entry.record_pages * PAGE_BYTES)
        return sizes

    def _followers_present(self) -> bool:
        lock = self.device.lock(f"{self.path}/{FOLLOWERS_NAME}")
        if lock is None:
            return True
        lock.release()
        return False

    def _quarantine_bytes(self) -> int:
        folder = f"{self.path}/{QUARANTINE_FOLDER}"
        statuses = [self.device.status(f"{folder}/{name}") for name in self.device.list_folder(folder)]
        return sum(status.allocated_bytes for status in statuses if status is not None)

    def forget_entry(self, ident: bytes, entry: IndexEntry, counter: str) -> None:
        """Drop an index entry that turned out to be useless, if it still points at that record."""
        self.counters.add_for(ident[:16], {counter: 1})
        self.counters.decisions.note_block(counter, ident, entry)
        self.lookups.invalidate(ident)
        self.catalog.hide(ident, entry.segment_id, entry.offset)  # whoever asks or puts now must not wait for the commit thread
        if not self.follower:
            self.commit.call(lambda: self.catalog.drop_if_at([(ident, entry.segment_id, entry.offset)]))

    def on_useless(self, request: ReadRequest, error: FormatError | None) -> None:
        """A record is damaged (``error``) or its segment is gone."""
        if error is not None:
            logger.error("block %s is dropped: %s", request.key.hex(), error)
        self.forget_entry(request.namespace + request.key, request.entry, "lost_blocks" if error is None else "corrupt_blocks")

    # --- jobs -------------------------------------------------------------------------------------------------

    def start_job(self, job: ReadJob, work: Callable[[], Any]) -> None:
        """Run a job's work on the job pool; a defect settles the job instead of leaving it without an answer."""
        self._job_pool.run(self._run_job, job, work)
        self.track(job)

    def track(self, job: ReadJob) -> None:  # a close waits for it
        with self._jobs_lock:
            self._jobs = {running for running in self._jobs if not running.done()} | {job}

    def in_background(self, function: Callable[[], Answer]) -> Answer:
        """Call on the job pool and wait: for reads that wait for the device, which the thread of a caller must not (``Monitor``)."""
        outcome: Outcome[Answer] = Outcome()
        self._job_pool.run(outcome.run, function)
        return outcome.result()

    def _run_job(self, job: ReadJob, work: Callable[[], Any]) -> None:
        if job.cancelled:
            return
        try:
            work()
        except Exception as error:
            logger.exception("a read job failed: %s", error)
            job.settle_many(range(count := len(job.statuses)), [Status.IO_ERROR] * count)

    # --- flushing and closing -----------------------------------------------------------------------------------

    def flush(self, timeout_s: float | None) -> bool:
        """Everything accepted before the call is durable. False: too late, or blocks were dropped.

        An index that cannot be synced does not make it False: the log has everything, and the next open reads more of it.
        """
        if self.follower:
            return True
        began_s = time.monotonic()
        deadline_s = None if timeout_s is None else began_s + timeout_s
        if not self.buffer.wait_settled(self.buffer.tickets_queued, timeout_s):
            return False
        if self.health.failure is None:
            try:
                self.commit.call(self.commit.sync_index).result(_remaining(deadline_s))
            except TimeoutError:
                return False
        self.counters.latency.observe("flush", time.monotonic() - began_s)
        return self.buffer.take_dropped() == 0 and self.health.failure is None

    def wipe_memory(self) -> None:
        """Overwrite what earlier writes and reads have left in the memory of their slots."""
        self._staging.wipe()
        self._bounce.wipe()

    def close(self, timeout_s: float | None) -> bool:
        """Stop everything in order. False when the deadline passed: what still runs is left behind, never cut short."""
        self.closed_reason = "the store is closed"
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        done = all(job.wait(_remaining(deadline_s)) for job in list(self._jobs))
        done = self.lookups.stop(_remaining(deadline_s)) and done
        if not self.follower:
            done = self.writer.stop(_remaining(deadline_s)) and done
            self.buffer.close()
            done = self.keeper.stop(_remaining(deadline_s)) and done
            if done:
                self.commit.call(self.commit.sync_index)
            done = self.commit.stop(_remaining(deadline_s)) and done
        for pool in (self._job_pool, self.read_pool, self._decode_pool, self._encode_pool):
            done = pool.shutdown(_remaining(deadline_s)) and done
        done = self._shared_heat.stop(_remaining(deadline_s)) and done
        if not done:
            logger.warning("store %s did not stop in time; its threads and files are left to the end of the process", self.path)
        else:
            self._release()
        return done

    def _release(self) -> None:
        self.segments.close_files()
        self.catalog.index.close()
        self._bounce.close()
        self._staging.close()
        if self.lock is not None:
            self.lock.release()
        if self._owns_device:
            self.device.close()


def _remaining(deadline_s: float | None) -> float | None:
    return None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
