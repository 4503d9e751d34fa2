"""The DRAM buffer: dirty blocks waiting to be written, clean blocks that serve reads, and the order of all changes.

The buffer is the authority on everything the index does not know yet. Each key has at most one *visible* entry; a
queue holds every change (blocks, tombstones, drops, reinsertions) in the order in which it must reach the log.
State of a block entry: FILLING (the caller copies) -> DIRTY -> CLEAN -> gone; a failed or cancelled one is GONE.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

from ..format.errors import StoreClosed
from ..format.layout import ZERO_DIGEST
from ..gds.prefault import Prefault
from .arena import Allocation, Bytes, ChunkArena
from .contract import PutStatus, Refusal
from .jobs import DURABLE, refused

PREFAULT_BYTES_MIN = 64 << 20
"""Smaller buffers are not touched in advance: the first blocks do it as fast."""
PREFAULT_STOP_S = 1.0


class Kind(enum.IntEnum):
    BLOCK = 0
    TOMBSTONE = 1
    DROP = 2
    REINSERT = 3


class State(enum.IntEnum):
    FILLING = 0
    DIRTY = 1
    CLEAN = 2
    GONE = 3


class Entry:
    """One change to the store, and for blocks its bytes. Fields are written under the buffer's lock."""

    __slots__ = (
        *("allocation", "depth", "expires_at_ns", "ident", "key", "kind", "meta", "namespace", "on_settled", "parent"),
        *("parent_key", "pins", "queued_at_s", "raw_checksum", "reinsertion", "shadowed", "size_bytes", "spans", "state", "tag"),
        *("ticket", "version_seq", "written_at_ns"),
    )

    def __init__(self, kind: Kind, namespace: Any, key: bytes, *, written_at_ns: int = 0) -> None:
        self.kind = kind
        self.namespace = namespace
        self.key = key
        self.ident: bytes = namespace.digest + key
        self.state = State.FILLING if kind is Kind.BLOCK else State.DIRTY
        self.spans: tuple[Bytes, ...] = ()
        self.allocation: Allocation | None = None  # None: borrowed memory, or no payload
        self.size_bytes = 0
        self.version_seq = 0
        self.ticket = 0
        self.parent = ZERO_DIGEST
        self.parent_key: bytes | None = None
        self.depth = 0
        self.written_at_ns = written_at_ns
        self.expires_at_ns = 0
        self.tag = ZERO_DIGEST
        self.meta = b""
        self.raw_checksum = 0
        self.pins = 0
        self.queued_at_s = 0.0
        self.reinsertion: Any = None
        self.shadowed: Entry | None = None  # the tombstone that this block's reservation took the place of
        self.on_settled: Callable[[PutStatus], None] | None = None


class Buffer:
    """See the module. ``condition`` guards everything; it is notified when room, work or progress appears."""

    def __init__(self, memory: Bytes, *, serve_clean: bool, next_sequence: Callable[[], int]) -> None:
        self.condition = threading.Condition()
        self.entries: dict[bytes, Entry] = {}
        self.queue: deque[Entry] = deque()
        self.reinsertions: deque[Entry] = deque()
        self.dirty_bytes = 0
        self.unwritten_bytes = 0
        self.tickets_queued = 0
        self.tickets_settled = 0
        self.dropped_blocks = 0
        self.flush_target = 0
        self._arena = ChunkArena(memory)
        self._prefault = Prefault(memory) if memory.size >= PREFAULT_BYTES_MIN else None
        self._clean: OrderedDict[bytes, Entry] = OrderedDict()
        self._serve_clean = serve_clean
        self._closed = False
        self._next_sequence = next_sequence

    @property
    def capacity_bytes(self) -> int:
        return self._arena.capacity_bytes

    # --- putting ---------------------------------------------------------------------------------------------

    def reserve(self, entry: Entry, size_bytes: int, timeout_s: float, *, now_ns: int, own_memory: bool = True) -> bool | None:
        """Make ``entry`` the visible one of its key and give it memory.

        True: fill ``entry.spans``, then ``publish``. None: the key has a live entry. False: no room before the deadline.
        """
        deadline_s = time.monotonic() + timeout_s
        with self.condition:
            while True:
                self._check_open()
                present = self.entries.get(entry.ident)
                if present is not None and present.expires_at_ns and now_ns >= present.expires_at_ns:
                    self._hide(present)
                    present = None
                if present is not None and present.kind is Kind.BLOCK and present.state is not State.GONE:
                    if present.ident in self._clean:
                        self._clean.move_to_end(present.ident)
                    return None
                if not own_memory or self._allocate(entry, size_bytes):
                    break
                remaining_s = deadline_s - time.monotonic()
                if remaining_s <= 0:
                    return False
                self.condition.wait(remaining_s)
            entry.size_bytes = size_bytes
            entry.shadowed = present
            self.entries[entry.ident] = entry
            return True

    def _allocate(self, entry: Entry, size_bytes: int) -> bool:
        allocation = self._arena.allocate(size_bytes)
        if allocation is None and self._evict(size_bytes):
            allocation = self._arena.allocate(size_bytes)
        if allocation is None:
            return False
        entry.allocation, entry.spans = allocation, allocation.spans
        return True

    def _evict(self, size_bytes: int) -> bool:
        """Drop clean blocks, least recently used first, until ``size_bytes`` would fit; False when they do not suffice."""
        for _ in range(len(self._clean)):
            if self._arena.free_bytes >= size_bytes + self._arena.chunk_bytes:
                break
            ident, entry = self._clean.popitem(last=False)
            if entry.pins:
                self._clean[ident] = entry
            else:
                self._forget(entry)
        return self._arena.free_bytes >= size_bytes

    def publish(self, entry: Entry) -> None:
        """A filled block becomes dirty: visible to readers and queued for the log."""
        with self.condition:
            self._check_open()
            entry.state, entry.shadowed = State.DIRTY, None
            self._enqueue(entry)

    def withdraw(self, entry: Entry) -> None:
        """Undo ``reserve`` after a copy that did not finish; harmless when nothing was reserved or it was published."""
        with self.condition:
            if entry.state is State.GONE or any(queued is entry for queued in self.queue) or 0 < entry.ticket <= self.tickets_queued:
                return
            self._forget(entry)
            shadowed, entry.shadowed = entry.shadowed, None
            if shadowed is not None and shadowed.ticket > self.tickets_settled:
                self.entries[entry.ident] = shadowed
            self.condition.notify_all()

    def enqueue_tombstone(self, entry: Entry) -> None:
        """Hide a key at once and queue its tombstone; a dirty block under the key is cancelled or overtaken in the log."""
        with self.condition:
            present = self.entries.get(entry.ident)
            if present is not None and present.state is State.FILLING:
                return  # that put has not returned yet: it counts as later than this delete
            if present is not None:
                self._hide(present)
            self.entries[entry.ident] = entry
            self._enqueue(entry)

    def enqueue_drop(self, entry: Entry, raise_floor: Callable[[bytes, int], None]) -> None:
        """Hide every block of a namespace, here at once and in the index through ``raise_floor``, and queue the drop."""
        with self.condition:
            digest = entry.namespace.digest
            for present in [e for e in self.entries.values() if e.namespace.digest == digest and e.state is not State.FILLING]:
                self._hide(present)
            self._enqueue(entry)
            raise_floor(digest, entry.version_seq)

    def enqueue_reinsertion(self, entry: Entry) -> None:
        """Queue a copy of a stored record (``entry.reinsertion``). It keeps its ``version_seq``, has no ticket and goes first:
        reclaim waits for it while the writer needs the room that reclaim makes."""
        with self.condition:
            self.reinsertions.append(entry)
            self.condition.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosed("the store is closed", action="Open the store again.")

    def close(self) -> None:
        """No further changes: what is still queued is given up, so that nobody waits for it for ever."""
        if self._prefault is not None:
            self._prefault.stop(PREFAULT_STOP_S)
        with self.condition:
            self._closed = True
            abandoned = [*self.reinsertions, *self.queue]
            self.reinsertions.clear()
            self.queue.clear()
            self.condition.notify_all()
        self.settle(abandoned, refused(Refusal.STORE_FAILED))

    def _enqueue(self, entry: Entry) -> None:
        self._check_open()
        entry.version_seq = self._next_sequence()
        entry.ticket = self.tickets_queued + 1
        entry.queued_at_s = time.monotonic()
        self.queue.append(entry)
        self.tickets_queued = entry.ticket
        self.dirty_bytes += entry.size_bytes
        self.unwritten_bytes += entry.size_bytes
        self.condition.notify_all()

    def _hide(self, entry: Entry) -> None:
        """Make an entry invisible; a clean block's memory is freed, a dirty one's when the log is done with it."""
        self.entries.pop(entry.ident, None)
        if entry.state is State.CLEAN:
            self._clean.pop(entry.ident, None)
            self._forget(entry)
        elif entry.kind is Kind.BLOCK:
            entry.state = State.GONE

    # --- reading ---------------------------------------------------------------------------------------------

    def acquire(self, ident: bytes) -> Entry | None:
        """The block under a key, pinned (``release`` it), or ``None`` when there is none to read here."""
        if ident not in self.entries:
            return None
        with self.condition:
            entry = self.entries.get(ident)
            if entry is None or not self.readable(entry):
                return None
            entry.pins += 1
            if ident in self._clean:
                self._clean.move_to_end(ident)
            return entry

    def hides(self, ident: bytes) -> bool:
        """Whether the key is deleted or still being put, whatever the index says. Ask after ``acquire``, before the index."""
        entry = self.entries.get(ident)
        return entry is not None and not self.readable(entry)

    def changing(self, ident: bytes) -> bool:
        """Whether a change of the key is on its way to the log."""
        entry = self.entries.get(ident)
        return entry is not None and entry.state is not State.CLEAN

    @staticmethod
    def readable(entry: Entry) -> bool:
        """Whether an entry is a block with bytes to serve (a tombstone or a block being filled is not)."""
        return entry.kind is Kind.BLOCK and (entry.state is State.DIRTY or entry.state is State.CLEAN)

    def release(self, entry: Entry) -> None:
        with self.condition:
            entry.pins -= 1
            if entry.pins == 0:
                self._reap(entry)
                self.condition.notify_all()

    # --- the log's side ---------------------------------------------------------------------------------------

    def take(self, batch_bytes: int) -> list[Entry]:
        """The next changes to write, reinsertions first: at most ``batch_bytes`` (but at least one entry)."""
        with self.condition:
            taken: list[Entry] = []
            room_bytes = batch_bytes
            for waiting in (self.reinsertions, self.queue):
                while waiting and (not taken or waiting[0].size_bytes <= room_bytes):
                    entry = waiting.popleft()
                    room_bytes -= entry.size_bytes
                    taken.append(entry)
                    if waiting is self.queue:
                        self.unwritten_bytes -= entry.size_bytes
            return taken

    def take_reinsertions(self) -> list[Entry]:
        """All waiting copies of stored records, for a segment that was just opened."""
        with self.condition:
            taken = list(self.reinsertions)
            self.reinsertions.clear()
            return taken

    def settle(self, entries: Iterable[Entry], status: PutStatus = DURABLE, *, keep_readable: bool = False) -> None:
        """The log is done with these entries: durable, or given up with ``status``.

        ``keep_readable`` leaves given-up blocks in the buffer (the store failed, but its blocks can still be served).
        """
        callbacks = []
        with self.condition:
            for entry in entries:
                final = self._settled_status(entry, status)
                if entry.kind is not Kind.REINSERT:
                    self.tickets_settled = max(self.tickets_settled, entry.ticket)
                    self.dirty_bytes -= entry.size_bytes
                    self.dropped_blocks += not final and final.reason is not Refusal.DELETED
                    self._retire(entry, bool(final), keep_readable)
                if entry.on_settled is not None:
                    callbacks.append((entry, final))
            self.condition.notify_all()
        for entry, final in callbacks:
            self._announce(entry, final)

    @staticmethod
    def _settled_status(entry: Entry, status: PutStatus) -> PutStatus:
        return refused(Refusal.DELETED) if entry.kind is Kind.BLOCK and entry.state is State.GONE else status

    def _retire(self, entry: Entry, durable: bool, keep_readable: bool) -> None:
        visible = self.entries.get(entry.ident) is entry
        if entry.kind is not Kind.BLOCK:
            if visible:
                del self.entries[entry.ident]
            return
        if visible and entry.allocation is not None and ((durable and self._serve_clean) or (not durable and keep_readable)):
            entry.state = State.CLEAN
            if durable:
                self._clean[entry.ident] = entry
            return
        if visible:
            del self.entries[entry.ident]
        entry.state = State.GONE
        self._reap(entry)

    def _announce(self, entry: Entry, status: PutStatus) -> None:
        """Tell the job; for borrowed memory only when no reader copies from it any more."""
        with self.condition:
            if entry.allocation is None and entry.kind is Kind.BLOCK:
                self.condition.wait_for(lambda: entry.pins == 0)
                entry.spans = ()
            callback, entry.on_settled = entry.on_settled, None
        if callback is not None:
            callback(status)

    def _forget(self, entry: Entry) -> None:
        if self.entries.get(entry.ident) is entry:
            del self.entries[entry.ident]
        entry.state = State.GONE
        self._reap(entry)

    def _reap(self, entry: Entry) -> None:
        """Free the memory of a block that is gone, settled and unpinned."""
        settled = entry.ticket <= self.tickets_settled
        if entry.state is State.GONE and settled and entry.pins == 0 and entry.allocation is not None:
            self._arena.release(entry.allocation)
            entry.allocation, entry.spans = None, ()

    def wait_prefaulted(self, timeout_s: float | None) -> bool:
        """Wait until the memory was touched in advance (or that was given up); False when the deadline passed."""
        return self._prefault is None or self._prefault.wait(timeout_s)

    # --- progress ---------------------------------------------------------------------------------------------

    def wait_settled(self, ticket: int, timeout_s: float | None) -> bool:
        """Wait until every change up to ``ticket`` was settled."""
        with self.condition:
            self.flush_target = max(self.flush_target, ticket)
            self.condition.notify_all()
            return self.condition.wait_for(lambda: self.tickets_settled >= ticket, timeout_s)

    def take_dropped(self) -> int:
        """Blocks given up since the last call."""
        with self.condition:
            dropped, self.dropped_blocks = self.dropped_blocks, 0
            return dropped

    def usage(self) -> dict[str, int]:
        with self.condition:
            return {
                "capacity_bytes": self._arena.capacity_bytes,
                "free_bytes": self._arena.free_bytes,
                "dirty_bytes": self.dirty_bytes,
                "clean_blocks": len(self._clean),
                "visible_entries": len(self.entries),
            }
