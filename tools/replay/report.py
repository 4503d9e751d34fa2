"""What ``kvlode replay`` prints of its runs: a table with a column for each policy, and one JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from ..output import bytes_text, count_text, make_table, print_facts, print_table, printable
from .traces import Trace

Facts = Mapping[str, Any]


def trace_facts(trace: Trace) -> dict[str, Any]:
    """The trace itself, for the JSON object."""
    return {
        "trace": str(trace.path),
        "format": trace.format_name,
        "skipped_lines": trace.skipped,
        "skipped_first": list(trace.skipped_lines),
        "notes": list(trace.notes),
        "trace_block_uses": trace.block_uses,
        "repeated_ratio": 1 - trace.unique_blocks / trace.block_uses if trace.block_uses else 0.0,
    }


def print_trace(console: Console, trace: Trace) -> None:
    """What was read, and what was passed over."""
    uses, unique = trace.block_uses, trace.unique_blocks
    repeated = f", {100 * (1 - unique / uses):.1f}% of the uses are repetitions" if uses else ""
    print_facts(
        console,
        [
            ("trace", printable(f"{trace.path}, format {trace.format_name}, {trace.block_tokens} tokens a block")),
            ("requests", f"{len(trace.requests):,} in {duration_text(trace.duration_s)}"),
            ("blocks", f"{uses:,} asked for, {unique:,} unique{repeated}"),
        ],
    )
    for note in trace.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if trace.skipped:
        left = trace.skipped - len(trace.skipped_lines)
        more = f"; {left:,} more" if left else ""
        first = printable("; ".join(trace.skipped_lines))
        console.print(f"note: {count_text(trace.skipped, 'line')} passed over: {first}{more}", style="yellow", soft_wrap=True)


def print_runs(console: Console, runs: Sequence[Facts], bounds: Facts | None) -> None:
    """One column a run, and beside them what no store can beat and what a cache of single blocks does."""
    names = [str(run["policy"]) for run in runs]
    columns = [*names, *(["object LRU", "Belady's bound"] if bounds else [])]
    table = make_table("", *columns, right=columns)
    for label, show in _ROWS:
        cells = [show(run) for run in runs]
        if any(cell != "-" for cell in cells):
            table.add_row(label, *cells, *(_bound_cells(label, bounds) if bounds else []))
        for tier in runs[0].get("tier_hit_ratios", {}) if label == "prefix hits" else ():
            shares = [_percent(run["tier_hit_ratios"][tier]) for run in runs]
            table.add_row(f"  of them from {tier}", *shares, *(["-", "-"] if bounds else []))
    print_table(console, table)
    first = runs[0]
    console.print(
        f"GPU seconds: {first['prefill_tokens_per_s']:,.0f} tokens/s of {first['prefill_model']} on one {first['prefill_gpu']} "
        f"({first['prefill_source']})",
        soft_wrap=True,
    )


def _bound_cells(label: str, bounds: Facts) -> list[str]:
    key = {"prefix hits": "prefix_hit_ratio", "block hits": "block_hit_ratio"}.get(label)
    return [_percent(bounds[name].get(key)) if key else "-" for name in ("lru", "belady")]


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.2f}%"


def _rate(bytes_per_s: float | None) -> str:
    return "-" if bytes_per_s is None else f"{bytes_text(bytes_per_s)}/s"


def duration_text(seconds: float | None) -> str:
    """Seconds in the unit that fits."""
    if seconds is None:
        return "-"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _ages(run: Facts) -> str:
    ages = run.get("eviction_age_s") or {}
    return " / ".join(duration_text(ages[name]) for name in ("p5", "p50", "p95") if name in ages) or "-"


def _of(run: Facts, *names: str) -> Any:
    value: Any = run
    for name in names:
        value = (value or {}).get(name)
    return value


_ROWS = (
    ("capacity, blocks", lambda run: f"{run['capacity_blocks']:,}"),
    ("capacity, bytes", lambda run: bytes_text(run["capacity_bytes"])),
    ("capacity, of unique blocks", lambda run: _percent(run["capacity_share"])),
    ("prefix hits", lambda run: _percent(run["prefix_hit_ratio"])),
    ("block hits", lambda run: _percent(run["block_hit_ratio"])),
    ("write amplification", lambda run: f"{run['write_amplification']:.3f}"),
    ("not admitted, blocks", lambda run: f"{run['rejected_blocks']:,}"),
    ("written", lambda run: bytes_text(run["written_bytes"])),
    ("written a day", lambda run: "-" if run["written_bytes_per_day"] is None else bytes_text(run["written_bytes_per_day"])),
    ("drive writes a day", lambda run: "-" if run["drive_writes_per_day"] is None else f"{run['drive_writes_per_day']:.1f}"),
    ("age at eviction, p5/p50/p95", _ages),
    ("tokens not recomputed", lambda run: f"{run['tokens_not_recomputed']:,}"),
    ("GPU seconds they stand for", lambda run: f"{run['gpu_seconds_saved']:,.0f}"),
    ("after the restart, prefix hits", lambda run: _percent(_of(run, "after_restart", "prefix_hit_ratio"))),
    ("after the restart, from the store", lambda run: _percent(_of(run, "after_restart", "store_hit_ratio"))),
    ("read from the store", lambda run: _rate(run.get("read_bytes_per_s"))),
    ("written to the store", lambda run: _rate(run.get("write_bytes_per_s"))),
    ("hits compared byte by byte", lambda run: f"{run['blocks_verified']:,}" if "blocks_verified" in run else "-"),
    ("blocks a second", lambda run: f"{run['events_per_s']:,}"),
)
