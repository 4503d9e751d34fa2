"""``inspect store``: what is where, how full, how old, how hot; and the map of the segments."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console

from ...format.layout import FORMAT_VERSION, HEAT_NAME, INDEX_FOLDER, QUARANTINE_FOLDER, SEGMENTS_FOLDER
from ..lock_state import has_followers, has_writer
from ..output import age_text, bytes_text, count_text, print_facts, print_left_out, print_problems, share_text, time_text
from .map import PINS_NOTE, print_map
from .survey import USES, SegmentSummary, Survey

_PROBLEMS_MAX = 1000
_ANSWER = {True: "yes", False: "no", None: "cannot be told"}


class StoreView:
    """Figures of a whole store, and those of its newest segments. ``limit`` bounds the segments that are listed and drawn."""

    def __init__(self, survey: Survey, limit: int, cell_count: int) -> None:
        self.survey = survey
        self.shown: deque[SegmentSummary] = deque(maxlen=limit)
        self.problems = list(survey.problems)
        self.notes: list[str] = []
        self.totals: dict[str, Any] = {"segments": 0, "size_bytes": 0, "blocks": 0, "blocks_live": 0, "hits": 0, "hot_blocks": 0}
        self.use_bytes = dict.fromkeys(USES, 0)
        self.states: dict[str, int] = {}
        written: list[int] = []
        for summary in survey.summaries(cell_count):
            self._add(summary)
            written += [time for time in (summary.oldest_written_at_ns, summary.newest_written_at_ns) if time]
            written = [min(written), max(written)] if written else []
        self.oldest_ns, self.newest_ns = written or (0, 0)

    def _add(self, summary: SegmentSummary) -> None:
        self.shown.append(summary)
        self.totals["segments"] += 1
        for name in ("size_bytes", "blocks", "blocks_live", "hits", "hot_blocks"):
            self.totals[name] += getattr(summary, name)
        for use in USES:
            self.use_bytes[use] += summary.use_bytes[use]
        self.states[summary.state] = self.states.get(summary.state, 0) + 1
        self.problems += summary.problems[: max(0, _PROBLEMS_MAX - len(self.problems))]
        self.notes += summary.notes[: max(0, _PROBLEMS_MAX - len(self.notes))]

    def facts(self) -> dict[str, Any]:
        """Plain values for JSON."""
        files = self.survey.files
        block = files.superblock
        return {
            "path": str(files.path),
            "store_uuid": files.store_uuid.hex(),
            "format_version": None if block is None else block.read_version,
            "created_at_ns": None if block is None else block.created_at_ns,
            "writer": has_writer(files.path),
            "followers": has_followers(files.path),
            **self.totals,
            "states": self.states,
            "use_bytes": self.use_bytes,
            "pinned": None,
            "heat_known": self.survey.heat is not None,
            "oldest_written_at_ns": self.oldest_ns,
            "newest_written_at_ns": self.newest_ns,
            "allocated_bytes": allocated_by_part(files.path),
            "rows": [summary.facts() for summary in self.shown],
            "rows_left_out": self.totals["segments"] - len(self.shown),
            "problems": self.problems,
            "notes": self.notes,
        }


def print_store(console: Console, view: StoreView, width: int) -> None:
    """For people."""
    facts = view.facts()
    parts, now_ns = facts["allocated_bytes"], view.survey.now_ns
    used = view.use_bytes
    read_version, states = facts["format_version"], ", ".join(f"{count} {state}" for state, count in view.states.items())
    version = "unknown" if read_version is None else f"{read_version} (this kvlode reads up to {FORMAT_VERSION})"
    heat = (
        f"{count_text(facts['hits'], 'hit')} on live blocks, {count_text(facts['hot_blocks'], 'block')} hot"
        if facts["heat_known"]
        else "not known (no heat table)"
    )
    created = time_text(facts["created_at_ns"])
    if facts["created_at_ns"]:
        created += f" ({age_text(facts['created_at_ns'], now_ns)} ago)"
    rows = [
        ("store", facts["path"]),
        ("uuid", facts["store_uuid"]),
        ("format version", version),
        ("created", created),
        ("in use", f"writer: {_ANSWER[facts['writer']]}, followers: {_ANSWER[facts['followers']]}"),
        ("segments", f"{facts['segments']:,} ({states}), {bytes_text(facts['size_bytes'])}" if facts["segments"] else "none"),
        ("blocks", f"{facts['blocks_live']:,} live of {facts['blocks']:,} in the log"),
        ("use", ", ".join(f"{use} {share_text(used[use], facts['size_bytes'])}" for use in USES)),
        ("written", f"{time_text(view.oldest_ns)} to {time_text(view.newest_ns)}"),
        ("heat", heat),
        ("on the drive", ", ".join(f"{name} {bytes_text(size)}" for name, size in parts.items() if size)),
    ]
    print_facts(console, rows)
    console.print()
    print_map(console, list(view.shown), width)
    print_left_out(console, facts["rows_left_out"], "older segments")
    print_problems(console, view.problems, [*view.notes, PINS_NOTE])


def allocated_by_part(folder: Path) -> dict[str, int]:
    """Blocks that the file system has given to each part of a store's folder, in bytes."""
    parts = {SEGMENTS_FOLDER: 0, INDEX_FOLDER: 0, HEAT_NAME: 0, QUARANTINE_FOLDER: 0, "other": 0}
    for place, _, names in os.walk(folder):
        top = Path(place).relative_to(folder).parts[:1]
        for name in names:
            try:
                size_bytes = os.lstat(os.path.join(place, name)).st_blocks * 512
            except FileNotFoundError:  # a running writer removed it meanwhile
                continue
            part = top[0] if top else name
            parts[part if part in parts else "other"] += size_bytes
    return parts
