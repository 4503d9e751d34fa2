"""Jobs: the handles of work in the background, and the queue that tells a poll loop that they finished."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..gds.monitor import Monitor
from .contract import PutState, PutStatus, Refusal, Status

ACCEPTED = PutStatus(PutState.ACCEPTED)
DURABLE = PutStatus(PutState.DURABLE)
EXISTS = PutStatus(PutState.EXISTS)
_REFUSALS = {reason: PutStatus(PutState.REFUSED, reason) for reason in Refusal}


def refused(reason: Refusal) -> PutStatus:
    """The (shared) status of a put refused for ``reason``."""
    return _REFUSALS[reason]


class CompletionQueue:
    """Finished jobs in the order they finished, with a file descriptor for ``poll``/``epoll``/``asyncio``.

    Pass one to ``submit_put`` or ``submit_get``. The descriptor (a semaphore-mode eventfd) is readable while
    ``pop`` would return a job. Thread-safe. ``close`` when no job is outstanding.
    """

    def __init__(self) -> None:
        self._jobs: deque[Any] = deque()
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        self._lock = threading.Lock()
        self._closed = False

    def fileno(self) -> int:
        return self._descriptor

    def push(self, job: Any) -> None:
        """Called by the store when a job is done; a no-op after ``close``."""
        with self._lock:
            if not self._closed:
                self._jobs.append(job)
                os.eventfd_write(self._descriptor, 1)

    def pop(self) -> Any | None:
        """The next finished job, or ``None`` when there is none now."""
        with self._lock:
            if not self._jobs:
                return None
            os.eventfd_read(self._descriptor)
            return self._jobs.popleft()

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.clear()
                os.close(self._descriptor)


class Job:
    """What both kinds of job share: an end that is reached once, and its announcement."""

    def __init__(self, queue: Any | None) -> None:
        self._queue = queue
        self._changed = Monitor()
        self._lock = self._changed.lock
        self._done = False

    def done(self) -> bool:
        return self._done

    def wait(self, timeout: float | None = None) -> bool:
        return self._done or self._changed.wait_for(lambda: self._done, timeout)

    def _finish(self) -> None:
        with self._lock:
            if self._done:
                return
            self._done = True
            queue, self._queue = self._queue, None  # it may know whoever knows this job: such circles would keep destinations
            self._changed.notify_all()
        if queue is not None:
            queue.push(self)


class ReadJob(Job):
    """A ``GetJob``. The store settles one key after the other; memory of the caller is only touched inside ``delivering``.

    That gate makes calling off safe at any moment, whatever the store's threads wait for: no delivery begins afterwards, and the job
    is done as soon as those that had begun are over.
    """

    def __init__(self, count: int, queue: Any | None = None) -> None:
        super().__init__(queue)
        self.began_s = time.perf_counter()
        self.on_answered: Callable[[], None] | None = None
        """Called once when every key has its answer, not when the job is called off; it must not know the job (see ``_finish``)."""
        self._statuses = [Status.PENDING] * count
        self._verified = [False] * count
        self._unsettled = count
        self._delivering = 0
        self._called_off: Status | None = None
        """What unfinished keys are reported as, once the job was called off."""
        if count == 0:
            self._finish()

    @property
    def statuses(self) -> Sequence[Status]:
        rest = self._called_off if self._done and self._called_off is not None else Status.PENDING
        return [rest if status is Status.PENDING else status for status in self._statuses]

    @property
    def verified(self) -> Sequence[bool]:
        return list(self._verified)

    @property
    def cancelled(self) -> bool:
        """True once nothing more should be started for this job."""
        return self._called_off is not None

    def settle(self, position: int, status: Status, *, verified: bool = True) -> None:
        """Called by the store: the final status of one key. The first word counts, and none after the job was called off."""
        self.settle_many([position], [status], verified=verified)

    def settle_many(self, positions: Sequence[int], statuses: Sequence[Status], *, verified: bool = True) -> None:
        """As ``settle``, for several keys at once."""
        with self._lock:
            if self.cancelled or not positions:
                return
            for position, status in zip(positions, statuses, strict=True):
                if self._statuses[position] is Status.PENDING:
                    self._statuses[position] = status
                    self._verified[position] = verified and status is Status.HIT
                    self._unsettled -= 1
            last = self._unsettled == 0
        if last:
            on_answered, self.on_answered = self.on_answered, None
            if on_answered is not None:
                on_answered()
            self._finish()

    @contextlib.contextmanager
    def delivering(self) -> Iterator[bool]:
        """Called by the store around every access to a destination; yields False when it must not be touched any more."""
        with self._lock:
            allowed = not self.cancelled
            if allowed:
                self._delivering += 1
        try:
            yield allowed
        finally:
            if allowed:
                with self._lock:
                    self._delivering -= 1
                    over = self.cancelled and self._delivering == 0
                if over:
                    self._finish()

    def cancel(self, timeout: float | None = None) -> bool:
        """See ``GetJob.cancel``."""
        self._call_off(Status.CANCELLED)
        return self.wait(timeout)

    def abandon(self) -> None:
        """Give up at a deadline: afterwards destinations are never touched, unfinished keys stay ``PENDING``."""
        self._call_off(Status.PENDING)
        self.wait()

    def _call_off(self, rest: Status) -> None:
        with self._lock:
            if self._called_off is None:
                self._called_off = rest
            over = self._delivering == 0
        if over:
            self._finish()


class WriteJob(Job):
    """A ``PutJob``: per key ACCEPTED, later DURABLE; done at acceptance (``copy``) or when settled (``borrow``)."""

    def __init__(self, count: int, queue: Any | None = None, *, borrow: bool = False) -> None:
        super().__init__(queue)
        self._statuses = [ACCEPTED] * count
        self._borrow = borrow
        self._undecided = count
        self._unsettled = count
        if count == 0:
            self._finish()

    @property
    def statuses(self) -> Sequence[PutStatus]:
        return list(self._statuses)

    def decide(self, position: int, status: PutStatus) -> None:
        """Called by the store once a key: accepted, exists, or refused."""
        final = status.state is not PutState.ACCEPTED
        with self._lock:
            if final:  # an accepted key may already have been settled by the commit thread
                self._statuses[position] = status
            self._undecided -= 1
            last = self._undecided == 0
        if final:
            self._count_settled()
        if last and not self._borrow:
            self._finish()

    def settle(self, position: int, status: PutStatus) -> None:
        """Called by the store when an accepted key became durable or was dropped."""
        with self._lock:
            self._statuses[position] = status
        self._count_settled()

    def settler(self, position: int) -> Callable[[PutStatus], None]:
        """A callback that settles one key."""
        return lambda status: self.settle(position, status)

    def _count_settled(self) -> None:
        with self._lock:
            self._unsettled -= 1
            last = self._unsettled == 0
        if last and self._borrow:
            self._finish()
