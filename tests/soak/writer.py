"""The soak's writing process: random work on one store until it is told to stop, or killed. ``FOLDER JOURNAL SEED CAPACITY``

Prints a JSON line of its resources every few seconds. Any wrong answer ends it with a traceback.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

import kvlode
from kvlode import PutState, Status

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from history import History

from model import block_bytes, descriptor, version_of

SIZES = (64 << 10, 300_001, 1 << 20, 2 << 20)
KEY_COUNT = 1500
REPORT_S = 2.0


class Worker:
    """Random operations, each checked against the history."""

    def __init__(self, store: kvlode.DiskStore, history: History, seed: int) -> None:
        self.store, self.history = store, history
        self.space = store.namespace(descriptor("soak"))
        self.chance = random.Random(seed)
        self.keys = [b"key %04d" % i for i in range(KEY_COUNT)]
        self.operations = self.hits = self.flushes = 0

    def learn(self) -> None:
        """Read everything there is after opening; each block must be one that can be."""
        for key in self.keys:
            version = self.read(key)
            self.history.learnt(key, version)

    def read(self, key: bytes) -> int | None:
        info = self.space.info([key])[0]
        if info is None:
            return None
        out = np.zeros(info.raw_bytes, np.uint8)
        status = self.space.get_into(key, out)
        assert status in (Status.HIT, Status.MISS, Status.EXPIRED), f"key {key!r}: {status.name}"
        return version_of(key, out) if status is Status.HIT else None

    def step(self) -> None:
        work = self.chance.choices((self.put, self.get, self.match, self.delete, self.pin, self.flush), (40, 30, 10, 6, 4, 2))[0]
        work()
        self.operations += 1

    def put(self) -> None:
        key = self.chance.choice(self.keys)
        ttl_s = 3.0 if self.chance.random() < 0.1 else None
        version = self.history.putting(key, ttl_s)
        size = SIZES[version % len(SIZES)]
        status = self.space.put(key, block_bytes(key, version, size), ttl=ttl_s)
        if status.state is PutState.EXISTS:
            assert self.history.block(key).current is not None, f"key {key!r} was gone, the put says that it exists"
        elif status:
            self.history.put(key, version)

    def get(self) -> None:
        key = self.chance.choice(self.keys)
        version = self.read(key)
        if version is not None:
            self.history.check_hit(key, version)
            self.hits += 1

    def match(self) -> None:
        start = self.chance.randrange(KEY_COUNT - 64)
        run = self.space.match_prefix(self.keys[start : start + 64])
        assert all(self.history.block(key).current is not None for key in self.keys[start : start + run]), "a gone block matched"

    def delete(self) -> None:
        key = self.chance.choice(self.keys)
        self.history.deleting(key)
        self.history.deleted(key, self.space.delete([key]) == 1)
        assert self.space.contains([key]) == [False]

    def pin(self) -> None:
        chosen = self.chance.sample(self.keys, 4)
        with self.space.pin(chosen):
            self.space.touch(chosen)
            self.get()

    def flush(self) -> None:
        if self.store.flush(60.0):
            self.history.flushed()
            self.flushes += 1


def resources() -> dict[str, int]:
    """Anonymous memory and open descriptors of this process."""
    status = Path("/proc/self/status").read_text()
    anon_kib = int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])
    return {"anon_bytes": anon_kib << 10, "descriptors": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}


def main(folder: str, journal: str, seed: int, capacity: str) -> None:
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    history = History(Path(journal))
    with kvlode.open(folder, capacity=capacity, buffer="32MiB", put_timeout_s=10.0, reclaim_grace_s=0.5) as store:
        worker = Worker(store, history, seed)
        worker.learn()
        next_report_s = time.monotonic()
        while not stopping.is_set():
            worker.step()
            if time.monotonic() >= next_report_s:
                next_report_s = time.monotonic() + REPORT_S
                counted = store.stats()["counters"]
                counters = {name: counted.get(name, 0) for name in ("segments_freed", "reinserted_blocks", "evicted_blocks")}
                counts = {"operations": worker.operations, "hits": worker.hits, "flushes": worker.flushes}
                print(json.dumps(resources() | counters | counts), flush=True)
        if store.flush(60.0):
            history.flushed()
    history.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
