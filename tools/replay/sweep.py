"""Miss-ratio curves: the same trace under each policy at several capacities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from ..output import bytes_text, make_table, print_table
from .bounds import bounds_of
from .options import Settings
from .runs import capacity_blocks_of, run_simulation
from .traces import Trace

BOUNDS = {"belady": "Belady's bound", "lru": "object LRU"}


def sweep(trace: Trace, settings: Settings, advance: Callable[[int], None] = lambda requests: None) -> dict[str, Any]:
    """Curves by name (policies as they were asked for, ``lru``, ``belady``), each a list of points, and the facts of every run."""
    capacities = sorted({capacity_blocks_of(trace, settings, share) for share in settings.sweep_shares})
    runs = []
    for policy in settings.policies:
        runs += [run_simulation(trace, settings, policy, capacity, advance) for capacity in capacities]
    curves = {policy.text: [_point(run) for run in runs if run["policy"] == policy.text] for policy in settings.policies}
    bounds = [bounds_of(trace, capacity, advance) for capacity in capacities]
    for name in BOUNDS:
        points = [
            {"capacity_blocks": capacity, "capacity_share": capacity / max(1, trace.unique_blocks), **bound[name]}
            for capacity, bound in zip(capacities, bounds, strict=True)
        ]
        curves[name] = [point | {"miss_ratio": 1 - point["prefix_hit_ratio"]} for point in points]
    return {"curves": curves, "runs": runs}


def _point(run: Mapping[str, Any]) -> dict[str, Any]:
    names = ("capacity_blocks", "capacity_share", "prefix_hit_ratio", "block_hit_ratio", "write_amplification")
    return {name: run[name] for name in names} | {"miss_ratio": 1 - run["prefix_hit_ratio"]}


def curve_title(name: str) -> str:
    """A curve's name for people."""
    return BOUNDS.get(name, name)


def print_curves(console: Console, curves: Mapping[str, Sequence[Mapping[str, Any]]], block_bytes: int) -> None:
    """Prefix misses by capacity, one column a curve."""
    titles = [curve_title(name) for name in curves]
    table = make_table("capacity", "of unique", *titles, right=("of unique", *titles), title="Share of blocks that are no prefix hit")
    for points in zip(*curves.values(), strict=True):
        first = points[0]
        cells = [f"{100 * point['miss_ratio']:.2f}%" for point in points]
        table.add_row(bytes_text(first["capacity_blocks"] * block_bytes), f"{100 * first['capacity_share']:.1f}%", *cells)
    print_table(console, table)


def sweep_requests(trace: Trace, settings: Settings) -> int:
    """How many requests a sweep goes through, for its progress."""
    return len(trace.requests) * len(set(settings.sweep_shares)) * (len(settings.policies) + len(BOUNDS))
