"""What a store near its capacity may answer, across kills: a journal outside the store, and the answers that follow from it.

Each operation is written down before it is made, its outcome after it. A flush that returned True ends what was
possible before. A block may always be absent (reclaim gives blocks up); it may never be an older one, a deleted one, or
one with a wrong byte.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

EXPIRY_SLACK_S = 2.0
"""Clocks of two processes and a read that was under way when the block expired."""


@dataclass
class BlockHistory:
    """One key: the version that reads give now, and those that a reopened store may give."""

    current: int | None = None
    possible: set[int] = field(default_factory=set)

    def flushed(self, settled: set[int] | None) -> None:
        if settled is not None:
            self.possible = set(settled)


class History:
    """Replays a journal, then extends it. One process at a time writes to it."""

    def __init__(self, path: Path) -> None:
        self.blocks: dict[bytes, BlockHistory] = {}
        self.expiries: dict[int, float] = {}
        """By version: UTC seconds."""
        self.versions = 0
        self._unsettled: dict[bytes, set[int]] = {}
        """Keys changed since the last flush, and what a flush settles them to."""
        if path.exists():
            for line in path.read_text().splitlines():
                if line.endswith("]"):  # the last line of a killed writer may be torn
                    self._apply(json.loads(line))
        self._journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def close(self) -> None:
        os.close(self._journal)

    def block(self, key: bytes) -> BlockHistory:
        return self.blocks.setdefault(key, BlockHistory())

    # --- changes: noted before, settled after ---------------------------------------------------------------------

    def putting(self, key: bytes, ttl_s: float | None) -> int:
        """A put is about to be made; returns its version."""
        version = self.versions + 1
        self._note(["putting", key.hex(), version, None if ttl_s is None else time.time() + ttl_s])
        return version

    def put(self, key: bytes, version: int) -> None:
        self._note(["put", key.hex(), version])

    def deleting(self, key: bytes) -> None:
        self._note(["deleting", key.hex()])

    def deleted(self, key: bytes, found: bool) -> None:
        self._note(["deleted", key.hex(), found])

    def flushed(self) -> None:
        self._note(["flushed"])

    def learnt(self, key: bytes, version: int | None) -> None:
        """After opening: what the store holds. Raises ``AssertionError`` when that cannot be."""
        possible = self.block(key).possible
        assert version is None or version in possible, f"key {key!r}: found version {version}, possible {sorted(possible)}"
        self._note(["learnt", key.hex(), version])

    def check_hit(self, key: bytes, version: int) -> None:
        """A read gave this version. Raises ``AssertionError`` when that is wrong."""
        current = self.block(key).current
        assert version == current, f"key {key!r}: read version {version}, the last one put is {current}"
        expiry_s = self.expiries.get(version)
        assert expiry_s is None or time.time() < expiry_s + EXPIRY_SLACK_S, f"key {key!r}: version {version} has expired"

    # --- replay ---------------------------------------------------------------------------------------------------

    def _note(self, line: list[object]) -> None:
        os.write(self._journal, (json.dumps(line) + "\n").encode())
        self._apply(line)

    def _apply(self, line: list[object]) -> None:
        kind, *rest = line
        if kind == "flushed":
            for key, settled in self._unsettled.items():
                self.block(key).flushed(settled)
            self._unsettled.clear()
            return
        key = bytes.fromhex(str(rest[0]))
        block = self.block(key)
        if kind == "putting":
            version, expiry_s = rest[1], rest[2]
            assert isinstance(version, int)
            self.versions = max(self.versions, version)
            block.possible.add(version)
            if isinstance(expiry_s, float):
                self.expiries[version] = expiry_s
        elif kind == "put":
            assert isinstance(rest[1], int)
            block.current = rest[1]
            self._unsettled[key] = {rest[1]}
        elif kind == "deleted":
            block.current = None
            self._unsettled[key] = set()
        elif kind == "learnt":
            self._unsettled.pop(key, None)  # changes of an earlier life: what became of them is known now
            block.current = rest[1] if isinstance(rest[1], int) else None
            if block.current is not None:
                block.possible = {block.current}
