"""A writer that dies, for ``tests/test_real_faults.py``: at the nth passing of a named point, or when it is killed among its threads.

``point FOLDER JOURNAL POINT NTH`` and ``threads FOLDER JOURNAL SEED``. A point is ``before`` or ``after`` an operation of the device or
the index, as in ``after:sync``. The journal lies outside of the store and says what a successful flush promised.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import kvlode
from kvlode.engine.config import StoreConfig
from kvlode.engine.index_rocksdb import RocksIndex
from kvlode.engine.opening import Environment, open_store
from kvlode.gds.device import DeviceFile, OpenMode
from kvlode.gds.posix import PosixDevice
from kvlode.gds.wrapping import WrappingDevice, WrappingFile
from model import block_bytes, descriptor

SIZES = (3_000, 70_000, 200_001)
ROUNDS = 200


class Killer:
    """Kills this process at the nth passing of one point."""

    def __init__(self, point: str, nth: int) -> None:
        self._point = point
        self._nth = nth
        self._lock = threading.Lock()

    def around(self, operation: str, call: Callable[[], Any]) -> Any:
        self._pass(f"before:{operation}")
        result = call()
        self._pass(f"after:{operation}")
        return result

    def _pass(self, point: str) -> None:
        with self._lock:
            self._nth -= point == self._point
            if self._nth == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class KillingDevice(WrappingDevice):
    def __init__(self, killer: Killer) -> None:
        super().__init__(PosixDevice(threads=4))
        self._killer = killer

    def _wrap(self, file: DeviceFile, path: str, mode: OpenMode) -> DeviceFile:
        return KillingFile(file, self._killer) if path.endswith((".seg", ".new")) else file

    def rename(self, source: str, target: str) -> None:
        self._killer.around("rename", lambda: self.inner.rename(source, target))

    def remove(self, path: str) -> None:
        self._killer.around("remove", lambda: self.inner.remove(path))

    def sync_folder(self, path: str) -> None:
        self._killer.around("sync_folder", lambda: self.inner.sync_folder(path))


class KillingFile(WrappingFile):
    def __init__(self, inner: DeviceFile, killer: Killer) -> None:
        super().__init__(inner)
        self._killer = killer

    def write(self, offset: int, buffers: Any) -> Any:
        return self._killer.around("write", lambda: self.inner.write(offset, buffers))

    def sync(self) -> None:
        self._killer.around("sync", self.inner.sync)

    def preallocate(self, size_bytes: int) -> None:
        self._killer.around("preallocate", lambda: self.inner.preallocate(size_bytes))

    def truncate(self, size_bytes: int) -> None:
        self._killer.around("truncate", lambda: self.inner.truncate(size_bytes))


class KillingIndex(RocksIndex):
    killer: Killer

    def apply(self, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes] = ()) -> None:
        self.killer.around("index_apply", lambda: RocksIndex.apply(self, puts, deletes))

    def sync(self) -> None:
        self.killer.around("index_sync", lambda: RocksIndex.sync(self))


def open_with_points(folder: str, options: dict[str, Any], killer: Killer) -> kvlode.DiskStore:
    index = KillingIndex(f"{folder}/index", write_buffer_bytes=1 << 20, wal_bytes_max=2 << 20)
    index.killer = killer
    return open_store(folder, StoreConfig.build(**options), Environment(device=KillingDevice(killer), index=index))


class Journal:
    """Appends lines that are on the drive when ``write`` returns."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, kept: list[list[Any]], deleted: list[list[Any]]) -> None:
        os.write(self._file, (json.dumps({"kept": kept, "deleted": deleted}) + "\n").encode())
        os.fsync(self._file)
        print("flushed", flush=True)


def changes(store: kvlode.DiskStore, chance: random.Random, first: int, count: int) -> Iterator[tuple[list[Any], bool]]:
    """Put blocks and delete some again: each accepted block, and whether it was deleted."""
    for version in range(first, first + count):
        name, size, key = chance.choice(("one", "two")), chance.choice(SIZES), b"%d" % version
        space = store.namespace(descriptor(name, block_bytes_max=256 << 10))
        if space.put(key, block_bytes(key, version, size)):
            yield [name, version, size], chance.random() < 0.2 and space.delete([key]) == 1


def die_at_a_point(folder: str, journal: Journal, options: dict[str, Any], point: str, nth: int) -> None:
    chance = random.Random(f"{point} {nth}")
    store = open_with_points(folder, options, Killer(point, nth))
    for turn in range(ROUNDS):
        done = list(changes(store, chance, turn * 100, chance.randint(1, 8)))
        if store.flush(30.0):
            journal.write([block for block, gone in done if not gone], [block for block, gone in done if gone])
    store.close()


def write_from_threads(folder: str, journal: Journal, options: dict[str, Any], seed: int) -> None:
    """Three threads put and delete while the main thread flushes, until somebody kills the process."""
    store = kvlode.open(folder, **options)
    lock = threading.Lock()
    waiting: list[tuple[list[Any], bool]] = []

    def work(number: int) -> None:
        chance = random.Random(seed * 10 + number)
        first = (seed * 10 + number) * 10_000_000
        while True:
            for change in changes(store, chance, first, 5):
                with lock:
                    waiting.append(change)
            first += 5

    for number in range(3):
        threading.Thread(target=work, args=(number,), daemon=True).start()
    while True:
        with lock:
            done = list(waiting)
        if store.flush(30.0):
            journal.write([block for block, gone in done if not gone], [block for block, gone in done if gone])
            with lock:
                del waiting[: len(done)]


if __name__ == "__main__":
    mode, folder, journal_path, options_json, *rest = sys.argv[1:]
    if mode == "point":
        die_at_a_point(folder, Journal(journal_path), json.loads(options_json), rest[0], int(rest[1]))
    else:
        write_from_threads(folder, Journal(journal_path), json.loads(options_json), int(rest[0]))
