"""What the keeper does beside making room: which segment goes next, quotas, and counting what the segments hold."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from ..format.layout import PAGE_BYTES, RecordType, segment_name
from .eviction import Evictor
from .limits import LimitsByNamespace, limits_of
from .policies.interface import SegmentFacts
from .segments import Segment, SegmentTable
from .stats import Counters
from .usage import UsageTable

logger = logging.getLogger("kvlode")


class Housekeeping:
    """Used by the keeper thread alone, but for ``limits``, which may be replaced at any time."""

    def __init__(self, segments: SegmentTable, usage: UsageTable, evictor: Evictor, limits: LimitsByNamespace, counters: Counters) -> None:
        self._segments = segments
        self._usage = usage
        self._evictor = evictor
        self._counters = counters
        self.limits = limits
        self._uncounted = [segment.segment_id for segment in segments.all()]

    def choose_victim(self, sealed: Sequence[Segment]) -> Segment:
        """The segment that the policy gives up, of sealed ones from the oldest on.

        Where it holds deletes and is not the oldest, the oldest is taken: what they delete may lie in an older segment, and would come
        back in an index that is rebuilt.
        """
        if len(sealed) == 1:
            return sealed[0]
        empty = self._empty(sealed)
        if empty is not None:
            return empty
        position = self._evictor.policy.victim([self._facts(segment) for segment in sealed])
        if position and not self._evictor.holds_no_deletes(sealed[position]):
            self._counters.add("victims_with_deletes")
            position = 0
        return sealed[position]

    def _empty(self, sealed: Sequence[Segment]) -> Segment | None:
        """The oldest segment in which nothing is left to lose: dropped namespaces, and what went for a quota."""
        if not self._usage.loaded.is_set():
            return None
        for segment in sealed:
            if not self._usage.of_segment(segment.segment_id).namespaces and self._evictor.holds_no_deletes(segment):
                return segment
        return None

    def _facts(self, segment: Segment) -> SegmentFacts:
        use = self._usage.of_segment(segment.segment_id)
        return SegmentFacts(segment.segment_id, segment.size_bytes, use.fresh_bytes, use.last_used_s)

    def count_one(self) -> bool:
        """Count one of the segments that were there at opening; False when there are none left."""
        while self._uncounted:
            segment = self._segments.get(self._uncounted.pop())
            if segment is None or segment.retired_at_s is not None or not segment.sealed:
                continue
            table = self._evictor.table_of(segment)
            if table is not None:
                blocks = np.flatnonzero(table.type == RecordType.BLOCK)
                sizes = table.record_pages[blocks].astype(np.int64) * PAGE_BYTES
                digests, places = np.unique(table.namespace[blocks], return_inverse=True)
                sums = np.bincount(places, weights=sizes, minlength=len(digests)).astype(np.int64)
                self._usage.add_many(segment.segment_id, [(bytes(d), int(s), True) for d, s in zip(digests, sums, strict=True)])
            return True
        self._usage.loaded.set()
        return False

    def trim_one(self) -> bool:
        """Give up the oldest blocks of a namespace that is beyond its quota, a segment's worth; False when there is none to trim."""
        for namespace, used_bytes in self._usage.by_namespace().items():
            quota_bytes = limits_of(self.limits, namespace).quota_bytes
            if quota_bytes is None or used_bytes <= quota_bytes:
                continue
            sealed = [s.segment_id for s in self._segments.all() if s.sealed and s.retired_at_s is None]
            segment_id = self._usage.oldest_with(namespace, sealed)
            segment = None if segment_id is None else self._segments.get(segment_id)
            if segment is None:
                continue
            dropped = self._evictor.trim(segment, namespace)
            self._usage.forget_namespace(namespace, segment.segment_id)
            self._counters.add_many({"quota_evicted_blocks": dropped, "quota_trims": 1})
            facts = {"namespace": namespace.hex(), "segment": segment_name(segment.segment_id), "evicted_blocks": dropped}
            self._counters.decisions.note("namespace_trimmed", "beyond its quota", used_bytes=used_bytes, quota_bytes=quota_bytes, **facts)
            logger.info(
                "namespace %s is beyond its quota (%d of %d bytes): %d blocks of segment %s given up",
                *(namespace.hex(), used_bytes, quota_bytes, dropped, segment_name(segment.segment_id)),
            )
            return True
        return False
