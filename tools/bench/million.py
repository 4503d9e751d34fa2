"""What depends on the number of keys: lookups among a million and ten million, and who else uses the stores made for that."""

from __future__ import annotations

import statistics
import threading
import time
from typing import Any

import numpy as np

from ...engine.contract import BlockSpace, Status
from ...engine.store import DiskStore
from .figures import Bar, Item, abba, value_item
from .keys_store import BYTES_A_KEY, INDEX_BYTES_A_KEY, KeysStore
from .memory_use import memory_item
from .page_cache import fetch_pages, forget_pages
from .rebuild import KILLED_SURPLUS_KEYS, killed_rounds, measure_rebuild, measure_reopening
from .setting import Setting
from .stalls import NAME as STALLS
from .stalls import Stalls, flush_bytes_max
from .workload import MIB, SMALL_BLOCK_BYTES, bench_key, bench_namespace

PRESENT_BAR = Bar(4.0, "at most")
ABSENT_BAR = Bar(1.5, "at most")
MANY_BAR = Bar(2.0, "at most")
MEMORY_BAR = Bar(200.0, "at most")
MANY_MEMORY_BAR = Bar(400.0, "at most")
NOWAIT_BAR = Bar(1.0, "at most")
MATCH_KEYS = 4096
NOWAIT_KEYS = 128
NOWAIT_REQUESTS = 200
MANY_TIMES = 10
NAMES = ("match_1m", "match_10m", "lookup_nowait_1m", "reopen_1m", "rebuild", "memory_beyond_buffer", STALLS)
_NEED_BLOCKS = {"match_1m", "lookup_nowait_1m", "reopen_1m", "rebuild", "memory_beyond_buffer", STALLS}
"""Items that need a million real blocks; filling them takes most of the time."""
_NEED_MANY = {"match_10m", "memory_beyond_buffer"}


def measure(setting: Setting, wanted: set[str]) -> list[Item]:
    """The items of ``NAMES`` that are wanted; each store is filled once."""
    return _Million(setting, wanted).measure()


class _Million:
    """The stores and what is measured on them; ``wanted`` are names of items."""

    def __init__(self, setting: Setting, wanted: set[str]) -> None:
        self._setting = setting
        self._wanted = wanted
        self._keys = KeysStore(setting, "keys", setting.key_count)
        self._many = KeysStore(setting, "many-keys", MANY_TIMES * setting.key_count)

    def measure(self) -> list[Item]:
        """All wanted items."""
        items: list[Item] = []
        if self._wanted & _NEED_BLOCKS:
            self._keys.fill_and_kill(self._setting.key_count)
            if "reopen_1m" in self._wanted:
                items += measure_reopening(self._keys, self._setting)
            else:
                self._keys.opening_s()
            items += self._lookup_items()
        else:
            self._keys.make_up(self._setting.key_count)
        if self._wanted & _NEED_MANY:
            self._many.make_up(MANY_TIMES * self._setting.key_count)
            items += self._many_items()
            self._many.remove()
        if "rebuild" in self._wanted:
            items.append(measure_rebuild(self._keys, self._setting))
        if STALLS in self._wanted:
            items += Stalls(self._keys, self._setting).measure()
        self._keys.remove()
        return items

    def _lookup_items(self) -> list[Item]:
        items: list[Item] = []
        if "match_1m" in self._wanted:
            items += measure_match(self._keys, self._setting)
        if "lookup_nowait_1m" in self._wanted:
            items += measure_nowait(self._keys, self._setting)
        if "memory_beyond_buffer" in self._wanted:
            items.append(memory_item("memory_beyond_buffer.1m", self._keys, MEMORY_BAR, quick=self._setting.quick))
        return items

    def _many_items(self) -> list[Item]:
        items: list[Item] = []
        if "match_10m" in self._wanted:
            items += measure_match_many(self._many, self._keys, self._setting)
        if "memory_beyond_buffer" in self._wanted:
            items.append(memory_item("memory_beyond_buffer.10m", self._many, MANY_MEMORY_BAR, quick=self._setting.quick))
        return items


# --- looking up -----------------------------------------------------------------------------------------------------


class _Lookups:
    """Rounds of lookups in an open store: each for other keys, drawn from all over it."""

    def __init__(self, keys: KeysStore, store: DiskStore, setting: Setting) -> None:
        self._keys = keys
        self._space = store.namespace(bench_namespace(SMALL_BLOCK_BYTES))
        self._generator = np.random.default_rng(1)
        self.keys_a_round = min(MATCH_KEYS, keys.count)
        self.present_us: list[float] = []
        self.absent_us: list[float] = []
        self.void: str | None = None
        setting.settle(store)

    def round(self, _: int = 0) -> float:
        """Microseconds a present key; those of absent keys are in ``absent_us``."""
        count = self.keys_a_round
        present = [bench_key(number) for number in self._generator.choice(self._keys.count, count, replace=False).tolist()]
        absent = [bench_key(number, salt="absent") for number in self._generator.integers(0, 1 << 40, count).tolist()]
        started = time.perf_counter()
        matched = self._space.match_prefix(present)
        between = time.perf_counter()
        found = sum(self._space.contains(absent))
        ended = time.perf_counter()
        self.present_us.append((between - started) / count * 1e6)
        self.absent_us.append((ended - between) / count * 1e6)
        if matched != count or found:
            self.void = f"{matched} of {count} present keys matched, {found} absent keys were found"
        return self.present_us[-1]


def measure_match(keys: KeysStore, setting: Setting) -> list[Item]:
    """``match_1m``. The kernel holds the tables, as after a restart of the process; the first round after one of the machine is a fact."""
    cold = _cold_round(keys, setting)
    fetch_pages(keys.index_folder)
    with keys.opened() as store:
        lookups = _Lookups(keys, store, setting)
        for _ in range(setting.rounds):
            lookups.round()
    items = []
    for name, bar in (("present", PRESENT_BAR), ("absent", ABSENT_BAR)):
        facts = {"keys": keys.count, "keys_a_round": lookups.keys_a_round, "cold_us_a_key": getattr(cold, f"{name}_us")[0]}
        void = lookups.void or cold.void
        items.append(value_item(f"match_1m.{name}", getattr(lookups, f"{name}_us"), unit="us/key", bar=bar, facts=facts, void=void))
    return items


def _cold_round(keys: KeysStore, setting: Setting) -> _Lookups:
    """One round right after opening, with nothing of the index in the page cache."""
    forget_pages(keys.index_folder)
    with keys.opened() as store:
        cold = _Lookups(keys, store, setting)
        cold.round()
    return cold


def measure_match_many(many: KeysStore, one: KeysStore, setting: Setting) -> list[Item]:
    """``match_10m``: the same lookups in turn among ten times as many keys and among a million, both opened again.

    The kernel holds the tables of both, as after a restart of the process; the first round after a restart of the machine is a fact.
    """
    cold = _cold_round(many, setting)
    for keys in (many, one):
        fetch_pages(keys.index_folder)
    with many.opened() as many_store, one.opened() as one_store:
        among_many, among_one = _Lookups(many, many_store, setting), _Lookups(one, one_store, setting)
        abba(setting.rounds, setting.step("match_10m", among_many.round), among_one.round)
        index_bytes = many_store.stats()["index"]["size_bytes"]
    items = []
    for name in ("present", "absent"):
        many_us, one_us = getattr(among_many, f"{name}_us"), getattr(among_one, f"{name}_us")
        facts = {
            "keys": many.count,
            "compared_keys": one.count,
            "entries": many.entries,
            "compared_entries": one.entries,
            "index_bytes": index_bytes,
            "us_a_key": statistics.median(many_us),
            "compared_us_a_key": statistics.median(one_us),
            "cold_us_a_key": getattr(cold, f"{name}_us")[0],
        }
        ratios = [slower / faster for slower, faster in zip(many_us, one_us, strict=True)]
        void = among_many.void or among_one.void or cold.void
        items.append(value_item(f"match_10m.{name}", ratios, unit="ratio", bar=MANY_BAR, facts=facts, void=void))
    return items


def measure_nowait(keys: KeysStore, setting: Setting) -> list[Item]:
    """What a scheduler waits for: each call of a lookup for 128 keys, while the index is asked for those of other requests.

    Every request is asked for again until it is answered, as a scheduler does at each of its steps.
    """
    forget_pages(keys.index_folder)
    generator = np.random.default_rng(2)
    request_count = 20 if setting.quick else NOWAIT_REQUESTS
    p50_ms: list[float] = []
    p99_ms: list[float] = []
    wrong = ""
    with keys.opened() as store:
        space = store.namespace(bench_namespace(SMALL_BLOCK_BYTES))
        setting.settle(store)
        for _ in range(setting.rounds):
            rows = generator.integers(0, keys.count, (request_count, NOWAIT_KEYS)).tolist()
            calls_s, found = _answered(space, [[bench_key(number) for number in row] for row in rows])
            p50_ms.append(float(np.percentile(calls_s, 50)) * 1e3)
            p99_ms.append(float(np.percentile(calls_s, 99)) * 1e3)
            if found != request_count * NOWAIT_KEYS:
                wrong = f"{found} of {request_count * NOWAIT_KEYS} present keys were found"
    facts: dict[str, Any] = {"keys": keys.count, "keys_a_call": NOWAIT_KEYS, "requests": request_count}
    worst = {"first_round": p99_ms[0], "worst": max(p99_ms)}
    return [
        value_item("lookup_nowait_1m.p50", p50_ms, unit="ms", bar=NOWAIT_BAR, facts=facts, void=wrong or None),
        value_item("lookup_nowait_1m.p99", p99_ms, unit="ms", bar=NOWAIT_BAR, facts=facts | worst, void=wrong or None),
    ]


def _answered(space: BlockSpace, requests: list[list[bytes]]) -> tuple[list[float], int]:
    """Ask for four requests in turn until each is answered, then for the next four: seconds of each call, and the hits in the end."""
    calls_s: list[float] = []
    hits = 0
    step = threading.Event()  # never set: a scheduler's step
    for first in range(0, len(requests), 4):
        open_requests = requests[first : first + 4]
        while open_requests:
            left = []
            for keys in open_requests:
                started = time.perf_counter()
                statuses = space.lookup_nowait(keys)
                calls_s.append(time.perf_counter() - started)
                if Status.PENDING in statuses:
                    left.append(keys)
                else:
                    hits += statuses.count(Status.HIT)
            open_requests = left
            step.wait(0.0005)
    return calls_s, hits


def needed_bytes(setting: Setting) -> int:
    """Free space for both stores at once with the large blocks of the memory item, and for what is flushed while stalls are watched."""
    surplus = killed_rounds(setting) * min(KILLED_SURPLUS_KEYS, setting.key_count) * 2  # and what is put until the process is killed
    blocks_bytes = (setting.key_count + surplus) * BYTES_A_KEY + 2 * (768 * MIB if not setting.quick else 64 * MIB)
    return blocks_bytes + MANY_TIMES * setting.key_count * INDEX_BYTES_A_KEY * 2 + flush_bytes_max(setting)
