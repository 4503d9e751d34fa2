"""The worker side of the vLLM connector: blocks between the tensors of vLLM's cache and the store, asynchronously.

The thread that runs the model asks the store for nothing that may have to wait for the drive: loads run on the store's own threads, and
stores are worked off on one thread of the adapter (``vllm_connector_saves``). A full block does not change while its request holds it,
vLLM keeps a finished request's blocks until its stores are reported, and before a preempted request's blocks are given away its stores
are waited for (``handle_preemptions``). Where a store does not end in time it is withdrawn before the memory goes back.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..engine.config import parse_bytes
from ..format.namespace import Namespace
from .attached import DEFAULTS, AttachedStore, QuietSpace
from .transfers import LOAD_TIMEOUT_S, Transfers
from .vllm_connector_layout import CacheLayout, connector_namespace
from .vllm_connector_saves import Save, Saver

logger = logging.getLogger("kvlode")

WHERE = "kv_connector_extra_config"
STORE_TIMEOUT_S = 30.0
"""How long a finished request's blocks are kept for a store that does not end. A store that does not get on for so long gets no more."""
PREEMPTION_TIMEOUT_S = 5.0
"""How long a step waits for the stores of requests that lose their blocks in it."""
IDLE_WAIT_S = 0.002
"""With nothing to compute vLLM polls without a pause; a job that ends wakes this at once, and its threads need the cores."""
DRAIN_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 30.0


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

    @property
    def buffer_bytes(self) -> int:
        """As much as the store takes for its buffer is taken for copies of blocks on their way there. Raises ``InvalidConfig``."""
        size = self.options.get("buffer") or self.options.get("buffer_bytes") or DEFAULTS["buffer"]
        return parse_bytes(size, "buffer")

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
        path = settings.options.get("path")
        self._folder = folder_of_rank(path, vllm_config.parallel_config, rank) if isinstance(path, str) and path else ""
        self._attached = AttachedStore.open(settings.for_folder(self._folder) if self._folder else settings.options, where=WHERE)
        self._descriptor: Namespace | None = None
        self._layout: CacheLayout | None = None
        self._loads = Transfers(settings.load_timeout_s)
        self._loading: dict[Hashable, Blocks] = {}
        self._saver: Saver | None = None
        self._saves: list[Save] = []
        self._kept: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._received: set[str] = set()
        self._numbers = itertools.count()

    def register(self, kv_caches: Mapping[str, Any]) -> None:
        """The cache's tensors, once they exist. Raises ``InvalidConfig`` for what this store cannot keep."""
        layout = self._layout = CacheLayout(kv_caches, self._block_count)
        descriptor = self._descriptor = connector_namespace(
            self._vllm_config, layout, block_tokens=self._block_tokens, rank=self._rank, revision=self._settings.revision
        )
        space = self._attached.space(descriptor)
        memory_bytes = self._settings.buffer_bytes
        self._saver = Saver(space, block_bytes=layout.block_bytes, memory_bytes=memory_bytes, device=layout.device)
        logger.info("blocks of %d bytes in %d runs; %s", layout.block_bytes, len(layout.runs), descriptor.canonical_json().decode())

    @property
    def facts(self) -> WorkerFacts | None:
        """``None`` without a store: the scheduler side then finds nothing."""
        if self._descriptor is None or self._attached.store is None:
            return None
        return WorkerFacts(self._folder, self._descriptor.canonical_json(), os.getpid())

    @property
    def descriptor(self) -> Namespace | None:
        return self._descriptor

    @property
    def space(self) -> QuietSpace | None:
        """Where blocks are read from; ``None`` before there are tensors, and while a reset is under way."""
        return None if self._saver is None else self._saver.space

    def stats(self) -> Mapping[str, Any]:
        """The store's counters, and under ``connector`` the blocks that were not stored for want of time (see ``Saver.counts``)."""
        return {**self._attached.stats(), "connector": {} if self._saver is None else self._saver.counts()}

    # --- a step -------------------------------------------------------------------------------------------------------

    def handle_preemptions(self, plan: StepPlan) -> None:
        """Before the step: the blocks of preempted requests may be overwritten in it."""
        saver = self._saver
        if saver is None:
            return
        if plan.epoch and self._descriptor is not None:
            saver.withdraw(self._saves)
            descriptor = self._descriptor = namespace_after_reset(self._descriptor, plan.epoch)
            saver.renew(lambda: self._attached.space(descriptor))
        leaving = [save for save in self._saves if save.request_id in plan.preempted]
        if leaving:
            timeout_s = 0.0 if saver.stalled(PREEMPTION_TIMEOUT_S) else PREEMPTION_TIMEOUT_S
            saver.wait(lambda: all(save.over for save in leaving), timeout_s)
            saver.give_up(leaving)

    def start_loads(self, plan: StepPlan) -> None:
        for blocks in plan.loads:
            outs, space = self._views(blocks.block_ids), self.space
            if space is None or outs is None:
                self._failed_blocks.update(blocks.block_ids)
                self._received.add(blocks.request_id)
                continue
            job = (blocks.request_id, next(self._numbers))
            self._loading[job] = blocks
            self._loads.load(job, space, blocks.keys, outs, stream=self._stream())

    def _stream(self) -> Any:
        """The stream that vLLM computes on: steps that still use the blocks' former contents may be queued there. ``None`` on a CPU."""
        if self._layout is None or self._layout.device_type != "cuda":
            return None
        import torch

        return torch.cuda.current_stream()

    def start_stores(self, plan: StepPlan) -> None:
        """After the step has computed its blocks, as far as this thread knows: on a GPU it may still be at it."""
        saver = self._saver
        if saver is None or not plan.stores:
            return
        stream = self._stream()
        computed = None if stream is None else stream.record_event()
        for blocks in plan.stores:
            sources = self._views(blocks.block_ids)
            if not sources:
                continue
            save = Save(blocks.request_id, blocks.keys, sources, blocks.parent, computed)
            if saver.submit(save, self._settings.store_timeout_s):
                self._saves.append(save)

    def finished(self, plan: StepPlan) -> tuple[set[str], set[str]]:
        """Requests whose stores are over (of those that vLLM keeps for that), and requests whose loads are."""
        self._kept |= plan.kept
        if plan.idle:
            self._wait_a_little()
        received = self._collect_loads()
        self._give_up_late()
        self._saves = [save for save in self._saves if not save.over]
        busy = {save.request_id for save in self._saves}
        sent = self._kept - busy
        self._kept &= busy
        return sent, received

    def _wait_a_little(self) -> None:
        """For a load or a store to end, where there is one."""
        if self._loads.pending:
            self._loads.drain(IDLE_WAIT_S)
        elif self._saver is not None and self._saves:
            self._saver.wait(lambda: all(save.over for save in self._saves), IDLE_WAIT_S)

    def _give_up_late(self) -> None:
        """Stores that keep the blocks of finished requests for too long, and all of them where nothing gets on any more."""
        if self._saver is None:
            return
        timeout_s, now_s = self._settings.store_timeout_s, time.monotonic()
        late = [save for save in self._saves if save.request_id in self._kept and now_s - save.started_s > timeout_s]
        self._saver.give_up(self._saves if self._saver.stalled(timeout_s) else late)

    def take_failed_blocks(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def shutdown(self) -> bool:
        """Wait for what is under way, as long as that may take, and close the store."""
        self._loads.drain(DRAIN_TIMEOUT_S)
        saved = self._saver is None or self._saver.close(DRAIN_TIMEOUT_S)
        return self._attached.close(CLOSE_TIMEOUT_S) and saved

    # --- jobs ---------------------------------------------------------------------------------------------------------

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
