"""The storage plug-in inside LMCache's process, with stand-ins for LMCache's classes (the real ones: tests/engines)."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adapter_conformance import LOAD_TIMEOUT_S, PREFIX, WAIT_S, AdapterConformance
from kvlode import InvalidConfig
from kvlode.adapters.lmcache_plugin import backend_class
from kvlode.gds.late import LateDevice
from kvlode.gds.memory import MemoryDevice
from lmcache_rig import BLOCK_BYTES, CHUNK_TOKENS, LOAD_S, SHAPE, BackendEngine, content, plugin_standin
from rig import eventually


def start(options: dict[str, Any], **identity: Any) -> BackendEngine:
    return BackendEngine(backend_class(plugin_standin()), {"load_timeout_s": LOAD_S} | options, **identity)


class TestBackend(AdapterConformance):
    def start(self, options: dict[str, Any], **identity: Any) -> BackendEngine:
        return start(options, **identity)

    def content(self, block: int) -> np.ndarray:
        return content(block)


def on_a_drive_that_hangs(monkeypatch: pytest.MonkeyPatch) -> tuple[BackendEngine, LateDevice]:
    """``PREFIX`` is stored, and reads of it wait for the test."""
    late = LateDevice(MemoryDevice(), holding=())
    options = TestBackend().on_device(monkeypatch, late)
    engine = start(options)
    engine.store(PREFIX)
    engine.stop()
    engine = start(options)
    late.hold("read")
    return engine, late


# --- references ---------------------------------------------------------------------------------------------------------------


def test_a_stored_object_is_kept_until_its_bytes_are_written_and_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    late = LateDevice(MemoryDevice(), holding=())
    engine = start(TestBackend().on_device(monkeypatch, late))
    late.hold("write")
    key, thing = engine.key(1), engine.object(content(1))
    done: list[Any] = []
    futures = engine.backend.batched_submit_put_task([key], [thing], on_complete_callback=done.append)
    assert late.wait_for_held(1)
    assert thing.references == 2 and engine.backend.exists_in_put_tasks(key) and not done
    thing.ref_count_down()  # LMCache's own
    assert engine.backend.batched_submit_put_task([key], [engine.object(content(1))]) is None, "it is being written already"
    late.hold()
    late.release()
    futures[0].result(WAIT_S)
    assert thing.references == 0 and done == [key] and not engine.backend.exists_in_put_tasks(key)
    assert engine.loads(1)
    engine.stop()


def test_a_loaded_object_has_one_reference_and_a_failed_load_leaves_none(options: dict[str, Any]) -> None:
    engine = start(options)
    engine.store([1])
    found = engine.backend.batched_get_blocking([engine.key(1), engine.key(2)])
    assert found[0].references == 1 and found[1] is None
    found[0].ref_count_down()
    assert engine.allocator.in_use() == 0
    engine.stop()


def test_a_load_that_is_given_up_frees_its_memory_when_the_drive_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, late = on_a_drive_that_hangs(monkeypatch)
    monkeypatch.setattr(engine.backend, "_load_timeout_s", LOAD_TIMEOUT_S)
    assert engine.backend.batched_get_blocking([engine.key(block) for block in PREFIX]) == [None] * len(PREFIX)
    assert engine.allocator.in_use() > 0, "its memory was freed while the drive may write into it"
    late.hold()
    late.release()
    assert eventually(lambda: engine.allocator.in_use() == 0)
    engine.stop()


def test_lmcaches_memory_outlives_the_jobs_that_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """LMCache closes ``LocalCPUBackend`` first and its plug-ins after that."""
    late = LateDevice(MemoryDevice(), holding=())
    options = TestBackend().on_device(monkeypatch, late)
    engine = start(options)
    late.hold("write")
    objects = [engine.allocator.allocate([SHAPE], [engine.dtype], "KV_2LTD", busy_loop=False) for _ in PREFIX]
    for block, thing in zip(PREFIX, objects, strict=True):
        thing.memory[:BLOCK_BYTES] = content(block)
    engine.backend.batched_submit_put_task([engine.key(block) for block in PREFIX], objects)
    assert late.wait_for_held(1)
    closing = threading.Thread(target=engine.allocator.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive() and not engine.allocator.closed
    late.hold()
    late.release()
    closing.join(WAIT_S)
    assert engine.allocator.closed
    engine.stop()
    engine = start(options)
    assert all(engine.loads(block) for block in PREFIX)
    engine.stop()


def test_without_memory_a_load_is_a_miss_and_waits_for_nothing(options: dict[str, Any]) -> None:
    engine = start(options)
    engine.store(PREFIX)
    engine.allocator.room = 3
    found = engine.backend.batched_get_blocking([engine.key(block) for block in PREFIX])
    assert [item is not None for item in found] == [True] * 3 + [False] * (len(PREFIX) - 3)
    engine.allocator.fail = True
    assert engine.backend.get_blocking(engine.key(0)) is None
    engine.stop()


# --- chunks -------------------------------------------------------------------------------------------------------------------


def test_a_chunk_that_is_no_whole_one_comes_back_in_its_own_shape(options: dict[str, Any]) -> None:
    engine = start(options)
    tokens = CHUNK_TOKENS // 2 - 3
    size = BLOCK_BYTES // CHUNK_TOKENS * tokens
    engine.store(PREFIX)
    engine.put([engine.key(100)], [engine.object(content(100)[:size], tokens)])
    keys = [*(engine.key(block) for block in PREFIX), engine.key(100)]
    assert engine.backend.batched_contains(keys) == len(keys)
    found = engine.backend.batched_get_blocking(keys)
    assert all(item is not None for item in found)
    assert list(found[-1].metadata.shapes[0])[2] == tokens
    assert np.array_equal(np.frombuffer(found[-1].byte_array, np.uint8), content(100)[:size])
    for item in found:
        item.ref_count_down()
    assert engine.allocator.in_use() == 0
    engine.stop()


def test_objects_that_a_load_could_not_make_are_not_stored(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    engine = start(options)
    other = engine.object(content(1))
    other.metadata.fmt = "BINARY"
    with caplog.at_level(logging.WARNING):
        assert engine.backend.batched_submit_put_task([engine.key(1)], [other]) is None
        assert engine.backend.batched_submit_put_task([engine.key(1)], [SimpleNamespace()]) is None
    assert sum("not stored" in record.getMessage() for record in caplog.records) == 1
    assert other.references == 1 and not engine.backend.contains(engine.key(1))
    engine.stop()


def test_layers_of_their_own_are_stored_one_by_one(options: dict[str, Any]) -> None:
    engine = start(options, layerwise=True)
    keys = [engine.key(1, layer_id=layer) for layer in range(4)]
    for layer, key in enumerate(keys):
        engine.put([key], [engine.object(content(layer)[: engine.block_bytes])])
    assert engine.backend.batched_contains(keys) == 4
    for layer, item in enumerate(engine.backend.batched_get_blocking(keys)):
        assert np.array_equal(np.frombuffer(item.byte_array, np.uint8), content(layer)[: engine.block_bytes])
    engine.stop()


# --- lookups, pins, removal ---------------------------------------------------------------------------------------------------


def test_pins_count_and_pinned_chunks_are_removed_by_force_alone(options: dict[str, Any]) -> None:
    engine = start(options)
    engine.store(PREFIX)
    key, backend = engine.key(0), engine.backend
    assert backend.pin(key) and backend.pin(key) and not backend.pin(engine.key(99))
    assert eventually(lambda: len(backend._leases) == 1)
    assert backend.unpin(key) and backend.unpin(engine.key(99))
    assert not backend.remove(key, force=False)
    backend.unpin(key)
    assert eventually(lambda: len(backend._leases) == 0)
    assert backend.remove(key, force=False) and not backend.remove(engine.key(99))
    assert eventually(lambda: not backend.contains(key))
    assert backend.contains(engine.key(1))
    backend.touch_cache()
    assert backend.get_allocator_backend() is engine.allocator
    engine.stop()


def test_the_event_loop_finds_loads_and_unpins(options: dict[str, Any]) -> None:
    engine = start(options)
    engine.store(PREFIX[:5])
    keys = [engine.key(block) for block in PREFIX]

    async def run() -> list[Any]:
        count = await engine.backend.batched_async_contains("lookup", keys, pin=True)
        assert count == 5
        return await engine.backend.batched_get_non_blocking("lookup", keys)

    found = asyncio.run(run())
    assert len(found) == 5
    for block, item in enumerate(found):
        assert np.array_equal(np.frombuffer(item.byte_array, np.uint8), content(block))
        item.ref_count_down()
    assert engine.allocator.in_use() == 0
    assert eventually(lambda: len(engine.backend._leases) == 0)
    engine.stop()


def test_a_load_that_the_event_loop_cancelled_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, late = on_a_drive_that_hangs(monkeypatch)

    async def run() -> None:
        loading = asyncio.create_task(engine.backend.batched_get_non_blocking("lookup", [engine.key(block) for block in PREFIX]))
        await asyncio.to_thread(late.wait_for_held, 1)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading

    asyncio.run(run())
    late.hold()
    late.release()
    assert eventually(lambda: engine.allocator.in_use() == 0)
    engine.stop()


def test_after_close_everything_is_a_miss_and_nothing_raises(options: dict[str, Any]) -> None:
    engine = start(options)
    engine.store(PREFIX)
    engine.stop()
    engine.stop()
    backend, key, thing = engine.backend, engine.key(0), engine.object(content(0))
    assert not backend.contains(key, pin=True) and backend.get_blocking(key) is None and not backend.remove(key)
    backend.batched_submit_put_task([key], [thing])
    assert thing.references == 1 and not backend.exists_in_put_tasks(key)
    assert asyncio.run(backend.batched_async_contains("l", [key])) == 0
    assert asyncio.run(backend.batched_get_non_blocking("l", [key])) == []
    assert backend.unpin(key)


def test_stores_and_loads_from_several_threads(options: dict[str, Any]) -> None:
    engine = start(options)
    wrong: list[int] = []

    def work(number: int) -> None:
        blocks = range(number * 8, number * 8 + 8)
        engine.store(blocks)
        for block, data in zip(blocks, engine.load(blocks), strict=True):
            if data is None or not np.array_equal(data, content(block)):
                wrong.append(block)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not wrong and engine.allocator.in_use() == 0
    engine.stop()


# --- settings -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"capacty": "1GiB"}, {"lookup_timeout_s": -1}, {"revision": 3}, {"path": ""}])
def test_wrong_settings_are_told_at_the_start(options: dict[str, Any], wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig):
        start(options | wrong)


@pytest.mark.parametrize("more", [{"blending": True}, {"layerwise": True, "mla": True}])
def test_chunks_that_are_more_than_their_bytes_are_refused_at_the_start(options: dict[str, Any], more: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match="cannot be stored"):
        start(options, **more)


def test_a_process_without_settings_is_told_where_they_belong() -> None:
    config = SimpleNamespace(extra_config=None, use_layerwise=False, enable_blending=False)
    with pytest.raises(InvalidConfig, match="extra_config"):
        backend_class(plugin_standin())(config=config, metadata=SimpleNamespace())


def test_hashes_that_do_not_survive_the_process_are_warned_of(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with caplog.at_level(logging.WARNING):
        start(options).stop()
        assert "PYTHONHASHSEED" in caplog.text
        caplog.clear()
        monkeypatch.setenv("PYTHONHASHSEED", "0")
        start(options).stop()
        assert "PYTHONHASHSEED" not in caplog.text


def test_ranks_have_stores_of_their_own_and_a_scheduler_only_reads(options: dict[str, Any]) -> None:
    worker = start(options, rank=1, world=2)
    worker.store(PREFIX)
    worker.flush()
    assert Path(options["path"], "rank-1").is_dir()
    scheduler = start(options, rank=1, world=2, role="scheduler")
    assert scheduler.lookup(PREFIX) == len(PREFIX)
    scheduler.stop()
    worker.stop()
