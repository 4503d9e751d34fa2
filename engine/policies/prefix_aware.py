"""Oldest first, but what was used in the later part of its life is copied forward: close to least recently used, for a log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...format.errors import InvalidConfig
from .fifo import SegmentFifo
from .interface import Candidate
from .reinsertion import WRITE_AMPLIFICATION_MAX
from .write_allowance import WriteAllowance, closed_choice

RECENT_SHARE = 0.4


class PrefixAware(SegmentFifo):
    """A block goes forward when it was used since it was written last, and lately: within the last ``recent_share`` of its life.

    Time since the last use tells more of a block's future than how often it was used: in a trace of chat, blocks that were used in the
    youngest quarter of the log come back four to seventeen times as often as those of the oldest quarter. It is
    compared with the age, not with a number of seconds, so it needs no tuning to a size or a rate; and a block that is long in use may
    rest longer. A use counts for all ancestors, which are as old or older, so whole chains go forward, from their heads on. Where this
    would take write amplification over its maximum, the most recently used chains are preferred.

    Needs ``Candidate.idle_s``. Where that is 0 because nobody knows it, everything that was used counts as recent.
    """

    name = "prefix-aware"

    def __init__(self, recent_share: float = RECENT_SHARE, write_amplification_max: float = WRITE_AMPLIFICATION_MAX) -> None:
        if not 0 < recent_share <= 1:
            raise InvalidConfig("recent_share cannot be used", expected="above 0, at most 1", actual=recent_share)
        self._recent_share = recent_share
        self._allowance = WriteAllowance(write_amplification_max)
        self._threshold = 1 - recent_share

    def choose(self, candidates: Sequence[Candidate], segment_bytes: int) -> list[Candidate]:
        bytes_max = self._allowance.earn(segment_bytes)
        kept, self._threshold = closed_choice(candidates, _recency, 1 - self._recent_share, bytes_max)
        self._allowance.spend(sum(candidate.stored_bytes for candidate in kept))
        return kept

    def facts(self) -> Mapping[str, float]:
        return {"threshold": self._threshold}


def _recency(candidate: Candidate) -> float:
    """The share of its life that had passed when it was used last; -1 when it was not."""
    return 1 - candidate.idle_s / max(candidate.age_s, candidate.idle_s, 1e-9) if candidate.hits else -1.0
