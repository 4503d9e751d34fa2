"""``scale_namespaces.<namespaces>.<what>``: the same blocks, put, looked up and read cold, spread over 1 to 8 namespaces of a store."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence

import numpy as np

from ...engine.contract import BlockSpace
from ...gds.buffers import ByteArray, aligned_array
from .figures import Item
from .machine import device_read_bytes
from .scale_calls import Figures
from .setting import Setting
from .workload import MIB, PUT_TIMEOUT_S, REQUEST_BLOCKS, Blocks, check_accepted, check_blocks, flush, opened

NAMESPACES = (1, 2, 4, 8)
BLOCK_BYTES = MIB
BLOCKS = 512
LOOKUP_TURNS = 8


def measure(setting: Setting) -> list[Item]:
    """All figures of all numbers of namespaces; they take turns within each round, each with a new store."""
    figures = Figures()
    blocks = Blocks(BLOCKS, 16 << 10 if setting.quick else BLOCK_BYTES)
    outs = aligned_array(blocks.total_bytes).reshape(blocks.count, -1)
    for number in range(setting.rounds):
        for count in NAMESPACES if number % 2 == 0 else reversed(NAMESPACES):
            setting.console.print(f"scale_namespaces: {count} namespaces, round {number + 1} of {setting.rounds}", highlight=False)
            outs[:] = 0xEE
            _round(setting, figures, blocks, list(outs), count)
    return figures.items(block_bytes=blocks.block_bytes)


def _round(setting: Setting, figures: Figures, blocks: Blocks, outs: list[ByteArray], count: int) -> None:
    name, path = f"scale_namespaces.{count}", setting.folder("scale-namespaces")
    requests = [range(start, start + REQUEST_BLOCKS) for start in range(0, blocks.count, REQUEST_BLOCKS)]
    with opened(path, capacity=3 * blocks.total_bytes + 512 * MIB, buffer=256 * MIB, codec="raw", serve_clean=False) as store:
        spaces = [store.namespace(dataclasses.replace(blocks.namespace, revision=str(each))) for each in range(count)]
        setting.settle(store)
        started = time.perf_counter()
        for turn, numbers in enumerate(requests):
            job = spaces[turn % count].submit_put(_keys(blocks, numbers), [blocks[number] for number in numbers])
            check_accepted(job.statuses)
        flush(store, PUT_TIMEOUT_S)
        figures.add(f"{name}.put", "GB/s", blocks.total_bytes / (time.perf_counter() - started) / 1e9)

        lookups = [(turn, numbers) for _ in range(LOOKUP_TURNS) for turn, numbers in enumerate(requests)]
        started = time.perf_counter()
        found = sum(spaces[turn % count].match_prefix(_keys(blocks, numbers)) for turn, numbers in lookups)
        figures.add(f"{name}.lookup", "us/key", (time.perf_counter() - started) / (LOOKUP_TURNS * blocks.count) * 1e6)
        figures.check(f"{name}.lookup", found, LOOKUP_TURNS * blocks.count)
        _get(figures, f"{name}.get", spaces, blocks, requests, outs)
    shutil.rmtree(path)


def _get(
    figures: Figures,
    name: str,
    spaces: Sequence[BlockSpace],
    blocks: Blocks,
    requests: Sequence[range],
    outs: list[ByteArray],
) -> None:
    """All requests in random order, all at once."""
    turns = np.random.default_rng(7).permutation(len(requests)).tolist()
    read_before = device_read_bytes()
    started = time.perf_counter()
    jobs = {
        turn: spaces[turn % len(spaces)].submit_get(_keys(blocks, requests[turn]), outs[requests[turn].start : requests[turn].stop])
        for turn in turns
    }
    for job in jobs.values():
        job.wait()
    seconds = time.perf_counter() - started
    read_bytes = device_read_bytes() - read_before
    figures.add(name, "GB/s", blocks.total_bytes / seconds / 1e9)
    statuses = [status for turn in range(len(requests)) for status in jobs[turn].statuses]
    figures.check(name, check_blocks(blocks, range(blocks.count), statuses, outs).correct, blocks.count)
    figures.check_cold(name, read_bytes, blocks.total_bytes)


def _keys(blocks: Blocks, numbers: range) -> list[bytes]:
    return blocks.keys[numbers.start : numbers.stop]


def needed_bytes(setting: Setting) -> int:
    """Free space for one store."""
    return 2 * BLOCKS * (16 << 10 if setting.quick else BLOCK_BYTES) + 512 * MIB
