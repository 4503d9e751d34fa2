"""Miss-ratio curves as a picture or as a page of its own (needs matplotlib: the extra ``plots``)."""

from __future__ import annotations

import html
import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...format.errors import InvalidConfig
from .sweep import BOUNDS, curve_title

COLOURS = ("#1f5fa8", "#c0561a", "#4a8f3c", "#7a4fa0", "#8c6d1f", "#2a8c8c")
BOUND_COLOURS = {"belady": "#222222", "lru": "#999999"}
SUFFIXES = (".svg", ".png")
Curves = Mapping[str, Sequence[Mapping[str, Any]]]


def check_picture(path: Path) -> None:
    """Raise ``InvalidConfig`` for a picture that could not be drawn, before anything was computed for it."""
    if path.suffix.lower() not in SUFFIXES:
        kinds = " or ".join(SUFFIXES)
        raise InvalidConfig("a picture of this kind cannot be drawn", where=path, expected=kinds, actual=path.suffix or "no suffix")


def check_matplotlib() -> None:
    """Raise ``InvalidConfig`` where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidConfig("matplotlib is not installed", action="pip install 'kvlode[plots]', or leave --plot and --html out.")


def draw(curves: Curves, title: str, target: Any, kind: str) -> None:
    """Draw into a file object or to a path; ``kind`` is ``svg`` or ``png``."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.rcParams.update({"svg.hashsalt": "kvlode", "font.size": 9})
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    colours = iter(COLOURS * len(curves))
    for name, points in curves.items():
        bound = name in BOUNDS
        axes.plot(
            [100 * point["capacity_share"] for point in points],
            [100 * point["miss_ratio"] for point in points],
            marker="" if bound else "o",
            markersize=3.5,
            linestyle="--" if bound else "-",
            color=BOUND_COLOURS[name] if bound else next(colours),
            label=curve_title(name),
        )
    axes.set(xscale="log", xlabel="capacity, % of the trace's unique blocks", ylabel="not a prefix hit, % of blocks", title=title)
    axes.xaxis.set_major_formatter(importlib.import_module("matplotlib.ticker").FormatStrFormatter("%g"))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(target, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)


def write_page(curves: Curves, runs: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """One HTML file with the picture and the figures; it loads nothing from elsewhere."""
    picture = io.StringIO()
    draw(curves, title, picture, "svg")
    svg = picture.getvalue()
    svg = svg[svg.index("<svg") :]
    rows = "".join(
        "<tr>"
        f"<td>{html.escape(str(run['policy']))}</td><td>{run['capacity_blocks']:,}</td><td>{100 * run['capacity_share']:.1f}%</td>"
        f"<td>{100 * run['prefix_hit_ratio']:.2f}%</td><td>{100 * run['block_hit_ratio']:.2f}%</td>"
        f"<td>{run['write_amplification']:.3f}</td><td>{run['tokens_not_recomputed']:,}</td><td>{run['gpu_seconds_saved']:,.0f}</td>"
        "</tr>\n"
        for run in runs
    )
    names = ("policy", "blocks", "of unique", "prefix hits", "block hits", "write amplification", "tokens not recomputed", "GPU seconds")
    heads = "".join(f"<th>{name}</th>" for name in names)
    path.write_text(_PAGE.format(title=html.escape(title), svg=svg, heads=heads, rows=rows), encoding="utf-8")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }}
svg {{ max-width: 100%; height: auto }}
table {{ border-collapse: collapse }}
th, td {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
</style></head>
<body><h1>{title}</h1>
{svg}
<table><thead><tr>{heads}</tr></thead>
<tbody>
{rows}</tbody></table>
</body></html>
"""
