"""Calls that are timed one by one, from one thread or from many at once, and the lines of the report made of them."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from .figures import Item, value_item
from .read_arms import warm


@dataclass(frozen=True, slots=True)
class Calls:
    """Some calls: how long all of them took, and each."""

    seconds: float
    """From the first to the end of the last."""
    calls_ms: Sequence[float]

    def percentile_ms(self, percent: float) -> float:
        return float(np.percentile(self.calls_ms, percent))


def one_by_one(numbers: Sequence[int], call: Callable[[int], None], *, between: Callable[[int], None] | None = None) -> Calls:
    """``call`` for each number. ``between`` follows each call and is not counted."""
    calls_ms: list[float] = []
    for number in numbers:
        started = time.perf_counter()
        call(number)
        calls_ms.append((time.perf_counter() - started) * 1e3)
        if between is not None:
            between(number)
    return Calls(sum(calls_ms) / 1e3, calls_ms)


def side_by_side(thread_count: int, numbers: Sequence[int], call: Callable[[int], None]) -> Calls:
    """``call`` for each number, by so many threads at once: thread ``t`` takes every ``thread_count``-th from the ``t``-th on.

    Raises what a call raises.
    """
    together = threading.Barrier(thread_count + 1)

    def work(part: Sequence[int]) -> Sequence[float]:
        together.wait()
        return one_by_one(part, call).calls_ms

    with ThreadPoolExecutor(thread_count) as pool:
        futures = [pool.submit(work, numbers[thread::thread_count]) for thread in range(thread_count)]
        together.wait()
        started = time.perf_counter()
        done = [future.result() for future in futures]
        seconds = time.perf_counter() - started
    return Calls(seconds, [call_ms for part in done for call_ms in part])


class Figures:
    """Values of each round under the names of the items they belong to, and the first reason why something must not be used."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}
        self._facts: dict[str, dict[str, list[Any]]] = {}
        self._units: dict[str, str] = {}
        self._voids: dict[str, str] = {}

    def add(self, name: str, unit: str, value: float, **facts: Any) -> None:
        """One round's value; ``facts`` are given as their medians."""
        self._units[name] = unit
        self._values.setdefault(name, []).append(value)
        for fact, amount in facts.items():
            self._facts.setdefault(name, {}).setdefault(fact, []).append(amount)

    def add_calls(self, name: str, unit: str, value: float, calls: Calls, **facts: Any) -> None:
        """The same, with how long a call took among the facts."""
        self.add(name, unit, value, p50_ms=calls.percentile_ms(50), p99_ms=calls.percentile_ms(99), worst_ms=max(calls.calls_ms), **facts)

    def check(self, name: str, correct: int, expected: int) -> None:
        """Void a figure where not everything came back as it must."""
        if correct != expected:
            self._voids.setdefault(name, f"{correct} of {expected} came back as they must")

    def check_cold(self, name: str, read_bytes: int, stored_bytes: int) -> None:
        """Void a figure of cold reads where the drive did not deliver all that was read."""
        void = warm(read_bytes, stored_bytes)
        if void is not None:
            self._voids.setdefault(name, void)

    def items(self, **facts: Any) -> list[Item]:
        """One for each name, in the order in which they were first added; ``facts`` belong to all of them."""
        return [
            value_item(name, values, unit=self._units[name], bar=None, facts=facts | self._facts_of(name), void=self._voids.get(name))
            for name, values in self._values.items()
        ]

    def _facts_of(self, name: str) -> dict[str, Any]:
        return {fact: statistics.median(amounts) for fact, amounts in self._facts.get(name, {}).items()}
