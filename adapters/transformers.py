"""Prefixes of Hugging Face transformers models that survive their process: ``PrefixCache`` wraps ``model.generate``.

A block is ``tokens_per_block`` tokens of all layers, K and V, as they lie in a ``DynamicCache``; its key follows from all
tokens up to its end (``kvlode.prefix_keys``), padding left out. Keys carry RoPE already, so a block fits its own position only,
which is what such keys say. Written for and tested with transformers 5.23.0 (``generation/utils.py``, ``cache_utils.py``).

Batches. Rows are padded on the left, and a ``DynamicCache`` is one rectangle: it has the same number of slots in every row. What
is restored is therefore the largest number of slots that *every* row can fill, each from its own blocks and its own padding; a row
may use a part of a block. Rows that have more than the others have it computed again. One row without anything stored and without
padding means that nothing is restored: put such prompts into batches of their own.

A prompt is never restored whole: at least its last token is computed, since generation from a cache that covers the whole
prompt silently gives other tokens.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..engine.contract import Store
from ..format.errors import InvalidConfig
from ..format.keys import prefix_keys
from .attached import CLOSE_S, AttachedStore, run_of_hits
from .transfers import LOAD_TIMEOUT_S
from .transformers_layout import Geometry, describe

logger = logging.getLogger("kvlode")

TOKENS_PER_BLOCK = 128
LOOKUP_TIMEOUT_S = 1.0
"""How long the index may take to say what is stored."""
_BESIDE_THE_TOKENS = (
    *("past_key_values", "inputs", "inputs_embeds", "custom_generate"),
    *("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens"),
)
_ONE_SEQUENCE_A_ROW = ("num_beams", "num_return_sequences")


def _peft_adapters(model: Any) -> tuple[str, ...]:
    """Names of the PEFT adapters that are active in a model, also in one that PEFT wraps."""
    if not getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, "peft_config"):
        return ()
    active = getattr(model, "active_adapters", ())
    try:
        names = active() if callable(active) else active
    except ValueError:  # what transformers says where there is none
        return ()
    return (names,) if isinstance(names, str) else tuple(map(str, names))


@dataclass(frozen=True, slots=True)
class PrefixCounters:
    """What a ``PrefixCache`` did since it was made; of left-padded batches all rows count."""

    prompt_tokens: int = 0
    restored_tokens: int = 0
    stored_blocks: int = 0
    """Blocks handed to the store, those it had already not counted."""
    refused_blocks: int = 0
    """Blocks that the store did not take (buffer full, store failed, read only)."""
    calls_without_the_store: int = 0
    """Calls of ``generate`` that were passed on as they came; the log says why."""


class PrefixCache:
    """Stored prefixes of one model.

    ``store``: a ``kvlode.Store``, which stays its owner's, or a mapping with ``path`` (a folder, or several) and whatever ``kvlode.open``
    takes, in which case ``close`` closes it. ``revision`` must change with the weights; without it, it is that of the folder (or the hub's
    commit) that the model was loaded from. ``settings`` (texts) are whatever else changes the bytes of keys and values. ``salt`` keeps
    apart what must not be shared (a tenant). ``min_load_tokens``: fewer than this many are computed instead of restored.
    A read that is not over after ``load_timeout_s`` is computed instead.

    Raises ``InvalidConfig`` for options that no store has, and for models whose cache cannot be restored: layers with a sliding window,
    linear attention or Mamba (they are named), encoder-decoder models, tensor-parallel models, RoPE that changes with the
    length of the sequence. Everything later that goes wrong with the store is logged and computed. Thread-safe as far as the model is.
    """

    def __init__(
        self,
        store: Store | Mapping[str, Any],
        model: Any,
        *,
        tokens_per_block: int = TOKENS_PER_BLOCK,
        name: str | None = None,
        revision: str | None = None,
        settings: Mapping[str, str] | None = None,
        salt: bytes = b"",
        min_load_tokens: int = 0,
        load_timeout_s: float = LOAD_TIMEOUT_S,
    ) -> None:
        self._model = model
        self._place = (model.dtype, model.device)
        self._adapters = _peft_adapters(model)
        self._geometry = Geometry.of(model, tokens_per_block)
        self._descriptor = describe(model, self._geometry, name=name, revision=revision, settings=settings or {})
        self._owns = isinstance(store, Mapping)
        self._attached = AttachedStore.open(store, where="PrefixCache", sets=True) if isinstance(store, Mapping) else AttachedStore(store)
        self._space = self._attached.space(self._descriptor)
        self._tokens = tokens_per_block
        self._salt = salt
        self._min_load_tokens = min_load_tokens
        self._load_timeout_s = load_timeout_s
        self._counters = PrefixCounters()
        self._lock = threading.Lock()

    # --- generation -----------------------------------------------------------------------------------------------------

    def generate(self, input_ids: Any, attention_mask: Any | None = None, **kwargs: Any) -> Any:
        """``model.generate`` with the longest stored prefix restored before and new whole blocks, also of the answer, stored after.

        ``input_ids`` and ``attention_mask``: ``[batch, tokens]``, integers, padded on the left. Everything else is passed on. Calls
        whose keys and values depend on more than the tokens, or whose cache is not one row a prompt (images, embeddings, a cache of
        the caller, beams, several answers a prompt, assistants, other padding) are passed on without the store.
        """
        reason = self._why_not(input_ids, attention_mask, kwargs)
        if reason is not None:
            logger.warning("generate runs without stored prefixes: %s", reason)
            self._count(calls_without_the_store=1)
            return self._model.generate(input_ids, attention_mask=attention_mask, **kwargs)
        mask = input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask
        cache = self._restored_or_empty(input_ids, mask)
        output = self._model.generate(input_ids, attention_mask=mask, past_key_values=cache, **kwargs)
        self._save_quietly(cache, output if hasattr(output, "shape") else output.sequences, mask)
        return output

    def restore(self, input_ids: Any, attention_mask: Any | None = None) -> tuple[Any, int]:
        """A new ``DynamicCache`` with the longest stored prefix, and how many slots (of every row) it fills; 0 of an empty one.

        ``input_ids``: ``[batch, tokens]`` (or ``[tokens]``). At most ``tokens - 1`` slots are filled. For those who call the model: pass
        the rest of the tokens, ``input_ids[:, n:]``, with the whole mask. Raises ``InvalidConfig`` for padding that is not on the left.
        """
        import torch

        rows = _Rows.of(input_ids, attention_mask)
        keys = [prefix_keys(row, self._tokens, self._salt) for row in rows.tokens]
        runs = self._runs([row_keys[: -(-(len(row) - 1) // self._tokens)] for row_keys, row in zip(keys, rows.tokens, strict=True)])
        slots = rows.common_slots([run * self._tokens for run in runs])
        tensors: list[tuple[Any, Any]] = []
        if slots >= max(1, self._min_load_tokens):
            with torch.no_grad():
                tensors, slots = self._read(rows, keys, slots)
        restored = sum(max(0, slots - padding) for padding in rows.padding) if tensors else 0
        self._count(prompt_tokens=sum(map(len, rows.tokens)), restored_tokens=restored)
        return (self._filled(tensors, slots), slots) if restored else (self._empty(), 0)

    def save(self, cache: Any, input_ids: Any, attention_mask: Any | None = None) -> int:
        """Store the whole blocks of a cache that holds ``input_ids`` from its first slot on; how many of them are stored now.

        ``input_ids`` may be longer than the cache. Copies into the store's buffer and waits for no drive. Raises ``InvalidBlock`` for a
        cache of another model.
        """
        self._geometry.check(cache)
        rows = _Rows.of(input_ids, attention_mask)
        slots = min(rows.slots, cache.get_seq_length())
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        stored = 0
        for index, (tokens, padding) in enumerate(zip(rows.tokens, rows.padding, strict=True)):
            keys = prefix_keys(tokens[: max(0, slots - padding)], self._tokens, self._salt)
            known = run_of_hits(self._space.lookup_nowait(keys))
            if known == len(keys):
                stored += known
                continue
            blocks = [self._geometry.parts(iter(pairs), index, padding + at * self._tokens) for at in range(known, len(keys))]
            job = self._space.submit_put(keys[known:], blocks, parent=keys[known - 1] if known else None)
            taken = sum(map(bool, job.statuses))
            self._count(stored_blocks=taken, refused_blocks=len(blocks) - taken)
            stored += known + taken
        return stored

    # --- the store ------------------------------------------------------------------------------------------------------

    @property
    def counters(self) -> PrefixCounters:
        """What was done so far."""
        return self._counters

    def stats(self) -> Mapping[str, Any]:
        """The store's counters; see ``Store.stats``."""
        return self._attached.stats()

    def clear(self) -> None:
        """Forget every block of this model."""
        self._space.drop()

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Make durable what was stored; False at the deadline."""
        return self._attached.flush(timeout_s)

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """Close a store that was opened here (another one is only flushed); False at the deadline."""
        return self._attached.close(timeout_s) if self._owns else self._attached.flush(timeout_s)

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside ---------------------------------------------------------------------------------------------------------

    def _why_not(self, input_ids: Any, mask: Any | None, kwargs: Mapping[str, Any]) -> str | None:
        """Why a call of ``generate`` has to do without the store."""
        defaults = kwargs.get("generation_config") or self._model.generation_config
        names = (*_ONE_SEQUENCE_A_ROW, *_BESIDE_THE_TOKENS, "cache_implementation", "use_cache")
        options = {name: kwargs.get(name, getattr(defaults, name, None)) for name in names}
        given = [name for name in _BESIDE_THE_TOKENS if options[name] is not None]
        given += [name for name, value in kwargs.items() if name not in given and _has_tensor(value)]
        if given:
            return f"what {', '.join(given)} brings is not in the keys of stored blocks"
        if self._model.training or options["use_cache"] is False:
            return "the model is in training mode, or use_cache is off"
        if (self._model.dtype, self._model.device) != self._place:
            return f"the model was moved from {self._place} to {(self._model.dtype, self._model.device)}"
        if _peft_adapters(self._model) != self._adapters:
            return "other PEFT adapters are active than when this PrefixCache was made"
        for name in _ONE_SEQUENCE_A_ROW:
            if (options[name] or 1) > 1:
                return f"{name} is more than 1"
        if options["cache_implementation"] is not None:
            return f"cache_implementation is {options['cache_implementation']!r}"
        padding_id = kwargs.get("pad_token_id", getattr(defaults, "pad_token_id", None))
        if mask is None and padding_id is not None and bool((input_ids == padding_id).any()):
            return "there may be padding, and no attention_mask says where"
        try:
            rows = _Rows.of(input_ids, mask)
        except InvalidConfig as error:
            return str(error)
        if any(rows.padding) and not _takes(self._model, "position_ids"):
            return "this model does not count positions from behind the padding"
        return None if all(map(len, rows.tokens)) else "a row has no tokens"

    def _empty(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    def _restored_or_empty(self, input_ids: Any, mask: Any) -> Any:
        try:
            return self.restore(input_ids, mask)[0]
        except Exception as error:  # whatever it is, the model can compute the prompt
            logger.error("a prefix could not be restored and is computed: %s", error)
            return self._empty()

    def _save_quietly(self, cache: Any, sequences: Any, mask: Any) -> None:
        try:
            answer = mask.new_ones((mask.shape[0], sequences.shape[1] - mask.shape[1]))
            self.save(cache, sequences, _joined(mask, answer))
        except Exception as error:  # whatever it is, the answer is there
            logger.error("new blocks could not be stored: %s", error)

    def _runs(self, keys: Sequence[Sequence[bytes]]) -> list[int]:
        """How many leading blocks of each row are stored. What the index has not said at the deadline counts as absent."""
        return self._space.stored_prefixes(keys, min(LOOKUP_TIMEOUT_S, self._load_timeout_s))

    def _read(self, rows: _Rows, keys: Sequence[Sequence[bytes]], slots: int) -> tuple[list[tuple[Any, Any]], int]:
        """K and V of every layer, ``[batch, heads, slots or more, dim]``, read straight into place; and how many slots are good."""
        import torch

        counts = [max(0, -(-(slots - padding) // self._tokens)) for padding in rows.padding]
        length = max(padding + count * self._tokens for padding, count in zip(rows.padding, counts, strict=True))
        length = max(length, slots)
        options = {"dtype": self._geometry.dtype}
        tensors = [
            (
                torch.empty((len(counts), layer.key_heads, length, layer.key_dim), device=layer.device, **options),
                torch.empty((len(counts), layer.value_heads, length, layer.value_dim), device=layer.device, **options),
            )
            for layer in self._geometry.layers
        ]
        wanted: list[bytes] = []
        outs: list[list[Any]] = []
        for row, (padding, count) in enumerate(zip(rows.padding, counts, strict=True)):
            for pair in tensors if padding else ():
                for tensor in pair:
                    tensor[row, :, :padding].zero_()  # attention multiplies it by zero, which not every number survives
            wanted += keys[row][:count]
            outs += [self._geometry.parts(iter(tensors), row, padding + at * self._tokens) for at in range(count)]
        statuses = iter(self._space.get_many_into(wanted, outs, timeout=self._load_timeout_s))
        good = [run_of_hits([next(statuses) for _ in range(count)]) * self._tokens for count in counts]
        return tensors, max(0, min(slots, rows.common_slots(good)))

    def _filled(self, tensors: Sequence[tuple[Any, Any]], slots: int) -> Any:
        """A cache that owns the tensors: ``update`` would copy them once more."""
        cache = self._empty()
        for layer, (keys, values) in zip(cache.layers, tensors, strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys[:, :, :slots], values[:, :, :slots]
        return cache

    def _count(self, **more: int) -> None:
        with self._lock:
            self._counters = replace(self._counters, **{name: getattr(self._counters, name) + count for name, count in more.items()})


@dataclass(frozen=True, slots=True)
class _Rows:
    """A batch of prompts: the tokens of each without its padding, and how much padding stands before them."""

    tokens: list[np.ndarray[Any, np.dtype[np.int64]]]
    padding: list[int]
    slots: int

    @classmethod
    def of(cls, input_ids: Any, mask: Any | None) -> _Rows:
        """Raises ``InvalidConfig`` for anything but padding on the left."""
        ids = _host(input_ids)
        ids = ids[None] if ids.ndim == 1 else ids
        marks = np.ones_like(ids) if mask is None else np.atleast_2d(_host(mask))
        if ids.ndim != 2 or marks.shape != ids.shape or bool((np.diff((marks != 0).astype(np.int8), axis=1) < 0).any()):
            raise InvalidConfig(
                "a batch is not padded on the left",
                expected="attention_mask [batch, tokens]: zeros, then ones, in every row",
                actual=f"shapes {ids.shape} and {marks.shape}" if marks.shape != ids.shape else "a zero behind a one",
            )
        padding = [int(row) for row in (marks == 0).sum(axis=1)]
        return cls([row[start:] for row, start in zip(ids, padding, strict=True)], padding, ids.shape[1])

    def common_slots(self, tokens: Sequence[int]) -> int:
        """Slots that every row can fill when that many of its tokens can be had; the last token of a prompt is never among them."""
        return min(self.slots - 1, *(padding + count for padding, count in zip(self.padding, tokens, strict=True)))


def _host(ids: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(ids.detach().cpu() if hasattr(ids, "detach") else ids).astype(np.int64, copy=False)


def _has_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) or (isinstance(value, (list, tuple)) and any(map(_has_tensor, value)))


def _takes(model: Any, name: str) -> bool:
    import inspect

    return name in inspect.signature(model.forward).parameters


def _joined(mask: Any, answer: Any) -> Any:
    import torch

    return torch.cat((mask, answer), dim=1)
