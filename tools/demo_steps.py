"""The two processes of ``kvlode demo``: one computes a prefix and stores it, the other restores it and compares.

Run by ``tools.demo`` as ``python -m kvlode.tools.demo_steps STEP ...``; talks in JSON lines on standard output.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..adapters.transformers import PrefixCache
from ..engine.config import StoreConfig
from ..engine.opening import open_store
from ..format.errors import KvlodeError
from .demo_model import MODEL_NAME, DemoModel, document, load_model

BLOCK_TOKENS = 256
DOCUMENT_TOKENS = 12 * BLOCK_TOKENS
ANSWER_TOKENS = 24
QUESTION = "\n\nQuestion: In one sentence, what is this document about?\nAnswer:"


@dataclass(frozen=True, slots=True)
class StepOptions:
    """What both steps are told."""

    store: str
    dtype: str
    document_tokens: int = DOCUMENT_TOKENS
    answer_tokens: int = ANSWER_TOKENS


def say(event: str, **facts: Any) -> None:
    """One event for the parent process."""
    print(json.dumps({"event": event, **facts}), flush=True)


def prompt_of(model: DemoModel, document_tokens: int) -> list[int]:
    """Tokens of the prompt: the beginning of the document, then a question about it."""
    head = model.tokenizer(document())["input_ids"][:document_tokens]
    question = model.tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    return [*head, *question]


def open_for_demo(path: str) -> Any:
    return open_store(path, StoreConfig.build(capacity="2GiB", buffer="96MiB", put_timeout_s=60.0))


def _prepare(options: StepOptions) -> tuple[DemoModel, list[int]]:
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    say("progress", text=f"loading {MODEL_NAME} in {options.dtype} (the first time converts the weights)")
    model = load_model(options.dtype)
    return model, prompt_of(model, options.document_tokens)


def _prefixes(store: Any, model: DemoModel) -> PrefixCache:
    return PrefixCache(store, model.model, tokens_per_block=BLOCK_TOKENS, name=MODEL_NAME, revision=model.revision)


def store_step(options: StepOptions) -> dict[str, Any]:
    """Compute the prompt once and keep its KV cache."""
    import torch
    from transformers import DynamicCache

    model, tokens = _prepare(options)
    say("progress", text=f"computing a prompt of {len(tokens)} tokens")
    cache = DynamicCache(config=model.model.config)
    with torch.inference_mode():
        model.model(torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1)
    with open_for_demo(options.store) as store:
        say("progress", text="storing its KV cache")
        stored = _prefixes(store, model).save(cache, torch.tensor([tokens]))
        if not store.flush(60.0):
            raise KvlodeError("the prefix could not be flushed", where=options.store, actual=store.stats()["counters"])
        counters = store.stats()["counters"]
    return {"blocks": stored, "raw_bytes": counters["written_raw_bytes"], "stored_bytes": counters["written_stored_bytes"]}


def restore_step(options: StepOptions) -> dict[str, Any]:
    """Answer from the restored prefix and from scratch, with the same greedy settings."""
    model, tokens = _prepare(options)
    _warm_up(model, tokens)
    store = open_for_demo(options.store)
    try:
        say("progress", text="restoring the prefix from the drive")
        prefixes = _prefixes(store, model)
        restored, ttft_restore_s = _generate(model, prefixes.generate, tokens, options.answer_tokens)
        io_path = _busiest_path(store.stats()["io"])
    finally:
        store.close()
    say("progress", text=f"computing all {len(tokens)} tokens again, to compare")
    recomputed, ttft_recompute_s = _generate(model, model.model.generate, tokens, options.answer_tokens)
    return {
        "tokens_equal": restored == recomputed,
        "prompt_tokens": len(tokens),
        "restored_tokens": prefixes.counters.restored_tokens,
        "ttft_recompute_s": ttft_recompute_s,
        "ttft_restore_s": ttft_restore_s,
        "io_path": io_path,
        "answer": model.tokenizer.decode(restored),
    }


def _warm_up(model: DemoModel, tokens: list[int]) -> None:
    """First calls set up thread pools and kernels: not part of either figure."""
    _generate(model, model.model.generate, tokens[:32], 2)
    _generate(model, model.model.generate, tokens[:48], 2)


def _generate(model: DemoModel, generate: Callable[..., Any], tokens: list[int], count: int) -> tuple[list[int], float]:
    """Greedy tokens after a prompt, by ``generate`` of the model or of its prefixes, and the seconds to the first of them."""
    import torch

    inputs = torch.tensor([tokens])
    clock = _FirstToken(time.perf_counter())
    output = generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        max_new_tokens=count,
        pad_token_id=model.tokenizer.eos_token_id,
        streamer=clock,
    )
    answer: list[int] = output[0, len(tokens) :].tolist()
    return answer, clock.seconds


class _FirstToken:
    """A streamer that notes when the first new token came (its first call is the prompt)."""

    def __init__(self, started: float) -> None:
        self._started = started
        self._calls = 0
        self.seconds = 0.0

    def put(self, _: Any) -> None:
        self._calls += 1
        if self._calls == 2:
            self.seconds = time.perf_counter() - self._started

    def end(self) -> None:
        """Part of the streamer's interface; nothing is buffered here."""


def _busiest_path(io: dict[str, dict[str, int]]) -> str:
    """The I/O path that most bytes were read through."""
    return max(io, key=lambda path: io[path]["read_bytes"], default="none")


STEPS = {"store": store_step, "restore": restore_step}


def main(arguments: list[str]) -> int:
    """``STEP OPTIONS-AS-JSON``. The last line is the result, or the error in one line."""
    try:
        result = STEPS[arguments[0]](StepOptions(**json.loads(arguments[1])))
    except KvlodeError as error:
        say("error", text=str(error))
        return 8
    say("result", **result)
    return 0


def encode_options(options: StepOptions) -> str:
    return json.dumps(asdict(options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
