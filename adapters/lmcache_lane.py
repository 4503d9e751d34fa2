"""The tasks of both LMCache adapters: begun on threads of LMCache, worked off here, told once when they are over.

One thread (the lane) keeps all tasks and waits for nothing but its poll. What may wait for the drive runs on two others: puts, which
hash whole blocks, and pins, which ask the index for lengths. So a drive that hangs holds up neither lookups nor deadlines.
"""

from __future__ import annotations

import enum
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engine.contract import Status
from ..engine.jobs import CompletionQueue
from ..format.errors import KvlodeError
from ..gds.threads import WorkerPool
from .attached import QuietSpace
from .lmcache_leases import Leases
from .transfers import Transfers

logger = logging.getLogger("kvlode")

LOOKUP_POLL_MS = 1
DEADLINE_POLL_MS = 50
IDLE_POLL_MS = 10_000
STOP_S = 10.0


class TaskKind(enum.Enum):
    """What a task does with its keys."""

    LOOKUP = "lookup"
    STORE = "store"
    LOAD = "load"


@dataclass(slots=True)
class Part:
    """The keys of a task that are of one namespace."""

    space: QuietSpace
    positions: list[int] = field(default_factory=list)
    """Where they are in the task."""
    keys: list[bytes] = field(default_factory=list)
    found: list[Status] = field(default_factory=list)
    """Of a lookup."""

    def hits(self) -> list[int]:
        """Which of ``keys`` a lookup found."""
        return [position for position, status in enumerate(self.found) if status is Status.HIT]


@dataclass(slots=True, eq=False)
class Task:
    """One task. ``good`` and ``statuses`` are complete when it is told to be over; before, they are the lane's."""

    number: int
    kind: TaskKind
    keys: Sequence[Any]
    """``ObjectKey``."""
    objects: Sequence[Any] = ()
    """``MemoryObj``, whose memory is the task's until it is over."""
    layouts: Any = None
    """What LMCache says of the layout of object groups."""
    serialized: bool = False
    sizes: Sequence[int] = ()
    """Bytes of each object; empty when the task could not begin."""
    good: list[bool] = field(default_factory=list)
    statuses: list[Any] = field(default_factory=list)
    parts: Sequence[Part] = ()
    open_parts: int = 0
    deadline_s: float = 0.0

    def __post_init__(self) -> None:
        self.good = [False] * len(self.keys)
        self.statuses = [None] * len(self.keys)


class Lane:
    """Works off tasks. ``split`` gives the parts of a task, ``over`` is told of each once; both run on the lane's thread.

    Thread-safe. ``submit`` waits for nothing. Keys of a lookup that are found are in ``leases`` before it is over.
    """

    def __init__(
        self,
        split: Callable[[Task], Sequence[Part]],
        over: Callable[[Task], None],
        leases: Leases,
        *,
        lookup_timeout_s: float,
        load_timeout_s: float,
    ) -> None:
        self._split, self._over, self._leases = split, over, leases
        self._lookup_timeout_s = lookup_timeout_s
        self._queue = CompletionQueue()
        self._transfers = Transfers(load_timeout_s, self._queue)
        self._lock = threading.Lock()
        self._inbox: deque[Callable[[], None]] = deque()
        self._looking: list[Task] = []
        self._pinning: list[Task] = []
        self._accepting, self._stopping = True, False
        self._wake_descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._puts = WorkerPool("kvlode-lmcache-put", 1)
        self._index = WorkerPool("kvlode-lmcache-index", 1)
        self._thread = threading.Thread(target=self._run, name="kvlode-lmcache", daemon=True)
        self._thread.start()

    # --- for any thread -------------------------------------------------------------------------------------------------

    def submit(self, task: Task) -> None:
        """Begin a task; after ``close`` it is over at once, with nothing good."""
        if not self._post(lambda: self._begin(task)):
            self._over(task)

    def run_in_background(self, function: Callable[[], object]) -> None:
        """Call it where waiting for the index is allowed, in order; not at all after ``close``."""
        with self._lock:
            if self._accepting:
                self._index.run(function)

    @property
    def pending(self) -> int:
        return self._transfers.pending + len(self._looking) + len(self._pinning)

    def close(self, timeout_s: float) -> bool:
        """Wait until no task uses memory of LMCache, then stop; False when that did not happen in time. To be called once."""
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            self._accepting = False
        good = self._puts.shutdown(timeout_s)
        good = self._index.shutdown(max(0.0, deadline_s - time.monotonic())) and good
        self._transfers.drain(max(0.0, deadline_s - time.monotonic()))  # while the lane still calls off what is late
        self._stopping = True
        self._wake()
        self._thread.join(STOP_S)
        if self._thread.is_alive():
            return False
        good = self._transfers.drain(max(0.0, deadline_s - time.monotonic())) and good
        self._work()
        with self._lock:
            os.close(self._wake_descriptor)
            self._wake_descriptor = -1
        self._queue.close()
        return good

    def _post(self, call: Callable[[], None]) -> bool:
        """Have it done by the lane; False after ``close``."""
        with self._lock:
            if not self._accepting:
                return False
            self._inbox.append(call)
        self._wake()
        return True

    def _wake(self) -> None:
        with self._lock:
            if self._wake_descriptor >= 0:
                os.eventfd_write(self._wake_descriptor, 1)

    # --- the lane's thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._wake_descriptor, select.POLLIN)
        poller.register(self._queue.fileno(), select.POLLIN)
        while not self._stopping:
            self._empty(poller.poll(self._wait_ms()))
            try:
                self._work()
            except Exception as error:  # the other tasks go on
                logger.exception("a task of LMCache failed: %s", error)

    def _wait_ms(self) -> int:
        if self._inbox:
            return 0  # left by an error
        if self._looking:
            return LOOKUP_POLL_MS
        return DEADLINE_POLL_MS if self._pinning or self._transfers.pending else IDLE_POLL_MS

    def _empty(self, ready: Sequence[tuple[int, int]]) -> None:
        for descriptor, _ in ready:
            if descriptor == self._wake_descriptor:
                os.eventfd_read(descriptor)
        while self._queue.pop() is not None:
            pass  # which job it was is asked of the transfers

    def _work(self) -> None:
        while self._inbox:
            self._inbox.popleft()()
        self._look_up()
        self._end_transfers()
        self._leases.end_late()

    def _begin(self, task: Task) -> None:
        try:
            task.parts = self._split(task)
            memories = [_memory(memory_object) for memory_object in task.objects]
            task.sizes = [memory.size for memory in memories]
            blocks = [[memories[position] for position in part.positions] for part in task.parts] if memories else []
        except Exception as error:  # objects without memory of their own (GDS), keys that are none
            logger.error("a %s of LMCache cannot be done: %s", task.kind.value, error)
            self._over(task)
            return
        task.open_parts = len(task.parts)
        if not task.parts or not self._accepting:
            self._over(task)
        elif task.kind is TaskKind.LOOKUP:
            task.deadline_s = time.monotonic() + self._lookup_timeout_s
            for part in task.parts:
                part.found = [Status.PENDING] * len(part.keys)
            self._looking.append(task)
        elif task.kind is TaskKind.STORE:
            self._send(self._puts, task, lambda: self._store(task, blocks))
        elif task.serialized:
            self._send(self._index, task, lambda: self._load_serialized(task, blocks))
        else:
            self._load(task, blocks)

    def _send(self, pool: WorkerPool, task: Task, call: Callable[[], None]) -> None:
        try:
            pool.run(call)
        except KvlodeError:  # closed meanwhile
            if task in self._pinning:
                self._pinning.remove(task)
            self._over(task)

    def _end_transfers(self) -> None:
        for outcome in self._transfers.finished():
            job: Any = outcome.job_id  # as _store and _load made it
            task: Task = job[0]
            part = task.parts[job[1]]
            for position, good, status in zip(part.positions, outcome.good, outcome.statuses, strict=True):
                task.good[position], task.statuses[position] = good, status
            task.open_parts -= 1
            if not task.open_parts:
                self._over(task)

    # --- loads and stores -----------------------------------------------------------------------------------------------

    def _store(self, task: Task, blocks: Sequence[Sequence[Any]]) -> None:
        for index, part in enumerate(task.parts):
            self._transfers.store((task, index), part.space, part.keys, blocks[index])
        self._wake()

    def _load(self, task: Task, blocks: Sequence[Sequence[Any]]) -> None:
        for index, part in enumerate(task.parts):
            self._transfers.load((task, index), part.space, part.keys, blocks[index])
        self._wake()

    def _load_serialized(self, task: Task, blocks: Sequence[Sequence[Any]]) -> None:
        """A serde's buffers are as long as its output may be; each block goes to the front of one, as LMCache's file tier does it."""
        fitting = [
            [block[: part.space.estimate([key]).raw_bytes or block.size] for key, block in zip(part.keys, blocks[index], strict=True)]
            for index, part in enumerate(task.parts)
        ]
        self._load(task, fitting)

    # --- lookups --------------------------------------------------------------------------------------------------------

    def _look_up(self) -> None:
        now_s = time.monotonic()
        for task in list(self._looking):
            for part in task.parts:
                asked = [position for position, status in enumerate(part.found) if status is Status.PENDING]
                answers = part.space.lookup_nowait([part.keys[position] for position in asked]) if asked else []
                for position, status in zip(asked, answers, strict=True):
                    part.found[position] = status
            late = now_s >= task.deadline_s or not self._accepting
            if late or not any(status is Status.PENDING for part in task.parts for status in part.found):
                self._looking.remove(task)
                if self._accepting and any(part.hits() for part in task.parts):
                    self._pinning.append(task)
                    self._send(self._index, task, lambda task=task: self._pin(task))  # type: ignore[misc]
                else:
                    self._over(task)
        for task in [task for task in self._pinning if now_s >= task.deadline_s + self._lookup_timeout_s or not self._accepting]:
            self._pinning.remove(task)
            logger.warning(
                "a lookup of %d keys is a miss: the index did not answer in time, or the adapter is being closed", len(task.keys)
            )
            self._over(task)

    def _pin(self, task: Task) -> None:
        for part in task.parts:
            hits = part.hits()
            self._leases.hold(part.space, [part.keys[hit] for hit in hits], [task.keys[part.positions[hit]] for hit in hits])
        if not self._post(lambda: self._pinned(task)):
            self._give_back(task)

    def _pinned(self, task: Task) -> None:
        if task not in self._pinning:  # too late: it was told to be a miss, and nobody will give these back
            self._give_back(task)
            return
        self._pinning.remove(task)
        for part in task.parts:
            for position, status in zip(part.positions, part.found, strict=True):
                task.good[position] = status is Status.HIT
        self._over(task)

    def _give_back(self, task: Task) -> None:
        for part in task.parts:
            for hit in part.hits():
                self._leases.give_back(task.keys[part.positions[hit]])


def _memory(memory_object: Any) -> np.ndarray[Any, Any]:
    """The bytes of a ``MemoryObj`` as it is used (its allocation may be longer)."""
    return np.frombuffer(memory_object.byte_array, dtype=np.uint8)
