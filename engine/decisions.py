"""The log of what a store destroys and why: segments freed, blocks dropped, namespaces cleared, indexes set aside.

Each decision is one record of the logger ``kvlode.decisions``, of level INFO (what is damage is an error of the logger ``kvlode``
as well), with its fields in an attribute ``decision``; ``JsonLines`` makes it one line of JSON. The latest are kept in memory and are part
of ``Store.stats()``, so that they can be looked at without any logging set up.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..format.layout import segment_name

if TYPE_CHECKING:
    from .index_entry import IndexEntry

logger = logging.getLogger("kvlode.decisions")

KEPT_DECISIONS = 64
"""Of each event, so that the many of one kind do not push out the few of another."""

DECISIONS = {
    "segment_freed": "a segment was given up to make room",
    "block_dropped": "an index entry was given up because its block is damaged, expired or gone",
    "blocks_deleted": "the host deleted blocks",
    "namespace_dropped": "the host dropped a namespace",
    "namespace_trimmed": "the oldest blocks of a namespace were given up for its quota",
    "index_rebuilt": "the index was derived again from the segments",
    "index_set_aside": "an index that cannot be read was moved away, to be derived again",
    "segment_lost": "recovery found a segment, or a part of one, that cannot be read",
    "quarantined": "a repair moved something into the quarantine",
    "tag_purged": "the host purged a tag",
    "store_replaced": "a store that this version cannot write was moved away or removed at opening",
    "writer_stopped": "the store latched a failure: it writes no more until it is opened again",
}
"""Event -> what it says. The fields of each are in docs/metrics.md."""


class DecisionLog:
    """The latest decisions of one store. Thread-safe."""

    def __init__(self, store: str = "") -> None:
        self.store = store
        """Path of the store, for the log."""
        self._lock = threading.Lock()
        self._kept: dict[str, deque[dict[str, Any]]] = {event: deque(maxlen=KEPT_DECISIONS) for event in DECISIONS}

    def note(self, event: str, reason: str, **fields: Any) -> None:
        """``event`` happened (one of ``DECISIONS``), for ``reason``. ``fields``: plain values (text, numbers, ``None``)."""
        decision = {"at_s": time.time(), "event": event, "reason": reason, **fields}
        with self._lock:
            self._kept[event].append(decision)
        if logger.isEnabledFor(logging.INFO):
            text = " ".join(f"{name}={value}" for name, value in fields.items())
            logger.info("%s: %s (%s) %s", event, reason, self.store, text, extra={"decision": decision, "store": self.store})

    def note_block(self, counter: str, ident: bytes, entry: IndexEntry) -> None:
        """The index entry of a block (namespace digest + key) is given up; ``counter`` is ``expired_blocks`` or what else counts it."""
        reason = counter.removesuffix("_blocks")
        place = {"segment": segment_name(entry.segment_id), "offset": entry.offset}
        self.note("block_dropped", reason, namespace=ident[:16].hex(), key=ident[16:].hex(), **place)

    def latest(self) -> list[dict[str, Any]]:
        """Copies of the kept ones, oldest first: ``at_s`` (Unix time), ``event``, ``reason`` and its fields."""
        with self._lock:
            kept = [dict(decision) for decisions in self._kept.values() for decision in decisions]
        return sorted(kept, key=lambda decision: decision["at_s"])


class JsonLines(logging.Formatter):
    """Formats each record as one line of JSON: time, level, logger, store, and the decision's fields.

    For a handler of the logger ``kvlode.decisions``; a record of another logger becomes a line with its message.
    """

    def format(self, record: logging.LogRecord) -> str:
        decision = getattr(record, "decision", None)
        line: dict[str, Any] = {"at_s": record.created, "level": record.levelname, "logger": record.name}
        if isinstance(decision, Mapping):
            line |= {"store": getattr(record, "store", ""), **decision}
        else:
            line["message"] = record.getMessage()
        return json.dumps(line, default=str)
