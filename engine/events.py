"""What became of blocks, for hosts that keep an account of what a store holds (a router, vLLM's ``take_events``).

A block is *stored* when it is durable, and *removed* when it was deleted, reclaimed or found damaged; a namespace is *cleared*
by a drop. A block whose time to live has passed is removed by reclaim, later. Copies that reclaim makes are no events, but
for one that it had given up before it was in the log: that block is *stored* again.
"""

from __future__ import annotations

import enum
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..format.errors import InvalidConfig

EVENTS_KEPT_KEYS = 1 << 16
"""Keys of events that are remembered. Whoever asks less often than this many blocks come and go is told that he missed some."""


class EventKind(enum.StrEnum):
    """What happened."""

    STORED = "stored"
    REMOVED = "removed"
    CLEARED = "cleared"


@dataclass(frozen=True, slots=True)
class StoreEvent:
    """One thing that happened to some blocks of one namespace, in this order."""

    kind: EventKind
    namespace: bytes
    """Digest of the namespace (``BlockSpace.digest``)."""
    keys: Sequence[bytes]
    """Empty for ``CLEARED``."""


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Answer of ``Store.events``."""

    events: Sequence[StoreEvent]
    next: object
    """Where to go on: the ``since`` of the next call. Opaque, and good for this opening of the store alone."""
    missed: bool
    """Older events were forgotten before they were asked for: what the host believes of the store may be wrong."""


class EventLog:
    """The latest events, numbered. Thread-safe; adding costs no more than a list."""

    def __init__(self, kept_keys_max: int = EVENTS_KEPT_KEYS) -> None:
        self._kept_keys_max = kept_keys_max
        self._lock = threading.Lock()
        self._events: deque[StoreEvent] = deque()
        self._kept_keys = 0
        self._first = 0
        """Number of the oldest event that is remembered."""

    def add(self, kind: EventKind, idents: Sequence[bytes]) -> None:
        """``idents``: namespace digest + key of each block, in order; for ``CLEARED`` just digests."""
        runs: list[tuple[bytes, list[bytes]]] = []
        for ident in idents:
            namespace, key = ident[:16], ident[16:]
            if not runs or runs[-1][0] != namespace:
                runs.append((namespace, []))
            if key:
                runs[-1][1].append(key)
        with self._lock:
            for namespace, keys in runs:
                self._events.append(StoreEvent(kind, namespace, tuple(keys)))
                self._kept_keys += 1 + len(keys)
            while self._kept_keys > self._kept_keys_max and len(self._events) > 1:
                self._kept_keys -= 1 + len(self._events.popleft().keys)
                self._first += 1

    def batch(self, since: object) -> EventBatch:
        """See ``Store.events``. Raises ``InvalidConfig`` for a place that no call gave."""
        if since is not None and not isinstance(since, int):
            raise InvalidConfig("events cannot be told from there", expected="None, or the next of an earlier answer", actual=repr(since))
        return EventBatch(*self.since(since or 0))

    def since(self, number: int) -> tuple[list[StoreEvent], int, bool]:
        """The events from ``number`` on, the number after them, and whether some before them are forgotten."""
        with self._lock:
            end = self._first + len(self._events)
            wanted = end - max(number, self._first)
            events = list(self._events)[len(self._events) - wanted :] if wanted > 0 else []
            return events, end, number < self._first
