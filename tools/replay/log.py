"""The simulated log: blocks in segments, their heat, and what reclaim does when the log is full."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from ...engine.heat import COUNT_MAX
from ...engine.policies.interface import AdmissionPolicy, Candidate, ReclaimPolicy, SegmentFacts

AGE_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

_STEPS_PER_DOUBLING = 8
_AGE_MIN_LOG2, _AGE_MAX_LOG2 = -10, 30


class AgeCounts:
    """Ages in steps of 9 %: quantiles without keeping them all."""

    def __init__(self) -> None:
        self._counts = np.zeros((_AGE_MAX_LOG2 - _AGE_MIN_LOG2) * _STEPS_PER_DOUBLING, np.int64)

    def add(self, ages_s: Sequence[float]) -> None:
        logs = np.log2(np.maximum(np.asarray(ages_s, np.float64), 2.0**_AGE_MIN_LOG2))
        steps = ((logs - _AGE_MIN_LOG2) * _STEPS_PER_DOUBLING).astype(np.int64)
        self._counts += np.bincount(np.minimum(steps, len(self._counts) - 1), minlength=len(self._counts))

    def quantiles(self) -> dict[float, float]:
        """Quantile -> age in seconds, the middle of its step; empty when nothing was counted."""
        sums: npt.NDArray[np.int64] = np.cumsum(self._counts)
        if not sums[-1]:
            return {}
        steps = {q: int(np.searchsorted(sums, math.ceil(q * int(sums[-1])))) for q in AGE_QUANTILES}
        return {q: 2.0 ** (_AGE_MIN_LOG2 + (step + 0.5) / _STEPS_PER_DOUBLING) for q, step in steps.items()}


class SimulatedLog:
    """Blocks by id, in lists that grow with the ids. A segment is the list of the blocks that it holds, all of them alive."""

    def __init__(self, segment_blocks: int, segments: int, reclaim: ReclaimPolicy, admission: AdmissionPolicy, block_bytes: int) -> None:
        self.segment_blocks, self.segments = segment_blocks, segments
        self.reclaim, self.admission = reclaim, admission
        self.fresh = self.reinserted = self.rejected = 0
        self.ages = AgeCounts()
        self._block_bytes = block_bytes
        self._filled = False
        self._known = bytearray()
        """1 for each id that was ever asked for."""
        self._segment_of: list[int] = []
        """-1 for a block that is absent."""
        self._hits = bytearray()
        self._put_s: list[float] = []
        self._used_s: list[float] = []
        self._parent: list[int] = []
        self._depth: list[int] = []
        self._namespace: list[int] = []
        self._next_id = 0
        self.clear()

    def clear(self) -> None:
        """Everything is lost."""
        count = len(self._segment_of)
        self._segment_of = [-1] * count
        self._hits = bytearray(count)
        self._sealed: list[int] = []
        """Ids of the sealed segments, the oldest first."""
        self._blocks: dict[int, list[int]] = {}
        self._fresh_of: dict[int, int] = {}
        self._used_of: dict[int, float] = {}
        self._open_segment(0.0)

    def _open_segment(self, now_s: float) -> None:
        self._open, self._next_id = self._next_id, self._next_id + 1
        self._blocks[self._open], self._fresh_of[self._open], self._used_of[self._open] = [], 0, now_s

    def make_place_for(self, block: int) -> None:
        """Ids up to this one are about to be used."""
        more = block + 1 - len(self._segment_of)
        if more > 0:
            more = max(more, 4096)
            self._known.extend(bytes(more))
            self._hits.extend(bytes(more))
            self._segment_of.extend([-1] * more)
            self._put_s.extend([0.0] * more)
            self._used_s.extend([0.0] * more)
            for column in (self._parent, self._depth, self._namespace):
                column.extend([-1] * more)

    def unique_blocks(self) -> int:
        return self._known.count(1)

    def read(self, blocks: Sequence[int], now_s: float, levels: Sequence[int] | None) -> list[bool]:
        """Which blocks are in the log. Those that are, and are not served by a tier in front (a level from 0 on), are used, and with
        each its ancestors."""
        segment_of, hits, used_s, used_of = self._segment_of, self._hits, self._used_s, self._used_of
        found = [segment_of[block] >= 0 for block in blocks]
        reach = len(blocks)
        if levels is not None:
            reached = [stored and level < 0 for stored, level in zip(found, levels, strict=True)]
            reach = len(blocks) - reached[::-1].index(True) if True in reached else 0
        for position in range(reach):
            if found[position]:
                block = blocks[position]
                if hits[block] < COUNT_MAX:
                    hits[block] += 1
                used_s[block] = now_s
                if levels is None or levels[position] < 0:
                    used_of[segment_of[block]] = now_s
        return found

    def write_missing(self, blocks: Sequence[int], found: Sequence[bool], now_s: float, namespace: int) -> None:
        """Offer the blocks that were found nowhere; the admitted ones are written in the order of the chain."""
        known, segment_of, parent = self._known, self._segment_of, -1
        prefix = namespace.to_bytes(16, "little")
        admit, filled = self.admission.admit, self._filled
        for depth, (block, present) in enumerate(zip(blocks, found, strict=True)):
            if not present and segment_of[block] < 0:
                known[block] = 1
                key_hash = xxhash.xxh3_64_intdigest(prefix + block.to_bytes(8, "little"))
                if self.segment_blocks and admit(key_hash, self._block_bytes, now_s, filled=filled):
                    self._put(block, parent, depth, namespace, now_s)
                    filled = self._filled
                else:
                    self.rejected += 1
            parent = block

    def _put(self, block: int, parent: int, depth: int, namespace: int, now_s: float) -> None:
        self._append(block, now_s)
        self._fresh_of[self._open] += 1
        self.fresh += 1
        self._hits[block] = 0
        self._put_s[block] = self._used_s[block] = now_s
        self._parent[block], self._depth[block], self._namespace[block] = parent, depth, namespace

    def _append(self, block: int, now_s: float) -> None:
        if len(self._blocks[self._open]) == self.segment_blocks:
            self._next_segment(now_s)
        self._segment_of[block] = self._open
        self._blocks[self._open].append(block)

    def _next_segment(self, now_s: float) -> None:
        """Seal the open segment; free others until the new one has room for something besides what was copied forward."""
        self._seal(now_s)
        for _ in range(self.segments):
            kept = self._free(now_s) if len(self._sealed) == self.segments else []
            self._open_segment(now_s)
            self._copy_forward(kept)
            if len(kept) < self.segment_blocks:
                return
            self._seal(now_s)
        # the policy keeps everything that there is: give up the oldest segment, as a store that is full would
        self._drop(self._sealed[0], set(), now_s)
        self._open_segment(now_s)

    def _seal(self, now_s: float) -> None:
        self._sealed.append(self._open)
        self._used_of.setdefault(self._open, now_s)

    def _free(self, now_s: float) -> list[int]:
        """Give up a segment; the blocks of it that go forward."""
        self._filled = True
        size_bytes = self.segment_blocks * self._block_bytes
        facts = [SegmentFacts(s, size_bytes, self._fresh_of[s] * self._block_bytes, self._used_of[s]) for s in self._sealed]
        victim = self._sealed[self.reclaim.victim(facts)]
        chosen = self.reclaim.choose(self._candidates(victim, now_s), size_bytes)
        blocks = self._blocks[victim]
        kept = [blocks[candidate.position] for candidate in chosen]
        self._drop(victim, set(kept), now_s)
        return kept

    def _candidates(self, victim: int, now_s: float) -> list[Candidate]:
        hits, put_s, used_s, parents = self._hits, self._put_s, self._used_s, self._parent
        namespace, depths, size_bytes = self._namespace, self._depth, self._block_bytes
        return [
            Candidate(
                position,
                namespace[block].to_bytes(16, "little") + block.to_bytes(8, "little"),
                size_bytes,
                hits[block],
                False,
                depths[block],
                now_s - put_s[block],
                now_s - used_s[block],
                hits[parents[block]] if parents[block] >= 0 else 0,
            )
            for position, block in enumerate(self._blocks[victim])
        ]

    def _drop(self, victim: int, kept: set[int], now_s: float) -> None:
        """Take a segment away; blocks that are not kept are absent then."""
        self._sealed.remove(victim)
        gone = [block for block in self._blocks.pop(victim) if block not in kept]
        del self._fresh_of[victim], self._used_of[victim]
        for block in gone:
            self._segment_of[block] = -1
            self._hits[block] = 0
        self.ages.add([now_s - self._put_s[block] for block in gone])

    def _copy_forward(self, kept: Sequence[int]) -> None:
        """The kept blocks open the new segment; their hits fade."""
        for block in kept:
            self._segment_of[block] = self._open
            self._hits[block] >>= 1
        self._blocks[self._open] += kept
        self.reinserted += len(kept)
