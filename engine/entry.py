"""One change to the store on its way to the log: a block, a tombstone, a drop, or a record that is copied forward."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

from ..format.layout import ZERO_DIGEST
from .arena import Allocation, Bytes
from .contract import PutStatus


class Kind(enum.IntEnum):
    BLOCK = 0
    TOMBSTONE = 1
    DROP = 2
    REINSERT = 3


class State(enum.IntEnum):
    FILLING = 0
    DIRTY = 1
    CLEAN = 2
    GONE = 3


class Entry:
    """One change to the store, and for blocks its bytes. Fields are written under the buffer's lock."""

    __slots__ = (
        *("allocation", "depth", "expires_at_ns", "ident", "key", "kind", "meta", "namespace", "on_settled", "parent"),
        *("parent_key", "queued_at_s", "raw_checksum", "reinsertion", "shadowed", "size_bytes", "spans", "state", "tag"),
        *("ticket", "version_seq", "written_at_ns"),
    )

    def __init__(self, kind: Kind, namespace: Any, key: bytes, *, written_at_ns: int = 0) -> None:
        self.kind = kind
        self.namespace = namespace
        self.key = key
        self.ident: bytes = namespace.digest + key
        self.state = State.FILLING if kind is Kind.BLOCK else State.DIRTY
        self.spans: tuple[Bytes, ...] = ()
        self.allocation: Allocation | None = None  # None: borrowed memory, or no payload
        self.size_bytes = 0
        self.version_seq = 0
        self.ticket = 0
        self.parent = ZERO_DIGEST
        self.parent_key: bytes | None = None
        self.depth = 0
        self.written_at_ns = written_at_ns
        self.expires_at_ns = 0
        self.tag = ZERO_DIGEST
        self.meta = b""
        self.raw_checksum = 0
        self.queued_at_s = 0.0
        self.reinsertion: Any = None
        self.shadowed: Entry | None = None  # the tombstone that this block's reservation took the place of
        self.on_settled: Callable[[PutStatus], None] | None = None
