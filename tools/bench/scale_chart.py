"""The rows of ``scale`` as one picture (needs matplotlib).

``python -m kvlode.tools.bench.scale_chart ANSWER.json... --out scaling.svg``
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

COLOURS = ("#1f5fa8", "#c0561a", "#4a8f3c", "#7a4fa0")
COLUMNS = 4


@dataclass(frozen=True, slots=True)
class Panel:
    """One row of the bench: ``lines`` are what is drawn of each point, with its label; ``fact`` draws a fact instead of the figure."""

    row: str
    title: str
    axis: str
    lines: Mapping[str, str]
    fact: str | None = None
    logarithmic: bool = False


PANELS = (
    Panel("scale_keys", "Lookups by keys in the store", "us a key", {"present": "present", "absent": "absent"}),
    Panel("scale_keys", "512-byte blocks by keys in the store", "us a block", {"put": "put to flush", "get": "cold get, p50"}),
    Panel("scale_threads", "1 MiB blocks by threads", "GB/s", {"put": "put", "hit": "get from the buffer", "get": "cold get"}),
    Panel(
        "scale_threads",
        "p99 of a call by threads",
        "ms",
        {"put": "put", "hit": "get from the buffer", "get": "cold get", "lookup": "lookup of 128 keys"},
        fact="p99_ms",
        logarithmic=True,
    ),
    Panel("scale_namespaces", "1 MiB blocks by namespaces", "GB/s", {"put": "put to flush", "get": "cold get"}),
    Panel("scale_capacity", "Writing by % of capacity put", "by the bare loop", {"put_by_bare": "put to flush"}),
    Panel("scale_capacity", "Calls by % of capacity put", "ms", {"put_p99": "put, p99", "get": "cold get, p50"}),
    Panel("scale_buffer", "1 MiB blocks by buffer", "GB/s", {"burst": "burst of puts", "flush": "with its flush", "hit": "get"}),
)


def main(
    answers: Annotated[list[Path], typer.Argument(help="What `kvlode bench --json` wrote; of an item that comes twice the last counts.")],
    out: Annotated[Path, typer.Option(help="The SVG file to write.")] = Path("scaling.svg"),
) -> None:
    """Draw what was measured."""
    draw([json.loads(path.read_text().splitlines()[-1]) for path in answers], out)


def draw(answers: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the picture. Raises ``ImportError`` without matplotlib."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "kvlode", "font.size": 8})
    pyplot = importlib.import_module("matplotlib.pyplot")
    items = {item["name"]: item for answer in answers for item in answer["items"] if item["value"] is not None}
    figure, axes = pyplot.subplots(-(-len(PANELS) // COLUMNS), COLUMNS, figsize=(13, 6), layout="constrained")
    for panel, axis in zip(PANELS, axes.flat, strict=True):
        _draw_panel(axis, panel, items)
    figure.suptitle("How cost grows: medians of the rounds, bars over their middle half; flat is the goal")
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def points_of(row: str, items: Mapping[str, Any]) -> list[str]:
    """The points of a row, in the order in which they were measured."""
    return list(dict.fromkeys(name.split(".")[1] for name in items if name.startswith(f"{row}.")))


def _draw_panel(axis: Any, panel: Panel, items: Mapping[str, Any]) -> None:
    points = points_of(panel.row, items)
    points.sort(key=lambda point: int(point) if panel.row != "scale_capacity" and point.isdecimal() else 0)
    for colour, (what, label) in zip(COLOURS, panel.lines.items(), strict=False):
        found = [items.get(f"{panel.row}.{point}.{what}") for point in points]
        places = [place for place, item in enumerate(found) if item is not None]
        shown = [item for item in found if item is not None]
        values = [item["facts"][panel.fact] if panel.fact else item["value"] for item in shown]
        axis.plot(places, values, marker="o", markersize=3, color=colour, label=label)
        if panel.fact is None:
            axis.vlines(
                places, [item["spread"][0] for item in shown], [item["spread"][1] for item in shown], color=colour, linewidth=2, alpha=0.5
            )
    axis.set_xticks(range(len(points)), [_name_of(point) for point in points])
    axis.set_title(panel.title)
    axis.set_ylabel(panel.axis)
    if panel.logarithmic:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0, top=1.25 * axis.get_ylim()[1])  # room for the legend
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=7, **({"loc": "lower right"} if panel.logarithmic else {"loc": "upper center", "ncols": 2}))


def _name_of(point: str) -> str:
    """As short as an axis needs it."""
    if point.endswith("000"):
        return f"{int(point) // 1000:,} k" if len(point) < 7 else f"{int(point) // 1_000_000} M"
    return {"turned": "turned\nover", "turned_in_use": "again,\nin use"}.get(point, point.replace("MiB", "\nMiB"))


if __name__ == "__main__":
    typer.run(main)
