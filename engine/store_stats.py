"""What ``Store.stats`` tells: plain values for people and metrics. docs/metrics.md says what each means."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from .stats_file import StatsFile

if TYPE_CHECKING:
    from .core import Core

DAY_S = 86_400
_ERRORS = ("read", "no_space", "reclaim", "index_write", "catch_up", "heat_file", "stats_file")
"""Counters of errors, without ``_errors``."""
_RECLAIMED = (
    *("segments_retired", "segments_freed", "evicted_blocks", "reinserted_blocks", "reinserted_bytes"),
    *("reinsertions_called_off", "corrupt_reinsertions", "quota_evicted_blocks"),
)


def store_stats(core: Core) -> dict[str, Any]:
    """Counters and gauges of an open store as one nested mapping."""
    segments = core.segments.all()
    index_bytes = core.catalog.index.size_bytes()
    used = core.keeper.used_bytes() if not core.follower else core.segments.total_bytes()
    counters = core.counters.snapshot()
    io = {str(path): _counter_values(counter) for path, counter in core.device.counters().items()}
    return {
        "path": core.path,
        "store_uuid": core.superblock.store_uuid.hex(),
        "role": "follower" if core.follower else "writer",
        "failure": None if core.health.failure is None else str(core.health.failure),
        "open_s": time.monotonic() - core.counters.began_s,
        "capacity_bytes": core.config.capacity_bytes,
        "used_bytes": used + core.budget.fixed_bytes + index_bytes,
        "segments": {
            "count": len(segments),
            "sealed": sum(s.sealed for s in segments),
            "leaving": sum(s.retired_at_s is not None for s in segments),
            "bytes": sum(s.size_bytes for s in segments),
        },
        "index": {"size_bytes": index_bytes, "waiting_changes": core.catalog.waiting_changes},
        "buffer": core.buffer.usage(),
        "io_paths": {kind: str(path) for kind, path in core.device.paths().items()},
        "io": io,
        "gets": _gets(counters),
        "writes": _writes(core, counters, sum(path["write_bytes"] for path in io.values())),
        "reclaim": _reclaim(core, counters),
        "errors": {name: counters.get(f"{name}_errors", 0) for name in _ERRORS},
        "namespaces": _namespaces(core),
        "latency": core.counters.latency.snapshot(),
        "miss_ratio": _miss_ratio(core, counters),
        "decisions": core.counters.decisions.latest(),
        "counters": counters,
    }


def stats_file_of(core: Core) -> StatsFile | None:
    """Where an open store publishes its statistics; ``None`` for one whose index is in memory: it has no place for them set aside."""
    if core.config.index_kind == "memory":
        return None
    capacity_bytes = core.config.capacity_bytes
    return StatsFile(core.path, lambda: store_stats(core), core.counters, follower=core.follower, capacity_bytes=capacity_bytes)


def _gets(counters: dict[str, int]) -> dict[str, Any]:
    """What became of the blocks that were asked for. Where a block is dropped as corrupt or lost, it was asked for and not a hit."""
    hits = counters.get("buffer_hits", 0) + counters.get("disk_hits", 0)
    blocks = counters.get("get_blocks", 0)
    return {
        "blocks": blocks,
        "hits": hits,
        "hit_bytes": counters.get("buffer_hit_bytes", 0) + counters.get("disk_raw_bytes", 0),
        "misses": counters.get("misses", 0) + counters.get("lost_blocks", 0),
        "corrupt": counters.get("corrupt_reads", 0),
        "expired": counters.get("expired_blocks", 0),
        "wrong_size": counters.get("wrong_size_reads", 0),
        "hit_ratio": hits / blocks if blocks else None,
    }


def _writes(core: Core, counters: dict[str, int], segment_bytes: int) -> dict[str, Any]:
    """``segment_bytes``: all that was written into segments since opening, headers, padding, copies and seals included. The index is
    not: its log and its compaction add some per mille."""
    raw, stored = counters.get("written_raw_bytes", 0), counters.get("fresh_stored_bytes", 0)
    per_day = segment_bytes / max(1.0, time.monotonic() - core.counters.began_s) * DAY_S
    return {
        "segment_bytes": segment_bytes,
        "fresh_raw_bytes": raw,
        "fresh_stored_bytes": stored,
        "amplification": segment_bytes / stored if stored else None,
        "amplification_raw": segment_bytes / raw if raw else None,
        "bytes_per_day": per_day,
        "capacities_per_day": per_day / core.config.capacity_bytes,
    }


def _reclaim(core: Core, counters: dict[str, int]) -> dict[str, Any]:
    policy = None if core.follower else core.evictor.policy
    reinserts = policy is not None and core.config.reclaim_policy == "reinsertion"
    fixed_threshold = core.config.reinsert_hits_min if reinserts else None
    return {
        **{name: counters.get(name, 0) for name in _RECLAIMED},
        "policy": None if policy is None else policy.name,
        "threshold_hits": getattr(policy, "threshold_hits", fixed_threshold),
        "eviction_age_s": core.counters.eviction_ages.snapshot(),
    }


def _miss_ratio(core: Core, counters: dict[str, int]) -> dict[str, Any]:
    """See ``miss_ratio``: the curve over bytes as they are stored, by the compression of what was written since opening."""
    raw = counters.get("written_raw_bytes", 0)
    scale = counters.get("fresh_stored_bytes", 0) / raw if raw else 1.0
    return core.miss_ratio.curve(scale).facts()


def _namespaces(core: Core) -> dict[str, dict[str, Any]]:
    """By digest in hex: its counters, and its bytes in the log, exact once the segments that were there at opening are counted."""
    used, counted = core.usage.by_namespace(), core.counters.by_namespace()
    told: dict[str, dict[str, Any]] = {}
    for digest in sorted({*used, *counted}):
        state = core.namespaces.get(digest)
        model = None if state is None else state.descriptor.model
        told[digest.hex()] = {"model": model, "log_bytes": used.get(digest, 0), **counted.get(digest, {})}
    return told


def _counter_values(counter: Any) -> dict[str, int]:
    return {name: getattr(counter, name) for name in ("reads", "read_bytes", "writes", "write_bytes")}
