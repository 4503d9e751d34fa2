"""``PrefixCache`` on a tiny Llama with random weights: what comes back gives the tokens of a full computation, or nothing comes back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapter_conformance import WAIT_S, AdapterConformance
from kvlode import InvalidBlock, InvalidConfig, MemoryStore, prefix_keys
from kvlode.adapters.transformers import PrefixCache
from kvlode.tools.damage import damage_payloads
from model import block_bytes

BLOCK_TOKENS = 8
VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(seed: int = 3, **changes: Any) -> Any:
    """A Llama of two layers with grouped heads and random weights, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | {"pad_token_id": 0} | changes))).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(capacity="64MiB")


def prefix_cache(store: Any, model: Any, **options: Any) -> PrefixCache:
    return PrefixCache(store, model, **({"tokens_per_block": BLOCK_TOKENS, "revision": "r1"} | options))


def tokens_of(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCABULARY, count).tolist()


def batch_of(*rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, padded on the left with zeros."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows])
    return ids, (ids != 0).long()


def greedy(generate: Any, ids: torch.Tensor, mask: torch.Tensor, count: int = 6) -> list[list[int]]:
    output = generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count, pad_token_id=0)
    return output[:, ids.shape[1] :].tolist()


def assert_same_answer(cache: PrefixCache, model: Any, *rows: Sequence[int], restored: int) -> None:
    """The batch's answer is the computed one, and so many tokens were restored for it."""
    ids, mask = batch_of(*rows)
    before = cache.counters.restored_tokens
    assert greedy(cache.generate, ids, mask) == greedy(model.generate, ids, mask)
    assert cache.counters.restored_tokens - before == restored
    assert cache.counters.calls_without_the_store == 0


# --- one prompt -----------------------------------------------------------------------------------------------------------------


def test_a_restored_prefix_gives_the_tokens_of_a_full_computation(model: Any, store: MemoryStore) -> None:
    cache = prefix_cache(store, model)
    prompt = tokens_of(5 * BLOCK_TOKENS + 3)
    assert_same_answer(cache, model, prompt, restored=0)
    assert_same_answer(cache, model, prompt, restored=5 * BLOCK_TOKENS)
    assert_same_answer(prefix_cache(store, model), model, prompt, restored=5 * BLOCK_TOKENS)  # another process, so to say


def test_restored_keys_and_values_are_those_that_were_computed(model: Any, store: MemoryStore) -> None:
    from transformers import DynamicCache

    prompt = torch.tensor([tokens_of(3 * BLOCK_TOKENS + 5)])
    computed = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(prompt, past_key_values=computed)
    cache = prefix_cache(store, model)
    assert cache.save(computed, prompt) == 3
    assert cache.save(computed, prompt) == 3, "what is there counts as stored"
    assert cache.counters.stored_blocks == 3
    restored, count = cache.restore(prompt)
    assert count == restored.get_seq_length() == 3 * BLOCK_TOKENS
    for ours, theirs in zip(restored.layers, computed.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys[:, :, :count]) and torch.equal(ours.values, theirs.values[:, :, :count])


def test_those_who_call_the_model_pass_the_rest_of_the_tokens(model: Any, store: MemoryStore) -> None:
    cache = prefix_cache(store, model)
    ids, mask = batch_of(tokens_of(4 * BLOCK_TOKENS + 2))
    greedy(cache.generate, ids, mask)
    restored, count = cache.restore(ids)
    assert count == 4 * BLOCK_TOKENS
    with torch.inference_mode():
        continued = model(ids[:, count:], attention_mask=mask, past_key_values=restored).logits
        whole = model(ids).logits
    assert torch.allclose(continued, whole[:, count:], atol=1e-5)


def test_a_prompt_is_never_restored_whole(model: Any, store: MemoryStore) -> None:
    cache = prefix_cache(store, model)
    prompt = tokens_of(4 * BLOCK_TOKENS)
    assert_same_answer(cache, model, prompt, restored=0)
    assert_same_answer(cache, model, prompt, restored=4 * BLOCK_TOKENS - 1)
    assert cache.restore(torch.tensor(prompt))[1] == 4 * BLOCK_TOKENS - 1
    assert cache.restore(torch.tensor(prompt[: BLOCK_TOKENS + 1]))[1] == BLOCK_TOKENS
    assert cache.restore(torch.tensor(prompt[:1]))[1] == 0


def test_only_what_another_prompt_shares_is_restored(model: Any, store: MemoryStore) -> None:
    cache = prefix_cache(store, model)
    prompt = tokens_of(4 * BLOCK_TOKENS)
    assert_same_answer(cache, model, prompt, restored=0)
    assert_same_answer(cache, model, prompt[: 2 * BLOCK_TOKENS + 3] + tokens_of(20, seed=2), restored=2 * BLOCK_TOKENS)
    assert_same_answer(cache, model, tokens_of(30, seed=4), restored=0)


def test_the_next_turn_of_a_conversation_finds_the_answer_too(model: Any, store: MemoryStore) -> None:
    cache = prefix_cache(store, model)
    history = tokens_of(2 * BLOCK_TOKENS + 1)
    for turn in range(4):
        ids, mask = batch_of(history)
        before = cache.counters.restored_tokens
        answer = greedy(cache.generate, ids, mask, count=2 * BLOCK_TOKENS)[0]
        assert answer == greedy(model.generate, ids, mask, count=2 * BLOCK_TOKENS)[0]
        if turn:
            known = len(history) - 5 - 1  # without the last turn's question, and its answer's last token was never computed
            assert cache.counters.restored_tokens - before == known // BLOCK_TOKENS * BLOCK_TOKENS
        history = [token or 1 for token in history + answer] + tokens_of(5, seed=10 + turn)


def test_a_block_in_the_middle_that_was_lost_ends_the_prefix(model: Any, store: MemoryStore) -> None:
    cache = prefix_cache(store, model)
    prompt = tokens_of(4 * BLOCK_TOKENS + 1)
    assert_same_answer(cache, model, prompt, restored=0)
    cache._space.delete([prefix_keys(prompt, BLOCK_TOKENS)[2]])
    assert_same_answer(cache, model, prompt, restored=2 * BLOCK_TOKENS)
    assert_same_answer(cache, model, prompt, restored=4 * BLOCK_TOKENS)  # it was computed and stored again


def test_a_damaged_store_gives_the_same_tokens(model: Any, tmp_path: Path) -> None:
    options = {"path": os.fspath(tmp_path / "store"), "capacity": "64MiB", "buffer": "8MiB", "gds": "off"}
    prompt = tokens_of(4 * BLOCK_TOKENS + 1)
    with prefix_cache(options, model) as cache:
        assert_same_answer(cache, model, prompt, restored=0)
    with prefix_cache(options, model) as cache:
        assert_same_answer(cache, model, prompt, restored=4 * BLOCK_TOKENS)
    assert damage_payloads(tmp_path / "store")
    with prefix_cache(options, model) as cache:
        assert_same_answer(cache, model, prompt, restored=0)
        assert_same_answer(cache, model, prompt, restored=4 * BLOCK_TOKENS)


def test_short_prefixes_are_computed_when_loading_them_does_not_pay(model: Any, store: MemoryStore) -> None:
    cache = prefix_cache(store, model, min_load_tokens=3 * BLOCK_TOKENS)
    assert_same_answer(cache, model, tokens_of(2 * BLOCK_TOKENS + 1), restored=0)
    assert_same_answer(cache, model, tokens_of(2 * BLOCK_TOKENS + 1), restored=0)


@pytest.mark.parametrize("changes", [{"use_cache": False}, {"prompt_lookup_num_tokens": 3}], ids=lambda c: next(iter(c)))
def test_what_a_generation_config_says_is_heeded_like_an_argument(model: Any, store: MemoryStore, changes: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    cache, ids = prefix_cache(store, model), torch.tensor([tokens_of(60)])
    cache.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    config = GenerationConfig(do_sample=False, max_new_tokens=6, pad_token_id=0, **changes)
    expected = model.generate(ids, generation_config=config)
    assert torch.equal(cache.generate(ids, generation_config=config), expected)
    assert cache.counters.calls_without_the_store == 1


def test_other_adapters_than_at_the_beginning_are_other_weights(store: MemoryStore) -> None:
    model = llama()
    cache, ids = prefix_cache(store, model), torch.tensor([tokens_of(60)])
    cache.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    model._hf_peft_config_loaded, model.active_adapters = True, lambda: ["new"]
    cache.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert cache.counters.calls_without_the_store == 1 and cache.counters.restored_tokens == 0


def test_everything_but_tokens_works_as_in_generate(model: Any, store: MemoryStore) -> None:
    cache = prefix_cache(store, model)
    ids, mask = batch_of(tokens_of(3 * BLOCK_TOKENS + 1))
    for _ in range(2):
        result = cache.generate(ids, mask, do_sample=False, max_new_tokens=4, return_dict_in_generate=True, output_scores=True)
        assert len(result.scores) == 4
        assert result.sequences.tolist() == model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=4).tolist()
    assert cache.counters.restored_tokens == 3 * BLOCK_TOKENS
    chunked = cache.generate(ids, mask, do_sample=False, max_new_tokens=4, prefill_chunk_size=5)
    assert chunked.tolist() == result.sequences.tolist()


# --- batches --------------------------------------------------------------------------------------------------------------------


def test_rows_with_different_padding_restore_what_all_of_them_have(model: Any, store: MemoryStore) -> None:
    cache = prefix_cache(store, model)
    long, short = tokens_of(5 * BLOCK_TOKENS + 3), tokens_of(3 * BLOCK_TOKENS + 1, seed=2)
    padding = len(long) - len(short)
    assert_same_answer(cache, model, long, short, restored=0)
    slots = min(5 * BLOCK_TOKENS, padding + 3 * BLOCK_TOKENS)
    assert_same_answer(cache, model, long, short, restored=slots + slots - padding)
    assert_same_answer(cache, model, long, restored=5 * BLOCK_TOKENS)  # padding is in no key
    assert_same_answer(cache, model, short, restored=3 * BLOCK_TOKENS)


def test_blocks_of_single_prompts_serve_a_batch(model: Any, store: MemoryStore) -> None:
    cache = prefix_cache(store, model)
    rows = [tokens_of(count, seed=count) for count in (40, 33, 26)]
    for row in rows:
        assert_same_answer(cache, model, row, restored=0)
    slots = min(39, 7 + 32, 14 + 24)
    assert_same_answer(cache, model, *rows, restored=slots + (slots - 7) + (slots - 14))


def test_a_row_with_nothing_stored_has_the_batch_computed_up_to_its_padding(model: Any, store: MemoryStore) -> None:
    cache = prefix_cache(store, model)
    known, new = tokens_of(5 * BLOCK_TOKENS + 1), tokens_of(5 * BLOCK_TOKENS + 1, seed=7)
    assert_same_answer(cache, model, known, restored=0)
    assert_same_answer(cache, model, known, new, restored=0)
    brief = tokens_of(5, seed=8)
    assert_same_answer(cache, model, known, brief, restored=len(known) - len(brief))  # the other row has padding there


def test_a_damaged_block_of_one_row_shortens_the_batch(model: Any, store: MemoryStore) -> None:
    cache = prefix_cache(store, model)
    rows = [tokens_of(40, seed=1), tokens_of(33, seed=2)]
    assert_same_answer(cache, model, *rows, restored=0)
    cache._space.delete([prefix_keys(rows[1], BLOCK_TOKENS)[1]])
    assert_same_answer(cache, model, *rows, restored=(7 + 8) + 8)


def test_equal_rows_share_their_blocks(model: Any, store: MemoryStore) -> None:
    cache = prefix_cache(store, model)
    row = tokens_of(2 * BLOCK_TOKENS + 1)
    assert_same_answer(cache, model, row, row, restored=0)
    assert_same_answer(cache, model, row, row, restored=4 * BLOCK_TOKENS)


# --- what is passed on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}],
    ids=lambda options: next(iter(options)),
)
def test_calls_that_the_keys_do_not_describe_are_passed_on(model: Any, store: MemoryStore, options: dict[str, Any]) -> None:
    cache = prefix_cache(store, model)
    ids, mask = batch_of(tokens_of(3 * BLOCK_TOKENS + 1))
    for _ in range(2):
        torch.manual_seed(1)
        ours = cache.generate(ids, mask, max_new_tokens=4, **options)
        torch.manual_seed(1)
        assert ours.tolist() == model.generate(ids, attention_mask=mask, max_new_tokens=4, **options).tolist()
    assert cache.counters.calls_without_the_store == 2
    assert cache.counters.restored_tokens == cache.counters.stored_blocks == 0


def test_unknown_padding_is_passed_on(model: Any, store: MemoryStore) -> None:
    cache = prefix_cache(store, model)
    ids, mask = batch_of(tokens_of(20), tokens_of(11, seed=2))
    settings = {"do_sample": False, "max_new_tokens": 4}
    assert cache.generate(ids, **settings).tolist() == model.generate(ids, **settings).tolist()
    assert cache.counters.calls_without_the_store == 1
    right = mask.flip(1)
    assert cache.generate(ids, right, **settings).tolist() == model.generate(ids, attention_mask=right, **settings).tolist()
    assert cache.counters.calls_without_the_store == 2
    with pytest.raises(InvalidConfig, match="left"):
        cache.restore(ids, right)


def test_errors_of_the_store_are_computed_over(model: Any, store: MemoryStore) -> None:
    cache = prefix_cache(store, model)
    prompt = tokens_of(3 * BLOCK_TOKENS + 1)
    assert_same_answer(cache, model, prompt, restored=0)
    store.close()
    assert_same_answer(cache, model, prompt, restored=0)
    cache._geometry = None  # a defect of ours is no failure of the answer
    ids, mask = batch_of(prompt)
    assert greedy(cache.generate, ids, mask) == greedy(model.generate, ids, mask)


# --- which blocks ---------------------------------------------------------------------------------------------------------------


def test_other_weights_find_nothing(model: Any, store: MemoryStore) -> None:
    prompt = tokens_of(3 * BLOCK_TOKENS + 1)
    assert_same_answer(prefix_cache(store, model), model, prompt, restored=0)
    other = llama(seed=4)
    assert_same_answer(prefix_cache(store, other, revision="r2"), other, prompt, restored=0)
    assert_same_answer(prefix_cache(store, model, salt=b"tenant"), model, prompt, restored=0)
    assert_same_answer(prefix_cache(store, model, settings={"lora": "a"}), model, prompt, restored=0)


@pytest.mark.parametrize("change", [{"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"num_key_value_heads": 4}])
def test_other_positions_and_shapes_find_nothing(model: Any, store: MemoryStore, change: dict[str, Any]) -> None:
    prompt = tokens_of(3 * BLOCK_TOKENS + 1)
    assert_same_answer(prefix_cache(store, model), model, prompt, restored=0)
    other = llama(**change)
    assert_same_answer(prefix_cache(store, other), other, prompt, restored=0)


def test_the_revision_is_that_of_the_folder(store: MemoryStore, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    prompt = tokens_of(3 * BLOCK_TOKENS + 1)
    for seed, restored in ((3, 0), (3, 3 * BLOCK_TOKENS), (5, 0)):
        if restored == 0:  # the second time it is the same folder, read again
            llama(seed).save_pretrained(tmp_path / "model")
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
        assert_same_answer(PrefixCache(store, loaded, tokens_per_block=BLOCK_TOKENS), loaded, prompt, restored=restored)


def test_a_model_from_nowhere_needs_a_revision(model: Any, store: MemoryStore) -> None:
    with pytest.raises(InvalidConfig, match="revision="):
        PrefixCache(store, model)


# --- models that are refused ----------------------------------------------------------------------------------------------------


def test_sliding_windows_are_refused_by_name(store: MemoryStore) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    windowed = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)).eval()
    with pytest.raises(InvalidConfig, match="layer 0: DynamicSlidingWindowLayer, layer 1: DynamicSlidingWindowLayer"):
        prefix_cache(store, windowed)
    whole = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)).eval()
    assert_same_answer(prefix_cache(store, whole), whole, tokens_of(20), restored=0)


def test_linear_attention_is_refused_by_name(store: MemoryStore) -> None:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **SIZES,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    with pytest.raises(InvalidConfig, match="layer 0: LinearAttentionLayer"):
        prefix_cache(store, Qwen3NextForCausalLM(config).eval())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"), ({}, "training mode")],
)
def test_keys_that_change_with_the_sequence_are_refused(store: MemoryStore, changes: dict[str, Any], message: str) -> None:
    other = llama(**changes)
    other.train(message == "training mode")
    with pytest.raises(InvalidConfig, match=message):
        prefix_cache(store, other)


def test_a_cache_of_another_model_is_refused(model: Any, store: MemoryStore) -> None:
    from transformers import DynamicCache

    other, prompt = llama(num_hidden_layers=3), torch.tensor([tokens_of(20)])
    cache = DynamicCache(config=other.config)
    with torch.inference_mode():
        other(prompt, past_key_values=cache)
    with pytest.raises(InvalidBlock, match="3 layers"):
        prefix_cache(store, model).save(cache, prompt)


# --- the conformance suite ------------------------------------------------------------------------------------------------------

HEADS, HEAD_DIM, LAYERS = 2, 256, 2
TINY = {"vocab_size": 16384, "hidden_size": 64, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": HEAD_DIM}
RESTORE_TIMEOUT_S = 4.0
"""Longer than the suite's: the call waits for it, and a busy machine must not turn a hit into a miss."""
CONTENT_BYTES = LAYERS * 2 * HEADS * 16 * HEAD_DIM * 4


class SyntheticEngine:
    """A model that never computes: the cache that it stores holds the suite's bytes."""

    def __init__(self, options: dict[str, Any], model: Any, **names: Any) -> None:
        self.model = model
        self.tokens_per_block = CONTENT_BYTES // (LAYERS * 2 * HEADS * HEAD_DIM * model.dtype.itemsize)
        self.cache = PrefixCache(options, model, tokens_per_block=self.tokens_per_block, load_timeout_s=RESTORE_TIMEOUT_S, **names)

    def ids(self, prefix: Sequence[int]) -> torch.Tensor:
        """A block's tokens are its number; one more follows, since a prompt is never restored whole."""
        return torch.tensor([*np.repeat(np.asarray(prefix), self.tokens_per_block).tolist(), 1])

    def store(self, prefix: Sequence[int]) -> None:
        from transformers import DynamicCache

        shape = (len(prefix), LAYERS, 2, HEADS, self.tokens_per_block, HEAD_DIM)
        data = torch.from_numpy(np.stack([content(block) for block in prefix])).view(self.model.dtype).view(shape)
        lying = data.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).unsqueeze(2)  # [layer, kv, batch, head, token, dim]
        cache = DynamicCache(config=self.model.config)
        for layer in range(LAYERS):
            cache.update(lying[layer, 0], lying[layer, 1], layer)
        self.cache.save(cache, self.ids(prefix))

    def flush(self) -> None:
        self.cache.flush(WAIT_S)

    def lookup(self, prefix: Sequence[int]) -> int:
        return self.cache.restore(self.ids(prefix))[1] // self.tokens_per_block

    def load(self, prefix: Sequence[int]) -> list[np.ndarray | None]:
        cache, count = self.cache.restore(self.ids(prefix))
        blocks: list[np.ndarray | None] = []
        for index in range(len(prefix)):
            span = slice(index * self.tokens_per_block, (index + 1) * self.tokens_per_block)
            found = span.stop <= count
            parts = [(layer.keys[0, :, span], layer.values[0, :, span]) for layer in cache.layers] if found else []
            blocks.append(torch.stack([torch.stack(pair) for pair in parts]).reshape(-1).view(torch.uint8).numpy() if found else None)
        return blocks

    def stop(self) -> None:
        self.cache.close(WAIT_S)


def content(block: int) -> np.ndarray:
    return block_bytes(b"%d" % block, block, CONTENT_BYTES)


@pytest.fixture(scope="module")
def silent_models() -> dict[str, Any]:
    return {}


class TestConformance(AdapterConformance):
    takes_sets = True

    @pytest.fixture(autouse=True)
    def _models(self, silent_models: dict[str, Any]) -> None:
        self.models = silent_models

    def start(
        self, options: dict[str, Any], *, model: str = "model", dtype: str = "bfloat16", rank: int = 0, world: int = 1
    ) -> SyntheticEngine:
        if dtype not in self.models:
            self.models[dtype] = llama(**TINY, num_hidden_layers=LAYERS, num_key_value_heads=HEADS).to(getattr(torch, dtype))
        # A rank of a model whose parts are processes of their own; transformers' tensor parallelism is refused.
        settings = {"rank": f"{rank} of {world}"}
        return SyntheticEngine(options, self.models[dtype], name=model, revision="1", settings=settings)

    def content(self, block: int) -> np.ndarray:
        return content(block)


def test_counters_are_plain_numbers(model: Any, store: MemoryStore) -> None:
    cache = prefix_cache(store, model)
    assert all(value == 0 for value in asdict(cache.counters).values())
    assert cache.stats() and cache.flush(WAIT_S) and cache.close(WAIT_S)
