"""The SGLang backend, driven as SGLang 0.5.23 drives it, with stand-ins for its base class, its configuration and its host pool."""

from __future__ import annotations

import abc
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapter_conformance import LOAD_TIMEOUT_S, PREFIX, WAIT_S, AdapterConformance
from kvlode import InvalidConfig, Status
from kvlode.adapters import attached
from kvlode.adapters import sglang as adapter
from kvlode.adapters.attached import QuietSpace
from kvlode.adapters.identity import hub_commit
from kvlode.adapters.sglang import HiCacheBackend
from kvlode.engine.testing import open_on_device
from kvlode.gds.late import LateDevice
from kvlode.gds.memory import MemoryDevice
from model import block_bytes
from sglang_pool import MHA_LAYOUTS, MLA_LAYOUTS, PAGES, UNTOUCHED, ExtraInfo, HostPool, StorageConfig, keys_of

PAGE_BYTES = HostPool().page_bytes
SMALL = {"capacity": "64MiB", "buffer": "16MiB", "gds": "off"}


def content(block: int, size: int = PAGE_BYTES) -> np.ndarray:
    return block_bytes(b"%d" % block, block, size)


def backend_of(
    path: Path | str | list[str], pool: HostPool | None = None, *, config: dict[str, Any] | None = None, **extra: Any
) -> HiCacheBackend:
    """A backend with its pool, as SGLang's controller makes it."""
    where = path if isinstance(path, list) else os.fspath(path)
    given = {"backend_name": "kvlode", "module_path": "m", "class_name": "c", "interface_v1": 1, "path": where} | SMALL | extra
    backend = HiCacheBackend(StorageConfig(**(config or {}), extra_config=given), {})
    backend.register_mem_pool_host(pool or HostPool())
    return backend


class SglangEngine:
    """SGLang as far as storage is concerned, on the calls for whole batches. Its pages are reused at once."""

    def __init__(self, backend: HiCacheBackend, pool: HostPool) -> None:
        self.backend, self.pool = backend, pool

    def store(self, prefix: Sequence[int]) -> None:
        pages = list(range(len(prefix)))
        for page, block in zip(pages, prefix, strict=True):
            self.pool.write(page, content(block))
        assert len(self.backend.batch_set_v1(keys_of(prefix), self.pool.indices(pages))) == len(prefix)
        self.pool.blank()

    def flush(self) -> None:
        self.backend.flush(WAIT_S)

    def lookup(self, prefix: Sequence[int]) -> int:
        return self.backend.batch_exists(keys_of(prefix))

    def load(self, prefix: Sequence[int]) -> list[np.ndarray | None]:
        self.pool.blank()
        pages = list(reversed(range(len(prefix))))
        good = self.backend.batch_get_v1(keys_of(prefix), self.pool.indices(pages))
        assert len(good) == len(prefix)
        return [self.pool.read(page) if came else None for page, came in zip(pages, good, strict=True)]

    def stop(self) -> None:
        self.backend.close()


class GenericEngine(SglangEngine):
    """SGLang without ``interface_v1``: flat pages, copied."""

    def store(self, prefix: Sequence[int]) -> None:
        for page, block in enumerate(prefix):
            self.pool.write(page, content(block))
        assert self.backend.batch_set(keys_of(prefix), [self.pool.get_data_page(i * self.pool.page_size) for i in range(len(prefix))]) in (
            0,
            1,
        )

    def load(self, prefix: Sequence[int]) -> list[np.ndarray | None]:
        pages = self.backend.batch_get(keys_of(prefix), [self.pool.get_dummy_flat_data_page() for _ in prefix])
        found: list[np.ndarray | None] = []
        for index, page in enumerate(pages):
            if page is not None:
                self.pool.set_from_flat_data_page(index * self.pool.page_size, page)
            found.append(None if page is None else self.pool.read(index))
        return found


class TestPages(AdapterConformance):
    """The common suite over the v1 calls."""

    engine: type[SglangEngine] = SglangEngine
    interface_v1 = 1
    backend_of = staticmethod(backend_of)

    @pytest.fixture
    def options(self, tmp_path: Path) -> dict[str, Any]:
        (tmp_path / "store").mkdir()
        return SMALL | {"path": os.fspath(tmp_path / "store" / "tp0of1")}  # where rank 0 of 1 keeps its store

    def start(
        self, options: dict[str, Any], *, model: str = "model", dtype: str = "bfloat16", rank: int = 0, world: int = 1
    ) -> SglangEngine:
        pool = HostPool(dtype=getattr(torch, dtype))
        config = {"model_name": model, "tp_rank": rank, "tp_size": world}
        path = options["path"]
        folder = path if isinstance(path, list) else os.path.dirname(path)
        given = options | {"path": folder, "load_timeout_s": LOAD_TIMEOUT_S, "interface_v1": self.interface_v1}
        extra = {name: value for name, value in given.items() if name != "path"}
        return self.engine(self.backend_of(given["path"], pool, config=config, **extra), pool)

    def content(self, block: int) -> np.ndarray:
        return content(block)


class TestFlatPages(TestPages):
    """The common suite over the generic calls."""

    engine = GenericEngine
    interface_v1 = 0
    test_a_store_that_is_full_takes_the_newest = None  # type: ignore[assignment]  # long, and no different from above


# --- the class that SGLang loads ----------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type:
    class HiCacheStorage(abc.ABC):
        @abc.abstractmethod
        def get(self, key: str) -> Any: ...

        @abc.abstractmethod
        def batch_get(self, keys: list[str]) -> Any: ...

        @abc.abstractmethod
        def set(self, key: str) -> bool: ...

        @abc.abstractmethod
        def batch_set(self, keys: list[str]) -> bool: ...

        @abc.abstractmethod
        def exists(self, key: str) -> bool: ...

        def register_mem_pool_host(self, pool: Any) -> None:
            raise AssertionError("the base class is asked")

        clear = get_stats = batch_exists = batch_get_v1 = batch_set_v1 = register_mem_pool_host

    name = "sglang.srt.mem_cache.hicache_storage"
    module = types.ModuleType(name)
    module.HiCacheStorage = HiCacheStorage  # type: ignore[attr-defined]
    module.PoolTransferResult = lambda kv, extra: (kv, extra)  # type: ignore[attr-defined]
    for package in ("sglang", "sglang.srt", "sglang.srt.mem_cache"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, name, module)
    adapter._hicache_class.cache_clear()
    return HiCacheStorage


def test_the_class_is_a_storage_of_sglang(stand_in: type, tmp_path: Path) -> None:
    found = adapter.KvlodeHiCache
    assert issubclass(found, stand_in) and found is adapter.KvlodeHiCache
    backend = found(StorageConfig(extra_config={"path": os.fspath(tmp_path), "interface_v1": 1} | SMALL), {})
    backend.register_mem_pool_host(HostPool())
    assert backend.batch_exists(keys_of(PREFIX)) == 0
    assert backend.batch_exists_v2(keys_of(PREFIX)) == (0, {})
    backend.close()
    adapter._hicache_class.cache_clear()


def test_without_sglang_only_its_class_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang", None)
    adapter._hicache_class.cache_clear()
    with pytest.raises(ImportError):
        adapter.KvlodeHiCache  # noqa: B018
    with pytest.raises(AttributeError, match="NoSuchName"):
        adapter.NoSuchName  # noqa: B018


# --- where the bytes of a page lie --------------------------------------------------------------------------------------------

POOLS = [(layout, False) for layout in MHA_LAYOUTS] + [(layout, True) for layout in MLA_LAYOUTS]


@pytest.mark.parametrize(("layout", "mla"), POOLS, ids=[f"{'mla' if mla else 'mha'}-{layout}" for layout, mla in POOLS])
@pytest.mark.parametrize("interface_v1", [1, 0], ids=["pages", "flat"])
def test_pages_come_back_into_other_places_and_nowhere_else(tmp_path: Path, layout: str, mla: bool, interface_v1: int) -> None:
    pool = HostPool(layout, mla=mla)
    config = {"is_mla_model": mla}
    engine = (SglangEngine if interface_v1 else GenericEngine)(backend_of(tmp_path, pool, config=config, interface_v1=interface_v1), pool)
    for page in range(5):
        pool.write(page, content(page, pool.page_bytes))
    stored = [pool.get_data_page(page * pool.page_size).clone() for page in range(5)]
    if interface_v1:
        assert engine.backend.batch_set_v1(keys_of(range(5)), pool.indices(range(5))) == [True] * 5
    else:
        assert engine.backend.batch_set(keys_of(range(5)), stored)
    assert engine.backend.flush()
    engine.stop()

    other = HostPool(layout, mla=mla)
    backend = backend_of(tmp_path, other, config=config, interface_v1=interface_v1)
    other.blank()
    places = [7, 2, 11, 15, 0]
    if interface_v1:
        assert backend.batch_get_v1(keys_of(range(5)), other.indices(places)) == [True] * 5
    else:
        pages = backend.batch_get(keys_of(range(5)), [other.get_dummy_flat_data_page() for _ in places])
        for place, page in zip(places, pages, strict=True):
            other.set_from_flat_data_page(place * other.page_size, page)
    for block, place in enumerate(places):
        assert torch.equal(other.get_data_page(place * other.page_size).view(torch.uint8), stored[block].view(torch.uint8))
        assert np.array_equal(other.read(place), content(block, pool.page_bytes))
    for page in set(range(PAGES)) - set(places):
        assert (other.read(page) == UNTOUCHED).all()
    backend.close()


@pytest.mark.parametrize("layout", MHA_LAYOUTS)
def test_pages_of_one_interface_are_not_those_of_the_other(tmp_path: Path, layout: str) -> None:
    """In ``layer_first`` they have their bytes in another order."""
    pool = HostPool(layout)
    backend = backend_of(tmp_path, pool)
    backend.batch_set_v1(keys_of([1]), pool.indices([1]))
    assert backend.exists(keys_of([1])[0]) and backend.get(keys_of([1])[0]) is None
    assert backend.set(keys_of([2])[0], pool.get_data_page(0)) and backend.get(keys_of([2])[0]) is not None
    assert backend.batch_get_v1(keys_of([2]), pool.indices([2])) == [False]
    backend.close()


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "layout": ({"layout": "page_first_direct"}, {}),
    "page size": ({"tokens": 32}, {}),
    "head width": ({"dim": 32}, {}),
    "pipeline rank": ({}, {"pp_rank": 1, "pp_size": 2}),
    "context rank": ({}, {"attn_cp_rank": 1, "attn_cp_size": 2}),
    "tensor-parallel size": ({}, {"tp_size": 2}),
    "dcp": ({}, {"dcp_rank": 0, "dcp_size": 2}),
    "kind": ({"mla": True}, {"is_mla_model": True}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_pages_of_another_geometry_or_rank_are_never_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    monkeypatch.setattr(adapter, "shard_of", lambda config: "one")  # even if ranks shared a folder
    pool_changes, config = OTHERS[other]
    engine = SglangEngine(backend_of(tmp_path), HostPool())
    engine.store(PREFIX)
    engine.flush()
    engine.stop()
    pool = HostPool(**pool_changes)
    backend = backend_of(tmp_path, pool, config=config)
    assert backend.batch_exists(keys_of(PREFIX)) == 0
    assert not any(backend.batch_get_v1(keys_of(PREFIX), pool.indices(range(len(PREFIX)))))
    backend.close()


def test_each_writing_rank_has_a_folder_of_its_own(tmp_path: Path) -> None:
    ranks = [{"tp_rank": 1, "tp_size": 2}, {"tp_size": 2, "pp_rank": 1, "pp_size": 2}, {"attn_cp_rank": 1, "attn_cp_size": 2, "dp_rank": 1}]
    backends = [backend_of(tmp_path, config=config) for config in ranks]
    assert [Path(backend.folder or "").name for backend in backends] == ["tp1of2", "tp0of2-pp1of2", "tp0of1-cp1of2-dp1"]
    for backend in backends:
        assert backend.batch_set_v1(keys_of([1]), HostPool().indices([0])) == [True]
        backend.close()


# --- replicas of an MLA model -------------------------------------------------------------------------------------------------

MLA_READER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_sglang import PREFIX, HostPool, content, backend_of, keys_of
import numpy as np
pool = HostPool(mla=True)
backend = backend_of(sys.argv[2], pool, config={"is_mla_model": True, "tp_rank": 1, "tp_size": 2})
assert backend.batch_exists(keys_of(PREFIX)) == len(PREFIX), backend.store_stats()
assert all(backend.batch_get_v1(keys_of(PREFIX), pool.indices(PREFIX)))
assert all(np.array_equal(pool.read(block), content(block, pool.page_bytes)) for block in PREFIX)
assert backend.batch_set_v1(keys_of([99]), pool.indices([0])) == [True]
backend.close()
print("read all")
"""


def mla(path: Path, rank: int, size: int = 2) -> SglangEngine:
    pool = HostPool(mla=True)
    return SglangEngine(backend_of(path, pool, config={"is_mla_model": True, "tp_rank": rank, "tp_size": size}), pool)


def mla_store(engine: SglangEngine) -> list[bool]:
    for block in PREFIX:
        engine.pool.write(block, content(block, engine.pool.page_bytes))
    return engine.backend.batch_set_v1(keys_of(PREFIX), engine.pool.indices(PREFIX))


def test_a_replica_that_starts_first_leaves_the_store_to_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "FOLLOW_RETRY_S", 0.0)
    replica = mla(tmp_path, rank=1)
    assert replica.lookup(PREFIX) == 0 and not os.listdir(tmp_path)
    assert mla_store(replica) == [True] * len(PREFIX), "SGLang has nothing to do where another rank stores"
    writer = mla(tmp_path, rank=0)
    assert mla_store(writer) == [True] * len(PREFIX)
    writer.flush()
    assert replica.lookup(PREFIX) == len(PREFIX)
    assert all(replica.backend.batch_get_v1(keys_of(PREFIX), replica.pool.indices(PREFIX)))
    assert np.array_equal(replica.pool.read(3), content(3, replica.pool.page_bytes))
    replica.backend.clear()
    assert writer.lookup(PREFIX) == len(PREFIX), "a replica clears nothing"
    replica.stop()
    writer.stop()
    wider = mla(tmp_path, rank=3, size=4)
    assert wider.lookup(PREFIX) == len(PREFIX), "replicated pages do not depend on how many ranks replicate them"
    wider.stop()


def test_a_replica_in_another_process_reads_beside_the_writer(tmp_path: Path) -> None:
    writer = mla(tmp_path, rank=0)
    mla_store(writer)
    writer.flush()
    command = [sys.executable, "-c", MLA_READER, os.path.dirname(__file__), os.fspath(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "read all", done.stderr
    writer.stop()


# --- deadlines ----------------------------------------------------------------------------------------------------------------


def late_backend(monkeypatch: pytest.MonkeyPatch, late: LateDevice, **options: Any) -> tuple[HiCacheBackend, HostPool]:
    pool = HostPool()
    monkeypatch.setattr(
        attached, "open_store", lambda path, config: open_on_device(late, put_timeout_s=config.put_timeout_s, buffer=2 << 20)
    )
    return backend_of("/store", pool, **options), pool


def test_a_batch_larger_than_the_buffer_waits_for_room(tmp_path: Path) -> None:
    pool = HostPool()
    backend = backend_of(tmp_path, pool, buffer="1MiB", batch_bytes=256 << 10)
    keys = keys_of(range(128))
    assert backend.batch_set_v1(keys, pool.indices([n % PAGES for n in range(128)])) == [True] * 128, "8 MiB through a buffer of 1 MiB"
    assert backend.flush() and backend.batch_exists(keys) == 128
    backend.close()


def test_storing_on_a_drive_that_hangs_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    late = LateDevice(MemoryDevice(), holding=())
    backend, pool = late_backend(monkeypatch, late, store_timeout_s=0.2)
    late.hold("write", "sync")
    started_s = time.monotonic()
    good = backend.batch_set_v1(keys_of(range(128)), pool.indices([n % PAGES for n in range(128)]))
    assert time.monotonic() - started_s < WAIT_S / 3
    assert good[0] and not good[-1] and good == sorted(good, reverse=True), "a run of stored pages from the front"
    late.hold()
    late.release()
    backend.close()


def test_after_a_late_load_nothing_writes_to_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    late = LateDevice(MemoryDevice(), holding=())
    backend, pool = late_backend(monkeypatch, late, load_timeout_s=0.2)
    backend.batch_set_v1(keys_of(PREFIX), pool.indices(PREFIX))
    backend.flush()
    backend.close()
    backend, pool = late_backend(monkeypatch, late, load_timeout_s=0.2)
    pool.blank()
    late.hold("read")
    assert backend.batch_get_v1(keys_of(PREFIX), pool.indices(PREFIX)) == [False] * len(PREFIX)
    late.hold()
    late.release()
    backend.close()
    assert all((pool.read(page) == UNTOUCHED).all() for page in range(PAGES))


def test_an_index_that_does_not_answer_is_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of(tmp_path, lookup_timeout_s=0.05)
    monkeypatch.setattr(QuietSpace, "lookup_nowait", lambda self, keys: [Status.HIT, *([Status.PENDING] * (len(keys) - 1))])
    assert backend.batch_exists(keys_of(PREFIX)) == 1
    backend.close()


# --- nothing raises -------------------------------------------------------------------------------------------------------------


def test_calls_that_cannot_be_served_are_misses(tmp_path: Path) -> None:
    pool = HostPool()
    unregistered = HiCacheBackend(StorageConfig(extra_config={"path": os.fspath(tmp_path), "interface_v1": 1} | SMALL), {})
    closed = backend_of(tmp_path, pool)
    closed.close()
    closed.close()
    for backend in (unregistered, closed):
        assert backend.batch_exists(keys_of(PREFIX)) == 0 and not backend.exists("key")
        assert backend.batch_set_v1(keys_of(PREFIX), pool.indices(PREFIX)) == [False] * len(PREFIX)
        assert backend.batch_get_v1(keys_of(PREFIX), pool.indices(PREFIX)) == [False] * len(PREFIX)
        assert backend.get("key") is None and not backend.set("key", pool.get_data_page(0))
        assert backend.batch_get(["key"], [pool.get_dummy_flat_data_page()]) == [None]
        assert not backend.batch_set(["key"], [pool.get_data_page(0)])
        backend.clear()
        backend.close()


def test_wrong_calls_are_misses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pool = HostPool()
    backend = backend_of(tmp_path, pool)
    assert backend.batch_set_v1(keys_of([1, 2]), pool.indices([1])) == [False, False], "fewer indices than keys"
    assert backend.batch_get_v1(keys_of([1, 2]), pool.indices([1])) == [False, False]
    assert backend.batch_set_v1(["k" * 300], pool.indices([1])) == [False], "a key that is too long"
    assert backend.batch_get_v1(["k" * 300], pool.indices([1])) == [False]
    assert backend.batch_exists(["k" * 300]) == 0
    assert backend.batch_set_v1([], pool.indices([1])) == [] and backend.batch_exists([]) == 0
    assert not backend.set("key", None) and not backend.batch_set(["key"], None)
    assert not backend.set("key", torch.zeros(4, dtype=torch.float32)), "elements of another type"
    assert backend.set("key", torch.zeros(4, dtype=torch.bfloat16))
    assert backend.get("key") is None, "a page of another length"
    pool.get_page_buffer_meta = lambda indices: ([0], [8])  # type: ignore[method-assign]
    assert backend.batch_get_v1(keys_of([1]), pool.indices([1])) == [False], "a pool that changed"
    assert "SGLang goes on" in caplog.text
    backend.close()


def test_a_pool_without_pages_is_misses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = backend_of(tmp_path, types.SimpleNamespace(page_size=16, kv_buffer=None, layout="layer_first"))  # type: ignore[arg-type]
    assert backend.batch_exists(keys_of(PREFIX)) == 0
    assert "no pages that can be stored" in caplog.text
    backend.close()


def test_models_with_state_beside_their_pages_are_not_stored(tmp_path: Path, stand_in: type) -> None:
    backend, pool = backend_of(tmp_path), HostPool()
    backend.register_mem_host_pool_v2(pool, types.SimpleNamespace(value="kv"))
    backend.on_host_pools_registered()
    assert backend.batch_set_v1(keys_of([1]), pool.indices([1])) == [True] and backend.exists(keys_of([1])[0])
    backend.register_mem_host_pool_v2(pool, "mamba")
    assert not backend.exists(keys_of([1])[0])
    assert backend.batch_get_v1(keys_of([1]), pool.indices([1])) == [False]
    transfer = types.SimpleNamespace(name="mamba", keys=keys_of([1, 2]))
    assert backend.batch_exists_v2(keys_of([1]), [transfer]) == (0, {})
    assert backend.batch_set_v2([transfer]) == backend.batch_get_v2([transfer]) == {"mamba": [False, False]}
    backend.close()


def test_many_threads_get_only_right_bytes(tmp_path: Path) -> None:
    wrong: list[str] = []
    local = threading.local()

    class PoolOfEachThread(HostPool):
        """SGLang's threads share a pool and use pages of their own; here each has all the pages of its own pool."""

        def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
            return HostPool.get_page_buffer_meta(getattr(local, "pool", self), indices)

    backend = backend_of(tmp_path, PoolOfEachThread())

    def run(number: int) -> None:
        pool = local.pool = PoolOfEachThread()
        prefix = range(number % 3, number % 3 + PAGES)
        for page, block in enumerate(prefix):
            pool.write(page, content(block))
        indices = pool.indices(range(PAGES))
        for _ in range(10):
            if not all(backend.batch_set_v1(keys_of(prefix), indices)):
                wrong.append(f"{number}: not stored")
            pool.blank()
            good = backend.batch_get_v1(keys_of(prefix), indices)  # a page that another thread is just copying is a miss
            pages = [page for page, block in enumerate(prefix) if good[page] and not np.array_equal(pool.read(page), content(block))]
            wrong.extend(f"{number}: bytes of page {page}" for page in pages)
            for page, block in enumerate(prefix):
                pool.write(page, content(block))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not wrong
    assert backend.batch_exists(keys_of(range(PAGES + 2))) == PAGES + 2
    backend.close()


# --- settings -------------------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no path": ({"path": None}, "folder"),
    "an unknown name": ({"capacityy": "1GiB"}, "capacityy"),
    "no size": ({"capacity": "much"}, "capacity"),
    "no deadline": ({"load_timeout_s": 0}, "load_timeout_s"),
    "text as a deadline": ({"lookup_timeout_s": "1"}, "lookup_timeout_s"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_stop_sglang_at_its_start(tmp_path: Path, name: str) -> None:
    extra, words = WRONG[name]
    with pytest.raises(InvalidConfig, match=words):
        HiCacheBackend(StorageConfig(extra_config={"path": os.fspath(tmp_path), "interface_v1": 1} | SMALL | extra), {})


def test_a_model_without_a_name_and_pages_without_room_stop_sglang_at_its_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="which model"):
        backend_of(tmp_path, config={"model_name": None})
    with pytest.raises(InvalidConfig):
        backend_of(tmp_path, capacity="8MiB", buffer="1MiB", pool=HostPool(dim=1 << 12))


def test_the_settings_of_sglang_itself_are_not_options_of_the_store(tmp_path: Path) -> None:
    backend_of(tmp_path, prefetch_threshold=256, prefetch_timeout_base=1, hicache_storage_pass_prefix_keys=True).close()


# --- which weights --------------------------------------------------------------------------------------------------------------


def weights(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(100))
    return folder


def lookup_of(path: Path, **extra: Any) -> int:
    """Store under these settings if nothing is found, then say how much was found."""
    engine = SglangEngine(backend_of(path, **extra), HostPool())
    found = engine.lookup(PREFIX)
    engine.store(PREFIX)
    engine.flush()
    engine.stop()
    return found


def test_weights_swapped_at_the_same_path_are_never_hits(tmp_path: Path) -> None:
    model = weights(tmp_path / "weights")
    assert lookup_of(tmp_path / "s", model=os.fspath(model)) == 0
    assert lookup_of(tmp_path / "s", model=os.fspath(model)) == len(PREFIX)
    (model / "model.safetensors").write_bytes(bytes(101))
    assert lookup_of(tmp_path / "s", model=os.fspath(model)) == 0


def test_a_revision_may_be_given(tmp_path: Path) -> None:
    assert lookup_of(tmp_path / "s", revision="one") == 0
    assert lookup_of(tmp_path / "s", revision="one") == len(PREFIX)
    assert lookup_of(tmp_path / "s", revision="two") == 0


def test_the_servers_arguments_are_part_of_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = types.SimpleNamespace(model_path=os.fspath(weights(tmp_path / "weights")), quantization=None, kv_cache_dtype="fp8_e4m3")
    module = types.ModuleType("sglang.srt.runtime_context")
    module.get_server_args = lambda: server  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", module)
    assert lookup_of(tmp_path / "s") == 0
    assert lookup_of(tmp_path / "s") == len(PREFIX)
    server.kv_cache_dtype = "fp8_e5m2"
    assert lookup_of(tmp_path / "s") == 0, "the pool's type is uint8 for both"
    (tmp_path / "weights" / "config.json").write_text("{ }")
    assert lookup_of(tmp_path / "s") == 0

    def no_server() -> None:
        raise ValueError("there is no server")

    module.get_server_args = no_server  # type: ignore[attr-defined]
    assert lookup_of(tmp_path / "s") == 0


def test_a_commit_of_a_hub_is_found_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", os.fspath(tmp_path))
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("ab" * 20)
    (refs / "broken").write_text("no commit")
    assert hub_commit("org/name") == "ab" * 20
    assert hub_commit("org/name", "cd" * 20) == "cd" * 20
    assert hub_commit("org/name", "broken") is None and hub_commit("org/name", "absent") is None and hub_commit("other") is None
    for variable in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    assert hub_commit("org/name") is None


# --- the rest -------------------------------------------------------------------------------------------------------------------


def test_clear_forgets_the_model_for_good(tmp_path: Path) -> None:
    pool = HostPool()
    backend = backend_of(tmp_path, pool)
    other = backend_of(tmp_path, pool, config={"model_name": "other"})
    for each in (backend, other):
        each.batch_set_v1(keys_of(PREFIX), pool.indices(PREFIX))
    assert backend.flush()
    backend.clear()
    assert backend.batch_exists(keys_of(PREFIX)) == 0 and other.batch_exists(keys_of(PREFIX)) == len(PREFIX)
    backend.close()
    other.close()
    again = backend_of(tmp_path, pool)
    assert again.batch_exists(keys_of(PREFIX)) == 0
    again.close()


def test_pages_know_the_pages_before_them(tmp_path: Path) -> None:
    pool = HostPool()
    backend = backend_of(tmp_path, pool)
    backend.batch_set_v1(keys_of(range(4)), pool.indices(range(4)))
    backend.batch_set_v1(keys_of(range(4, 8)), pool.indices(range(4)), ExtraInfo(prefix_keys=keys_of(range(4))))
    space = backend._spaces[True]
    assert space._space is not None and backend._attached.store is not None
    assert [fact and fact.depth for fact in space._space.info([key.encode() for key in keys_of(range(8))])] == list(range(8))
    backend.close()


def test_stats_are_those_of_sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = HostPool()
    backend = backend_of(tmp_path, pool, config={"enable_storage_metrics": True})
    assert backend.get_stats() is None, "there is no SGLang in this process"
    module = types.ModuleType("sglang.srt.observability.metrics_collector")
    module.StorageMetrics = types.SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    backend.batch_set_v1(keys_of(PREFIX), pool.indices(PREFIX))
    backend.batch_get_v1(keys_of([*PREFIX, 99]), pool.indices([*PREFIX, 9]))
    stats = backend.get_stats()
    assert (stats.prefetch_pgs, stats.backup_pgs) == ([len(PREFIX)], [len(PREFIX)])
    assert stats.prefetch_bandwidth[0] > 0 and stats.backup_bandwidth[0] > 0
    assert backend.get_stats().prefetch_pgs == []
    assert backend.store_stats()["counters"]["put_blocks"] == len(PREFIX)
    backend.close()
