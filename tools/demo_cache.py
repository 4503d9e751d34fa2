"""Between a transformers ``DynamicCache`` and kvlode blocks: a block is all layers' keys and values of some tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..engine.contract import BlockSpace, Status
from ..format.keys import prefix_keys
from ..format.namespace import Namespace

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """Shape of a block: ``[layers, 2 (K, V), kv_heads, tokens, head_dim]``, contiguous."""

    layers: int
    kv_heads: int
    tokens: int
    head_dim: int
    dtype: Any

    @classmethod
    def of(cls, model: Any, tokens: int) -> CacheGeometry:
        """Geometry of a model's cache in blocks of ``tokens``."""
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, config.num_key_value_heads, tokens, head_dim, model.dtype)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return (self.layers, 2, self.kv_heads, self.tokens, self.head_dim)

    @property
    def block_bytes(self) -> int:
        size_bytes: int = self.dtype.itemsize
        for length in self.shape:
            size_bytes *= length
        return size_bytes

    def namespace(self, model_name: str, revision: str) -> Namespace:
        """Identity of the blocks: model, weights, dtype and layout."""
        return Namespace(
            model=model_name,
            revision=revision,
            dtype=str(self.dtype).removeprefix("torch."),
            layout="transformers/LKVHTD",
            tokens_per_block=self.tokens,
            block_bytes_max=self.block_bytes,
            layer_bytes=self.block_bytes // self.layers,
        )


def store_prefix(space: BlockSpace, geometry: CacheGeometry, tokens: list[int], cache: Any) -> int:
    """Put every whole block of a prompt's cache; returns how many blocks are stored (or were there already)."""
    import torch

    keys = prefix_keys(tokens, geometry.tokens)
    blocks = []
    for index in range(len(keys)):
        span = slice(index * geometry.tokens, (index + 1) * geometry.tokens)
        pairs = [torch.stack((layer.keys[0, :, span], layer.values[0, :, span])) for layer in cache.layers]
        blocks.append(torch.stack(pairs).contiguous())
    return sum(1 for status in space.submit_put(keys, blocks).statuses if status)


def restore_prefix(space: BlockSpace, geometry: CacheGeometry, tokens: list[int], config: Any) -> tuple[Any, int]:
    """A ``DynamicCache`` with the longest stored prefix, and its length in tokens (0: nothing was stored).

    At least one token of the prompt is left to compute: generation from a cache that covers all of it is silently wrong.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    keys = prefix_keys(tokens[:-1], geometry.tokens)
    present = space.match_prefix(keys)
    if present == 0:
        return cache, 0
    blocks = torch.empty((present, *geometry.shape), dtype=geometry.dtype)
    statuses = space.get_many_into(keys[:present], list(blocks))
    usable = next((index for index, status in enumerate(statuses) if status is not Status.HIT), present)
    if usable:
        for layer in range(geometry.layers):
            cache.update(_joined(blocks[:usable, layer, 0]), _joined(blocks[:usable, layer, 1]), layer)
    return cache, usable * geometry.tokens


def _joined(part: torch.Tensor) -> torch.Tensor:
    """``[blocks, heads, tokens, dim]`` to ``[1, heads, blocks * tokens, dim]``."""
    return part.transpose(0, 1).flatten(1, 2).unsqueeze(0)
