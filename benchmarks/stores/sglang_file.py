"""SGLang's ``HiCacheFile``: the real class. Its package modules import the whole engine, so empty ones stand in for them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from .base import Store

PACKAGES = ("sglang", "sglang.srt", "sglang.srt.mem_cache")
CONFIG = {
    "tp_rank": 0,
    "tp_size": 1,
    "pp_rank": 0,
    "pp_size": 1,
    "attn_cp_rank": 0,
    "attn_cp_size": 1,
    "is_mla_model": False,
    "enable_storage_metrics": False,
    "is_page_first_layout": True,
    "model_name": "bench",
}


def storage_module() -> types.ModuleType:
    """SGLang's module of the storage interface. Raises ``ImportError`` where SGLang is not installed."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("No module named 'sglang'")
    root = Path(spec.submodule_search_locations[0])
    for name in PACKAGES:
        package = types.ModuleType(name)
        package.__path__ = [os.fspath(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    return importlib.import_module("sglang.srt.mem_cache.hicache_storage")


STORAGE = storage_module()


class SglangFile(Store):
    version = f"sglang {version('sglang')}"
    settings = "HiCacheFile, buffered, one page at a time; does not sync: the harness does"

    def open(self) -> None:
        self.backend = STORAGE.HiCacheFile(STORAGE.HiCacheStorageConfig(**CONFIG), os.fspath(self.task.folder / "hicache"))

    def put(self, keys: Sequence[bytes], rows: Sequence[int]) -> None:
        if not self.backend.batch_set([key.hex() for key in keys], self._tensors(rows)):
            raise RuntimeError("HiCacheFile could not store a page")

    def get(self, keys: Sequence[bytes], rows: Sequence[int]) -> list[bool]:
        found = []
        for key, tensor in zip(keys, self._tensors(rows), strict=True):
            try:
                found.append(self.backend.get(key.hex(), tensor) is not None)
            except OSError:  # a file that is too short
                found.append(False)
        return found

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [self.backend.exists(key.hex()) for key in keys]

    def close(self) -> None:
        pass

    def _tensors(self, rows: Sequence[int]) -> list[torch.Tensor]:
        return [torch.from_numpy(self.task.arena[row]) for row in rows]
