"""The scenarios that the sweep of faults goes through, and the ledger that knows what a store may answer in each."""

from __future__ import annotations

import copy
import errno
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from faults.repair import REPAIR
from faults.sweep import FaultyIndex, Scenario, World
from kvlode import DiskStore, PutState, Status, StoreFailed
from kvlode.engine.config import StoreConfig
from kvlode.engine.index_memory import MemoryIndex
from kvlode.engine.opening import Environment, follow_store
from kvlode.engine.testing import STORE_PATH, ManualClock, open_on_device
from kvlode.gds.memory import MemoryDevice
from model import block_bytes, descriptor
from rig import eventually

KIB = 1 << 10
SIZE = 12 * KIB
WAIT_S = 40.0
CLOSE_S = 40.0
SPACE = descriptor("m", block_bytes_max=SIZE)
OTHER = descriptor("other", block_bytes_max=SIZE)
OPTIONS: dict[str, Any] = {
    "capacity": 2 << 20,
    "buffer": 1 << 20,
    "segment_bytes": 96 * KIB,
    "batch_bytes": 64 * KIB,
    "bounce_bytes": 8 << 20,
    "flush_after_s": 3600.0,  # batches are what was put between two flushes, in every run
    "encode_threads": 1,
    "serve_clean": False,
    "codec": "raw",
    "put_timeout_s": 0.0,
}


# --- what a store may answer ----------------------------------------------------------------------------------------------


@dataclass
class Change:
    """A put (``version``) or a delete (``None``) that was accepted."""

    version: int | None
    job: Any = None
    before: bool = False
    """Made before a power cut: it may have been lost with it."""

    @property
    def settled(self) -> PutState | None:
        return None if self.job is None else self.job.statuses[0].state


@dataclass
class Ledger:
    """Changes of each key since the one that is known to be durable, which comes first."""

    changes: dict[bytes, list[Change]] = field(default_factory=dict)
    reported: set[int] = field(default_factory=set)
    """Changes (by identity) that a flush has already said False of."""
    lossy: bool = False
    """Reclaim may give blocks up."""

    def copy(self) -> Ledger:
        return copy.deepcopy(self)

    def note(self, key: bytes, change: Change) -> None:
        self.changes.setdefault(key, [Change(None)]).append(change)

    def flushed(self, world: World, durable: bool) -> None:
        """``flush`` answered: what it promised is all that there may be from now on."""
        for key, changes in self.changes.items():
            for change in changes[1:]:
                if change.settled is PutState.REFUSED and durable and id(change) not in self.reported:
                    world.wrong(f"{key!r}: flush said True, and the block was given up: {change.job.statuses[0]}")
            if durable and all(id(change) not in self.reported for change in changes[1:]) and not changes[-1].before:
                self.changes[key] = changes[-1:]
        if not durable:
            self.reported.update(id(change) for changes in self.changes.values() for change in changes[1:])

    def durable(self) -> Ledger:
        """What a power cut at this moment must leave: a block whose job says DURABLE is."""
        snapshot = Ledger(lossy=self.lossy)
        for key, changes in self.changes.items():
            first = max((n for n, change in enumerate(changes) if change.settled is PutState.DURABLE), default=0)
            snapshot.changes[key] = [Change(change.version, before=True) for change in changes[first:]]
        return snapshot

    def check_later(self, world: World, when: str, key: bytes, status: Status, data: np.ndarray) -> None:
        """What a healthy store that was opened anew may say."""
        changes = self.changes[key]
        if status is Status.HIT:
            if not any(c.version is not None and np.array_equal(data, block_bytes(key, c.version, SIZE)) for c in changes):
                world.wrong(f"{when}: {key!r} has bytes that it may not have, possible versions {[c.version for c in changes]}")
        elif status is not Status.MISS:
            world.wrong(f"{when}: {key!r} is {status.name} on a healthy drive")
        elif not self.lossy and all(change.version is not None for change in changes):
            world.wrong(f"{when}: {key!r} was durable and is gone")

    def check_now(self, world: World, key: bytes, status: Status, data: np.ndarray) -> None:
        """What the store that met the fault may say while it is open."""
        latest, operation = self.changes[key][-1], world.fault.operation if world.fault is not None and world.struck else ""
        if status is Status.HIT:
            held = [c.version for c in self.changes[key] if c.version is not None]
            if latest.version is None or not any(np.array_equal(data, block_bytes(key, version, SIZE)) for version in held):
                world.wrong(f"{key!r} has bytes that it may not have, possible versions {[c.version for c in self.changes[key]]}")
        elif status is Status.IO_ERROR:
            if operation not in ("read", "open"):
                world.wrong(f"{key!r} is an I/O error, and {operation or 'nothing'} failed")
        elif status is not Status.MISS:
            world.wrong(f"{key!r} is {status.name}")
        elif not (latest.version is None or latest.settled is PutState.REFUSED or self._may_miss(world, key, operation)):
            world.wrong(f"{key!r} was accepted and is a miss, {operation or 'nothing'} failed")

    def _may_miss(self, world: World, key: bytes, operation: str) -> bool:
        """A lookup in the index that fails reads as absent; an opening that met a fault may know less than the log holds."""
        lost = len(self.changes[key]) > 1 and self.changes[key][-1].before
        full = operation == "preallocate"  # a full file system costs the oldest segments
        return self.lossy or lost or full or world.state.may_miss or operation.startswith("index.")


# --- a store in a run -----------------------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """A drive, its index and what they hold."""

    memory: MemoryDevice
    entries: dict[bytes, bytes]
    ledger: Ledger


class Host:
    """Drives one store on the failing device, keeps its ledger, and remembers what a power cut would have left."""

    def __init__(self, device: Any, prepared: Prepared, *, lossy: bool = False, **options: Any) -> None:
        self.index = FaultyIndex(device, prepared.entries)
        self.ledger = prepared.ledger.copy()
        self.ledger.lossy = lossy or self.ledger.lossy
        self.clock = ManualClock()
        self.options = OPTIONS | options
        self.may_miss = False
        """A fault while it was opened may have kept part of the log from being read."""
        self.versions = 1000
        self.store: DiskStore | None = None
        self.at_power_cut: Prepared | None = None
        self._device = device

    def open(self, world: World) -> bool:
        self.store = world.attempt(lambda: open_on_device(self._device, index=self.index, clock=self.clock, **self.options))
        self.may_miss = world.struck
        return self.store is not None

    def put(self, world: World, *keys: bytes, version: int | None = None, own: str = "copy") -> None:
        assert self.store is not None
        for key in keys:
            self.versions += 1
            number = (self.versions if version is None else version) * 4  # noise: it does not compress
            job = self.store.namespace(SPACE).submit_put([key], [block_bytes(key, number, SIZE)], own=own)  # type: ignore[arg-type]
            if job.statuses[0].state not in (PutState.REFUSED, PutState.EXISTS):
                self.ledger.note(key, Change(number, job))
            elif job.statuses[0].state is PutState.REFUSED and not world.struck and not self.ledger.lossy:
                world.wrong(f"{key!r} is refused without a fault: {job.statuses[0]}")

    def delete(self, world: World, *keys: bytes) -> None:
        assert self.store is not None
        for key in keys:
            try:
                self.store.namespace(SPACE).delete([key])
            except StoreFailed:
                if not world.struck:
                    world.wrong("a delete failed without a fault")
                continue
            self.ledger.note(key, Change(None))

    def flush(self, world: World) -> None:
        assert self.store is not None
        durable = self.store.flush(WAIT_S)
        if not durable and not world.struck and not self.ledger.lossy:
            world.wrong("flush said False without a fault")
        self.ledger.flushed(world, durable)

    def read_everything(self, world: World) -> None:
        assert self.store is not None
        for key in self.ledger.changes:
            self.ledger.check_now(world, key, *_read(self.store, key))

    def check_latch(self, world: World) -> None:
        """A write or a sync of the log that failed is the end of writing; reading goes on."""
        assert self.store is not None
        failed = self.store.stats()["failure"] is not None
        if failed and not world.struck:
            world.wrong(f"the store failed without a fault: {self.store.stats()['failure']}")
        if not failed:
            return
        if self.store.flush(WAIT_S):
            world.wrong("flush says True after the store failed")
        status = self.store.namespace(SPACE).put(b"after the failure", block_bytes(b"after the failure", 4, SIZE))
        if status:
            world.wrong(f"a put is {status} after the store failed")
        self.read_everything(world)

    def check_recovers(self, world: World) -> None:
        """A fault that is over and did not stop the writer is over: blocks are taken again."""
        assert self.store is not None and world.fault is not None
        if world.fault.times is None or self.store.stats()["failure"] is not None:
            return
        space, key = self.store.namespace(SPACE), b"afterwards"

        def taken() -> bool:
            assert self.store is not None
            return bool(space.put(key, block_bytes(key, 4, SIZE))) and self.store.flush(WAIT_S)

        if not eventually(taken, 10.0):
            world.wrong(f"the fault is over, and the store takes no blocks: {self.store.stats()['counters']}")

    def end(self, world: World) -> None:
        """Look at the open store, remember the drive as a power cut would leave it, close."""
        if self.store is None:
            return
        self.read_everything(world)
        self.check_latch(world)
        if world.struck:
            self.check_recovers(world)
        if world.struck and world.fault is not None and world.fault.operation == "preallocate" and world.fault.errno == errno.ENOSPC:
            self.ledger.lossy = True  # a full file system costs the oldest segments
        durable = self.ledger.durable()
        self.at_power_cut = Prepared(world.memory.crash(), dict(self.index.crash()._entries), durable)
        if not self.store.close(CLOSE_S):
            world.wrong("close did not end in time")


def _read(store: DiskStore, key: bytes) -> tuple[Status, np.ndarray]:
    out = np.full(SIZE, 0xA5, np.uint8)
    return store.namespace(SPACE).get_into(key, out), out


def check_drive(world: World, when: str, drive: MemoryDevice, entries: dict[bytes, bytes], ledger: Ledger, **options: Any) -> None:
    """Open what is on a drive as a healthy process does, and compare every block."""
    index = MemoryIndex(entries)
    store = open_on_device(drive, index=index, clock=ManualClock(), **(OPTIONS | options))
    for key in ledger.changes:
        ledger.check_later(world, when, key, *_read(store, key))
    status = store.namespace(SPACE).put(b"new", block_bytes(b"new", 8, SIZE))
    if not ledger.lossy and not (status and store.flush(WAIT_S)):
        world.wrong(f"{when}: the store cannot be written to: {status}")
    if not store.close(CLOSE_S):
        world.wrong(f"{when}: close did not end in time")


def verify(world: World) -> None:
    """The drive as it was closed, with its index and without one; and as a power cut just before would have left it."""
    host: Host = world.state
    entries = dict(host.index.reopen()._entries)
    check_drive(world, "opened again", world.memory.crash(keep="all"), entries, host.ledger)
    check_drive(world, "opened again without an index", world.memory.crash(keep="all"), {}, host.ledger)
    cut = host.at_power_cut
    if cut is not None:
        check_drive(world, "after a power cut", cut.memory, cut.entries, cut.ledger)


# --- drives to begin with -------------------------------------------------------------------------------------------------


@functools.cache
def blank() -> Prepared:
    return Prepared(MemoryDevice(), {}, Ledger())


def _made(act: Callable[[World, Host], None], *, crash: bool, lossy: bool = False) -> Prepared:
    """A drive as a healthy store left it: closed, or without power in the middle."""
    scenario = Scenario(
        "preparation", lambda: MemoryDevice(), lambda device: Host(device, blank(), lossy=lossy), lambda _: None, lambda _: None
    )
    world = scenario.world()
    host: Host = world.state
    assert host.open(world)
    act(world, host)
    assert not world.problems, world.problems
    cut = Prepared(world.memory.crash(), dict(host.index.crash()._entries), host.ledger.durable())
    assert host.store is not None and host.store.close(CLOSE_S)
    ledger = Ledger({key: [Change(changes[-1].version)] for key, changes in host.ledger.changes.items()}, lossy=lossy)
    return cut if crash else Prepared(world.memory, dict(host.index.reopen()._entries), ledger)


def _some_history(world: World, host: Host) -> None:
    """Two sealed segments and an open one: blocks, deletes, a block that was put again."""
    for number in range(10):
        host.put(world, b"old %d" % number)
        if number % 3 == 2:
            host.flush(world)
    host.delete(world, b"old 1", b"old 4")
    host.flush(world)
    host.put(world, b"old 4")
    host.flush(world)


@functools.cache
def closed_store() -> Prepared:
    return _made(_some_history, crash=False)


@functools.cache
def crashed_store() -> Prepared:
    """The index is older than the log, by a whole segment and a torn one: that has to be read."""
    older: dict[bytes, bytes] = {}

    def act(world: World, host: Host) -> None:
        _some_history(world, host)
        older.update(host.index.crash()._entries)
        for number in range(7):
            host.put(world, b"late %d" % number)
            host.flush(world)
        host.delete(world, b"old 2")
        host.flush(world)
        host.put(world, b"never flushed")

    made = _made(act, crash=True)
    return Prepared(made.memory, older, made.ledger)


@functools.cache
def full_store() -> Prepared:
    def act(world: World, host: Host) -> None:
        for number in range(40):
            host.put(world, b"old %d" % number)
            if number % 4 == 3:
                host.flush(world)

    return _made(act, crash=False, lossy=True)


# --- what is done ---------------------------------------------------------------------------------------------------------


def _put_and_flush(world: World) -> None:
    host: Host = world.state
    if host.open(world):
        host.put(world, b"a", b"b")
        host.flush(world)
        host.put(world, b"c", own="borrow")
        host.delete(world, b"a")
        host.flush(world)
        host.put(world, b"a", b"d")
        host.flush(world)
    host.end(world)


def _seal(world: World) -> None:
    host: Host = world.state
    if host.open(world):
        for number in range(10):
            host.put(world, b"s %d" % number)
            if number % 2:
                host.flush(world)
    host.end(world)


def _reclaim(world: World) -> None:
    host: Host = world.state
    if host.open(world):
        assert host.store is not None
        for number in range(30):
            host.store.namespace(SPACE).touch([b"old 36", b"old 37", b"old 38"] * 2)
            host.put(world, b"new %d" % number)
            if number % 3 == 2:
                host.flush(world)
    host.end(world)


def _open_and_go_on(world: World) -> None:
    host: Host = world.state
    if host.open(world):
        host.read_everything(world)
        host.put(world, b"new 0", b"new 1")
        host.delete(world, b"old 0")
        host.flush(world)
    host.end(world)


def _follow(world: World) -> None:
    """A second handle that only reads, beside a drive that nobody writes to."""
    host: Host = world.state
    config = StoreConfig.build(**(host.options | {"index_kind": "memory"}))
    environment = Environment(device=world.device, clock=host.clock, index=host.index)
    host.store = world.attempt(lambda: follow_store(STORE_PATH, config, environment))
    if host.store is None:
        return
    host.read_everything(world)
    if not host.store.close(CLOSE_S):
        world.wrong("close did not end in time")


def _engine(
    name: str, prepared: Callable[[], Prepared], act: Callable[[World], None], *, index: bool = True, runs: int = 60, **options: Any
) -> Scenario:
    def start(device: Any) -> Host:
        made = prepared()
        return Host(device, made if index else Prepared(made.memory, {}, made.ledger), **options)

    return Scenario(name, lambda: prepared().memory, start, act, verify, runs)


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        _engine("put-and-flush", blank, _put_and_flush),
        _engine("seal", blank, _seal),
        _engine("reclaim", full_store, _reclaim, lossy=True, runs=40),
        _engine("open-after-close", closed_store, _open_and_go_on),
        _engine("open-after-crash", crashed_store, _open_and_go_on),
        _engine("rebuild-the-index", closed_store, _open_and_go_on, index=False),
        _engine("follow", closed_store, _follow),
        REPAIR,
    )
}
"""By name. A new part that works on the drive enters its scenario here."""
