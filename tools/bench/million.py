"""A store with a million keys: how long a lookup takes, how long opening takes after a clean close and after a kill, how much memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...engine.contract import BlockSpace, Status
from ...format.errors import KvlodeError
from .figures import Bar, Item, value_item
from .page_cache import forget_pages
from .setting import Setting
from .workload import MIB, SMALL_BLOCK_BYTES, bench_key, bench_namespace, opened

MATCH_BAR = Bar(6.0, "at most")
CLEAN_BAR = Bar(1.0, "at most")
KILLED_BAR = Bar(3.0, "at most")
MEMORY_BAR = Bar(512.0, "at most")
MATCH_KEYS = 4096
NOWAIT_BAR = Bar(1.0, "at most")
NOWAIT_KEYS = 128
NOWAIT_REQUESTS = 200
KILLED_ROUNDS = 5
KILLED_SURPLUS_KEYS = 20_000
BYTES_A_KEY = 8192
NAMES = ("match_1m", "lookup_nowait_1m", "reopen_1m", "memory_beyond_buffer")


class Million:
    """The store and what is measured on it; ``wanted`` are names of items."""

    def __init__(self, setting: Setting, wanted: set[str]) -> None:
        self._setting = setting
        self._wanted = wanted
        self._path = setting.folder("keys")
        self._keys = 0
        self._options: dict[str, Any] = {
            "capacity": 2 * setting.key_count * BYTES_A_KEY + 1024 * MIB,
            "buffer": 16 * MIB if setting.quick else 256 * MIB,
            "codec": "raw",
        }

    def measure(self) -> list[Item]:
        """All wanted items, on one store that is filled once."""
        items: list[Item] = []
        self._fill_and_kill(self._setting.key_count)
        if "reopen_1m" in self._wanted:
            killed = [self._reopen_s()]
            surplus = min(KILLED_SURPLUS_KEYS, self._setting.key_count)
            for _ in range(min(KILLED_ROUNDS, self._setting.rounds) - 1):
                self._fill_and_kill(surplus)
                killed.append(self._reopen_s())
            clean = [self._reopen_s() for _ in range(self._setting.rounds)]
            items.append(self._item("reopen_1m.clean", clean, "s", CLEAN_BAR, worst=max(clean)))
            items.append(self._item("reopen_1m.killed", killed, "s", KILLED_BAR, worst=max(killed)))
        else:
            self._reopen_s()
        if "match_1m" in self._wanted:
            items += self._match_items()
        if "lookup_nowait_1m" in self._wanted:
            items += self._nowait_items()
        if "memory_beyond_buffer" in self._wanted:
            items.append(self._memory_item())
        shutil.rmtree(self._path)
        return items

    def _item(self, name: str, values: list[float], unit: str, bar: Bar, *, void: str | None = None, **facts: Any) -> Item:
        facts = {"keys": self._keys, "block_bytes": SMALL_BLOCK_BYTES, **facts}
        return value_item(name, values, unit=unit, bar=bar, facts=facts, void=void)

    # --- filling and killing ------------------------------------------------------------------------------------

    def _fill_and_kill(self, count: int) -> None:
        """A process puts ``count`` more keys and is killed while it puts others."""
        with _child("fill", path=self._path, start=self._keys, count=count, options=self._options) as process:
            for event in _events(process):
                if event["event"] == "durable":
                    break
                self._setting.console.print(f"filling a store: {event['keys']:,} keys", highlight=False)
            else:
                raise KvlodeError("the process that fills a store ended early", where=self._path, actual=f"exit code {process.wait()}")
            process.kill()
        self._keys += count

    def _reopen_s(self) -> float:
        """Seconds of opening, with the index's files dropped from the page cache before."""
        forget_pages(Path(self._path, "index"))
        started = time.perf_counter()
        with opened(self._path, **self._options):
            return time.perf_counter() - started

    # --- looking up ---------------------------------------------------------------------------------------------

    def _match_items(self) -> list[Item]:
        """Other keys in each round, drawn from all over the store. The index starts cold, as after a restart of the machine."""
        forget_pages(Path(self._path, "index"))
        count = min(MATCH_KEYS, self._keys)
        generator = np.random.default_rng(1)
        present_us: list[float] = []
        absent_us: list[float] = []
        wrong = ""
        with opened(self._path, **self._options) as store:
            space = store.namespace(bench_namespace(SMALL_BLOCK_BYTES))
            self._setting.settle(store)
            for _ in range(self._setting.rounds):
                present = [bench_key(number) for number in generator.choice(self._keys, count, replace=False).tolist()]
                absent = [bench_key(number, salt="absent") for number in generator.integers(0, 1 << 40, count).tolist()]
                started = time.perf_counter()
                matched = space.match_prefix(present)
                between = time.perf_counter()
                found = sum(space.contains(absent))
                ended = time.perf_counter()
                present_us.append((between - started) / count * 1e6)
                absent_us.append((ended - between) / count * 1e6)
                if matched != count or found:
                    wrong = f"{matched} of {count} present keys matched, {found} absent keys were found"
        facts: dict[str, Any] = {"void": wrong or None, "keys_a_round": count}
        return [
            self._item("match_1m.present", present_us, "us/key", MATCH_BAR, first_round=present_us[0], **facts),
            self._item("match_1m.absent", absent_us, "us/key", MATCH_BAR, first_round=absent_us[0], **facts),
        ]

    def _nowait_items(self) -> list[Item]:
        """What a scheduler waits for: each call of a lookup for 128 keys, while the index is asked for those of other requests.

        Every request is asked for again until it is answered, as a scheduler does at each of its steps.
        """
        forget_pages(Path(self._path, "index"))
        generator = np.random.default_rng(2)
        p50_ms: list[float] = []
        p99_ms: list[float] = []
        wrong = ""
        with opened(self._path, **self._options) as store:
            space = store.namespace(bench_namespace(SMALL_BLOCK_BYTES))
            self._setting.settle(store)
            for _ in range(self._setting.rounds):
                requests = [
                    [bench_key(number) for number in row]
                    for row in generator.integers(0, self._keys, (NOWAIT_REQUESTS, NOWAIT_KEYS)).tolist()
                ]
                calls_s, found = _answered(space, requests)
                p50_ms.append(float(np.percentile(calls_s, 50)) * 1e3)
                p99_ms.append(float(np.percentile(calls_s, 99)) * 1e3)
                if found != NOWAIT_REQUESTS * NOWAIT_KEYS:
                    wrong = f"{found} of {NOWAIT_REQUESTS * NOWAIT_KEYS} present keys were found"
        facts: dict[str, Any] = {"void": wrong or None, "keys_a_call": NOWAIT_KEYS, "requests": NOWAIT_REQUESTS}
        return [
            self._item("lookup_nowait_1m.p50", p50_ms, "ms", NOWAIT_BAR, **facts),
            self._item("lookup_nowait_1m.p99", p99_ms, "ms", NOWAIT_BAR, first_round=p99_ms[0], worst=max(p99_ms), **facts),
        ]

    # --- memory -------------------------------------------------------------------------------------------------

    def _memory_item(self) -> Item:
        with _child("memory", path=self._path, start=0, count=self._keys, options=self._options) as process:
            measured = next((event for event in _events(process) if event["event"] == "memory"), None)
            code = process.wait()
        if measured is None or code != 0:
            raise KvlodeError("the process whose memory is measured failed", where=self._path, actual=f"exit code {code}")
        void = None
        if measured["correct"] != measured["asked"] or measured["found"] != measured["looked_up"]:
            void = f"{measured['correct']} of {measured['asked']} blocks and {measured['found']} of {measured['looked_up']} keys came back"
        mib = measured["beyond_bytes"] / MIB
        return self._item("memory_beyond_buffer", [mib], "MiB", MEMORY_BAR, void=void, buffer_bytes=self._options["buffer"])


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


@contextmanager
def _child(step: str, **arguments: Any) -> Iterator[subprocess.Popen[str]]:
    """A step in a process of its own, which is gone afterwards."""
    command = [sys.executable, "-m", f"{__package__}.child", step, json.dumps(arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _events(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        event: dict[str, Any] = json.loads(line)
        if event["event"] == "error":
            raise KvlodeError("a process of the bench failed", actual=event["text"])
        yield event


def needed_bytes(setting: Setting) -> int:
    """Free space for the store with a million keys, the large blocks of the memory item included."""
    surplus = KILLED_ROUNDS * KILLED_SURPLUS_KEYS * 2 if not setting.quick else setting.key_count * KILLED_ROUNDS
    return (setting.key_count + surplus) * BYTES_A_KEY + (1536 * MIB if not setting.quick else 128 * MIB)
