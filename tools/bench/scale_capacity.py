"""``scale_capacity.<level>.<what>``: putting and reading while a store fills, and while it lives at its capacity.

A round fills a small store to 10, 50, 90 and 100 % of its capacity, puts as much again while reclaim frees what is oldest, and once more
while an eighth of the blocks is in use, so that reclaim copies them forward. After each step the bare loop repeats the requests of the
first one: a step may only be compared with what the drive did in the same minute.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engine.config import StoreConfig
from ...engine.store import DiskStore
from ...gds.buffers import aligned_array
from .amplification import Written
from .bare import replay_writes, touched_memory
from .figures import Item
from .latency import Backlog
from .machine import device_read_bytes
from .scale_calls import Figures, one_by_one
from .setting import Setting
from .trace import Trace, TracingDevice
from .workload import MIB, PUT_TIMEOUT_S, bench_key, bench_namespace, check_accepted, flush, opened, tracing_device
from .write_arms import IO_THREADS

CAPACITY_BYTES = 4096 * MIB
QUICK_CAPACITY_BYTES = 128 * MIB
BLOCK_BYTES = MIB
BUFFER_BYTES = 256 * MIB
WINDOW_BYTES = 96 * MIB
"""Blocks on their way to the drive while puts are timed: more than what is written at once, and less than the buffer takes."""
READS = 128
USED_SHARE = 8
"""One block in so many is in use in the last step."""
USES = 2


@dataclass(frozen=True, slots=True)
class Step:
    """Put blocks until so much of the capacity has been put in all, in raw bytes."""

    name: str
    until_percent: int
    in_use: bool = False


STEPS = (
    Step("10", 10),
    Step("50", 50),
    Step("90", 90),
    Step("100", 100),
    Step("turned", 200),
    Step("turned_in_use", 300, in_use=True),
)


def measure(setting: Setting) -> list[Item]:
    """All figures of all steps."""
    figures = Figures()
    capacity_bytes, block_bytes = _sizes(setting)
    for number in range(setting.rounds):
        setting.console.print(f"scale_capacity: round {number + 1} of {setting.rounds}", highlight=False)
        options: dict[str, Any] = {"capacity": capacity_bytes, "buffer": _buffer_bytes(setting), "codec": "raw", "serve_clean": False}
        path = setting.folder("scale-capacity")
        config = StoreConfig.build(**options)
        with tracing_device(path, config) as device, opened(path, device=device, **options) as store:
            filling = _Filling(setting, store, device, figures)
            setting.settle(store)
            device.begin()
            for step in STEPS:
                filling.step(step)
        shutil.rmtree(path)
    return figures.items(capacity_bytes=capacity_bytes, block_bytes=block_bytes)


def _sizes(setting: Setting) -> tuple[int, int]:
    """Bytes of capacity and of a block."""
    return (QUICK_CAPACITY_BYTES, MIB // 4) if setting.quick else (CAPACITY_BYTES, BLOCK_BYTES)


def _buffer_bytes(setting: Setting) -> int:
    return 16 * MIB if setting.quick else BUFFER_BYTES


class _Filling:
    """One store from empty to turned over twice."""

    def __init__(self, setting: Setting, store: DiskStore, device: TracingDevice, figures: Figures) -> None:
        self._setting = setting
        self._store = store
        self._device = device
        self._figures = figures
        self._capacity_bytes, block_bytes = _sizes(setting)
        self._space = store.namespace(bench_namespace(block_bytes))
        self._source = touched_memory(64 * block_bytes).reshape(64, -1)
        self._window = min(WINDOW_BYTES, _buffer_bytes(setting) // 2) // block_bytes
        self._generator = np.random.default_rng(8)
        self._count = 0
        self._first: Trace | None = None

    def step(self, step: Step) -> None:
        """Put the step's blocks, read some of them, and let the bare loop write."""
        name, block_bytes = f"scale_capacity.{step.name}", self._source.shape[1]
        if step.in_use:
            self._use(self._capacity_bytes // block_bytes)
        numbers = range(self._count, step.until_percent * self._capacity_bytes // 100 // block_bytes)
        counters, written = self._counters(), Written.now(self._setting.root)
        backlog = Backlog(self._store)
        started = time.perf_counter()
        calls = one_by_one(numbers, self._put, between=lambda _: self._wait(backlog))
        flush(self._store, PUT_TIMEOUT_S)
        seconds = time.perf_counter() - started
        raw_bytes, self._count = len(numbers) * block_bytes, numbers.stop
        device_bytes = Written.now(self._setting.root).since(written).process_bytes
        done = {event: count - counters.get(event, 0) for event, count in self._counters().items()}
        reclaim = {event: done.get(event, 0) for event in ("segments_freed", "evicted_blocks", "reinserted_blocks")}
        bare_GB_s = self._bare_GB_s()
        rate_GB_s = raw_bytes / seconds / 1e9
        facts = reclaim | {"used_bytes": self._store.stats()["used_bytes"]}
        self._figures.add_calls(f"{name}.put", "GB/s", rate_GB_s, calls, bare_GB_s=bare_GB_s, **facts)
        self._figures.add(f"{name}.put_by_bare", "ratio", rate_GB_s / bare_GB_s)
        self._figures.add(f"{name}.put_p99", "ms", calls.percentile_ms(99), median_ms=calls.percentile_ms(50), worst_ms=max(calls.calls_ms))
        self._figures.add(f"{name}.write_amplification", "ratio", device_bytes / raw_bytes, raw_bytes=raw_bytes)
        self._read(name, numbers)

    def _put(self, number: int) -> None:
        block = self._source[number % len(self._source)]
        block[:8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
        check_accepted([self._space.put(bench_key(number), block)])

    def _wait(self, backlog: Backlog) -> None:
        backlog.add()
        backlog.wait_below(self._window)

    def _use(self, latest: int) -> None:
        """A part of the latest blocks is used so often that reclaim carries it forward."""
        used = [bench_key(number) for number in range(self._count - latest, self._count) if number % USED_SHARE == 0]
        for _ in range(USES):
            self._space.touch(used)

    def _read(self, name: str, numbers: range) -> None:
        """Some of the step's blocks, which are the newest, one at a time in random order."""
        block_bytes = self._source.shape[1]
        newest = numbers[-(self._capacity_bytes // 2 // block_bytes) :]
        chosen = self._generator.permutation(len(newest))[:READS].tolist()
        out = aligned_array(block_bytes)
        correct = 0
        read_before = device_read_bytes()

        def get(position: int) -> None:
            self._space.get_into(bench_key(newest[position]), out)

        def check(position: int) -> None:
            nonlocal correct
            number = newest[position]
            block = self._source[number % len(self._source)]
            stamped = int.from_bytes(out[:8].tobytes(), "little") == number
            correct += stamped and np.array_equal(out[8:], block[8:])

        calls = one_by_one(chosen, get, between=check)
        self._figures.add_calls(f"{name}.get", "ms", calls.percentile_ms(50), calls)
        self._figures.check(f"{name}.get", correct, len(chosen))
        self._figures.check_cold(f"{name}.get", device_read_bytes() - read_before, len(chosen) * block_bytes)

    def _bare_GB_s(self) -> float:
        """What the drive takes now, of the requests of the first step."""
        if self._first is None:
            self._first = self._device.trace.cut()
        seconds = replay_writes(self._first, self._setting.folder("bare"), self._source.reshape(-1), threads=IO_THREADS)
        return self._first.total_bytes("write") / seconds / 1e9

    def _counters(self) -> dict[str, int]:
        return dict(self._store.stats()["counters"])


def needed_bytes(setting: Setting) -> int:
    """Free space for the store and for what the bare loop writes beside it."""
    return 5 * _sizes(setting)[0] // 4 + 512 * MIB
