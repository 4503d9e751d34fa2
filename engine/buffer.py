"""The DRAM buffer: dirty blocks waiting to be written, clean blocks that serve reads, and the order of all changes.

The buffer is the authority on everything the index does not know yet. Each key has at most one *visible* entry; a
queue holds every change (blocks, tombstones, drops, reinsertions) in the order in which it must reach the log.
State of a block entry: FILLING (the caller copies) -> DIRTY -> CLEAN -> gone; a failed or cancelled one is GONE.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence

from ..format.errors import StoreClosed
from ..format.layout import PAGE_BYTES, ZERO_DIGEST
from ..gds.monitor import Monitor
from ..gds.prefault import Prefault
from .arena import Bytes, ChunkArena
from .contract import PutStatus, Refusal
from .entry import Entry, Kind, State
from .jobs import DURABLE, refused

PREFAULT_BYTES_MIN = 64 << 20
"""Smaller buffers are not touched in advance: the first blocks do it as fast."""
PREFAULT_STOP_S = 1.0


class Buffer:
    """See the module. ``lock`` guards everything; ``changed`` tells when room, work or progress appears.

    An interrupt (Ctrl-C) may arrive in the main thread after any call. So fields that belong together change without a
    call between them, and what can be left half done can be done again.
    """

    def __init__(self, memory: Bytes, *, serve_clean: bool, next_sequence: Callable[[], int], batch_bytes: int = 0) -> None:
        self.changed = Monitor()
        self.lock = self.changed.lock
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
        self._holds: dict[int, list[Entry]] = {}  # by thread
        self._waiting_for_readers: set[int] = set()
        self._serve_clean = serve_clean
        self._closed = False
        self._next_sequence = next_sequence
        self.due_bytes = min(batch_bytes, self.capacity_bytes // 4)
        """From so many unwritten bytes on the writer has work; until then a put does not wake it."""

    @property
    def capacity_bytes(self) -> int:
        return self._arena.capacity_bytes

    # --- putting ---------------------------------------------------------------------------------------------

    def reserve(self, entry: Entry, size_bytes: int, timeout_s: float, *, now_ns: int, own_memory: bool = True) -> bool | None:
        """Make ``entry`` the visible one of its key and give it memory.

        True: fill ``entry.spans``, then ``publish``. None: the key has a live entry. False: no room before the deadline.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            with self.lock:
                reserved = self._try_reserve(entry, size_bytes, now_ns, own_memory)
                settled = self.tickets_settled
            remaining_s = deadline_s - time.monotonic()
            if reserved is not False or remaining_s <= 0:
                return reserved
            # room appears when something was settled or a reader let go of a block that was to leave
            moved = lambda seen=settled: self._closed or self.tickets_settled != seen or self._arena.fits(size_bytes)  # noqa: E731
            self._wait_for_readers(moved, remaining_s)

    def _try_reserve(self, entry: Entry, size_bytes: int, now_ns: int, own_memory: bool) -> bool | None:
        self._check_open()
        present = self.entries.get(entry.ident)
        if present is not None and present.expires_at_ns and now_ns >= present.expires_at_ns:
            self._hide(present)
            present = self.entries.get(entry.ident)
        if present is not None and present.kind is Kind.BLOCK and present.state is not State.GONE:
            if present.ident in self._clean:
                self._clean.move_to_end(present.ident)
            return None
        if own_memory:
            if not self._make_room(size_bytes):
                return False
            entry.allocation = self._arena.allocate(size_bytes)
            if entry.allocation is None:
                return False
            entry.spans = entry.allocation.spans
        entry.size_bytes = size_bytes
        entry.shadowed = present
        self.entries[entry.ident] = entry
        return True

    def _make_room(self, size_bytes: int) -> bool:
        """Drop clean blocks, least recently used first, until ``size_bytes`` fit; False when they do not suffice."""
        if self._arena.fits(size_bytes):
            return True
        for _ in range(len(self._clean)):
            if self._arena.fits(size_bytes + self._arena.chunk_bytes):
                break
            ident, entry = next(iter(self._clean.items()))
            if self._held(entry):
                self._clean.move_to_end(ident)
            else:
                self._forget(entry)
                self._clean.pop(ident, None)
        return self._arena.fits(size_bytes)

    def forget_clean(self, idents: Iterable[bytes]) -> None:
        """These blocks left the drive: as long as copies here answered for them, a put would not store them again."""
        with self.lock:
            for ident in idents:
                entry = self._clean.get(ident)
                if entry is not None:
                    self._hide(entry)

    def publish(self, entry: Entry) -> None:
        """A filled block becomes dirty: visible to readers and queued for the log."""
        with self.lock:
            self._check_open()
            entry.state = State.DIRTY
            self._enqueue(entry)

    def withdraw(self, entry: Entry) -> None:
        """Undo ``reserve`` after a copy that did not finish; harmless when nothing was reserved or it was published."""
        with self.lock:
            if entry.state is State.GONE or entry.ticket:
                return
            self._forget(entry)
            self.changed.notify_all()

    def enqueue_tombstone(self, entry: Entry, *, beneath: bool = False) -> None:
        """Hide a key at once and queue its tombstone; a dirty block under the key is cancelled or overtaken in the log."""
        with self.lock:
            present = self.entries.get(entry.ident)
            if present is None or present.state is not State.FILLING:
                if present is not None:
                    self._hide(present)
                self.entries[entry.ident] = entry
            elif not beneath:
                return  # that put has not returned yet: it counts as later than this delete
            self._enqueue(entry)

    def enqueue_drop(self, entry: Entry, raise_floor: Callable[[bytes, int], None]) -> None:
        """Hide every block of a namespace, here at once and in the index through ``raise_floor``, and queue the drop."""
        with self.lock:
            digest = entry.namespace.digest
            for present in [e for e in self.entries.values() if e.namespace.digest == digest and e.state is not State.FILLING]:
                self._hide(present)
            self._enqueue(entry)
            raise_floor(digest, entry.version_seq)

    def enqueue_reinsertion(self, entry: Entry) -> None:
        """Queue a copy of a stored record (``entry.reinsertion``). It keeps its ``version_seq``, has no ticket and goes first:
        reclaim waits for it while the writer needs the room that reclaim makes."""
        with self.lock:
            if not self._closed:
                self.reinsertions.append(entry)
                self.changed.notify_all()
                return
        self.settle([entry], refused(Refusal.STORE_FAILED))  # the writer is gone: reclaim must not wait for it

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosed("the store is closed", action="Open the store again.")

    def close(self) -> None:
        """No further changes: what is still queued is given up, so that nobody waits for it for ever."""
        if self._prefault is not None:
            self._prefault.stop(PREFAULT_STOP_S)
        with self.lock:
            self._closed = True
            abandoned = [*self.reinsertions, *self.queue]
            self.reinsertions.clear()
            self.queue.clear()
            self.changed.notify_all()
        self.settle(abandoned, refused(Refusal.STORE_FAILED))

    def _enqueue(self, entry: Entry) -> None:
        self._check_open()
        unwritten_bytes = self.unwritten_bytes + entry.size_bytes
        # The first change starts the writer's clock. Before the queue changes: an interrupt behind that could keep the only news from it.
        if not self.queue or unwritten_bytes >= self.due_bytes or self.tickets_queued < self.flush_target:
            self.changed.notify_all()
        entry.version_seq = self._next_sequence()
        entry.queued_at_s = time.monotonic()
        entry.ticket = self.tickets_queued = self.tickets_queued + 1
        self.dirty_bytes += entry.size_bytes
        self.unwritten_bytes = unwritten_bytes
        self.queue.append(entry)

    def _hide(self, entry: Entry) -> None:
        """Make an entry invisible; a clean block's memory is freed, a dirty one's when the log is done with it."""
        self._uncover(entry)
        if entry.state is State.CLEAN:
            self._clean.pop(entry.ident, None)
            self._forget(entry)
        elif entry.kind is Kind.BLOCK:
            entry.state = State.GONE

    # --- reading ---------------------------------------------------------------------------------------------

    def acquire(self, ident: bytes) -> Entry | None:
        """The block under a key, or ``None`` when there is none to read here. Its memory stays until the thread calls ``release``."""
        return self.acquire_many([ident])[0]

    def acquire_many(self, idents: Sequence[bytes]) -> list[Entry | None]:
        """As ``acquire``, for the keys of one call.

        A thread holds what its last call gave: should an interrupt keep it from ``release``, its next call makes up for it.
        """
        if not any(ident in self.entries for ident in idents):
            return [None] * len(idents)
        thread = threading.get_ident()
        with self.lock:
            entries = self.entries
            found = [entry if (entry := entries.get(ident)) is not None and self.readable(entry) else None for ident in idents]
            for ident, entry in zip(idents, found, strict=True):
                if entry is not None and ident in self._clean:
                    self._clean.move_to_end(ident)
            self._let_go(thread)
            self._holds[thread] = [entry for entry in found if entry is not None]
            return found

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

    def durable(self, entry: Entry) -> bool:
        """Whether a readable block is on the drive too; one that was given up when the store failed is not."""
        return self._clean.get(entry.ident) is entry

    def release(self) -> None:
        """Let go of what this thread has acquired, if anything."""
        with self.lock:
            self._let_go(threading.get_ident())

    def _let_go(self, thread: int) -> None:
        held = self._holds.pop(thread, None)
        if held:
            for entry in held:
                self._reap(entry)
            if self._waiting_for_readers:  # waking everybody for nothing costs a reader more than it costs them
                self.changed.notify_all()

    def _wait_for_readers(self, predicate: Callable[[], bool], timeout_s: float | None = None) -> None:
        """As ``changed.wait_for``, for what may also come about when a reader lets go."""
        thread = threading.get_ident()
        try:
            with self.lock:
                self._waiting_for_readers.add(thread)
            self.changed.wait_for(predicate, timeout_s)
        finally:
            self._waiting_for_readers.discard(thread)

    def _held(self, entry: Entry) -> bool:
        return any(each is entry for held in self._holds.values() for each in held)

    # --- the log's side ---------------------------------------------------------------------------------------

    def take(self, batch_bytes: int) -> list[Entry]:
        """The next changes to write, reinsertions first: at most ``batch_bytes`` (but at least one entry). A delete counts as its page."""
        with self.lock:
            taken: list[Entry] = []
            room_bytes = batch_bytes
            for waiting in (self.reinsertions, self.queue):
                while waiting and (not taken or waiting[0].size_bytes <= room_bytes):
                    entry = waiting.popleft()
                    room_bytes -= max(entry.size_bytes, PAGE_BYTES)
                    taken.append(entry)
                    if waiting is self.queue:
                        self.unwritten_bytes -= entry.size_bytes
            return taken

    def take_reinsertions(self) -> list[Entry]:
        """All waiting copies of stored records, for a segment that was just opened."""
        with self.lock:
            taken, self.reinsertions = list(self.reinsertions), deque()
            return taken

    def settle(self, entries: Iterable[Entry], status: PutStatus = DURABLE, *, keep_readable: bool = False) -> None:
        """The log is done with these entries: durable, or given up with ``status``.

        ``keep_readable`` leaves given-up blocks in the buffer (the store failed, but its blocks can still be served).
        """
        callbacks = []
        with self.lock:
            for entry in entries:
                final = self._settled_status(entry, status)
                if entry.kind is not Kind.REINSERT:
                    self.tickets_settled = max(self.tickets_settled, entry.ticket)
                    self.dirty_bytes -= entry.size_bytes
                    self.dropped_blocks += not final and final.reason is not Refusal.DELETED
                    self._retire(entry, bool(final), keep_readable)
                if entry.on_settled is not None:
                    callbacks.append((entry, final))
            self.changed.notify_all()
        for entry, final in callbacks:
            self._announce(entry, final)

    @staticmethod
    def _settled_status(entry: Entry, status: PutStatus) -> PutStatus:
        return refused(Refusal.DELETED) if entry.kind is Kind.BLOCK and entry.state is State.GONE else status

    def _retire(self, entry: Entry, durable: bool, keep_readable: bool) -> None:
        visible = self.entries.get(entry.ident) is entry
        if durable:
            entry.shadowed = None
        if entry.kind is not Kind.BLOCK:
            if durable:
                entry.state = State.GONE
                if visible:
                    del self.entries[entry.ident]
            return  # one that was given up goes on hiding its key: deleted blocks do not come back while the store is open
        if visible and entry.allocation is not None and ((durable and self._serve_clean) or (not durable and keep_readable)):
            entry.state = State.CLEAN
            if durable:
                self._clean[entry.ident] = entry
            return
        self._forget(entry)

    def _announce(self, entry: Entry, status: PutStatus) -> None:
        """Tell the job; for borrowed memory only when no reader copies from it any more."""
        if entry.allocation is None and entry.kind is Kind.BLOCK:
            self._wait_for_readers(lambda: not self._held(entry))
            entry.spans = ()
        with self.lock:
            callback, entry.on_settled = entry.on_settled, None
        if callback is not None:
            callback(status)

    def _forget(self, entry: Entry) -> None:
        self._uncover(entry)
        entry.state = State.GONE
        self._reap(entry)

    def _uncover(self, entry: Entry) -> None:
        """Take an entry out of sight. The delete that it took the place of hides the key again, unless the index knows of it."""
        if self.entries.get(entry.ident) is entry:
            del self.entries[entry.ident]
            if entry.shadowed is not None and entry.shadowed.state is not State.GONE:
                self.entries[entry.ident] = entry.shadowed
        entry.shadowed = None

    def _reap(self, entry: Entry) -> None:
        """Free the memory of a block that is gone, settled and held by nobody."""
        settled = entry.ticket <= self.tickets_settled
        if entry.state is State.GONE and settled and entry.allocation is not None and not self._held(entry):
            self._arena.release(entry.allocation, wipe=entry.tag != ZERO_DIGEST)
            entry.allocation, entry.spans = None, ()

    def wait_prefaulted(self, timeout_s: float | None) -> bool:
        """Wait until the memory was touched in advance (or that was given up); False when the deadline passed."""
        return self._prefault is None or self._prefault.wait(timeout_s)

    # --- progress ---------------------------------------------------------------------------------------------

    def wait_settled(self, ticket: int, timeout_s: float | None) -> bool:
        """Wait until every change up to ``ticket`` was settled."""
        with self.lock:
            self.flush_target = max(self.flush_target, ticket)
            self.changed.notify_all()
        return self.changed.wait_for(lambda: self.tickets_settled >= ticket, timeout_s)

    def take_dropped(self) -> int:
        """Blocks given up since the last call."""
        with self.lock:
            dropped, self.dropped_blocks = self.dropped_blocks, 0
            return dropped

    def usage(self) -> dict[str, int]:
        with self.lock:
            return {
                "capacity_bytes": self._arena.capacity_bytes,
                "free_bytes": self._arena.free_bytes,
                "dirty_bytes": self.dirty_bytes,
                "clean_blocks": len(self._clean),
                "visible_entries": len(self.entries),
            }
