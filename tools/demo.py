"""``kvlode demo``: a real model's prefix survives its process and comes back faster than it can be computed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table

from ..format.errors import KvlodeError
from ..gds.machine import try_direct
from .demo_model import cache_folder
from .demo_steps import StepOptions, encode_options

JSON_KEYS = (
    *("tokens_equal", "prompt_tokens", "restored_tokens", "ttft_recompute_s", "ttft_restore_s", "ttft_ratio"),
    *("raw_bytes", "stored_bytes", "compression_ratio", "io_path"),
)


def run_demo(*, dtype: str, store: Path | None, as_json: bool, document_tokens: int, console: Console) -> int:
    """Both processes, then the table (or the JSON object as the last line). Returns the exit code: 1 when the tokens differ.

    ``console`` is for progress (standard error).
    """
    folder = store or Path(tempfile.mkdtemp(prefix="kvlode-demo-", dir=folder_on_a_drive()))
    try:
        options = StepOptions(str(folder), dtype, document_tokens)
        stored = _run_step("store", options, console)
        restored = _run_step("restore", options, console)
    finally:
        if store is None:
            shutil.rmtree(folder, ignore_errors=True)
    facts = summarise(stored, restored)
    if as_json:
        print(json.dumps({key: facts[key] for key in JSON_KEYS}))
    else:
        _show(facts, dtype)
    return 0 if facts["tokens_equal"] else 1


def summarise(stored: dict[str, Any], restored: dict[str, Any]) -> dict[str, Any]:
    """The facts of both steps with the ratios that follow from them."""
    facts = {**stored, **restored}
    facts["ttft_ratio"] = round(facts["ttft_recompute_s"] / facts["ttft_restore_s"], 2)
    facts["compression_ratio"] = round(facts["raw_bytes"] / facts["stored_bytes"], 4) if facts["stored_bytes"] else 0.0
    for key in ("ttft_recompute_s", "ttft_restore_s"):
        facts[key] = round(facts[key], 4)
    return facts


def folder_on_a_drive() -> Path:
    """A folder whose file system takes O_DIRECT, so that the demo reads from a drive and not from memory."""
    candidates = [cache_folder(), Path.cwd(), Path("/var/tmp"), Path(tempfile.gettempdir())]
    cache_folder().mkdir(parents=True, exist_ok=True)
    return next((folder for folder in candidates if folder.is_dir() and try_direct(str(folder)).works), Path.cwd())


def _run_step(name: str, options: StepOptions, console: Console) -> dict[str, Any]:
    """One step in a process of its own; shows its progress, returns its result."""
    command = [sys.executable, "-m", "kvlode.tools.demo_steps", name, encode_options(options)]
    title = {"store": "process 1", "restore": "process 2"}[name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] | None = None
    failure = "it ended without a result"
    assert process.stdout is not None
    try:
        with console.status(f"{title}: starting") as status:
            for line in process.stdout:
                event = parse_answer(line)
                if event.get("event") == "result":
                    result = event
                elif event.get("event") == "error":
                    failure = event["text"]
                elif event.get("event") == "progress":
                    _progress(console, status, f"{title}: {event['text']}")
    except BaseException:
        process.kill()
        raise
    finally:
        code = process.wait()
    if result is None or code != 0:
        raise KvlodeError(f"{title} of the demo failed", expected="exit code 0", actual=f"exit code {code}: {failure}")
    result.pop("event")
    return result


def _progress(console: Console, status: Status, text: str) -> None:
    status.update(text)
    if not console.is_terminal:
        console.print(text)


def parse_answer(line: str) -> dict[str, Any]:
    """An event of a step; other output (of libraries) is none."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _show(facts: dict[str, Any], dtype: str) -> None:
    table = Table(title=f"a prefix of a real model, restored by another process ({dtype})", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    equal = "[green]yes[/]" if facts["tokens_equal"] else "[red]NO[/]"
    rows = [
        ("prompt tokens", f"{facts['prompt_tokens']}"),
        ("restored tokens", f"{facts['restored_tokens']}"),
        ("time to first token, recomputed", f"{facts['ttft_recompute_s']:.3f} s"),
        ("time to first token, restored", f"{facts['ttft_restore_s']:.3f} s"),
        ("ratio", f"{facts['ttft_ratio']:.1f} x"),
        ("raw bytes", f"{facts['raw_bytes']:,}"),
        ("stored bytes", f"{facts['stored_bytes']:,}"),
        ("compression ratio", f"{facts['compression_ratio']:.3f}"),
        ("I/O path of the reads", facts["io_path"]),
        ("same greedy tokens as recomputed", equal),
    ]
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)
