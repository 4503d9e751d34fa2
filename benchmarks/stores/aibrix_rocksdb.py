"""AIBrix's RocksDB connector with its own settings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
from aibrix_kvcache.l2.connectors.rocksdb import RocksDBConnector

from .base import BlockAtATime, Task


class Region:
    """As much of AIBrix's ``MemoryRegion`` as the connector uses."""

    def __init__(self, task: Task, row: int) -> None:
        self._memory = task.arena[row]

    def tobytes(self) -> bytes:
        return self._memory.tobytes()

    def fill(self, value: bytes) -> None:
        np.copyto(self._memory, np.frombuffer(value, np.uint8))


class AibrixRocksdb(BlockAtATime):
    version = f"aibrix-kvcache {version('aibrix-kvcache')}"
    settings = "defaults, WAL; does not sync: the harness does"

    def open_store(self) -> None:
        os.environ["AIBRIX_KV_CACHE_OL_ROCKSDB_ROOT"] = os.fspath(self.task.folder)
        self.connector = RocksDBConnector.from_envs("bench", None)  # type: ignore[arg-type]
        check(self.connector.open())

    def put_one(self, key: bytes, row: int) -> None:
        check(self.connector._put(key, Region(self.task, row)))

    def get_one(self, key: bytes, row: int) -> bool:
        return bool(self.connector._get(key, Region(self.task, row)).is_ok())

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [bool(self.connector._exists(key).is_ok()) for key in keys]

    def close(self) -> None:
        super().close()
        check(self.connector.close())


def check(status: object) -> None:
    if not status.is_ok():  # type: ignore[attr-defined]
        raise RuntimeError(f"AIBrix: {status}")
