"""Prometheus metrics of stores: collectors for a host's own registry, and for the statistics that other processes publish.

Needs ``prometheus-client`` (the extra ``metrics``). Names and meanings are in ``names``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ...engine.stats_file import read_stats
from ...format.errors import KvlodeError
from .names import AGE, METRICS, STORE_LABELS, UP, Sample, Stats
from .names import Metric as Described

logger = logging.getLogger("kvlode")


class HasStats(Protocol):
    """A store of any kind (``DiskStore``, ``MemoryStore``, ``StoreSet``)."""

    def stats(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class _Source:
    """One process' word about one store."""

    labels: tuple[str, str, str]
    """Values of ``STORE_LABELS``."""
    up: bool
    age_s: float
    stats: Stats


class StoreCollector(Collector):
    """The metrics of a store that this process has open.

    ``REGISTRY.register(StoreCollector(store))``; a function that returns ``Store.stats()`` will do as well. Of a store set each store
    is told by itself. Each scrape calls ``stats()`` once. A store that was closed is told as ``kvlode_up 0`` from then on; take the
    collector out of the registry (``REGISTRY.unregister``) with it. Thread-safe.
    """

    def __init__(self, store: HasStats | Callable[[], Mapping[str, Any]]) -> None:
        self._stats: Callable[[], Mapping[str, Any]] = store if callable(store) else store.stats
        self._labels = [(str(getattr(store, "path", "")), "", "")]

    def collect(self) -> Iterator[Metric]:
        try:
            stats = self._stats()
        except KvlodeError as error:  # closed, or failing: the host's other metrics must be told all the same
            logger.info("a store tells no statistics: %s", error)
            return _families([_Source(labels, False, 0.0, {}) for labels in self._labels])
        told: Sequence[Stats] = stats.get("stores") or [stats]
        sources = [_Source(_labels(each, os.getpid()), not each.get("lost"), 0.0, {} if each.get("lost") else each) for each in told]
        self._labels = [source.labels for source in sources]
        return _families(sources)


class PublishedCollector(Collector):
    """The metrics of a store that other processes have open, from what they publish in its folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def collect(self) -> Iterator[Metric]:
        sources = []
        for published in read_stats(self._path):
            labels = _labels(published.stats, published.pid, str(self._path.absolute()))
            if published.running:
                sources.append(_Source(labels, True, published.age_s, published.stats))
            elif published.role == "writer":
                sources.append(_Source(labels, False, published.age_s, {}))
        if not any(source.labels[1] == "writer" for source in sources):
            sources.append(_Source((str(self._path.absolute()), "writer", ""), False, 0.0, {}))
        return _families(sources)


def _labels(stats: Stats, pid: int, path: str | None = None) -> tuple[str, str, str]:
    role = str(stats.get("role", "follower"))  # a store of a set that is lost has none
    return path or str(stats.get("path", "")), role, "" if role != "follower" else str(pid)


def _families(sources: Iterable[_Source]) -> Iterator[Metric]:
    """All metrics, each with the samples of all sources."""
    sources = list(sources)
    up = GaugeMetricFamily(UP.name, UP.help, labels=STORE_LABELS)
    age = GaugeMetricFamily(AGE.name, AGE.help, labels=STORE_LABELS)
    for source in sources:
        up.add_metric(source.labels, int(source.up))
        age.add_metric(source.labels, source.age_s)
    yield up
    yield age
    for described in METRICS:
        yield _family(described, sources)


def _family(described: Described, sources: Sequence[_Source]) -> Metric:
    labels = (*STORE_LABELS, *described.labels)
    samples: list[tuple[tuple[str, ...], Any]] = []
    for source in sources:
        samples += [((*source.labels, *own), value) for own, value in _read(described, source.stats)]
    if described.kind == "histogram":
        histogram = HistogramMetricFamily(described.name, described.help, labels=labels)
        for values, snapshot in samples:
            histogram.add_metric(values, _cumulative(snapshot["buckets"], described.bounds), snapshot["sum"])
        return histogram
    make = CounterMetricFamily if described.kind == "counter" else GaugeMetricFamily
    family = make(described.name, described.help, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _read(described: Described, stats: Stats) -> Iterable[Sample]:
    return described.read(stats) if stats else ()


def _cumulative(buckets: Sequence[Sequence[Any]], bounds: Sequence[float]) -> list[tuple[str, float]]:
    """Prometheus' buckets: how many observations were at most each bound."""
    counts: dict[Any, int] = {bucket[0]: bucket[1] for bucket in buckets}
    total, told = 0, []
    for end in (*bounds, None):
        total += counts.get(end, 0)
        told.append(("+Inf" if end is None else repr(end), float(total)))
    return told
