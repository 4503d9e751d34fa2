"""``inspect tree``: the prefix tree of a namespace, from the parents that the records name.

A block that more than one block follows is a shared prefix; a block whose parent is not present is an orphan: it takes
room and can never be reached by a prefix match. Blocks are kept as columns of some 60 bytes each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from ...format.errors import FormatError, InvalidConfig
from ...format.keys import key_digest
from ...format.layout import PAGE_BYTES
from ..output import bytes_text, print_facts, print_left_out
from .namespaces import live_rows
from .survey import Survey

NESTING_MAX = 12
"""Forks below forks that are drawn; what lies deeper is summed up, ``--root`` goes on there."""
_KEY_DIGITS = 8
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks that follow each other without a fork, and what hangs below the last one."""

    nesting: int
    first: int
    last: int
    blocks: int
    raw_bytes: int
    stored_bytes: int
    fan_out: int
    below_blocks: int
    below_stored_bytes: int
    orphan: bool


class PrefixTree:
    """The live blocks of one namespace as columns; a block is named by its row."""

    def __init__(self, survey: Survey, digest: bytes) -> None:
        self._survey = survey
        self.digest = digest
        places, digests, parents, columns = [], [], [], []
        for view, rows in live_rows(survey, digest):
            table = view.table
            places.append(np.stack([np.full(len(rows), view.segment_id, dtype=np.uint64), table.page[rows].astype(np.uint64)], axis=1))
            keys = table.keys
            digests += [key_digest(keys[row]) for row in rows.tolist()]
            parents.append(np.frombuffer(table.parent[rows].tobytes(), dtype="<u8").reshape(-1, 2))
            columns.append(np.stack([table.raw_length[rows], table.stored_length[rows], table.depth[rows]], axis=1).astype(np.int64))
        self._places = np.concatenate([np.zeros((0, 2), np.uint64), *places])
        self._digests = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
        parent_digests = np.concatenate([np.zeros((0, 2), np.uint64), *parents])
        self.raw_bytes, self.stored_bytes, self.depth = np.concatenate([np.zeros((0, 3), np.int64), *columns]).T.copy()
        self.parent = self._rows_of(parent_digests)
        self.is_orphan = (self.parent < 0) & parent_digests.any(axis=1)
        self._link()

    def __len__(self) -> int:
        return len(self._digests)

    def _rows_of(self, digests: npt.NDArray[np.uint64]) -> _Ints:
        """Rows with these digests, -1 where there is none."""
        found = np.full(len(digests), -1, dtype=np.int64)
        if not len(self):
            return found
        order = np.argsort(self._digests[:, 0], kind="stable")
        heads = self._digests[order, 0]
        at = np.minimum(np.searchsorted(heads, digests[:, 0]), len(order) - 1)
        same = (self._digests[order[at]] == digests).all(axis=1)
        found[same] = order[at[same]]
        return found

    def _link(self) -> None:
        """Children in one array by parent, and the size of what hangs below each block, from the leaves up."""
        count = len(self)
        has_parent = np.flatnonzero(self.parent >= 0)
        self.fan_out = np.bincount(self.parent[has_parent], minlength=count).astype(np.int64)
        self._children = has_parent[np.argsort(self.parent[has_parent], kind="stable")]
        self._first_child = np.concatenate([[0], np.cumsum(self.fan_out)]).astype(np.int64)
        self.tree_blocks, self.tree_bytes = np.ones(count, dtype=np.int64), self.stored_bytes.copy()
        levels = [np.flatnonzero(self.parent < 0)]
        reached = len(levels[0])
        while len(levels[-1]):
            below = self._below(levels[-1])
            reached += len(below)
            levels.append(below)
        self.in_circles = count - reached
        """Blocks whose parents lead back to themselves: only forged or damaged parents do."""
        for level in reversed(levels[1:]):
            np.add.at(self.tree_blocks, self.parent[level], self.tree_blocks[level])
            np.add.at(self.tree_bytes, self.parent[level], self.tree_bytes[level])

    def _below(self, rows: _Ints) -> _Ints:
        """Children of several blocks."""
        counts = self.fan_out[rows]
        before = np.cumsum(counts) - counts
        return self._children[np.repeat(self._first_child[rows] - before, counts) + np.arange(int(counts.sum()))]

    def children(self, row: int) -> _Ints:
        """Blocks that follow a block."""
        return self._children[self._first_child[row] : self._first_child[row + 1]]

    def row_of_key(self, key: bytes) -> int:
        """The row of a block. Raises ``InvalidConfig`` when it is not present."""
        row = int(self._rows_of(np.frombuffer(key_digest(key), dtype="<u8").reshape(1, 2))[0])
        if row < 0:
            raise InvalidConfig(
                "no block of the namespace has this key", where=self.digest.hex(), expected="a key that is present", actual=key.hex()
            )
        return row

    def place(self, row: int) -> tuple[int, int]:
        """Segment and offset of a block."""
        segment_id, page = self._places[row].tolist()
        return segment_id, page * PAGE_BYTES

    def key(self, row: int) -> bytes:
        """The key of a block, read from its record; empty when that is damaged or gone."""
        try:
            return self._survey.files.record(*self.place(row))[1].key
        except (FormatError, OSError):
            return b""

    def roots(self) -> _Ints:
        """Blocks without a parent, and orphans; the largest trees first."""
        rows = np.flatnonzero(self.parent < 0)
        return rows[np.lexsort((rows, -self.tree_bytes[rows]))]

    def runs(self, tops: _Ints) -> Iterator[Run]:
        """Runs from these blocks down, the largest branches first. Circles are never entered: no root leads there."""
        stack = [(0, int(row)) for row in reversed(tops.tolist())]
        while stack:
            nesting, first = stack.pop()
            last, blocks = first, 1
            raw_bytes, stored_bytes = int(self.raw_bytes[first]), int(self.stored_bytes[first])
            while self.fan_out[last] == 1 and blocks <= len(self):
                last = int(self.children(last)[0])
                blocks += 1
                raw_bytes += int(self.raw_bytes[last])
                stored_bytes += int(self.stored_bytes[last])
            below_blocks, below_bytes = int(self.tree_blocks[last]) - 1, int(self.tree_bytes[last] - self.stored_bytes[last])
            fan_out, orphan = int(self.fan_out[last]), bool(self.is_orphan[first])
            yield Run(nesting, first, last, blocks, raw_bytes, stored_bytes, fan_out, below_blocks, below_bytes, orphan)
            if nesting + 1 < NESTING_MAX:
                below = self.children(last)
                below = below[np.lexsort((below, -self.tree_bytes[below]))]
                stack += [(nesting + 1, int(row)) for row in reversed(below.tolist())]


def tree_facts(survey: Survey, digest: bytes, root: bytes | None, limit: int) -> dict[str, Any]:
    """The first ``limit`` runs of the tree, or of the part below the block with key ``root``."""
    tree = PrefixTree(survey, digest)
    tops = tree.roots() if root is None else np.array([tree.row_of_key(root)], dtype=np.int64)
    rows: list[dict[str, Any]] = []
    shown_blocks = 0
    for run in tree.runs(tops):
        if len(rows) == limit:
            break
        shown_blocks += run.blocks
        rows.append(_run_facts(survey, tree, run))
    orphans = np.flatnonzero(tree.is_orphan)
    return {
        "namespace": digest.hex(),
        "blocks": len(tree),
        "roots": int(((tree.parent < 0) & ~tree.is_orphan).sum()),
        "shared_prefixes": int((tree.fan_out > 1).sum()),
        "fan_out_max": int(tree.fan_out.max(initial=0)),
        "orphaned_branches": len(orphans),
        "orphaned_blocks": int(tree.tree_blocks[orphans].sum()),
        "orphaned_bytes": int(tree.tree_bytes[orphans].sum()),
        "blocks_in_circles": tree.in_circles,
        "stored_bytes": int(tree.stored_bytes.sum()),
        "rows": rows,
        "blocks_left_out": int(tree.tree_blocks[tops].sum()) - shown_blocks,
        "problems": survey.problems,
    }


def _run_facts(survey: Survey, tree: PrefixTree, run: Run) -> dict[str, Any]:
    first, last = tree.key(run.first), tree.key(run.last)
    facts = {name: getattr(run, name) for name in Run.__slots__ if name not in ("first", "last")}
    return facts | {
        "first_key": first.hex(),
        "last_key": last.hex(),
        "depth": int(tree.depth[run.first]),
        "cut": run.nesting + 1 == NESTING_MAX and run.fan_out > 0,
        "hits": survey.hits(tree.digest, last) if survey.heat is not None else None,
    }


def print_tree(console: Console, facts: dict[str, Any]) -> None:
    """For people: one line a run, branches below their fork."""
    orphans = f"{facts['orphaned_branches']:,} branches, {facts['orphaned_blocks']:,} blocks, {bytes_text(facts['orphaned_bytes'])}"
    lines = [
        ("namespace", facts["namespace"]),
        ("blocks", f"{facts['blocks']:,} live, {bytes_text(facts['stored_bytes'])} stored, {facts['roots']:,} roots"),
        ("shared prefixes", f"{facts['shared_prefixes']:,} blocks are followed by more than one, at most {facts['fan_out_max']:,}"),
        ("orphaned", orphans if facts["orphaned_branches"] else "none"),
    ]
    if facts["blocks_in_circles"]:
        lines.append(("in circles", f"{facts['blocks_in_circles']:,} blocks: their parents lead back to themselves"))
    print_facts(console, lines)
    console.print()
    for row, lines_before in zip(facts["rows"], _branch_lines(facts["rows"]), strict=True):
        signs = lines_before if console.encoding.lower().startswith("utf") else lines_before.translate(_PLAIN_LINES)
        console.print(signs + _run_line(row), style="yellow" if row["orphan"] else "", no_wrap=True, overflow="ellipsis")
    print_left_out(console, facts["blocks_left_out"], "blocks below")


_PLAIN_LINES = str.maketrans({"│": "|", "├": "+", "└": "`", "─": "-"})


def _branch_lines(rows: list[dict[str, Any]]) -> list[str]:
    """What stands before each run: the lines that lead from forks above to their branches below."""
    lines, going_on = [], [False] * (NESTING_MAX + 1)
    for row in reversed(rows):
        nesting = row["nesting"]
        above = "".join("│ " if going_on[level] else "  " for level in range(1, nesting))
        lines.append(above + ("" if not nesting else "├─" if going_on[nesting] else "└─"))
        going_on[nesting] = True
        going_on[nesting + 1 :] = [False] * (NESTING_MAX - nesting)
    return lines[::-1]


def _run_line(row: dict[str, Any]) -> str:
    first, last = (row[name][:_KEY_DIGITS] or "(unreadable)" for name in ("first_key", "last_key"))
    depth = f"{row['depth']}" if row["blocks"] == 1 else f"{row['depth']}-{row['depth'] + row['blocks'] - 1}"
    keys = first if row["blocks"] == 1 else f"{first}..{last}"
    words = [f"{row['blocks']:,} block{'s' if row['blocks'] > 1 else ''}"]
    if row["fan_out"]:
        words[0] += f" > {row['fan_out']:,} branches, {row['below_blocks']:,} blocks" + (" (--root goes on)" if row["cut"] else "")
    words += [f"depth {depth}", bytes_text(row["stored_bytes"])]
    if row["hits"] is not None:
        words.append(f"{row['hits']} hits")
    return f"{'ORPHAN ' if row['orphan'] else ''}{keys}  {'  '.join(words)}"
