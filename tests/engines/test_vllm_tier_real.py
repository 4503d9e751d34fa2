"""The secondary tier under vLLM's real manager: real spec, factory, primary tier in shared memory; no GPU, so no worker.

Run in the environment that ``tests/engines/requirements-vllm.txt`` makes.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter_conformance import LOAD_TIMEOUT_S, PREFIX, WAIT_S, AdapterConformance
from kvlode.tools.damage import damage_payloads
from model import block_bytes

pytestmark = pytest.mark.engines

pytest.importorskip("vllm.v1.kv_offload.tiering.spec", reason="vLLM is not installed here", exc_type=ImportError)

from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key  # noqa: E402
from vllm.v1.kv_offload.config import (  # noqa: E402
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.base import SecondaryTierManager  # noqa: E402
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec  # noqa: E402

WORKER_BYTES = 60_000
"""No multiple of a page: a row is longer than the blocks in it."""
CHUNKS = 32
STEP_S = 0.0005
STEP_END = ScheduleEndContext(new_req_ids=(), preempted_req_ids=())


def content(block: int) -> np.ndarray:
    return block_bytes(b"%d" % block, block, WORKER_BYTES)


def key_of(block: int, group: int = 0) -> Any:
    return make_offload_key(block.to_bytes(32, "little"), group)


def tier_config(options: dict[str, Any]) -> dict[str, Any]:
    return {"type": "KvlodeTier", "module_path": "kvlode.adapters.vllm_tier", **options}


def offloading_config(
    options: dict[str, Any], *, model: str = "model", dtype: str = "bfloat16", world: int = 1, events: bool = False
) -> OffloadingConfig:
    return OffloadingConfig(
        groups=(OffloadingGroupConfig(tokens_per_block=16, layer_names=("layer.0", "layer.1"), group_id=0),),
        worker_kv_bytes_per_block=WORKER_BYTES // world,
        enable_kv_cache_events=events,
        extra_config={"cpu_bytes_to_use": CHUNKS * 61_440, "secondary_tiers": [tier_config(options)]},
        engine_id=uuid.uuid4().hex,
        model=OffloadingModelConfig(name=model, dtype=dtype),
        cache=OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=1),
        parallel=OffloadingParallelConfig(
            rank=0,
            world_size=world,
            tp_size=world,
            pp_size=1,
            pcp_size=1,
            dcp_size=1,
            data_parallel_index=0,
            data_parallel_size=1,
            data_parallel_rank_local=None,
            is_parallelism_agnostic=False,
        ),
    )


class ManagedEngine:
    """vLLM's scheduler as far as its offloading manager sees it; the GPU's part is done by hand, in the primary tier's rows."""

    def __init__(self, options: dict[str, Any], **values: Any) -> None:
        # "keep": the way to make the manager forget its own copies is a reset of its cache
        self.spec = TieringOffloadingSpec(offloading_config({"on_reset": "keep"} | options, **values))
        self.manager: Any = self.spec.get_manager()
        self.tier: Any = self.manager.secondary_tiers[0]
        self._requests = itertools.count()

    def rows(self) -> np.ndarray:
        return np.frombuffer(self.manager.primary_tier.get_kv_memoryview(), np.uint8).reshape(CHUNKS, -1)

    def request(self) -> ReqContext:
        context = ReqContext(req_id=f"request {next(self._requests)}")
        self.manager.on_new_request(context)
        return context

    def step(self) -> None:
        self.manager.on_schedule_end(STEP_END)
        time.sleep(STEP_S)

    def until(self, met: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not met():
            assert time.monotonic() < deadline_s, "it does not come about"
            self.step()

    def settle(self) -> None:
        self.until(lambda: not self.manager.has_pending_work())

    def forget_primary(self) -> None:
        """Nothing may come from the primary tier; this is also what a weight update does."""
        self.manager.reset_cache()
        getattr(self.manager, "on_reset_flushed", lambda: None)()

    def answers(self, keys: Sequence[Any], context: ReqContext) -> dict[Any, LookupResult]:
        """HIT or MISS of each key; a scheduler asks for all that it needs, in every step anew."""
        answers: dict[Any, LookupResult] = {}

        def answered() -> bool:
            answers.update({key: self.manager.lookup(key, context) for key in keys})
            return all(answer in (LookupResult.HIT, LookupResult.MISS) for answer in answers.values())

        self.until(answered)
        return answers

    # --- as the conformance suite has it --------------------------------------------------------------------------

    def store(self, prefix: Sequence[int]) -> None:
        context = self.request()
        keys = [key_of(block) for block in prefix]
        prepared = self.manager.prepare_store(keys, context)
        assert prepared is not None
        blocks = dict(zip(keys, prefix, strict=True))
        rows = self.rows()
        chunks = prepared.store_spec.chunk_ids if hasattr(prepared.store_spec, "chunk_ids") else prepared.store_spec.block_ids
        for key, chunk in zip(prepared.keys_to_store, chunks, strict=True):
            rows[chunk, :WORKER_BYTES] = content(blocks[key])
        del rows
        self.manager.complete_store(prepared.keys_to_store, context)
        self.manager.on_request_finished(context)
        self.settle()
        self.forget_primary()
        self.rows()[:] = 0x5A

    def flush(self) -> None:
        self.tier._attached.flush(WAIT_S)

    def lookup(self, prefix: Sequence[int]) -> int:
        found = [data is not None for data in self.load(prefix)]
        return found.index(False) if False in found else len(found)

    def load(self, prefix: Sequence[int]) -> list[np.ndarray | None]:
        context = self.request()
        keys = [key_of(block) for block in prefix]
        found: list[np.ndarray | None] = []
        for key, answer in self.answers(keys, context).items():
            if answer is LookupResult.MISS:
                found.append(None)
                continue
            spec = self.manager.prepare_load([key], context)
            chunk = int((spec.chunk_ids if hasattr(spec, "chunk_ids") else spec.block_ids)[0])
            found.append(np.array(self.rows()[chunk, :WORKER_BYTES]))
            self.manager.complete_load([key], context)
        self.manager.on_request_finished(context)
        self.settle()
        self.forget_primary()
        return found

    def stop(self) -> None:
        region = self.manager.primary_tier._mmap_region
        self.manager.shutdown()
        assert region.mmap_obj is None, "the primary tier's memory could not be unmapped: a view of it was kept"


class TestUnderTheRealManager(AdapterConformance):
    takes_sets = True

    def start(
        self, options: dict[str, Any], *, model: str = "model", dtype: str = "bfloat16", rank: int = 0, world: int = 1
    ) -> ManagedEngine:
        quick = {"load_timeout_s": LOAD_TIMEOUT_S, "flush_after_s": 0.01}
        return ManagedEngine(options | quick, model=model, dtype=dtype, world=world)

    def content(self, block: int) -> np.ndarray:
        return content(block)


def test_the_factory_finds_the_class(options: dict[str, Any]) -> None:
    from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

    found = SecondaryTierFactory.get_tier_class(tier_config(options))
    assert issubclass(found, SecondaryTierManager)
    assert not found.__abstractmethods__
    assert found.medium is not None
    assert getattr(found, "cache_hit_source", None) is not None
    definitions = TieringOffloadingSpec.build_metric_definitions({"secondary_tiers": [tier_config(options)]})
    assert "vllm:kv_offload_kvlode_load_failures" in definitions


def test_metrics_reach_the_manager(options: dict[str, Any]) -> None:
    engine = ManagedEngine(options)
    engine.store(PREFIX)
    engine.stop()
    damage_payloads(Path(options["path"]))
    engine = ManagedEngine(options)
    assert engine.lookup(PREFIX) == 0
    found = engine.manager.get_stats().reduce()
    assert found["vllm:kv_offload_kvlode_load_failures:('KvlodeTier', 'corrupt')"] == len(PREFIX)
    assert found["vllm:kv_offload_tiering_promotion_job_failures:('1:KvlodeTier',)"] >= 1
    engine.stop()


def test_a_failed_load_is_not_tried_again_by_its_request(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ManagedEngine(options)
    engine.store([1])
    engine.flush()
    for path in sorted(Path(options["path"], "segments").glob("*.seg")):
        path.write_bytes(b"\0" * path.stat().st_size)
    submitted: list[int] = []
    real = engine.tier.submit_load
    monkeypatch.setattr(engine.tier, "submit_load", lambda job: (submitted.append(job.job_id), real(job)))
    context = engine.request()
    assert engine.answers([key_of(1)], context) == {key_of(1): LookupResult.MISS}
    for _ in range(20):
        assert engine.manager.lookup(key_of(1), context) is LookupResult.MISS
        engine.step()
    assert len(submitted) == 1
    engine.manager.on_request_finished(context)
    engine.stop()


def test_events_reach_the_manager(options: dict[str, Any]) -> None:
    engine = ManagedEngine(options | {"enable_kv_events": True, "locality": "LOCAL"}, events=True)
    engine.store([1, 2])
    told = [event for event in engine.manager.take_events() if event.medium is engine.tier.medium]
    assert sorted(key for event in told for key in event.keys) == sorted([key_of(1), key_of(2)])
    assert not any(event.removed for event in told)
    engine.stop()


def test_a_wrong_setting_is_an_error_of_the_engine_start(options: dict[str, Any]) -> None:
    from kvlode import InvalidConfig

    with pytest.raises(InvalidConfig, match="capacty"):
        ManagedEngine(options | {"capacty": "1GiB"})
