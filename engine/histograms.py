"""Histograms with fixed buckets on a logarithmic scale: what took how long, how old blocks were when they were given up.

An observation is a search in a tuple of bounds and three additions under a lock of its own, some 0.4 us. Buckets never change, so that
histograms of several processes, or of two moments, may be added and subtracted.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def log_bounds(first: float, last: float, per_decade: int) -> tuple[float, ...]:
    """Upper bounds from ``first`` to ``last``, evenly spaced on a logarithmic scale, two digits each."""
    bounds: list[float] = []
    step = 0
    while not bounds or bounds[-1] < last:
        bounds.append(float(f"{first * 10 ** (step / per_decade):.2g}"))
        step += 1
    return tuple(bounds)


LATENCY_BOUNDS_S = log_bounds(1e-6, 100.0, 4)
"""From 1 us to 100 s, four buckets a factor of ten: a quantile is right within a factor of 1.8, and mostly much better."""
AGE_BOUNDS_S = log_bounds(1.0, 1e8, 3)
"""From a second to three years."""


class Histogram:
    """Counts of observations by bucket. Thread-safe; no lock is held for longer than three additions."""

    __slots__ = ("bounds", "_counts", "_sum", "_lock")

    def __init__(self, bounds: tuple[float, ...] = LATENCY_BOUNDS_S) -> None:
        self.bounds = bounds
        """Upper bounds of the buckets, each inclusive; one more bucket takes what lies above the last."""
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float, count: int = 1) -> None:
        """``count`` things had this value each."""
        bucket = bisect_left(self.bounds, value)
        with self._lock:
            self._counts[bucket] += count
            self._sum += value * count

    def observe_many(self, values: Iterable[float]) -> None:
        """Several things, each with a value of its own."""
        bounds = self.bounds
        buckets = [(bisect_left(bounds, value), value) for value in values]
        with self._lock:
            for bucket, value in buckets:
                self._counts[bucket] += 1
                self._sum += value

    def snapshot(self) -> dict[str, Any]:
        """Plain values: ``count``, ``sum``, ``p50``/``p90``/``p99``, and ``buckets`` as [upper bound, observations in it] without the empty
        ones. The bound of the last bucket is ``None``: it has no end."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        ends: list[float | None] = [*self.bounds, None]
        filled = [[end, count] for end, count in zip(ends, counts, strict=True) if count]
        quantiles = {f"p{share}": quantile(filled, share / 100, self.bounds) for share in (50, 90, 99)}
        return {"count": sum(counts), "sum": total, **quantiles, "buckets": filled}


def quantile(buckets: Sequence[Sequence[Any]], share: float, bounds: Sequence[float]) -> float | None:
    """The value that this share of the observations does not exceed, estimated by straight lines inside of buckets.

    ``buckets`` as ``Histogram.snapshot`` gives them. ``None`` without observations; the last bound for what lies above it.
    """
    wanted = share * sum(count for _, count in buckets)
    if not buckets or wanted <= 0:
        return None
    seen = 0
    for end, count in buckets:
        if seen + count >= wanted:
            if end is None:
                return bounds[-1]
            place = bisect_left(bounds, end)
            start = bounds[place - 1] if place else 0.0
            return float(min(end, start + (end - start) * (wanted - seen) / count))
        seen += count
    return bounds[-1]


LATENCIES = {
    "put": "a block taken into the buffer, from the call to ACCEPTED",
    "get_buffer": "a call whose blocks all came from the buffer (or were absent), from the call to its answer",
    "get_drive": "a call with blocks from the drive, from the call to its last answer",
    "get_drive_block": "a block from the drive, from its call to its delivery",
    "flush": "a flush of the host",
    "segment_write": "a write of records into a segment, from its start to the answer of the drive",
    "commit": "a group of writes made durable and indexed, from the end of the wait for the drive on",
    "reclaim_segment": "the freeing of a segment, from its choice until nothing in the index points into it",
}
"""What is timed, in seconds, and from when to when."""


class Latencies:
    """A histogram for each of ``LATENCIES``, in seconds."""

    def __init__(self) -> None:
        self._histograms: Mapping[str, Histogram] = {name: Histogram() for name in LATENCIES}

    def __getitem__(self, name: str) -> Histogram:
        return self._histograms[name]

    def observe(self, name: str, seconds: float, count: int = 1) -> None:
        """Something of this name took so long, ``count`` times."""
        self._histograms[name].observe(seconds, count)

    def snapshot(self) -> dict[str, Any]:
        """Plain values by name; see ``Histogram.snapshot``."""
        return {name: histogram.snapshot() for name, histogram in self._histograms.items()}
