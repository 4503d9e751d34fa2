"""``scale_keys.<keys>.<what>``: looking up, putting, getting and opening, among a thousand to ten million keys.

The indexes are made up (see ``keys_store``); the blocks that are put and read among them are real ones, in another namespace. All stores
are open at once and take turns, so that a slow moment of the machine hits all of them.
"""

from __future__ import annotations

import dataclasses
import time
from contextlib import ExitStack

import numpy as np

from ...engine.store import DiskStore
from ...gds.buffers import ByteArray
from .figures import Item
from .keys_store import INDEX_BYTES_A_KEY, KeysStore
from .page_cache import fetch_pages
from .scale_calls import Figures, one_by_one
from .setting import Setting
from .workload import MIB, PUT_TIMEOUT_S, SMALL_BLOCK_BYTES, bench_key, bench_namespace, check_accepted, flush

COUNTS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
QUICK_COUNTS = (100, 1_000)
BUFFER_BYTES = 64 * MIB
LOOKUP_KEYS = 4096
CALL_KEYS = 128
"""Blocks of a request: what one call of a scheduler asks for."""
CALLS = 64
WARM_UP_LOOKUPS = 24
"""Lookups that do not count: among many keys the first ones also bring tables into the page cache."""
PUT_BLOCKS = 500
OPENINGS = 7


def measure(setting: Setting) -> list[Item]:
    """All figures of all numbers of keys."""
    figures = Figures()
    stores = [_made_up(setting, count) for count in (QUICK_COUNTS if setting.quick else COUNTS)]
    for turn in range(1 if setting.quick else OPENINGS):
        for keys in stores:
            setting.console.print(f"scale_keys: opening {keys.count:,} keys, turn {turn + 1}", highlight=False)
            figures.add(f"scale_keys.{keys.count}.open", "ms", keys.opening_s(cold=False) * 1e3)
    with ExitStack() as closing:
        among = [_Among(keys, closing.enter_context(keys.opened()), setting, figures) for keys in stores]
        for each in among:
            each.warm_up()
        for number in range(setting.rounds):
            for each in among:
                setting.console.print(f"scale_keys: looking up among {each.count:,} keys, round {number + 1}", highlight=False)
                each.look_up()
        for number in range(setting.rounds):
            for each in among:
                setting.console.print(f"scale_keys: putting and getting among {each.count:,} keys, round {number + 1}", highlight=False)
                each.put_and_get(number)
    for keys in stores:
        keys.remove()
    return figures.items()


def _made_up(setting: Setting, count: int) -> KeysStore:
    """A store whose index knows so many keys, and that serves nothing from its buffer."""
    keys = KeysStore(setting, f"scale-{count}", count)
    keys.options |= {"buffer": 16 * MIB if setting.quick else BUFFER_BYTES, "serve_clean": False}
    keys.make_up(count)
    fetch_pages(keys.index_folder)
    return keys


class _Among:
    """Rounds in one open store."""

    def __init__(self, keys: KeysStore, store: DiskStore, setting: Setting, figures: Figures) -> None:
        self.count = keys.count
        self._store = store
        self._space = store.namespace(bench_namespace(SMALL_BLOCK_BYTES))
        self._blocks = store.namespace(dataclasses.replace(bench_namespace(SMALL_BLOCK_BYTES), revision="put"))
        self._generator = np.random.default_rng(1)
        self._setting = setting
        self._figures = figures

    def warm_up(self) -> None:
        self._setting.settle(self._store)
        for _ in range(WARM_UP_LOOKUPS):
            self._space.match_prefix(self._present(LOOKUP_KEYS))

    def _present(self, count: int) -> list[bytes]:
        return [bench_key(number) for number in self._generator.choice(self.count, min(count, self.count), replace=False).tolist()]

    def look_up(self) -> None:
        """Many keys in one call, present and absent, and calls for as many keys as a request has."""
        name = f"scale_keys.{self.count}"
        present = self._present(LOOKUP_KEYS)
        absent = [bench_key(number, salt="absent") for number in self._generator.integers(0, 1 << 40, LOOKUP_KEYS).tolist()]
        started = time.perf_counter()
        matched = self._space.match_prefix(present)
        between = time.perf_counter()
        found = sum(self._space.contains(absent))
        ended = time.perf_counter()
        requests = [self._present(CALL_KEYS) for _ in range(CALLS)]
        matches = [0] * CALLS

        def call(number: int) -> None:
            matches[number] = self._space.match_prefix(requests[number])

        calls = one_by_one(range(CALLS), call)
        self._figures.add(f"{name}.present", "us/key", (between - started) / len(present) * 1e6)
        self._figures.add(f"{name}.absent", "us/key", (ended - between) / len(absent) * 1e6)
        self._figures.add_calls(f"{name}.lookup", "ms", calls.percentile_ms(50), calls, keys_a_call=len(requests[0]))
        self._figures.check(f"{name}.present", matched, len(present))
        self._figures.check(f"{name}.absent", found, 0)
        self._figures.check(f"{name}.lookup", sum(matches), sum(map(len, requests)))

    def put_and_get(self, number: int) -> None:
        """Real blocks of the smallest size, for which the index costs most: put to flush, then each read from the drive by itself."""
        name = f"scale_keys.{self.count}"
        keys = [bench_key(position, salt=f"put-{number}") for position in range(PUT_BLOCKS)]
        blocks = [bench_key(position, salt="bytes") * (SMALL_BLOCK_BYTES // 32) for position in range(PUT_BLOCKS)]
        outs = np.zeros((PUT_BLOCKS, SMALL_BLOCK_BYTES), np.uint8)
        started = time.perf_counter()
        check_accepted(self._blocks.submit_put(keys, blocks, chained=False).statuses)
        flush(self._store, PUT_TIMEOUT_S)
        seconds = time.perf_counter() - started
        calls = one_by_one(range(PUT_BLOCKS), lambda position: self._get(keys[position], outs[position]))
        self._figures.add(f"{name}.put", "us/block", seconds / PUT_BLOCKS * 1e6)
        self._figures.add_calls(f"{name}.get", "us/block", calls.percentile_ms(50) * 1e3, calls)
        correct = sum(out.tobytes() == block for out, block in zip(outs, blocks, strict=True))
        self._figures.check(f"{name}.get", correct, PUT_BLOCKS)
        self._figures.check(f"{name}.get", self._store.stats()["counters"].get("buffer_hits", 0), 0)

    def _get(self, key: bytes, out: ByteArray) -> None:
        self._blocks.get_into(key, out)


def needed_bytes(setting: Setting) -> int:
    """Free space for all indexes, twice as large while they are compacted, and for the segments of each store."""
    counts = QUICK_COUNTS if setting.quick else COUNTS
    return 2 * INDEX_BYTES_A_KEY * sum(counts) + len(counts) * 512 * MIB
