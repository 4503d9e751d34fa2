"""The bench's answer: one JSON object, or a table for people."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .figures import Item
from .setting import Setting

WIDTH = 120
"""Columns of a table that goes into a file or a pipe."""
_STATES = {"ok": "", "unresolved": "[yellow]unresolved[/]", "void": "[red]void[/]", "skipped": "[dim]skipped[/]"}


def to_json(items: Sequence[Item], machine: dict[str, Any], setting: Setting, elapsed_s: float) -> dict[str, Any]:
    """Everything as plain values."""
    return {
        "machine": machine,
        "settings": {
            "size_bytes": setting.size_bytes,
            "block_bytes": setting.block_bytes,
            "buffer_bytes": setting.buffer_bytes,
            "rounds": setting.rounds,
            "quick": setting.quick,
        },
        "items": [item.to_dict() for item in items],
        "elapsed_s": round(elapsed_s, 1),
    }


def show(items: Sequence[Item], machine: dict[str, Any], setting: Setting) -> None:
    """The table, on standard output."""
    table = Table(title="kvlode bench" + (" (quick: shows that it works, measures nothing)" if setting.quick else ""))
    table.add_column("item", no_wrap=True)
    for column in ("figure", "quartiles", "bar", "store / bare / fio"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for item in items:
        table.add_row(item.name, _figure(item), _quartiles(item), _bar(item), _rates(item), _STATES[item.state])
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    console.print(table)
    for item in items:
        if item.reason is not None:
            console.print(f"{item.name}: {item.reason}", soft_wrap=True)
    memory_gib = machine["memory_bytes"] / 2**30
    direct = {True: "O_DIRECT", False: "no O_DIRECT", None: "O_DIRECT unknown"}[machine["o_direct"]]
    place = f"{machine['file_system']} ({direct}), Linux {machine['kernel']}"
    console.print(f"{machine['cpu']}, {machine['cpu_count']} CPUs, {memory_gib:.0f} GiB, {place}", soft_wrap=True)
    console.print(f"Ratios: median of {setting.rounds} paired rounds, the store by a bare loop over the same places.", soft_wrap=True)


def _figure(item: Item) -> str:
    if item.figure is None:
        return ""
    return f"{item.figure:.3g}" if item.unit == "ratio" else f"{item.figure:.3g} {item.unit}"


def _quartiles(item: Item) -> str:
    return "" if item.quartiles is None or item.rounds < 2 else f"{item.quartiles[0]:.3g} .. {item.quartiles[1]:.3g}"


def _bar(item: Item) -> str:
    mark = {True: "[green]reached[/]", False: "[red]missed[/]", None: ""}[item.reached]
    return "" if item.bar is None else f"{item.bar} {mark}"


def _rates(item: Item) -> str:
    rates = [item.absolute[name] for name in ("store_GB_s", "bare_GB_s", "fio_GB_s") if name in item.absolute]
    return " / ".join(f"{rate:.2f}" for rate in rates)
