"""Opening a store with very many keys: after a clean close, after a kill, and without its index."""

from __future__ import annotations

import time

import numpy as np

from ...engine.index_rocksdb import destroy
from .figures import Bar, Item, value_item
from .keys_store import KeysStore
from .machine import device_read_bytes
from .setting import Setting
from .workload import SMALL_BLOCK_BYTES, bench_key, bench_namespace

CLEAN_BAR = Bar(0.3, "at most")
KILLED_BAR = Bar(1.0, "at most")
REBUILD_BAR = Bar(150_000.0, "at least")
KILLED_ROUNDS = 5
KILLED_SURPLUS_KEYS = 20_000
REBUILD_ROUNDS = 5
CHECKED_KEYS = 4096


def measure_reopening(keys: KeysStore, setting: Setting) -> list[Item]:
    """``reopen_1m``: the store comes killed. For each further round it is filled a little more and killed again."""
    killed_s = [keys.opening_s()]
    for _ in range(killed_rounds(setting) - 1):
        keys.fill_and_kill(min(KILLED_SURPLUS_KEYS, setting.key_count))
        killed_s.append(keys.opening_s())
    clean_s = [keys.opening_s() for _ in range(setting.rounds)]
    return [
        _seconds_item("reopen_1m.clean", clean_s, CLEAN_BAR, keys),
        _seconds_item("reopen_1m.killed", killed_s, KILLED_BAR, keys),
    ]


def killed_rounds(setting: Setting) -> int:
    """How often the store is filled and killed."""
    return min(1 if setting.quick else KILLED_ROUNDS, setting.rounds)


def _seconds_item(name: str, values: list[float], bar: Bar, keys: KeysStore) -> Item:
    facts = {"keys": keys.count, "block_bytes": SMALL_BLOCK_BYTES, "worst": max(values)}
    return value_item(name, values, unit="s", bar=bar, facts=facts)


def measure_rebuild(keys: KeysStore, setting: Setting) -> Item:
    """``rebuild``: opening without an index, until the store is ready; the records are those of the segments' tables of contents."""
    rates: list[float] = []
    seconds: list[float] = []
    records = read_bytes = 0
    void = None
    generator = np.random.default_rng(5)
    for number in range(min(REBUILD_ROUNDS, setting.rounds)):
        setting.console.print(f"rebuild: round {number + 1} of {min(REBUILD_ROUNDS, setting.rounds)}", highlight=False)
        destroy(keys.index_folder)
        read_before = device_read_bytes()
        started = time.perf_counter()
        with keys.opened() as store:
            seconds.append(time.perf_counter() - started)
            read_bytes = device_read_bytes() - read_before
            records = store.stats()["counters"]["recovered_records"]
            numbers = generator.integers(0, keys.count, CHECKED_KEYS).tolist()
            found = sum(store.namespace(bench_namespace(SMALL_BLOCK_BYTES)).contains([bench_key(number) for number in numbers]))
        rates.append(records / seconds[-1])
        if records < keys.count or found != CHECKED_KEYS:
            void = f"{records} records for {keys.count} keys, {found} of {CHECKED_KEYS} present keys were found"
    facts = {"keys": keys.count, "records": records, "seconds": float(np.median(seconds)), "read_bytes": read_bytes}
    return value_item("rebuild", rates, unit="records/s", bar=REBUILD_BAR, facts=facts, void=void)
