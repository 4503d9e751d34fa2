"""How long one call takes: a put into a buffer with room, and puts and cold reads while the flusher writes at its full rate."""

from __future__ import annotations

import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ...engine.contract import BlockSpace
from ...engine.events import EventKind
from ...engine.store import DiskStore
from ...format.errors import KvlodeError
from ...gds.buffers import ByteArray, aligned_array
from .bare import touched_memory
from .figures import Bar, Item, abba, skipped_item, value_item
from .full_rate import FullRate
from .machine import available_memory_bytes, device_read_bytes, last_level_cache_bytes
from .setting import Setting
from .workload import MIB, Blocks, bench_key, bench_namespace, check_accepted, check_blocks, flush, opened

NAMES = ("put_latency", "put_p99", "read_p99_under_write")

PUT_BAR = Bar(1.0, "at most")
MEMCPY_FACTOR = 1.15
MEMCPY_EXTRA_US = 60.0
PUT_SIZES_MIB = (1, 4, 16)
PUT_BYTES_A_ROUND = 128 * MIB
BURST_BYTES = 8 * MIB
"""Puts between two flushes: less than a batch, so that the flusher does nothing while they are timed."""
FLUSH_AFTER_S = 30.0
CACHE_TIMES = 4

PUT_P99_BAR = Bar(10.0, "at most")
PUTS_A_ROUND = 500
READ_P99_BAR = Bar(4.0, "at most")
READS_A_ROUND = 200
WINDOW_BYTES = 128 * MIB
FULL_RATE_BYTES_MAX = 10 << 30
PAUSE_S = 0.0005


def measure(setting: Setting, wanted: set[str]) -> list[Item]:
    """The items of ``NAMES`` that are wanted."""
    items: list[Item] = []
    if "put_latency" in wanted:
        items += _PutLatency(setting).measure()
    if "put_p99" in wanted:
        items.append(_put_p99(setting))
    if "read_p99_under_write" in wanted:
        items.append(_ReadUnderWrite(setting).measure())
    return items


def needed_bytes(setting: Setting) -> int:
    """Free space that these items need at any time: the puts of all rounds, or the cold blocks and what is written beside them."""
    puts_bytes = setting.rounds * (_puts_a_round(setting) + 1) * _block_bytes(setting)
    return max(3 * puts_bytes // 2, _full_rate_bytes(setting) + 2 * READS_A_ROUND * _block_bytes(setting)) + 512 * MIB


def _block_bytes(setting: Setting) -> int:
    return MIB // 4 if setting.quick else 2 * MIB


def _puts_a_round(setting: Setting) -> int:
    return 20 if setting.quick else PUTS_A_ROUND


def _reads_a_round(setting: Setting) -> int:
    return 10 if setting.quick else READS_A_ROUND


def _full_rate_bytes(setting: Setting) -> int:
    return 32 * MIB if setting.quick else FULL_RATE_BYTES_MAX


class Ring:
    """Memory that is used in turn, so much of it that a part has left the processor's cache when its turn comes again."""

    def __init__(self, memory: ByteArray) -> None:
        self._memory = memory
        self._position = 0

    def next(self, size_bytes: int) -> ByteArray:
        """The next ``size_bytes``; they lie together, so the end of the memory is left out where it is shorter."""
        if self._position + size_bytes > self._memory.size:
            self._position = 0
        part = self._memory[self._position : self._position + size_bytes]
        self._position += size_bytes
        return part


# --- a buffer with room ---------------------------------------------------------------------------------------------


class _PutLatency:
    """``put_latency.<size>``: each put beside a ``numpy.copyto`` of as many bytes, in the order put, copy, copy, put, ...

    Sources and the copies' destinations are rings. The buffer is larger than all puts together: each goes to memory that
    nobody has touched since it was zeroed.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._sizes = {f"{mib}MiB": mib * MIB for mib in PUT_SIZES_MIB}
        self._round_bytes = 2 * max(self._sizes.values()) if setting.quick else PUT_BYTES_A_ROUND
        self._number = 0
        self._void: str | None = None

    def measure(self) -> list[Item]:
        setting = self._setting
        cache_bytes = last_level_cache_bytes()
        ring_bytes = max(CACHE_TIMES * cache_bytes, 32 * MIB if setting.quick else 256 * MIB)
        buffer_bytes = setting.rounds * self._round_bytes + cache_bytes + 64 * MIB
        if 2 * ring_bytes + 3 * buffer_bytes // 2 > available_memory_bytes():
            needed_gib = (2 * ring_bytes + 3 * buffer_bytes // 2) / 2**30
            reason = f"needs {needed_gib:.1f} GiB of free memory to stay out of the processor's cache"
            return [skipped_item(f"put_latency.{size}", reason) for size in self._sizes]
        sources = Ring(touched_memory(ring_bytes))
        targets = Ring(touched_memory(ring_bytes, seed=1))
        return [self._item(size, sources, targets, buffer_bytes) for size in self._sizes]

    def _item(self, size: str, sources: Ring, targets: Ring, buffer_bytes: int) -> Item:
        setting, block_bytes = self._setting, self._sizes[size]
        path = setting.folder("put-latency")
        ratios: list[float] = []
        puts_us: list[float] = []
        copies_us: list[float] = []
        capacity = 3 * setting.rounds * self._round_bytes + 512 * MIB
        with opened(path, capacity=capacity, buffer=buffer_bytes, codec="raw", flush_after_s=FLUSH_AFTER_S) as store:
            space = store.namespace(bench_namespace(block_bytes))
            setting.settle(store)
            for number in range(setting.rounds):
                setting.console.print(f"put_latency.{size}: round {number + 1} of {setting.rounds}", highlight=False)
                pairs = self._pairs(store, space, block_bytes, sources, targets)
                ratios.append(statistics.median(put_us / (MEMCPY_FACTOR * copy_us + MEMCPY_EXTRA_US) for put_us, copy_us in pairs))
                puts_us += [put_us for put_us, _ in pairs]
                copies_us += [copy_us for _, copy_us in pairs]
        shutil.rmtree(path)
        facts = {
            "block_bytes": block_bytes,
            "pairs": len(puts_us),
            "put_us": statistics.median(puts_us),
            "memcpy_us": statistics.median(copies_us),
            "allowed": f"{MEMCPY_FACTOR} x memcpy + {MEMCPY_EXTRA_US:.0f} us",
        }
        return value_item(f"put_latency.{size}", ratios, unit="ratio", bar=PUT_BAR, facts=facts, void=self._void)

    def _pairs(self, store: DiskStore, space: BlockSpace, block_bytes: int, sources: Ring, targets: Ring) -> list[tuple[float, float]]:
        """Microseconds of a put and of a copy, for each of a round. After each burst the blocks are written, and the last is compared."""
        pairs: list[tuple[float, float]] = []
        found = np.empty(block_bytes, np.uint8)
        last: tuple[bytes, ByteArray] = b"", found
        burst = max(1, BURST_BYTES // block_bytes)
        count = max(1, self._round_bytes // block_bytes)

        def put_arm(_: int) -> float:
            nonlocal last
            self._number += 1
            last = bench_key(self._number, salt="put-latency"), sources.next(block_bytes)
            return _timed_put_us(space, *last)

        def copy_arm(_: int) -> float:
            source, target = sources.next(block_bytes), targets.next(block_bytes)
            started = time.perf_counter()
            np.copyto(target, source)
            return (time.perf_counter() - started) * 1e6

        for start in range(0, count, burst):
            pairs += zip(*abba(min(burst, count - start), put_arm, copy_arm), strict=True)
            if space.get_into(last[0], found) != 0 or not np.array_equal(found, last[1]):
                self._void = "a block did not come back as it was put"
            flush(store)
        return pairs


# --- puts while the flusher writes ------------------------------------------------------------------------------------


class Backlog:
    """How many blocks are on their way to the drive, told by the store's own events."""

    def __init__(self, store: DiskStore) -> None:
        self._store = store
        self._since: object = store.events().next
        self._pause = threading.Event()  # never set: events are asked for
        self.blocks = 0

    def add(self) -> None:
        """A block was put."""
        self.blocks += 1

    def wait_below(self, blocks_max: int) -> None:
        """Until fewer than ``blocks_max`` are on their way. Raises ``KvlodeError`` when the store has failed meanwhile."""
        while self._left() >= blocks_max:
            if self._store.stats()["failure"] is not None:
                raise KvlodeError("the store failed", where=self._store.path, actual=self._store.stats()["failure"])
            while self.blocks >= blocks_max and self._left() >= blocks_max:
                self._pause.wait(PAUSE_S)

    def _left(self) -> int:
        batch = self._store.events(self._since)
        self._since = batch.next
        self.blocks -= sum(len(event.keys) for event in batch.events if event.kind is EventKind.STORED)
        return self.blocks


def _put_p99(setting: Setting) -> Item:
    """``put_p99``: puts as fast as the flusher writes, with a backlog that never gets smaller than many batches nor fills the buffer."""
    block_bytes, count = _block_bytes(setting), _puts_a_round(setting)
    window = max(2, (setting.buffer_bytes // 4 if setting.quick else WINDOW_BYTES) // block_bytes)
    source = Ring(touched_memory(max(CACHE_TIMES * last_level_cache_bytes(), 2 * block_bytes)))
    path = setting.folder("put-p99")
    ratios: list[float] = []
    all_us: list[float] = []
    rates: list[float] = []
    capacity = 3 * setting.rounds * (count + window) * block_bytes + 512 * MIB
    with opened(path, capacity=capacity, buffer=setting.buffer_bytes, codec="raw") as store:
        space = store.namespace(bench_namespace(block_bytes))
        setting.settle(store)
        numbers = iter(range(1 << 40))
        for round_number in range(setting.rounds):
            setting.console.print(f"put_p99: round {round_number + 1} of {setting.rounds}", highlight=False)
            backlog = Backlog(store)
            for _ in range(window):  # until the backlog is there
                _timed_put_us(space, bench_key(next(numbers), salt="put-p99"), source.next(block_bytes))
                backlog.add()
            puts_us = []
            started = time.perf_counter()
            for _ in range(count):
                backlog.wait_below(window)
                puts_us.append(_timed_put_us(space, bench_key(next(numbers), salt="put-p99"), source.next(block_bytes)))
                backlog.add()
            rates.append(count * block_bytes / (time.perf_counter() - started) / 1e9)
            ratios.append(float(np.percentile(puts_us, 99)) / statistics.median(puts_us))
            all_us += puts_us
            flush(store)
    shutil.rmtree(path)
    facts = {
        "block_bytes": block_bytes,
        "puts_a_round": count,
        "backlog_blocks": window,
        "median_us": statistics.median(all_us),
        "p99_us": float(np.percentile(all_us, 99)),
        "worst_us": max(all_us),
        "flush_GB_s": statistics.median(rates),
    }
    return value_item("put_p99", ratios, unit="ratio", bar=PUT_P99_BAR, facts=facts)


def _timed_put_us(space: BlockSpace, key: bytes, block: ByteArray) -> float:
    started = time.perf_counter()
    status = space.put(key, block)
    ended = time.perf_counter()
    check_accepted([status])
    return (ended - started) * 1e6


# --- cold reads while the flusher writes --------------------------------------------------------------------------------


class _ReadUnderWrite:
    """``read_p99_under_write``: the same cold blocks, one at a time in random order, of an idle store and of one that writes."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._blocks = Blocks(_reads_a_round(setting), _block_bytes(setting))
        self._path = setting.folder("read-p99")
        self._generator = np.random.default_rng(3)
        self._outs = aligned_array(8 * self._blocks.block_bytes).reshape(8, -1)
        self._outs[:] = 0xEE
        self._options: dict[str, Any] = {"buffer": setting.buffer_bytes, "codec": "raw"}
        self._options["capacity"] = 3 * (_full_rate_bytes(setting) + self._blocks.count * self._blocks.block_bytes) + 512 * MIB
        self._ms: dict[str, list[float]] = {"idle": [], "writing": []}
        self._rates: list[float] = []
        self._voids: list[str] = []

    def measure(self) -> Item:
        ratios = []
        for number in range(self._setting.rounds):
            self._setting.console.print(f"read_p99_under_write: round {number + 1} of {self._setting.rounds}", highlight=False)
            with self._cold_store() as store:
                arms = [self._idle_arm, self._writing_arm]
                p99_ms = {arm: arm(store) for arm in (arms if number % 2 == 0 else reversed(arms))}
            ratios.append(p99_ms[self._writing_arm] / p99_ms[self._idle_arm])
            shutil.rmtree(self._path)
        facts: dict[str, Any] = {"block_bytes": self._blocks.block_bytes, "reads_a_round": self._blocks.count}
        for name, values in self._ms.items():
            facts |= {f"{name}_median_ms": statistics.median(values), f"{name}_p99_ms": float(np.percentile(values, 99))}
        facts |= {"writing_worst_ms": max(self._ms["writing"]), "flush_GB_s": statistics.median(self._rates)}
        void = self._voids[0] if self._voids else None
        return value_item("read_p99_under_write", ratios, unit="ratio", bar=READ_P99_BAR, facts=facts, void=void)

    @contextmanager
    def _cold_store(self) -> Iterator[DiskStore]:
        """A new store of the blocks, opened again: none of them is in its buffer."""
        with opened(self._path, **self._options) as store:
            self._blocks.put_all(store)
        with opened(self._path, **self._options) as store:
            self._setting.settle(store)
            yield store

    def _idle_arm(self, store: DiskStore) -> float:
        flush(store)
        return self._read_p99_ms(store, "idle", None)

    def _writing_arm(self, store: DiskStore) -> float:
        source = touched_memory(16 * self._blocks.block_bytes, seed=4).reshape(16, -1)
        with FullRate(store, list(source), bytes_max=_full_rate_bytes(self._setting)) as load:
            p99_ms = self._read_p99_ms(store, "writing", load)
        self._rates.append(load.rate_GB_s)
        return p99_ms

    def _read_p99_ms(self, store: DiskStore, name: str, load: FullRate | None) -> float:
        """Every block once, timed one by one and compared between."""
        blocks = self._blocks
        space = store.namespace(bench_namespace(blocks.block_bytes))
        reads_ms: list[float] = []
        correct = 0
        hits_before = store.stats()["counters"].get("buffer_hits", 0)
        read_before = device_read_bytes()
        for position, number in enumerate(self._generator.permutation(blocks.count).tolist()):
            if load is not None and load.over and not self._setting.quick:
                self._voids.append(f"the flusher had nothing left to write after {position} of {blocks.count} reads")
                break
            out = self._outs[position % len(self._outs)]
            started = time.perf_counter()
            status = space.get_into(blocks.keys[number], out)
            reads_ms.append((time.perf_counter() - started) * 1e3)
            correct += check_blocks(blocks, [number], [status], [out]).correct
        read_bytes = device_read_bytes() - read_before
        hits = store.stats()["counters"].get("buffer_hits", 0) - hits_before
        if correct != len(reads_ms):
            self._voids.append(f"{correct} of {len(reads_ms)} blocks came back as they were put")
        if hits or read_bytes < len(reads_ms) * blocks.block_bytes:
            self._voids.append(f"not cold: {hits} blocks came from the buffer, {read_bytes} bytes from the drive for {len(reads_ms)} reads")
        self._ms[name] += reads_ms
        return float(np.percentile(reads_ms, 99))
