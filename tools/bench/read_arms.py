"""Both arms of a measurement of reading: a cold store that delivers blocks, and the bare loop that repeats its requests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from ...engine.config import StoreConfig
from ...engine.contract import BlockSpace
from ...gds.buffers import ByteArray, aligned_array
from .bare import bare_memory, replay_reads
from .machine import device_read_bytes
from .setting import Setting
from .trace import Trace
from .workload import REQUEST_BLOCKS, Blocks, check_blocks, opened, tracing_device
from .write_arms import IO_THREADS, bytes_by_path, store_options

Order: TypeAlias = Literal["prefix", "random"]
READ_BUFFER_BYTES = 64 << 20
"""Blocks that are read do not go through the buffer: a larger one would only take its time to be touched, in every round."""


@dataclass(frozen=True, slots=True)
class Destinations:
    """Where blocks are delivered to: ``outs`` are given to the store, ``views`` are the same memory for the comparison."""

    outs: Sequence[Any]
    views: Sequence[ByteArray]

    @classmethod
    def aligned(cls, blocks: Blocks) -> Destinations:
        """Arrays that begin on a page, where the size of a block is one of whole pages."""
        memory = aligned_array(blocks.total_bytes)
        memory[:] = 0xEE
        rows = list(memory.reshape(blocks.count, blocks.block_bytes))
        return cls(rows, rows)

    @classmethod
    def tensors(cls, blocks: Blocks) -> Destinations:
        """Tensors as the allocator gives them, which is never on a page."""
        import torch

        tensors = [torch.full((blocks.block_bytes,), 0xEE, dtype=torch.uint8) for _ in range(blocks.count)]
        return cls(tensors, [tensor.numpy() for tensor in tensors])


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """Blocks in a store at ``path`` that is closed."""

    path: str
    blocks: Blocks
    options: dict[str, Any]
    """To open it with."""
    stored_bytes: int
    """Of all their payloads."""

    @classmethod
    def write(cls, setting: Setting, blocks: Blocks, name: str, codec: str = "raw") -> StoredBlocks:
        """Put them into a new store in the folder ``name``."""
        path, options = setting.folder(name), store_options(setting, blocks, codec)
        with opened(path, **options) as store:
            blocks.put_all(store)
            stored_bytes = store.stats()["counters"]["written_stored_bytes"]
        return cls(path, blocks, options | {"buffer": max(READ_BUFFER_BYTES, blocks.block_bytes)}, stored_bytes)

    @property
    def ratio(self) -> float:
        """Raw by stored bytes."""
        return self.blocks.total_bytes / self.stored_bytes


class ReadArms:
    """Each round opens the store anew and gets every block once.

    ``prefix``: one get of all blocks, which lie one behind the other. ``random``: gets of a few blocks, all of them in random order,
    all at once.
    """

    def __init__(self, setting: Setting, stored: StoredBlocks, outs: Destinations, order: Order) -> None:
        self._setting = setting
        self._stored = stored
        self._outs = outs
        self.order = order
        self._memory = bare_memory(stored.blocks.total_bytes)
        self._round = 0
        self._io_bytes: dict[str, int] = {}
        self._voids: list[str] = []
        self.trace = Trace()
        self.cpu_s: list[float] = []
        """Of all threads of this process, each round, while the blocks were read."""

    def prepare(self) -> None:
        """A round that does not count: its requests are there for a first pair that begins with the bare loop."""
        self.store(0)
        self.cpu_s.clear()

    def store(self, _: int) -> float:
        """GB/s of raw bytes. Every round has other destinations for each block, so that what an earlier one left there is wrong."""
        stored, blocks = self._stored, self._stored.blocks
        self._round += 1
        numbers = self._numbers()
        places = [(number + self._round) % blocks.count for number in numbers]
        keys = [blocks.keys[number] for number in numbers]
        outs = [self._outs.outs[place] for place in places]
        config = StoreConfig.build(**stored.options)
        with tracing_device(stored.path, config) as device, opened(stored.path, device=device, **stored.options) as store:
            space = store.namespace(blocks.namespace)
            self._setting.settle(store)
            device.begin()
            read_before = device_read_bytes()
            started, cpu_started_s = time.perf_counter(), time.process_time()
            statuses = self._get(space, keys, outs)
            seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started_s
            read_bytes = device_read_bytes() - read_before
            self.trace = device.trace.cut()
            self._io_bytes = bytes_by_path(store, "read_bytes")
        self.cpu_s.append(cpu_s)
        check = check_blocks(blocks, numbers, statuses, [self._outs.views[place] for place in places])
        void = check.void or warm(read_bytes, stored.stored_bytes)
        self._voids += [void] if void else []
        return blocks.total_bytes / seconds / 1e9

    def _numbers(self) -> list[int]:
        count = self._stored.blocks.count
        return list(range(count)) if self.order == "prefix" else np.random.default_rng(self._round).permutation(count).tolist()

    def _get(self, space: BlockSpace, keys: list[bytes], outs: list[Any]) -> Sequence[int]:
        if self.order == "prefix":
            return space.get_many_into(keys, outs)
        starts = range(0, len(keys), REQUEST_BLOCKS)
        jobs = [space.submit_get(keys[start : start + REQUEST_BLOCKS], outs[start : start + REQUEST_BLOCKS]) for start in starts]
        for job in jobs:
            job.wait()
        return [status for job in jobs for status in job.statuses]

    def bare(self, _: int) -> float:
        """GB/s of the bytes that the store asked its drive for."""
        return self.trace.total_bytes("read") / replay_reads(self.trace, self._memory, threads=IO_THREADS) / 1e9

    @property
    def void(self) -> str | None:
        """Why the figure must not be used: the first wrong answer, or warm read, of all rounds."""
        return self._voids[0] if self._voids else None

    def facts(self) -> dict[str, Any]:
        """What the last round was about."""
        return {
            "bytes": self._stored.blocks.total_bytes,
            "block_bytes": self._stored.blocks.block_bytes,
            "depth": self.trace.in_flight_max,
            "request_bytes": self.trace.typical_bytes("read"),
            "io_bytes": self._io_bytes,
        }


def warm(read_bytes: int, stored_bytes: int) -> str | None:
    """Why a read was not cold, when the kernel fetched less from drives than was stored of the blocks; ``None`` when it was."""
    return None if read_bytes >= stored_bytes else f"not cold: {read_bytes} bytes came from the drive for {stored_bytes} bytes of blocks"
