"""A pool of own daemon threads: futures without the exit and fork hooks of ``ThreadPoolExecutor``.

``ThreadPoolExecutor`` refuses work once the interpreter has begun to exit, which is exactly when a store
writes its last blocks, and it joins its threads without a deadline. This pool takes work until it is shut
down, stops within a deadline, and is dead (and says so) in a forked child.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar

from ..format.errors import StoreClosed

logger = logging.getLogger("kvlode")

P = ParamSpec("P")
T = TypeVar("T")

EXIT_TIMEOUT_S = 2.0
"""How long the exit of the interpreter waits for a pool that nobody shut down."""


class _Task(Generic[T]):
    """One call and its future."""

    __slots__ = ("function", "args", "kwargs", "future")

    def __init__(self, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.future: Future[T] = Future()

    def cancel(self) -> bool:
        return self.future.cancel()

    def run(self) -> None:
        future = self.future
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = self.function(*self.args, **self.kwargs)
        except BaseException as error:  # the caller decides what an error means, whatever it is
            future.set_exception(error)
        else:
            future.set_result(result)
        finally:
            # The exception's traceback refers to this frame: drop the arguments (buffers) and the cycle through the future.
            del self.function, self.args, self.kwargs, future


class _Call:
    """One call that nobody waits for."""

    __slots__ = ("function", "args", "kwargs")

    def __init__(self, function: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs

    def run(self) -> None:
        try:
            self.function(*self.args, **self.kwargs)
        except Exception:
            logger.exception("a call that nobody waits for failed")

    def cancel(self) -> bool:
        """Never: nobody would hear of it, and whoever waits for what the call does would wait for ever."""
        return False


_Tasks: TypeAlias = "queue.SimpleQueue[_Task[Any] | _Call | None]"


class _Line:
    """What a pool and its threads share: the calls that wait, the threads, and how many of them wait for a call.

    One more thread than are at work is there, up to the limit. A thread that begins to work starts it, so that no thread of a host does:
    an interrupt in the middle of ``Thread.start`` leaves locks behind.
    """

    def __init__(self, name: str, threads_max: int) -> None:
        self.tasks: _Tasks = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.workers: list[threading.Thread] = []
        self._name = name
        self._threads_max = threads_max
        self._waiting = 0

    def next(self) -> _Task[Any] | _Call | None:
        """The next call for this thread, ``None`` at the end."""
        with self.lock:
            self._waiting += 1
        task = self.tasks.get()
        with self.lock:
            self._waiting -= 1
            if task is not None and not self._waiting and len(self.workers) < self._threads_max:
                with contextlib.suppress(RuntimeError):  # the interpreter exits, or the system has no more: those that run do it all
                    self.start_one()
        return task

    def start_one(self) -> None:
        """One more thread. Raises ``RuntimeError`` when there can be none."""
        worker = threading.Thread(target=_work, args=(self,), name=f"{self._name}-{len(self.workers)}", daemon=True)
        worker.start()
        self.workers.append(worker)


def _work(line: _Line) -> None:
    """Body of a thread. It knows the line only, so that a forgotten pool can be collected."""
    while (task := line.next()) is not None:
        task.run()
        del task


def _stop(tasks: _Tasks, threads: int) -> None:
    for _ in range(threads):
        tasks.put(None)


class WorkerPool:
    """Up to ``threads`` daemon threads that run submitted calls in order of submission; started as there is work for them, one ahead.

    All methods may be called from any thread. A future that has not started can be cancelled; every future
    ends (result, exception or cancelled), also when the pool is shut down under it.
    """

    def __init__(self, name: str, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"a pool needs at least one thread, not {threads}")
        self.name = name
        self.threads = threads
        self._line = _Line(name, threads)
        self._closed = False
        self._pid = os.getpid()
        self._line.start_one()
        self._stop_when_collected = weakref.finalize(self, _stop, self._line.tasks, threads)
        self._stop_when_collected.atexit = False  # a store that is closed at exit writes its last blocks with this pool
        _pools.add(self)

    def _put(self, task: _Task[Any] | _Call) -> None:
        with self._line.lock:  # not after the stop marks of shutdown: it would never run
            self._check_open()
            self._line.tasks.put(task)

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run ``function(*args, **kwargs)`` on a thread. Raises ``StoreClosed`` after ``shutdown`` and in a forked child."""
        task = _Task(function, args, kwargs)
        future = task.future
        self._put(task)
        return future

    def run(self, function: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """``submit`` for calls whose outcome nobody waits for: no future is made. An error is logged."""
        self._put(_Call(function, args, kwargs))

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosed(
                f"the threads of {self.name} are stopped",
                expected="an open pool, in the process that made it",
                actual="a forked child" if os.getpid() != self._pid else "a pool that was shut down",
            )

    def shutdown(self, timeout_s: float | None = None) -> bool:
        """Refuse new work, finish what was submitted, stop the threads; ``True`` when they ended in time.

        What was submitted and has not started at the deadline is cancelled. What is still running then cannot be stopped: its
        thread is left behind, its future ends when the call returns, and the calls of ``run`` are worked off behind it.
        """
        if os.getpid() != self._pid:
            return True  # the threads are the parent's
        with self._line.lock:
            if not self._closed:
                self._closed = True
                self._stop_when_collected()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        current = threading.current_thread()
        for worker in self._line.workers:
            if worker is not current and worker.is_alive():
                worker.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not any(worker.is_alive() for worker in self._line.workers if worker is not current):
            return True
        self._cancel_queued()
        return False

    def _cancel_queued(self) -> None:
        kept: list[_Task[Any] | _Call | None] = []
        with contextlib.suppress(queue.Empty):
            while True:
                task = self._line.tasks.get_nowait()
                if task is None or not task.cancel():
                    kept.append(task)
        for task in kept:
            self._line.tasks.put(task)

    def _forget_after_fork(self) -> None:
        self._line.lock = threading.Lock()  # another thread of the parent may have held it
        self._closed = True
        self._stop_when_collected.detach()


_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for pool in list(_pools):
        pool._forget_after_fork()


def _at_exit() -> None:
    deadline = time.monotonic() + EXIT_TIMEOUT_S
    for pool in list(_pools):
        pool.shutdown(max(0.0, deadline - time.monotonic()))


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
