"""kvlode beside other stores on this machine, in interleaved rounds: ``make bench``, or ``python benchmarks/peers.py --help``."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from harness import data as kinds
from harness.chart import draw
from harness.children import children
from harness.peers import KVLODE, NAMES, PEERS
from harness.report import show, to_json
from harness.rounds import Plan, append, load, run_round
from harness.summary import kvlode_void, summarise
from rich.console import Console

from kvlode.engine.config import parse_bytes
from kvlode.tools.bench.machine import check_free_space, machine_facts

BLOCK_BYTES = 4 << 20
QUICK_BLOCK_BYTES = 256 << 10
QUICK_SIZE_BYTES = 8 << 20
ROUNDS = 5


def main(
    folder: Annotated[Path, typer.Argument(help="Measure below this folder, on the drive in question.")] = Path(".bench/peers"),
    only: Annotated[list[str] | None, typer.Option(help="Only kvlode and this store; may be given several times.")] = None,
    size: Annotated[str, typer.Option(help="What a store writes and reads in a round, such as 512MiB.")] = "256MiB",
    codec: Annotated[str, typer.Option(help="What kvlode is opened with.")] = "auto",
    rounds: Annotated[int, typer.Option(help="Rounds to run; 0 to summarise what --append has.")] = ROUNDS,
    append_to: Annotated[Path | None, typer.Option("--append", help="Keep the rounds in this file, after those that it has.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Draw the medians into this SVG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Only show that it works; the figures mean nothing.")] = False,
) -> None:
    """Write, read and kill every store alike, and print medians of kvlode / store of the same round."""
    unknown = [name for name in only or () if name not in NAMES]
    if unknown:
        raise typer.BadParameter(f"there is no store {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if chart is not None and importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter("--chart needs matplotlib: pip install -r benchmarks/requirements.txt")
    console = Console(stderr=True)
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
    results = append_to or work / "rounds.jsonl"
    try:
        size_bytes = QUICK_SIZE_BYTES if quick else parse_bytes(size, "size")
        check_free_space(str(folder), 8 * size_bytes)
        machine = machine_facts(str(folder))
        plan = Plan(work.resolve(), size_bytes, prepared(folder.resolve(), quick=quick, console=console), codec, console)
        settings = {"size_bytes": size_bytes, "codec": codec, "quick": quick, "data": {each.kind: each.text for each in plan.data}}
        records = run(plan, results, settings, 1 if quick else rounds, only)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    items = summarise(records)
    if chart is not None:
        chart.parent.mkdir(parents=True, exist_ok=True)
        draw(records, settings, chart)
    if as_json:
        print(json.dumps(to_json(items, settings, machine)))
    else:
        show(items, records, settings, machine, quick=quick)
    sys.exit(1 if kvlode_void(items) else 0)


def prepared(folder: Path, *, quick: bool, console: Console) -> list[kinds.Data]:
    """Both kinds of blocks; real KV is computed once and stays in ``folder``."""
    real = kinds.real(folder, quick=quick, console=console)
    if isinstance(real, str):
        console.print(f"no real KV: {real}", highlight=False)
    blocks = kinds.incompressible(folder, QUICK_BLOCK_BYTES if quick else BLOCK_BYTES)
    return [blocks] if isinstance(real, str) else [blocks, real]


def run(plan: Plan, results: Path, settings: dict[str, Any], rounds: int, only: list[str] | None) -> list[dict[str, Any]]:
    """Run the rounds and give all records of the file. Raises ``typer.BadParameter`` when those before had other settings."""
    before = load(results)
    if before and before[0]["settings"] != settings:
        raise typer.BadParameter(f"{results} has rounds with other settings: {before[0]['settings']}, now {settings}")
    if not before:
        append(results, {"settings": settings})
    if not rounds:
        return before
    first = max((record["round"] for record in before if "round" in record), default=-1) + 1
    wanted = [peer for peer in PEERS if not only or peer.name in (KVLODE, *only)]
    with children(wanted, plan.folder) as stores:
        missing = {store.peer.name: store.missing for store in stores if store.missing is not None}
        if missing:
            append(results, {"missing": missing})
        for number in range(first, first + rounds):
            for record in run_round(plan, stores, number):
                append(results, record)
    return load(results)


if __name__ == "__main__":
    typer.run(main)
