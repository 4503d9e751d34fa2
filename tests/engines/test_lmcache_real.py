"""The LMCache adapters under LMCache 0.5.6 itself: its plug-in loaders, its own check, and the storage managers of its two modes.

Runs in the environment of ``make .engines/lmcache/.installed``.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapter_conformance import PREFIX, WAIT_S, AdapterConformance
from lmcache_rig import BLOCK_BYTES, CHUNK_TOKENS, SHAPE, BackendCalls, L2Engine, content, kv_rank

pytest.importorskip("lmcache.lmcache_native", reason="needs LMCache: make .engines/lmcache/.installed")

pytestmark = pytest.mark.engines

LOAD_S = 2.0
"""Longer than the suite's deadline: LMCache's threads run beside the drive's, on whatever machine this is."""
STARTUP_S = 90.0


@pytest.fixture(autouse=True)
def _report_no_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_TRACK_USAGE", "false")


def spec(options: dict[str, Any], **more: Any) -> str:
    plugin = {"type": "plugin", "module_path": "kvlode.adapters.lmcache_l2", "class_name": "KvlodeL2", "adapter_params": options}
    return json.dumps(plugin | more)


# --- the multiprocess server's adapter ----------------------------------------------------------------------------------------


def tensor_object(data: np.ndarray | None, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> Any:
    from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

    size = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True))
    raw = torch.full((-(-size // 4096) * 4096,), 0xA5, dtype=torch.uint8)
    if data is not None:
        raw[:size] = torch.from_numpy(data.copy())
    meta = MemoryObjMetadata(
        shape=torch.Size(shapes[0]),
        dtype=dtypes[0],
        address=raw.data_ptr(),
        phy_size=raw.numel(),
        ref_count=1,
        fmt=MemoryFormat.KV_2LTD,
        shapes=[torch.Size(shape) for shape in shapes],
        dtypes=list(dtypes),
    )
    return TensorMemoryObj(raw, meta, parent_allocator=None)


def start_l2(options: dict[str, Any], **identity: Any) -> L2Engine:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.distributed.internal_api import L1MemoryDesc
    from lmcache.v1.distributed.l2_adapters import create_l2_adapter
    from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config

    given = argparse.Namespace(l2_adapter=[spec(options | {"load_timeout_s": LOAD_S})])
    config = parse_args_to_l2_adapters_config(given).adapters[0]
    adapter = create_l2_adapter(config, l1_memory_desc=L1MemoryDesc(ptr=0, size=0, align_bytes=4096))
    return L2Engine(adapter, key_type=ObjectKey, object_of=tensor_object, layout_of=MemoryLayoutDesc, **identity)


class TestL2(AdapterConformance):
    takes_sets = True

    def start(self, options: dict[str, Any], **identity: Any) -> L2Engine:
        return start_l2(options, **identity)

    def content(self, block: int) -> np.ndarray:
        return content(block)


def test_the_adapter_is_one_of_lmcaches_and_its_account_is_kept(options: dict[str, Any]) -> None:
    from lmcache.lmcache_native import Bitmap
    from lmcache.v1.distributed.internal_api import L2AdapterListener, L2StoreResult
    from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface

    engine = start_l2(options)
    adapter = engine.adapter
    assert isinstance(adapter, L2AdapterInterface) and not adapter.supports_global_eviction
    told: list[str] = []

    class Listener(L2AdapterListener):
        def on_l2_keys_stored(self, keys: Any, sizes: Any) -> None:
            told.append(f"stored {len(keys)} {sum(sizes)}")

        def on_l2_keys_accessed(self, keys: Any) -> None:
            told.append(f"accessed {len(keys)}")

        def on_l2_keys_deleted(self, keys: Any) -> None:
            told.append(f"deleted {len(keys)}")

    adapter.register_listener(Listener())
    adapter.set_backend_identity("plugin")
    keys = [engine.key(block, cache_salt="user") for block in PREFIX]
    result = engine.store_objects(keys, [engine.object(content(block)) for block in PREFIX])
    assert isinstance(result, L2StoreResult) and result.bytes_transferred() == len(PREFIX) * BLOCK_BYTES
    task = adapter.submit_lookup_and_lock_task(keys, engine.layouts)
    found = engine.wait(adapter.get_lookup_and_lock_event_fd(), lambda: adapter.query_lookup_and_lock_result(task))
    assert isinstance(found, Bitmap) and found.popcount() == len(PREFIX)
    adapter.submit_unlock(keys)
    assert dict(adapter.get_usage().bytes_by_cache_salt) == {"user": len(PREFIX) * BLOCK_BYTES}
    page = adapter.list_l2_keys(page_size=3)
    assert [entry.key.to_object_key() for entry in page.entries] == keys[:3] and page.next_page_token
    adapter.delete(keys[:2])
    deadline_s = time.monotonic() + WAIT_S
    while "deleted 2" not in told and time.monotonic() < deadline_s:
        engine.look_up(keys[:1])
    assert told[0] == f"stored {len(PREFIX)} {len(PREFIX) * BLOCK_BYTES}" and "accessed 8" in told and "deleted 2" in told
    assert adapter.report_status()["is_healthy"]
    engine.stop()


def test_lmcaches_own_check_of_l2_adapters_passes(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from lmcache.v1.check.check_mode_test_l2_adapter import run_test_mode

    asyncio.run(run_test_mode("model", l2_adapter=[spec(options)], num_keys=8, obj_size=65536, kv_dtype="bfloat16"))
    told = capsys.readouterr().out
    for line in ("8/8 correctly absent", "Batch store OK", "8/8 found", "(loaded): 8/8", "(content): 8/8"):
        assert line in told, told


class Server:
    """The storage side of ``lmcache server``: its L1, and its store and prefetch controllers over our adapter."""

    def __init__(self, options: dict[str, Any], **more: Any) -> None:
        from lmcache.v1.distributed.config import parse_args
        from lmcache.v1.distributed.storage_manager import StorageManager

        arguments = ["--l1-size-gb", "0.125", "--eviction-policy", "LRU", "--l2-adapter", spec(options, **more)]
        self.manager = StorageManager(parse_args(arguments))

    def write(self, keys: Sequence[Any], blocks: Sequence[int], layout: Any) -> None:
        reserved = self.manager.reserve_write(list(keys), layout)
        assert len(reserved) == len(keys)
        for key, block in zip(keys, blocks, strict=True):
            np.frombuffer(reserved[key].byte_array, np.uint8)[:] = content(block)
        self.manager.finish_write(list(keys))

    def wait_for_stored(self, count: int) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            _, adapter = self.manager.l2_adapters()[0]
            if len(adapter.list_l2_keys(page_size=10_000).entries) >= count:
                return
            threading.Event().wait(0.01)
        raise AssertionError("the controllers do not store")

    def prefetch(self, keys: Sequence[Any], layout: Any) -> tuple[int, list[np.ndarray]]:
        """How many keys came from L2, and the bytes of the run from the front."""
        from lmcache.v1.distributed.api import GroupedObjectKeys, PrefetchTaskSpec

        group = GroupedObjectKeys(keys=list(keys), object_group_id=0, layout_desc=layout)
        handle = self.manager.submit_prefetch_task(PrefetchTaskSpec(key_groups=[group]))
        assert self.manager.wait_prefetch_status(handle, WAIT_S), "the prefetch does not end"
        result = self.manager.query_prefetch_status(handle)
        count = result.hit_cells[0].popcount()
        if not count:
            return 0, []
        with self.manager.read_prefetched_results(list(keys[:count])) as objects:
            data = [np.frombuffer(thing.byte_array, np.uint8).copy() for thing in objects]
        self.manager.finish_read_prefetched(list(keys[:count]))
        return result.l2_hit_count, data

    def close(self) -> None:
        self.manager.close()


def server_keys(count: int) -> tuple[list[Any], Any]:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey

    keys = [ObjectKey(chunk_hash=block.to_bytes(32, "big"), model_name="model", kv_rank=kv_rank(0, 1)) for block in range(count)]
    return keys, MemoryLayoutDesc(shapes=[torch.Size(SHAPE)], dtypes=[torch.bfloat16])


def test_lmcaches_server_finds_after_a_restart_what_it_stored(options: dict[str, Any]) -> None:
    keys, layout = server_keys(32)
    server = Server(options)
    assert server.prefetch(keys, layout) == (0, [])
    server.write(keys[:24], range(24), layout)
    server.wait_for_stored(24)
    server.close()
    server = Server(options)
    count, data = server.prefetch(keys, layout)
    assert count == 24
    for block, found in enumerate(data):
        assert np.array_equal(found, content(block)), block
    assert server.manager.l2_adapters()[0][1].report_status()["locked_key_count"] == 0, "locks were not given back"
    server.close()


def get(port: int, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5.0) as answer:
        return json.load(answer)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_lmcaches_server_starts_with_the_adapter_and_ends_cleanly(options: dict[str, Any], tmp_path: Path) -> None:
    port = free_port()
    command = [os.fspath(Path(sys.executable).parent / "lmcache"), "server", "--l1-size-gb", "0.125", "--eviction-policy", "LRU"]
    command += ["--port", str(free_port()), "--http-port", str(port), "--l2-adapter", spec(options)]
    log = tmp_path / "log"
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline_s = time.monotonic() + STARTUP_S
        status: Any = None
        while status is None and time.monotonic() < deadline_s and server.poll() is None:
            try:
                status = get(port, "/status")
            except OSError:
                threading.Event().wait(0.2)
        assert status is not None, log.read_text()[-4000:]
        told = json.dumps(status)
        assert '"type": "KvlodeL2"' in told and '"role": "writer"' in told, told
        assert get(port, "/healthcheck")
        server.send_signal(signal.SIGINT)
        assert server.wait(WAIT_S) is not None
    finally:
        server.kill()
        server.wait(WAIT_S)
    engine = start_l2(options)
    assert engine.adapter.report_status()["role"] == "writer", "the server has not let go of the store"
    engine.stop()


def test_lmcaches_server_computes_what_is_damaged(options: dict[str, Any]) -> None:
    from kvlode.tools.damage import damage_payloads

    keys, layout = server_keys(8)
    server = Server(options)
    server.write(keys, range(8), layout)
    server.wait_for_stored(8)
    server.close()
    assert damage_payloads(Path(options["path"]))
    server = Server(options)
    assert server.prefetch(keys, layout)[0] == 0
    server.write(keys, range(8), layout)
    server.wait_for_stored(8)
    server.close()
    server = Server(options)
    assert server.prefetch(keys, layout)[0] == 8
    server.close()


def test_lmcaches_serde_over_the_adapter(options: dict[str, Any]) -> None:
    keys, layout = server_keys(4)
    settings = options | {"serialized": True, "serialized_bytes_max": 1 << 20}
    numbers = torch.linspace(-2, 2, BLOCK_BYTES // 2).to(torch.bfloat16)
    server = Server(settings, serde={"type": "fp8"})
    reserved = server.manager.reserve_write(keys, layout)
    for key in keys:
        reserved[key].tensor.copy_(numbers.view(SHAPE))
    server.manager.finish_write(keys)
    server.wait_for_stored(4)
    server.close()
    server = Server(settings, serde={"type": "fp8"})
    count, data = server.prefetch(keys, layout)
    assert count == 4
    for found in data:
        assert torch.allclose(torch.from_numpy(found).view(torch.bfloat16).float(), numbers.float(), atol=0.2)
    server.close()


# --- the plug-in inside the engine's process ----------------------------------------------------------------------------------


class Loop:
    """An event loop on a thread, as LMCache's engine has one."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_S)


class BackendEngine(BackendCalls):
    """The plug-in as LMCache's launcher makes it, over a real ``LocalCPUBackend``."""

    def __init__(self, options: dict[str, Any], *, model: str = "model", dtype: str = "bfloat16", rank: int = 0, world: int = 1) -> None:
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend import LocalCPUBackend, storage_plugin_launcher

        self.dtype = getattr(torch, dtype)
        extra = {
            "storage_plugin.kvlode.module_path": "kvlode.adapters.lmcache_plugin",
            "storage_plugin.kvlode.class_name": "KvlodeBackend",
            "kvlode": options | {"load_timeout_s": LOAD_S},
        }
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=CHUNK_TOKENS, local_cpu=False, max_local_cpu_size=0.125, storage_plugins=["kvlode"], extra_config=extra
        )
        metadata = LMCacheMetadata(
            model_name=model,
            world_size=world,
            local_world_size=world,
            worker_id=rank,
            local_worker_id=rank,
            kv_dtype=self.dtype,
            kv_shape=(SHAPE[1], SHAPE[0], CHUNK_TOKENS, 8, SHAPE[3] // 8),
            role="worker",
            chunk_size=CHUNK_TOKENS,
        )
        self.loop = Loop()
        self.metadata = metadata
        self.allocator = LocalCPUBackend(config, metadata=metadata, dst_device="cpu")
        backends: OrderedDict[str, Any] = OrderedDict()
        storage_plugin_launcher(config, metadata, self.loop.loop, self.allocator, "cpu", backends)
        self.backend = backends["kvlode"]
        self.key = lambda block: CacheEngineKey(model, world, rank, block, self.dtype)

    def object(self, data: np.ndarray, tokens: int = CHUNK_TOKENS) -> Any:
        made = self.allocator.allocate(self.metadata.get_shapes(tokens), self.metadata.get_dtypes(), busy_loop=False)
        assert made is not None, "LMCache's memory leaks"
        np.frombuffer(made.byte_array, np.uint8)[:] = data
        return made

    def store(self, prefix: Sequence[int]) -> None:
        self.put([self.key(block) for block in prefix], [self.object(content(block)) for block in prefix])

    def stop(self) -> None:
        self.backend.close()
        self.loop.stop()


class TestBackend(AdapterConformance):
    refusal = KeyError  # LMCache's launcher logs the error and starts without the plug-in

    def start(self, options: dict[str, Any], **identity: Any) -> BackendEngine:
        return BackendEngine(options, **identity)

    def content(self, block: int) -> np.ndarray:
        return content(block)


@pytest.fixture
def engine(options: dict[str, Any]) -> Iterator[BackendEngine]:
    made = BackendEngine(options)
    yield made
    made.stop()


def test_the_plugin_is_one_of_lmcaches_and_leaks_no_memory(engine: BackendEngine) -> None:
    from lmcache.v1.storage_backend.abstract_backend import StoragePluginInterface

    assert isinstance(engine.backend, StoragePluginInterface)
    assert engine.backend.get_allocator_backend() is engine.allocator
    for start in range(0, 1024, 32):  # four times what the allocator has
        engine.store(range(start, start + 32))
        for block, data in zip(range(start, start + 32), engine.load(range(start, start + 32)), strict=True):
            assert data is not None and np.array_equal(data, content(block))


def test_the_last_chunk_of_a_prompt_comes_back_in_its_own_shape(engine: BackendEngine) -> None:
    size = BLOCK_BYTES // CHUNK_TOKENS * 5
    engine.put([engine.key(1)], [engine.object(content(1)[:size], 5)])
    found = engine.backend.get_blocking(engine.key(1))
    assert found.get_num_tokens() == 5 and np.array_equal(np.frombuffer(found.byte_array, np.uint8), content(1)[:size])
    found.ref_count_down()


def test_lmcaches_event_loop_finds_and_loads(engine: BackendEngine) -> None:
    engine.store(PREFIX[:5])
    keys = [engine.key(block) for block in PREFIX]

    async def run() -> list[Any]:
        count = await engine.backend.batched_async_contains("lookup", keys, pin=True)
        return await engine.backend.batched_get_non_blocking("lookup", keys[:count])

    found = asyncio.run_coroutine_threadsafe(run(), engine.loop.loop).result(WAIT_S)
    assert len(found) == 5
    for block, thing in enumerate(found):
        assert np.array_equal(np.frombuffer(thing.byte_array, np.uint8), content(block))
        thing.ref_count_down()


def test_lmcaches_storage_manager_puts_and_gets_through_the_plugin(options: dict[str, Any]) -> None:
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.event_manager import EventManager
    from lmcache.v1.storage_backend.storage_manager import StorageManager

    for turn in itertools.count():
        part = BackendEngine(options | {"path": options["path"] + "-unused"})  # for its metadata and keys
        part.stop()
        extra = {
            "storage_plugin.kvlode.module_path": "kvlode.adapters.lmcache_plugin",
            "storage_plugin.kvlode.class_name": "KvlodeBackend",
            "kvlode": options,
        }
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=CHUNK_TOKENS, local_cpu=False, max_local_cpu_size=0.125, storage_plugins=["kvlode"], extra_config=extra
        )
        manager = StorageManager(config=config, metadata=part.metadata, event_manager=EventManager())
        keys = [part.key(block) for block in PREFIX]
        hits, mapping = manager.batched_contains(keys, pin=True)
        if turn == 1:
            assert hits == len(PREFIX) and list(mapping) == ["kvlode"]
            for block, thing in zip(PREFIX, manager.batched_get(keys, location="kvlode"), strict=True):
                assert np.array_equal(np.frombuffer(thing.byte_array, np.uint8), content(block))
                thing.ref_count_down()
            manager.batched_unpin(keys, ["kvlode"])
            assert manager.batched_remove(keys, ["kvlode"]) == len(PREFIX)
            manager.close()
            return
        assert hits == 0
        objects = [manager.allocate(part.metadata.get_shapes(), part.metadata.get_dtypes()) for _ in PREFIX]
        for block, thing in zip(PREFIX, objects, strict=True):
            np.frombuffer(thing.byte_array, np.uint8)[:] = content(block)
        manager.batched_put(keys, objects)
        manager.close()
