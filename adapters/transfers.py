"""Jobs of an engine that polls: submitted under the engine's own ids, reported once each, loads with a deadline."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.contract import Block, CompletionQueue, GetJob, PutJob, Status
from .attached import QuietSpace

logger = logging.getLogger("kvlode")

LOAD_TIMEOUT_S = 10.0
"""A load that takes longer is called off: the engine computes the tokens meanwhile."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A job that is over: its memory is the engine's again."""

    job_id: Hashable
    is_load: bool
    keys: Sequence[bytes]
    good: Sequence[bool]
    """For a load: the destination holds the block. For a store: it is in the store, durably or (``own="copy"``) in its buffer."""
    statuses: Sequence[object]
    """``Status`` or ``PutStatus`` a key."""
    seconds: float

    @property
    def all_good(self) -> bool:
        return all(self.good)


@dataclass(slots=True)
class _Running:
    job: GetJob | PutJob
    keys: Sequence[bytes]
    started_s: float
    load: GetJob | None
    """The job again, where it is a load that was not called off yet."""
    is_load: bool


class Transfers:
    """The running jobs of one adapter. Thread-safe; nothing but ``drain`` waits.

    ``queue`` is told of each job that ends, which may be before ``load`` or ``store`` has returned: a poll loop that sleeps on its
    descriptor asks ``finished`` once more after those.
    """

    def __init__(self, load_timeout_s: float = LOAD_TIMEOUT_S, queue: CompletionQueue | None = None) -> None:
        self._load_timeout_s = load_timeout_s
        self._queue = queue
        self._lock = threading.Lock()
        self._running: dict[Hashable, _Running] = {}

    def load(self, job_id: Hashable, space: QuietSpace, keys: Sequence[bytes], outs: Sequence[Block], *, stream: Any = None) -> None:
        """Read blocks; the destinations are the job's until it is reported. ``stream``: the CUDA stream that copies are ordered on."""
        job = space.submit_get(keys, outs, queue=self._queue, stream=stream)
        self._add(job_id, _Running(job, keys, time.monotonic(), job, is_load=True))

    def store(
        self,
        job_id: Hashable,
        space: QuietSpace,
        keys: Sequence[bytes],
        blocks: Sequence[Block],
        *,
        chained: bool = False,
        parent: bytes | None = None,
    ) -> None:
        """Write blocks without copying them; they are the job's until it is reported.

        ``chained``: each is the parent of the next, ``parent`` that of the first.
        """
        job = space.submit_put(keys, blocks, own="borrow", chained=chained, parent=parent, queue=self._queue)
        self._add(job_id, _Running(job, keys, time.monotonic(), None, is_load=False))

    def _add(self, job_id: Hashable, running: _Running) -> None:
        with self._lock:
            self._running[job_id] = running

    @property
    def pending(self) -> int:
        """Jobs that were not reported yet."""
        return len(self._running)

    def finished(self) -> list[Outcome]:
        """Jobs that are over and were not reported before, in the order they were submitted."""
        self._call_off_late()
        now_s = time.monotonic()
        with self._lock:
            over = [(job_id, running) for job_id, running in self._running.items() if running.job.done()]
            for job_id, _ in over:
                del self._running[job_id]
        return [_outcome(job_id, running, now_s) for job_id, running in over]

    def _call_off_late(self) -> None:
        """Loads that are over their time. They are done at once, but where the drive is already reading into their destinations."""
        late: list[GetJob] = []
        now_s = time.monotonic()
        with self._lock:
            for running in self._running.values():
                if running.load is not None and now_s - running.started_s > self._load_timeout_s:
                    late.append(running.load)
                    running.load = None
        if late:
            logger.warning("%d loads took longer than %.1f s and are called off", len(late), self._load_timeout_s)
        for job in late:
            job.cancel(timeout=0)

    def drain(self, timeout_s: float) -> bool:
        """Wait until every job is over (they still have to be fetched with ``finished``); False at the deadline."""
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            jobs = [running.job for running in self._running.values()]
        waited = [job.wait(max(0.0, deadline_s - time.monotonic())) for job in jobs]  # all of them: what is over is seen as over
        return all(waited)


def _outcome(job_id: Hashable, running: _Running, now_s: float) -> Outcome:
    statuses = list(running.job.statuses)
    good = [status is Status.HIT if running.is_load else bool(status) for status in statuses]
    return Outcome(job_id, running.is_load, running.keys, good, statuses, now_s - running.started_s)
