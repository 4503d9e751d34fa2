"""What a store counts, times and remembers of its doings: plain integers with the glossary's names, histograms, decisions."""

from __future__ import annotations

import threading
import time
from collections import defaultdict

from .decisions import DecisionLog
from .histograms import AGE_BOUNDS_S, Histogram, Latencies


class Counters:
    """Named monotonic counters, of the store and of each namespace, and what goes with them.

    ``add`` is cheap and thread-safe; ``snapshot`` is a consistent copy.
    """

    def __init__(self, store: str = "") -> None:
        self._lock = threading.Lock()
        self._values: defaultdict[str, int] = defaultdict(int)
        self._by_namespace: defaultdict[bytes, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.began_s = time.monotonic()
        self.latency = Latencies()
        self.eviction_ages = Histogram(AGE_BOUNDS_S)
        """Seconds between the writing of a block and its end, of blocks that were given up to make room."""
        self.decisions = DecisionLog(store)

    def add(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._values[name] += amount

    def add_many(self, amounts: dict[str, int]) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._values[name] += amount

    def add_for(self, namespace: bytes, amounts: dict[str, int]) -> None:
        """Add to the counters of the store and to those of one namespace (by digest) alike."""
        with self._lock:
            own = self._by_namespace[namespace]
            for name, amount in amounts.items():
                self._values[name] += amount
                own[name] += amount

    def get(self, name: str) -> int:
        with self._lock:
            return self._values[name]

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(sorted(self._values.items()))

    def by_namespace(self) -> dict[bytes, dict[str, int]]:
        """Counters of each namespace that was used, by digest."""
        with self._lock:
            return {namespace: dict(sorted(values.items())) for namespace, values in self._by_namespace.items()}
