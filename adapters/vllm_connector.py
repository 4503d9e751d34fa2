"""KV connector for vLLM: blocks of its prefix cache outlive the process, in a store on a drive.

Loaded by vLLM under ``--kv-transfer-config`` with ``"kv_connector": "KvlodeConnector"`` and ``"kv_connector_module_path":
"kvlode.adapters.vllm_connector"``; ``kv_connector_extra_config`` holds ``path`` and whatever ``kvlode.open`` takes, and
``load_timeout_s``, ``store_timeout_s``, ``min_load_tokens`` and ``revision`` (see ``Settings``). Set ``"kv_load_failure_policy":
"recompute"``: with vLLM's default a block that cannot be loaded ends its request with an error.

The interface is ``KVConnectorBase_V1`` of ``vllm/distributed/kv_transfer/kv_connector/v1/base.py``, vLLM 0.32.0. vLLM makes two
instances: one in the scheduler's process (``vllm_connector_scheduler``) and one in each worker's (``vllm_connector_worker``); what
the first needs to know of the second comes with the handshake. Keys are vLLM's own hashes of a block and all tokens before it
(``Request.block_hashes``, one a block where there is one group of caches).
Models with one kind of full attention (or MLA) are kept; for others the connector says so and does nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .vllm_connector_scheduler import SchedulerSide
from .vllm_connector_worker import Settings, StepPlan, WorkerFacts, WorkerSide

logger = logging.getLogger("kvlode")

FULL_ATTENTION = "FullAttentionSpec"


class _NoVllm:
    """Base of the connector where vLLM is not installed: what the connector uses of the real one."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._connector_metadata: Any = None

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        self._connector_metadata = connector_metadata

    def clear_connector_metadata(self) -> None:
        self._connector_metadata = None


def _base() -> type:
    try:
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "vllm":
            raise
        return _NoVllm
    base: type = KVConnectorBase_V1
    return base


def _disk_source() -> Any:
    """``CacheHitSource.DISK``, for vLLM's metrics."""
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
    except ImportError:
        return "disk"
    return CacheHitSource.DISK


if TYPE_CHECKING:
    _Base = _NoVllm
else:
    _Base = _base()


class KvlodeConnector(_Base):
    """What vLLM instantiates; passes everything on to the side that it is. Only wrong settings raise."""

    _cache_hit_source = _disk_source()

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        settings = Settings.parse(transfer.kv_connector_extra_config or {})
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        parallel = vllm_config.parallel_config
        self._worker_count = int(parallel.tensor_parallel_size) * int(parallel.pipeline_parallel_size)
        block_tokens = _block_tokens(vllm_config, kv_cache_config)
        if block_tokens is None:
            return
        if role.name == "SCHEDULER":
            if getattr(transfer, "kv_load_failure_policy", "recompute") != "recompute":
                logger.warning("kv_load_failure_policy is not 'recompute': a block that cannot be loaded will fail its request")
            self._scheduler = SchedulerSide(settings, block_tokens=block_tokens)
        else:
            self._worker = WorkerSide(
                vllm_config, settings, block_count=int(kv_cache_config.num_blocks), block_tokens=block_tokens, rank=_rank()
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what is not stored is computed again."""
        return False

    # --- scheduler ----------------------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[tuple[int, int], Any]) -> None:
        if self._scheduler is None:
            return
        if len(metadata) < self._worker_count:
            counts = (len(metadata), self._worker_count)
            logger.error("%d of %d workers have a store, and each has a part of every block: nothing is kept", *counts)
            return
        self._scheduler.connect([metadata[rank] for rank in sorted(metadata)])

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        tokens = 0 if self._scheduler is None else self._scheduler.matched(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks.get_block_ids()[0] if num_external_tokens else (), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepPlan:
        return StepPlan() if self._scheduler is None else self._scheduler.plan(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.update(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduler is not None and self._scheduler.finished(request), None

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.has_news

    def reset_cache(self) -> bool | None:
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    # --- worker -------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        if self._worker is not None:
            self._worker.register(kv_caches)

    def get_handshake_metadata(self) -> WorkerFacts | None:
        return None if self._worker is None else self._worker.facts

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        if self._worker is not None:
            self._worker.handle_preemptions(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None and self._connector_metadata is not None:
            self._worker.start_loads(self._connector_metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: no request that waits for one is in the step."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Whole blocks are stored, after the step."""

    def wait_for_save(self) -> None:
        if self._worker is not None and self._connector_metadata is not None:
            self._worker.start_stores(self._connector_metadata)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        return self._worker.finished(self._connector_metadata or StepPlan())

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set() if self._worker is None else self._worker.take_failed_blocks()

    # --- both ---------------------------------------------------------------------------------------------------------

    def store_stats(self) -> Any:
        """The store's counters as this side has them, for logs and tests."""
        side = self._worker or self._scheduler
        return None if side is None else side.stats()

    def shutdown(self) -> None:
        side = self._worker or self._scheduler
        if side is not None and not side.shutdown():
            logger.warning("the store did not close in time; what was not flushed is computed again")


def _block_tokens(vllm_config: Any, kv_cache_config: Any) -> int | None:
    """Tokens of a block; ``None``, with a message, for caches whose blocks are not kept."""
    groups, parallel = kv_cache_config.kv_cache_groups, vllm_config.parallel_config
    kinds = {kind.__name__ for group in groups for kind in type(group.kv_cache_spec).__mro__}
    if len(groups) != 1 or FULL_ATTENTION not in kinds:
        logger.error("this model's KV cache is not kept: %d groups, expected one of full attention", len(groups))
        return None
    for axis in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if int(getattr(parallel, axis, 1)) != 1:
            logger.error("this model's KV cache is not kept: %s is not 1", axis)
            return None
    return int(groups[0].kv_cache_spec.block_size)


def _rank() -> tuple[int, int]:
    """Of this worker, in the tensor-parallel and in the pipeline-parallel group."""
    try:
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group
    except ModuleNotFoundError:
        return 0, 0
    return int(get_tp_group().rank_in_group), int(get_pp_group().rank_in_group)
