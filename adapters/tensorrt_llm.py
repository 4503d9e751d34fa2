"""The KV cache connector of TensorRT-LLM: ``KvlodeConnectorScheduler`` and ``KvlodeConnectorWorker``.

    kv_connector_config = KvCacheConnectorConfig(
        connector_module="kvlode.adapters.tensorrt_llm",
        connector_scheduler_class="KvlodeConnectorScheduler",
        connector_worker_class="KvlodeConnectorWorker",
    )
    TRTLLM_KVLODE='{"path": "/nvme/kv", "capacity": "200GiB", "stage_wait_s": 0.05}'    # in the environment: JSON, or a file of it

The interface is that of ``tensorrt_llm/_torch/pyexecutor/connectors/kv_cache_connector.py`` and ``kv_cache_layout.py`` as of 2026
(commits 035ab91c and 0972960b; releases up to 1.2 have the first one in ``pyexecutor/``). **It was never run inside TensorRT-LLM**:
that module imports bindings which need a GPU, so it is tested against stand-ins of the two base classes. The real ones are
bound when one of the two classes is first asked for.

What follows from the interface:

* There is no way to report that a load failed, so a load is promised only for blocks that were read into host memory and
  verified before (``staging``, 256 MiB by default). A query answers from there and returns at once; what is stored but not
  there is read in the background *for the next query of the same prefix*. With ``stage_wait_s`` a query waits that long for
  it, and the first request after a restart is served too; the engine's loop waits meanwhile.
* Blocks are copied out of the pool, in the order of the engine's stream, when they are complete, into host memory
  (``saving``, 256 MiB), and stored from there. A drive that does not follow costs blocks that are not stored, never the engine's blocks.
* A query hashes the tokens up to the last block that it could promise (microseconds a block): with 64 blocks of staging memory well under
  a millisecond, with tens of thousands of tokens in the engine's own cache before them some milliseconds.
* Hashes of the engine are not used (they are empty with its newer cache manager): keys follow from the tokens and ``cache_salt``. Requests
  with LoRA, images or prompt embeddings are neither stored nor restored, since their tokens do not say what they are.
* One process: with tensor, pipeline or context parallelism the ranks would have to agree on what is in the memory of each, and the
  interface has no channel from the workers to the scheduler before it promises. Several layer groups (sliding windows, hybrid models) are
  refused as well. Both stop the engine at its start, with ``InvalidConfig``.
"""

from __future__ import annotations

import importlib
import json
import logging
import types
from dataclasses import dataclass, field
from typing import Any

from ..engine.contract import Status
from ..format.errors import InvalidConfig
from ..format.keys import prefix_keys
from .tensorrt_llm_connection import OPTIONS_VARIABLE, Connection

logger = logging.getLogger("kvlode")

INTERFACES = ("tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector", "tensorrt_llm._torch.pyexecutor.kv_cache_connector")
MORE_THAN_TOKENS = ("lora_task_id", "multimodal_hashes", "multimodal_embedding", "py_multimodal_data", "prompt_embedding_table")
"""Attributes of a request whose keys and values depend on more than its tokens."""


@dataclass(slots=True)
class Save:
    """Blocks of one request to be stored after the forward pass: ``block_ids`` of the pool under ``keys``, a chain behind ``parent``."""

    request_id: int
    keys: list[bytes]
    block_ids: list[int]
    parent: bytes | None


@dataclass(slots=True)
class ConnectorMetadata:
    """What the worker does in one step: rows of the staging memory to load into blocks, and blocks to save."""

    loads: list[tuple[int, int]] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


# --- the scheduler ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Request:
    """What is known of a request: its blocks in order, and the keys of those that are complete."""

    salt: bytes
    keys: list[bytes] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    unhashed: list[int] = field(default_factory=list)
    tokens: int = 0
    offered: int = 0
    """Leading blocks that were handed to the worker to be saved, or were in the store."""
    stored: range = range(0)
    """Blocks that come from the store."""
    has_saves: bool = False

    def extend(self, data: Any) -> None:
        self.block_ids += data.new_block_ids
        self.tokens += len(data.new_tokens)
        self.unhashed += data.new_tokens

    def complete(self, blocks: int, block_tokens: int) -> int:
        """Compute the keys of the first ``blocks`` blocks, no more: a long prompt is hashed as it is computed, chunk by chunk."""
        blocks = min(blocks, self.tokens // block_tokens, len(self.block_ids))
        tokens = max(0, blocks - len(self.keys)) * block_tokens
        if tokens:
            parent = self.keys[-1] if self.keys else None
            self.keys += prefix_keys(self.unhashed[:tokens], block_tokens, self.salt, parent=parent)
            del self.unhashed[:tokens]
        return blocks


@dataclass(slots=True)
class _Promise:
    start: int
    rows: list[int]
    block_ids: list[int] = field(default_factory=list)


class SchedulerSide:
    """The scheduler's part of the connector. Called from one thread; nothing raises, and nothing waits beyond ``stage_wait_s``."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)  # type: ignore[call-arg]
        self.connection = Connection.of(llm_args)
        self._requests: dict[int, _Request] = {}
        self._promises: dict[int, _Promise] = {}
        self._loading: list[int] = []
        """Rows that the worker copies in the present step."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens behind ``num_computed_tokens`` are in host memory, in whole blocks, never the last token; loaded in this step."""
        try:
            return self._promise(request, num_computed_tokens) * self.connection.tokens_per_block, False
        except Exception as error:  # whatever it is, the engine can compute the tokens
            logger.error("a prefix is not looked for: %s", error)
            return 0, False

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        """Where the blocks of a request are."""
        promise = self._promises.get(request.request_id)
        if promise is not None:
            promise.block_ids = list(block_ids)

    def build_connector_meta(self, scheduler_output: Any) -> ConnectorMetadata:
        """The loads that were promised to requests that begin, and the saves of blocks that this step completes."""
        metadata = ConnectorMetadata()
        staging = self.connection.staging
        if staging is None:
            return metadata
        staging.release(self._loading)
        self._loading = []
        for data in scheduler_output.new_requests:
            known = self._requests.get(data.request_id)
            if known is not None:  # a request that lost its blocks begins anew
                self._requests[data.request_id] = _Request(known.salt, has_saves=known.has_saves)
                self._step(data, metadata)
        for data in scheduler_output.cached_requests:
            if data.request_id in self._requests:
                self._step(data, metadata)
        return metadata

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        """True when blocks of the request may still be on their way out of the pool."""
        known = self._requests.pop(request.request_id, None)
        self._withdraw(request.request_id)
        return known is not None and known.has_saves

    def wait_for_initialization(self) -> None:
        """Nothing to wait for."""

    def _promise(self, request: Any, computed_tokens: int) -> int:
        self._withdraw(request.request_id)
        self._requests.pop(request.request_id, None)
        salt = _salt(request)
        if salt is None or self.connection.staging is None:
            return 0
        self._requests[request.request_id] = _Request(salt)
        block_tokens = self.connection.tokens_per_block
        if computed_tokens % block_tokens:
            return 0
        tokens = request.get_tokens(0)
        start = computed_tokens // block_tokens
        end = min((len(tokens) - 1) // block_tokens, start + self.connection.staging.rows)
        if start >= end:
            return 0
        keys = prefix_keys(tokens[: end * block_tokens], block_tokens, salt)  # of what there is memory for: hashing takes its time
        if self.connection.space is not None:
            self.connection.space.lookup_nowait(keys[:start])  # asked ahead: what the engine has in its own cache need not be saved again
        rows = self.connection.staging.take(keys[start:], self.connection.stage_wait_s)
        if rows:
            self._promises[request.request_id] = _Promise(start, rows)
        return len(rows)

    def _withdraw(self, request_id: int) -> None:
        promise = self._promises.pop(request_id, None)
        if promise is not None and self.connection.staging is not None:
            self.connection.staging.release(promise.rows)

    def _step(self, data: Any, metadata: ConnectorMetadata) -> None:
        known, block_tokens = self._requests[data.request_id], self.connection.tokens_per_block
        known.extend(data)
        promise = self._promises.pop(data.request_id, None)
        if promise is not None:
            block_ids = (promise.block_ids or known.block_ids)[promise.start :]
            metadata.loads += zip(promise.rows, block_ids, strict=False)  # a block that was not allocated is computed later
            self._loading += promise.rows
            known.stored = range(promise.start, promise.start + len(promise.rows))
        computed = min(data.computed_position + data.num_scheduled_tokens, known.tokens)
        complete = known.complete(computed // block_tokens, block_tokens)
        if complete > known.offered:
            metadata.saves += self._saves(data.request_id, known, complete)
            known.offered = complete

    def _saves(self, request_id: int, known: _Request, complete: int) -> list[Save]:
        """Blocks up to ``complete`` that are not known to be stored, in runs."""
        assert self.connection.space is not None
        saves: list[Save] = []
        first = known.offered
        for at, status in enumerate(self.connection.space.lookup_nowait(known.keys[first:complete]), first):
            if status is Status.HIT or at in known.stored or known.block_ids[at] < 0:
                continue
            parent = known.keys[at - 1] if at else None
            if saves and parent == saves[-1].keys[-1]:
                saves[-1].keys.append(known.keys[at])
                saves[-1].block_ids.append(known.block_ids[at])
            else:
                saves.append(Save(request_id, [known.keys[at]], [known.block_ids[at]], parent))
        known.has_saves = known.has_saves or bool(saves)
        return saves


# --- the worker -------------------------------------------------------------------------------------------------------------


class WorkerSide:
    """The worker's part of the connector. Called from one thread.

    Only a copy that CUDA refuses raises: the request behind a promised load would be wrong, and nothing else can say so.
    """

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)  # type: ignore[call-arg]
        self.connection = Connection.of(llm_args)
        self._ending: list[int] = []

    def register_kv_caches(self, kv_cache_tensor: Any) -> None:
        """``kv_cache_tensor``: ``[blocks, ...]``, contiguous; row ``i`` has all layers of block ``i``."""
        import torch

        rows = kv_cache_tensor.detach().reshape(kv_cache_tensor.shape[0], -1).view(torch.uint8)
        self.connection.register([rows], str(kv_cache_tensor.dtype).removeprefix("torch."), list(kv_cache_tensor.shape[1:]))

    def register_kv_cache_layout(self, layout: Any) -> None:
        """A cache that is described by regions: one layer group with full attention. Raises ``InvalidConfig`` for others."""
        windows = [group.window_size for group in layout.groups]
        if len(windows) != 1 or windows[0] is not None:
            raise InvalidConfig(
                "this model has layers that cannot be restored from blocks of tokens",
                where=OPTIONS_VARIABLE,
                expected="one layer group with full attention",
                actual=f"{len(windows)} layer groups with windows of {windows} tokens",
                action="Run it without kv_connector_config.",
            )
        regions = [*layout.groups[0].regions, *layout.groups[0].replicated_regions]
        described = [[region.size, [[ref.layer_id, ref.role, ref.expansion] for ref in region.buffers]] for region in regions]
        self.connection.register([region.as_tensor() for region in regions], "uint8", described)

    def start_load_kv(self, stream: Any) -> None:
        """Copy what was promised into the pool; done when it returns."""
        metadata, pool, staging = self.get_connector_meta(), self.connection.pool, self.connection.staging  # type: ignore[attr-defined]
        if metadata is None or pool is None or staging is None:
            return
        loads, metadata.loads = metadata.loads, []  # the engine may leave the same metadata bound for another step
        with pool.on(stream):
            for row, block_id in loads:
                pool.fill(block_id, staging.row(row))

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Nothing to wait for: ``start_load_kv`` has loaded every layer."""

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Nothing to do: blocks are saved whole, by ``wait_for_save``."""

    def wait_for_save(self, stream: Any) -> None:
        """Queue the copies of complete blocks into host memory behind the forward pass; the drive is not waited for."""
        metadata, saver = self.get_connector_meta(), self.connection.saver  # type: ignore[attr-defined]
        if metadata is None or saver is None:
            return
        saves, metadata.saves = metadata.saves, []
        for save in saves:
            saver.save(save.request_id, save.keys, save.parent, save.block_ids, stream)

    def get_finished(self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]) -> tuple[list[int], list[int]]:
        """Requests whose blocks have all left the pool; loads are never asynchronous."""
        self._ending += finished_gen_req_ids
        saver = self.connection.saver
        over = [request_id for request_id in self._ending if saver is None or not saver.is_copying(request_id)]
        self._ending = [request_id for request_id in self._ending if request_id not in over]
        return over, list(started_loading_req_ids)


def _salt(request: Any) -> bytes | None:
    """What keeps the blocks of a request apart from those of other requests with the same tokens; ``None``: nothing known does."""
    if any(getattr(request, name, None) is not None for name in MORE_THAN_TOKENS):
        return None
    salts = [getattr(request, name, None) for name in ("cache_salt", "cache_salt_id")]
    return b"" if salts == [None, None] else json.dumps(salts, default=str).encode()


def __getattr__(name: str) -> Any:
    """The two classes, on the base classes of the TensorRT-LLM that is installed. Raises ``ImportError`` without one."""
    sides = {
        "KvlodeConnectorScheduler": (SchedulerSide, "KvCacheConnectorScheduler"),
        "KvlodeConnectorWorker": (WorkerSide, "KvCacheConnectorWorker"),
    }
    if name not in sides:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    side, base = sides[name]
    try:
        interface = importlib.import_module(INTERFACES[0])
    except ModuleNotFoundError:
        interface = importlib.import_module(INTERFACES[1])
    made = types.new_class(
        name, (side, getattr(interface, base)), exec_body=lambda body: body.update(__module__=__name__, __doc__=side.__doc__)
    )
    globals()[name] = made
    return made
