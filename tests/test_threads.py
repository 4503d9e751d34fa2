"""Many threads on one small store: whatever the interleaving, a hit has the right bytes and a close ends."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy as np

import kvlode
from kvlode import Status, StoreClosed
from model import block_bytes, descriptor, version_of

KEYS = [b"key %d" % i for i in range(60)]
SIZE = 64 << 10
ROUNDS = 600
"""Rounds of each thread; the store is closed under those that are left."""


class Hammer:
    """Threads with random work on one store; the first error of each is kept."""

    def __init__(self, store: kvlode.DiskStore, seed: int) -> None:
        self.store = store
        self.space = store.namespace(descriptor(block_bytes_max=SIZE))
        self.errors: list[BaseException] = []
        self.hits = 0
        self.closed = threading.Event()
        work = (self.put, self.put, self.get, self.get, self.get_many, self.delete, self.flush)
        self.threads = [threading.Thread(target=self._run, args=(function, seed + i)) for i, function in enumerate(work)]

    def _run(self, work: object, seed: int) -> None:
        chance = random.Random(seed)
        assert callable(work)
        try:
            for _ in range(ROUNDS):
                work(chance)
        except StoreClosed:
            if not self.closed.is_set():
                self.errors.append(AssertionError("closed before it was closed"))
        except BaseException as error:
            self.errors.append(error)

    def put(self, chance: random.Random) -> None:
        key = chance.choice(KEYS)
        self.space.put(key, block_bytes(key, chance.randrange(1 << 30), SIZE))

    def get(self, chance: random.Random) -> None:
        self._check(chance.choice(KEYS))

    def _check(self, key: bytes) -> None:
        out = np.zeros(SIZE, np.uint8)
        if self.space.get_into(key, out) is Status.HIT:
            version_of(key, out)
            self.hits += 1

    def get_many(self, chance: random.Random) -> None:
        chosen = chance.sample(KEYS, 5)
        outs = [np.zeros(SIZE, np.uint8) for _ in chosen]
        for key, out, status in zip(chosen, outs, self.space.get_many_into(chosen, outs), strict=True):
            if status is Status.HIT:
                version_of(key, out)

    def delete(self, chance: random.Random) -> None:
        self.space.delete(chance.sample(KEYS, 2))

    def flush(self, _: random.Random) -> None:
        self.store.flush(10.0)


def test_threads_never_see_a_wrong_byte_and_close_ends_under_load(tmp_path: Path) -> None:
    seed = 5
    print(f"seed {seed}")
    store = kvlode.open(tmp_path / "store", capacity="64MiB", buffer="4MiB", put_timeout_s=1.0)
    hammer = Hammer(store, seed)
    for thread in hammer.threads:
        thread.start()
    hammer.threads[2].join(60.0)
    hammer.closed.set()
    assert store.close(30.0)
    for thread in hammer.threads:
        thread.join(30.0)
        assert not thread.is_alive(), "a thread hangs after close"
    assert hammer.errors == []
    assert hammer.hits > 0
    with kvlode.open(tmp_path / "store", capacity="64MiB", buffer="4MiB") as again:
        hammer.space = again.namespace(descriptor(block_bytes_max=SIZE))
        for key in KEYS:
            hammer._check(key)
