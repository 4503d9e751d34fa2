"""The whole of a store at a glance: what each segment's bytes are used for, which blocks count, how often they are used.

Two passes over the segments: the first learns which records there are, the second sums up by segment. Between them only
columns of numbers are kept, so that memory follows the number of blocks, never their size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...engine.heat import HeatTable
from ...format.keys import key_digest
from ...format.layout import HEAT_NAME, PAGE_BYTES, RecordType
from ..liveness import LogStates, RecordState
from ..segment_view import SegmentView
from ..store_files import StoreFiles

USES = ("live", "dead", "notes", "torn", "damaged", "free")
"""What bytes of a segment are used for. ``dead``: superseded, deleted, dropped or expired blocks. ``notes``: the segment's
header and seal, namespaces, tombstones. ``free``: preallocated or padding, holds nothing."""
_USE_OF_STATE = np.array([2, 0, 1, 1, 1, 1], dtype=np.int64)
"""Index into ``USES`` by ``RecordState``."""
HOT_HITS = 2
"""Hits from which reclaim copies a block forward (the default of ``reinsert_hits_min``)."""

Cells = npt.NDArray[np.float64]
"""Bytes of each use (rows, in the order of ``USES``) in each of so many equal parts of a file (columns)."""


@dataclass(slots=True)
class SegmentSummary:
    """One segment in figures. Times in UTC nanoseconds, 0 for none."""

    segment_id: int
    state: str
    size_bytes: int
    allocated_bytes: int
    use_bytes: dict[str, int]
    cells: Cells
    records: int
    blocks: int
    blocks_live: int
    epoch: int | None
    created_at_ns: int
    oldest_written_at_ns: int
    newest_written_at_ns: int
    hits: int = 0
    """Uses of its live blocks since they were written, as far as the heat table knows."""
    hot_blocks: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """Plain values for JSON."""
        names = [name for name in self.__slots__ if name not in ("segment_id", "cells")]
        return {"segment": f"{self.segment_id:016x}"} | {name: getattr(self, name) for name in names}


class Survey:
    """Reads all segments once when it is made. ``now_ns``: the time that tells what has expired."""

    def __init__(self, files: StoreFiles, now_ns: int | None = None) -> None:
        self.files = files
        self.now_ns = time.time_ns() if now_ns is None else now_ns
        self.problems = list(files.problems)
        headers = [header for segment_id in files.segment_ids() if (header := files.header(segment_id)) is not None]
        self.first_live = max((header.first_live_segment for header in headers if header.store_uuid == files.store_uuid), default=0)
        self.log = LogStates()
        for view in files.segments():
            if self.counts(view):
                self.log.add(view.segment_id, view.table)
        self.log.settle(self.now_ns)
        self.heat = self._open_heat()

    def _open_heat(self) -> HeatTable | None:
        try:
            return HeatTable.view(self.files.path / HEAT_NAME, self.files.store_uuid)
        except OSError as error:
            if not isinstance(error, NotADirectoryError):  # a segment file by itself has none
                self.problems.append(f"the heat table cannot be read: {error}")
            return None

    def counts(self, view: SegmentView) -> bool:
        """Whether a segment belongs to the log: leftovers of an undone removal and files of other stores do not."""
        return not view.foreign and view.segment_id >= self.first_live

    def views(self) -> Iterator[tuple[SegmentView, npt.NDArray[np.uint8]]]:
        """The segments that belong to the log, oldest first, with a ``RecordState`` for each record."""
        for view in self.files.segments():
            if self.counts(view):
                yield view, self.log.states_of(view.segment_id, view.table)

    def hits(self, namespace: bytes, key: bytes) -> int:
        """Uses of a block since it was written; 255 stands for that many or more, 0 also for not known."""
        return 0 if self.heat is None else self.heat.count(self.heat.slot(namespace, key_digest(key)))

    def hits_of(self, view: SegmentView, rows: npt.NDArray[np.intp]) -> list[int]:
        """``hits`` of blocks of one segment; nothing when no heat table is there."""
        if self.heat is None or not len(rows):
            return []
        spaces, keys = view.table.namespace.tolist(), view.table.keys
        return [self.hits(spaces[row], keys[row]) for row in rows.tolist()]

    def summaries(self, cell_count: int = 1) -> Iterator[SegmentSummary]:
        """Every segment in figures, oldest first; ``cell_count`` is how finely the map divides each."""
        for view in self.files.segments():
            yield self.summary(view, cell_count)

    def summary(self, view: SegmentView, cell_count: int = 1) -> SegmentSummary:
        """One segment in figures."""
        belongs = self.counts(view)
        states = self.log.states_of(view.segment_id, view.table) if belongs else np.full(len(view.table), RecordState.DROPPED)
        uses, cells = _use(view, states, cell_count)
        live = np.flatnonzero(states == RecordState.LIVE)
        written = view.table.written_at_ns[view.table.written_at_ns > 0]
        hits = self.hits_of(view, live)
        state, notes = view.state, list(view.notes)
        if not belongs and not view.foreign:
            state = "leftover"
            notes.append(f"segment {view.segment_id:016x} was freed and its removal undone by a power cut; the next open removes it")
        return SegmentSummary(
            segment_id=view.segment_id,
            state=state,
            size_bytes=view.size_bytes,
            allocated_bytes=view.allocated_bytes,
            use_bytes=uses,
            cells=cells,
            records=len(view.table),
            blocks=int((view.table.type == RecordType.BLOCK).sum()),
            blocks_live=len(live),
            epoch=None if view.header is None else view.header.epoch,
            created_at_ns=0 if view.header is None else view.header.created_at_ns,
            oldest_written_at_ns=int(written.min()) if len(written) else 0,
            newest_written_at_ns=int(written.max()) if len(written) else 0,
            hits=sum(hits),
            hot_blocks=sum(count >= HOT_HITS for count in hits),
            problems=list(view.problems),
            notes=notes,
        )


def _use(view: SegmentView, states: npt.NDArray[Any], cell_count: int) -> tuple[dict[str, int], Cells]:
    """Bytes by use, in all and by part of the file."""
    starts = view.table.page.astype(np.int64) * PAGE_BYTES
    ends = starts + view.table.record_pages.astype(np.int64) * PAGE_BYTES
    uses = _USE_OF_STATE[states.astype(np.int64)]
    size = view.size_bytes
    ranges: list[tuple[int, int, str]] = []
    if not view.empty:
        ranges.append((0, PAGE_BYTES, "damaged" if view.header is None else "notes"))
    gap_starts, gap_ends = np.concatenate([[PAGE_BYTES], ends]), np.concatenate([starts, [PAGE_BYTES]])
    gaps = gap_ends[:-1] > gap_starts[:-1]
    ranges += [(int(start), int(end), "damaged") for start, end in zip(gap_starts[:-1][gaps], gap_ends[:-1][gaps], strict=True)]
    if view.blank:
        ranges.append((0, size, "damaged"))
    tail = view.log_end if not view.empty else size
    if view.sealed:
        ranges.append((tail, size, "notes" if not view.problems or len(view.table) else "damaged"))
    elif view.data_end > tail:
        lost = max((stop for start, stop in view.damaged if start >= tail), default=tail)
        ranges += [(tail, lost, "damaged"), (lost, view.data_end, "torn")]
    edges = np.linspace(0, max(size, 1), cell_count + 1)
    cells = np.zeros((len(USES), cell_count))
    totals = {}
    for number, use in enumerate(USES[:-1]):
        more = [(start, end) for start, end, name in ranges if name == use and end > start]
        first = np.concatenate([starts[uses == number], np.array([start for start, _ in more], dtype=np.int64)])
        last = np.concatenate([ends[uses == number], np.array([end for _, end in more], dtype=np.int64)])
        totals[use], cells[number] = _spread(np.minimum(first, size), np.minimum(last, size), edges)
    totals["free"] = max(0, size - sum(totals.values()))
    cells[-1] = np.maximum(0, np.diff(edges) - cells.sum(axis=0))
    return totals, cells


def _spread(starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], edges: Cells) -> tuple[int, Cells]:
    """Bytes of disjoint ranges, in all and between each two edges."""
    if not len(starts):
        return 0, np.zeros(len(edges) - 1)
    order = np.argsort(starts)
    points = np.stack([starts[order], ends[order]], axis=1).ravel()
    filled = np.concatenate([[0], np.cumsum(ends[order] - starts[order])])
    heights = np.stack([filled[:-1], filled[1:]], axis=1).ravel()
    return int(filled[-1]), np.diff(np.interp(edges, points, heights))
