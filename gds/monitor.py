"""Waiting that an interrupt may leave at any moment.

Ctrl-C raises ``KeyboardInterrupt`` in the main thread after whatever call happens to return, also inside
``threading.Condition`` and ``concurrent.futures.Future``: their methods are Python code, which can be left with the lock
held (every other thread then waits for ever) or with it already given back. What a caller of the store waits for goes
through the two classes here instead. The interpreter's own locks are safe: ``with lock`` is entered and left in one step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Monitor:
    """A lock, and the news that something it guards has changed.

    Take ``lock`` by ``with monitor.lock``; it may be taken again by the thread that holds it.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._waiters: list[Any] = []

    def notify_all(self) -> None:
        """Let everyone who waits look again. Call it with the lock held."""
        while self._waiters:
            waiter = self._waiters[-1]
            if waiter.locked():
                waiter.release()
            del self._waiters[-1]  # last: an interrupt before it has woken somebody twice, which does no harm

    def wait_for(self, predicate: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until ``predicate`` holds; False when the time passed first. It is called under the lock; do not hold that yourself."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            waiter = threading.Lock()
            waiter.acquire()
            with self.lock:
                if predicate():
                    return True
                self._waiters.append(waiter)
            remaining_s = -1.0 if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            if waiter.acquire(True, min(remaining_s, threading.TIMEOUT_MAX)):
                continue
            with self.lock:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                return predicate()


class Outcome(Generic[T]):
    """The result or the error of one call on another thread, for one thread that waits for it."""

    def __init__(self) -> None:
        self._pending = threading.Lock()
        self._pending.acquire()
        self._value: T | None = None
        self._error: BaseException | None = None

    def run(self, function: Callable[[], T]) -> None:
        """Make the call, on the thread that works for the other; once."""
        try:
            self._value = function()
        except BaseException as error:  # handed to whoever asked
            self._error = error
        finally:
            self._pending.release()

    def result(self, timeout_s: float | None = None) -> T:
        """What the call returned; raises its error, or ``TimeoutError`` when it has not ended in time."""
        if not self._pending.acquire(True, -1 if timeout_s is None else max(0.0, timeout_s)):
            raise TimeoutError(f"a call on another thread took longer than {timeout_s} s")
        self._pending.release()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # set, when there is no error
