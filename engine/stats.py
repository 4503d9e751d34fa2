"""Counters of a store: plain integers with the glossary's names, added up under one lock."""

from __future__ import annotations

import threading
from collections import defaultdict


class Counters:
    """Named monotonic counters. ``add`` is cheap and thread-safe; ``snapshot`` is a consistent copy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: defaultdict[str, int] = defaultdict(int)

    def add(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._values[name] += amount

    def add_many(self, amounts: dict[str, int]) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._values[name] += amount

    def get(self, name: str) -> int:
        with self._lock:
            return self._values[name]

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(sorted(self._values.items()))
