"""What a block of a transformers model is: which layers it has, their shapes, and everything that its bytes depend on.

Facts about ``DynamicCache``, its layers and the configuration are those of transformers 5.23.0 (``cache_utils.py``,
``modeling_rope_utils.py``). The package itself is imported when a model is looked at, not before.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..format.errors import InvalidBlock, InvalidConfig
from ..format.namespace import Namespace
from .identity import weights_revision

LAYOUT = "transformers:layer,kv,head,token,dim"
ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "max_position_embeddings", "alibi")
ROPE_REFUSED = ("dynamic", "longrope")
"""Kinds of RoPE whose keys depend on how long the whole sequence is, not on the tokens before them alone."""
NAMES_SHOWN_MAX = 6


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer's part of a block: ``[kv_heads, tokens, dim]`` for K and for V (which may differ)."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    device: Any

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        return self.key_heads, self.key_dim, self.value_heads, self.value_dim


@dataclass(frozen=True, slots=True)
class Geometry:
    """A block: for each layer K, then V; each ``[kv_heads, tokens, dim]``, contiguous, without gaps."""

    layers: tuple[LayerShape, ...]
    tokens: int
    dtype: Any

    @classmethod
    def of(cls, model: Any, tokens: int) -> Geometry:
        """The shapes that the model's own cache has after one token: no field of a configuration says as much.

        Raises ``InvalidConfig`` for models whose cache cannot be cut at any token: sliding windows, linear attention, Mamba.
        """
        import torch
        from transformers import DynamicCache

        _check_model(model)
        cache = DynamicCache(config=model.config)
        _check_layers(cache)
        with torch.inference_mode():
            model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
        dtypes = {tensor.dtype for layer in cache.layers for tensor in (layer.keys, layer.values)}
        if len(dtypes) != 1:
            raise InvalidConfig("the layers of this model cache different kinds of numbers", actual=sorted(map(str, dtypes)))
        shapes = (
            LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[1], layer.values.shape[3], layer.keys.device)
            for layer in cache.layers
        )
        return cls(tuple(shapes), tokens, dtypes.pop())

    @property
    def layer_bytes(self) -> list[int]:
        return [self.dtype.itemsize * self.tokens * (kh * kd + vh * vd) for kh, kd, vh, vd in (layer.numbers for layer in self.layers)]

    @property
    def block_bytes(self) -> int:
        return sum(self.layer_bytes)

    def check(self, cache: Any) -> None:
        """Raise ``InvalidBlock`` unless the cache is one of this model's."""
        found = [_shape(layer) for layer in cache.layers]
        expected = [(layer.numbers, self.dtype) for layer in self.layers]
        if found != expected:
            raise InvalidBlock(
                "a cache is not one of the model that this PrefixCache was made for",
                expected=f"{len(expected)} layers like {expected[0]}",
                actual=f"{len(found)} layers like {found[0] if found else None}",
            )

    def parts(self, keys_and_values: Iterator[tuple[Any, Any]], row: int, start: int) -> list[Any]:
        """The block at slots ``start`` to ``start + tokens`` of a row: one piece a head, each a view of the tensors where they allow it."""
        stop = start + self.tokens
        pieces: list[Any] = []
        for pair in keys_and_values:
            for tensor in pair:
                pieces += tensor[row, :, start:stop].unbind(0)
        return [piece if piece.is_contiguous() else piece.contiguous() for piece in pieces]


def describe(model: Any, geometry: Geometry, *, name: str | None, revision: str | None, settings: Mapping[str, str]) -> Namespace:
    """The namespace of a model's blocks. Raises ``InvalidConfig`` where nothing says which weights it has."""
    config = model.config.get_text_config(decoder=True)
    name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
    extra = dict(settings)
    extra["rope"] = _json({field: getattr(config, field) for field in ROPE_FIELDS if getattr(config, field, None) is not None})
    numbers = [layer.numbers for layer in geometry.layers]
    uniform = len(set(numbers)) == 1
    extra["shapes"] = (
        _json([len(numbers), *numbers[0]]) if uniform else hashlib.blake2b(_json(numbers).encode(), digest_size=16).hexdigest()
    )
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        facts = quantization.to_dict() if hasattr(quantization, "to_dict") else quantization
        extra["quantization"] = hashlib.blake2b(_json(facts).encode(), digest_size=16).hexdigest()
    return Namespace(
        model=name,
        revision=revision or _revision(model),
        dtype=str(geometry.dtype).removeprefix("torch."),
        layout=LAYOUT,
        tokens_per_block=geometry.tokens,
        block_bytes_max=geometry.block_bytes,
        layer_bytes=geometry.layer_bytes[0] if uniform else None,
        extra=extra,
    )


def _revision(model: Any) -> str:
    """Of the folder, or of the hub's commit, that the model was loaded from."""
    place = getattr(model.config, "_name_or_path", "")
    commit = getattr(model.config, "_commit_hash", None)
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        actual = "a model with adapters of its own (PEFT)"
    elif not place or (commit is None and not os.path.exists(place)):
        actual = f"a model of {place!r}" if place else "a model that was not loaded from anywhere"
    else:
        return weights_revision(place, commit=commit)
    raise InvalidConfig(
        "nothing says which weights this model has",
        expected="a model that was loaded from a folder, or from a hub at a known commit",
        actual=actual,
        action="Pass revision=, a text that changes with the weights.",
    )


def _check_model(model: Any) -> None:
    """Raise ``InvalidConfig`` for models whose keys and values are no function of the tokens before them."""
    found = None
    if getattr(model.config, "is_encoder_decoder", False):
        found = "an encoder-decoder model"
    elif model.training:
        found = "a model in training mode: call model.eval()"
    elif (getattr(model, "_tp_size", None) or 1) > 1:
        found = "a tensor-parallel model, whose ranks would have to agree on how much they restore"
    if found is None:
        config = model.config.get_text_config(decoder=True)
        kinds = _rope_kinds([getattr(config, field, None) for field in ("rope_parameters", "rope_scaling")])
        refused = sorted(kinds & set(ROPE_REFUSED))
        if refused:
            found = f"RoPE of type {refused[0]!r}, whose keys change with the length of the whole sequence"
    if found is not None:
        raise InvalidConfig(
            "the prefixes of this model cannot be stored", where=type(model).__name__, expected="a decoder in eval mode", actual=found
        )


def _check_layers(cache: Any) -> None:
    """Raise ``InvalidConfig`` that names the layers whose cache is not simply all keys and values so far."""
    from transformers.cache_utils import DynamicLayer

    other = [f"layer {index}: {type(layer).__name__}" for index, layer in enumerate(cache.layers) if type(layer) is not DynamicLayer]
    if other or not cache.layers:
        shown = ", ".join(other[:NAMES_SHOWN_MAX]) + (f" and {len(other) - NAMES_SHOWN_MAX} more" if len(other) > NAMES_SHOWN_MAX else "")
        raise InvalidConfig(
            "this model has layers that cannot be restored from blocks of tokens (a sliding window keeps only its last tokens, "
            "linear attention and Mamba only a state)",
            expected="full attention (DynamicLayer) in every layer",
            actual=shown or "no layers",
        )


def _shape(layer: Any) -> tuple[tuple[int, int, int, int], Any] | None:
    if getattr(layer, "keys", None) is None or layer.keys.dim() != 4 or layer.keys.dtype != layer.values.dtype:
        return None
    return (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[1], layer.values.shape[3]), layer.keys.dtype


def _rope_kinds(settings: Any) -> set[str]:
    """Every ``rope_type`` (or ``type``) in nested settings."""
    if isinstance(settings, Mapping):
        own = {str(settings[name]) for name in ("rope_type", "type") if settings.get(name)}
        return own.union(*(_rope_kinds(value) for value in settings.values()))
    if isinstance(settings, list):
        return set().union(*(_rope_kinds(value) for value in settings))
    return set()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
