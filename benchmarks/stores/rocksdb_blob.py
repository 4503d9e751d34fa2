"""RocksDB with blob files through rocksdict. Without a log: after the flush that ends a write, every byte was written once, not twice."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
import rocksdict

from .base import BlockAtATime

MIB = 1 << 20


class RocksdbBlob(BlockAtATime):
    version = f"rocksdict {version('rocksdict')}"
    settings = "blob files, no WAL but a flush, no compression, buffered; the harness syncs as well"

    def open_store(self) -> None:
        options = rocksdict.Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_enable_blob_files(True)
        options.set_min_blob_size(4096)
        options.set_blob_file_size(256 * MIB)
        options.set_write_buffer_size(64 * MIB)
        options.set_max_write_buffer_number(4)
        options.set_max_background_jobs(4)
        self.store = rocksdict.Rdict(os.fspath(self.task.folder / "db"), options)
        writes = rocksdict.WriteOptions()
        writes.disable_wal = True
        self.store.set_write_options(writes)

    def put_one(self, key: bytes, row: int) -> None:
        self.store.put(key, self.task.arena[row].tobytes())

    def sync(self) -> None:
        self.store.flush()
        super().sync()

    def get_one(self, key: bytes, row: int) -> bool:
        value = self.store.get(key)
        if value is None:
            return False
        np.copyto(self.task.arena[row], np.frombuffer(value, np.uint8))
        return True

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [key in self.store for key in keys]

    def close(self) -> None:
        super().close()
        self.store.close()
