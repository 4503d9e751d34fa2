"""Blocks that are cheap to make, incompressible or like a KV cache, and that say whose they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engine.config import StoreConfig
from ...engine.contract import PutStatus
from ...engine.opening import Environment, open_store
from ...engine.store import DiskStore
from ...format.checksum import xxh3_64
from ...format.errors import KvlodeError
from ...format.namespace import Namespace
from ...gds.buffers import ByteArray
from ...gds.probe import open_device
from .bare import touched_memory
from .trace import TracingDevice

MIB = 1 << 20
BLOCK_BYTES = 4 * MIB
SMALL_BLOCK_BYTES = 512
"""With its header page it takes two pages: the smallest place that a block can have."""
DISTINCT_BLOCKS = 64
DISTINCT_BYTES = 256 * MIB
REQUEST_BLOCKS = 16
"""Blocks that a host puts or gets in one call."""
STAMP_BYTES = 8
PUT_TIMEOUT_S = 120.0


def bench_key(number: int, salt: str = "") -> bytes:
    """Key of a block: scattered over the index like any digest."""
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32, salt=salt.encode()).digest()


def bench_namespace(block_bytes_max: int) -> Namespace:
    """The identity of the blocks that the bench makes."""
    return Namespace(
        model="kvlode-bench", revision="1", dtype="bfloat16", layout="bench", tokens_per_block=16, block_bytes_max=block_bytes_max
    )


class Blocks:
    """``count`` blocks over a few distinct ones; each starts with its number, so that no two are equal.

    ``memory``: the distinct ones, a row each (default: incompressible bytes); their first bytes are overwritten.
    """

    def __init__(
        self, count: int, block_bytes: int, *, memory: np.ndarray[Any, np.dtype[np.uint8]] | None = None, namespace: Namespace | None = None
    ) -> None:
        self.count = count
        self.block_bytes = block_bytes
        self.total_bytes = count * block_bytes
        if memory is None:
            distinct = max(1, min(count, DISTINCT_BLOCKS, DISTINCT_BYTES // block_bytes))
            memory = touched_memory(distinct * block_bytes).reshape(distinct, block_bytes)
        self.memory = memory
        self.distinct = len(memory)
        self.namespace = namespace or bench_namespace(block_bytes)
        self._checksums = [xxh3_64(block[STAMP_BYTES:]) for block in self.memory]
        self.keys = [bench_key(number) for number in range(count)]

    def __getitem__(self, number: int) -> ByteArray:
        """The block, in memory that later numbers use again."""
        block: ByteArray = self.memory[number % self.distinct]
        block[:STAMP_BYTES] = np.frombuffer(number.to_bytes(STAMP_BYTES, "little"), dtype=np.uint8)
        return block

    def is_block(self, number: int, found: ByteArray) -> bool:
        """Whether ``found`` is exactly block ``number``."""
        stamped = int.from_bytes(found[:STAMP_BYTES].tobytes(), "little") == number
        return stamped and found.size == self.block_bytes and xxh3_64(found[STAMP_BYTES:]) == self._checksums[number % self.distinct]

    def put_all(self, store: DiskStore) -> None:
        """Put every block, a request's at a time, and flush. Raises ``KvlodeError`` when one was refused."""
        space = store.namespace(self.namespace)
        step = min(REQUEST_BLOCKS, self.distinct)
        for start in range(0, self.count, step):
            numbers = range(start, min(start + step, self.count))
            keys = self.keys[numbers.start : numbers.stop]
            job = space.submit_put(keys, [self[number] for number in numbers], parent=self.keys[start - 1] if start else None)
            check_accepted(job.statuses)
        flush(store, PUT_TIMEOUT_S)


def check_accepted(statuses: Sequence[PutStatus]) -> None:
    """Raise ``KvlodeError`` when a put was refused."""
    refused = [status for status in statuses if not status]
    if refused:
        raise KvlodeError("a put was refused", actual=refused[0].reason)


def flush(store: DiskStore, timeout_s: float | None = None) -> None:
    """Make everything durable. Raises ``KvlodeError`` when that does not succeed."""
    if not store.flush(timeout_s):
        raise KvlodeError("the blocks could not be flushed", where=store.path, actual=store.stats()["counters"])


@dataclass(frozen=True, slots=True)
class Check:
    """What a get returned: how many blocks were asked for, and how many came back as they were put."""

    expected: int
    correct: int

    @property
    def void(self) -> str | None:
        return None if self.correct == self.expected else f"{self.correct} of {self.expected} blocks came back as they were put"


def check_blocks(blocks: Blocks, numbers: Sequence[int], statuses: Sequence[int], outs: Sequence[ByteArray]) -> Check:
    """Compare what a get of ``numbers`` delivered."""
    found = zip(numbers, statuses, outs, strict=True)
    return Check(len(numbers), sum(status == 0 and blocks.is_block(number, out) for number, status, out in found))


@contextmanager
def opened(path: str, *, device: TracingDevice | None = None, **options: Any) -> Iterator[DiskStore]:
    """A store for a measurement; ``device`` sees its requests. Raises ``KvlodeError`` when it does not close in time."""
    config = StoreConfig.build(**{"put_timeout_s": PUT_TIMEOUT_S, **options})
    store = open_store(path, config, Environment(device=device) if device is not None else None)
    try:
        yield store
    finally:
        closed = store.close(PUT_TIMEOUT_S)
    if not closed:
        raise KvlodeError("a store did not close in time", where=path)


@contextmanager
def tracing_device(path: str, config: StoreConfig) -> Iterator[TracingDevice]:
    """The device that a store at ``path`` would use, seen from outside."""
    device = TracingDevice(open_device(config.gds, path, threads=config.io_threads))
    try:
        yield device
    finally:
        device.close()
