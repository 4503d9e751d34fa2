"""What SGLang says of its pages: where their bytes lie, which weights made them, and which rank keeps them.

Written against SGLang 0.5.23: ``HiCacheStorageConfig`` of ``sglang/srt/mem_cache/hicache_storage.py``, ``HostKVCache`` of
``sglang/srt/mem_cache/pool_host/base.py`` with its subclasses in ``mha.py`` and ``mla.py``, and ``ServerArgs``.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from ..engine.contract import Block
from ..format.errors import InvalidConfig
from ..format.namespace import Namespace
from .identity import hub_commit, weights_revision

logger = logging.getLogger("kvlode")

WHERE = "hicache-storage-backend-extra-config"
SERVER_SETTINGS = (
    "revision", "dtype", "quantization", "quantization_param_path", "kv_cache_dtype", "json_model_override_args", "load_format",
    "modelopt_quant", "rl_quant_profile", "qsa_indexer_dtype",
)  # fmt: skip
"""Arguments of the server that change the bytes of a page without changing the weights' files."""
GEOMETRY = (
    "layout", "dtype", "layer_num", "start_layer", "end_layer", "head_num", "head_dim", "v_head_dim", "head_group_num",
    "kv_lora_rank", "qk_rope_head_dim", "kv_cache_dim", "dsa_kv_cache_store_fp8", "storage_format_tag",
)  # fmt: skip
"""What a host pool says of its pages; those of its attributes that it has go into the namespace."""


class HostPages:
    """Where the pages of a host pool lie: the parts of each, in the order in which the pool names them. Immutable.

    ``pool`` is a ``HostKVCache`` of ``sglang/srt/mem_cache/pool_host/base.py``; the parts are K and V of all layers for the
    page-first layouts, of each layer for ``layer_first``, and have no V for MLA. Raises ``InvalidConfig`` for a pool whose
    pages are not in host memory.
    """

    def __init__(self, pool: Any) -> None:
        import torch

        self._pool = pool
        self.tokens = int(getattr(pool, "logical_page_size", None) or pool.page_size)
        buffer = getattr(pool, "kv_buffer", None)
        if buffer is not None and getattr(getattr(buffer, "device", None), "type", "cpu") != "cpu":
            raise InvalidConfig("the host pool is not in host memory", where=WHERE, expected="cpu", actual=str(buffer.device))
        _, sizes = pool.get_page_buffer_meta(torch.arange(self.tokens))
        self._sizes = [int(size) for size in sizes]
        self.page_bytes = sum(self._sizes)
        self.geometry = {name: str(getattr(pool, name)) for name in GEOMETRY if getattr(pool, name, None) is not None}
        self.geometry |= {"pool": type(pool).__name__, "parts": f"{len(self._sizes)} of {self._sizes[0]} bytes first"}

    def blocks(self, host_indices: Any, count: int) -> list[Block]:
        """The memory of ``count`` pages, whose tokens have these indices (a tensor of ``count * tokens`` integers). Nothing is copied."""
        if len(host_indices) != count * self.tokens:
            raise ValueError(f"{len(host_indices)} token indices for {count} pages of {self.tokens}")
        pointers, sizes = self._pool.get_page_buffer_meta(host_indices)
        if list(sizes) != self._sizes * count or len(pointers) != len(sizes):
            raise ValueError(f"the host pool's pages are no longer of {self.page_bytes} bytes in {len(self._sizes)} parts")
        parts = [(ctypes.c_uint8 * size).from_address(pointer) for pointer, size in zip(pointers, sizes, strict=True)]
        width = len(self._sizes)
        return [parts[start : start + width] for start in range(0, len(parts), width)]


def namespace_of(config: Any, pages: HostPages, identity: tuple[str, str], *, order: str) -> Namespace:
    """The namespace of a rank's pages. ``order`` names the order of the bytes in a block. Raises ``InvalidConfig``."""
    replicated = bool(config.is_mla_model)  # every rank of the tensor-parallel group holds the same bytes
    context = {f"{axis}_{what}": str(getattr(config, f"{axis}_{what}", "")) for axis in ("attn_cp", "dcp") for what in ("rank", "size")}
    return Namespace(
        model=identity[0],
        revision=identity[1],
        dtype=pages.geometry["dtype"],
        layout=f"sglang:{order}:{pages.geometry['layout']}",
        tokens_per_block=pages.tokens,
        block_bytes_max=pages.page_bytes,
        tp_rank=0 if replicated else config.tp_rank,
        tp_size=1 if replicated else config.tp_size,
        pp_rank=config.pp_rank,
        pp_size=config.pp_size,
        extra=pages.geometry | context | {"replicated": str(replicated)},
    )


def shard_of(config: Any) -> str:
    """The folder of one writing rank: all ranks that hold the same bytes and have one writer share it."""
    parts = ["replicated" if config.is_mla_model else f"tp{config.tp_rank}of{config.tp_size}"]
    for name, axis in (("pp", "pp"), ("cp", "attn_cp"), ("dcp", "dcp")):
        size = getattr(config, f"{axis}_size", 1)
        if size > 1:
            parts.append(f"{name}{getattr(config, f'{axis}_rank')}of{size}")
    replica = getattr(config, "dp_rank", 0)
    return "-".join(parts + ([f"dp{replica}"] if replica else []))


def _server_arguments() -> Any:
    """The ``ServerArgs`` of the SGLang that this process runs; ``None`` elsewhere."""
    module = sys.modules.get("sglang.srt.runtime_context")
    try:
        return module.get_server_args() if module is not None else None
    except ValueError:  # there is no server in this process
        return None


def identity_of(config: Any, settings: Mapping[str, Any]) -> tuple[str, str]:
    """Name and revision of the weights that make the pages. Raises ``InvalidConfig`` when there is no name."""
    server = _server_arguments()
    place = settings["model"] or getattr(server, "model_path", None) or config.model_name
    if not place:
        raise InvalidConfig(
            "nobody says which model this is", where=WHERE, expected="model: the folder or name of its weights", actual="none"
        )
    name = config.model_name or place
    arguments = {argument: str(getattr(server, argument, None)) for argument in SERVER_SETTINGS}
    if settings["revision"]:
        return name, f"{settings['revision']} {weights_revision('', settings=arguments)}"
    commit = hub_commit(place, getattr(server, "revision", None))
    if commit is None and not os.path.exists(place):
        logger.warning("%s: other weights under the name %r would not be told apart: set model or revision", WHERE, place)
    try:
        return name, weights_revision(place, commit=commit, settings=arguments)
    except OSError as error:
        raise InvalidConfig("the weights' files cannot be read", where=place, expected="readable files", actual=str(error)) from error
