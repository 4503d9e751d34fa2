"""Every state that a power cut can leave of a recorded run, and what a store may answer in it.

``record`` runs a workload once on a recording device with a recording index: one log with every operation of the device, every
batch of the index, and every call of the host. A prefix of that log is a moment at which the power may fail. For
each moment ``states`` gives what may then be on the drive: nothing, everything or parts of what was not synced, pages torn
between sectors, names not synced, with any index from the newest down to none. ``Expectation`` says what may be read.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xxhash

from kvlode import BlockInfo, DiskStore, Namespace, Status
from kvlode.engine.index_memory import Batch, MemoryIndex
from kvlode.engine.testing import ManualClock, open_on_device
from kvlode.gds.memory import MemoryDevice
from kvlode.gds.recording import Close, Log, MakeLockFile, Open, Read, RecordingDevice, replay
from model import Ident, Value, descriptor

KIB, MIB = 1 << 10, 1 << 20
WAIT_S = 60.0
NO_TRACE = (Read, Close, Open, MakeLockFile)
"""Operations after which the drive holds what it held before."""


# --- the log: device, index and host in one order ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IndexApplied:
    batch: Batch


@dataclass(frozen=True, slots=True)
class IndexSynced:
    """A sync of the index returned; it covers the batches applied before ``began``."""

    began: int


@dataclass(frozen=True, slots=True)
class Issued:
    """The host is about to make a block have this value (``None``: to delete it)."""

    ident: Ident
    value: Value | None


@dataclass(frozen=True, slots=True)
class Flushed:
    """A flush returned True; it promises the changes issued before ``began``."""

    began: int


@dataclass(frozen=True, slots=True)
class Seen:
    """The host looked, from ``began`` on: these blocks are there. Also the time at that moment."""

    began: int
    present: frozenset[Ident]
    now_ns: int


class RecordedIndex(MemoryIndex):
    """The index in memory, noting its batches and syncs in the device's log."""

    def __init__(self, log: Log, entries: dict[bytes, bytes] | None = None) -> None:
        super().__init__(entries)
        self._log: Any = log

    def apply(self, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes] = ()) -> None:
        super().apply(puts, deletes)
        self._log.add(IndexApplied((tuple(puts), tuple(deletes))))

    def sync(self) -> None:
        began = len(self._log)
        super().sync()
        self._log.add(IndexSynced(began))

    def again(self) -> RecordedIndex:
        """What is found after a close."""
        return RecordedIndex(self._log, self.reopen()._entries)


# --- the run ----------------------------------------------------------------------------------------------------------


class Run:
    """A store on a recording device, driven by a workload; each change is noted before it is made."""

    def __init__(self, seed: int, **options: Any) -> None:
        self.chance = random.Random(seed)
        self.clock = ManualClock()
        self.device = RecordingDevice(MemoryDevice())
        self.index = RecordedIndex(self.device.log)
        self.options = options
        self.idents: list[Ident] = []
        self.descriptors: dict[str, Namespace] = {}
        self._log: Any = self.device.log
        self._versions = 0
        self._open()

    def _open(self) -> None:
        self.store: DiskStore = open_on_device(self.device, index=self.index, clock=self.clock, **self.options)

    def descriptor(self, name: str) -> Namespace:
        """The namespaces of a run; made once, since every state opens them."""
        return self.descriptors.setdefault(name, descriptor(name, block_bytes_max=64 * KIB))

    def space(self, name: str) -> Any:
        return self.store.namespace(self.descriptor(name))

    def put(self, ident: Ident, size: int, ttl: float | None = None, parent: bytes | None = None) -> None:
        self._versions += 1
        value = Value(self._versions, size, None if ttl is None else self.clock.now_ns() + int(ttl * 1e9))
        if ident not in self.idents:
            self.idents.append(ident)
        if self.space(ident[0]).contains([ident[1]])[0]:
            return  # a put of a present block changes nothing
        self._log.add(Issued(ident, value))
        assert self.space(ident[0]).put(ident[1], value.bytes_of(ident[1]), ttl=ttl, parent=parent)

    def delete(self, ident: Ident) -> None:
        self._log.add(Issued(ident, None))
        self.space(ident[0]).delete([ident[1]])

    def drop(self, name: str) -> None:
        for ident in self.idents:
            if ident[0] == name:
                self._log.add(Issued(ident, None))
        self.space(name).drop()

    def flush(self) -> None:
        began = len(self._log)
        assert self.store.flush(WAIT_S)
        self._log.add(Flushed(began))

    def look(self) -> None:
        """Note which blocks are there."""
        began = len(self._log)
        present = frozenset(i for i in self.idents if self.space(i[0]).contains([i[1]])[0])
        self._log.add(Seen(began, present, self.clock.now_ns()))

    def touch(self, ident: Ident) -> None:
        """Three uses: reclaim will copy the block forward."""
        for _ in range(3):
            self.space(ident[0]).touch([ident[1]])

    def reopen(self) -> None:
        self.close()
        self.index = self.index.again()
        self._open()

    def close(self) -> None:
        began = len(self._log)
        assert self.store.close(WAIT_S)
        self._log.add(IndexSynced(began))
        self._log.add(Flushed(began))

    def operations(self) -> list[Any]:
        return list(self.device.operations())


def record(workload: Callable[[Run], None], seed: int, **options: Any) -> tuple[list[Any], Run]:
    """The log of one run of a workload, closed at its end."""
    run = Run(seed, **options)
    workload(run)
    run.look()
    run.look()
    run.close()
    return run.operations(), run


# --- what may be on the drive -----------------------------------------------------------------------------------------

IndexChoice = Literal["newest", "synced", "older", "lost"]


@dataclass(frozen=True, slots=True)
class Moment:
    """One power cut: after ``position`` entries of the log, with what survives of the unsynced, and which index."""

    position: int
    keep: Literal["none", "all", "random"]
    seed: int
    index: IndexChoice

    def __str__(self) -> str:
        return f"position {self.position}, unsynced writes: {self.keep} (seed {self.seed}), index: {self.index}"


@dataclass(slots=True)
class State:
    """A drive and an index as they are found after a power cut."""

    moment: Moment
    device: MemoryDevice
    index_entries: dict[bytes, bytes]
    natural: bool
    """Whether the index holds all that was synced (an older or lost index is a further mishap)."""

    def fingerprint(self) -> int:
        """Equal for states that a store cannot tell apart."""
        hasher = xxhash.xxh3_64()
        for path, content in sorted(self.device._names.files(), key=lambda item: item[0]):
            hasher.update(f"{path} {content.size_bytes};".encode())
            for page in sorted(content.pages):
                hasher.update(page.to_bytes(8, "little"))
                hasher.update(content.pages[page])
        for key in sorted(self.index_entries):
            hasher.update(key + self.index_entries[key])
        return hasher.intdigest()


def states(log: list[Any], *, randoms: int, seed: int, base: State | None = None) -> Iterator[State]:
    """Distinct crash states, moment by moment. ``randoms``: random subsets of the unsynced a moment.

    ``base`` is what the recorded run found when it began (default: an empty drive and no index).
    """
    seen: set[int] = set()
    chance = random.Random(seed)
    for position in range(1, len(log) + 1):
        if isinstance(log[position - 1], NO_TRACE):
            continue
        drive = replay(log[:position], None if base is None else base.device)
        for number in range(randoms + 2):
            keep: Literal["none", "all", "random"] = ("none", "all")[number] if number < 2 else "random"
            draw = chance.randrange(1 << 30)
            device = drive.crash(draw, keep)
            for choice in _index_choices(number):
                moment = Moment(position, keep, draw, choice)
                entries, natural = _index_at(log, position, choice, chance, {} if base is None else base.index_entries)
                state = State(moment, device.crash(0, "all"), entries, natural)
                mark = state.fingerprint()
                if mark not in seen:
                    seen.add(mark)
                    yield state


def _index_choices(number: int) -> tuple[IndexChoice, ...]:
    return (("newest", "synced", "lost"), ("newest", "synced", "older"))[number] if number < 2 else ("newest", "older")


def _index_at(
    log: list[Any], position: int, choice: IndexChoice, chance: random.Random, base: dict[bytes, bytes]
) -> tuple[dict[bytes, bytes], bool]:
    applied = [place for place in range(position) if isinstance(log[place], IndexApplied)]
    covered = max((entry.began for entry in log[:position] if isinstance(entry, IndexSynced)), default=0)
    synced = sum(1 for place in applied if place < covered)
    count = {"newest": len(applied), "synced": synced, "older": chance.randint(0, synced), "lost": 0}[choice]
    index = MemoryIndex({} if choice == "lost" else base)
    for place in applied[:count]:
        puts, deletes = log[place].batch
        index.apply(puts, deletes)
    return dict(index._entries), count >= synced


# --- what may be read -------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=512)
def _bytes_of(value: Value, key: bytes) -> np.ndarray:
    """Made once for all the states of a run."""
    return value.bytes_of(key)


@dataclass(slots=True)
class Expectation:
    """What a store that is opened at a moment may say of each block."""

    possible: dict[Ident, list[Value | None]]
    """Values issued since the flush that holds at that moment, that flush's own first."""
    required: set[Ident]
    """Flushed, not changed since, and still there when the host looked next: these must be found."""
    now_ns: int
    sizes: dict[Ident, int]
    """Length of the last block that was ever put under a key: a deleted one must not be found by reading into it."""

    @classmethod
    def at(cls, log: list[Any], position: int, idents: Sequence[Ident]) -> Expectation:
        began = max((entry.began for entry in log[:position] if isinstance(entry, Flushed)), default=0)
        possible: dict[Ident, list[Value | None]] = {ident: [None] for ident in idents}
        for place, entry in enumerate(log[:position]):
            if isinstance(entry, Issued):
                possible[entry.ident] = [entry.value] if place < began else [*possible[entry.ident], entry.value]
        before = [entry for entry in log[:position] if isinstance(entry, Seen)]
        looks = [place for place in range(position, len(log)) if isinstance(log[place], Seen) and log[place].began >= position][:2]
        # Two looks: a block that reclaim has just given up may be served from its copy in the buffer for a moment longer.
        known = [log[place] for place in looks] or before[-1:]
        changed = {entry.ident for entry in log[position : max(looks, default=position)] if isinstance(entry, Issued)}
        lasting = frozenset.intersection(*(seen.present for seen in known)) - changed
        now_ns = (before[-1] if before else known[0]).now_ns
        required = {ident for ident, values in possible.items() if len(values) == 1 and values[0] is not None and ident in lasting}
        sizes = {entry.ident: entry.value.size for entry in log if isinstance(entry, Issued) and entry.value is not None}
        return cls(possible, required, now_ns, sizes)

    def sizes_of(self, space: Any, idents: Sequence[Ident]) -> list[int]:
        """Length of the destination for reading each block; the store is asked where several are possible."""
        possible = [{value.size for value in self.possible[ident] if value is not None} or {self.sizes[ident]} for ident in idents]
        unclear = [ident[1] for ident, sizes in zip(idents, possible, strict=True) if len(sizes) > 1]
        found: dict[bytes, BlockInfo | None] = dict(zip(unclear, space.info(unclear), strict=True)) if unclear else {}
        infos = [found.get(key) for _, key in idents]
        return [max(sizes) if info is None else info.raw_bytes for sizes, info in zip(possible, infos, strict=True)]

    def check(self, ident: Ident, status: Status, data: np.ndarray) -> str | None:
        """What is wrong with an answer (``data`` is what was read); ``None`` when it is right."""
        values = self.possible[ident]
        if status is Status.HIT:
            held = [v for v in values if v is not None and v.size == data.nbytes and not v.expired(self.now_ns)]
            if not any(np.array_equal(_bytes_of(value, ident[1]), data) for value in held):
                return f"{ident}: bytes that were never put, possible {values}"
            return None
        if status not in (Status.MISS, Status.EXPIRED):
            return f"{ident}: {status.name}"
        lasting = values[0]
        if ident in self.required and lasting is not None and not lasting.expired(self.now_ns):
            return f"{ident}: {status.name}, but {lasting} was flushed"
        return None


def open_state(state: State, run: Run, index: MemoryIndex, now_ns: int) -> DiskStore:
    """The store that a process finds after the power cut. ``index`` has the state's entries.

    With room for everything: a full store frees its oldest segment as soon as it is open, which is no fault of the power cut.
    """
    return open_on_device(state.device, index=index, clock=ManualClock(now_ns), **(run.options | {"capacity": 64 * MIB}))


def read_all(store: DiskStore, run: Run, expected: Expectation) -> list[str]:
    """Read every block that ever was; what is wrong."""
    wrong: list[str | None] = []
    for name in sorted({name for name, _ in run.idents}):
        space = store.namespace(run.descriptor(name))
        idents = [ident for ident in run.idents if ident[0] == name]
        keys = [key for _, key in idents]
        outs = [np.zeros(size, np.uint8) for size in expected.sizes_of(space, idents)]
        answers = zip(idents, space.get_many_into(keys, outs), outs, strict=True)
        wrong += [expected.check(*answer) for answer in answers]
    return [problem for problem in wrong if problem is not None]
