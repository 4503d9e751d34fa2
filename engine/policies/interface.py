"""The questions that reclaim and puts ask a policy, and what it is told. Pure: no clock, no I/O, no locks of the store.

The store and ``kvlode replay`` ask the same objects, so that what a replay shows is what a store does. Times are seconds of
one monotonic clock (in a replay that of the trace).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SegmentFacts:
    """A sealed segment that could be freed."""

    segment_id: int
    """Grows with the time of writing."""
    size_bytes: int
    fresh_bytes: int
    """Of blocks that were put; the rest was copied forward."""
    last_used_s: float
    """When one of its blocks was used last; when it was sealed, before the first use."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A live block of the segment that is being freed."""

    position: int
    """Row of the segment's table of contents."""
    ident: bytes
    """Namespace digest (16 bytes) and key."""
    stored_bytes: int
    hits: int
    """Uses since it was written last, of its descendants too; halved whenever it was copied forward; at most 255."""
    pinned: bool
    depth: int = 0
    """Place in its prefix chain, from 0; -1 where it is not known."""
    age_s: float = 0.0
    """Since the block was put (not since it was copied)."""
    idle_s: float = 0.0
    """Since its last use, or since it was put."""
    parent_hits: int = 0
    """``hits`` of the parent, now: tells whether the chain that the block ends is alive."""


class ReclaimPolicy(Protocol):
    """Which segment goes, and what of it stays. Asked by one thread."""

    name: str

    def victim(self, segments: Sequence[SegmentFacts]) -> int:
        """Index of the segment to free next. ``segments`` is not empty and goes from the oldest to the newest."""
        ...

    def choose(self, candidates: Sequence[Candidate], segment_bytes: int) -> list[Candidate]:
        """What to copy forward, in log order: all pinned blocks at least. Asked once for each victim, so it may learn from it."""
        ...

    def facts(self) -> Mapping[str, float]:
        """What it goes by at the moment, for statistics; ``threshold`` among them where there is one. Any thread."""
        ...


class AdmissionPolicy(Protocol):
    """Whether a new block is worth writing. Thread-safe."""

    name: str

    def admit(self, key_hash: int, size_bytes: int, now_s: float, *, filled: bool) -> bool:
        """``key_hash``: 64 bits of the block's ident; ``filled``: whether the store has had to free a segment once."""
        ...
