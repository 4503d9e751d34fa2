"""Calls that one thread makes for others, between two pieces of its own work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NoReturn, TypeVar

from ..format.errors import StoreClosed
from ..gds.monitor import Monitor, Outcome

Answer = TypeVar("Answer")


class Turns:
    """See the module. ``changed`` is what the thread waits on; its lock guards everything."""

    def __init__(self, changed: Monitor) -> None:
        self._changed = changed
        self._calls: deque[Callable[[], None]] = deque()
        self._ended = False

    def __bool__(self) -> bool:
        """Whether a call waits."""
        return bool(self._calls)

    def ask(self, function: Callable[[], Answer]) -> Outcome[Answer]:
        """Have ``function`` called. Any thread. The outcome is ``StoreClosed`` once the thread has ended."""
        outcome: Outcome[Answer] = Outcome()
        with self._changed.lock:
            refused = self._ended
            if not refused:
                self._calls.append(lambda: outcome.run(function))
                self._changed.notify_all()
        if refused:
            outcome.run(_refuse)
        return outcome

    def take(self) -> None:
        """Make the calls that wait. On the thread."""
        while self._calls:
            self._calls.popleft()()

    def end(self) -> None:
        """No further call is made; those that still wait are made now. On the thread, at its end."""
        with self._changed.lock:
            self._ended = True
        self.take()


def _refuse() -> NoReturn:
    raise StoreClosed("the store is closed", action="Open the store again.")
