"""Both arms of a measurement of writing: a store that takes blocks until they are flushed, and the bare loop that repeats its requests."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from typing import Any

from ...engine.config import SEGMENTS_MIN, StoreConfig
from ...engine.store import DiskStore
from .amplification import Written
from .bare import bare_memory, replay_writes
from .setting import Setting
from .trace import Trace
from .workload import MIB, Blocks, opened, tracing_device

IO_THREADS = StoreConfig().io_threads
BLOCKS_PER_SEGMENT = 4
"""At least: of the largest blocks a segment holds few, and capacity bounds its size."""
BUFFER_BYTES_MIN = 16 * MIB
BUFFER_BLOCKS_MIN = 4


def store_options(setting: Setting, blocks: Blocks, codec: str) -> dict[str, Any]:
    """Options of a store that never has to free a segment for these blocks, and whose buffer takes half of them at most."""
    roomy_bytes = SEGMENTS_MIN * BLOCKS_PER_SEGMENT * blocks.block_bytes
    capacity_bytes = max(3 * blocks.total_bytes, roomy_bytes) + 512 * MIB
    buffer_bytes = min(setting.buffer_bytes, max(BUFFER_BYTES_MIN, blocks.total_bytes // 2))
    return {"capacity": capacity_bytes, "buffer": max(buffer_bytes, BUFFER_BLOCKS_MIN * blocks.block_bytes), "codec": codec}


def needed_bytes(setting: Setting, block_bytes: int) -> int:
    """Free space for one store of a round's blocks, and for what stands beside it: open and spare segments, the bare loop's files."""
    segments_bytes = 2 * BLOCKS_PER_SEGMENT * block_bytes + (2048 * MIB if not setting.quick else 256 * MIB)
    return 2 * max(setting.size_bytes, 4 * block_bytes) + segments_bytes


@dataclass(frozen=True, slots=True)
class WriteRound:
    """One round of the store. ``cpu_s`` is the time of all threads of this process while the blocks were put and flushed."""

    seconds: float
    cpu_s: float
    written: Written
    """From before the store was created until after it was closed."""


class WriteArms:
    """Each round writes all of ``blocks`` into a store that was created, closed and opened again.

    ``settled``: its buffer's memory is there before the first put; otherwise that is touched meanwhile.
    """

    def __init__(self, setting: Setting, blocks: Blocks, *, codec: str = "raw", settled: bool = True) -> None:
        self._setting = setting
        self._blocks = blocks
        self._options = store_options(setting, blocks, codec)
        self._settled = settled
        self._memory = bare_memory(blocks.total_bytes)
        self._counters: dict[str, int] = {}
        self._io_bytes: dict[str, int] = {}
        self.trace = Trace()
        self.rounds: list[WriteRound] = []

    def prepare(self) -> None:
        """A round that does not count: its requests are there for a first pair that begins with the bare loop."""
        self.store(0)
        self.rounds.clear()

    def store(self, _: int) -> float:
        """GB/s of raw bytes, from the first put to the end of the flush."""
        path = self._setting.folder("write")
        before = Written.now(self._setting.root)
        with opened(path, **self._options):
            pass
        with tracing_device(path, StoreConfig.build(**self._options)) as device, opened(path, device=device, **self._options) as store:
            store.namespace(self._blocks.namespace)
            if self._settled:
                self._setting.settle(store)
            device.begin()
            started, cpu_started_s = time.perf_counter(), time.process_time()
            self._blocks.put_all(store)
            seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started_s
            self.trace = device.trace.cut()
            self._counters = store.stats()["counters"]
            self._io_bytes = bytes_by_path(store, "write_bytes")
        self.rounds.append(WriteRound(seconds, cpu_s, Written.now(self._setting.root).since(before)))
        shutil.rmtree(path)
        return self._blocks.total_bytes / seconds / 1e9

    def bare(self, _: int) -> float:
        """GB/s of the bytes that the store asked its drive to write."""
        seconds = replay_writes(self.trace, self._setting.folder("bare"), self._memory, threads=IO_THREADS)
        return self.trace.total_bytes("write") / seconds / 1e9

    @property
    def stored_ratio(self) -> float:
        """Raw by stored bytes of the blocks, as the store wrote them in the last round."""
        return self._counters["written_raw_bytes"] / self._counters["written_stored_bytes"]

    def facts(self) -> dict[str, Any]:
        """What the last round was about."""
        return {
            "bytes": self._blocks.total_bytes,
            "block_bytes": self._blocks.block_bytes,
            "depth_bytes": self.trace.in_flight_bytes_max,
            "io_bytes": self._io_bytes,
        }


def bytes_by_path(store: DiskStore, direction: str) -> dict[str, int]:
    """What the store's device counted in this round, by the way the bytes took (O_DIRECT, buffered, ...)."""
    return {path: counts[direction] for path, counts in store.stats()["io"].items()}
