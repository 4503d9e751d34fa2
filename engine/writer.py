"""The writer thread: takes changes from the buffer, encodes them, lays them into the log, hands them to the commit thread.

Writes are only started here; encoding of the next batch overlaps the writing of this one. What has become durable is
decided by the commit thread (``engine.commit``), which gets every entry in the order of its ticket.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np

from ..format.layout import PAGE_BYTES, Codec, RecordType
from ..format.record import RecordHeader
from ..gds.buffers import SlotPool
from .buffer import Buffer
from .catalog import Catalog
from .config import Clock, StoreConfig
from .contract import Refusal
from .drive_rate import DriveRate
from .encoder import EncodedBlock, Encoder
from .entry import Entry, Kind, State
from .health import Health
from .index_entry import IndexEntry
from .reinsertion import Reinsertion
from .segment_writer import Assembly, Dropped, LogBatch, OpenSegment, Record, SealWrite, index_entry, staging_bytes
from .stats import Counters
from .turns import Turns

SEGMENT_WAIT_S = 10.0
"""How long a batch waits for reclaim to free room before its blocks are refused."""


class Sequence:
    """Sequence numbers: the open's epoch in the high bits, a counter below. Thread-safe."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self._lock = threading.Lock()
        self._next = epoch << 40

    def __call__(self) -> int:
        with self._lock:
            self._next += 1
            return self._next


class SegmentSource(Protocol):
    """Where a writer gets the next segment from (``engine.reclaim``)."""

    def open_next(self, size_bytes_min: int, deadline_s: float) -> OpenSegment | None:
        """A fresh segment that has its place and id, or ``None`` when no room could be made in time."""
        ...


class Writer:
    """See the module. ``start`` and ``stop`` are called by the store; everything else runs on the thread."""

    def __init__(
        self,
        config: StoreConfig,
        clock: Clock,
        buffer: Buffer,
        encoder: Encoder,
        catalog: Catalog,
        source: SegmentSource,
        commit: Callable[[LogBatch | SealWrite | list[Dropped]], None],
        staging: SlotPool,
        sequence: Sequence,
        counters: Counters,
        health: Health,
    ) -> None:
        self._config = config
        self._clock = clock
        self._buffer = buffer
        self._encoder = encoder
        self._catalog = catalog
        self._source = source
        self._commit = commit
        self._staging = staging
        self._sequence = sequence
        self._counters = counters
        self._health = health
        self.drive_rate = DriveRate()
        self._open: OpenSegment | None = None
        self._taken: list[Entry] = []
        self._stopping = False
        self.turns = Turns(buffer.changed)
        """Calls that others make between two batches."""
        self.open_segment_id = -1
        self._thread = threading.Thread(target=self._run, name="kvlode-writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def reconfigure(self, config: StoreConfig) -> None:
        """Go on with other options. Any thread."""
        self._config = config

    def stop(self, timeout_s: float | None) -> bool:
        """Write what is queued, seal the open segment, end the thread; False when it did not end in time."""
        with self._buffer.lock:
            self._stopping = True
            self._buffer.changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def open_segment(self) -> OpenSegment | None:
        """The segment that records are appended to. Only inside a call of ``turns``."""
        return self._open

    def seal_open(self) -> None:
        """End the open segment now. Only inside a call of ``turns``."""
        try:
            self._seal_open_segment()
        except Exception as error:
            self._health.latch(error)
            raise

    def _run(self) -> None:
        while True:
            entries = self._wait_for_work()
            if self.turns:
                self.turns.take()
            elif not entries:
                break
            self._taken = list(entries)
            try:
                self._write(entries)
            except Exception as error:  # a device error or a defect: neither may leave the engine waiting for ever
                self._fail(error)
        self.turns.end()
        self._seal_open_segment()

    def _wait_for_work(self) -> list[Entry]:
        """Block until a batch is due: enough bytes, old enough, asked for, or stopping. Empty: stop."""
        buffer = self._buffer
        while True:
            with buffer.lock:
                if self._due():
                    return buffer.take(self._config.batch_bytes)
                if self._stopping or self.turns:
                    return []
                oldest_s = buffer.queue[0].queued_at_s if buffer.queue else None
            timeout_s = None if oldest_s is None else max(0.0, oldest_s + self._config.flush_after_s - time.monotonic())
            came = oldest_s is None
            buffer.changed.wait_for(lambda came=came: self._waited_enough(came), timeout_s)  # type: ignore[misc]

    def _waited_enough(self, came: bool) -> bool:
        """``came``: the first change ends the waiting, for the clock starts with it."""
        return self._stopping or bool(self.turns) or self._due() or (came and bool(self._buffer.queue))

    def _due(self) -> bool:
        buffer = self._buffer
        if buffer.reinsertions:
            return True
        if not buffer.queue:
            return False
        first = buffer.queue[0]
        return (
            self._stopping
            or buffer.flush_target >= first.ticket
            or buffer.unwritten_bytes >= buffer.due_bytes
            or time.monotonic() - first.queued_at_s >= self._config.flush_after_s
        )

    def _fail(self, error: Exception) -> None:
        """Latch the store and give up what was taken and not yet handed over; what was handed over settles by itself."""
        self._health.latch(error)
        self._seal_open_segment()
        self._give_up(len(self._taken), Refusal.STORE_FAILED)

    def _hand_over(self, item: LogBatch | SealWrite | list[Dropped], count: int) -> None:
        """Pass the next ``count`` taken entries on to the commit thread."""
        del self._taken[:count]
        self._commit(item)

    def _give_up(self, count: int, reason: Refusal) -> None:
        self._hand_over([Dropped(entry, reason) for entry in self._taken[:count]], count)

    # --- one batch --------------------------------------------------------------------------------------------

    def _write(self, entries: list[Entry]) -> None:
        if self._health.failure is not None:
            self._give_up(len(entries), Refusal.STORE_FAILED)
            return
        self._resolve_depths(entries)
        self._encoder.begin_batch()
        records = self._records(entries)
        while records:
            dropped = list(itertools.takewhile(lambda record: isinstance(record, Dropped), records))
            if dropped:
                self._hand_over([d for d in dropped if isinstance(d, Dropped)], len(dropped))
                records = records[len(dropped) :]
                continue
            placeable = self._placeable(records)
            if placeable == 0 and self._next_segment(records[0]):
                records = self._waiting_reinsertions() + records
                placeable = self._placeable(records)
            if placeable == 0:
                self._counters.add("refused_no_space", len(records))
                self._give_up(len(records), Refusal.NO_SPACE)
                return
            self._write_records(records[:placeable])
            records = records[placeable:]

    def _waiting_reinsertions(self) -> list[Record | Dropped]:
        """Copies that wait for a segment go first into a new one: it may have been made of the room that was reserved for them."""
        entries = self._buffer.take_reinsertions()
        self._taken[:0] = entries
        return self._records(entries)

    def _records(self, entries: list[Entry]) -> list[Record | Dropped]:
        """Headers and payloads of a batch; blocks cancelled or damaged in the meantime keep their turn."""
        encodings = {
            entry.ticket: self._encoder.start(entry) for entry in entries if entry.kind is Kind.BLOCK and entry.state is not State.GONE
        }
        records: list[Record | Dropped] = []
        for entry in entries:
            encoding = encodings.get(entry.ticket) if entry.kind is Kind.BLOCK else None
            records.append(self._record(entry, encoding.finish() if encoding is not None else None))
        return records

    def _record(self, entry: Entry, encoded: EncodedBlock | None) -> Record | Dropped:
        if entry.kind is Kind.TOMBSTONE:
            return Record(self._header(entry, RecordType.TOMBSTONE), [], entry)
        if entry.kind is Kind.DROP:
            return Record(self._header(entry, RecordType.NAMESPACE_DROP), [], entry)
        if entry.kind is Kind.REINSERT:
            copy: Reinsertion = entry.reinsertion
            return Record(copy.header, [copy.payload], entry) if copy.still_wanted() else Dropped(entry, Refusal.DELETED)
        if encoded is None or entry.state is State.GONE:
            return Dropped(entry, Refusal.DELETED)
        if not encoded.intact:
            self._counters.add("buffer_damaged_blocks")
            return Dropped(entry, Refusal.BUFFER_DAMAGED)
        return self._block_record(entry, encoded)

    def _resolve_depths(self, entries: list[Entry]) -> None:
        """Blocks whose parent was not in the buffer at put take their depth from the parent's index entry (0 when that is gone)."""
        waiting = [entry for entry in entries if entry.kind is Kind.BLOCK and entry.depth < 0]
        parents = [entry.namespace.digest + entry.parent_key for entry in waiting]
        for entry, parent in zip(waiting, self._catalog.find(parents) if waiting else [], strict=True):
            entry.depth = 0 if parent is None else parent.depth + 1

    def _header(self, entry: Entry, record_type: RecordType, **payload: Any) -> RecordHeader:
        return RecordHeader(
            record_type=record_type,
            store_uuid=bytes(16),
            segment_id=0,
            offset=0,
            epoch=0,
            version_seq=entry.version_seq,
            record_seq=0,
            synced_bytes=0,
            namespace=entry.namespace.digest,
            key=entry.key,
            tag=entry.tag,
            parent=entry.parent,
            depth=entry.depth,
            written_at_ns=entry.written_at_ns,
            expires_at_ns=entry.expires_at_ns,
            **payload,
        )

    def _block_record(self, entry: Entry, encoded: EncodedBlock) -> Record:
        header = self._header(
            entry,
            RecordType.BLOCK,
            element_size=entry.namespace.descriptor.element_size,
            codec=encoded.codec,
            stripe_bytes=encoded.stripe_bytes,
            raw_length=entry.size_bytes,
            stored_length=encoded.stored_bytes,
            raw_checksum=entry.raw_checksum,
            meta=entry.meta,
            stripes=encoded.stripes,
        )
        in_place = encoded.codec is Codec.RAW and entry.allocation is not None
        return Record(header, encoded.parts, entry, in_place=in_place)

    # --- placing ----------------------------------------------------------------------------------------------

    def _placeable(self, records: list[Record | Dropped]) -> int:
        """How many of the records fit into the open segment, namespace records included."""
        segment = self._open
        if segment is None:
            return 0
        position = segment.position + segment.seal.size_bytes(0) + PAGE_BYTES
        known = set(segment.namespaces)
        for count, record in enumerate(records):
            if isinstance(record, Record):
                for header in self._with_namespace(record, known):
                    position += header.record_bytes + _SEAL_ROW_BYTES_MAX
                if position > segment.header.segment_bytes:
                    return count
        return len(records)

    @staticmethod
    def _with_namespace(record: Record, known: set[bytes]) -> list[RecordHeader]:
        """The record's header, after that of its namespace when the segment does not describe it yet."""
        namespace = _entry(record).namespace
        if namespace.digest in known:
            return [record.header]
        known.add(namespace.digest)
        return [namespace.record_header, record.header]

    def _next_segment(self, record: Record | Dropped) -> bool:
        assert isinstance(record, Record)
        self._seal_open_segment()
        needed = record.header.record_bytes + _entry(record).namespace.record_header.record_bytes + _SEGMENT_OVERHEAD_BYTES
        self._open = self._source.open_next(needed, time.monotonic() + SEGMENT_WAIT_S)
        if self._open is None:
            return False
        self.open_segment_id = self._open.segment_id
        self._counters.add("segments_opened")
        return True

    def _write_records(self, records: list[Record | Dropped]) -> None:
        segment = self._open
        assert segment is not None
        writable = [r for record in records if isinstance(record, Record) for r in self._described(record, segment)]
        staging = self._staging.acquire(staging_bytes(writable))
        assert staging is not None  # waits without limit: writes in flight release it
        assembly = Assembly(staging)
        starts_segment = not segment.header_written
        start = 0 if starts_segment else segment.position
        if starts_segment:
            assembly.add_page(segment.header.pack())
            segment.header_written = True
        entries: list[tuple[Entry, IndexEntry | None]] = []
        for record in writable:
            sequence = self._sequence()
            placed = segment.place(record.header, sequence)
            assembly.add(record, placed)
            if record.entry is not None:
                entries.append((record.entry, index_entry(placed)))
        self.drive_rate.begin()
        write = segment.file.write(start, assembly.buffers)
        began_s = time.perf_counter()
        write.add_done_callback(lambda done: self._written(done, staging, began_s))
        dropped = [record for record in records if isinstance(record, Dropped)]
        batch = LogBatch(segment, write, entries, dropped, segment.position, sequence, starts_segment)
        self._hand_over(batch, len(records))

    def _written(self, write: Future[int], staging: Any, began_s: float) -> None:
        self._counters.latency.observe("segment_write", time.perf_counter() - began_s)
        self.drive_rate.end(0 if write.exception() is not None else write.result())
        self._staging.release(staging)

    @staticmethod
    def _described(record: Record, segment: OpenSegment) -> list[Record]:
        """The record, after a description of its namespace when it is the first of it in this segment."""
        namespace = _entry(record).namespace
        if namespace.digest in segment.namespaces:
            return [record]
        segment.namespaces.add(namespace.digest)
        return [Record(namespace.record_header, [namespace.record_payload]), record]

    def _seal_open_segment(self) -> None:
        segment, self._open = self._open, None
        self.open_segment_id = -1
        if segment is None:
            return
        if self._health.failure is not None:
            segment.file.close()
            return
        seal = np.frombuffer(segment.pack_seal(self._sequence(), self._clock.now_ns()), dtype=np.uint8)
        staging = self._staging.acquire(seal.size)
        assert staging is not None
        staging[: seal.size] = seal
        write = segment.file.write(segment.position, [staging[: seal.size]])
        write.add_done_callback(lambda _: self._staging.release(staging))
        self._hand_over(SealWrite(segment, write, segment.position + seal.size), 0)


_SEAL_ROW_BYTES_MAX = 512
_SEGMENT_OVERHEAD_BYTES = 8 * PAGE_BYTES


def _entry(record: Record | Dropped) -> Entry:
    assert record.entry is not None
    return record.entry
