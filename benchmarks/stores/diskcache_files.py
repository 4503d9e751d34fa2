"""diskcache: files for the values, SQLite for the rest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version

import diskcache
import numpy as np

from .base import FILE_THREADS, BlockAtATime


class DiskcacheFiles(BlockAtATime):
    version = f"diskcache {version('diskcache')}"
    settings = f"no eviction, {FILE_THREADS} threads, buffered; does not sync values: the harness does"

    def open_store(self) -> None:
        folder = os.fspath(self.task.folder / "cache")
        self.cache = diskcache.Cache(folder, size_limit=self.task.capacity_bytes * 2, eviction_policy="none")

    def put_one(self, key: bytes, row: int) -> None:
        if not self.cache.set(key, self.task.arena[row].tobytes()):
            raise RuntimeError("diskcache could not store a block")

    def get_one(self, key: bytes, row: int) -> bool:
        value = self.cache.get(key)
        if value is None or len(value) != self.task.block_bytes:
            return False
        np.copyto(self.task.arena[row], np.frombuffer(value, np.uint8))
        return True

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [key in self.cache for key in keys]

    def close(self) -> None:
        super().close()
        self.cache.close()
