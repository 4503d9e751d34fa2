"""Pins: leases of this process that keep blocks from being reclaimed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

PINNED_SHARE_MAX = 0.5
"""Pinned blocks are carried forward at reclaim, so they may take at most half of the room for segments."""


class PinTable:
    """Counts of leases by block. Thread-safe."""

    def __init__(self, room_bytes: int, size_of: Callable[[Sequence[bytes]], Sequence[int]]) -> None:
        self._lock = threading.Lock()
        self._leases: dict[bytes, int] = {}
        self._sizes: dict[bytes, int] = {}
        self._room_bytes = int(room_bytes * PINNED_SHARE_MAX)
        self._size_of = size_of

    def resize(self, room_bytes: int) -> None:
        """The room for segments has changed. Leases that are held stay, also beyond the share."""
        with self._lock:
            self._room_bytes = int(room_bytes * PINNED_SHARE_MAX)

    def hold(self, idents: Sequence[bytes], held: dict[bytes, None]) -> None:
        """Lease blocks, once each, and note them in ``held``, also when an interrupt ends this early.

        What would exceed the share (counted in whole records) is left out.
        """
        wanted = list(dict.fromkeys(idents))
        sizes = self._size_of(wanted)
        with self._lock:
            for ident, size_bytes in zip(wanted, sizes, strict=True):
                leases = self._leases.get(ident, 0)
                if not leases and sum(self._sizes.values()) + size_bytes > self._room_bytes:
                    continue
                self._sizes.setdefault(ident, size_bytes)
                self._leases[ident] = leases + 1  # no call between this and the next line
                held[ident] = None

    def release(self, held: dict[bytes, None]) -> None:
        with self._lock:
            for ident in held:
                self._leases[ident] -= 1
                if self._leases[ident] == 0:
                    del self._leases[ident], self._sizes[ident]

    @contextlib.contextmanager
    def held_still(self) -> Iterator[None]:
        """No lease begins or ends meanwhile: who asks whether a block is pinned here can act on the answer."""
        with self._lock:
            yield

    def __contains__(self, ident: bytes) -> bool:
        return ident in self._leases
