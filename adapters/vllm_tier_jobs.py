"""The jobs of vLLM's secondary tier: submitted and polled by the scheduler, which must not wait for a checksum or the index.

Submitting a store reads every byte once (its checksum) and asks the index which blocks are there; that is milliseconds, so it
happens on one thread of the tier. A job of vLLM may name blocks of several cache groups, which are several namespaces here: it
is over when its parts are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..engine.contract import Status
from ..gds.monitor import Monitor
from .attached import QuietSpace
from .transfers import Outcome, Transfers

logger = logging.getLogger("kvlode")

DRAIN_STEP_S = 0.05
"""How often a drain looks whether a load is over its time; jobs that end wake it at once."""


class Rows:
    """The rows of the primary tier's memory: row *i* is chunk *i*, all of one size. Nothing is copied.

    ``view``: ``primary_kv_view``, two-dimensional and C-contiguous. The memory can be unmapped after ``close`` and when the jobs
    over it are gone: each of them holds the views of its rows as long as the store may touch them, which keeps the mapping.
    """

    def __init__(self, view: memoryview) -> None:
        self._flat = view.cast("B")
        self.count = len(view)
        self.row_bytes = self._flat.nbytes // self.count if self.count else 0

    def row(self, chunk: int) -> memoryview | None:
        """The bytes of one chunk; ``None`` for a chunk that there is not."""
        if not 0 <= chunk < self.count:
            return None
        return self._flat[chunk * self.row_bytes : (chunk + 1) * self.row_bytes]

    def close(self) -> None:
        """Give up the memory; ``row`` must not be called any more."""
        self._flat.release()


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The blocks of one job that belong to one namespace. Compared by identity, as it is part of the name of a job."""

    space: QuietSpace
    keys: Sequence[bytes]
    chunks: Sequence[int]
    positions: Sequence[int]
    """Where each key stands in the job."""
    parent: bytes | None = None
    """Of the first key; each of the others is the child of the one before it."""


@dataclass(slots=True)
class FinishedJob:
    """A job that is over, as vLLM wants it reported."""

    job_id: int
    is_load: bool
    good: list[bool]
    """One for each key of the job, in its order."""
    statuses: list[object]
    """``Status`` or ``PutStatus``; ``None`` for a key that was never tried."""
    seconds: float = 0.0


@dataclass(slots=True)
class _Running:
    finished: FinishedJob
    parts_left: int
    waiting: dict[int, Part]
    """Parts that the store was not asked for yet, by number: nothing touches their rows."""
    started_s: float = field(default_factory=time.monotonic)


class TierJobs:
    """All jobs of one tier. Every method but ``drain`` and ``close`` returns at once; thread-safe."""

    def __init__(self, rows: Rows, load_timeout_s: float) -> None:
        self._rows = rows
        self._load_timeout_s = load_timeout_s
        self._transfers = Transfers(load_timeout_s)
        self._changed = Monitor()
        self._urgent: deque[Callable[[], None]] = deque()
        self._patient: deque[Callable[[], None]] = deque()
        self._busy = False
        self._stopping = False
        self._running: dict[int, _Running] = {}
        self._over: deque[FinishedJob] = deque()
        self._thread = threading.Thread(target=self._run, name="kvlode-vllm-tier", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Jobs that were not reported yet."""
        return len(self._running) + len(self._over)

    def submit(self, job_id: int, parts: Sequence[Part], key_count: int, *, is_load: bool) -> None:
        """Start a job. Loads go before stores that have not been submitted to the store yet."""
        finished = FinishedJob(job_id, is_load, [False] * key_count, [None] * key_count)
        running = _Running(finished, len(parts), dict(enumerate(parts)))
        with self._changed.lock:
            if not parts or self._stopping:
                self._over.append(finished)
                return
            self._running[job_id] = running
        for number, part in enumerate(parts):
            self._enqueue(lambda number=number, part=part: self._begin(job_id, number, part, running), urgent=is_load)  # type: ignore[misc]

    def touch(self, space: QuietSpace, keys: Sequence[bytes]) -> None:
        """Count a use of each key, soon."""
        self._enqueue(lambda: space.touch(keys), urgent=False)

    def finished(self) -> list[FinishedJob]:
        """Jobs that are over and were not reported before."""
        self._collect()
        self._withdraw_late()
        with self._changed.lock:
            over = list(self._over)
            self._over.clear()
        return over

    def drain(self, timeout_s: float) -> bool:
        """Wait until every job is over (they still have to be fetched with ``finished``); False at the deadline."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._changed.wait_for(self._idle, min(DRAIN_STEP_S, max(0.0, deadline_s - time.monotonic())))
            self._transfers.drain(min(DRAIN_STEP_S, max(0.0, deadline_s - time.monotonic())))
            self._collect()
            if not self._running:
                return True
            if time.monotonic() >= deadline_s:
                return False

    def close(self, timeout_s: float) -> bool:
        """Take no more jobs, wait for those that run; False when some have not ended in time."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed.lock:
            self._stopping = True
        drained = self.drain(timeout_s)
        with self._changed.lock:
            self._urgent.clear()
            self._patient.clear()
            self._changed.notify_all()
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        return drained and not self._thread.is_alive()

    # --- the tier's thread ----------------------------------------------------------------------------------------

    def _enqueue(self, work: Callable[[], None], *, urgent: bool) -> None:
        with self._changed.lock:
            (self._urgent if urgent else self._patient).append(work)
            self._changed.notify_all()

    def _idle(self) -> bool:
        return not (self._urgent or self._patient or self._busy)

    def _run(self) -> None:
        while True:
            self._changed.wait_for(lambda: bool(self._urgent or self._patient) or self._stopping)
            with self._changed.lock:
                if not (self._urgent or self._patient):
                    return
                work = (self._urgent or self._patient).popleft()
                self._busy = True
            try:
                work()
            except Exception as error:  # the next piece of work is another one; a job of this one was failed by _start
                logger.error("the vLLM tier could not do a piece of work: %s", error)
            del work  # it names rows, and the thread may now wait for long
            with self._changed.lock:
                self._busy = False
                self._changed.notify_all()

    def _begin(self, job_id: int, number: int, part: Part, running: _Running) -> None:
        with self._changed.lock:
            withdrawn = running.waiting.pop(number, None) is None
        if not withdrawn:
            self._start(job_id, number, part, running)

    def _start(self, job_id: int, number: int, part: Part, running: _Running) -> None:
        """Hand one part to the store. Chunks that there are not fail alone."""
        rows = [self._rows.row(chunk) for chunk in part.chunks]
        there = [index for index, row in enumerate(rows) if row is not None]
        keys = [part.keys[index] for index in there]
        blocks = [rows[index] for index in there]
        sound = Part(part.space, keys, (), [part.positions[index] for index in there])
        name = (job_id, number, sound)
        try:
            if running.finished.is_load:
                self._transfers.load(name, part.space, keys, blocks)
            else:
                self._transfers.store(name, part.space, keys, blocks, chained=True, parent=part.parent)
        except Exception as error:
            logger.error("a job of the vLLM tier failed before it began: %s", error)
            self._end_part(job_id, sound, None)

    # --- reporting --------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        for outcome in self._transfers.finished():
            job_id, _, part = outcome.job_id  # type: ignore[misc]
            self._end_part(job_id, part, outcome)  # type: ignore[has-type]

    def _withdraw_late(self) -> None:
        """Loads that wait for the tier's thread, which a store may hold up, have the deadline of those that were begun."""
        late: list[tuple[int, Part]] = []
        with self._changed.lock:
            for job_id, running in self._running.items():
                if running.finished.is_load and time.monotonic() - running.started_s > self._load_timeout_s:
                    late += [(job_id, part) for part in running.waiting.values()]
                    running.waiting.clear()
        for job_id, part in late:
            self._end_part(job_id, part, None)

    def _end_part(self, job_id: int, part: Part, outcome: Outcome | None) -> None:
        with self._changed.lock:
            running = self._running[job_id]
            finished = running.finished
            if outcome is not None:
                for position, good, status in zip(part.positions, outcome.good, outcome.statuses, strict=True):
                    finished.good[position], finished.statuses[position] = good, status
            running.parts_left -= 1
            if running.parts_left == 0:
                finished.seconds = time.monotonic() - running.started_s
                self._over.append(finished)
                del self._running[job_id]


def status_name(status: object) -> str:
    """What a metric calls the outcome of one key."""
    if isinstance(status, Status):
        return status.name.lower()
    reason = getattr(status, "reason", None)
    return str(reason).replace(" ", "_") if reason is not None else "not_tried"
