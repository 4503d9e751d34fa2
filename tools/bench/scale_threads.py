"""``scale_threads.<threads>.<what>``: puts, gets from the buffer, cold gets and lookups by 1 to 64 threads of one process at once.

All threads together do the same work, so a figure that stays the same means that threads neither help nor hurt.
"""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np

from ...engine.contract import BlockSpace
from ...engine.store import DiskStore
from ...gds.buffers import aligned_array
from .bare import touched_memory
from .figures import Item
from .keys_store import KeysStore
from .machine import device_read_bytes
from .scale_calls import Calls, Figures, side_by_side
from .setting import Setting
from .workload import (
    DISTINCT_BLOCKS,
    MIB,
    SMALL_BLOCK_BYTES,
    Blocks,
    bench_key,
    bench_namespace,
    check_accepted,
    check_blocks,
    flush,
    opened,
)

THREADS = (1, 4, 16, 64)
BLOCK_BYTES = MIB
BLOCKS = 256
"""Of one round: a multiple of the most threads and of the distinct blocks, so that no two threads ever fill the same memory."""
INDEX_KEYS = 100_000
LOOKUPS = 512
LOOKUP_KEYS = 128


def measure(setting: Setting) -> list[Item]:
    """All figures of all numbers of threads; they take turns within each round."""
    figures = Figures()
    _blocks_in_turn(setting, figures)
    _lookups_in_turn(setting, figures)
    return figures.items()


def _blocks_in_turn(setting: Setting, figures: Figures) -> None:
    block_bytes = 16 << 10 if setting.quick else BLOCK_BYTES
    blocks = Blocks(BLOCKS, block_bytes, memory=touched_memory(DISTINCT_BLOCKS * block_bytes).reshape(DISTINCT_BLOCKS, -1))
    warm_path, cold_path = setting.folder("scale-threads"), setting.folder("scale-threads-cold")
    capacity = (setting.rounds * len(THREADS) + 2) * blocks.total_bytes + 1024 * MIB
    options: dict[str, Any] = {"capacity": capacity, "codec": "raw"}
    buffer = 2 * blocks.total_bytes + 64 * MIB
    with opened(cold_path, buffer=64 * MIB, serve_clean=False, **options) as cold, opened(warm_path, buffer=buffer, **options) as warm:
        _put_unchained(blocks, cold)
        crowd = _Crowd(blocks, warm, cold, figures)
        setting.settle(warm)
        for number in range(setting.rounds):
            for threads in THREADS if number % 2 == 0 else reversed(THREADS):
                setting.console.print(f"scale_threads: {threads} threads, round {number + 1} of {setting.rounds}", highlight=False)
                crowd.round(threads, number)
    for path in (cold_path, warm_path):
        shutil.rmtree(path)


def _put_unchained(blocks: Blocks, store: DiskStore) -> None:
    """Every block by itself: the get of a block counts a use of all its ancestors, and theirs is not the cost that is meant here."""
    space = store.namespace(blocks.namespace)
    check_accepted([space.put(blocks.keys[number], blocks[number]) for number in range(blocks.count)])
    flush(store)


class _Crowd:
    """The same blocks, put and got by many threads."""

    def __init__(self, blocks: Blocks, warm: DiskStore, cold: DiskStore, figures: Figures) -> None:
        self._blocks = blocks
        self._warm, self._cold = warm, cold
        self._spaces = {store: store.namespace(blocks.namespace) for store in (warm, cold)}
        self._outs = aligned_array(blocks.total_bytes).reshape(blocks.count, -1)
        self._outs[:] = 0xEE
        self._figures = figures
        self._generator = np.random.default_rng(5)

    def round(self, threads: int, number: int) -> None:
        """New blocks into a buffer that has room for all of them, the same from the buffer, and others from the drive."""
        keys = [bench_key(position, salt=f"put-{threads}-{number}") for position in range(self._blocks.count)]
        space = self._spaces[self._warm]

        def put(position: int) -> None:
            check_accepted([space.put(keys[position], self._blocks[position])])

        self._note(threads, "put", side_by_side(threads, range(self._blocks.count), put))
        flush(self._warm)
        self._get(threads, "hit", self._warm, keys)
        read_before = device_read_bytes()
        self._get(threads, "get", self._cold, self._blocks.keys)
        self._figures.check_cold(f"scale_threads.{threads}.get", device_read_bytes() - read_before, self._blocks.total_bytes)

    def _get(self, threads: int, what: str, store: DiskStore, keys: list[bytes]) -> None:
        order = self._generator.permutation(self._blocks.count).tolist()
        places = [(position + 1 + threads) % self._blocks.count for position in range(self._blocks.count)]
        statuses = [-1] * self._blocks.count
        space, hits_before = self._spaces[store], _buffer_hits(store)

        def get(position: int) -> None:
            statuses[position] = space.get_into(keys[position], self._outs[places[position]])

        self._note(threads, what, side_by_side(threads, order, get))
        check = check_blocks(self._blocks, range(self._blocks.count), statuses, [self._outs[place] for place in places])
        name = f"scale_threads.{threads}.{what}"
        self._figures.check(name, check.correct, check.expected)
        self._figures.check(name, _buffer_hits(store) - hits_before, self._blocks.count if store is self._warm else 0)

    def _note(self, threads: int, what: str, calls: Calls) -> None:
        rate = self._blocks.total_bytes / calls.seconds / 1e9
        self._figures.add_calls(f"scale_threads.{threads}.{what}", "GB/s", rate, calls, block_bytes=self._blocks.block_bytes)


def _buffer_hits(store: DiskStore) -> int:
    return int(store.stats()["counters"].get("buffer_hits", 0))


def _lookups_in_turn(setting: Setting, figures: Figures) -> None:
    keys = KeysStore(setting, "scale-threads-keys", INDEX_KEYS)
    keys.make_up(1000 if setting.quick else INDEX_KEYS)
    generator = np.random.default_rng(6)
    rows = [generator.choice(keys.count, LOOKUP_KEYS, replace=False).tolist() for _ in range(LOOKUPS)]
    requests = [[bench_key(number) for number in row] for row in rows]
    with keys.opened() as store:
        space = store.namespace(bench_namespace(SMALL_BLOCK_BYTES))
        setting.settle(store)
        _look_up(space, requests, 1)  # brings tables into the page cache
        for number in range(setting.rounds):
            for threads in THREADS if number % 2 == 0 else reversed(THREADS):
                calls, matched = _look_up(space, requests, threads)
                name = f"scale_threads.{threads}.lookup"
                figures.add_calls(name, "us/key", calls.seconds / (LOOKUPS * LOOKUP_KEYS) * 1e6, calls, keys_a_call=LOOKUP_KEYS)
                figures.check(name, matched, LOOKUPS * LOOKUP_KEYS)
    keys.remove()


def _look_up(space: BlockSpace, requests: list[list[bytes]], threads: int) -> tuple[Calls, int]:
    matches = [0] * len(requests)

    def look_up(position: int) -> None:
        matches[position] = space.match_prefix(requests[position])

    return side_by_side(threads, range(len(requests)), look_up), sum(matches)


def needed_bytes(setting: Setting) -> int:
    """Free space for what all rounds put."""
    block_bytes = 16 << 10 if setting.quick else BLOCK_BYTES
    return (setting.rounds * len(THREADS) + 2) * BLOCKS * block_bytes + 1024 * MIB
