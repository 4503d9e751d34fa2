"""Time that does not run backwards from one opening of a store to the next."""

from __future__ import annotations

import logging

from .config import Clock

logger = logging.getLogger("kvlode")

NOTED_NS = 1_000_000_000


class ForwardClock:
    """A clock that is never behind what the store has written: blocks whose time to live had passed stay expired when the machine's clock
    was set back meanwhile. While the store is open its clock is monotonic anyway. After a clock was ahead by mistake the store's time
    stays ahead; lifetimes are differences, so they keep their length.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ahead_ns = 0

    def now_ns(self) -> int:
        return self._clock.now_ns() + self._ahead_ns

    def monotonic_s(self) -> float:
        return self._clock.monotonic_s()

    def not_before(self, time_ns: int) -> None:
        """The store has written something at this time (UTC, nanoseconds). Called while it is opened."""
        behind_ns = time_ns - self.now_ns()
        if behind_ns > 0:
            self._ahead_ns += behind_ns
            if behind_ns > NOTED_NS:
                logger.warning("the clock is %.0f s behind what the store has written; the store goes on from there", behind_ns / 1e9)
