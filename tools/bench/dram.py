"""Reading what is still in the buffer, against ``numpy.copyto`` between memories as large."""

from __future__ import annotations

import shutil
import time

import numpy as np

from ...gds.buffers import aligned_array
from .figures import Bar, Item, abba, ratio_item, skipped_item
from .machine import available_memory_bytes, last_level_cache_bytes
from .setting import Setting
from .workload import MIB, Blocks, check_blocks, opened

NAMES = ("dram_get",)
DRAM_BAR = Bar(0.9, "at least")
CACHE_TIMES = 4
MEMORIES = 4
"""The buffer, the destinations, the bare loop's source, and room to breathe."""


def measure(setting: Setting, _: set[str]) -> list[Item]:
    """``dram_get``: every block once a round, so that neither arm finds source or destination in the processor's cache."""
    count = _block_count(setting)
    if MEMORIES * count * setting.block_bytes > available_memory_bytes():
        needed_gib = MEMORIES * count * setting.block_bytes / 2**30
        return [skipped_item("dram_get", f"needs {needed_gib:.1f} GiB of free memory to stay out of the processor's cache")]
    blocks = Blocks(count, setting.block_bytes)
    data_bytes = count * setting.block_bytes
    source = aligned_array(data_bytes).reshape(count, setting.block_bytes)
    target = aligned_array(data_bytes).reshape(count, setting.block_bytes)
    source[:], target[:] = 0xEE, 0xDD
    voids: list[str] = []
    path = setting.folder("dram")
    buffer_bytes = data_bytes + 64 * MIB
    with opened(path, capacity=3 * data_bytes + 512 * MIB, buffer=buffer_bytes, codec="raw") as store:
        blocks.put_all(store)
        space = store.namespace(blocks.namespace)

        def store_arm(number: int) -> float:
            numbers = [(position + number) % count for position in range(count)]
            keys = [blocks.keys[position] for position in numbers]
            outs = list(target)
            hits_before = store.stats()["counters"].get("buffer_hits", 0)
            started = time.perf_counter()
            statuses = space.get_many_into(keys, outs)
            seconds = time.perf_counter() - started
            check = check_blocks(blocks, numbers, statuses, outs)
            hits = store.stats()["counters"]["buffer_hits"] - hits_before
            if check.void is not None:
                voids.append(check.void)
            elif hits != count:
                voids.append(f"{hits} of {count} blocks were still in the buffer")
            return data_bytes / seconds / 1e9

        def bare_arm(_: int) -> float:
            started = time.perf_counter()
            for position in range(count):
                np.copyto(target[position], source[position])
            return data_bytes / (time.perf_counter() - started) / 1e9

        rates = abba(setting.rounds, setting.step("dram_get", store_arm), bare_arm)
    shutil.rmtree(path)
    facts = {"bytes": data_bytes, "block_bytes": setting.block_bytes}
    return [ratio_item("dram_get", *rates, bar=DRAM_BAR, facts=facts, void=voids[0] if voids else None)]


def _block_count(setting: Setting) -> int:
    wanted_bytes = CACHE_TIMES * last_level_cache_bytes() + setting.block_bytes if not setting.quick else 8 * setting.block_bytes
    return max(4, -(-wanted_bytes // setting.block_bytes))


def needed_bytes(setting: Setting) -> int:
    """Free space for the store: its blocks are written too."""
    return _block_count(setting) * setting.block_bytes + (1024 * MIB if not setting.quick else 256 * MIB)
