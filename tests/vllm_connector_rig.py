"""A stand-in for vLLM that drives both sides of the connector in the order in which vLLM 0.32.0 does."""

from __future__ import annotations

import itertools
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adapter_conformance import WAIT_S
from kvlode import DiskStore
from kvlode.adapters import attached
from kvlode.adapters.vllm_connector import KvlodeConnector
from kvlode.engine.index import Index
from kvlode.engine.testing import open_on_device
from kvlode.gds.device import Device
from model import block_bytes

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


def on_one_device(monkeypatch: pytest.MonkeyPatch, device: Device, index: Index | None = None) -> dict[str, Any]:
    """Settings by which both sides use one store on this device: a registry of folders makes it so outside the tests."""
    opened: list[DiskStore] = []

    def open_there(path: str, config: Any) -> DiskStore:
        if not opened or opened[-1]._opened.closing:
            opened.append(open_on_device(device, index=index))
            return opened[-1]
        return DiskStore(opened[-1]._opened)

    monkeypatch.setattr(attached, "open_store", open_there)
    monkeypatch.setattr(attached, "follow_store", open_there)
    return {"path": "/store"}


def given_up(engine: StandIn) -> int:
    return int(engine.worker.store_stats()["connector"]["given_up_blocks"])


def assert_right(engine: StandIn, prefix: Sequence[int], *, count: int) -> None:
    """So many blocks from the front are there, and no wrong byte."""
    found = engine.load(prefix)
    assert [data is not None for data in found] == [True] * count + [False] * (len(prefix) - count)
    assert all(data is None or np.array_equal(data, content(block)) for block, data in zip(prefix, found, strict=True))


def overwrite(engine: StandIn, block_ids: Sequence[int]) -> None:
    """vLLM gives the memory to somebody else."""
    for block_id in block_ids:
        engine.write(block_id, np.full(BLOCK_BYTES, 0x77, np.uint8))
