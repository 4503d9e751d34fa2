"""The index in memory: the twin that tests, simulation and the in-memory store use instead of RocksDB."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterator, Sequence

from ..format.errors import StoreClosed
from .index import BATCH_ENTRIES_MAX, IndexWriteError

Batch = tuple[tuple[tuple[bytes, bytes], ...], tuple[bytes, ...]]
"""Puts and deletes of one ``apply``."""


def _play(entries: dict[bytes, bytes], batch: Batch) -> None:
    puts, deletes = batch
    entries.update(puts)
    for key in deletes:
        entries.pop(key, None)


class MemoryIndex:
    """``Index`` over a dictionary that remembers what was synced; any thread may call any method.

    ``crash`` gives the index that a process would find after a power cut, as RocksDB would: everything synced, and of
    the batches since then a prefix in commit order.
    """

    def __init__(self, entries: dict[bytes, bytes] | None = None) -> None:
        self._lock = threading.Lock()
        self._entries = dict(entries or {})
        self._order: list[bytes] | None = None
        self._durable = dict(self._entries)
        self._unsynced: list[Batch] = []
        self._failures: list[Exception] = []
        self._failing_syncs = 0
        self._broken = False
        self._unreadable: set[bytes] = set()
        self._damaged = 0
        self._closed = False

    # --- the protocol ---------------------------------------------------------------------------------------------

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        with self._lock:
            self._check_open()
            if not self._unreadable:
                return [self._entries.get(key) for key in keys]
            bad = [key in self._unreadable for key in keys]
            self._damaged += sum(bad)
            return [None if is_bad else self._entries.get(key) for key, is_bad in zip(keys, bad, strict=True)]

    def apply(self, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes] = ()) -> None:
        if len(puts) + len(deletes) > BATCH_ENTRIES_MAX:
            raise ValueError(f"{len(puts) + len(deletes)} entries in one batch; at most {BATCH_ENTRIES_MAX} are allowed")
        batch = (tuple(puts), tuple(deletes))
        with self._lock:
            self._check_open()
            if self._failures:
                raise self._failures.pop(0)
            self._check_not_broken()
            _play(self._entries, batch)
            self._unsynced.append(batch)
            self._order = None

    def sync(self) -> None:
        with self._lock:
            self._check_open()
            self._check_not_broken()
            if self._failing_syncs:
                self._failing_syncs -= 1
                self._broken = True
                self._check_not_broken()
            for batch in self._unsynced:
                _play(self._durable, batch)
            self._unsynced.clear()

    def open_anew(self) -> None:
        """The worst case: nothing of what was not synced is there."""
        with self._lock:
            self._check_open()
            self._entries, self._order, self._broken = dict(self._durable), None, False
            self._unsynced.clear()

    def scan(self, prefix: bytes = b"", start: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        with self._lock:
            self._check_open()
            if self._order is None:
                self._order = sorted(self._entries)
            order = self._order
            first = bisect.bisect_left(order, prefix if start is None else max(prefix, start))
            found: list[tuple[bytes, bytes]] = []
            for position in range(first, len(order)):
                if not order[position].startswith(prefix):
                    break
                found.append((order[position], self._entries[order[position]]))
        return iter(found)

    def size_bytes(self) -> int:
        """As if each entry were stored once, plainly."""
        with self._lock:
            self._check_open()
            return sum(len(key) + len(value) for key, value in self._entries.items())

    def readable(self) -> bool:
        return True

    def damaged(self) -> int:
        return self._damaged

    def close(self) -> None:
        """A clean close makes everything durable, as RocksDB's does."""
        with self._lock:
            if self._closed:
                return
            for batch in self._unsynced:
                _play(self._durable, batch)
            self._unsynced.clear()
            self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosed("index used after close", action="Open the store again.")

    def _check_not_broken(self) -> None:
        if self._broken:
            raise IndexWriteError("the index writes nothing after a failed sync", actual="a failure injected by a test")

    # --- for tests and simulation -----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def unsynced_batches(self) -> int:
        """Batches that a crash may lose."""
        return len(self._unsynced)

    def crash(self, keep_batches: int = 0) -> MemoryIndex:
        """What is found after a crash that kept the first ``keep_batches`` of the unsynced batches; this index stays usable."""
        with self._lock:
            if not 0 <= keep_batches <= len(self._unsynced):
                raise ValueError(f"keep_batches is {keep_batches}; {len(self._unsynced)} batches are not synced")
            entries = dict(self._durable)
            for batch in self._unsynced[:keep_batches]:
                _play(entries, batch)
        return MemoryIndex(entries)

    def reopen(self) -> MemoryIndex:
        """What is found after ``close``."""
        with self._lock:
            return MemoryIndex(self._durable if self._closed else self._entries)

    def fail_next_apply(self, error: Exception | None = None, times: int = 1) -> None:
        """Make the next ``times`` calls of ``apply`` raise; nothing is applied then."""
        with self._lock:
            self._failures += [error or IndexWriteError("index refused a batch", actual="a failure injected by a test")] * times

    def fail_next_sync(self, times: int = 1) -> None:
        """Make the next ``times`` syncs fail; as with RocksDB, nothing can be written after one until ``open_anew``."""
        with self._lock:
            self._failing_syncs += times

    def damage(self, keys: Sequence[bytes]) -> None:
        """Make lookups of these keys fail a check: they read as absent and are counted, as a damaged SST does."""
        with self._lock:
            self._unreadable.update(keys)
