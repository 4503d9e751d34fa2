"""Oldest first, but what was used is copied forward: the default of a store."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ...format.errors import InvalidConfig
from .fifo import SegmentFifo
from .interface import Candidate
from .write_allowance import WriteAllowance, closed_choice

HITS_MIN = 2
WRITE_AMPLIFICATION_MAX = 1.15


class Reinsertion(SegmentFifo):
    """Blocks with at least ``hits_min`` uses since they were written last go forward, with their uses halved.

    A use counts for all ancestors, so blocks with as many uses or more are whole chains from their heads on. Where the copies of a victim
    would take write amplification over its maximum, the threshold is higher for that victim. Navy (CacheLib) calls it hits-based
    reinsertion.
    """

    name = "reinsertion"

    def __init__(self, hits_min: int = HITS_MIN, write_amplification_max: float = WRITE_AMPLIFICATION_MAX) -> None:
        if hits_min < 1:
            raise InvalidConfig(
                "reinsertion with a threshold that everything reaches",
                expected="hits_min >= 1",
                actual=hits_min,
                action="Take the policy 'fifo' where nothing is to be copied forward.",
            )
        self._hits_min = hits_min
        self._allowance = WriteAllowance(write_amplification_max)
        self._threshold = float(hits_min)

    def choose(self, candidates: Sequence[Candidate], segment_bytes: int) -> list[Candidate]:
        bytes_max = self._allowance.earn(segment_bytes)
        kept, self._threshold = closed_choice(candidates, lambda candidate: candidate.hits, self._hits_min, bytes_max)
        self._allowance.spend(sum(candidate.stored_bytes for candidate in kept))
        return kept

    def facts(self) -> Mapping[str, float]:
        return {"threshold": float(math.ceil(self._threshold))}
