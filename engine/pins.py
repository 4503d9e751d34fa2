"""Pins: leases of this process that keep blocks from being reclaimed."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence

PINNED_SHARE_MAX = 0.5
"""Pinned blocks are carried forward at reclaim, so they may take at most half of the store."""


class PinTable:
    """Counts of leases by block. Thread-safe."""

    def __init__(self, capacity_bytes: int, size_of: Callable[[Sequence[bytes]], Sequence[int]]) -> None:
        self._lock = threading.Lock()
        self._leases: Counter[bytes] = Counter()
        self._sizes: dict[bytes, int] = {}
        self._room_bytes = int(capacity_bytes * PINNED_SHARE_MAX)
        self._size_of = size_of

    def hold(self, idents: Sequence[bytes]) -> list[bytes]:
        """Lease blocks; returns those held, in order. What would exceed the share (counted in stored bytes) is left out."""
        sizes = self._size_of(idents)
        held = []
        with self._lock:
            for ident, size_bytes in zip(idents, sizes, strict=True):
                if ident not in self._leases:
                    if sum(self._sizes.values()) + size_bytes > self._room_bytes:
                        continue
                    self._sizes[ident] = size_bytes
                self._leases[ident] += 1
                held.append(ident)
        return held

    def release(self, idents: Sequence[bytes]) -> None:
        with self._lock:
            for ident in idents:
                self._leases[ident] -= 1
                if self._leases[ident] == 0:
                    del self._leases[ident], self._sizes[ident]

    def __contains__(self, ident: bytes) -> bool:
        return ident in self._leases
