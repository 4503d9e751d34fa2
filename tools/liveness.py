"""Which records of a log count: the rules of SPEC.md part 8, applied to tables of contents without any index."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ..format.layout import PAGE_BYTES, RecordType
from ..format.seal import SealTable

_U64 = npt.NDArray[np.uint64]


class RecordState(enum.IntEnum):
    """What a record is good for."""

    NOTE = 0
    """No block: a namespace, a tombstone, a namespace drop."""
    LIVE = 1
    SUPERSEDED = 2
    """A later record holds the block: a copy made by reclaim, or a put after a delete or after damage."""
    DELETED = 3
    DROPPED = 4
    """Its namespace was dropped."""
    EXPIRED = 5


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block lies: segment id, and byte offset of its header page."""

    segment_id: int
    offset: int


def ident_hashes(idents: Sequence[bytes]) -> _U64:
    """128 bits of each ident (namespace digest and key) as two columns; equal only for equal idents, for all practical purposes."""
    digests = b"".join(map(xxhash.xxh3_128_digest, idents))
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 2).astype(np.uint64, copy=False)


class LogStates:
    """Collects records of all segments (``add``), decides (``settle``), and answers.

    Takes at most some 250 bytes of memory a block, while deciding.

    Leftover segments and those of other stores must not be added.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in ("hash", "version", "sequence", "page", "expires", "space")}
        self._segments: dict[int, tuple[int, int]] = {}
        self._tomb_hash: list[_U64] = []
        self._tomb_version: list[_U64] = []
        self._spaces: dict[bytes, int] = {}
        self._drops: dict[bytes, int] = {}
        self._count = 0

    def add(self, segment_id: int, table: SealTable) -> None:
        """The records of one segment; each segment once, in the order of the ids."""
        kinds = table.type
        blocks, tombs = np.flatnonzero(kinds == RecordType.BLOCK), np.flatnonzero(kinds == RecordType.TOMBSTONE)
        for row in np.flatnonzero(kinds == RecordType.NAMESPACE_DROP).tolist():
            digest = bytes(table.namespace[row])
            self._drops[digest] = max(self._drops.get(digest, 0), int(table.version_seq[row]))
        digests, keys = table.namespace.tolist(), table.keys
        spaces = [self._spaces.setdefault(digests[row], len(self._spaces)) for row in blocks.tolist()]
        columns: dict[str, npt.NDArray[Any]] = {
            "hash": ident_hashes([digests[row] + keys[row] for row in blocks.tolist()]),
            "version": table.version_seq[blocks],
            "sequence": table.record_seq[blocks],
            "page": table.page[blocks],
            "expires": table.expires_at_ns[blocks],
            "space": np.array(spaces, dtype=np.uint32),
        }
        for name, column in columns.items():
            self._parts[name].append(column)
        self._tomb_hash.append(ident_hashes([digests[row] + keys[row] for row in tombs.tolist()]))
        self._tomb_version.append(table.version_seq[tombs])
        self._segments[segment_id] = (self._count, self._count + len(blocks))
        self._count += len(blocks)

    def settle(self, now_ns: int) -> None:
        """All records are known: decide. ``now_ns`` tells what has expired."""
        empty: _U64 = np.zeros((0, 2), dtype=np.uint64)
        hashes = np.concatenate([empty, *self._parts.pop("hash"), *self._tomb_hash])
        columns = {name: np.concatenate([np.zeros(0, np.uint64), *parts]).astype(np.uint64) for name, parts in self._parts.items()}
        killed_below = np.concatenate([np.zeros(0, np.uint64), *self._tomb_version])
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        ordered = hashes[order]
        first = np.ones(len(order), dtype=bool)
        first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        group = np.empty(len(order), dtype=np.int64)
        group[order] = np.cumsum(first) - 1
        self._groups = ordered[first]
        kill = np.zeros(len(self._groups), dtype=np.uint64)
        np.maximum.at(kill, group[self._count :], killed_below)
        drop = np.zeros(max(1, len(self._spaces)), dtype=np.uint64)
        for digest, version in self._drops.items():
            if digest in self._spaces:
                drop[self._spaces[digest]] = version
        self._decide(group[: self._count], kill, drop[columns["space"].astype(np.int64)], columns, now_ns)
        self._pages = columns["page"].astype(np.int64)
        self._ids = np.fromiter(self._segments, dtype=np.uint64, count=len(self._segments))
        self._ends = np.array([end for _, end in self._segments.values()], dtype=np.int64)

    def _decide(self, group: npt.NDArray[np.int64], kill: _U64, dropped_below: _U64, columns: dict[str, _U64], now_ns: int) -> None:
        version, sequence = columns["version"], columns["sequence"]
        states = np.full(self._count, RecordState.SUPERSEDED, dtype=np.uint8)
        dropped = version < dropped_below
        deleted = version < kill[group]
        standing = ~dropped & ~deleted
        best = np.zeros(len(self._groups), dtype=np.uint64)
        np.maximum.at(best, group[standing], sequence[standing])
        rows = np.flatnonzero(standing & (sequence == best[group]))
        self._winner = np.full(len(self._groups), -1, dtype=np.int64)
        self._winner[group[rows]] = rows
        winners = self._winner[self._winner >= 0]
        states[winners] = RecordState.LIVE
        expires = columns["expires"]
        states[winners[(expires[winners] > 0) & (expires[winners] <= np.uint64(max(0, now_ns)))]] = RecordState.EXPIRED
        states[dropped] = RecordState.DROPPED
        states[deleted] = RecordState.DELETED
        self._states = states

    # --- answers, after ``settle`` --------------------------------------------------------------------------------------

    def states_of(self, segment_id: int, table: SealTable) -> npt.NDArray[np.uint8]:
        """A ``RecordState`` for each record of a segment. A block that was written after ``add`` counts as live."""
        states = np.zeros(len(table), dtype=np.uint8)
        blocks = np.flatnonzero(table.type == RecordType.BLOCK)
        states[blocks] = RecordState.LIVE
        start, end = self._segments.get(segment_id, (0, 0))
        known = self._pages[start:end]
        if len(known) and len(blocks):
            pages = table.page[blocks].astype(np.int64)
            at = np.minimum(np.searchsorted(known, pages), len(known) - 1)
            found = known[at] == pages
            states[blocks[found]] = self._states[start:end][at[found]]
        return states

    def namespaces(self) -> list[bytes]:
        """Digests of the namespaces that have blocks, live or dead."""
        return list(self._spaces)

    def winners(self) -> npt.NDArray[np.int64]:
        """Rows of all blocks that count, expired ones included, in the order of the log; see ``place``."""
        return np.sort(self._winner[self._winner >= 0])

    def find_rows(self, idents: Sequence[bytes]) -> npt.NDArray[np.int64]:
        """The row of each ident's block; -1 where nothing in the log names the ident, -2 where all its records are dead."""
        wanted = ident_hashes(idents)
        rows = np.full(len(idents), -1, dtype=np.int64)
        count = len(self._groups)
        if not count:
            return rows
        heads = self._groups[:, 0]
        at = np.searchsorted(heads, wanted[:, 0])
        for step in (0, 1):  # two idents that share the first 64 bits follow each other
            here = np.minimum(at + step, count - 1)
            found = (self._groups[here] == wanted).all(axis=1)
            rows[found] = np.where(self._winner[here[found]] >= 0, self._winner[here[found]], -2)
        return rows

    def place(self, row: int) -> Place:
        """Where the block of a row lies."""
        segment = int(np.searchsorted(self._ends, row, side="right"))
        return Place(int(self._ids[segment]), int(self._pages[row]) * PAGE_BYTES)

    def find(self, ident: bytes) -> Place | None:
        """Where the block of one ident lies; ``None`` when it is absent or dead."""
        row = int(self.find_rows([ident])[0])
        return self.place(row) if row >= 0 else None
