"""A block of a store that lives in memory (``memory_store``)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from ..format.checksum import xxh3_64
from .blocks import BlockView, HostSpan
from .contract import BlockInfo, PutStatus, Status


class MemoryBlock:
    """One stored block. ``data`` never changes but by ``wipe``; the rest is guarded by the store's lock."""

    __slots__ = (
        *("checksum", "data", "depth", "durable", "expires_at_ns", "meta", "on_durable", "parent", "pins", "reading", "tag"),
        *("wiped", "written_at_ns"),
    )

    def __init__(self, parent: bytes | None, written_at_ns: int, expires_at_ns: int, tag: bytes, meta: bytes) -> None:
        self.parent = parent
        self.written_at_ns = written_at_ns
        self.expires_at_ns = expires_at_ns
        self.tag = tag
        self.meta = meta
        self.data: HostSpan = np.empty(0, dtype=np.uint8)
        self.checksum = 0
        self.depth = 0
        self.pins = 0
        self.reading = threading.Lock()
        self.wiped = False
        self.durable = False
        self.on_durable: Callable[[PutStatus], None] | None = None

    def fill(self, view: BlockView) -> None:
        """Copy the host's bytes, outside any lock."""
        self.data = np.empty(view.nbytes, dtype=np.uint8)
        view.copy_to_host([self.data])
        self.checksum = xxh3_64(self.data)

    def deliver(self, view: BlockView, start: int, stream: Any) -> Status:
        """Check the block and copy it, from ``start`` on, into a destination. Outside the store's lock."""
        with self.reading:
            if self.wiped:
                return Status.MISS
            if xxh3_64(self.data) != self.checksum:
                return Status.CORRUPT
            view.copy_from_host([self.data[start : start + view.nbytes]], stream)
            return Status.HIT

    def wipe(self) -> None:
        """Overwrite the bytes of a block that the store has forgotten; waits for who reads them."""
        with self.reading:
            self.wiped = True
            self.data[:] = 0
            self.meta = b""

    def settle(self, status: PutStatus) -> None:
        """Tell the job that put it, once."""
        self.durable = bool(status)
        callback, self.on_durable = self.on_durable, None
        if callback is not None:
            callback(status)

    def info(self) -> BlockInfo:
        """What a host sees of it."""
        size, expires = self.data.nbytes, self.expires_at_ns or None
        return BlockInfo(size, size, self.written_at_ns, expires, self.depth, self.tag, self.meta, self.durable)
