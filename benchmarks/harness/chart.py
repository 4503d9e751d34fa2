"""One picture of the comparison: a panel for each row, a bar for each store, both kinds of blocks side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .peers import KVLODE, PEERS
from .rounds import Record
from .summary import ROWS, Results

COLOURS = {"incompressible": ("#1f5fa8", "#9bb8d8"), "real_kv": ("#c0561a", "#e6b898")}
"""Of kvlode, and of the others."""
SHOWN = ("write", "cold_read", "warm_read", "disk", "write_cpu", "read_cpu")


def draw(records: Sequence[Record], settings: dict[str, Any], path: Path) -> None:
    """Write the chart. Raises ``ImportError`` without matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "kvlode", "font.size": 8})
    rows = [row for row in ROWS if row.name in SHOWN]
    results = Results(records)
    peers = [peer for peer in PEERS if any(results.of(kind, peer.name) for kind in settings["data"])]
    figure, axes = plt.subplots(2, 3, figsize=(11, 7), layout="constrained")
    for place, (row, axis) in enumerate(zip(rows, axes.flat, strict=True)):
        panel(axis, results, row, [peer.name for peer in peers], list(settings["data"]))
        axis.set_yticks(range(len(peers)), [peer.title for peer in peers] if place % 3 == 0 else [""] * len(peers))
    rounds = len({record["round"] for record in results.records})
    size_mib = settings["size_bytes"] >> 20
    figure.suptitle(f"kvlode and other stores: medians of {rounds} interleaved rounds of {size_mib} MiB; lines: their middle half")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def panel(axis: Any, results: Results, row: Any, peers: Sequence[str], kinds: Sequence[str]) -> None:
    height = 0.8 / len(kinds)
    for offset, kind in enumerate(kinds):
        for place, peer in enumerate(peers):
            figures = sorted(results.figures(row, kind, peer).values())
            if not figures or results.problem(row, kind, peer):
                continue
            median = statistics.median(figures)
            low, high = figures[len(figures) // 4], figures[-1 - len(figures) // 4]
            colour = COLOURS[kind][0 if peer == KVLODE else 1]
            label = kind.replace("_", " ") if peer == KVLODE else None
            axis.barh(place + (offset - (len(kinds) - 1) / 2) * height, median, height, color=colour, label=label)
            axis.plot([low, high], [place + (offset - (len(kinds) - 1) / 2) * height] * 2, color="#333333", linewidth=1)
    axis.invert_yaxis()
    axis.set_title(f"{row.title}, {row.unit} ({'more' if row.higher_is_better else 'less'} is better)")
