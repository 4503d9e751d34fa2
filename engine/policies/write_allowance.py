"""How much may be copied forward, so that write amplification stays below its maximum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ...format.errors import InvalidConfig
from .interface import Candidate

SAVED_SEGMENTS = 64
"""Unused allowance is kept for so many victims. Use comes in waves: with a smaller reserve their crests are cut, and fewer blocks that
will be used again are kept for as many writes."""


class WriteAllowance:
    """A freed segment of which the share ``c`` is copied forward makes room for ``1 - c`` of new blocks, so writes are ``1 / (1 - c)`` of
    them. Each victim earns that share of its size, and what one leaves the next ones may use. Used by one thread.
    """

    def __init__(self, write_amplification_max: float) -> None:
        if not 1 <= write_amplification_max < float("inf"):
            raise InvalidConfig(
                "write_amplification_max cannot be used",
                expected="a finite number from 1 on, such as 1.15",
                actual=write_amplification_max,
            )
        self.share = 1 - 1 / write_amplification_max
        self._saved_bytes = 0.0

    def earn(self, segment_bytes: int) -> float:
        """A victim of this size: the bytes that may be copied now."""
        per_victim = self.share * segment_bytes
        self._saved_bytes = min(self._saved_bytes + per_victim, SAVED_SEGMENTS * per_victim)
        return self._saved_bytes

    def spend(self, copied_bytes: int) -> None:
        """Pinned blocks are copied whatever is left, and leave no debt: they are not to starve the others afterwards."""
        self._saved_bytes = max(self._saved_bytes - copied_bytes, 0.0)


def closed_choice(
    candidates: Sequence[Candidate], score: Callable[[Candidate], float], threshold: float, bytes_max: float
) -> tuple[list[Candidate], float]:
    """The blocks with at least this score, and the threshold that came into force: it rises until they fit.

    Whole levels of the score are left out, so that a chain is never cut short: where ancestors score no less than their descendants, what
    is kept is closed. (Cutting a list at a number of bytes tears chains, and was measured to be no better than keeping nothing.)
    """
    scored = [(score(candidate), candidate) for candidate in candidates if not candidate.pinned]
    levels: dict[float, int] = {}
    for value, candidate in scored:
        if value >= threshold:
            levels[value] = levels.get(value, 0) + candidate.stored_bytes
    total = sum(levels.values())
    for value in sorted(levels):
        if total <= bytes_max:
            break
        total -= levels[value]
        threshold = math.nextafter(value, math.inf)
    kept = {candidate.position for value, candidate in scored if value >= threshold}
    return [c for c in candidates if c.pinned or c.position in kept], threshold
