"""What ``Store.stats`` tells: plain values for people and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core import Core


def store_stats(core: Core) -> dict[str, Any]:
    """Counters and gauges of an open store as one nested mapping."""
    segments = core.segments.all()
    used = core.keeper.used_bytes() if not core.follower else core.segments.total_bytes()
    return {
        "path": core.path,
        "store_uuid": core.superblock.store_uuid.hex(),
        "role": "follower" if core.follower else "writer",
        "failure": None if core.health.failure is None else str(core.health.failure),
        "capacity_bytes": core.config.capacity_bytes,
        "used_bytes": used + core.budget.fixed_bytes + core.catalog.index.size_bytes(),
        "segments": {
            "count": len(segments),
            "sealed": sum(s.sealed for s in segments),
            "leaving": sum(s.retired_at_s is not None for s in segments),
            "bytes": sum(s.size_bytes for s in segments),
        },
        "index": {"size_bytes": core.catalog.index.size_bytes(), "waiting_changes": core.catalog.waiting_changes},
        "buffer": core.buffer.usage(),
        "io_paths": {kind: str(path) for kind, path in core.device.paths().items()},
        "io": {str(path): _counter_values(counter) for path, counter in core.device.counters().items()},
        "counters": core.counters.snapshot(),
    }


def _counter_values(counter: Any) -> dict[str, int]:
    return {name: getattr(counter, name) for name in ("reads", "read_bytes", "writes", "write_bytes")}
