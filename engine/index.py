"""The index: which record holds a key. A protocol; RocksDB and an in-memory twin implement it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from ..format.errors import KvlodeError

BATCH_ENTRIES_MAX = 1000
"""Entries of one ``apply``: RocksDB's binding holds the interpreter lock for the whole batch."""


class IndexWriteError(KvlodeError):
    """The index refused a batch; nothing of it was applied, and the same batch may be tried again later."""


class IndexDamaged(KvlodeError):
    """The index cannot be read or opened. It is derived data: set it aside and rebuild it from the segments."""


class Index(Protocol):
    """An ordered map of short byte strings with atomic batches; derived data, may be lost at any time.

    Keys are ``namespace digest (16 bytes) + block key``; keys that begin with 16 zero bytes are the store's own
    (checkpoint, drop floors). Only the commit thread mutates; any thread may read. Every method but ``close`` and
    ``damaged`` raises ``StoreClosed`` after ``close`` and in a forked child.
    """

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Values in the order of the keys. A key that cannot be read is reported as absent and counted in ``damaged``."""
        ...

    def apply(self, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes] = ()) -> None:
        """Apply one atomic batch (at most ``BATCH_ENTRIES_MAX`` entries in all), deletes after puts.

        Raises ``IndexWriteError``; nothing was applied then.
        """
        ...

    def sync(self) -> None:
        """Make every applied batch durable. Raises ``IndexWriteError`` when that is not certain."""
        ...

    def open_anew(self) -> None:
        """After a ``sync`` that failed: close and open. Batches applied since the last good ``sync`` may be gone, the latest first.

        Reads wait meanwhile. Raises ``IndexWriteError`` when this is not possible now; then what was there can still be read, as
        far as it is readable, and a later call may succeed. Called by the thread that mutates.
        """
        ...

    def scan(self, prefix: bytes = b"", start: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Entries whose key begins with ``prefix``, from ``start`` on, in order. Raises ``IndexDamaged`` instead of ending early.

        The entries are those of one moment: batches applied during the scan are not seen. A scan does not hold ``close``
        up: going on after it raises ``StoreClosed``. One thread at a time may use a scan.
        """
        ...

    def size_bytes(self) -> int:
        """Bytes on disk, estimated."""
        ...

    def readable(self) -> bool:
        """False while it could not be opened again: every key then reads as absent."""
        ...

    def damaged(self) -> int:
        """Reads that failed a check since open; above 0 the index should be rebuilt."""
        ...

    def close(self) -> None:
        """Wait for running calls, then close. Closing twice is allowed."""
        ...
