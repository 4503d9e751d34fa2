"""``make demo-vllm``: real vLLM on the CPU answers a prompt, is stopped, and a new one answers it from the store.

Four processes, one after the other: computed and stored; restored; with flipped bytes in the store; with the store deleted. All
have to give the same greedy tokens. The last line is one JSON object. Run in the environment of
``tests/engines/requirements-vllm.txt``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ..format.errors import KvlodeError
from .damage import damage_payloads
from .demo import folder_on_a_drive, parse_answer
from .demo_vllm_step import ANSWER_TOKENS, VllmOptions

JSON_KEYS = (
    *("tokens_equal", "prompt_tokens", "restored_tokens", "ttft_recompute_s", "ttft_restore_s", "ttft_ratio", "damaged_tokens_equal"),
    *("deleted_tokens_equal", "damaged_restored_tokens"),
)
PROCESS_TIMEOUT_S = 600.0
LOG_LINES = 30


def run_demo(options: VllmOptions, console: Console) -> dict[str, Any]:
    """The four processes; the facts of all. ``console`` is for progress. Raises ``KvlodeError`` when a process fails."""
    folder = Path(options.store)
    computed = run_step("process 1, computes and stores", options, console)
    restored = run_step("process 2, restores", options, console)
    console.print(f"flipping a bit in {damage_payloads(folder)} pages of the store")
    damaged = run_step("process 3, with a damaged store", options, console)
    console.print("deleting the store")
    shutil.rmtree(folder)
    deleted = run_step("process 4, with its store deleted", options, console)
    return {
        "tokens_equal": restored["tokens"] == computed["tokens"],
        "prompt_tokens": computed["prompt_tokens"],
        "restored_tokens": restored["restored_tokens"],
        "ttft_recompute_s": round(computed["ttft_s"], 4),
        "ttft_restore_s": round(restored["ttft_s"], 4),
        "ttft_ratio": round(computed["ttft_s"] / restored["ttft_s"], 2),
        "damaged_tokens_equal": damaged["tokens"] == computed["tokens"],
        "deleted_tokens_equal": deleted["tokens"] == computed["tokens"],
        "damaged_restored_tokens": damaged["restored_tokens"],
    }


def run_step(title: str, options: VllmOptions, console: Console) -> dict[str, Any]:
    """One process; shows its progress, returns its result. Raises ``KvlodeError`` with the end of its log when it fails."""
    command = [sys.executable, "-m", "kvlode.tools.demo_vllm_step", json.dumps(asdict(options))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    result: dict[str, Any] | None = None
    log: deque[str] = deque(maxlen=LOG_LINES)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            event = parse_answer(line)
            if event.get("event") == "result":
                result = event
            elif event.get("event") == "progress":
                console.print(f"{title}: {event['text']}")
            else:
                log.append(line.rstrip())
    except BaseException:
        process.kill()
        raise
    finally:
        code = process.wait(PROCESS_TIMEOUT_S)
    if result is None or code != 0:
        raise KvlodeError(f"{title}: it failed", expected="exit code 0", actual=f"exit code {code}", action="\n".join(["its log:", *log]))
    return result


def with_store(run: Callable[[str], dict[str, Any]], store: Path | None) -> dict[str, Any]:
    """Call ``run`` with the folder that was asked for, or with one that is removed afterwards."""
    if store is not None:
        return run(str(store))
    folder = Path(tempfile.mkdtemp(prefix="kvlode-demo-vllm-", dir=folder_on_a_drive()))
    try:
        return run(str(folder / "store"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo-vllm", description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="float32 is the faster one on most CPUs")
    parser.add_argument("--prompt-tokens", type=int, default=3000)
    parser.add_argument("--answer-tokens", type=int, default=ANSWER_TOKENS)
    parser.add_argument("--store", type=Path, default=None, help="folder of the store (it is deleted in the end); default: a temporary one")
    given = parser.parse_args()
    console = Console(stderr=True)
    try:
        facts = with_store(
            lambda folder: run_demo(VllmOptions(folder, given.dtype, given.prompt_tokens, given.answer_tokens), console), given.store
        )
    except KvlodeError as error:
        console.print(str(error), markup=False)
        return 1
    print(json.dumps({key: facts[key] for key in JSON_KEYS}))
    return 0 if facts["tokens_equal"] and facts["damaged_tokens_equal"] and facts["deleted_tokens_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
