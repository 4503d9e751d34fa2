"""The demo's parts on a tiny model, and the demo itself on a short prompt: what comes back gives the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvlode import MemoryStore
from kvlode.tools.demo import JSON_KEYS
from kvlode.tools.demo_cache import CacheGeometry, restore_prefix, store_prefix

BLOCK_TOKENS = 8


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama of two layers with grouped heads and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def space(model: Any) -> Any:
    return MemoryStore(capacity="64MiB").namespace(CacheGeometry.of(model, BLOCK_TOKENS).namespace("tiny", "r1"))


def computed_cache(model: Any, tokens: list[int]) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([tokens]), past_key_values=cache)
    return cache


def tokens_of(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, 97, count).tolist()


def greedy(model: Any, tokens: list[int], cache: Any) -> list[int]:
    inputs = torch.tensor([tokens])
    mask = torch.ones_like(inputs)
    output = model.generate(inputs, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=6, pad_token_id=0)
    return output[0, len(tokens) :].tolist()


def test_a_restored_prefix_holds_the_same_keys_and_values(model: Any, space: Any) -> None:
    tokens = tokens_of(3 * BLOCK_TOKENS + 5)
    cache = computed_cache(model, tokens)
    geometry = CacheGeometry.of(model, BLOCK_TOKENS)
    assert store_prefix(space, geometry, tokens, cache) == 3
    restored, count = restore_prefix(space, geometry, tokens, model.config)
    assert count == 3 * BLOCK_TOKENS
    for ours, theirs in zip(restored.layers, cache.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys[:, :, :count]) and torch.equal(ours.values, theirs.values[:, :, :count])


def test_generation_from_a_restored_prefix_gives_the_tokens_of_a_full_computation(model: Any, space: Any) -> None:
    tokens = tokens_of(5 * BLOCK_TOKENS + 3)
    geometry = CacheGeometry.of(model, BLOCK_TOKENS)
    store_prefix(space, geometry, tokens, computed_cache(model, tokens))
    restored, count = restore_prefix(space, geometry, tokens, model.config)
    assert count == 5 * BLOCK_TOKENS
    assert greedy(model, tokens, restored) == greedy(model, tokens, None)


def test_at_least_one_token_of_the_prompt_is_left_to_compute(model: Any, space: Any) -> None:
    tokens = tokens_of(4 * BLOCK_TOKENS)
    geometry = CacheGeometry.of(model, BLOCK_TOKENS)
    assert store_prefix(space, geometry, tokens, computed_cache(model, tokens)) == 4
    restored, count = restore_prefix(space, geometry, tokens, model.config)
    assert count == 3 * BLOCK_TOKENS
    assert greedy(model, tokens, restored) == greedy(model, tokens, None)


def test_only_the_shared_part_of_another_prompt_is_restored(model: Any, space: Any) -> None:
    tokens = tokens_of(4 * BLOCK_TOKENS)
    geometry = CacheGeometry.of(model, BLOCK_TOKENS)
    store_prefix(space, geometry, tokens, computed_cache(model, tokens))
    other = tokens[: 2 * BLOCK_TOKENS + 3] + tokens_of(20, seed=2)
    restored, count = restore_prefix(space, geometry, other, model.config)
    assert count == 2 * BLOCK_TOKENS
    assert greedy(model, other, restored) == greedy(model, other, None)
    assert restore_prefix(space, geometry, tokens_of(30, seed=4), model.config)[1] == 0


def test_a_block_in_the_middle_that_was_lost_ends_the_prefix(model: Any, space: Any) -> None:
    from kvlode import prefix_keys

    tokens = tokens_of(4 * BLOCK_TOKENS + 1)
    geometry = CacheGeometry.of(model, BLOCK_TOKENS)
    store_prefix(space, geometry, tokens, computed_cache(model, tokens))
    space.delete([prefix_keys(tokens, BLOCK_TOKENS)[2]])
    assert restore_prefix(space, geometry, tokens, model.config)[1] == 2 * BLOCK_TOKENS


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_demo_restores_a_real_models_prefix_in_another_process(tmp_path: Path, dtype: str) -> None:
    command = [str(Path(sys.executable).with_name("kvlode")), "demo", "--json", "--document-tokens", "520", "--dtype", dtype]
    done = subprocess.run([*command, "--store", str(tmp_path / "store")], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert tuple(facts) == JSON_KEYS
    assert facts["tokens_equal"] is True
    assert facts["restored_tokens"] == 512 and 512 < facts["prompt_tokens"] < 600
    assert facts["compression_ratio"] > (1.35 if dtype == "bfloat16" else 1.0)
    assert facts["stored_bytes"] < facts["raw_bytes"] == 2 * 256 * 30 * 2 * 3 * 64 * (2 if dtype == "bfloat16" else 4)
