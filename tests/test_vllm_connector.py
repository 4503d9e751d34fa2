"""The vLLM connector without vLLM: a stand-in drives both sides in the order in which vLLM 0.32.0 does."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adapter_conformance import LOAD_TIMEOUT_S, PREFIX, WAIT_S, AdapterConformance
from kvlode import InvalidConfig
from kvlode.adapters import vllm_connector
from kvlode.adapters.vllm_connector import KvlodeConnector
from kvlode.adapters.vllm_connector_layout import CacheLayout
from kvlode.adapters.vllm_connector_worker import Settings, StepPlan, folder_of_rank
from kvlode.engine.index import Index
from kvlode.gds.device import Device
from kvlode.gds.late import LateDevice
from kvlode.gds.memory import MemoryDevice
from rig import eventually
from vllm_connector_rig import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    FullAttentionSpec,
    GivenBlocks,
    Request,
    SlidingWindowSpec,
    StandIn,
    assert_right,
    cache_config,
    content,
    given_up,
    make_caches,
    on_one_device,
    overwrite,
    vllm_config,
)


class TestConnector(AdapterConformance):
    @pytest.fixture(autouse=True)
    def no_real_ranks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def start(self, options: dict[str, Any], *, model: str = "model", dtype: str = "bfloat16", rank: int = 0, world: int = 1) -> StandIn:
        self._monkeypatch.setattr(vllm_connector, "_rank", lambda: (rank, 0))
        config = vllm_config(options | {"load_timeout_s": LOAD_TIMEOUT_S, "flush_after_s": 0.02}, model=model, dtype=dtype, world=world)
        return StandIn(config, make_caches(getattr(torch, dtype)))

    def content(self, block: int) -> np.ndarray:
        return content(block)

    def on_device(self, monkeypatch: pytest.MonkeyPatch, device: Device, index: Index | None = None) -> dict[str, Any]:
        return on_one_device(monkeypatch, device, index)


# --- a request's life -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(options: dict[str, Any]) -> Iterator[StandIn]:
    engine = StandIn(vllm_config(options), make_caches())
    yield engine
    engine.stop()


def plan_of(engine: StandIn, request: Request, block_ids: Sequence[int], tokens: int) -> StepPlan:
    state = SimpleNamespace(get_block_ids=lambda request_id: (list(block_ids),))
    output = SimpleNamespace(num_scheduled_tokens={request.request_id: tokens}, preempted_req_ids=set(), kv_connector_block_state=state)
    return engine.scheduler.build_connector_meta(output)


def test_at_least_one_token_is_left_to_compute(engine: StandIn) -> None:
    engine.store(PREFIX)
    whole = Request(PREFIX)
    whole.num_tokens = len(PREFIX) * BLOCK_TOKENS
    assert engine.matched(whole) == (len(PREFIX) - 1) * BLOCK_TOKENS


def test_what_the_local_cache_has_is_not_loaded(engine: StandIn) -> None:
    engine.store(PREFIX)
    request = Request(PREFIX)
    assert engine.matched(request, 3 * BLOCK_TOKENS) == (len(PREFIX) - 3) * BLOCK_TOKENS
    block_ids = list(range(20, 20 + len(PREFIX)))
    engine.scheduler.update_state_after_alloc(request, GivenBlocks(block_ids), 5 * BLOCK_TOKENS)
    engine.until(lambda: request.request_id in engine.received)
    right = [np.array_equal(engine.read(block_id), content(block)) for block_id, block in zip(block_ids, PREFIX, strict=True)]
    assert right == [False] * 3 + [True] * 5


def test_a_long_prefix_is_looked_up_in_pieces(engine: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlode.adapters.vllm_connector_scheduler.ASK_KEYS_MAX", 3)
    engine.store(PREFIX)
    assert engine.lookup(PREFIX) == len(PREFIX)
    assert engine.lookup([*PREFIX[:5], 99, *PREFIX[5:]]) == 5


def test_chunks_of_a_prompt_are_stored_as_they_are_computed(engine: StandIn) -> None:
    request = Request(PREFIX)
    block_ids = list(range(len(PREFIX)))
    engine.matched(request)
    engine.scheduler.update_state_after_alloc(request, GivenBlocks(block_ids), 0)
    engine.step(request, block_ids, PREFIX[:3])
    plan = plan_of(engine, request, block_ids, 2 * BLOCK_TOKENS + 5)
    assert [(blocks.keys, blocks.block_ids) for blocks in plan.stores] == [(tuple(request.block_hashes[3:5]), (3, 4))]
    assert plan.stores[0].parent == request.block_hashes[2]
    assert plan_of(engine, request, block_ids, 1).stores == [], "nothing is full yet"


def test_blocks_that_a_load_failed_for_are_stored_when_they_are_computed(engine: StandIn) -> None:
    engine.store(PREFIX[:5])
    request = Request(PREFIX)
    assert engine.matched(request) == 5 * BLOCK_TOKENS
    block_ids = list(range(30, 30 + len(PREFIX)))
    engine.worker._worker.space.delete([request.block_hashes[3]])
    engine.scheduler.update_state_after_alloc(request, GivenBlocks(block_ids), 5 * BLOCK_TOKENS)
    engine.until(lambda: request.request_id in engine.received)
    assert engine.failed == {33}
    assert engine.matched(request) == 0, "what failed is not offered to the same request again"
    request.num_computed_tokens = 3 * BLOCK_TOKENS  # vLLM keeps the valid front
    engine.step(request, block_ids, PREFIX[3:])
    engine.finish(request)
    assert engine.lookup(PREFIX) == len(PREFIX)
    for block, found in zip(PREFIX, engine.load(PREFIX), strict=True):
        assert found is not None and np.array_equal(found, content(block))


def test_nothing_that_is_not_computed_is_stored_after_a_load_failed_and_the_local_cache_shrank(engine: StandIn) -> None:
    engine.store(PREFIX)
    request = Request(PREFIX)
    engine.matched(request, 4 * BLOCK_TOKENS)
    engine.scheduler.update_state_after_alloc(request, GivenBlocks(list(range(8))), 4 * BLOCK_TOKENS)
    engine.until(lambda: request.request_id in engine.received)
    request.num_computed_tokens = BLOCK_TOKENS
    plan = plan_of(engine, request, list(range(8)), BLOCK_TOKENS)
    assert [blocks.block_ids for blocks in plan.stores] == [(0, 1)]


def test_a_finished_request_keeps_its_blocks_until_they_are_copied() -> None:
    """There is memory for two copies, and they stay there while the drive writes nothing. The report comes once."""
    late = LateDevice(MemoryDevice(), holding=())
    with pytest.MonkeyPatch.context() as monkeypatch:
        engine = StandIn(vllm_config(TestConnector().on_device(monkeypatch, late) | {"buffer": 2 * BLOCK_BYTES}), make_caches())
        request = Request(PREFIX)
        engine.matched(request)
        engine.scheduler.update_state_after_alloc(request, GivenBlocks(list(range(8))), 0)
        late.hold("write")
        engine.step(request, list(range(8)), PREFIX)
        assert engine.scheduler.request_finished(request, []) == (True, None)
        assert late.wait_for_held(1)
        for _ in range(3):
            engine.step()
        assert engine.sent == set()
        late.hold()
        late.release()
        engine.until(lambda: request.request_id in engine.sent)
        assert_right(engine, PREFIX, count=len(PREFIX))
        engine.stop()


@pytest.mark.parametrize("preempted", [False, True])
def test_a_store_that_does_not_end_is_given_up_and_what_was_not_copied_is_never_found(
    preempted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = LateDevice(MemoryDevice(), holding=())
    options = TestConnector().on_device(monkeypatch, late)
    monkeypatch.setattr("kvlode.adapters.vllm_connector_worker.PREEMPTION_TIMEOUT_S", 0.1)
    engine = StandIn(vllm_config(options | {"store_timeout_s": 0.1, "buffer": 2 * BLOCK_BYTES}), make_caches())
    request = Request(PREFIX)
    engine.matched(request)
    engine.scheduler.update_state_after_alloc(request, GivenBlocks(list(range(8))), 0)
    late.hold("write")
    engine.step(request, list(range(8)), PREFIX)
    assert late.wait_for_held(1)
    if preempted:
        engine.step(preempted=[request.request_id])
        assert engine.scheduler.request_finished(request, []) == (False, None), "its blocks are gone already"
    else:
        engine.finish(request)
    overwrite(engine, range(8))
    assert given_up(engine) == len(PREFIX) - 2
    assert_right(engine, PREFIX, count=2)
    late.hold()
    late.release()
    engine.flush()
    assert_right(engine, PREFIX, count=2)
    engine.stop()


# --- more of a request's life -----------------------------------------------------------------------------------------------------


def test_a_preempted_request_waits_for_its_stores_before_its_blocks_go(engine: StandIn) -> None:
    request = Request(PREFIX)
    engine.matched(request)
    engine.scheduler.update_state_after_alloc(request, GivenBlocks(list(range(8))), 0)
    engine.step(request, list(range(8)), PREFIX)
    engine.step(preempted=[request.request_id])
    for block_id in range(8):
        engine.write(block_id, np.zeros(BLOCK_BYTES, np.uint8))
    assert engine.scheduler.request_finished(request, []) == (False, None)
    for block, found in zip(PREFIX, engine.load(PREFIX), strict=True):
        assert found is not None and np.array_equal(found, content(block))


def test_a_request_that_ends_while_it_loads_is_reported_once(engine: StandIn) -> None:
    engine.store(PREFIX)
    request = Request(PREFIX)
    engine.matched(request)
    engine.scheduler.update_state_after_alloc(request, GivenBlocks(list(range(8))), 8 * BLOCK_TOKENS)
    assert engine.scheduler.request_finished(request, []) == (False, None), "vLLM waits for the load by itself"
    engine.until(lambda: request.request_id in engine.received)
    for _ in range(3):
        engine.step()
    assert request.request_id not in engine.sent


def test_a_reset_forgets_every_block_and_keeps_out_what_was_computed_before(engine: StandIn) -> None:
    engine.store(PREFIX)
    old = Request(PREFIX)
    engine.scheduler.update_state_after_alloc(old, GivenBlocks(list(range(8))), 0)
    engine.step(old, list(range(8)), PREFIX[:4])
    assert engine.scheduler.reset_cache() is True
    assert engine.scheduler.has_pending_push_work()
    engine.step(old, list(range(8)), PREFIX[4:])
    assert not engine.scheduler.has_pending_push_work()
    engine.finish(old)
    engine.flush()
    assert engine.lookup(PREFIX) == 0
    engine.store(PREFIX)
    assert engine.lookup(PREFIX) == len(PREFIX)


def test_what_is_stored_after_a_reset_is_not_found_after_a_restart(options: dict[str, Any]) -> None:
    engine = StandIn(vllm_config(options), make_caches())
    assert engine.scheduler.reset_cache() is True
    engine.store(PREFIX)
    engine.flush()
    assert engine.lookup(PREFIX) == len(PREFIX)
    engine.stop()
    engine = StandIn(vllm_config(options), make_caches())
    assert engine.lookup(PREFIX) == 0
    engine.stop()


def test_short_hits_are_computed_where_that_is_wished(options: dict[str, Any]) -> None:
    engine = StandIn(vllm_config(options | {"min_load_tokens": 4 * BLOCK_TOKENS}), make_caches())
    engine.store(PREFIX)
    assert engine.lookup(PREFIX[:3]) == 0
    assert engine.lookup(PREFIX[:4]) == 4
    engine.stop()


def test_adapters_with_the_same_name_are_told_apart_by_their_files(engine: StandIn, tmp_path: Path) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(b"one")
    lora = SimpleNamespace(lora_name="a", lora_path=os.fspath(tmp_path))
    keys = engine.scheduler._scheduler._track(Request(PREFIX, lora=lora)).salt
    (tmp_path / "adapter.safetensors").write_bytes(b"other")
    assert engine.scheduler._scheduler._track(Request(PREFIX, lora=lora)).salt != keys != b""
    gone = SimpleNamespace(lora_name="b", lora_path=os.fspath(tmp_path / "gone"))
    assert engine.matched(Request(PREFIX, lora=gone)) == 0


def test_an_unanswered_lookup_is_a_miss_after_its_deadline(engine: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlode.adapters.vllm_connector_scheduler.LOOKUP_TIMEOUT_S", 0.05)
    engine.store(PREFIX)
    engine.flush()
    for space in engine.scheduler._scheduler._spaces:
        monkeypatch.setattr(space._space._core.lookups, "_resolve", lambda idents: 1 / 0)
    request = Request(PREFIX)
    assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
    assert eventually(lambda: engine.scheduler.get_num_new_matched_tokens(request, 0) == (0, False))


def test_every_worker_must_have_a_block(tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = vllm_config(options, world=2)
    workers = []
    for rank in (0, 1):
        monkeypatch.setattr(vllm_connector, "_rank", lambda rank=rank: (rank, 0))
        workers.append(KvlodeConnector(config, SimpleNamespace(name="WORKER"), cache_config()))
        workers[-1].register_kv_caches(make_caches())
    facts = [worker.get_handshake_metadata() for worker in workers]
    assert [Path(fact.folder).name for fact in facts] == ["tp0of2-pp0of1-dp0", "tp1of2-pp0of1-dp0"]
    request = Request(PREFIX)
    for worker, count in zip(workers, (5, 3), strict=True):
        space = worker._worker.space
        assert space.submit_put(request.block_hashes[:count], [content(block) for block in PREFIX[:count]]).wait(WAIT_S)
    scheduler = KvlodeConnector(config, SimpleNamespace(name="SCHEDULER"), cache_config())
    scheduler.set_xfer_handshake_metadata_pp_aware({(0, rank): fact for rank, fact in enumerate(facts)})
    found: list[Any] = []
    assert eventually(lambda: bool(found.append(scheduler.get_num_new_matched_tokens(request, 0)) or found[-1][0] is not None))
    assert found[-1] == (3 * BLOCK_TOKENS, True)
    for connector in (*workers, scheduler):
        connector.shutdown()


# --- settings and models ----------------------------------------------------------------------------------------------------------


def test_wrong_settings_stop_the_engine_at_its_start(tmp_path: Path) -> None:
    for options in ({}, {"path": os.fspath(tmp_path / "s"), "capacty": "1GiB"}):
        with pytest.raises(InvalidConfig):
            KvlodeConnector(vllm_config(options), SimpleNamespace(name="WORKER"), cache_config())


@pytest.mark.parametrize("kinds", [(SlidingWindowSpec,), (FullAttentionSpec, SlidingWindowSpec)])
def test_models_that_cannot_be_kept_run_without_the_store(options: dict[str, Any], kinds: tuple[type, ...]) -> None:
    engine = StandIn(vllm_config(options), make_caches(), kinds)
    assert engine.worker.get_handshake_metadata() is None
    assert engine.lookup(PREFIX) == 0
    engine.step()
    engine.stop()


def test_the_default_failure_policy_is_pointed_out(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    KvlodeConnector(vllm_config(options, policy="fail"), SimpleNamespace(name="SCHEDULER"), cache_config())
    assert "kv_load_failure_policy" in caplog.text


def test_one_writing_process_has_the_folder_for_itself() -> None:
    one = vllm_config({}).parallel_config
    assert folder_of_rank("store", one, (0, 0)) == "store"
    assert folder_of_rank("store", vllm_config({}, world=2).parallel_config, (1, 0)) == "store/tp1of2-pp0of1-dp0"


def test_it_is_a_cache_and_nothing_that_must_be_delivered(options: dict[str, Any]) -> None:
    connector = KvlodeConnector(vllm_config(options), SimpleNamespace(name="SCHEDULER"), cache_config())
    assert connector.requires_kv_delivery is False
    settings = Settings.parse({"path": "p", "load_timeout_s": 1.5, "capacity": "1GiB"})
    assert settings.load_timeout_s == 1.5
    assert settings.for_folder("f") == {"path": "f", "capacity": "1GiB"}


# --- layouts ----------------------------------------------------------------------------------------------------------------------

ORDERS = {
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}
"""vLLM's physical orders of layers, blocks, heads, tokens, content (``vllm/v1/kv_cache_layout.py``)."""


def laid_out(order: tuple[int, ...], shape: tuple[int, ...] = (3, 8, 2, 16, 4)) -> dict[str, torch.Tensor]:
    """One buffer in this physical order, seen as logical ``[B, H, N, C]`` tensors, one a layer."""
    physical = [shape[axis] for axis in order]
    buffer = torch.arange(int(np.prod(shape)), dtype=torch.int32).view(physical)
    logical = buffer.permute([order.index(axis) for axis in range(5)])
    return {f"layer {i}": logical[i] for i in range(shape[0])}


@pytest.mark.parametrize("name", ORDERS)
def test_a_block_is_all_its_bytes_and_no_other_whatever_the_order(name: str) -> None:
    caches = laid_out(ORDERS[name])
    layout = CacheLayout(caches, 8)
    for block_id in range(8):
        data = np.concatenate([np.asarray(part) for part in layout.block(block_id)]).view(np.int32)
        expected = np.concatenate([tensor[block_id].reshape(-1).numpy() for tensor in caches.values()])
        assert sorted(data) == sorted(expected)
    runs = {"LBHNC": 3, "LBNHC": 3, "LHBNC": 6, "BLHNC": 1, "BLNHC": 1, "BHLNC": 6}[name]
    assert len(layout.runs) == runs


def test_orders_that_differ_within_a_block_have_different_names() -> None:
    names = {name: CacheLayout(laid_out(order), 8).name for name, order in ORDERS.items()}
    assert names["LBHNC"] == names["BLHNC"] != names["LBNHC"] == names["BLNHC"]
    assert CacheLayout(laid_out(ORDERS["LBHNC"], (3, 16, 2, 16, 4)), 16).name == names["LBHNC"], "the number of blocks means nothing"
    assert CacheLayout(laid_out(ORDERS["LBHNC"], (4, 8, 2, 16, 4)), 8).name != names["LBHNC"]


def test_blocks_of_several_pages_and_layers_that_share_a_cache() -> None:
    tensor = torch.arange(16 * 2 * 4 * 4, dtype=torch.int32).view(16, 2, 4, 4)
    layout = CacheLayout({"a": tensor, "b": tensor}, 8)
    assert layout.block_bytes == 2 * 2 * 4 * 4 * 4
    assert np.array_equal(np.concatenate(layout.block(3)).view(np.int32), tensor[6:8].reshape(-1).numpy())
    with pytest.raises(IndexError):
        layout.block(8)


def test_caches_that_are_no_blocks_are_refused() -> None:
    with pytest.raises(InvalidConfig):
        CacheLayout({}, 8)
    with pytest.raises(InvalidConfig):
        CacheLayout({"a": torch.zeros(9, 2, 4, 4)}, 8)
