"""What is measured of a store, each step in a process of its own that starts with nothing of the store in memory."""

from __future__ import annotations

import hashlib
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .base import Store, Task
from .system import aligned_rows, device_read_bytes, disk_bytes, forget_pages

STAMP_BYTES = 8
UNREAD = 0xEE
LOOKUPS = 9
"""Lookups of all keys; the figure is the median."""


@dataclass(frozen=True)
class Order:
    """One step, as the parent asks for it."""

    folder: str
    data: str
    """A file of distinct blocks, one behind the other."""
    block_bytes: int
    count: int
    namespace: dict[str, Any] | None
    seed: int
    codec: str
    """Of kvlode."""
    stored_bytes: int = 0
    """What a read must fetch from the drive to count as cold."""

    def keys(self, start: int = 0) -> list[bytes]:
        return [hashlib.sha256(b"%d" % number).digest() for number in range(start, start + self.count)]


class Workspace:
    """The rows that are written, with what they hold, and the rows that are read into."""

    def __init__(self, order: Order) -> None:
        self.order = order
        distinct = np.fromfile(order.data, np.uint8).reshape(-1, order.block_bytes)
        self.arena = aligned_rows(2 * order.count, order.block_bytes)
        for number in range(order.count):
            np.copyto(self.arena[number], distinct[number % len(distinct)])
            self.arena[number, :STAMP_BYTES] = np.frombuffer(number.to_bytes(STAMP_BYTES, "little"), np.uint8)
        self.clear()

    def clear(self) -> None:
        """What an earlier read left is no block any more."""
        self.arena[self.order.count :] = UNREAD

    def task(self) -> Task:
        return Task(Path(self.order.folder), self.arena, self.order.namespace, self.order.codec)

    def shuffled(self) -> list[int]:
        return [int(number) for number in np.random.default_rng(self.order.seed).permutation(self.order.count)]

    def place(self, number: int) -> int:
        """The row that block ``number`` is read into: another one in every round."""
        return self.order.count + (number + self.order.seed) % self.order.count

    def is_block(self, number: int) -> bool:
        return bool(np.array_equal(self.arena[self.place(number)], self.arena[number]))


def get_all(space: Workspace, store: Store, keys: Sequence[bytes]) -> dict[str, Any]:
    """Read every block once in random order, and compare each."""
    numbers = space.shuffled()
    read_before = device_read_bytes()
    started_s, cpu_started_s = time.perf_counter(), time.process_time()
    found = store.get([keys[number] for number in numbers], [space.place(number) for number in numbers])
    seconds, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_started_s
    read_bytes = device_read_bytes() - read_before
    hits = [number for number, hit in zip(numbers, found, strict=True) if hit]
    correct = sum(space.is_block(number) for number in hits)
    return {"seconds": seconds, "cpu_s": cpu_s, "read_bytes": read_bytes, "correct": correct, "hits": len(hits), "expected": len(numbers)}


def write(kind: type[Store], order: Order, say: Callable[..., None]) -> dict[str, Any]:
    """Put everything and make it durable; read it back in the same process; close."""
    space = Workspace(order)
    store = kind(space.task())
    store.open()
    store.settle()
    keys, rows = order.keys(), list(range(order.count))
    os.sync()
    started_s, cpu_started_s = time.perf_counter(), time.process_time()
    store.put(keys, rows)
    store.sync()
    seconds, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_started_s
    warm = get_all(space, store, keys)
    stored_bytes = store.stored_bytes(order.count * order.block_bytes)
    store.close()
    return {
        "write_s": seconds,
        "write_cpu_s": cpu_s,
        "warm": warm,
        "stored_bytes": stored_bytes,
        "disk_bytes": disk_bytes(Path(order.folder)),
        "version": kind.version,
        "settings": kind.settings,
    }


def read(kind: type[Store], order: Order, say: Callable[..., None]) -> dict[str, Any]:
    """Read what another process wrote, none of it in the page cache; then look keys up."""
    space = Workspace(order)
    forget_pages(Path(order.folder))
    read_before = device_read_bytes()
    store = kind(space.task())
    store.open()
    store.settle()
    keys = order.keys()
    cold = get_all(space, store, keys)
    cold["read_bytes_with_open"] = device_read_bytes() - read_before
    present_us, present = lookup(store, keys)
    absent_us, absent = lookup(store, order.keys(1 << 40))
    store.close()
    right = all(present) and not any(absent)
    return {"cold": cold, "lookup_present_us": present_us, "lookup_absent_us": absent_us, "lookups_right": right}


def lookup(store: Store, keys: Sequence[bytes]) -> tuple[float, list[bool]]:
    """Microseconds a key, and the last answers."""
    times_s = []
    for _ in range(LOOKUPS):
        started_s = time.perf_counter()
        found = store.contains(keys)
        times_s.append(time.perf_counter() - started_s)
    return statistics.median(times_s) / len(keys) * 1e6, found


def be_killed(kind: type[Store], order: Order, say: Callable[..., None]) -> dict[str, Any]:
    """Make one half durable, say so, then go on writing until the kill."""
    space = Workspace(order)
    store = kind(space.task())
    store.open()
    store.settle()
    keys, half = order.keys(), order.count // 2
    store.put(keys[:half], list(range(half)))
    store.sync()
    say(durable=half)
    store.put(keys[half:], list(range(half, order.count)))
    store.sync()
    signal.pause()
    raise AssertionError("the kill did not come")


def open_killed(kind: type[Store], order: Order, say: Callable[..., None]) -> dict[str, Any]:
    """Open what a killed process left, until every key is answered for; then see what it delivers."""
    space = Workspace(order)
    load_lazily(kind, space)
    store = kind(space.task())
    keys, half = order.keys(), order.count // 2
    started_s = time.perf_counter()
    store.open()
    present = store.contains(keys)
    seconds = time.perf_counter() - started_s
    found = store.get(keys, [space.place(number) for number in range(order.count)])
    right = [hit and space.is_block(number) for number, hit in enumerate(found)]
    store.close()
    return {
        "open_s": seconds,
        "served": sum(right[:half]),
        "served_of": half,
        "later": sum(right[half:]),
        "wrong": sum(hit and not fine for hit, fine in zip(found, right, strict=True)),
        "present": sum(present),
    }


def load_lazily(kind: type[Store], space: Workspace) -> None:
    """Open an empty store elsewhere, and close it: what a library imports at its first use is no part of opening what was killed."""
    with tempfile.TemporaryDirectory(dir=Path(space.order.folder).parent) as folder:
        store = kind(replace(space.task(), folder=Path(folder)))
        store.open()
        store.contains(space.order.keys())
        store.close()


STEPS: dict[str, Callable[[type[Store], Order, Callable[..., None]], dict[str, Any]]] = {
    "write": write,
    "read": read,
    "be_killed": be_killed,
    "open_killed": open_killed,
}
