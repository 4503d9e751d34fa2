"""Puts to flush and cold reads of large raw blocks, each against the bare loop over the same places."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...engine.config import StoreConfig
from ...engine.store import DiskStore
from ...gds.buffers import ByteArray, aligned_array
from .bare import MEMORY_BYTES, replay_reads, replay_writes, touched_memory
from .figures import Bar, Item, abba, ratio_item
from .machine import device_read_bytes
from .setting import Setting
from .trace import Trace
from .workload import Blocks, bench_namespace, check_blocks, opened, tracing_device

WRITE_BAR = Bar(0.80, "at least")
READ_BAR = Bar(0.80, "at least")
IO_THREADS = StoreConfig().io_threads


def _options(blocks: Blocks, setting: Setting) -> dict[str, Any]:
    data_bytes = blocks.count * blocks.block_bytes
    return {"capacity": 3 * data_bytes + (512 << 20), "buffer": setting.buffer_bytes, "codec": "raw"}


def measure_writes(setting: Setting) -> list[Item]:
    """Puts to the end of the flush, on a store that was created, closed and opened again.

    ``write_raw``: once the buffer's memory is there. ``write_raw.fresh``: at once after opening, the memory being touched meanwhile.
    """
    blocks = Blocks(setting.block_count, setting.block_bytes)
    memory = touched_memory(min(MEMORY_BYTES, blocks.count * blocks.block_bytes), seed=1)
    return [
        _WriteItem(setting, blocks, memory, "write_raw", settled=True).measure(WRITE_BAR),
        _WriteItem(setting, blocks, memory, "write_raw.fresh", settled=False).measure(None),
    ]


class _WriteItem:
    """One state of the store before the first put."""

    def __init__(self, setting: Setting, blocks: Blocks, memory: ByteArray, name: str, *, settled: bool) -> None:
        self._setting = setting
        self._blocks = blocks
        self._memory = memory
        self._name = name
        self._settled = settled
        self._trace = Trace()
        self._io_bytes: dict[str, int] = {}

    def measure(self, bar: Bar | None) -> Item:
        self._store_arm(0)  # the trace for a round that begins with the bare loop
        rates = abba(self._setting.rounds, self._setting.step(self._name, self._store_arm), self._bare_arm)
        data_bytes = self._blocks.count * self._blocks.block_bytes
        facts = {
            "bytes": data_bytes,
            "block_bytes": self._blocks.block_bytes,
            "depth_bytes": self._trace.in_flight_bytes_max,
            "io_bytes": self._io_bytes,
        }
        return ratio_item(self._name, *rates, bar=bar, facts=facts)

    def _store_arm(self, _: int) -> float:
        blocks, options, path = self._blocks, _options(self._blocks, self._setting), self._setting.folder("write")
        with opened(path, **options):
            pass
        with tracing_device(path, StoreConfig.build(**options)) as device, opened(path, device=device, **options) as store:
            store.namespace(bench_namespace(blocks.block_bytes))
            if self._settled:
                self._setting.settle(store)
            device.begin()
            started = time.perf_counter()
            blocks.put_all(store)
            seconds = time.perf_counter() - started
            self._trace = device.trace.cut()
            self._io_bytes = _bytes_by_path(store, "write_bytes")
        shutil.rmtree(path)
        return blocks.count * blocks.block_bytes / seconds / 1e9

    def _bare_arm(self, _: int) -> float:
        seconds = replay_writes(self._trace, self._setting.folder("bare"), self._memory, threads=IO_THREADS)
        return self._trace.total_bytes("write") / seconds / 1e9


def measure_reads(setting: Setting) -> list[Item]:
    """``read_raw``: a cold ``get_many_into`` of all blocks, into aligned arrays and into tensors as torch allocates them."""
    blocks = Blocks(setting.block_count, setting.block_bytes)
    path = setting.folder("read")
    with opened(path, **_options(blocks, setting)) as store:
        blocks.put_all(store)
    items = []
    for name, allocate in (("read_raw.aligned", _aligned_outs), ("read_raw.tensors", _tensor_outs)):
        items.append(_ReadItem(setting, blocks, path, name, allocate).measure())
    shutil.rmtree(path)
    return items


class _ReadItem:
    """One kind of destination."""

    def __init__(
        self, setting: Setting, blocks: Blocks, path: str, name: str, allocate: Callable[[Blocks], tuple[list[Any], list[ByteArray]]]
    ) -> None:
        self._setting = setting
        self._blocks = blocks
        self._path = path
        self._name = name
        self._outs, self._views = allocate(blocks)
        self._memory = touched_memory(min(MEMORY_BYTES, blocks.count * blocks.block_bytes), seed=1)
        self._trace = Trace()
        self._io_bytes: dict[str, int] = {}
        self._voids: list[str] = []
        self._round = 0

    def measure(self) -> Item:
        self._store_arm(0)
        arms = self._setting.step(self._name, self._store_arm), self._bare_arm
        store_rates, bare_rates = abba(self._setting.rounds, *arms)
        data_bytes = self._blocks.count * self._blocks.block_bytes
        facts = {
            "bytes": data_bytes,
            "block_bytes": self._blocks.block_bytes,
            "depth_bytes": self._trace.in_flight_bytes_max,
            "io_bytes": self._io_bytes,
        }
        void = self._voids[0] if self._voids else None
        return ratio_item(self._name, store_rates, bare_rates, bar=READ_BAR, facts=facts, void=void)

    def _store_arm(self, _: int) -> float:
        """All blocks once; each round into other destinations, so that what an earlier round left there is wrong."""
        blocks, options = self._blocks, _options(self._blocks, self._setting)
        self._round += 1
        numbers = [(position + self._round) % blocks.count for position in range(blocks.count)]
        order = np.argsort(numbers)
        keys = [blocks.keys[numbers[position]] for position in order]
        outs = [self._outs[position] for position in order]
        with tracing_device(self._path, StoreConfig.build(**options)) as device, opened(self._path, device=device, **options) as store:
            space = store.namespace(bench_namespace(blocks.block_bytes))
            self._setting.settle(store)
            self._trace = device.begin()
            read_before = device_read_bytes()
            started = time.perf_counter()
            statuses = space.get_many_into(keys, outs)
            seconds = time.perf_counter() - started
            read_bytes = device_read_bytes() - read_before
            self._trace = self._trace.cut()
            self._io_bytes = _bytes_by_path(store, "read_bytes")
        self._check([numbers[position] for position in order], statuses, [self._views[position] for position in order], read_bytes)
        return blocks.count * blocks.block_bytes / seconds / 1e9

    def _check(self, numbers: list[int], statuses: Sequence[int], views: list[ByteArray], read_bytes: int) -> None:
        check = check_blocks(self._blocks, numbers, statuses, views)
        void = check.void or warm(read_bytes, len(numbers) * self._blocks.block_bytes)
        self._voids += [void] if void else []

    def _bare_arm(self, _: int) -> float:
        return self._trace.total_bytes("read") / replay_reads(self._trace, self._memory, threads=IO_THREADS) / 1e9


def _aligned_outs(blocks: Blocks) -> tuple[list[Any], list[ByteArray]]:
    memory = aligned_array(blocks.count * blocks.block_bytes)
    memory[:] = 0xEE
    views = list(memory.reshape(blocks.count, blocks.block_bytes))
    return list(views), views


def _tensor_outs(blocks: Blocks) -> tuple[list[Any], list[ByteArray]]:
    """Tensors as the allocator gives them, which is never on a page."""
    import torch

    tensors = [torch.full((blocks.block_bytes,), 0xEE, dtype=torch.uint8) for _ in range(blocks.count)]
    return list(tensors), [tensor.numpy() for tensor in tensors]


def _bytes_by_path(store: DiskStore, direction: str) -> dict[str, int]:
    """What the store's device counted in this round, by the way the bytes took (O_DIRECT, buffered, ...)."""
    return {path: counts[direction] for path, counts in store.stats()["io"].items()}


def warm(read_bytes: int, data_bytes: int) -> str | None:
    """Why a read was not cold, when the kernel fetched less from drives than was delivered; ``None`` when it was."""
    return None if read_bytes >= data_bytes else f"not cold: {read_bytes} bytes came from the drive for {data_bytes} bytes of blocks"


def needed_bytes(setting: Setting) -> int:
    """Free space that these items need at any time."""
    return 2 * setting.block_count * setting.block_bytes + (2 << 30 if not setting.quick else 256 << 20)
