"""``inspect diff``: where index and segments disagree.

The segments are right by definition; the index is derived. Records behind the index's checkpoint are read again by the
next open, so their absence is normal. Everything else that differs costs blocks until the index is rebuilt.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from rich.console import Console

from ...engine.catalog import META_PREFIX, Catalog
from ...engine.index import IndexDamaged
from ...engine.index_entry import IndexEntry
from ...format.errors import FormatError
from ..lock_state import has_writer
from ..output import count_text, key_text, make_table, print_facts, print_problems, print_table
from .index import opened_index, own_facts
from .survey import Survey

KINDS = {
    "index_only": "in the index, and the segments have no such block",
    "dead": "in the index, and a tombstone or a namespace drop has killed it",
    "stale": "in the index with another place than that of the block that counts",
    "unreadable": "in the index with a value of an unknown layout",
    "segments_only": "in the segments, before the checkpoint, and not in the index",
    "not_yet": "in the segments behind the checkpoint: the next open reads them (normal)",
    "below_floor": "of a dropped namespace, and not purged from the index yet (normal)",
}
"""Kinds of difference and what they mean."""
NORMAL = ("not_yet", "below_floor")
_CHUNK = 4096


class Difference:
    """Counts by kind, exact, and the first ``limit`` examples of each."""

    def __init__(self, survey: Survey, limit: int) -> None:
        self._survey = survey
        self._limit = limit
        self._segment_ids = set(survey.files.segment_ids())
        self.counts = dict.fromkeys(KINDS, 0)
        self.rows: list[dict[str, Any]] = []
        self.entries = 0
        self.agreeing = 0

    def compare(self, catalog: Catalog) -> None:
        """Go through the index, then through what it did not name. Raises ``IndexDamaged`` where the index ends early."""
        winners = self._survey.log.winners()
        named = np.zeros(int(winners.max(initial=-1)) + 1, dtype=bool)
        entries = ((ident, value) for ident, value in catalog.index.scan() if not ident.startswith(META_PREFIX))
        floors = catalog.floors
        for chunk in _chunks(entries):
            rows = self._survey.log.find_rows([ident for ident, _ in chunk]).tolist()
            for (ident, value), row in zip(chunk, rows, strict=True):
                self.entries += 1
                if row >= 0:
                    named[row] = True
                self._compare_entry(ident, value, row, floors)
        self._add_missing(winners[~named[winners]].tolist(), catalog)

    def _compare_entry(self, ident: bytes, value: bytes, row: int, floors: dict[bytes, int]) -> None:
        try:
            entry = IndexEntry.unpack(value)
        except IndexDamaged:
            self._note("unreadable", ident, None, None, "")
            return
        here = (entry.segment_id, entry.offset)
        if entry.version_seq < floors.get(ident[:16], 0):
            self._note("below_floor", ident, here, None, "")
        elif row == -1:
            gone = entry.segment_id not in self._segment_ids
            self._note("index_only", ident, here, None, "its segment is gone" if gone else "its segment has no such record")
        elif row == -2:
            self._note("dead", ident, here, None, "")
        else:
            place = self._survey.log.place(row)
            if (place.segment_id, place.offset) == here:
                self.agreeing += 1
            else:
                self._note("stale", ident, here, (place.segment_id, place.offset), "")

    def _add_missing(self, rows: list[int], catalog: Catalog) -> None:
        checkpoint = catalog.checkpoint()
        covered = (0, 0) if checkpoint is None else (checkpoint.segment_id, checkpoint.offset)
        for row in rows:
            place = self._survey.log.place(row)
            there = (place.segment_id, place.offset)
            kind = "segments_only" if there < covered else "not_yet"
            ident = self._ident_at(*there) if self.counts[kind] < self._limit else b""
            self._note(kind, ident, None, there, "")

    def _ident_at(self, segment_id: int, offset: int) -> bytes:
        try:
            header = self._survey.files.record(segment_id, offset)[1]
        except (FormatError, OSError):
            return b""
        return header.namespace + header.key

    def _note(self, kind: str, ident: bytes, index: tuple[int, int] | None, log: tuple[int, int] | None, remark: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= self._limit:
            places = {
                name: None if place is None else {"segment": f"{place[0]:016x}", "offset": place[1]}
                for name, place in (("index", index), ("log", log))
            }
            self.rows.append({"kind": kind, "namespace": ident[:16].hex(), "key": ident[16:].hex(), **places, "remark": remark})

    @property
    def differs(self) -> bool:
        """Whether anything differs that is not normal."""
        return any(count for kind, count in self.counts.items() if kind not in NORMAL)


def _chunks(entries: Iterator[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    while chunk := list(islice(entries, _CHUNK)):
        yield chunk


def diff_facts(survey: Survey, limit: int) -> dict[str, Any]:
    """The comparison; ``problems`` has what makes it incomplete, and a sentence when something differs."""
    difference = Difference(survey, limit)
    facts: dict[str, Any] = {"path": str(survey.files.path), "present": False}
    problems, notes = list(survey.problems), []
    try:
        with opened_index(survey.files.path) as catalog:
            if catalog is None:
                notes.append("there is no index; the next open derives it from the segments")
            else:
                facts |= {"present": True} | own_facts(catalog, survey.files.store_uuid)
                difference.compare(catalog)
    except IndexDamaged as error:
        problems.append(str(error))
    if difference.differs:
        problems.append("index and segments differ; kvlode fsck says more, and an open without the index derives it anew")
    if has_writer(survey.files.path):
        notes.append("a writer has the store open: what it changes meanwhile may show as a difference")
    return facts | {
        "entries": difference.entries,
        "agreeing": difference.agreeing,
        "blocks": len(survey.log.winners()),
        "counts": difference.counts,
        "rows": difference.rows,
        "rows_left_out": sum(difference.counts.values()) - len(difference.rows),
        "problems": problems,
        "notes": notes,
    }


def print_diff(console: Console, facts: dict[str, Any]) -> None:
    """For people."""
    lines = [
        ("index", count_text(facts["entries"], "entry", "entries") if facts["present"] else "none"),
        ("segments", f"{facts['blocks']:,} blocks that count"),
    ]
    if facts["present"]:
        lines.append(("agreeing", f"{facts['agreeing']:,}"))
    print_facts(console, lines)
    counts = make_table("count", "kind", "meaning", right=("count",))
    for kind, count in facts["counts"].items():
        if count:
            counts.add_row(f"{count:,}", kind, KINDS[kind])
    if counts.row_count:
        print_table(console, counts)
        table = make_table("kind", "namespace", "key", "in index", "in log", "remark", right=("in index", "in log"))
        for row in facts["rows"]:
            places = [_place_text(row[name]) for name in ("index", "log")]
            table.add_row(row["kind"], row["namespace"][:8], key_text(bytes.fromhex(row["key"]), 12), *places, row["remark"])
        print_table(console, table)
    elif facts["present"]:
        console.print("no difference", style="green")
    print_problems(console, facts["problems"], facts["notes"])


def _place_text(place: dict[str, Any] | None) -> str:
    return "-" if place is None else f"{place['segment'].lstrip('0')}:{place['offset']}"
