"""The worker side of the vLLM connector: blocks between the tensors of vLLM's cache and the store, asynchronously.

Stores borrow (``own="borrow"``): a full block does not change while its request holds it, vLLM keeps a finished request's blocks
until its stores are reported, and before a preempted request's blocks are given away its stores are waited for
(``handle_preemptions``). So nothing is copied, and no buffer has to be as large as a prompt. Where a store does not end in time its
keys are deleted before the memory goes back: what may have been overwritten while it was read is never found.
On a GPU the store itself copies each block to host memory when it is submitted, ordered on the current stream.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..format.namespace import Namespace
from .attached import AttachedStore, QuietSpace
from .transfers import LOAD_TIMEOUT_S, Transfers
from .vllm_connector_layout import CacheLayout, connector_namespace

logger = logging.getLogger("kvlode")

WHERE = "kv_connector_extra_config"
STORE_TIMEOUT_S = 30.0
"""How long a finished request's blocks are kept for a store that does not end."""
PREEMPTION_TIMEOUT_S = 5.0
"""How long a step waits for the stores of requests that lose their blocks in it."""
IDLE_WAIT_S = 0.002
"""With nothing to compute vLLM polls without a pause; a job that ends wakes this at once, and its threads need the cores."""
DRAIN_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Settings:
    """``kv_connector_extra_config``, parted in what the connector and what the store takes."""

    options: Mapping[str, Any]
    load_timeout_s: float = LOAD_TIMEOUT_S
    store_timeout_s: float = STORE_TIMEOUT_S
    min_load_tokens: int = 0
    """Shorter hits are computed: loading has a cost of its own."""
    revision: str | None = None
    """Of the weights, where their files do not tell; the user vouches for it."""

    @classmethod
    def parse(cls, extra: Mapping[str, Any]) -> Settings:
        own = {name: extra[name] for name in ("load_timeout_s", "store_timeout_s", "min_load_tokens", "revision") if name in extra}
        return cls({name: value for name, value in extra.items() if name not in own}, **own)

    def for_folder(self, folder: str) -> dict[str, Any]:
        return {**self.options, "path": folder}


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of one request, from the front of its prefix to its tail."""

    request_id: str
    keys: tuple[bytes, ...]
    block_ids: tuple[int, ...]
    parent: bytes | None = None


@dataclass(slots=True)
class StepPlan:
    """What the scheduler side tells the workers with one step; pickled by vLLM where they are other processes."""

    loads: list[Blocks] = field(default_factory=list)
    stores: list[Blocks] = field(default_factory=list)
    preempted: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()
    """Finished requests whose blocks vLLM keeps until they are reported as sent."""
    idle: bool = False
    """The step computes nothing."""
    epoch: str = ""
    """After a reset: forget every block before anything else, and go on in a namespace of this name that nothing else ever reads."""


def namespace_after_reset(descriptor: Namespace, epoch: str) -> Namespace:
    """Where blocks go after a reset. vLLM resets its cache when weights are replaced in memory, and then the revision of the files
    no longer says which weights made a block: after a restart, with the weights of the files, these blocks must not be found."""
    return replace(descriptor, extra={**descriptor.extra, "epoch": epoch})


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What the scheduler side must know of a worker to look its blocks up."""

    folder: str
    descriptor_json: bytes
    process_id: int


def folder_of_rank(path: str, parallel: Any, rank: tuple[int, int]) -> str:
    """One folder for each process that writes; the folder itself where there is only one."""
    sizes = (int(parallel.tensor_parallel_size), int(parallel.pipeline_parallel_size), int(getattr(parallel, "data_parallel_size", 1)))
    if sizes == (1, 1, 1):
        return path
    data_rank = int(getattr(parallel, "data_parallel_rank", 0))
    return os.path.join(path, f"tp{rank[0]}of{sizes[0]}-pp{rank[1]}of{sizes[1]}-dp{data_rank}")


class WorkerSide:
    """One worker. Called by the one thread that runs the model; nothing here waits but where a deadline is named."""

    def __init__(self, vllm_config: Any, settings: Settings, *, block_count: int, block_tokens: int, rank: tuple[int, int]) -> None:
        self._vllm_config = vllm_config
        self._settings = settings
        self._block_count = block_count
        self._block_tokens = block_tokens
        self._rank = rank
        self._folder = folder_of_rank(str(settings.options.get("path") or ""), vllm_config.parallel_config, rank)
        self._attached = AttachedStore.open(settings.for_folder(self._folder) if self._folder else settings.options, where=WHERE)
        self._space: QuietSpace | None = None
        self._layout: CacheLayout | None = None
        self._loads, self._stores = Transfers(settings.load_timeout_s), Transfers()
        self._loading: dict[Hashable, Blocks] = {}
        self._storing: dict[Hashable, tuple[Blocks, float]] = {}
        self._kept: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._received: set[str] = set()
        self._numbers = itertools.count()

    def register(self, kv_caches: Mapping[str, Any]) -> None:
        """The cache's tensors, once they exist. Raises ``InvalidConfig`` for what this store cannot keep."""
        self._layout = CacheLayout(kv_caches, self._block_count)
        descriptor = connector_namespace(
            self._vllm_config, self._layout, block_tokens=self._block_tokens, rank=self._rank, revision=self._settings.revision
        )
        self._space = self._attached.space(descriptor)
        logger.info(
            "blocks of %d bytes in %d runs; %s", self._layout.block_bytes, len(self._layout.runs), descriptor.canonical_json().decode()
        )

    @property
    def facts(self) -> WorkerFacts | None:
        """``None`` without a store: the scheduler side then finds nothing."""
        if self._space is None or self._attached.store is None:
            return None
        return WorkerFacts(self._folder, self._space.descriptor.canonical_json(), os.getpid())

    @property
    def descriptor(self) -> Namespace | None:
        return None if self._space is None else self._space.descriptor

    def stats(self) -> Mapping[str, Any]:
        return self._attached.stats()

    # --- a step -------------------------------------------------------------------------------------------------------

    def handle_preemptions(self, plan: StepPlan) -> None:
        """Before the step: the blocks of preempted requests may be overwritten in it."""
        if plan.epoch and self._space is not None:
            self._space.drop()
            self._space = self._attached.space(namespace_after_reset(self._space.descriptor, plan.epoch))
        if not any(blocks.request_id in plan.preempted for blocks, _ in self._storing.values()):
            return
        self._stores.drain(PREEMPTION_TIMEOUT_S)
        self._collect_stores()
        self._give_up({job for job, (blocks, _) in self._storing.items() if blocks.request_id in plan.preempted})

    def start_loads(self, plan: StepPlan) -> None:
        for blocks in plan.loads:
            outs = self._views(blocks.block_ids)
            if self._space is None or outs is None:
                self._failed_blocks.update(blocks.block_ids)
                self._received.add(blocks.request_id)
                continue
            job = self._job(blocks)
            self._loading[job] = blocks
            self._loads.load(job, self._space, blocks.keys, outs, stream=self._stream())

    def _stream(self) -> Any:
        """The stream that vLLM computes on: steps that still use the blocks' former contents may be queued there. ``None`` on a CPU."""
        if self._layout is None or self._layout.device_type != "cuda":
            return None
        import torch

        return torch.cuda.current_stream()

    def start_stores(self, plan: StepPlan) -> None:
        """After the step has computed its blocks."""
        space = self._space
        if space is None:
            return
        for blocks in plan.stores:
            new = self._without_present(space, blocks)
            views = self._views(new.block_ids)
            if not views:
                continue
            job = self._job(new)
            self._storing[job] = (new, time.monotonic())
            self._stores.store(job, space, new.keys, views, chained=True, parent=new.parent)

    def _without_present(self, space: QuietSpace, blocks: Blocks) -> Blocks:
        """What is left behind the blocks at the front that are stored; for those this is a use, of vLLM's own copy."""
        present = space.contains(blocks.keys)
        count = present.index(False) if False in present else len(present)
        if not count:
            return blocks
        space.touch(blocks.keys[:count])
        return Blocks(blocks.request_id, blocks.keys[count:], blocks.block_ids[count:], blocks.keys[count - 1])

    def finished(self, plan: StepPlan) -> tuple[set[str], set[str]]:
        """Requests whose stores are over (of those that vLLM keeps for that), and requests whose loads are."""
        self._kept |= plan.kept
        if plan.idle:
            transfers = self._loads if self._loads.pending else self._stores
            if transfers.pending:
                transfers.drain(IDLE_WAIT_S)
        received = self._collect_loads()
        self._collect_stores()
        now_s = time.monotonic()
        self._give_up(
            {
                job
                for job, (blocks, started_s) in self._storing.items()
                if blocks.request_id in self._kept and now_s - started_s > self._settings.store_timeout_s
            }
        )
        busy = {blocks.request_id for blocks, _ in self._storing.values()}
        sent = self._kept - busy
        self._kept &= busy
        return sent, received

    def take_failed_blocks(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def shutdown(self) -> bool:
        """Wait for what is under way, as long as that may take, and close the store."""
        self._loads.drain(DRAIN_TIMEOUT_S)
        self._stores.drain(DRAIN_TIMEOUT_S)
        self._collect_stores()
        self._give_up(set(self._storing))
        return self._attached.close()

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def _job(self, blocks: Blocks) -> Hashable:
        return (blocks.request_id, next(self._numbers))

    def _views(self, block_ids: Sequence[int]) -> list[list[Any]] | None:
        layout = self._layout
        if layout is None:
            return None
        try:
            return [layout.block(block_id) for block_id in block_ids]
        except IndexError as error:
            logger.error("vLLM named a block that its cache has not got: %s", error)
            return None

    def _collect_loads(self) -> set[str]:
        for outcome in self._loads.finished():
            blocks = self._loading.pop(outcome.job_id)
            bad = [block_id for block_id, good in zip(blocks.block_ids, outcome.good, strict=True) if not good]
            if bad:
                logger.warning("%d of %d blocks were not loaded and are computed", len(bad), len(blocks.block_ids))
                self._failed_blocks.update(bad)
            self._received.add(blocks.request_id)
        received, self._received = self._received, set()
        return received

    def _collect_stores(self) -> None:
        for outcome in self._stores.finished():
            self._storing.pop(outcome.job_id, None)  # given up before it ended

    def _give_up(self, jobs: set[Hashable]) -> None:
        """The memory of these stores goes back to vLLM now, so what they wrote must not be found."""
        for job in jobs:
            blocks, _ = self._storing.pop(job)
            logger.warning("a store of %d blocks did not end in time and is given up", len(blocks.keys))
            if self._space is not None:
                self._space.delete(blocks.keys)
