"""One safetensors file a block, as vLLM's example connector and many scripts do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .base import FILE_THREADS, BlockAtATime


class SafetensorsFiles(BlockAtATime):
    version = f"safetensors {version('safetensors')}"
    settings = f"a file a block, {FILE_THREADS} threads, buffered; does not sync: the harness does"

    def open_store(self) -> None:
        self.task.folder.mkdir(exist_ok=True)

    def _path(self, key: bytes) -> Path:
        return self.task.folder / f"{key.hex()}.safetensors"

    def put_one(self, key: bytes, row: int) -> None:
        unfinished = self._path(key).with_suffix(".tmp")
        save_file({"kv": self.task.arena[row]}, unfinished)
        os.replace(unfinished, self._path(key))

    def get_one(self, key: bytes, row: int) -> bool:
        try:
            with safe_open(self._path(key), framework="numpy") as file:
                np.copyto(self.task.arena[row], file.get_tensor("kv"))
        except (FileNotFoundError, SafetensorError):
            return False
        return True

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [self._path(key).exists() for key in keys]
