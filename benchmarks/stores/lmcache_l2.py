"""LMCache's L2 adapters as its server drives them: tasks of several keys, whose ends an eventfd tells."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import select
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.platform import consume_fd

from .base import Store, requests

WAIT_MS = 60_000
PAGE_BYTES = 4096
WORKERS = 16
META_BYTES = 16 << 20


class LmcacheL2(Store):
    """An adapter over the arena, which is what LMCache calls L1."""

    def config(self) -> dict[str, Any]:
        raise NotImplementedError

    def open(self) -> None:
        arena = self.task.arena
        arguments = argparse.Namespace(l2_adapter=[json.dumps(self.config())])
        memory = L1MemoryDesc(ptr=arena.ctypes.data, size=arena.size, align_bytes=PAGE_BYTES)
        self.adapter = create_l2_adapter(parse_args_to_l2_adapters_config(arguments).adapters[0], l1_memory_desc=memory)

    def put(self, keys: Sequence[bytes], rows: Sequence[int]) -> None:
        tasks = [self.adapter.submit_store_task(names_of(some), self._objects(places)) for some, places in requests(keys, rows)]
        results: dict[int, Any] = {}
        while len(results) < len(tasks):
            wait_for(self.adapter.get_store_event_fd())
            results |= self.adapter.pop_completed_store_tasks()
        if not all(result.is_successful() for result in results.values()):
            raise RuntimeError("LMCache could not store a batch")

    def get(self, keys: Sequence[bytes], rows: Sequence[int]) -> list[bool]:
        self.contains(keys)  # loads are for keys that a lookup has locked
        portions = requests(keys, rows)
        tasks = [self.adapter.submit_load_task(names_of(some), self._objects(places)) for some, places in portions]
        answers = self._answers(tasks, self.adapter.get_load_event_fd(), self.adapter.query_load_result)
        self.adapter.submit_unlock(names_of(keys))
        return [answers[task].test(place) for task, (some, _) in zip(tasks, portions, strict=True) for place in range(len(some))]

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        task = self.adapter.submit_lookup_and_lock_task(names_of(keys), {})
        fd = self.adapter.get_lookup_and_lock_event_fd()
        found = self._answers([task], fd, self.adapter.query_lookup_and_lock_result)[task]
        return [found.test(place) for place in range(len(keys))]

    def close(self) -> None:
        self.adapter.close()

    def _answers(self, tasks: Sequence[int], fd: int, query: Callable[[int], Any]) -> dict[int, Any]:
        answers: dict[int, Any] = {}
        while len(answers) < len(tasks):
            wait_for(fd)
            for task in tasks:
                answer = None if task in answers else query(task)
                if answer is not None:
                    answers[task] = answer
        return answers

    def _objects(self, rows: Sequence[int]) -> list[TensorMemoryObj]:
        return [self._object(row) for row in rows]

    def _object(self, row: int) -> TensorMemoryObj:
        tensor = torch.from_numpy(self.task.arena[row]).view(torch.bfloat16)
        size_bytes = self.task.block_bytes
        metadata = MemoryObjMetadata(
            shape=tensor.shape, dtype=tensor.dtype, address=tensor.data_ptr(), phy_size=size_bytes, fmt=MemoryFormat.KV_2LTD, ref_count=1
        )
        return TensorMemoryObj(tensor.view(torch.uint8), metadata, parent_allocator=None)


class FsNative(LmcacheL2):
    version = f"lmcache {version('lmcache')}"
    settings = f"fs_native, O_DIRECT, {WORKERS} workers; does not sync: the harness does"

    def config(self) -> dict[str, Any]:
        return {"type": "fs_native", "base_path": os.fspath(self.task.folder), "use_odirect": True, "num_workers": WORKERS}


class RawBlock(LmcacheL2):
    """One file in place of a raw device; io_uring where the machine has it."""

    version = f"lmcache {version('lmcache')}"
    settings = "raw_block, O_DIRECT, io_uring; does not sync: the harness does; its index reaches the file every 60 s and at a close"
    engine = "io_uring"

    def open(self) -> None:
        if importlib.util.find_spec("lmcache_rust_raw_block_io") is None:
            raise RuntimeError("raw_block needs lmcache-rust-raw-block-io: make bench-setup")
        with open(self._device, "ab") as file:
            file.truncate(self._device_bytes)
        try:
            super().open()
        except (OSError, RuntimeError) as error:
            if self.engine == "posix":
                raise
            RawBlock.engine = "posix"
            RawBlock.settings = f"raw_block, O_DIRECT, posix because io_uring failed: {error}"
            super().open()

    @property
    def _device(self) -> str:
        return os.fspath(self.task.folder / "device")

    @property
    def _device_bytes(self) -> int:
        return META_BYTES + self.task.capacity_bytes

    def config(self) -> dict[str, Any]:
        slot_bytes = self.task.block_bytes + PAGE_BYTES
        size = {"slot_bytes": slot_bytes, "meta_total_bytes": META_BYTES, "capacity_bytes": self._device_bytes}
        return {"type": "raw_block", "device_path": self._device, "io_engine": self.engine, **size}


def names_of(keys: Sequence[bytes]) -> list[ObjectKey]:
    return [ObjectKey(chunk_hash=key, model_name="bench", kv_rank=0) for key in keys]


def wait_for(fd: int) -> None:
    """Until the adapter tells of something. Raises ``TimeoutError``."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(WAIT_MS):
        raise TimeoutError(f"LMCache told nothing for {WAIT_MS / 1000:.0f} s")
    try:
        consume_fd(fd)
    except BlockingIOError:
        pass
