"""What a store's hits are measured against on the same trace: caches of single blocks (see ``references``)."""

from __future__ import annotations

from collections.abc import Callable

from .references import belady, object_lru
from .traces import Trace


def bounds_of(trace: Trace, capacity_blocks: int, advance: Callable[[int], None] = lambda requests: None) -> dict[str, dict[str, float]]:
    """Hit ratios of ``lru`` and ``belady`` with so many blocks, every new block taken in. ``advance`` is told the requests of each.

    No cache of this size has more block hits than ``belady``; as a prefix hit is a block hit, no store has more prefix hits than that.
    """
    bounds = {}
    for name, play in (("lru", object_lru), ("belady", belady)):
        outcome = play(trace.requests, capacity_blocks)
        bounds[name] = {"prefix_hit_ratio": outcome.prefix_hit_ratio, "block_hit_ratio": outcome.block_hit_ratio}
        advance(len(trace.requests))
    return bounds
