"""The vLLM connector without vLLM: a stand-in drives both sides in the order in which vLLM 0.32.0 does."""

from __future__ import annotations

import itertools
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adapter_conformance import LOAD_TIMEOUT_S, PREFIX, WAIT_S, AdapterConformance
from kvlode import DiskStore, InvalidConfig
from kvlode.adapters import attached, vllm_connector
from kvlode.adapters.vllm_connector import KvlodeConnector
from kvlode.adapters.vllm_connector_layout import CacheLayout
from kvlode.adapters.vllm_connector_saves import Save, Saver
from kvlode.adapters.vllm_connector_worker import Settings, StepPlan, folder_of_rank
from kvlode.engine.blocks import view_block
from kvlode.engine.contract import PutState, PutStatus, Refusal
from kvlode.engine.index import Index
from kvlode.engine.index_memory import MemoryIndex
from kvlode.engine.testing import open_on_device
from kvlode.gds.device import Device
from kvlode.gds.late import LateDevice
from kvlode.gds.memory import MemoryDevice
from model import block_bytes
from rig import eventually

BLOCK_TOKENS, BLOCKS, LAYERS, HEADS, CONTENT = 16, 64, 4, 4, 1024
LAYER_BYTES = HEADS * BLOCK_TOKENS * CONTENT * 2
BLOCK_BYTES = LAYERS * LAYER_BYTES
_numbers = itertools.count()


class FullAttentionSpec:
    block_size = BLOCK_TOKENS


class SlidingWindowSpec:
    block_size = BLOCK_TOKENS


class Request:
    """What the connector reads of ``vllm.v1.request.Request``: each block is named by a small integer."""

    def __init__(self, prefix: Sequence[int], *, lora: Any = None) -> None:
        self.request_id = f"request-{next(_numbers)}"
        self.block_hashes = [block.to_bytes(32, "little") for block in prefix]
        self.num_tokens = len(prefix) * BLOCK_TOKENS + 1
        self.num_computed_tokens = 0
        self.lora_request = lora


class GivenBlocks:
    def __init__(self, block_ids: list[int]) -> None:
        self._block_ids = block_ids

    def get_block_ids(self) -> tuple[list[int], ...]:
        return (self._block_ids,)


def content(block: int) -> np.ndarray:
    return block_bytes(b"%d" % block, block, BLOCK_BYTES)


def make_caches(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {f"model.layers.{i}.attn": torch.zeros(BLOCKS, HEADS, BLOCK_TOKENS, CONTENT, dtype=dtype) for i in range(LAYERS)}


def vllm_config(
    options: Mapping[str, Any], *, model: str = "model", dtype: str = "bfloat16", world: int = 1, policy: str = "recompute"
) -> Any:
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=dict(options), kv_load_failure_policy=policy),
        model_config=SimpleNamespace(model=model, dtype=dtype, revision=None, hf_config=None, quantization=None, hf_overrides=None),
        cache_config=SimpleNamespace(cache_dtype="auto", prefix_caching_hash_algo="sha256", calculate_kv_scales=False),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=world,
            pipeline_parallel_size=1,
            data_parallel_size=1,
            data_parallel_rank=0,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
        ),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )


def cache_config(*kinds: type) -> Any:
    return SimpleNamespace(
        num_blocks=BLOCKS, kv_cache_groups=[SimpleNamespace(kv_cache_spec=kind()) for kind in kinds or (FullAttentionSpec,)]
    )


class StandIn:
    """vLLM's scheduler and model runner, as far as one request at a time needs them."""

    def __init__(self, config: Any, caches: dict[str, torch.Tensor], kinds: tuple[type, ...] = ()) -> None:
        self.caches = caches
        described = cache_config(*kinds)
        self.worker = KvlodeConnector(config, SimpleNamespace(name="WORKER"), described)
        self.worker.register_kv_caches(caches)
        self.scheduler = KvlodeConnector(config, SimpleNamespace(name="SCHEDULER"), described)
        facts = self.worker.get_handshake_metadata()
        if facts is not None:
            self.scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): pickle.loads(pickle.dumps(facts))})
        self.sent: set[str] = set()
        self.received: set[str] = set()
        self.failed: set[int] = set()

    # --- steps --------------------------------------------------------------------------------------------------------

    def step(
        self, request: Request | None = None, block_ids: Sequence[int] = (), compute: Sequence[int] = (), *, preempted: Sequence[str] = ()
    ) -> None:
        """One step: ``compute`` are the blocks that it computes for ``request``."""
        scheduled = {request.request_id: len(compute) * BLOCK_TOKENS} if request is not None and compute else {}
        state = SimpleNamespace(get_block_ids=lambda request_id: (list(block_ids),) if request_id in scheduled else None)
        output = SimpleNamespace(num_scheduled_tokens=scheduled, preempted_req_ids=set(preempted), kv_connector_block_state=state)
        plan = pickle.loads(pickle.dumps(self.scheduler.build_connector_meta(output)))
        worker = self.worker
        worker.handle_preemptions(plan)
        worker.bind_connector_metadata(plan)
        if request is not None and compute:
            first = request.num_computed_tokens // BLOCK_TOKENS
            for position, block in enumerate(compute, first):
                self.write(block_ids[position], content(block))
            request.num_computed_tokens += len(compute) * BLOCK_TOKENS
        worker.start_load_kv(None)
        worker.wait_for_save()
        sent, received = worker.get_finished(set())
        failed = worker.get_block_ids_with_load_errors()
        worker.clear_connector_metadata()
        self.scheduler.update_connector_output(SimpleNamespace(finished_recving=received, finished_sending=sent, invalid_block_ids=failed))
        self.sent |= sent or set()
        self.received |= received or set()
        self.failed |= failed

    def until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline_s, "the connector reports nothing"
            self.step()

    def finish(self, request: Request) -> None:
        keep, _ = self.scheduler.request_finished(request, [])
        if keep:
            self.until(lambda: request.request_id in self.sent)

    def matched(self, request: Request, computed_tokens: int = 0) -> int:
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            tokens, asynchronous = self.scheduler.get_num_new_matched_tokens(request, computed_tokens)
            if tokens is not None:
                assert asynchronous == bool(tokens)
                return tokens
        raise AssertionError("a lookup is never answered")

    def write(self, block_id: int, data: np.ndarray) -> None:
        for index, tensor in enumerate(self.caches.values()):
            layer = torch.from_numpy(data[index * LAYER_BYTES :][:LAYER_BYTES])
            tensor[block_id].view(torch.uint8).copy_(layer.view(HEADS, BLOCK_TOKENS, -1))

    def read(self, block_id: int) -> np.ndarray:
        return np.concatenate([tensor[block_id].reshape(-1).view(torch.uint8).numpy() for tensor in self.caches.values()])

    # --- as the suite wants it ------------------------------------------------------------------------------------------

    def store(self, prefix: Sequence[int]) -> None:
        request = Request(prefix)
        self.matched(request)
        block_ids = list(range(len(prefix)))
        self.scheduler.update_state_after_alloc(request, GivenBlocks(block_ids), 0)
        self.step(request, block_ids, prefix)
        self.finish(request)
        for block_id in block_ids:
            self.write(block_id, np.full(BLOCK_BYTES, 0x5A, np.uint8))  # vLLM gives the memory to somebody else

    def flush(self) -> None:
        if self.worker._worker is not None:
            self.worker._worker._attached.flush(WAIT_S)

    def lookup(self, prefix: Sequence[int]) -> int:
        request = Request(prefix)
        try:
            return self.matched(request) // BLOCK_TOKENS
        finally:
            self.finish(request)

    def load(self, prefix: Sequence[int]) -> list[np.ndarray | None]:
        request = Request(prefix)
        self.scheduler.get_num_new_matched_tokens(request, 0)
        block_ids = list(range(BLOCKS - len(prefix), BLOCKS))
        self.failed = set()
        self.scheduler.update_state_after_alloc(request, GivenBlocks(block_ids), len(prefix) * BLOCK_TOKENS)
        self.until(lambda: request.request_id in self.received)
        self.finish(request)
        return [None if block_id in self.failed else self.read(block_id).copy() for block_id in block_ids]

    def stop(self) -> None:
        self.worker.shutdown()
        self.scheduler.shutdown()


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
        """As the base, with one store for both sides: a registry of folders makes it so outside the tests."""
        opened: list[DiskStore] = []

        def open_there(path: str, config: Any) -> DiskStore:
            if not opened or opened[-1]._opened.closing:
                opened.append(open_on_device(device, index=index))
                return opened[-1]
            return DiskStore(opened[-1]._opened)

        monkeypatch.setattr(attached, "open_store", open_there)
        monkeypatch.setattr(attached, "follow_store", open_there)
        return {"path": "/store"}


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


# --- an index that hangs ----------------------------------------------------------------------------------------------------------


class HangingIndex(MemoryIndex):
    """From ``hang`` on the ``calls``-th question and those after it are not answered before ``answer``."""

    def __init__(self) -> None:
        super().__init__()
        self._calls_left: int | None = None
        self._answering = threading.Event()
        self.asked = threading.Event()

    def hang(self, calls: int = 1) -> None:
        self._calls_left = calls

    def answer(self) -> None:
        self._answering.set()

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if self._calls_left is not None and threading.current_thread().name == "kvlode-vllm-saves":
            self._calls_left -= 1
        if self._calls_left is not None and self._calls_left <= 0:
            self.asked.set()
            assert self._answering.wait(WAIT_S)
        return super().get_many(keys)


class Hanging:
    """An engine on an index that can hang. No call of the model's thread may take longer than ``CALL_S``."""

    CALL_S = 1.0
    TIMEOUT_S = 0.2

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.index = HangingIndex()
        worker = "kvlode.adapters.vllm_connector_worker."
        monkeypatch.setattr(worker + "PREEMPTION_TIMEOUT_S", self.TIMEOUT_S)
        monkeypatch.setattr(worker + "DRAIN_TIMEOUT_S", self.TIMEOUT_S)
        monkeypatch.setattr(worker + "CLOSE_TIMEOUT_S", self.TIMEOUT_S)
        monkeypatch.setattr("kvlode.adapters.vllm_connector_saves.STOP_S", self.TIMEOUT_S)
        place = TestConnector().on_device(monkeypatch, MemoryDevice(), index=self.index)
        self.engine = StandIn(vllm_config(place | {"store_timeout_s": self.TIMEOUT_S} | options), make_caches())
        for name in ("handle_preemptions", "start_load_kv", "wait_for_save", "get_finished", "get_block_ids_with_load_errors"):
            monkeypatch.setattr(self.engine.worker, name, self._in_time(getattr(self.engine.worker, name)))

    def _in_time(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            started_s = time.monotonic()
            answer = call(*args)
            assert time.monotonic() - started_s < self.CALL_S
            return answer

        return timed

    def begin(self, prefix: Sequence[int] = PREFIX) -> Request:
        """A request that has computed its blocks, in a step that gave their stores out."""
        request = Request(prefix)
        self.engine.scheduler._scheduler._track(request)
        self.engine.step(request, list(range(len(prefix))), prefix)
        return request

    def stalled(self) -> bool:
        return self.engine.worker._worker._saver.stalled(self.TIMEOUT_S)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    hanging = Hanging(monkeypatch)
    yield hanging
    hanging.index.answer()
    hanging.engine.stop()


def overwrite(engine: StandIn, block_ids: Sequence[int]) -> None:
    """vLLM gives the memory to somebody else."""
    for block_id in block_ids:
        engine.write(block_id, np.full(BLOCK_BYTES, 0x77, np.uint8))


def given_up(engine: StandIn) -> int:
    return int(engine.worker.store_stats()["connector"]["given_up_blocks"])


def assert_right(engine: StandIn, prefix: Sequence[int], *, count: int) -> None:
    """So many blocks from the front are there, and no wrong byte."""
    found = engine.load(prefix)
    assert [data is not None for data in found] == [True] * count + [False] * (len(prefix) - count)
    assert all(data is None or np.array_equal(data, content(block)) for block, data in zip(prefix, found, strict=True))


@pytest.mark.parametrize("preempted", [False, True])
def test_stores_that_the_index_holds_up_are_given_up_and_never_found(hanging: Hanging, preempted: bool) -> None:
    engine = hanging.engine
    hanging.index.hang()
    request = hanging.begin()
    assert hanging.index.asked.wait(WAIT_S)
    if preempted:
        engine.step(preempted=[request.request_id])
    else:
        engine.finish(request)
    overwrite(engine, range(8))
    assert given_up(engine) == len(PREFIX)
    hanging.index.answer()
    assert eventually(lambda: engine.worker._worker._saver.idle)
    engine.flush()
    assert_right(engine, PREFIX, count=0)


def test_blocks_that_were_copied_before_the_index_hung_are_right_whatever_comes_into_their_memory(hanging: Hanging) -> None:
    engine = hanging.engine
    hanging.index.hang(calls=2)  # asked which blocks are there it answers, and then hangs in the put
    request = hanging.begin()
    assert hanging.index.asked.wait(WAIT_S)
    engine.finish(request)
    overwrite(engine, range(8))
    assert given_up(engine) == 0
    hanging.index.answer()
    assert eventually(lambda: engine.worker._worker._saver.idle)
    assert_right(engine, PREFIX, count=len(PREFIX))


def test_where_nothing_gets_on_no_step_waits_for_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = Hanging(monkeypatch, store_timeout_s=WAIT_S)
    engine, saver = hanging.engine, hanging.engine.worker._worker._saver
    hanging.index.hang()
    request = hanging.begin()
    assert eventually(hanging.stalled)
    timeouts_s: list[float] = []
    monkeypatch.setattr(saver, "wait", lambda condition, timeout_s: timeouts_s.append(timeout_s))
    worker = engine.worker._worker
    worker.handle_preemptions(StepPlan(preempted=frozenset([request.request_id])))
    assert timeouts_s == [0.0]
    assert given_up(engine) == len(PREFIX)
    monkeypatch.undo()
    hanging.index.answer()
    engine.stop()


def test_where_nothing_gets_on_no_more_stores_are_taken_until_it_does(hanging: Hanging) -> None:
    engine = hanging.engine
    hanging.index.hang()
    hanging.begin()
    assert eventually(hanging.stalled)
    engine.step()
    assert given_up(engine) == len(PREFIX), "of a request that is still running"
    hanging.begin(range(100, 104))
    assert engine.worker.store_stats()["connector"]["refused_blocks"] == 4
    hanging.index.answer()
    assert eventually(lambda: engine.worker._worker._saver.idle)
    engine.store(PREFIX)
    assert_right(engine, PREFIX, count=len(PREFIX))


def test_a_queue_that_is_full_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlode.adapters.vllm_connector_saves.QUEUED_MAX", 1)
    hanging = Hanging(monkeypatch, store_timeout_s=WAIT_S)
    hanging.index.hang()
    hanging.begin()
    assert hanging.index.asked.wait(WAIT_S)
    queued, refused = hanging.begin(range(100, 104)), hanging.begin(range(200, 203))
    assert hanging.engine.worker.store_stats()["connector"]["refused_blocks"] == 3
    hanging.engine.finish(refused)
    hanging.index.answer()
    hanging.engine.finish(queued)
    hanging.engine.stop()


def test_a_reset_while_the_index_hangs_forgets_what_was_stored_and_what_was_on_its_way(hanging: Hanging) -> None:
    engine = hanging.engine
    engine.store(PREFIX[:4])
    hanging.index.hang(calls=2)
    hanging.begin()
    assert hanging.index.asked.wait(WAIT_S)
    old = engine.worker._worker.space
    assert engine.scheduler.reset_cache() is True
    engine.step()
    assert all(found is None for found in engine.load(PREFIX)), "the new namespace is not there yet"
    hanging.index.answer()
    assert eventually(lambda: engine.worker._worker.space is not None)
    assert old is not None and not any(old.contains([block.to_bytes(32, "little") for block in PREFIX]))
    engine.store(PREFIX)
    assert_right(engine, PREFIX, count=len(PREFIX))


def test_a_shutdown_while_the_index_hangs_ends_in_time_and_nothing_is_stored_after_it(hanging: Hanging) -> None:
    engine = hanging.engine
    hanging.index.hang()
    hanging.begin()
    hanging.begin(range(100, 104))
    assert hanging.index.asked.wait(WAIT_S)
    saver, space = engine.worker._worker._saver, engine.scheduler._scheduler._spaces[0]
    started_s = time.monotonic()
    engine.worker.shutdown()
    assert time.monotonic() - started_s < 10 * hanging.TIMEOUT_S
    assert sum(saver.counts().values()) == len(PREFIX) + 4, "the second is refused where the machine is slow"
    overwrite(engine, range(8))
    hanging.index.answer()
    assert eventually(lambda: not saver._thread.is_alive())
    assert not any(space.contains([block.to_bytes(32, "little") for block in (*PREFIX, *range(100, 104))]))


class RefusingSpace:
    """Refuses every put, and keeps what it was lent as a store does that failed half way."""

    def __init__(self, reason: Refusal) -> None:
        self.statuses = [PutStatus(PutState.REFUSED, reason)]
        self.lent: list[np.ndarray] = []

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [False] * len(keys)

    def submit_put(self, keys: Sequence[bytes], blocks: Sequence[np.ndarray], *, queue: Any, **options: Any) -> Any:
        self.lent += blocks
        queue.push(self)
        return self


@pytest.mark.parametrize(("reason", "puts"), [(Refusal.STORE_FAILED, 3), (Refusal.READ_ONLY, 1)])
def test_memory_that_a_failed_put_may_still_have_is_not_used_again_and_a_reader_puts_no_more(reason: Refusal, puts: int) -> None:
    space: Any = RefusingSpace(reason)
    saver = Saver(space, block_bytes=BLOCK_BYTES, memory_bytes=BLOCK_BYTES, device=torch.device("cpu"))
    for block in range(3):
        assert saver.submit(Save("request", [b"%d" % block], [[content(block)]]), WAIT_S)
    assert saver.wait(lambda: saver.idle, WAIT_S)
    assert len(space.lent) == puts
    assert all(np.array_equal(data, content(block)) for block, data in enumerate(space.lent))
    assert saver.close(WAIT_S)


def test_what_is_withdrawn_while_it_is_copied_is_not_put(monkeypatch: pytest.MonkeyPatch) -> None:
    space: Any = RefusingSpace(Refusal.BUFFER_FULL)
    saver = Saver(space, block_bytes=BLOCK_BYTES, memory_bytes=BLOCK_BYTES, device=torch.device("cpu"))
    save = Save("request", [b"key"], [[content(0)]])
    lost: list[int] = []

    def view(*arguments: Any, **options: Any) -> Any:
        lost.append(saver.withdraw([save]))
        return view_block(*arguments, **options)

    monkeypatch.setattr("kvlode.adapters.vllm_connector_saves.view_block", view)
    assert saver.submit(save, WAIT_S)
    assert saver.wait(lambda: saver.idle, WAIT_S)
    assert (lost, space.lent) == ([1], [])
    assert saver.close(WAIT_S)


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
