"""The answer: a table for each kind of blocks, or one JSON object."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from kvlode.tools.bench.figures import Item

from .peers import KVLODE, PEERS
from .rounds import Record
from .summary import ROWS, Results

WIDTH = 190
MARKS = {"unresolved": "~", "void": "void ", "ok": "", "skipped": ""}


def to_json(items: Sequence[Item], settings: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """Everything as plain values; ``items`` as those of ``kvlode bench``."""
    return {"machine": machine, "settings": settings, "items": [item.to_dict() for item in items]}


def show(items: Sequence[Item], records: Sequence[Record], settings: dict[str, Any], machine: dict[str, Any], *, quick: bool) -> None:
    """The tables, on standard output."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    results = Results(records)
    for data, text in settings["data"].items():
        console.print(table(items, results, data, f"{data}: {text}" + (" (quick: measures nothing)" if quick else "")))
    console.print(bars(items))
    console.print(
        "Each cell: the store's own median, and in parentheses the median of kvlode / store of the same rounds: green where kvlode is "
        "better, red where it is worse, ~ where the middle half of the rounds spreads over more than 10 % (unresolved).",
        soft_wrap=True,
    )
    for (state, reason), names in reasons(items).items():
        console.print(f"{state}: {', '.join(names)}: {reason}", soft_wrap=True)
    for peer, reason in results.missing.items():
        console.print(f"{peer} did not run: {reason}", soft_wrap=True)
    memory_gib = machine["memory_bytes"] / 2**30
    place = f"{machine['file_system']}, Linux {machine['kernel']}"
    console.print(f"{machine['cpu']}, {machine['cpu_count']} CPUs, {memory_gib:.0f} GiB, {place}", soft_wrap=True)


def reasons(items: Sequence[Item]) -> dict[tuple[str, str], list[str]]:
    """Why figures are void or absent, each reason once."""
    found: dict[tuple[str, str], list[str]] = {}
    for item in items:
        if item.reason is not None and item.state in ("void", "skipped"):
            found.setdefault((item.state, item.reason), []).append(item.name)
    return found


def table(items: Sequence[Item], results: Results, data: str, title: str) -> Table:
    found = {item.name: item for item in items}
    shown = Table(title=title)
    shown.add_column("store", no_wrap=True)
    for row in ROWS:
        shown.add_column(f"{row.title}\n{row.unit}", justify="right")
    shown.add_column("served\nafter kill", justify="right")
    for peer in PEERS:
        cells = [own(results, row, data) if peer.name == KVLODE else cell(found[f"{data}.{row.name}.{peer.name}"]) for row in ROWS]
        served = found[f"{data}.served_after_kill.{peer.name}"]
        share = "" if served.figure is None else f"{served.absolute['served']}/{served.absolute['of']}"
        wrong = served.absolute.get("wrong_blocks")
        shown.add_row(peer.title, *cells, share + (f"\n[red]{wrong} wrong[/]" if wrong else ""))
    return shown


def own(results: Results, row: Any, data: str) -> str:
    figures = results.figures(row, data, KVLODE)
    return f"{statistics.median(figures.values()):.3g}" if figures else "[red]failed[/]"


def cell(item: Item) -> str:
    if item.figure is None:
        return "[dim]-[/]"
    colour = "green" if item.absolute["faster"] else "red"
    return f"{item.absolute['theirs']:.3g}\n[{colour}]({MARKS[item.state]}{item.figure:.3g})[/]"


def bars(items: Sequence[Item]) -> Table:
    """What was expected."""
    shown = Table(title="Expected")
    for column in ("item", "against", "kvlode / peer", "middle half", "bar", ""):
        shown.add_column(column, no_wrap=True)
    for item in items:
        if not item.name.startswith("expected.") or item.figure is None or item.quartiles is None:
            continue
        verdict = {True: "[green]reached[/]", False: "[red]missed[/]", None: item.state}[item.reached]
        middle = f"{item.quartiles[0]:.3g} .. {item.quartiles[1]:.3g}"
        state = " unresolved" if item.state == "unresolved" else ""
        shown.add_row(item.name, item.absolute["peer"], f"{item.figure:.3g}", middle, str(item.bar), verdict + state)
    return shown
