"""``inspect segments``: one row a segment. ``inspect segment``: the records of one."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
from rich.console import Console

from ...format.dump import annotated
from ...format.segment import SEGMENT_TABLE
from ..liveness import RecordState
from ..output import (
    age_text,
    bytes_text,
    key_text,
    make_table,
    print_facts,
    print_left_out,
    print_problems,
    print_table,
    share_text,
    time_text,
)
from ..segment_view import row_facts
from .survey import USES, SegmentSummary, Survey


def segments_facts(survey: Survey, limit: int) -> dict[str, Any]:
    """The first ``limit`` segments, oldest first."""
    summaries = list(islice(survey.summaries(), limit))
    count = len(survey.files.segment_ids())
    return {
        "path": str(survey.files.path),
        "rows": [summary.facts() for summary in summaries],
        "rows_left_out": max(0, count - len(summaries)),
        "pinned": None,
        "heat_known": survey.heat is not None,
        "problems": survey.problems + [problem for summary in summaries for problem in summary.problems],
        "notes": [note for summary in summaries for note in summary.notes],
    }


def print_segments(console: Console, facts: dict[str, Any], now_ns: int) -> None:
    """For people; narrow terminals get fewer columns."""
    wide = console.width >= 120
    columns = ["segment", "state", "size", "live", "dead", "torn", "blocks", "age", "hits"]
    if wide:
        columns = [
            "segment",
            "state",
            "size",
            "live",
            "dead",
            "notes",
            "torn",
            "damaged",
            "free",
            "blocks",
            "epoch",
            "oldest",
            "newest",
            "hits",
        ]
    table = make_table(*columns, right=set(columns) - {"segment", "state"})
    for row in facts["rows"]:
        size, use = row["size_bytes"], row["use_bytes"]
        cells = {
            "segment": row["segment"].lstrip("0").rjust(1, "0"),
            "state": row["state"],
            "size": bytes_text(size),
            "blocks": f"{row['blocks_live']:,}/{row['blocks']:,}",
            "epoch": "-" if row["epoch"] is None else str(row["epoch"]),
            "age": age_text(row["newest_written_at_ns"], now_ns),
            "oldest": age_text(row["oldest_written_at_ns"], now_ns),
            "newest": age_text(row["newest_written_at_ns"], now_ns),
            "hits": f"{row['hits']:,}" if facts["heat_known"] else "-",
        } | {name: share_text(use[name], size) for name in USES}
        table.add_row(*(cells[name] for name in columns))
    print_table(console, table)
    print_left_out(console, facts["rows_left_out"], "segments")
    print_problems(console, facts["problems"], facts["notes"])


def segment_facts(survey: Survey, segment_id: int, limit: int) -> dict[str, Any]:
    """One segment with its first ``limit`` records."""
    view = survey.files.segment(segment_id)
    summary: SegmentSummary = survey.summary(view)
    belongs = survey.counts(view)
    states = survey.log.states_of(segment_id, view.table) if belongs else np.zeros(len(view.table), dtype=np.uint8)
    rows = []
    for row in range(min(limit, len(view.table))):
        facts = row_facts(view.table, row)
        facts["state"] = RecordState(int(states[row])).name.lower() if belongs else "unknown"
        key = view.table.key(row)
        facts["hits"] = survey.hits(bytes(view.table.namespace[row]), key) if key and survey.heat is not None else None
        rows.append(facts)
    header = None if view.header is None else view.header.pack()
    return summary.facts() | {
        "path": str(survey.files.segment_path(segment_id)),
        "sealed": view.sealed,
        "first_live_segment": None if view.header is None else view.header.first_live_segment,
        "log_end": view.log_end,
        "data_end": view.data_end,
        "header_hex": header,
        "rows": rows,
        "rows_left_out": max(0, len(view.table) - limit),
    }


def print_segment(console: Console, facts: dict[str, Any]) -> None:
    """For people."""
    use, size = facts["use_bytes"], facts["size_bytes"]
    print_facts(
        console,
        [
            ("segment", facts["path"]),
            ("state", facts["state"]),
            ("size", f"{bytes_text(size)}, {bytes_text(facts['allocated_bytes'])} allocated, records end at {facts['log_end']:,}"),
            ("records", f"{facts['records']:,}, of which {facts['blocks']:,} blocks, {facts['blocks_live']:,} live"),
            ("use", ", ".join(f"{name} {share_text(use[name], size)}" for name in USES)),
            ("written", f"{time_text(facts['oldest_written_at_ns'])} to {time_text(facts['newest_written_at_ns'])}"),
        ],
    )
    if facts["header_hex"] is not None:
        console.print("header", style="bold")
        for line in annotated(SEGMENT_TABLE, facts["header_hex"]):
            console.print(f"  {line}", soft_wrap=True)
    console.print("records", style="bold")
    columns = ["offset", "type", "state", "key", "raw", "stored", "depth"]
    if console.width >= 120:
        columns += ["codec", "namespace", "version", "written", "hits"]
    table = make_table(*columns, right=("offset", "raw", "stored", "depth", "version", "hits"))
    for row in facts["rows"]:
        cells = {
            "offset": str(row["offset"]),
            "key": key_text(bytes.fromhex(row["key"]), 24 if console.width >= 120 else 12),
            "raw": bytes_text(row["raw_length"]),
            "stored": bytes_text(row["stored_length"]),
            "namespace": row["namespace"][:12],
            "version": f"{row['version_seq'] >> 40}:{row['version_seq'] & (1 << 40) - 1}",
            "written": time_text(row["written_at_ns"]),
            "hits": "-" if row["hits"] is None else str(row["hits"]),
        }
        table.add_row(*(cells.get(name, str(row.get(name))) for name in columns))
    print_table(console, table)
    print_left_out(console, facts["rows_left_out"], "records")
    print_problems(console, facts["problems"], facts["notes"])
