"""``scale_buffer.<size>.<what>``: opening, a burst of puts, its flush, and gets from the buffer, with buffers of 64 MiB to 8 GiB."""

from __future__ import annotations

import shutil
import time

import numpy as np

from ...engine.contract import BlockSpace
from ...gds.buffers import aligned_array
from .figures import Item, skipped_item
from .machine import available_memory_bytes
from .scale_calls import Figures, one_by_one
from .setting import Setting
from .workload import MIB, PUT_TIMEOUT_S, Blocks, bench_key, check_accepted, flush, opened

SIZES_MIB = (64, 512, 2048, 8192)
QUICK_SIZES_MIB = (4, 16)
BLOCK_BYTES = MIB
BURST_SHARE = 2
"""A burst fills one part in so many of the buffer: it always has room."""
HITS_MAX = 1024
SPARE_BYTES = 1024 * MIB


def measure(setting: Setting) -> list[Item]:
    """All figures of all sizes; they take turns within each round, each with a new store."""
    figures = Figures()
    skipped: list[Item] = []
    sizes = []
    for mib in QUICK_SIZES_MIB if setting.quick else SIZES_MIB:
        if mib * MIB + SPARE_BYTES > available_memory_bytes():
            needed_gib = (mib * MIB + SPARE_BYTES) / 2**30
            skipped.append(skipped_item(f"scale_buffer.{mib}MiB", f"needs {needed_gib:.1f} GiB of free memory"))
        else:
            sizes.append(mib)
    blocks = Blocks(max(sizes, default=0) * MIB // BURST_SHARE // _block_bytes(setting), _block_bytes(setting))
    for number in range(setting.rounds):
        for mib in sizes if number % 2 == 0 else reversed(sizes):
            setting.console.print(f"scale_buffer: {mib} MiB, round {number + 1} of {setting.rounds}", highlight=False)
            _round(setting, figures, blocks, mib, number)
    return figures.items(block_bytes=blocks.block_bytes) + skipped


def _block_bytes(setting: Setting) -> int:
    return MIB // 4 if setting.quick else BLOCK_BYTES


def _round(setting: Setting, figures: Figures, blocks: Blocks, mib: int, number: int) -> None:
    name, path = f"scale_buffer.{mib}MiB", setting.folder("scale-buffer")
    count = mib * MIB // BURST_SHARE // blocks.block_bytes
    keys = [bench_key(position, salt=f"burst-{number}") for position in range(count)]
    capacity = 2 * count * blocks.block_bytes + 512 * MIB
    opening = time.perf_counter()
    with opened(path, capacity=capacity, buffer=mib * MIB, codec="raw") as store:
        space = store.namespace(blocks.namespace)
        opened_at = time.perf_counter()
        setting.settle(store)
        figures.add(f"{name}.open", "ms", (opened_at - opening) * 1e3, settled_ms=(time.perf_counter() - opening) * 1e3)
        started = time.perf_counter()
        calls = one_by_one(range(count), lambda position: check_accepted([space.put(keys[position], blocks[position])]))
        burst_s = time.perf_counter() - started
        flush(store, PUT_TIMEOUT_S)
        flushed_s = time.perf_counter() - started
        burst_bytes = count * blocks.block_bytes
        figures.add_calls(f"{name}.put", "us", calls.percentile_ms(50) * 1e3, calls, burst_bytes=burst_bytes)
        figures.add(f"{name}.burst", "GB/s", burst_bytes / burst_s / 1e9, burst_bytes=burst_bytes)
        figures.add(f"{name}.flush", "GB/s", burst_bytes / flushed_s / 1e9, burst_bytes=burst_bytes)
        hits_before = store.stats()["counters"].get("buffer_hits", 0)
        got = _get(figures, f"{name}.hit", space, blocks, keys)
        figures.check(f"{name}.hit", store.stats()["counters"].get("buffer_hits", 0) - hits_before, got)
    shutil.rmtree(path)


def _get(figures: Figures, name: str, space: BlockSpace, blocks: Blocks, keys: list[bytes]) -> int:
    """Gets of the burst's blocks in random order, one at a time; how many."""
    chosen = np.random.default_rng(9).permutation(len(keys))[:HITS_MAX].tolist()
    outs = aligned_array(64 * blocks.block_bytes).reshape(64, -1)
    outs[:] = 0xEE
    correct = 0

    def get(position: int) -> None:
        space.get_into(keys[position], outs[position % len(outs)])

    def check(position: int) -> None:
        nonlocal correct
        correct += blocks.is_block(position, outs[position % len(outs)])

    calls = one_by_one(chosen, get, between=check)
    figures.add_calls(name, "GB/s", len(chosen) * blocks.block_bytes / calls.seconds / 1e9, calls)
    figures.check(name, correct, len(chosen))
    return len(chosen)


def needed_bytes(setting: Setting) -> int:
    """Free space for the largest store."""
    largest_mib = max(QUICK_SIZES_MIB if setting.quick else SIZES_MIB)
    return 3 * largest_mib * MIB // BURST_SHARE // 2 + 1024 * MIB
