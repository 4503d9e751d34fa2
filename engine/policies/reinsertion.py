"""Which blocks of a segment that is being freed are copied forward: small policies behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .interface import Candidate

REINSERTED_SHARE_MAX = 0.25
"""At most this share of a freed segment is written again, which bounds write amplification by 1 / (1 - 0.25) = 1.33."""


class ReinsertionPolicy(Protocol):
    def choose(self, candidates: Sequence[Candidate], segment_bytes: int) -> list[Candidate]:
        """The candidates to copy forward, in log order."""
        ...


class HitThreshold:
    """Blocks with at least ``hits_min`` uses are kept; when that is too much the threshold rises for this segment.

    Raising the threshold drops whole levels of use and keeps prefix chains closed, because a hit on a block credits its
    ancestors; cutting the list at a byte budget would tear chains and was measured to be no better than keeping nothing.
    """

    def __init__(self, hits_min: int) -> None:
        self._hits_min = hits_min

    def choose(self, candidates: Sequence[Candidate], segment_bytes: int) -> list[Candidate]:
        pinned = [candidate for candidate in candidates if candidate.pinned]
        if self._hits_min == 0:
            return pinned
        budget_bytes = int(segment_bytes * REINSERTED_SHARE_MAX)
        threshold = self._hits_min
        while True:
            kept = [c for c in candidates if c.pinned or c.hits >= threshold]
            optional_bytes = sum(c.stored_bytes for c in kept if not c.pinned)
            if optional_bytes <= budget_bytes:
                return kept
            threshold = min(c.hits for c in kept if not c.pinned and c.hits >= threshold) + 1
