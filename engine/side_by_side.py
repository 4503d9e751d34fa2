"""Several calls that each wait for a drive of their own, made at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from ..gds.monitor import Outcome

T = TypeVar("T")


def side_by_side(calls: Sequence[Callable[[], T]]) -> list[T]:
    """The answers of ``calls``, the first of which is made on this thread. They must end by themselves.

    Returns, or raises the first error, when all of them have ended: they may work on the caller's memory. Threads are made for the
    occasion, since calls that queue behind those of others would miss their deadlines.
    """
    outcomes: list[Outcome[T]] = []
    try:
        for call in calls[1:]:
            outcome: Outcome[T] = Outcome()
            _start(outcome, call)
            outcomes.append(outcome)
        first = calls[0]()
    except BaseException:
        for outcome in outcomes:
            with contextlib.suppress(Exception):
                outcome.result()
        raise
    for outcome in outcomes:
        with contextlib.suppress(Exception):  # raised below, when none is running any more
            outcome.result()
    return [first, *(outcome.result() for outcome in outcomes)]


def _start(outcome: Outcome[T], call: Callable[[], T]) -> None:
    try:
        threading.Thread(target=outcome.run, args=(call,), name="kvlode-set", daemon=True).start()
    except RuntimeError:  # the interpreter is ending and starts no threads
        outcome.run(call)
