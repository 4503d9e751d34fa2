"""A model of a store: what it may answer, as a dictionary, and blocks whose every byte says whose it is.

``Model`` keeps for each block the values it may have. While the store runs there is one. After a crash every value that
the block had since the last flush is possible, the one of that flush included, and nothing else: flushed blocks must be
there, flushed deletes must hold, and what comes back must be whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from kvlode import Namespace, PutState, PutStatus, Status
from kvlode.engine.testing import ManualClock

HEAD_BYTES = 8
"""Blocks of this size or more begin with their version, little-endian."""


def descriptor(name: str = "model", **fields: object) -> Namespace:
    """A namespace for tests: bf16 blocks of up to 4 MiB unless told otherwise."""
    values: dict[str, object] = {
        "model": name,
        "revision": "r1",
        "dtype": "bfloat16",
        "layout": "opaque",
        "tokens_per_block": 16,
        "block_bytes_max": 4 << 20,
    }
    return Namespace(**(values | fields))  # type: ignore[arg-type]


# --- content -----------------------------------------------------------------------------------------------------


def block_bytes(key: bytes, version: int, size: int) -> np.ndarray:
    """The bytes of a block: they follow from key, version and size, and differ wherever one of these does.

    The version also chooses what they look like to a codec: noise, small bf16 numbers, long runs, or zeros behind a head.
    """
    seed = hashlib.blake2b(key + version.to_bytes(HEAD_BYTES, "little") + size.to_bytes(8, "little"), digest_size=16).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(seed, "little")))
    kind = version % 4
    if kind == 0:
        data = np.frombuffer(generator.bytes(size), np.uint8).copy()
    elif kind == 1:
        values = generator.standard_normal(size // 2 + 1, dtype=np.float32)
        data = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)[:size].copy()
    elif kind == 2:
        data = np.repeat(np.frombuffer(generator.bytes(size // 64 + 1), np.uint8), 64)[:size].copy()
    else:
        data = np.zeros(size, np.uint8)
        data[: 64 + HEAD_BYTES] = np.frombuffer(generator.bytes(64 + HEAD_BYTES), np.uint8)[:size]
    if size >= HEAD_BYTES:
        data[:HEAD_BYTES] = np.frombuffer(version.to_bytes(HEAD_BYTES, "little"), np.uint8)
    return data


def version_of(key: bytes, data: np.ndarray) -> int:
    """The version that these bytes are, checked to the last one; raises ``AssertionError`` when they are no version at all."""
    assert data.nbytes >= HEAD_BYTES, "shorter blocks do not say their version"
    version = int.from_bytes(data[:HEAD_BYTES].tobytes(), "little")
    expected = block_bytes(key, version, data.nbytes)
    assert np.array_equal(expected, data), f"key {key.hex()}: claims version {version}, first wrong byte {first_difference(expected, data)}"
    return version


def first_difference(a: np.ndarray, b: np.ndarray) -> int | None:
    """Position of the first byte in which two blocks differ."""
    different = np.flatnonzero(a[: min(a.size, b.size)] != b[: min(a.size, b.size)])
    return int(different[0]) if different.size else None


# --- the model ---------------------------------------------------------------------------------------------------


Ident = tuple[str, bytes]
"""Name of a namespace, and key."""


@dataclass(frozen=True)
class Value:
    """A block as it was put."""

    version: int
    size: int
    expires_at_ns: int | None = None
    meta: bytes = b""

    def bytes_of(self, key: bytes) -> np.ndarray:
        return block_bytes(key, self.version, self.size)

    def expired(self, now_ns: int) -> bool:
        return self.expires_at_ns is not None and now_ns >= self.expires_at_ns


@dataclass
class _Block:
    """Values that one block may have; ``None`` is absence. The last candidate is the latest."""

    candidates: list[Value | None] = field(default_factory=lambda: [None])
    since_flush: list[Value | None] = field(default_factory=lambda: [None])
    ghosts: list[Value | None] = field(default_factory=list)
    """Values that reclaim may have given up: an index derived anew may find them in a segment that was not yet removed."""
    changed: bool = False

    @property
    def known(self) -> bool:
        return len(self.candidates) == 1

    history: list[Value | None] = field(default_factory=lambda: [None])
    """Every value that it ever had, oldest first: a read in the background may find any one since it began."""

    def become(self, value: Value | None) -> None:
        self.candidates = [value]
        self.history.append(value)
        self.since_flush.append(value)
        self.changed = True

    def flushed(self) -> None:
        assert self.known
        self.since_flush = list(self.candidates)
        if self.changed:  # what was put or deleted since kills whatever lay under the key before
            self.ghosts, self.changed = [], False


class Model:
    """See the module. ``lossy`` stores may give up any block for want of room; they may not bring back a deleted one."""

    def __init__(self, clock: ManualClock, *, lossy: bool = False) -> None:
        self.clock = clock
        self.lossy = lossy
        self.blocks: dict[Ident, _Block] = {}
        self._versions = 0

    def next_version(self) -> int:
        self._versions += 1
        return self._versions

    def _block(self, ident: Ident) -> _Block:
        return self.blocks.setdefault(ident, _Block())

    def idents(self, space: str | None = None) -> list[Ident]:
        """Blocks that ever were, in a stable order."""
        return sorted(ident for ident in self.blocks if space is None or ident[0] == space)

    def value(self, ident: Ident) -> Value | None:
        """What is visible now: absent when it has expired. Only for blocks whose value is known."""
        block = self._block(ident)
        assert block.known, f"{ident} is one of {block.candidates}: learn it first"
        value = block.candidates[0]
        return None if value is None or value.expired(self.clock.now_ns()) else value

    # --- changes --------------------------------------------------------------------------------------------------

    def put(self, ident: Ident, value: Value, status: PutStatus) -> None:
        """A put of ``value`` was answered with ``status``; wrong answers raise ``AssertionError``."""
        present = self.value(ident)
        if present is None:
            assert status.state is not PutState.EXISTS, f"{ident} was absent, the put says it exists"
        elif not self.lossy:
            assert status.state is PutState.EXISTS, f"{ident} holds {present}, the put says {status}"
        if not self.lossy:
            assert status, f"{ident}: {status}"
        if status.state in (PutState.ACCEPTED, PutState.DURABLE):
            self._block(ident).become(value)

    def delete(self, ident: Ident, was_present: bool) -> None:
        """A delete was answered; one that found nothing changes nothing."""
        present = self.value(ident) is not None
        assert was_present == present or (self.lossy and present), f"{ident}: present {present}, the delete says {was_present}"
        if was_present or self.lossy:  # what the store has given up, and does not know of, must not come back either
            self._block(ident).become(None)

    def drop(self, space: str) -> None:
        """The namespace was dropped."""
        for ident in self.idents(space):
            self._block(ident).become(None)

    def flushed(self) -> None:
        """``flush`` returned True."""
        for block in self.blocks.values():
            block.flushed()

    def crashed(self) -> None:
        """Power was lost: until they are learnt, blocks have any value that they had since the last flush."""
        for block in self.blocks.values():
            block.candidates = list(dict.fromkeys([*block.ghosts, *block.since_flush]))

    def index_lost(self) -> None:
        """The index was derived again: until they are learnt, blocks may be back that were given up and not deleted."""
        for block in self.blocks.values():
            block.candidates = list(dict.fromkeys([*block.ghosts, *block.since_flush]))

    def learn(self, ident: Ident, data: np.ndarray | None) -> None:
        """After a crash: the store gave these bytes for a block (``None``: absent); they must be one of its values, whole."""
        block = self._block(ident)
        possible = [value for value in block.candidates if self._matches(ident[1], value, data)]
        found = "nothing" if data is None else f"{data.nbytes} bytes, the first {data[:HEAD_BYTES].tobytes().hex()}"
        assert possible or (data is None and self.lossy), f"{ident}: found {found}, possible {block.candidates}"
        if data is None and self.lossy:
            block.ghosts, block.candidates = [value for value in block.candidates if value is not None], [None]
        else:
            block.ghosts, block.candidates = [], possible[-1:]
        block.since_flush, block.changed = list(block.candidates), False
        block.history = list(block.candidates)

    def _matches(self, key: bytes, value: Value | None, data: np.ndarray | None) -> bool:
        if value is None or value.expired(self.clock.now_ns()):
            return data is None
        return data is not None and value.size == data.nbytes and np.array_equal(value.bytes_of(key), data)

    # --- answers --------------------------------------------------------------------------------------------------

    def statuses(self, ident: Ident, size: int) -> set[Status]:
        """What reading a block into ``size`` bytes may answer."""
        value = self._block(ident).candidates[0]
        if value is None:
            return {Status.MISS}
        if value.expired(self.clock.now_ns()):
            return {Status.EXPIRED, Status.MISS}
        expected = {Status.HIT if value.size == size else Status.WRONG_SIZE}
        return expected | {Status.MISS} if self.lossy else expected

    def check_read(self, ident: Ident, status: Status, out: np.ndarray) -> None:
        """A read was answered with ``status`` and left ``out`` in the destination."""
        possible = self.statuses(ident, out.nbytes)
        assert status in possible, f"{ident}: {status.name}, expected {sorted(s.name for s in possible)}"
        if status is Status.HIT:
            value = self.value(ident)
            assert value is not None
            expected = value.bytes_of(ident[1])
            assert np.array_equal(expected, out), f"{ident}: first wrong byte {first_difference(expected, out)} of version {value.version}"

    def check_present(self, ident: Ident, present: bool) -> None:
        """A lookup said whether a block is present."""
        expected = self.value(ident) is not None
        assert present == expected or (self.lossy and expected), f"{ident}: present {expected}, the store says {present}"

    def check_prefix(self, idents: Iterable[Ident], matched: int) -> None:
        """``match_prefix`` counted this many leading blocks."""
        run = 0
        for ident in idents:
            if self.value(ident) is None:
                break
            run += 1
        assert matched == run or (self.lossy and matched < run), f"matched {matched}, expected {run}"
