"""Jobs of a store set: one that the host sees, over the jobs of the stores.

A get goes from store to store. Each round asks every store for the blocks that are most likely there, all stores at once; what one of
them does not deliver is tried in the next one of its route, as soon as the store's job is over, on the thread that ended it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .contract import GetJob, PutJob, PutStatus, Status
from .jobs import ACCEPTED, Job

_SEVERITY = {
    Status.MISS: 0,
    Status.EXPIRED: 1,
    Status.WRONG_SIZE: 2,
    Status.IO_ERROR: 3,
    Status.CORRUPT: 4,
}
"""What a key is reported as that no store delivered: the answer that says most."""
FINAL = (Status.HIT, Status.PENDING)
"""After these a key is not tried elsewhere."""


@dataclass(eq=False, slots=True)
class Leg:
    """Some keys of a get, read from one store."""

    number: int
    """Of the store."""
    positions: list[int]
    job: GetJob | None = None


class Plan:
    """Where each key is read next, and the best answer so far. Not thread-safe."""

    def __init__(self, routes: Sequence[Sequence[int]], on_failure: Callable[[int, int, Status], None]) -> None:
        """``on_failure`` hears of the store, the position and the status of a key that a store did not deliver."""
        self._routes = [list(route) for route in routes]
        self._answers = [Status.MISS] * len(routes)
        self._on_failure = on_failure
        self.statuses = [Status.PENDING] * len(routes)
        self.verified = [False] * len(routes)
        self.unsettled = len(routes)

    def legs(self, positions: Sequence[int]) -> list[Leg]:
        """The next reads for these keys, one a store; keys without a store left are settled."""
        by_store: dict[int, Leg] = {}
        for position in positions:
            route = self._routes[position]
            if route:
                number = route.pop(0)
                by_store.setdefault(number, Leg(number, [])).positions.append(position)
            else:
                self.settle(position, self._answers[position])
        return list(by_store.values())

    def answer(self, leg: Leg, statuses: Sequence[Status], verified: Sequence[bool]) -> list[int]:
        """Take a store's answer; the keys that have to be tried elsewhere."""
        rest: list[int] = []
        for position, status, checked in zip(leg.positions, statuses, verified, strict=True):
            if status in FINAL:
                self.settle(position, status, verified=checked)
                continue
            self._on_failure(leg.number, position, status)
            if _SEVERITY.get(status, 0) > _SEVERITY[self._answers[position]]:
                self._answers[position] = status
            rest.append(position)
        return rest

    def settle(self, position: int, status: Status, *, verified: bool = False) -> None:
        self.statuses[position] = status
        self.verified[position] = verified and status is Status.HIT
        self.unsettled -= 1


class SetReadJob(Job):
    """A ``GetJob`` over those of the stores. ``submit`` starts a leg with a queue for its job; ``None`` when the store is lost."""

    def __init__(self, plan: Plan, submit: Callable[[Leg, Any], GetJob | None], queue: Any | None = None) -> None:
        super().__init__(queue)
        self._plan = plan
        self._submit = submit
        self._running: set[Leg] = set()
        self._cancelled = False

    def start(self) -> None:
        """Begin; called once, before anybody else knows of the job."""
        self._go_on(list(range(len(self._plan.statuses))))

    @property
    def statuses(self) -> Sequence[Status]:
        with self._lock:
            statuses = list(self._plan.statuses)
            for position, status, _ in self._under_way():
                statuses[position] = status
            return statuses

    @property
    def verified(self) -> Sequence[bool]:
        with self._lock:
            verified = list(self._plan.verified)
            for position, _, checked in self._under_way():
                verified[position] = checked
            return verified

    def _under_way(self) -> list[tuple[int, Status, bool]]:
        """Hits of jobs that still run."""
        found = []
        for leg in self._running:
            if leg.job is not None:
                answers = zip(leg.positions, leg.job.statuses, leg.job.verified, strict=True)
                found += [answer for answer in answers if answer[1] is Status.HIT]
        return found

    def cancel(self, timeout: float | None = None) -> bool:
        """See ``GetJob.cancel``."""
        with self._lock:
            self._cancelled = True
            jobs = [leg.job for leg in self._running if leg.job is not None]
        for job in jobs:
            job.cancel(timeout=0)
        return self.wait(timeout)

    def _go_on(self, positions: list[int]) -> None:
        with self._lock:
            legs: list[Leg] = []
            if self._cancelled:
                for position in positions:
                    self._plan.settle(position, Status.CANCELLED)
            else:
                legs = self._plan.legs(positions)
            self._running.update(legs)
            settled = self._plan.unsettled == 0
        for leg in legs:
            self._launch(leg)
        if settled:
            self._finish()

    def _launch(self, leg: Leg) -> None:
        job = self._submit(leg, _Ending(self, leg))  # a job that is over at once has ended the leg when this returns
        if job is None:
            self._ended(leg, [Status.MISS] * len(leg.positions), [False] * len(leg.positions))
            return
        with self._lock:
            leg.job = job
            cancelled = self._cancelled and leg in self._running
        if cancelled:
            job.cancel(timeout=0)

    def _ended(self, leg: Leg, statuses: Sequence[Status], verified: Sequence[bool]) -> None:
        with self._lock:
            if leg not in self._running:
                return
            self._running.remove(leg)
            rest = self._plan.answer(leg, statuses, verified)
            settled = self._plan.unsettled == 0
        if rest:
            self._go_on(rest)
        elif settled:
            self._finish()


class _Ending:
    """The queue that the job of a leg is given: hears of its end."""

    def __init__(self, job: SetReadJob, leg: Leg) -> None:
        self._job = job
        self._leg = leg

    def push(self, job: GetJob) -> None:
        self._job._ended(self._leg, job.statuses, job.verified)


class SetWriteJob(Job):
    """A ``PutJob`` over those of the stores. The maker adds them, then calls ``complete``; each gets ``self.ending`` as its queue."""

    def __init__(self, count: int, queue: Any | None = None) -> None:
        super().__init__(queue)
        self._decided: list[PutStatus] = [ACCEPTED] * count
        self._parts: list[tuple[Sequence[int], PutJob]] = []
        self._open = 1
        self.ending: Any = _PartEnding(self)

    @property
    def statuses(self) -> Sequence[PutStatus]:
        with self._lock:
            statuses = list(self._decided)
            for positions, job in self._parts:
                for position, status in zip(positions, job.statuses, strict=True):
                    statuses[position] = status
            return statuses

    def decide(self, position: int, status: PutStatus) -> None:
        """The status of a key that no store is asked to put."""
        self._decided[position] = status

    def begin_part(self) -> None:
        """A store's job is about to be made."""
        with self._lock:
            self._open += 1

    def add(self, positions: Sequence[int], job: PutJob) -> None:
        """It was made, for these keys; the word of a later one counts."""
        with self._lock:
            self._parts.append((positions, job))

    def complete(self) -> None:
        """Nothing more is added, or one of the jobs has ended."""
        with self._lock:
            self._open -= 1
            over = self._open == 0
        if over:
            self._finish()


class _PartEnding:
    """The queue of the stores' jobs."""

    def __init__(self, job: SetWriteJob) -> None:
        self._job = job

    def push(self, job: PutJob) -> None:
        self._job.complete()
