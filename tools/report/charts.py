"""The page's charts as inline SVG. Colours are the page's own variables, so that they follow light and dark.

Only figures and words of kvlode are drawn, never a text from a store. Needs matplotlib (``pip install 'kvlode[report]'``).
"""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...engine.miss_ratio import MissRatioCurve
from ...format.errors import InvalidConfig
from ..output import bytes_text

# Colours that matplotlib writes and nobody sees: each is replaced by a variable of the page.
_VARIABLES = {
    "#010203": "var(--text)",
    "#010204": "var(--muted)",
    "#010205": "var(--line)",
    "#010206": "var(--live)",
    "#010207": "var(--notes)",
    "#010208": "var(--torn)",
    "#010209": "var(--damaged)",
}
TEXT, MUTED, LINE, GREEN, BLUE, AMBER, RED = _VARIABLES
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_FONT = re.compile(r"font: ([\d.]+px) [^;\"]*")


def require_matplotlib() -> None:
    """Raise ``InvalidConfig`` when the library that draws is not installed."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise InvalidConfig(
            "the report's charts need matplotlib",
            expected="matplotlib beside kvlode",
            actual=str(error),
            action="pip install 'kvlode[report]'",
        ) from None


def bars(name: str, label: str, names: Sequence[str], values: Sequence[float], axis: str, *, bytes_axis: bool = False) -> str:
    """Columns, one for each name; ``label`` says to those who do not see it what it shows."""

    def draw(axes: Any) -> None:
        drawn = axes.bar(range(len(names)), values, color=BLUE, width=0.78)
        texts = [(bytes_text(value) if bytes_axis else f"{value:,.0f}") if value else "" for value in values]
        axes.bar_label(drawn, texts, padding=2, fontsize=7.5, color=MUTED)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel(axis)
        axes.set_ylim(0, 1.15 * max([*values, 1]))
        axes.set_yticks([])

    return _svg(name, label, draw, (5.6, 2.3))


def curve_chart(name: str, curve: MissRatioCurve, capacity_bytes: int | None, knee_bytes: int | None) -> str:
    """Blocks to compute by capacity; the store's own capacity and the knee are marked."""

    def draw(axes: Any) -> None:
        shares = [100 * ratio for ratio in curve.miss_ratios]
        axes.plot(curve.capacity_bytes, shares, color=BLUE, linewidth=2)
        axes.fill_between(curve.capacity_bytes, shares, color=BLUE, alpha=0.12)
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 104)
        left, right = curve.capacity_bytes[0], max(curve.capacity_bytes[-1], 2 * curve.capacity_bytes[0])
        if capacity_bytes:
            left, right = min(left, capacity_bytes), max(right, capacity_bytes)
        axes.set_xlim(left, right)
        steps = _tick_step(left, right)
        first = 1 << left.bit_length()
        ticks = [first << steps * number for number in range(64) if first << steps * number <= right]
        axes.set_xticks(ticks, [bytes_text(tick).replace(".0 ", " ") for tick in ticks])
        axes.minorticks_off()
        axes.grid(color=LINE, linewidth=0.7)
        for size_bytes, colour, text, height in ((capacity_bytes, GREEN, "capacity", 0.06), (knee_bytes, AMBER, "knee", 0.18)):
            if size_bytes:
                axes.axvline(size_bytes, color=colour, linewidth=1.6, linestyle="--")
                place = {"xytext": (4, 0), "textcoords": "offset points", "color": colour, "fontsize": 9}
                axes.annotate(text, (size_bytes, height), xycoords=("data", "axes fraction"), **place)
        axes.set_xlabel("room for blocks, as stored")
        axes.set_ylabel("blocks to compute, of 100")

    return _svg(name, "miss ratio by capacity", draw, (9.6, 3.1))


def _tick_step(left: float, right: float) -> int:
    doublings = 0
    while left * 2 <= right:
        left, doublings = left * 2, doublings + 1
    return max(1, -(-doublings // 10))


def latency_chart(name: str, latency: Mapping[str, Mapping[str, Any]], shown: Sequence[str]) -> str:
    """How many of 100 calls took at most so long, by kind of call."""

    def draw(axes: Any) -> None:
        for operation, colour in zip(shown, (GREEN, BLUE, AMBER, RED), strict=False):
            buckets, total, sums, ends = latency[operation]["buckets"], latency[operation]["count"], [0.0], list[float]()
            for end, count in buckets:
                ends.append(1000 * (end if end is not None else 2 * (ends[-1] / 1000 if ends else 1.0)))
                sums.append(sums[-1] + 100 * count / total)
            axes.plot([ends[0] / 1.8, *ends], sums, color=colour, linewidth=2, label=operation.replace("_", " "))
        axes.set_xscale("log")
        axes.set_ylim(0, 104)
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} ms")
        axes.grid(color=LINE, linewidth=0.7)
        axes.set_ylabel("calls done, of 100")
        axes.legend(frameon=False, labelcolor=TEXT, loc="lower right", fontsize=9)

    return _svg(name, "calls done by time", draw, (9.6, 2.6))


def _svg(name: str, label: str, draw: Callable[[Any], None], inches: tuple[float, float]) -> str:
    """Draw on fresh axes; the answer is an element for a page. Nothing of one chart depends on another, or on global settings."""
    matplotlib = importlib.import_module("matplotlib")
    figure_class = importlib.import_module("matplotlib.figure").Figure
    settings = {"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9, "text.color": TEXT, "axes.labelcolor": MUTED}
    settings |= {"axes.edgecolor": LINE, "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False}
    text = io.StringIO()
    with matplotlib.rc_context(settings):
        figure = figure_class(figsize=inches, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        draw(axes)
        figure.savefig(text, format="svg", metadata={"Date": None})
    return _inline(name, label, text.getvalue())


def _inline(name: str, label: str, svg: str) -> str:
    """Without what only a file needs; names made unique on the page."""
    svg = _METADATA.sub("", svg[svg.index("<svg") :])
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace(' id="', f' id="{name}-').replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    svg = _FONT.sub(r"font: \1 system-ui, sans-serif", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
