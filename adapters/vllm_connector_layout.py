"""Where a block of vLLM lies in the tensors of its cache, and which namespace such blocks belong to.

vLLM hands the connector one tensor a layer, logically ``[blocks, heads, tokens, content]`` (``register_kv_caches`` of
``vllm/distributed/kv_transfer/kv_connector/v1/base.py``, vLLM 0.32.0); the physical order behind it differs by attention backend.
So strides are read here, never assumed: a block becomes the list of its contiguous runs of bytes, layer by layer, in the order in
which they lie in memory. What that order is stands in the namespace.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..format.errors import InvalidConfig
from ..format.namespace import Namespace
from .identity import hub_commit
from .vllm_identity import kv_element_type, model_revision, vllm_series

LAYOUT_VERSION = 1
"""Raised when the order in which runs are strung together changes."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run of bytes that every block has: block *b* has it at ``offset + b * stride`` of ``memory``."""

    memory: Any
    """One-dimensional ``uint8``: a NumPy array over the CPU's memory, else a tensor."""
    offset_bytes: int
    stride_bytes: int
    size_bytes: int

    def of_block(self, block_id: int) -> Any:
        start = self.offset_bytes + block_id * self.stride_bytes
        return self.memory[start : start + self.size_bytes]


class CacheLayout:
    """The cache of one worker. Immutable; the tensors are vLLM's and stay where they are until the engine ends.

    Raises ``InvalidConfig`` for tensors whose blocks cannot be told apart.
    """

    def __init__(self, kv_caches: Mapping[str, Any], block_count: int) -> None:
        if not kv_caches:
            raise InvalidConfig("vLLM registered no KV cache", expected="one tensor a layer", actual="none")
        self.block_count = block_count
        self.runs: list[Run] = []
        described: list[Any] = []
        seen: set[tuple[int, tuple[int, ...]]] = set()
        memories: dict[int, Any] = {}
        for name, tensor in kv_caches.items():
            place = (tensor.data_ptr(), tuple(tensor.stride()))
            if place in seen:  # layers that share one cache
                described.append([name, "shared"])
                continue
            seen.add(place)
            runs, order = _runs_of(tensor, block_count, memories)
            self.runs += runs
            described.append([name, order, str(tensor.dtype), list(tensor.shape[1:]), [run.size_bytes for run in runs]])
        self.runs = _merged(self.runs)
        self.block_bytes = sum(run.size_bytes for run in self.runs)
        first = next(iter(kv_caches.values()))
        self.dtype = str(first.dtype).removeprefix("torch.")
        self.device = first.device
        self.device_type = str(first.device.type)
        digest = hashlib.blake2b(json.dumps(described).encode(), digest_size=8).hexdigest()
        self.name = f"kvlode-{LAYOUT_VERSION}:{described[0][1]}:{len(kv_caches)} layers:{digest}"

    def block(self, block_id: int) -> list[Any]:
        """The runs of one block, as the store takes them: scatter/gather, nothing is copied."""
        if not 0 <= block_id < self.block_count:
            raise IndexError(f"block {block_id} of {self.block_count}")
        return [run.of_block(block_id) for run in self.runs]


def _runs_of(tensor: Any, block_count: int, memories: dict[int, Any]) -> tuple[list[Run], str]:
    """The runs of one layer in the order of their addresses, and the order of the axes that this makes."""
    pages, remainder = divmod(int(tensor.shape[0]), block_count)
    if remainder or not pages:
        raise InvalidConfig(
            "a layer's cache does not divide into vLLM's blocks", expected=f"a multiple of {block_count}", actual=int(tensor.shape[0])
        )
    item = tensor.element_size()
    strides = [int(stride) * item for stride in tensor.stride()]
    axes = [axis for axis in range(1, tensor.dim()) if tensor.shape[axis] > 1]
    axes.sort(key=lambda axis: -strides[axis])
    size_bytes, outer = item, list(axes)
    while outer and strides[outer[-1]] == size_bytes:  # the innermost axes that lie without gaps
        size_bytes *= int(tensor.shape[outer.pop()])
    starts = [0]
    for axis in outer:
        starts = [start + index * strides[axis] for start in starts for index in range(int(tensor.shape[axis]))]
    base = tensor.storage_offset() * item
    memory = _memory_of(tensor, memories)
    runs = [
        Run(memory, base + page * strides[0] + start, pages * strides[0], size_bytes) for page in range(pages) for start in sorted(starts)
    ]
    return _merged(runs), "".join("BHNC"[axis] if tensor.dim() == 4 else str(axis) for axis in axes) + f"x{pages}"


def _merged(runs: list[Run]) -> list[Run]:
    """Neighbours in the list that are neighbours in memory become one run."""
    merged: list[Run] = []
    for run in runs:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.memory is run.memory
            and last.stride_bytes == run.stride_bytes
            and last.offset_bytes + last.size_bytes == run.offset_bytes
        ):
            merged[-1] = Run(last.memory, last.offset_bytes, last.stride_bytes, last.size_bytes + run.size_bytes)
        else:
            merged.append(run)
    return merged


def _memory_of(tensor: Any, memories: dict[int, Any]) -> Any:
    """The bytes of the tensor's storage, the same object for all tensors in it."""
    import torch

    storage = tensor.untyped_storage()
    memory = memories.get(storage.data_ptr())
    if memory is None:
        flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        memory = memories[storage.data_ptr()] = flat.numpy() if tensor.device.type == "cpu" else flat
    return memory


def connector_namespace(
    vllm_config: Any, layout: CacheLayout, *, block_tokens: int, rank: tuple[int, int], revision: str | None
) -> Namespace:
    """The namespace of one worker's blocks. ``rank``: in the tensor-parallel and in the pipeline-parallel group.

    ``vllm_config``: vLLM's ``VllmConfig``. ``revision``: see ``vllm_identity.model_revision``. Raises ``InvalidConfig``.
    """
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    settings = {
        "quantization": getattr(model, "quantization", None),
        "hf_overrides": getattr(model, "hf_overrides", None),
        "kv_scales": getattr(cache, "calculate_kv_scales", None),
    }
    name = str(model.model)
    commit = revision
    if commit is None and not os.path.exists(name):
        commit = getattr(getattr(model, "hf_config", None), "_commit_hash", None) or hub_commit(name, getattr(model, "revision", None))
    extra = {
        "engine": f"vllm-{vllm_series()}",
        "attention": _attention(vllm_config),
        "device": _device(layout.device_type),
        "compute_dtype": str(getattr(model, "dtype", "")),
        "kv_dtype": str(getattr(cache, "cache_dtype", "auto")),
        "hash": str(getattr(cache, "prefix_caching_hash_algo", "")),
    }
    if _rope_depends_on_length(getattr(model, "hf_config", None)):
        extra["max_model_len"] = str(getattr(model, "max_model_len", ""))
    return Namespace(
        model=name,
        revision=model_revision(name, revision=commit, settings=settings),
        dtype=kv_element_type(layout.dtype),
        layout=layout.name,
        tokens_per_block=block_tokens,
        block_bytes_max=layout.block_bytes,
        tp_rank=rank[0],
        tp_size=int(parallel.tensor_parallel_size),
        pp_rank=rank[1],
        pp_size=int(parallel.pipeline_parallel_size),
        extra=extra,
    )


def _rope_depends_on_length(hf_config: Any) -> bool:
    """Whether the longest sequence that is served decides on the rotation (LongRoPE as of Phi-3: vLLM chooses one of two tables)."""
    settings = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
    return any(kind in str(settings) for kind in ("longrope", "su", "dynamic"))


def _device(device_type: str) -> str:
    """vLLM's attention on the CPU packs K and V for the instructions that the machine has."""
    if device_type != "cpu":
        return device_type
    import torch

    return f"cpu:{torch.backends.cpu.get_cpu_capability()}"


def _attention(vllm_config: Any) -> str:
    """Names of the attention backends, each of which may have an order of its own within a block."""
    compilation = getattr(vllm_config, "compilation_config", None)
    layers = getattr(compilation, "static_forward_context", None) or {}
    backends = {getattr(layer, "attn_backend", None) for layer in layers.values()} - {None}
    return ",".join(sorted(str(backend.get_name()) for backend in backends if backend is not None))
