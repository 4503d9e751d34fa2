"""The two plain orders of giving segments up: oldest first, and least recently used first. Neither writes anything twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .interface import Candidate, SegmentFacts


class SegmentFifo:
    """The oldest segment goes, with everything in it but pinned blocks."""

    name = "fifo"

    def victim(self, segments: Sequence[SegmentFacts]) -> int:
        return 0

    def choose(self, candidates: Sequence[Candidate], segment_bytes: int) -> list[Candidate]:
        return [candidate for candidate in candidates if candidate.pinned]

    def facts(self) -> Mapping[str, float]:
        return {}


class SegmentLru(SegmentFifo):
    """The segment goes whose blocks were not used for the longest time; the older of two that are equal.

    Navy's order for regions, here for comparison: one warm block keeps a whole cold segment, and in replays of chat it loses to FIFO.
    """

    name = "segment-lru"

    def victim(self, segments: Sequence[SegmentFacts]) -> int:
        return min(range(len(segments)), key=lambda position: segments[position].last_used_s)
