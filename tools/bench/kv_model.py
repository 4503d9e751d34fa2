"""Real KV: what the demo's model computes for a text, cut into blocks as the transformers adapter stores them.

Runs in a process of its own (a step of ``child``), so that neither the model's memory nor its threads are there when something is
measured. Weights and sums are float32, keys and values are rounded once: on a CPU without instructions for bfloat16 that is five times as
fast, and the blocks compress the same (1.457 and 1.457 on the same tokens).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...gds.buffers import ByteArray
from ..demo_model import MODEL_NAME, document, load_model
from .processes import Say

DTYPES = ("bfloat16", "float8_e4m3fn")
FLOAT8_MAX = 448.0
"""The largest number of ``float8_e4m3fn``: what is beyond becomes that, as in an engine with a cache of this type and a scale of 1."""


def compute_kv(say: Say, folder: str, sequences: int, tokens: int, block_tokens: int) -> None:
    """Write ``<folder>/<dtype>.kv`` for each of ``DTYPES``: the blocks of ``sequences`` prompts of ``tokens`` tokens, one after the other.

    Raises ``InvalidConfig`` when the model is not installed.
    """
    import torch
    from transformers import DynamicCache

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = load_model("float32")
    text = model.tokenizer(document())["input_ids"]
    for number in range(sequences):
        prompt = [text[(number * tokens + position) % len(text)] for position in range(tokens)]
        cache = DynamicCache(config=model.model.config)
        with torch.inference_mode():
            model.model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1)
            for dtype in DTYPES:
                with Path(folder, f"{dtype}.kv").open("ab") as file:
                    for block in blocks_of(cache, block_tokens, dtype):
                        file.write(block.data)
        say(event="progress", tokens=(number + 1) * tokens)
    layer = cache.layers[0].keys
    shapes = [len(cache.layers), *(layer.shape[1], layer.shape[3]) * 2]
    say(event="computed", model=MODEL_NAME, revision=model.revision, shapes=shapes)


def blocks_of(cache: Any, block_tokens: int, dtype: str) -> Iterator[ByteArray]:
    """The whole blocks of a cache's first row: for each layer K, then V, each ``[kv_heads, tokens, dim]``, without gaps."""
    import torch

    torch_dtype = getattr(torch, dtype)
    for start in range(0, cache.get_seq_length() - block_tokens + 1, block_tokens):
        parts = [tensor[0, :, start : start + block_tokens].reshape(-1) for layer in cache.layers for tensor in (layer.keys, layer.values)]
        numbers = torch.cat(parts)
        if dtype == "float8_e4m3fn":
            numbers = numbers.clamp(-FLOAT8_MAX, FLOAT8_MAX)
        yield np.ascontiguousarray(numbers.to(torch_dtype).view(torch.uint8).numpy())
