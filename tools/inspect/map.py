"""The map: one line a segment, each character one part of the file. Readable without colour: every use has a sign of its own."""

from __future__ import annotations

from itertools import groupby

import numpy as np
from rich.console import Console
from rich.text import Text

from ..output import bytes_text, share_text
from .survey import USES, Cells, SegmentSummary

_SIGNS = {"live": "█", "dead": "░", "notes": "=", "torn": "~", "damaged": "X", "free": "·"}
_PLAIN_SIGNS = {"live": "#", "dead": "-", "notes": "=", "torn": "~", "damaged": "X", "free": "."}
_STYLES = {"live": "green", "dead": "bright_black", "notes": "cyan", "torn": "yellow", "damaged": "bold red", "free": "dim"}
_RARE = ("damaged", "torn")
"""Shown where they occur at all: a page of damage must not vanish in a megabyte of live blocks."""
PINS_NOTE = "pins are leases inside the writing process; no file tells of them, so the map cannot show them"


def use_of_cells(cells: Cells) -> list[str]:
    """What each part of a file is shown as: damage and torn tails wherever there are any, else what takes most of it."""
    shown = [USES[number] for number in np.argmax(cells, axis=0).tolist()]
    for name in reversed(_RARE):
        for position in np.flatnonzero(cells[USES.index(name)] > 0).tolist():
            shown[position] = name
    return shown


def print_map(console: Console, summaries: list[SegmentSummary], width: int) -> None:
    """The map and its legend. ``width`` is the number of cells that the summaries were made with."""
    signs = _SIGNS if console.encoding.lower().startswith("utf") else _PLAIN_SIGNS
    if not summaries:
        return
    scale_bytes = full_width_bytes(summaries)
    digits = max(4, *(len(f"{summary.segment_id:x}") for summary in summaries))
    for summary in summaries:
        line = Text(f"{summary.segment_id:>{digits}x} ")
        length = min(width, max(1, round(width * summary.size_bytes / scale_bytes)))
        for use, run in groupby(use_of_cells(resample(summary.cells, length))):
            line.append(signs[use] * len(list(run)), style=_STYLES[use])
        line.append(" " * (width - length))
        use_bytes = summary.use_bytes
        line.append(f" {share_text(use_bytes['live'], summary.size_bytes):>4} live  {summary.state}")
        console.print(line, no_wrap=True, overflow="crop", crop=True)
    totals = {use: sum(summary.use_bytes[use] for summary in summaries) for use in USES}
    legend = Text()
    for use in USES:
        label = f" {use} {bytes_text(totals[use])}   "
        if len(legend.plain.rpartition("\n")[2]) + 1 + len(label.rstrip()) > console.width:
            legend.append("\n")
        legend.append(signs[use], style=_STYLES[use])
        legend.append(label)
    console.print(legend)


def full_width_bytes(summaries: list[SegmentSummary]) -> int:
    """The size that takes the whole width: that of the largest segment with something in it. Larger empty ones are cut."""
    return max(1, *(summary.size_bytes for summary in summaries if summary.records), 1)


def resample(cells: Cells, length: int) -> Cells:
    """The same bytes in fewer (or as many) parts."""
    count = cells.shape[1]
    if length == count:
        return cells
    sums = np.concatenate([np.zeros((len(cells), 1)), np.cumsum(cells, axis=1)], axis=1)
    edges = np.linspace(0, count, length + 1)
    return np.stack([np.diff(np.interp(edges, np.arange(count + 1), row)) for row in sums])


def map_width(console: Console, segment_ids: list[int]) -> int:
    """Cells that fit a line beside the id and the share."""
    digits = max([4, *(len(f"{segment_id:x}") for segment_id in segment_ids)])
    return max(8, min(256, console.width - digits - len("  100% live  unreadable") - 1))
