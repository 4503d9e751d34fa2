"""The metrics of a store: name, kind, what it means, and where in ``Store.stats()`` it is. Needs no Prometheus.

Names follow Prometheus' conventions: base units, units last, ``_total`` for counters. docs/metrics.md is compared with this table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ...engine.contract import Refusal
from ...engine.histograms import AGE_BOUNDS_S, LATENCIES, LATENCY_BOUNDS_S

Stats: TypeAlias = Mapping[str, Any]
Sample: TypeAlias = tuple[tuple[str, ...], Any]
"""Values of the metric's own labels, and the value (for a histogram what ``Histogram.snapshot`` gives)."""

STORE_LABELS = ("store", "role", "pid")
"""Every metric has these. ``pid`` is empty for a writer, of which a store has one: its series go on after a restart."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. ``read`` yields nothing where the statistics do not have it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...]
    read: Callable[[Stats], Iterator[Sample]]
    bounds: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets."""


def _at(*path: str) -> Callable[[Stats], Iterator[Sample]]:
    """A single number at this place of the statistics."""

    def read(stats: Stats) -> Iterator[Sample]:
        value: Any = stats
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            yield (), value

    return read


def _count(name: str) -> Callable[[Stats], Iterator[Sample]]:
    """A counter of the store, 0 before it first counted."""
    return lambda stats: iter([((), stats.get("counters", {}).get(name, 0))])


def _spaces(stats: Stats) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Namespaces and their counters; where those were cut short, the sums under an empty name."""
    spaces = stats.get("namespaces")
    yield from spaces.items() if spaces else [("", stats.get("counters", {}))]


def _by_namespace(*names: str) -> Callable[[Stats], Iterator[Sample]]:
    """The sum of these counters of each namespace."""
    return lambda stats: (((space,), sum(counts.get(name, 0) for name in names)) for space, counts in _spaces(stats))


def _by_source(buffer: str, drive: str) -> Callable[[Stats], Iterator[Sample]]:
    """Two counters of each namespace: what the buffer served, and the drive."""

    def read(stats: Stats) -> Iterator[Sample]:
        for space, counts in _spaces(stats):
            yield (space, "buffer"), counts.get(buffer, 0)
            yield (space, "drive"), counts.get(drive, 0)

    return read


def _log_bytes(stats: Stats) -> Iterator[Sample]:
    for space, counts in (stats.get("namespaces") or {}).items():
        yield (space, counts.get("model") or ""), counts.get("log_bytes", 0)


def _io(of_reads: str, of_writes: str) -> Callable[[Stats], Iterator[Sample]]:
    def read(stats: Stats) -> Iterator[Sample]:
        for path, counts in stats.get("io", {}).items():
            yield (path, "read"), counts[of_reads]
            yield (path, "write"), counts[of_writes]

    return read


def _refusals(stats: Stats) -> Iterator[Sample]:
    for name in (reason.name.lower() for reason in Refusal):
        yield (name,), stats.get("counters", {}).get(f"refused_{name}", 0)


def _errors(stats: Stats) -> Iterator[Sample]:
    return (((kind,), count) for kind, count in stats.get("errors", {}).items())


def _segments(stats: Stats) -> Iterator[Sample]:
    segments = stats.get("segments")
    if segments is not None:
        yield ("sealed",), segments["sealed"] - segments["leaving"]
        yield ("open",), segments["count"] - segments["sealed"]
        yield ("leaving",), segments["leaving"]


def _failed(stats: Stats) -> Iterator[Sample]:
    yield (), int(stats.get("failure") is not None)


def _gauge(name: str, meaning: str, *path: str) -> Metric:
    return Metric(name, "gauge", meaning, (), _at(*path))


def _counter(name: str, meaning: str, counter: str) -> Metric:
    return Metric(name, "counter", meaning, (), _count(counter))


def _of_namespace(name: str, meaning: str, *counters: str) -> Metric:
    return Metric(name, "counter", meaning, ("namespace",), _by_namespace(*counters))


def _latency(name: str, meaning: str) -> Metric:
    return Metric(f"kvlode_{name}_seconds", "histogram", f"Time of {meaning}.", (), _at("latency", name), LATENCY_BOUNDS_S)


METRICS: tuple[Metric, ...] = (
    # what is there
    _gauge("kvlode_open_seconds", "Time since the store was opened.", "open_s"),
    Metric("kvlode_failed", "gauge", "1 when the store has latched a failure and writes no more until it is reopened.", (), _failed),
    _gauge("kvlode_capacity_bytes", "What the store may take of its drive.", "capacity_bytes"),
    _gauge("kvlode_used_bytes", "What it takes: segments, index and what is set aside.", "used_bytes"),
    Metric("kvlode_segments", "gauge", "Segments by state: sealed, open, leaving (freed, still with a file).", ("state",), _segments),
    _gauge("kvlode_segments_size_bytes", "Bytes of segment files, preallocated ones as a whole.", "segments", "bytes"),
    _gauge("kvlode_index_size_bytes", "Bytes of the index on the drive.", "index", "size_bytes"),
    _gauge("kvlode_index_waiting_changes", "Changes that the index has not taken yet.", "index", "waiting_changes"),
    _gauge("kvlode_buffer_capacity_bytes", "Bytes of the buffer.", "buffer", "capacity_bytes"),
    _gauge("kvlode_buffer_free_bytes", "Bytes of the buffer that hold no block.", "buffer", "free_bytes"),
    _gauge("kvlode_buffer_dirty_bytes", "Bytes of blocks that are not durable yet.", "buffer", "dirty_bytes"),
    _gauge("kvlode_buffer_clean_blocks", "Durable blocks that the buffer can serve.", "buffer", "clean_blocks"),
    Metric("kvlode_namespace_log_bytes", "gauge", "Bytes of a namespace's records in the log.", ("namespace", "model"), _log_bytes),
    # throughput
    _of_namespace("kvlode_puts_total", "Blocks taken in.", "put_blocks"),
    _of_namespace("kvlode_put_bytes_total", "Bytes of blocks taken in.", "put_bytes"),
    Metric("kvlode_puts_refused_total", "counter", "Blocks refused, by reason.", ("reason",), _refusals),
    _of_namespace("kvlode_gets_total", "Blocks asked for.", "get_blocks"),
    Metric("kvlode_hits_total", "counter", "Blocks served, by source.", ("namespace", "source"), _by_source("buffer_hits", "disk_hits")),
    Metric(
        "kvlode_hit_bytes_total",
        "counter",
        "Bytes served, by source.",
        ("namespace", "source"),
        _by_source("buffer_hit_bytes", "disk_raw_bytes"),
    ),
    _of_namespace("kvlode_misses_total", "Blocks asked for that are not stored (any more).", "misses", "lost_blocks"),
    _of_namespace("kvlode_expired_total", "Blocks asked for whose time to live had passed.", "expired_blocks"),
    _of_namespace("kvlode_corrupt_total", "Blocks asked for that are damaged on the drive.", "corrupt_reads"),
    _of_namespace("kvlode_wrong_size_total", "Blocks asked for with a destination of another size.", "wrong_size_reads"),
    _of_namespace("kvlode_deleted_total", "Blocks deleted by the host.", "deleted_blocks"),
    Metric(
        "kvlode_io_bytes_total",
        "counter",
        "Bytes of segment files moved, by path and direction.",
        ("path", "direction"),
        _io("read_bytes", "write_bytes"),
    ),
    Metric("kvlode_io_operations_total", "counter", "Reads and writes of segment files.", ("path", "direction"), _io("reads", "writes")),
    _counter("kvlode_syncs_total", "Syncs of segment files that made blocks durable.", "syncs"),
    # reclaim, age, write amplification
    _counter("kvlode_segments_freed_total", "Segments given up to make room.", "segments_retired"),
    _counter("kvlode_evicted_blocks_total", "Blocks given up with them.", "evicted_blocks"),
    _counter("kvlode_reinserted_blocks_total", "Blocks copied forward instead.", "reinserted_blocks"),
    _counter("kvlode_reinserted_bytes_total", "Stored bytes copied forward.", "reinserted_bytes"),
    _counter("kvlode_quota_evicted_blocks_total", "Blocks given up for a quota of their namespace.", "quota_evicted_blocks"),
    _gauge("kvlode_reclaim_threshold_hits", "Hits from which blocks are copied forward now.", "reclaim", "threshold_hits"),
    Metric(
        "kvlode_eviction_age_seconds",
        "histogram",
        "Time between the put of a block and its end, of blocks given up to make room.",
        (),
        _at("reclaim", "eviction_age_s"),
        AGE_BOUNDS_S,
    ),
    _counter("kvlode_fresh_raw_bytes_total", "Bytes of new blocks made durable, as put.", "written_raw_bytes"),
    _counter("kvlode_fresh_stored_bytes_total", "Bytes of new blocks made durable, as stored.", "fresh_stored_bytes"),
    _gauge(
        "kvlode_write_amplification_ratio",
        "Bytes written into segments by stored bytes of new blocks, since opening.",
        "writes",
        "amplification",
    ),
    # drive wear
    _counter("kvlode_segments_written_total", "Segments begun.", "segments_opened"),
    _gauge("kvlode_drive_bytes_per_day", "Bytes written into segments since opening, scaled to a day.", "writes", "bytes_per_day"),
    _gauge("kvlode_drive_writes_per_day", "The same in capacities of the store.", "writes", "capacities_per_day"),
    # errors
    Metric("kvlode_errors_total", "counter", "Errors of the drive and the file system, by what they hindered.", ("kind",), _errors),
    _counter("kvlode_index_rebuilds_total", "Indexes derived again from the segments.", "index_rebuilds"),
    _counter("kvlode_damaged_segments_total", "Segments with a table of contents that recovery could not read.", "damaged_segments"),
    *(_latency(name, meaning) for name, meaning in LATENCIES.items()),
)

UP = Metric("kvlode_up", "gauge", "1 when the process that tells this is there.", (), lambda _: iter(()))
AGE = Metric("kvlode_stats_age_seconds", "gauge", "Age of what is told; 0 for a store of the same process.", (), lambda _: iter(()))
ALL_METRICS = (UP, AGE, *METRICS)
