"""The backend under SGLang 0.5.23 itself: its interface, configuration and factory, its failure switches, and code of its own.

SGLang's package modules import the whole engine, which needs a GPU; replaced by empty ones, its storage interface imports with
torch alone. What cannot be imported that way (host pools, the controller) takes part as single functions out of its source.
``make engines-sglang`` runs this.
"""

from __future__ import annotations
import __future__

import ast
import dataclasses
import hashlib
import importlib
import importlib.util
import logging
import os
import queue
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import test_sglang as stand_ins
from adapter_conformance import PREFIX, WAIT_S
from kvlode.adapters import sglang as adapter
from sglang_pool import DIM, MHA_LAYOUTS, MLA_LAYOUTS, TOKENS, HostPool, keys_of

_SPEC = importlib.util.find_spec("sglang")
ROOT = Path(_SPEC.submodule_search_locations[0]) if _SPEC is not None and _SPEC.submodule_search_locations else None
pytestmark = [pytest.mark.engines, pytest.mark.skipif(ROOT is None, reason="SGLang is not installed (make engines-sglang)")]

PACKAGES = ("sglang", "sglang.srt", "sglang.srt.mem_cache")
POOL_METHODS = ("get_page_buffer_meta", "get_data_page", "get_dummy_flat_data_page", "set_from_flat_data_page")
CONTROLLER_METHODS = (
    "_page_get_zero_copy", "_page_set_zero_copy", "_generic_page_get", "_generic_page_set", "_page_backup",
    "_page_transfer", "_page_transfer_kv_batch", "_storage_hit_query",
)  # fmt: skip
CONTROLLER = "srt/managers/cache_controller.py"


@pytest.fixture(autouse=True)
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """SGLang's module of the storage interface."""
    assert ROOT is not None
    for name in PACKAGES:
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [os.fspath(ROOT.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = package  # kept: the factory is imported once
    for switch in ("DELAY", "FAILURE"):
        monkeypatch.delenv(f"SGLANG_TEST_HICACHE_BACKEND_RANDOM_{switch}", raising=False)
    yield importlib.import_module("sglang.srt.mem_cache.hicache_storage")


def taken_from(path: str, owner: str | None, names: tuple[str, ...], scope: dict[str, Any]) -> dict[str, Any]:
    """Functions or classes of SGLang's source, compiled as they stand, with ``scope`` as their module."""
    assert ROOT is not None
    body: list[ast.stmt] = ast.parse((ROOT / path).read_text()).body
    if owner is not None:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == owner).body
    wanted = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names]
    assert {node.name for node in wanted} == set(names)
    code = compile(ast.Module(wanted, []), path, "exec", flags=__future__.annotations.compiler_flag)
    exec(code, scope)
    return {name: scope[name] for name in names}


class SglangPool(HostPool):
    """A host pool whose pages are described by SGLang's own code."""

    def __init__(self, layout: str = "page_first", **options: Any) -> None:
        super().__init__(layout, **options)
        self.logical_page_size, self.dcp_size, self.pin_memory = self.page_size, 1, False
        self.kv_cache_dim = self.head_dim
        self.size = self.logical_size = self.kv_buffer.nbytes // self.page_bytes * self.page_size
        file, owner = ("mla", "MLATokenToKVPoolHost") if self.mla else ("mha", "MHATokenToKVPoolHost")
        names = (*POOL_METHODS, "_storage_page_index") if self.mla else POOL_METHODS
        for name, function in taken_from(f"srt/mem_cache/pool_host/{file}.py", owner, names, {"torch": torch}).items():
            setattr(self, name, types.MethodType(function, self))


def backend_of(path: Path | str | list[str], pool: HostPool | None = None, *, config: dict[str, Any] | None = None, **extra: Any) -> Any:
    """A backend from SGLang's factory, registered as its controller does."""
    factory = importlib.import_module("sglang.srt.mem_cache.storage.backend_factory").StorageBackendFactory
    storage = importlib.import_module("sglang.srt.mem_cache.hicache_storage")
    where = path if isinstance(path, list) else os.fspath(path)
    names = {"backend_name": "kvlode", "module_path": "kvlode.adapters.sglang", "class_name": "KvlodeHiCache"}
    given = names | {"interface_v1": 1, "path": where} | stand_ins.SMALL | extra
    fields = dataclasses.asdict(stand_ins.StorageConfig(**(config or {}))) | {"extra_config": given}
    fields |= {"dcp_size": 1, "dcp_rank": 0}
    pool = pool or SglangPool()
    backend = factory.create_backend("dynamic", storage.HiCacheStorageConfig(**fields), pool)
    backend.register_mem_pool_host(pool)
    backend.register_mem_host_pool_v2(pool, storage.PoolName.KV)
    backend.on_host_pools_registered()
    return backend


class TestRealPages(stand_ins.TestPages):
    """The common suite over SGLang's factory and class, with pages that SGLang's code describes."""

    backend_of = staticmethod(backend_of)

    def start(self, options: dict[str, Any], **identity: Any) -> stand_ins.SglangEngine:
        engine = super().start(options, **identity)
        assert type(engine.backend).__name__ == "KvlodeHiCache"
        return engine


class TestRealFlatPages(stand_ins.TestFlatPages):
    """The same over the generic calls."""

    backend_of = staticmethod(backend_of)


def test_the_factory_makes_a_storage(tmp_path: Path, storage: Any) -> None:
    backend = backend_of(tmp_path)
    assert isinstance(backend, storage.HiCacheStorage) and isinstance(backend, adapter.KvlodeHiCache)
    abstract = storage.HiCacheStorage
    public = {name for name in vars(abstract) if not name.startswith("_")}
    assert all(getattr(type(backend), name) is not getattr(abstract, name) for name in public), "a method of the interface is not ours"
    backend.close()


def test_wrong_settings_are_seen_when_the_factory_is_asked(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="capacityy"):
        backend_of(tmp_path, capacityy="1GiB")


POOLS = [(layout, False) for layout in MHA_LAYOUTS] + [(layout, True) for layout in MLA_LAYOUTS]


@pytest.mark.parametrize(("layout", "mla"), POOLS, ids=[f"{'mla' if mla else 'mha'}-{layout}" for layout, mla in POOLS])
def test_the_stand_in_describes_pages_as_sglang_does(layout: str, mla: bool) -> None:
    """Which makes the tests of the default suite tests of SGLang's layouts."""
    own, real = HostPool(layout, mla=mla), SglangPool(layout, mla=mla)
    real.kv_buffer = own.kv_buffer
    own.kv_buffer.view(torch.int16).view(-1)[:] = torch.arange(own.kv_buffer.numel()).to(torch.int16)
    indices = own.indices([3, 0, 15])
    assert own.get_page_buffer_meta(indices) == tuple(real.get_page_buffer_meta(indices))
    for page in (0, 7):
        assert _bytes(own.get_data_page(page * TOKENS)) == _bytes(real.get_data_page(page * TOKENS))
    assert own.get_dummy_flat_data_page().shape == real.get_dummy_flat_data_page().shape
    flat = real.get_data_page(7 * TOKENS).clone()
    real.set_from_flat_data_page(2 * TOKENS, flat)
    assert _bytes(own.get_data_page(2 * TOKENS)) == _bytes(flat)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


# --- SGLang's controller ------------------------------------------------------------------------------------------------------


def page_hashes(tokens: list[int], last: str | None, page_size: int) -> list[str]:
    """SGLang's are made by a C++ extension; what matters here is that each covers the tokens before it."""
    hashes: list[str] = []
    for start in range(0, len(tokens), page_size):
        page = np.array(tokens[start : start + page_size], np.uint32).tobytes()
        last = hashlib.sha256(bytes.fromhex(last or "") + page).hexdigest()
        hashes.append(last)
    return hashes


def controller_of(storage: Any, backend: Any, pool: HostPool, *, interface_v1: bool) -> Any:
    """What SGLang's controller does with a backend, in its own words."""
    scope = {name: getattr(storage, name) for name in ("HiCacheStorageExtraInfo", "PoolName", "PoolTransfer", "STORAGE_BATCH_SIZE")}
    scope |= {"count_pool_hits": storage.count_pool_hits, "logger": logging.getLogger("sglang"), "torch": torch}
    scope |= {"get_storage_hash_str": page_hashes, "PrefetchAck": types.SimpleNamespace}
    methods = taken_from(CONTROLLER, "HiCacheController", CONTROLLER_METHODS, scope)
    controller = type("Controller", (), methods)()
    controller.storage_backend, controller.storage_host_pool, controller.page_size = backend, pool, pool.page_size
    controller.prefetch_sync_queue = queue.Queue()
    controller.page_get_func = controller._page_get_zero_copy if interface_v1 else controller._generic_page_get
    controller.page_set_func = controller._page_set_zero_copy if interface_v1 else controller._generic_page_set
    return controller


def operation_of(tokens: list[int], hashes: list[str], indices: torch.Tensor, *, prefix_keys: list[str] | None = None) -> Any:
    return types.SimpleNamespace(
        request_id="request", token_ids=tokens, last_hash=None, prefix_keys=prefix_keys, hash_value=hashes, host_indices=indices,
        completed_tokens=0, is_terminated=lambda: False,
    )  # fmt: skip


@pytest.mark.parametrize("interface_v1", [True, False], ids=["pages", "flat"])
@pytest.mark.parametrize("layout", MHA_LAYOUTS)
def test_the_controller_backs_up_and_prefetches(tmp_path: Path, storage: Any, layout: str, interface_v1: bool) -> None:
    count = 300
    tokens = list(range(count * 4))
    hashes = page_hashes(tokens, None, 4)
    pool = SglangPool(layout, tokens=4, pages=count)
    for page in range(count):
        pool.write(page, stand_ins.content(page, pool.page_bytes))
    backend = backend_of(tmp_path, pool, interface_v1=interface_v1)
    operation = operation_of(tokens, hashes, pool.indices(range(count)), prefix_keys=[])
    controller_of(storage, backend, pool, interface_v1=interface_v1)._page_backup(operation)
    assert operation.completed_tokens == len(tokens)
    backend.close()

    other = SglangPool(layout, tokens=4, pages=count)
    other.blank()
    backend = backend_of(tmp_path, other, interface_v1=interface_v1)
    controller = controller_of(storage, backend, other, interface_v1=interface_v1)
    longer = [*tokens, *range(9000, 9040)]
    found, found_tokens = controller._storage_hit_query(operation_of(longer, [], other.indices([0])))
    assert found == hashes and found_tokens == len(tokens)
    places = list(reversed(range(count)))
    assert controller._page_transfer(operation_of(tokens, hashes, other.indices(places))) == count
    for page, place in enumerate(places):
        assert np.array_equal(other.read(place), stand_ins.content(page, pool.page_bytes))
    backend.close()


def test_the_controller_uses_the_pages_before_one_that_is_missing(tmp_path: Path, storage: Any) -> None:
    pool = SglangPool(tokens=4)
    hashes = page_hashes(list(range(32)), None, 4)
    backend = backend_of(tmp_path, pool)
    backend.batch_set_v1(hashes[:5], pool.indices(range(5)))
    controller = controller_of(storage, backend, pool, interface_v1=True)
    assert controller._page_transfer(operation_of(list(range(32)), hashes, pool.indices(range(8)))) == 5
    backend.close()


# --- SGLang's switches --------------------------------------------------------------------------------------------------------


def test_random_delays_and_failures_cost_pages_and_no_bytes(tmp_path: Path, storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY", "0.005")
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE", "0.4")
    pool = SglangPool()
    backend = backend_of(tmp_path, pool)
    assert isinstance(backend, storage.HiCacheStorageFailureInjector)
    engine = stand_ins.SglangEngine(backend, pool)
    outcomes: set[tuple[int, int]] = set()
    stored = False
    for _ in range(60):
        for page, block in enumerate(PREFIX):
            pool.write(page, stand_ins.content(block))
        good = backend.batch_set_v1(keys_of(PREFIX), pool.indices(range(len(PREFIX))))
        stored = stored or all(good)
        found = engine.load(PREFIX)
        outcomes.add((engine.lookup(PREFIX), sum(data is not None for data in found)))
        for block, data in zip(PREFIX, found, strict=True):
            assert data is None or np.array_equal(data, stand_ins.content(block))
    assert stored and {(0, 0), (len(PREFIX), len(PREFIX))} <= outcomes
    backend.close()
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE", "0")
    again = stand_ins.SglangEngine(backend_of(tmp_path, pool), pool)
    assert again.lookup(PREFIX) == len(PREFIX), "what was reported as stored is there"
    assert all(data is not None for data in again.load(PREFIX))
    again.stop()


# --- the rest of the interface ------------------------------------------------------------------------------------------------


def test_only_the_rank_that_sglang_lets_write_writes(tmp_path: Path) -> None:
    config = {"is_mla_model": True, "tp_size": 2}
    pool = SglangPool(mla=True)
    writer, replica = (backend_of(tmp_path, pool, config=config | {"tp_rank": rank}) for rank in (0, 1))
    assert writer.writes and not replica.writes
    assert replica.batch_set_v1(keys_of([1]), pool.indices([1])) == [True] and not writer.exists(keys_of([1])[0])
    assert writer.batch_set_v1(keys_of([1]), pool.indices([1])) == [True]
    writer.flush(WAIT_S)
    assert replica.exists(keys_of([1])[0]) and replica.batch_get_v1(keys_of([1]), pool.indices([2])) == [True]
    replica.close()
    writer.close()


def test_models_with_side_pools_are_answered_in_sglangs_types(tmp_path: Path, storage: Any) -> None:
    backend, pool = backend_of(tmp_path), SglangPool()
    assert backend.batch_exists_v2(keys_of([1]), None, None) == storage.PoolTransferResult.empty()
    backend.register_mem_host_pool_v2(pool, storage.PoolName.MAMBA)
    transfer = storage.PoolTransfer(name=storage.PoolName.MAMBA, keys=keys_of([1, 2]))
    assert backend.batch_exists_v2(keys_of([1, 2]), [transfer]) == storage.PoolTransferResult.empty()
    assert storage.count_pool_hits(backend.batch_set_v2([transfer])) == {storage.PoolName.MAMBA: 0}
    assert storage.count_pool_hits(backend.batch_get_v2([transfer])) == {storage.PoolName.MAMBA: 0}
    backend.close()


def test_stats_are_sglangs_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "sglang.srt.observability.metrics_collector"
    scope = {"dataclass": dataclasses.dataclass, "field": dataclasses.field, "__name__": name}
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    metrics = taken_from("srt/observability/metrics_collector.py", None, ("StorageMetrics",), scope)["StorageMetrics"]
    module.StorageMetrics = metrics  # type: ignore[attr-defined]
    backend, pool = backend_of(tmp_path, config={"enable_storage_metrics": True}), SglangPool(dim=DIM)
    backend.batch_set_v1(keys_of(PREFIX), pool.indices(PREFIX))
    stats = backend.get_stats()
    assert isinstance(stats, metrics) and stats.backup_pgs == [len(PREFIX)] and stats.prefetch_pgs == []
    backend.close()
