"""The L2 adapter of LMCache's multiprocess server, with stand-ins for LMCache's classes (the real ones: tests/engines)."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapter_conformance import PREFIX, WAIT_S, AdapterConformance
from kvlode import InvalidConfig
from kvlode.adapters.lmcache_identity import Layout, Revisions, engine_key, object_key, object_namespace, packed_key
from kvlode.adapters.lmcache_l2 import adapter_class
from kvlode.gds.late import LateDevice
from kvlode.gds.memory import MemoryDevice
from lmcache_rig import BLOCK_BYTES, LOAD_S, SHAPE, L2Engine, ObjectKey, content, kv_rank, memory_object, standin
from rig import eventually


def start(options: dict[str, Any], **identity: Any) -> L2Engine:
    return L2Engine(adapter_class(standin())({"load_timeout_s": LOAD_S} | options, l1_memory_desc=None), **identity)


class TestL2(AdapterConformance):
    takes_sets = True

    def start(self, options: dict[str, Any], **identity: Any) -> L2Engine:
        return start(options, **identity)

    def content(self, block: int) -> np.ndarray:
        return content(block)


# --- the interface ------------------------------------------------------------------------------------------------------------


def test_the_three_descriptors_differ_and_are_quiet_at_first(options: dict[str, Any]) -> None:
    engine = start(options)
    adapter = engine.adapter
    descriptors = [adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(), adapter.get_load_event_fd()]
    assert len(set(descriptors)) == 3
    for descriptor in descriptors:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(descriptor)
    engine.stop()
    engine.stop()


def test_a_store_tells_how_many_bytes_it_wrote_and_objects_stored_before_count_nothing(options: dict[str, Any]) -> None:
    engine = start(options)
    keys = [engine.key(block) for block in (1, 2)]
    assert engine.store_objects(keys, [engine.object(content(block)) for block in (1, 2)]) == 2 * BLOCK_BYTES
    again = engine.store_objects([*keys, engine.key(3)], [engine.object(content(block)) for block in (1, 2, 3)])
    assert again == BLOCK_BYTES
    engine.stop()


def test_what_was_found_is_kept_until_it_is_unlocked(options: dict[str, Any]) -> None:
    engine = start(options)
    engine.store(PREFIX)
    keys = [engine.key(block) for block in PREFIX]
    assert all(engine.look_up(keys))
    assert engine.adapter.report_status()["locked_key_count"] == len(PREFIX)
    assert all(engine.look_up(keys[:2]))
    engine.adapter.submit_unlock(keys)
    assert engine.adapter.report_status()["locked_key_count"] == 2
    engine.adapter.submit_unlock(keys)
    engine.adapter.submit_unlock([*keys, engine.key(999)])  # what nobody locked is no error
    assert engine.adapter.report_status()["locked_key_count"] == 0
    engine.stop()


def test_locked_blocks_are_not_reclaimed(options: dict[str, Any]) -> None:
    engine = start(options | {"capacity": "64MiB", "buffer": "8MiB", "segment_bytes": 4 << 20})
    engine.store(PREFIX)
    engine.flush()
    keys = [engine.key(block) for block in PREFIX]
    assert all(engine.look_up(keys))
    for start_block in range(1000, 1000 + 3 * (64 << 20) // BLOCK_BYTES, 32):
        engine.store(range(start_block, start_block + 32))
    objects = [engine.object() for _ in keys]
    assert all(engine.load_objects(keys, objects))
    engine.adapter.submit_unlock(keys)
    engine.stop()


def test_locks_that_lmcache_forgot_end(options: dict[str, Any]) -> None:
    engine = start(options | {"lease_s": 0.05})
    engine.store(PREFIX)
    assert all(engine.look_up([engine.key(block) for block in PREFIX]))

    def forgotten() -> bool:
        engine.look_up([engine.key(999)])  # whatever comes next
        return engine.adapter.report_status()["locked_key_count"] == 0

    assert eventually(forgotten)
    engine.stop()


def test_one_task_may_have_keys_of_several_namespaces(options: dict[str, Any]) -> None:
    engine = start(options)
    keys = [ObjectKey(b"x", model, kv_rank(rank, 2), group) for model in ("a", "b") for rank in (0, 1) for group in (0, 1)]
    assert engine.store_objects(keys, [engine.object(content(number)) for number in range(len(keys))]) == len(keys) * BLOCK_BYTES
    layouts = {0: engine.layouts[0], 1: engine.layouts[0]}
    assert engine.look_up(keys, layouts) == [True] * len(keys)
    order = list(range(len(keys)))
    random.Random(1).shuffle(order)
    objects = [engine.object() for _ in keys]
    assert all(engine.load_objects([keys[number] for number in order], objects))
    for number, thing in zip(order, objects, strict=True):
        assert np.array_equal(np.frombuffer(thing.byte_array, np.uint8), content(number))
    assert engine.adapter.report_status()["namespaces"] == len(keys)
    engine.stop()


def test_users_share_nothing(options: dict[str, Any]) -> None:
    engine = start(options)
    engine.store_objects([engine.key(1, cache_salt="one")], [engine.object(content(1))])
    assert engine.look_up([engine.key(1, cache_salt="one"), engine.key(1, cache_salt="two"), engine.key(1)]) == [True, False, False]
    engine.stop()


def test_a_group_whose_layout_lmcache_does_not_tell_has_the_layout_that_was_last_seen(options: dict[str, Any]) -> None:
    engine = start(options)
    assert engine.look_up([engine.key(1)], {}) == [False]
    engine.store([1])
    assert engine.look_up([engine.key(1), engine.key(2)], {}) == [True, False]
    engine.stop()


def test_several_tasks_at_once_from_two_threads(options: dict[str, Any]) -> None:
    engine = start(options)
    failures: list[str] = []

    def storing() -> None:
        for first in range(0, 64, 8):
            if not engine.store_objects(
                [engine.key(b) for b in range(first, first + 8)], [engine.object(content(b)) for b in range(first, first + 8)]
            ):
                failures.append(f"store {first}")

    def loading() -> None:
        for first in range(0, 64, 8):
            for block, data in zip(range(first, first + 8), engine.load(range(first, first + 8)), strict=True):
                if data is not None and not np.array_equal(data, content(block)):
                    failures.append(f"load {block}")

    threads = [threading.Thread(target=storing), threading.Thread(target=loading)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not failures and engine.lookup(range(64)) == 64
    engine.stop()


def test_submitting_waits_for_nothing_and_results_come_by_the_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    late = LateDevice(MemoryDevice(), holding=())
    engine = start(TestL2().on_device(monkeypatch, late))
    late.hold("write")
    keys = [engine.key(block) for block in PREFIX]
    task = engine.adapter.submit_store_task(keys, [engine.object(content(block)) for block in PREFIX])
    assert late.wait_for_held(1)
    assert engine.adapter.pop_completed_store_tasks() == {}
    with pytest.raises(BlockingIOError):
        os.eventfd_read(engine.adapter.get_store_event_fd())
    assert engine.lookup(PREFIX) == len(PREFIX), "what is being written can be found"
    late.hold()
    late.release()
    done = engine.wait(engine.adapter.get_store_event_fd(), lambda: engine.adapter.pop_completed_store_tasks() or None)
    assert done == {task: len(PREFIX) * BLOCK_BYTES}
    engine.stop()


def test_after_close_tasks_are_over_at_once_and_nothing_raises(options: dict[str, Any]) -> None:
    engine = start(options)
    engine.store(PREFIX)
    engine.stop()
    adapter, key = engine.adapter, engine.key(0)
    assert adapter.pop_completed_store_tasks() == {}
    store = adapter.submit_store_task([key], [engine.object(content(0))])
    assert not adapter.pop_completed_store_tasks()[store].is_successful()
    assert not adapter.query_lookup_and_lock_result(adapter.submit_lookup_and_lock_task([key], engine.layouts)).test(0)
    assert not adapter.query_load_result(adapter.submit_load_task([key], [engine.object()])).test(0)
    adapter.submit_unlock([key])
    adapter.delete([key])
    assert adapter.report_status()["is_healthy"] is False


def test_objects_without_memory_are_refused_and_the_next_task_runs(options: dict[str, Any]) -> None:
    engine = start(options)
    assert not engine.store_objects([engine.key(1)], [object()]).is_successful()
    assert not engine.store_objects([engine.key(1), engine.key(2)], [engine.object(content(1))]).is_successful()
    assert engine.load_objects([engine.key(1)], [object()]) == [False]
    engine.store([1])
    assert engine.lookup([1]) == 1
    engine.stop()


# --- keys, accounts, status ---------------------------------------------------------------------------------------------------


def test_deleted_objects_are_gone_and_told(options: dict[str, Any]) -> None:
    engine = start(options)
    engine.store(PREFIX)
    engine.adapter.delete([engine.key(0), engine.key(1), engine.key(999)])
    assert eventually(lambda: engine.lookup(PREFIX) == 0)
    deleted = lambda: [pair for what, *told in engine.adapter.told if what == "deleted" for pair in zip(*told, strict=True)]  # noqa: E731
    # together, or one by one where a lookup noticed first; each once
    assert eventually(lambda: sorted(size for _, size in deleted()) == [BLOCK_BYTES] * 2)
    assert {key for key, _ in deleted()} == {engine.key(0), engine.key(1)}
    assert ("stored", [engine.key(block) for block in PREFIX], [BLOCK_BYTES] * len(PREFIX)) in engine.adapter.told
    assert all(data is not None for data in engine.load(PREFIX[2:]))
    engine.stop()


def test_keys_are_listed_by_page_and_model(options: dict[str, Any]) -> None:
    engine = start(options)
    engine.store(PREFIX)
    engine.store_objects([ObjectKey(b"x", "another", kv_rank(0, 1))], [engine.object(content(0))])
    seen, cursor = [], None
    while True:
        page = engine.adapter.list_l2_keys(model_name="model", page_size=3, cursor=cursor)
        seen += [entry.key for entry in page.entries]
        assert all(entry.size_bytes == BLOCK_BYTES for entry in page.entries)
        cursor = page.next_page_token
        if cursor is None:
            break
    assert seen == [engine.key(block).to_encoded_object_key() for block in PREFIX]
    for wrong in ({"page_size": 0}, {"cursor": "x"}):
        with pytest.raises(ValueError):
            engine.adapter.list_l2_keys(**wrong)
    engine.stop()


def test_status_tells_of_the_store(options: dict[str, Any], tmp_path: Path) -> None:
    engine = start(options)
    status = engine.adapter.report_status()
    assert status["is_healthy"] and status["role"] == "writer" and status["capacity_bytes"] == 256 << 20
    engine.stop()
    (tmp_path / "file").write_text("no folder")
    engine = start(options | {"path": os.fspath(tmp_path / "file")})
    status = engine.adapter.report_status()
    assert not status["is_healthy"] and status["reason"]
    engine.stop()


@pytest.mark.parametrize(
    "wrong",
    [{"capacty": "1GiB"}, {"load_timeout_s": 0}, {"serialized": "yes"}, {"serialized_bytes_max": 0.5}, {"revision": 3}, {"path": ""}],
)
def test_wrong_settings_stop_the_server_at_its_start(options: dict[str, Any], wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig):
        adapter_class(standin())(options | wrong)


# --- what a serde makes -------------------------------------------------------------------------------------------------------


def test_serialized_objects_come_back_to_the_front_of_longer_buffers(options: dict[str, Any]) -> None:
    engine = start(options | {"serialized": True, "serialized_bytes_max": 1 << 20})
    lengths = [1000, 5000, 4096]
    keys = [engine.key(number) for number in range(3)]
    stored = [memory_object(content(number)[:length], [(length,)], [torch.uint8]) for number, length in enumerate(lengths)]
    assert engine.store_objects(keys, stored) == sum(lengths)
    assert all(engine.look_up(keys))
    buffers = [memory_object(None, [(6000,)], [torch.uint8]) for _ in keys]
    assert all(engine.load_objects(keys, buffers))
    for number, length in enumerate(lengths):
        assert np.array_equal(np.frombuffer(buffers[number].byte_array, np.uint8)[:length], content(number)[:length])
    assert engine.load_objects(keys[:2], [memory_object(None, [(900,)], [torch.uint8]) for _ in range(2)]) == [False, False]
    engine.adapter.submit_unlock(keys)
    engine.stop()


# --- identity -----------------------------------------------------------------------------------------------------------------


def test_keys_never_collide() -> None:
    fields = [b"", b"a", b"aa", b"a" * 300, b"a" * 301, b"\x01\x00\x00\x00a"]
    made = [packed_key(kind, one, two) for kind in (b"o", b"i") for one in fields for two in fields]
    assert len(set(made)) == len(made)
    assert all(1 <= len(key) <= 255 for key in made)
    assert object_key(ObjectKey(b"ab", "m", 0, 0, "c")) != object_key(ObjectKey(b"a", "m", 0, 0, "bc"))


def test_engine_keys_differ_by_hash_tags_and_layer() -> None:
    from types import SimpleNamespace

    keys = [
        engine_key(SimpleNamespace(chunk_hash=chunk, tags=tags, **more))
        for chunk in (0, 1, -1, 255, 1 << 63, -(1 << 63), b"\x01")
        for tags in (None, (("user", "a"),), (("user", "b"),), (("user", "a"), ("x", "y")), (('user", "a', ""),))
        for more in ({}, {"layer_id": 0}, {"layer_id": 1})
    ]
    assert len(set(keys)) == len(keys)


def test_everything_that_the_bytes_depend_on_makes_another_namespace() -> None:
    layout = Layout.of([SHAPE], [torch.bfloat16])
    key = ObjectKey(b"h", "m", kv_rank(0, 1))
    made = [
        object_namespace(key, layout, "r"),
        object_namespace(ObjectKey(b"h", "n", kv_rank(0, 1)), layout, "r"),
        object_namespace(ObjectKey(b"h", "m", kv_rank(0, 2)), layout, "r"),
        object_namespace(ObjectKey(b"h", "m", kv_rank(1, 2)), layout, "r"),
        object_namespace(ObjectKey(b"h", "m", kv_rank(0, 1), 1), layout, "r"),
        object_namespace(key, Layout.of([SHAPE], [torch.float16]), "r"),
        object_namespace(key, Layout.of([(2, 8, 1024, 16)], [torch.bfloat16]), "r"),
        object_namespace(key, Layout.of([SHAPE, SHAPE], [torch.bfloat16, torch.uint8]), "r"),
        object_namespace(key, layout, "s"),
        object_namespace(key, None, "r"),
    ]
    assert len({namespace.digest for namespace in made}) == len(made)
    assert object_namespace(ObjectKey(b"other", "m", kv_rank(0, 1), 0, "salt"), layout, "r").digest == made[0].digest
    assert made[0].tokens_per_block == 16 and made[3].tp_rank == 1


def test_weights_swapped_at_the_same_path_are_other_weights(options: dict[str, Any], tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(bytes(100))
    engine = start(options, model=os.fspath(weights))
    engine.store(PREFIX)
    engine.stop()
    engine = start(options, model=os.fspath(weights))
    assert engine.lookup(PREFIX) == len(PREFIX)
    engine.stop()
    (weights / "model.safetensors").write_bytes(bytes(101))
    engine = start(options, model=os.fspath(weights))
    assert engine.lookup(PREFIX) == 0
    engine.stop()


def test_a_given_revision_stands_for_all_models() -> None:
    assert Revisions("7").of("a") == Revisions("7").of("b") == "7"
    assert Revisions(None).of("a") != Revisions(None).of("b")
