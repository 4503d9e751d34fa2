"""The commit thread: turns finished writes into durable, indexed blocks. It alone changes the index.

The order is data, sync, index, buffer: an index entry never points at bytes that a power cut could take away, and a
block leaves the buffer only when the index knows it. Batches that finish while a sync runs share the next one.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

from ..format.errors import StoreClosed
from ..format.layout import PAGE_BYTES
from ..gds.monitor import Outcome
from .buffer import Buffer
from .catalog import Catalog, Checkpoint
from .contract import PutStatus, Refusal
from .entry import Entry, Kind
from .events import EventKind
from .health import Health
from .index import IndexDamaged
from .index_entry import IndexEntry
from .jobs import DURABLE, refused
from .segment_writer import Dropped, LogBatch, SealWrite
from .segments import SegmentTable
from .stats import Counters
from .usage import UsageTable

logger = logging.getLogger("kvlode")
Answer = TypeVar("Answer")
GROUP_BATCHES_MAX = 16
SETTLED_AT_ONCE_MAX = 64
"""So that a put never waits for long behind the settling of others."""
PURGE_ENTRIES = 500
RETRY_S = 1.0
_EVENTS = {Kind.BLOCK: EventKind.STORED, Kind.TOMBSTONE: EventKind.REMOVED, Kind.DROP: EventKind.CLEARED}


class CommitThread:
    """See the module. ``submit`` takes the writer's items in order; ``call`` runs a function between two commits."""

    def __init__(
        self, buffer: Buffer, catalog: Catalog, segments: SegmentTable, counters: Counters, health: Health, usage: UsageTable
    ) -> None:
        self._buffer = buffer
        self._catalog = catalog
        self._segments = segments
        self._counters = counters
        self._health = health
        self._usage = usage
        self._items: queue.SimpleQueue[LogBatch | SealWrite | list[Dropped] | Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvlode-commit", daemon=True)
        self._ended = False
        self._held_back: LogBatch | SealWrite | list[Dropped] | Callable[[], None] | None = None
        self._returned: list[bytes] = []
        """Blocks of the group at hand that reclaim had given up, and that are in the log all the same."""

    def start(self) -> None:
        self._thread.start()

    def submit(self, item: LogBatch | SealWrite | list[Dropped]) -> None:
        self._put(item)

    def call(self, function: Callable[[], Answer]) -> Outcome[Answer]:
        """Run ``function`` on the commit thread after everything submitted so far. The outcome is ``StoreClosed`` once the thread ended."""
        outcome: Outcome[Answer] = Outcome()
        self._put(lambda: outcome.run(_refuse if self._ended else function))
        return outcome

    def stop(self, timeout_s: float | None) -> bool:
        """Work off what was submitted, sync the index, end; False when that took longer."""
        self._items.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def purge(self, namespace: bytes, floor_seq: int) -> None:
        """Work off a namespace drop in the index, a slice at a time between other commits."""
        self._items.put(lambda: self._purge_slice(namespace, floor_seq, None))

    def _put(self, item: LogBatch | SealWrite | list[Dropped] | Callable[[], None]) -> None:
        self._items.put(item)
        if self._ended:
            self._refuse_rest()

    def _refuse_rest(self) -> None:
        """What comes after the end (a writer that outlived its close hands over more): nobody may wait for it for ever. Any thread."""
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._items.get_nowait()
                if isinstance(item, SealWrite):
                    item.segment.file.close()
                elif callable(item):
                    item()
                else:
                    self._settle_all(item, Refusal.STORE_FAILED)

    # --- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                item = self._next()
                if item is None:
                    break
                self._handle(item)
            except Exception as error:  # without this thread everybody would wait for ever
                self._health.latch(error)
        self._ended = True
        self._refuse_rest()

    def _next(self) -> LogBatch | SealWrite | list[Dropped] | Callable[[], None] | None:
        held_back, self._held_back = self._held_back, None
        if held_back is not None:
            return held_back
        while True:
            try:
                return self._items.get(timeout=RETRY_S if self._catalog.waiting_changes else None)
            except queue.Empty:
                self._catalog.sync()

    def _handle(self, item: LogBatch | SealWrite | list[Dropped] | Callable[[], None]) -> None:
        if isinstance(item, LogBatch):
            self._commit_group(self._gather(item))
        elif isinstance(item, SealWrite):
            self._finish_seal(item)
        elif isinstance(item, list):
            self._settle_dropped(item)
        else:
            item()

    def _gather(self, first: LogBatch) -> list[LogBatch]:
        """``first`` and the batches behind it that are already written."""
        group = [first]
        while len(group) < GROUP_BATCHES_MAX:
            try:
                item = self._items.get_nowait()
            except queue.Empty:
                break
            if isinstance(item, LogBatch) and item.write.done():
                group.append(item)
                continue
            self._held_back = item
            if item is None:
                self._items.put(None)
                self._held_back = None
            break
        return group

    def _commit_group(self, group: list[LogBatch]) -> None:
        if self._health.failure is None:
            try:
                for batch in group:
                    batch.write.result()
                began_s = time.perf_counter()
                self._make_durable(group)
                self._index(group)
                self._counters.latency.observe("commit", time.perf_counter() - began_s)
            except Exception as error:  # a device error, or a defect: stop writing rather than lose track of what is durable
                self._health.latch(error)
        for batch in group:
            if self._health.failure is None:
                self._settle_batch(batch)
            else:
                self._settle_all(batch, Refusal.STORE_FAILED)

    def _make_durable(self, group: list[LogBatch]) -> None:
        for segment in {id(batch.segment): batch.segment for batch in group}.values():
            segment.file.sync()
        if any(batch.starts_segment for batch in group):
            self._segments.device.sync_folder(self._segments.folder)
        for batch in group:
            batch.segment.synced_bytes = batch.end_offset
        self._counters.add("syncs")

    def _index(self, group: list[LogBatch]) -> None:
        """Apply the group's changes in log order, the checkpoint last."""
        changes: dict[bytes, bytes | None] = {}
        self._returned = []
        for batch in group:
            for entry, record in batch.entries:
                self._add_change(changes, entry, record)
        last = group[-1]
        key, value = Catalog.checkpoint_change(Checkpoint(last.segment.segment_id, last.end_offset, last.last_sequence))
        changes[key] = value
        self._catalog.change(changes)
        self._catalog.events.add(EventKind.STORED, self._returned)  # first: changes of their keys can only lie behind them
        for batch in group:
            self._tell(batch)
            self._count_usage(batch)

    def _count_usage(self, batch: LogBatch) -> None:
        """In log order, so that what was put after a drop counts."""
        for dropping, pairs in itertools.groupby(batch.entries, lambda pair: pair[0].kind is Kind.DROP):
            if dropping:
                for entry, _ in pairs:
                    self._usage.forget_namespace(entry.namespace.digest)
                continue
            blocks = [(e.namespace.digest, r.record_pages * PAGE_BYTES, e.kind is Kind.BLOCK) for e, r in pairs if r is not None]
            self._usage.add_many(batch.segment.segment_id, blocks)

    def _tell(self, batch: LogBatch) -> None:
        for kind, entries in itertools.groupby((entry for entry, _ in batch.entries), lambda entry: entry.kind):
            event = _EVENTS.get(kind)
            if event is not None:
                self._catalog.events.add(event, [e.namespace.digest if kind is Kind.DROP else e.ident for e in entries])

    def _add_change(self, changes: dict[bytes, bytes | None], entry: Entry, record: IndexEntry | None) -> None:
        if entry.kind is Kind.BLOCK and record is not None:
            changes[entry.ident] = record.pack()
        elif entry.kind is Kind.TOMBSTONE:
            changes[entry.ident] = None
        elif entry.kind is Kind.DROP:
            key, value = Catalog.floor_change(entry.namespace.digest, entry.version_seq)
            changes[key] = value
        elif record is not None and self._belongs(entry, changes):
            changes[entry.ident] = record.pack()
            self._counters.add("reinserted_blocks")
            self._counters.add("reinserted_bytes", record.stored_length)

    def _belongs(self, entry: Entry, changes: dict[bytes, bytes | None]) -> bool:
        """Whether a copy that was carried forward is what its key stands for: its entry points at the source, or is gone.

        Gone means given up by reclaim, which called the copies off when this one was already on its way into the log. It was not
        deleted: the writer lays no copy behind a change of its key. In the log it is the block, so it is in the index too.
        """
        value = changes[entry.ident] if entry.ident in changes else self._catalog.values([entry.ident])[0]
        if value is None:
            self._returned.append(entry.ident)
            return True
        current, source = IndexEntry.unpack(value), entry.reinsertion.header
        return (current.segment_id, current.offset) == (source.segment_id, source.offset)

    def _settle_batch(self, batch: LogBatch) -> None:
        written = sum(record.stored_length for _, record in batch.entries if record is not None)
        blocks = [(entry, record) for entry, record in batch.entries if entry.kind is Kind.BLOCK and record is not None]
        fresh = [(entry.size_bytes, record.stored_length) for entry, record in blocks]
        counts = {"written_records": len(batch.entries), "written_stored_bytes": written, "written_raw_bytes": sum(raw for raw, _ in fresh)}
        self._counters.add_many(counts | {"written_blocks": len(fresh), "fresh_stored_bytes": sum(stored for _, stored in fresh)})
        self._in_turn([(entry, DURABLE) for entry, _ in batch.entries] + [(d.entry, refused(d.reason)) for d in batch.dropped])
        for entry, _ in batch.entries:
            if entry.kind is Kind.DROP:
                self.purge(entry.namespace.digest, entry.version_seq)

    def _settle_dropped(self, dropped: list[Dropped]) -> None:
        self._in_turn([(d.entry, refused(d.reason)) for d in dropped])

    def _settle_all(self, item: object, reason: Refusal) -> None:
        if isinstance(item, LogBatch):
            self._in_turn([(entry, refused(reason)) for entry, _ in item.entries] + [(d.entry, refused(reason)) for d in item.dropped])
        elif isinstance(item, list):
            self._settle_dropped(item)

    def _in_turn(self, settlements: list[tuple[Entry, PutStatus]]) -> None:
        """Settle in the order of tickets, some at a time: a lock and a wake-up each would cost more than small blocks do."""
        for status, pairs in itertools.groupby(sorted(settlements, key=lambda pair: pair[0].ticket), key=lambda pair: pair[1]):
            entries = [entry for entry, _ in pairs]
            for start in range(0, len(entries), SETTLED_AT_ONCE_MAX):
                self._buffer.settle(entries[start : start + SETTLED_AT_ONCE_MAX], status, keep_readable=self._health.failure is not None)

    def _finish_seal(self, seal: SealWrite) -> None:
        """A sealed segment is cut to its size and durable before anything of the next one is committed."""
        segment = seal.segment
        try:
            seal.write.result()
            if self._health.failure is not None:
                return
            segment.file.sync()
            segment.file.truncate(seal.size_bytes)
            segment.file.sync()
        except OSError as error:
            self._health.latch(error)
            return
        finally:
            segment.file.close()
        self._segments.resize(segment.segment_id, seal.size_bytes, sealed=True)
        self.sync_index()
        self._counters.add("segments_sealed")

    def sync_index(self) -> bool:
        """Make the index durable; a failure costs a longer recovery, not data. Commit thread only."""
        return self._catalog.sync()

    def _purge_slice(self, namespace: bytes, floor_seq: int, start: bytes | None) -> None:
        if self._ended:
            return  # the floor stays: the next open goes on
        try:
            resume = self._catalog.purge(namespace, floor_seq, start, PURGE_ENTRIES)
        except IndexDamaged as error:  # the floor stays and hides the namespace; the index that the next open derives replays the drop
            self._counters.add("purges_given_up")
            logger.error("the entries of a dropped namespace cannot be removed now: %s", error)
            return
        if resume is not None:
            self._items.put(lambda: self._purge_slice(namespace, floor_seq, resume))
        else:
            self._catalog.lower_floor(namespace, floor_seq)


def _refuse() -> NoReturn:
    raise StoreClosed("the store is closed", action="Open the store again.")
