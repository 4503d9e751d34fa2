"""Fail the Nth operation: for every operation that a scenario does to its drive and its index, every way in which it can fail.

A scenario is run once to count its operations, by name and path. Then it is run again for each of them, with that one failing:
once, or from there on for good. After each run the scenario's own oracle looks at what the store said and at what a healthy drive
then holds, and the sweep at what was left behind: threads, descriptors, open files, held locks. A run that does not end is stopped
by a watchdog that shows where every thread stands. One line, ``str(injection)``, repeats a failure.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import faulthandler
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvlode import KvlodeError
from kvlode.engine.index import IndexDamaged, IndexWriteError
from kvlode.engine.index_memory import MemoryIndex
from kvlode.gds.device import Device
from kvlode.gds.memory import MemoryDevice
from kvlode.gds.testing import Effect, Fault, FaultyDevice

HANG_S = 60.0
"""Far more than any run takes: every wait inside a store is shorter."""
INDEX = "index"
"""The path that the operations of the index are counted under."""


# --- what fails -----------------------------------------------------------------------------------------------------------


class Lasting(enum.StrEnum):
    """For how long."""

    ONCE = "once"
    FOR_GOOD = "for-good"
    """From then on this operation fails on every path."""


@dataclass(frozen=True, order=True)
class Injection:
    """One failure. ``str`` gives the line that ``parse`` reads."""

    scenario: str
    operation: str
    path: str
    nth: int
    effect: Effect = field(compare=False)
    errno: int
    lasting: Lasting
    seed: int

    def __str__(self) -> str:
        code = errno.errorcode[self.errno]
        return f"{self.scenario} {self.operation} {self.path} {self.nth} {self.effect.value} {code} {self.lasting} {self.seed}"

    @classmethod
    def parse(cls, line: str) -> Injection:
        scenario, operation, path, nth, effect, code, lasting, seed = line.split()
        return cls(scenario, operation, path, int(nth), Effect(effect), getattr(errno, code), Lasting(lasting), int(seed))

    @property
    def kind(self) -> tuple[str, Effect, int, Lasting]:
        """What a sample must hold at least one of."""
        return self.operation, self.effect, self.errno, self.lasting


_EIO = ((Effect.ERROR, errno.EIO),)
_FULL = (*_EIO, (Effect.ERROR, errno.ENOSPC))
FAILURES: dict[str, Sequence[tuple[Effect, int]]] = {
    "open": _EIO,
    "status": _EIO,
    "list_folder": _EIO,
    "free_bytes": _EIO,
    "remove": _EIO,
    "truncate": _EIO,
    "punch": _EIO,
    "make_folder": _FULL,
    "rename": _FULL,
    "sync_folder": _FULL,
    "lock": _FULL,
    "preallocate": _FULL,
    "sync": _FULL,
    "read": (*_EIO, (Effect.SHORT, errno.EIO)),
    "write": (*_FULL, (Effect.SHORT, errno.EIO), (Effect.SHORT, errno.ENOSPC)),
    "index.apply": _EIO,
    "index.sync": _EIO,
    "index.scan": _EIO,
    "index.get": _EIO,
}
"""How each operation can fail."""


class Trigger:
    """``Fault.where`` of an injection: the nth operation on its path, and for good also everything behind it, wherever."""

    def __init__(self, injection: Injection) -> None:
        self._injection = injection
        self._seen = 0

    def __call__(self, path: str) -> bool:
        self._seen += path == self._injection.path
        return self._seen >= self._injection.nth


class FaultyIndex(MemoryIndex):
    """The index in memory, failing as ``device`` says; a lookup that fails reads as absent and is counted, as damage is."""

    def __init__(self, device: FaultyDevice, entries: dict[bytes, bytes] | None = None) -> None:
        super().__init__(entries)
        self._device = device

    def apply(self, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes] = ()) -> None:
        if self._device.strike("index.apply", INDEX):
            raise IndexWriteError("index refused a batch", actual="injected")
        super().apply(puts, deletes)

    def sync(self) -> None:
        if self._device.strike("index.sync", INDEX):
            raise IndexWriteError("index could not be synced", actual="injected")
        super().sync()

    def scan(self, prefix: bytes = b"", start: bytes | None = None) -> Any:
        if self._device.strike("index.scan", INDEX):
            raise IndexDamaged("index scan stopped by damage", actual="injected")
        return super().scan(prefix, start)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if self._device.strike("index.get", INDEX):
            self._damaged += len(keys)
            return [None] * len(keys)
        return super().get_many(keys)


# --- scenarios ------------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """One run: the drive, what stands between it and the store, and what was found wrong."""

    memory: MemoryDevice
    device: FaultyDevice
    state: Any
    """The scenario's own."""
    fault: Fault | None = None
    problems: list[str] = field(default_factory=list)
    errors: list[KvlodeError] = field(default_factory=list)
    """Errors that the host got to see: allowed once a fault struck."""

    @property
    def struck(self) -> bool:
        return self.fault is not None and self.fault.hits > 0

    def wrong(self, problem: str) -> None:
        self.problems.append(problem)

    def attempt(self, call: Callable[[], Any]) -> Any:
        """The answer of a call that may raise an error of kvlode when a fault struck; ``None`` then."""
        try:
            return call()
        except KvlodeError as error:
            self.errors.append(error)
            if not self.struck:
                self.wrong(f"an error without a fault: {error!r}")
            return None


@dataclass(frozen=True)
class Scenario:
    """``drive`` is what there is before (copied for each run), ``start`` makes the run's own state, ``act`` works on the failing device
    and ends with everything closed, ``verify`` looks at the healthy drive afterwards."""

    name: str
    drive: Callable[[], MemoryDevice]
    start: Callable[[FaultyDevice], Any]
    act: Callable[[World], None]
    verify: Callable[[World], None]
    runs: int = 60
    """How many failures the default run tries; the slow tests try every one."""

    def world(self, faults: Iterable[Fault] = ()) -> World:
        memory = self.drive().crash(keep="all")
        device = FaultyDevice(memory, list(faults))
        return World(memory, device, self.start(device))


class _Counting(FaultyDevice):
    """Counts every operation that could be made to fail."""

    def __init__(self, inner: Device) -> None:
        super().__init__(inner)
        self.seen: Counter[tuple[str, str]] = Counter()

    def strike(self, operation: str, path: str) -> Fault | None:
        with self._lock:
            self.seen[operation, path] += 1
        return None


def count_operations(scenario: Scenario) -> Counter[tuple[str, str]]:
    """How often a healthy run does what to which path. Raises ``AssertionError`` when even that run is wrong."""
    world = scenario.world()
    world.device = _Counting(world.memory)
    world.state = scenario.start(world.device)
    _in_bounded_time(f"{scenario.name}: the run without faults", lambda: scenario.act(world))
    seen = Counter(world.device.seen)
    scenario.verify(world)
    assert not world.problems, f"{scenario.name} without any fault: {world.problems}"
    return seen


def injections(scenario: Scenario, seed: int) -> list[Injection]:
    """Every failure of every operation of a scenario."""
    found = []
    for (operation, path), count in sorted(count_operations(scenario).items()):
        for nth in range(1, count + 1):
            for effect, code in FAILURES[operation]:
                found += [Injection(scenario.name, operation, path, nth, effect, code, lasting, seed) for lasting in Lasting]
    return found


def sample(everything: list[Injection], count: int, seed: int) -> list[Injection]:
    """``count`` of them, the same for a seed: one of each kind first, then one on each path, then whatever chance draws."""
    chance = random.Random(seed)
    drawn = list(everything)
    chance.shuffle(drawn)
    kinds = {injection.kind: injection for injection in drawn}
    paths = {(injection.operation, injection.path): injection for injection in drawn}
    return sorted(list(dict.fromkeys([*kinds.values(), *paths.values(), *drawn]))[:count])


# --- one run --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What one injection led to."""

    injection: Injection
    struck: bool
    problems: tuple[str, ...]
    seconds: float


def run(scenario: Scenario, injection: Injection) -> Outcome:
    """Run a scenario with one failure and look at what came of it."""
    fault = Fault(
        injection.operation,
        injection.effect,
        injection.errno,
        times=1 if injection.lasting is Lasting.ONCE else None,
        where=Trigger(injection),
        seed=injection.seed,
    )
    threads, descriptors = _threads(), _descriptors()
    world = scenario.world()
    world.fault = world.device.inject(fault)
    begun_s = time.monotonic()
    _in_bounded_time(str(injection), lambda: scenario.act(world))
    world.device.clear()
    _look_for_leaks(world, threads, descriptors)
    _in_bounded_time(str(injection), lambda: scenario.verify(world))
    return Outcome(injection, world.struck, tuple(world.problems), time.monotonic() - begun_s)


def _threads() -> set[threading.Thread]:
    return set(threading.enumerate())


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _look_for_leaks(world: World, threads: set[threading.Thread], descriptors: int) -> None:
    deadline_s = time.monotonic() + HANG_S
    pause = threading.Event()
    while (left := _threads() - threads) and time.monotonic() < deadline_s:
        pause.wait(0.001)  # a thread that was joined may still be on its last step
    if left:
        world.wrong(f"threads are left: {sorted(thread.name for thread in left)}\n{_stacks()}")
    if _descriptors() > descriptors:
        world.wrong(f"{_descriptors() - descriptors} descriptors are left")
    if world.memory._handles:
        world.wrong(f"{sum(world.memory._handles.values())} files of the device are left open")
    held = [path for path, locks in world.memory._locks.items() if locks]
    if held:
        world.wrong(f"locks are left held: {held}")


class HangError(AssertionError):
    """A run did not end in time; the message shows where every thread stands."""


def _in_bounded_time(line: str, function: Callable[[], None]) -> None:
    """Call on a thread of its own; raises what it raised, or ``HangError``."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded, name="sweep", daemon=True)
    thread.start()
    thread.join(HANG_S)
    if thread.is_alive():
        raise HangError(f"{line}: did not end within {HANG_S:.0f} s\n{_stacks()}")
    if errors:
        raise AssertionError(f"{line}: {type(errors[0]).__name__}: {errors[0]}") from errors[0]


def _stacks() -> str:
    with tempfile.TemporaryFile(mode="w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


# --- all of them ----------------------------------------------------------------------------------------------------------


@dataclass
class Sweep:
    """The outcomes of many injections."""

    outcomes: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(dataclasses.replace(outcome))

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.problems]

    def summary(self) -> str:
        struck = sum(outcome.struck for outcome in self.outcomes)
        kinds = len({outcome.injection.kind for outcome in self.outcomes if outcome.struck})
        slowest = max((outcome.seconds for outcome in self.outcomes), default=0.0)
        return f"{len(self.outcomes)} runs, {struck} faults struck ({kinds} kinds), {len(self.failures)} wrong, slowest {slowest:.1f} s"
