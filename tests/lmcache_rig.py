"""How LMCache drives its adapters, for tests: with LMCache's real classes where they are installed, with stand-ins elsewhere."""

from __future__ import annotations

import functools
import select
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from adapter_conformance import WAIT_S
from kvlode.adapters import lmcache_l2, lmcache_plugin
from model import block_bytes

LOAD_S = 2.0
"""Longer than the shared suite's deadline, so that a busy machine is no slow drive."""
SHAPE = (2, 8, 16, 1024)
BLOCK_BYTES = 2 * 8 * 16 * 1024 * 2


@functools.lru_cache(512)
def content(block: int) -> np.ndarray:
    return block_bytes(b"%d" % block, block, BLOCK_BYTES)


def kv_rank(rank: int, world: int) -> int:
    return (world << 24) | (rank << 16) | (world << 8) | rank


# --- stand-ins, as far as the adapters look ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ObjectKey:
    chunk_hash: bytes
    model_name: str
    kv_rank: int
    object_group_id: int = 0
    cache_salt: str = ""

    def to_encoded_object_key(self) -> tuple[str, str, int, int, str]:
        return self.chunk_hash.hex(), self.model_name, self.kv_rank, self.object_group_id, self.cache_salt


class L2Base:
    """What ``L2AdapterInterface`` brings: the account of keys, for listeners."""

    def __init__(self, max_capacity_bytes: int = 0) -> None:
        self.max_capacity_bytes = max_capacity_bytes
        self.told: list[tuple[str, list[Any], list[int]]] = []

    def _notify_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
        self.told.append(("stored", keys, sizes))

    def _notify_keys_accessed(self, keys: list[Any]) -> None:
        self.told.append(("accessed", keys, []))

    def _notify_keys_deleted(self, keys: list[Any], sizes: list[int]) -> None:
        self.told.append(("deleted", keys, sizes))


class Bitmap:
    def __init__(self, size: int) -> None:
        self.bits = [False] * size

    def set(self, index: int) -> None:
        self.bits[index] = True

    def test(self, index: int) -> bool:
        return self.bits[index]


class StoreResult(int):
    def __new__(cls, good: bool, size_bytes: int) -> StoreResult:
        return super().__new__(cls, size_bytes if good else -1)

    def is_successful(self) -> bool:
        return self >= 0


@dataclass
class MemoryObject:
    """A ``TensorMemoryObj`` on memory that is longer than the object, as an allocator that aligns makes it."""

    memory: np.ndarray
    metadata: Any
    references: int = 1
    freed: list[Any] = field(default_factory=list)

    def get_size(self) -> int:
        shapes, dtypes = self.metadata.shapes, self.metadata.dtypes
        return int(sum(np.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)))

    @property
    def byte_array(self) -> memoryview:
        return memoryview(self.memory[: self.get_size()])  # type: ignore[arg-type]

    def ref_count_up(self) -> None:
        self.references += 1

    def get_ref_count(self) -> int:
        return self.references

    def ref_count_down(self) -> None:
        assert self.references > 0, "given back too often"
        self.references -= 1
        if not self.references:
            self.memory[:] = 0xEE  # whoever still reads or writes it is found out
            self.freed.append(self)


def memory_object(data: np.ndarray | None, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype], fmt: Any = None) -> MemoryObject:
    meta = SimpleNamespace(
        shape=torch.Size(shapes[0]), dtype=dtypes[0], shapes=[torch.Size(shape) for shape in shapes], dtypes=list(dtypes), fmt=fmt
    )
    made = MemoryObject(np.empty(0, np.uint8), meta)
    size = made.get_size()
    made.memory = np.full(-(-size // 4096) * 4096, 0xA5, np.uint8)
    if data is not None:
        made.memory[:size] = data
    return made


def standin() -> lmcache_l2.LmcacheInterface:
    return lmcache_l2.LmcacheInterface(L2Base, Bitmap, StoreResult, SimpleNamespace, SimpleNamespace)


# --- an L2 adapter as the server's controllers use it -----------------------------------------------------------------------


class L2Engine:
    """Drives one L2 adapter: stores as the store controller does, looks up, loads and unlocks as the prefetch controller does."""

    def __init__(
        self,
        adapter: Any,
        *,
        model: str = "model",
        dtype: str = "bfloat16",
        rank: int = 0,
        world: int = 1,
        key_type: Callable[..., Any] = ObjectKey,
        object_of: Callable[..., Any] = memory_object,
        layout_of: Callable[..., Any] = SimpleNamespace,
    ) -> None:
        self.adapter = adapter
        self.dtype = getattr(torch, dtype)
        self._object_of = object_of
        self.key = lambda block, **more: key_type(
            chunk_hash=block.to_bytes(32, "big"), model_name=model, kv_rank=kv_rank(rank, world), **more
        )
        self.layouts = {0: layout_of(shapes=[torch.Size(SHAPE)], dtypes=[self.dtype])}

    def object(self, data: np.ndarray | None = None) -> Any:
        return self._object_of(data, [SHAPE], [self.dtype])

    def wait(self, descriptor: int, ask: Callable[[], Any]) -> Any:
        """Poll like a controller: ask only when the descriptor says that something is over (or the adapter is closed)."""
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            if poller.poll(100):
                found = ask()
                if found is not None:
                    return found
        raise AssertionError("a task does not end")

    def store_objects(self, keys: Sequence[Any], objects: Sequence[Any]) -> Any:
        task = self.adapter.submit_store_task(list(keys), list(objects))
        return self.wait(self.adapter.get_store_event_fd(), lambda: self.adapter.pop_completed_store_tasks().get(task))

    def look_up(self, keys: Sequence[Any], layouts: Any = None) -> list[bool]:
        task = self.adapter.submit_lookup_and_lock_task(list(keys), self.layouts if layouts is None else layouts)
        found = self.wait(self.adapter.get_lookup_and_lock_event_fd(), lambda: self.adapter.query_lookup_and_lock_result(task))
        assert self.adapter.query_lookup_and_lock_result(task) is None, "told twice"
        return [found.test(position) for position in range(len(keys))]

    def load_objects(self, keys: Sequence[Any], objects: Sequence[Any]) -> list[bool]:
        task = self.adapter.submit_load_task(list(keys), list(objects))
        found = self.wait(self.adapter.get_load_event_fd(), lambda: self.adapter.query_load_result(task))
        assert self.adapter.query_load_result(task) is None, "told twice"
        return [found.test(position) for position in range(len(keys))]

    def store(self, prefix: Sequence[int]) -> None:
        self.store_objects([self.key(block) for block in prefix], [self.object(content(block)) for block in prefix])

    def flush(self) -> None:
        self.adapter._attached.flush(WAIT_S)

    def lookup(self, prefix: Sequence[int]) -> int:
        keys = [self.key(block) for block in prefix]
        found = self.look_up(keys)
        self.adapter.submit_unlock([key for key, here in zip(keys, found, strict=True) if here])
        return found.index(False) if False in found else len(found)

    def load(self, prefix: Sequence[int]) -> list[np.ndarray | None]:
        keys = [self.key(block) for block in prefix]
        objects = [self.object() for _ in prefix]
        self.look_up(keys)
        found = self.load_objects(keys, objects)
        self.adapter.submit_unlock(keys)
        return [np.frombuffer(thing.byte_array, np.uint8).copy() if here else None for thing, here in zip(objects, found, strict=True)]

    def stop(self) -> None:
        self.adapter.close()


# --- a storage plug-in as LMCache's storage manager uses it -------------------------------------------------------------------

CHUNK_TOKENS = 16


class PluginBase:
    """What ``StoragePluginInterface`` brings: its constructor."""

    def __init__(self, dst_device: str, config: Any, metadata: Any, local_cpu_backend: Any, loop: Any) -> None:
        self.dst_device, self.config, self.metadata, self.local_cpu_backend, self.loop = (
            dst_device,
            config,
            metadata,
            local_cpu_backend,
            loop,
        )


def plugin_standin() -> lmcache_plugin.LmcacheInterface:
    return lmcache_plugin.LmcacheInterface(PluginBase, {name: name for name in ("KV_2LTD", "KV_T2D", "KV_MLA_FMT")})


@dataclass(frozen=True)
class EngineKey:
    model_name: str
    world_size: int
    worker_id: int
    chunk_hash: int
    dtype: torch.dtype
    tags: tuple[tuple[str, str], ...] | None = None
    layer_id: int | None = None


class Metadata:
    """``LMCacheMetadata``: ``kv_shape`` is ``[layers, 2, tokens, heads, dim]``."""

    def __init__(self, dtype: torch.dtype, rank: int, world: int, *, mla: bool, role: str) -> None:
        self.chunk_size, self.use_mla, self.role = CHUNK_TOKENS, mla, role
        self.worker_id, self.world_size = rank, world
        self._dtype = dtype

    def get_shapes(self, tokens: int) -> list[torch.Size]:
        return [torch.Size([SHAPE[0], SHAPE[1], tokens, SHAPE[3]])]

    def get_dtypes(self) -> list[torch.dtype]:
        return [self._dtype]


class Allocator:
    """``LocalCPUBackend``, as far as it gives memory."""

    def __init__(self) -> None:
        self.made: list[MemoryObject] = []
        self.room = 1 << 30
        self.closed = False
        self.fail = False

    def allocate(self, shapes: Any, dtypes: Any, fmt: Any, *, busy_loop: bool) -> MemoryObject | None:
        assert not busy_loop, "it may wait for ever"
        if self.fail:
            raise RuntimeError("no memory")
        if self.in_use() >= self.room:
            return None
        self.made.append(memory_object(None, shapes, dtypes, fmt))
        return self.made[-1]

    def close(self) -> None:
        for thing in self.made:
            thing.memory[:] = 0xEE
        self.closed = True

    def in_use(self) -> int:
        return sum(thing.references > 0 for thing in self.made)


class BackendCalls:
    """What LMCache does with the plug-in ``backend``. ``key`` makes the key of a block."""

    backend: Any
    key: Callable[..., Any]

    def put(self, keys: Sequence[Any], objects: Sequence[Any]) -> None:
        futures = self.backend.batched_submit_put_task(keys, objects) or []
        for thing in objects:
            thing.ref_count_down()
        for future in futures:
            future.result(WAIT_S)

    def flush(self) -> None:
        self.backend._attached.flush(WAIT_S)

    def lookup(self, prefix: Sequence[int]) -> int:
        return int(self.backend.batched_contains([self.key(block) for block in prefix]))

    def load(self, prefix: Sequence[int]) -> list[np.ndarray | None]:
        found = self.backend.batched_get_blocking([self.key(block) for block in prefix])
        data = [None if thing is None else np.frombuffer(thing.byte_array, np.uint8).copy() for thing in found]
        for thing in found:
            if thing is not None:
                assert thing.get_ref_count() == 1
                thing.ref_count_down()
        return data


class BackendEngine(BackendCalls):
    """Drives one plug-in as ``StorageManager`` does: puts with its own references, lookups, blocking gets."""

    def __init__(
        self,
        backend_type: Any,
        options: dict[str, Any],
        *,
        model: str = "model",
        dtype: str = "bfloat16",
        rank: int = 0,
        world: int = 1,
        layerwise: bool = False,
        blending: bool = False,
        mla: bool = False,
        role: str = "worker",
    ) -> None:
        self.allocator = Allocator()
        self.dtype = getattr(torch, dtype)
        self._layerwise = layerwise
        config = SimpleNamespace(
            extra_config={"kvlode": options}, use_layerwise=layerwise, enable_blending=blending, pre_caching_hash_algorithm="builtin"
        )
        metadata = Metadata(self.dtype, rank, world, mla=mla, role=role)
        self.backend = backend_type(config=config, metadata=metadata, local_cpu_backend=self.allocator, loop=None, dst_device="cpu")
        self.key = lambda block, **more: EngineKey(model, world, rank, block, self.dtype, **more)
        self.block_bytes = BLOCK_BYTES // SHAPE[1] if layerwise else BLOCK_BYTES

    def object(self, data: np.ndarray, tokens: int = CHUNK_TOKENS) -> MemoryObject:
        shape = (tokens, 2, SHAPE[3]) if self._layerwise else (SHAPE[0], SHAPE[1], tokens, SHAPE[3])
        return memory_object(data, [shape], [self.dtype], "KV_T2D" if self._layerwise else "KV_2LTD")

    def store(self, prefix: Sequence[int]) -> None:
        objects = [self.object(content(block)) for block in prefix]
        self.put([self.key(block) for block in prefix], objects)
        deadline_s = time.monotonic() + WAIT_S
        while any(thing.get_ref_count() for thing in objects):
            assert time.monotonic() < deadline_s, "a reference is never given back"
            threading.Event().wait(0.001)

    def loads(self, block: int) -> bool:
        data = self.load([block])[0]
        return data is not None and np.array_equal(data, content(block))

    def stop(self) -> None:
        self.backend.close()
