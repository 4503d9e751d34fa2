"""The table of ``make bench-engines`` for people."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..bench.figures import Item
from .rounds import QUICK, Sizes

WIDTH_OF_A_FILE = 140
_MARKS = {True: " [green]reached[/]", False: " [red]missed[/]", None: ""}


def show(items: Sequence[Item], machine: dict[str, Any], sizes: Sizes, console: Console | None = None) -> None:
    """On standard output unless said otherwise."""
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    quick = " (quick: shows that it works, measures little)" if sizes == QUICK else ""
    table = Table(title=f"real vLLM on the CPU, with the store and without it{quick}")
    table.add_column("item", no_wrap=True)
    for column in ("with", "without", "unit", "with / without", "quartiles", "bar"):
        table.add_column(column, justify="right", no_wrap=True)
    for item in items:
        arms = [f"{item.absolute[arm]:.3g}" for arm in ("with_store", "without_store")]
        spread = "" if item.quartiles is None or item.rounds < 2 else f"{item.quartiles[0]:.3g} .. {item.quartiles[1]:.3g}"
        bar = "" if item.bar is None else f"{item.bar}{_MARKS[item.reached]}"
        figure = "" if item.figure is None else f"{item.figure:.3g}"
        table.add_row(item.name, *arms, item.absolute["unit"], figure, spread, bar)
    console.print(table)
    for item in items:
        if item.reason is not None:
            console.print(f"{item.name}: {item.state}: {item.reason}", markup=False, soft_wrap=True)
    console.print(
        f"Median of {sizes.rounds} rounds, each with both servers one after the other. vLLM {machine['vllm']}, {machine['model']}."
    )
    console.print(f"{machine['cpu']}, {machine['cpu_count']} CPUs, load {machine['load_average']:.1f} when it began.", soft_wrap=True)
