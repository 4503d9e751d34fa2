"""Blocks that LMCache wants kept until it says otherwise: what both LMCache adapters share."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from .attached import QuietSpace

LEASE_S = 300.0
"""Nobody loads for longer than this. LMCache forgets locks when a request fails, and what it forgets must not be kept for ever."""


@dataclass(slots=True)
class _Lease:
    held: contextlib.ExitStack
    waiting: int
    """Keys of it that were not given back."""
    until_s: float


class Leases:
    """Pinned blocks under the engine's own names (hashable), each as often as it was asked for. Thread-safe.

    The blocks of one call are one lease: the first of them may be kept until the last is given back, or until ``lease_s`` is over.
    """

    def __init__(self, lease_s: float = LEASE_S) -> None:
        self._lease_s = lease_s
        self._lock = threading.Lock()
        self._by_name: dict[Hashable, deque[_Lease]] = {}
        self._all: dict[int, _Lease] = {}
        self._closed = False

    def hold(self, space: QuietSpace, keys: Sequence[bytes], names: Sequence[Hashable]) -> None:
        """Keep blocks from being reclaimed. Asks the index how long they are; after ``close`` it keeps nothing."""
        if not keys:
            return
        held = contextlib.ExitStack()
        held.enter_context(space.pin(keys))
        lease = _Lease(held, len(keys), time.monotonic() + self._lease_s)
        with self._lock:
            if not self._closed:
                self._all[id(lease)] = lease
                for name in names:
                    self._by_name.setdefault(name, deque()).append(lease)
                return
        held.close()

    def give_back(self, name: Hashable) -> bool:
        """One time less; False when nobody kept it (any more)."""
        with self._lock:
            leases = self._by_name.get(name)
            if not leases:
                return False
            lease = leases.popleft()
            if not leases:
                del self._by_name[name]
            lease.waiting -= 1
            if lease.waiting:
                return True
            self._all.pop(id(lease), None)
        lease.held.close()
        return True

    def is_held(self, name: Hashable) -> bool:
        return name in self._by_name

    def end_late(self) -> int:
        """Give back what was kept for longer than ``lease_s``; how many leases."""
        now_s = time.monotonic()
        with self._lock:
            late = [lease for lease in self._all.values() if lease.until_s <= now_s]
        return self._end(late)

    def close(self) -> None:
        """Give back everything, and keep nothing from now on."""
        with self._lock:
            self._closed = True
            left = list(self._all.values())
        self._end(left)

    def _end(self, over: Sequence[_Lease]) -> int:
        if not over:
            return 0
        ids = {id(lease) for lease in over}
        with self._lock:
            ended = [self._all.pop(number) for number in ids if number in self._all]
            for name, leases in list(self._by_name.items()):
                kept = deque(lease for lease in leases if id(lease) not in ids)
                if kept:
                    self._by_name[name] = kept
                else:
                    del self._by_name[name]
        for lease in ended:
            lease.held.close()
        return len(ended)

    def __len__(self) -> int:
        """Blocks that are kept."""
        return len(self._by_name)
