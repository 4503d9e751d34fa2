"""What each namespace takes of the log, and how much of each segment was new: for quotas, reclaim policies and metrics.

Counted in memory by record, as commit places them; at opening taken from the segments' tables of contents, in the background.
Deleted and superseded records count until their segment is freed, for so long they take their room.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class SegmentUse:
    """One segment."""

    namespaces: dict[bytes, int] = field(default_factory=dict)
    """Bytes of the records of each namespace, header pages included; those that were given up for a quota are not counted."""
    fresh_bytes: int = 0
    last_used_s: float = 0.0


class UsageTable:
    """Thread-safe; every step is short."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._segments: dict[int, SegmentUse] = {}
        self._totals: defaultdict[bytes, int] = defaultdict(int)
        self._freed: set[int] = set()
        """Segments that were freed before their table of contents was read."""
        self.loaded = threading.Event()
        """Set once the segments that were there at opening are counted."""

    def add(self, segment_id: int, namespace: bytes, record_bytes: int, *, fresh: bool) -> None:
        """A record was written."""
        self.add_many(segment_id, [(namespace, record_bytes, fresh)])

    def add_many(self, segment_id: int, records: Iterable[tuple[bytes, int, bool]]) -> None:
        """Records of one segment: namespace, bytes, whether they are new (not copied forward)."""
        with self._lock:
            if segment_id in self._freed:
                return
            use = self._segments.setdefault(segment_id, SegmentUse())
            for namespace, record_bytes, fresh in records:
                use.namespaces[namespace] = use.namespaces.get(namespace, 0) + record_bytes
                self._totals[namespace] += record_bytes
                use.fresh_bytes += record_bytes if fresh else 0

    def forget_segment(self, segment_id: int) -> None:
        """A segment was freed."""
        with self._lock:
            if not self.loaded.is_set():
                self._freed.add(segment_id)
            use = self._segments.pop(segment_id, None)
            for namespace in use.namespaces if use is not None else ():
                self._subtract(use, namespace)

    def forget_namespace(self, namespace: bytes, segment_id: int | None = None) -> None:
        """The blocks of a namespace were given up, in one segment or (a drop) in all."""
        with self._lock:
            for use in [self._segments.get(segment_id)] if segment_id is not None else list(self._segments.values()):
                if use is not None and namespace in use.namespaces:
                    self._subtract(use, namespace)
                    del use.namespaces[namespace]

    def _subtract(self, use: SegmentUse | None, namespace: bytes) -> None:
        self._totals[namespace] -= 0 if use is None else use.namespaces[namespace]
        if self._totals[namespace] <= 0:
            del self._totals[namespace]

    def note_use(self, segment_ids: Iterable[int], now_s: float) -> None:
        """Blocks of these segments were read."""
        with self._lock:
            for segment_id in segment_ids:
                use = self._segments.get(segment_id)
                if use is not None:
                    use.last_used_s = now_s

    def of_segment(self, segment_id: int) -> SegmentUse:
        """A copy; empty for a segment that is not counted (yet)."""
        with self._lock:
            use = self._segments.get(segment_id)
            return SegmentUse() if use is None else SegmentUse(dict(use.namespaces), use.fresh_bytes, use.last_used_s)

    def bytes_of(self, namespace: bytes) -> int:
        return self._totals.get(namespace, 0)

    def by_namespace(self) -> dict[bytes, int]:
        with self._lock:
            return dict(self._totals)

    def oldest_with(self, namespace: bytes, segment_ids: Iterable[int]) -> int | None:
        """The first of these segments with records of the namespace."""
        with self._lock:
            for segment_id in segment_ids:
                use = self._segments.get(segment_id)
                if use is not None and use.namespaces.get(namespace):
                    return segment_id
            return None
