"""What share of uses would miss with another capacity: the miss-ratio curve of least recently used, from a sample of the blocks.

SHARDS (Waldspurger, Park, Garthwaite, Ahmad: Efficient MRC Construction with SHARDS, FAST '15), the variant of fixed size with
its correction (SHARDS-adj). A block is in the sample when a hash of its ident is below a threshold, so all of its uses are seen
or none. When the sample is full, the blocks with the largest hashes leave it and the threshold falls to theirs. Distances
between two uses are divided by the share that is sampled. The paper scales the counts of earlier uses down whenever the threshold
falls; here each use weighs one by the share at its time, which is the same up to a factor and needs no second look.

Two things differ from the paper. Blocks have sizes, so distances are bytes: what was used since, the block itself included. And
blocks that were not used for as long as ``distance_bytes_max`` tells leave the sample: a cache writes new blocks for ever, and a
sample of all that there ever were would after some months hold nothing that is still there.

A *use* is a read that found its block, or a put of a block that was absent. A lookup, or a read, that finds nothing does not count:
the put that follows is the use. So hosts that look before they read, and those that just read, get the same curve. It is
the curve of the store's work, whatever was served by the memory of a GPU never shows.
"""

from __future__ import annotations

import bisect
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

SAMPLED_BLOCKS_MAX = 8192
"""The paper finds a mean error of 0.6 % with as many. Takes 2 MiB."""
DISTANCE_CAPACITIES = 16
"""Uses further apart than so many capacities count as first uses."""
STEPS_PER_DOUBLING = 8
"""The curve has a point every 9 % of capacity."""
TOLD_FROM_BLOCKS = 16
"""A sampled block stands for many; the sample cannot tell what capacities below so many of them would do."""
SMALLEST_DISTANCE_LOG2, LARGEST_DISTANCE_LOG2 = 12, 52
USES_MIN, SAMPLED_USES_MIN, REPEATED_USES_MIN = 1000, 500, 50
"""What a curve needs to tell anything: uses, those of the sample, and those of them that were not the first of their block."""

_HASHES = 1 << 64


@dataclass(frozen=True, slots=True)
class MissRatioCurve:
    """``miss_ratios[i]`` of all uses would have missed with room for ``capacity_bytes[i]`` of blocks, the least recently used leaving."""

    capacity_bytes: list[int]
    """Ascending. Smaller capacities than the first miss everything, larger ones than the last change nothing."""
    miss_ratios: list[float]
    """Falling, from 0 to 1."""
    uses: int
    sampled_uses: int
    repeated_uses: int
    """Sampled uses that were not the first of their block."""
    sampled_blocks: int
    sampled_share: float
    """Of all blocks, those that are in the sample now."""

    @property
    def tells(self) -> bool:
        """Whether there was enough to see for the curve to be taken seriously."""
        return self.uses >= USES_MIN and self.sampled_uses >= SAMPLED_USES_MIN and self.repeated_uses >= REPEATED_USES_MIN

    def facts(self) -> dict[str, Any]:
        """Plain values for ``Store.stats``."""
        facts = {name: getattr(self, name) for name in self.__slots__}
        return facts | {"miss_ratios": [round(ratio, 4) for ratio in self.miss_ratios], "tells": self.tells}


class MissRatioSampler:
    """Watches uses and draws the curve. Thread-safe: one short lock for each call of ``use``, some microseconds for each sampled block.

    The same uses in the same order give the same curve. ``distance_bytes_max``: see the module; ``None`` for no limit.
    """

    def __init__(self, distance_bytes_max: int | None = None, sampled_blocks_max: int = SAMPLED_BLOCKS_MAX) -> None:
        self._lock = threading.Lock()
        self._sampled_max = sampled_blocks_max
        self._distance_max = distance_bytes_max
        self._threshold = _HASHES  # read without the lock by ``use``: an old value lets too many through, which are looked at again
        self._blocks: OrderedDict[int, tuple[int, int]] = OrderedDict()
        """Hash -> (position in ``_recent``, bytes); least recently used first."""
        self._hashes: list[int] = []
        """The same hashes, ascending: the last one leaves first."""
        self._recent = _RecentBytes(4 * sampled_blocks_max)
        self._weights = [0.0] * (1 + STEPS_PER_DOUBLING * (LARGEST_DISTANCE_LOG2 - SMALLEST_DISTANCE_LOG2))
        self._first_weight = 0.0
        self._uses = self._sampled_uses = self._repeated_uses = 0

    def use(self, idents: Sequence[bytes], size_of: Callable[[int], int], *, counted: bool = True) -> None:
        """Blocks were used, in this order. ``size_of`` gives the bytes of the block at a position, and is asked for few of them.

        A size that is smaller than one given before is taken for a part of the block. Without ``counted`` the blocks only become the most
        recent ones (a host says that it uses them, and asks for nothing). 0.1 us for a block that is not sampled, 0.8 us
        for a call with one.
        """
        threshold, digest = self._threshold, xxhash.xxh3_64_intdigest
        sampled = [(number, at) for at, ident in enumerate(idents) if (number := digest(ident)) < threshold]
        with self._lock:
            if counted:
                self._uses += len(idents)
            for number, at in sampled:
                if number < self._threshold:
                    self._see(number, size_of(at), counted)

    def _see(self, number: int, size_bytes: int, counted: bool) -> None:
        known = self._blocks.pop(number, None)
        share = self._threshold / _HASHES
        if known is None:
            bisect.insort(self._hashes, number)
        else:
            position, known_bytes = known
            size_bytes = max(size_bytes, known_bytes)
            between_bytes = self._recent.after(position)
            self._recent.add(position, -known_bytes)
        if counted:
            self._sampled_uses += 1
            if known is None:
                self._first_weight += 1 / share
            else:
                self._repeated_uses += 1
                self._weights[_step_of(between_bytes / share + size_bytes)] += 1 / share
        if self._recent.full:
            self._renumber()
        self._blocks[number] = self._recent.append(size_bytes), size_bytes
        while self._distance_max is not None and len(self._blocks) > 1 and self._recent.total > self._distance_max * share:
            self._forget(next(iter(self._blocks)))
        while len(self._blocks) > self._sampled_max:
            self._threshold = self._hashes[-1]
            self._forget(self._hashes[-1])

    def _forget(self, number: int) -> None:
        position, size_bytes = self._blocks.pop(number)
        self._recent.add(position, -size_bytes)
        del self._hashes[bisect.bisect_left(self._hashes, number)]

    def _renumber(self) -> None:
        """All positions are taken: the blocks move to the first ones, in their order."""
        self._recent.clear()
        for number, (_, size_bytes) in self._blocks.items():
            self._blocks[number] = self._recent.append(size_bytes), size_bytes

    def curve(self, scale: float = 1.0) -> MissRatioCurve:
        """The curve of all uses up to now. ``scale``: bytes of capacity for each byte of the sizes that were given (stored by raw)."""
        with self._lock:
            weights, first_weight, uses = list(self._weights), self._first_weight, self._uses
            share, blocks, sampled_bytes = self._threshold / _HASHES, len(self._blocks), self._recent.total
            sampled_uses, repeated_uses = self._sampled_uses, self._repeated_uses
        # the correction of the paper: uses that the sample saw too many or too few of are taken to be of the hottest blocks
        hits = uses - sum(weights) - first_weight
        seen = [step for step, weight in enumerate(weights) if weight]
        told_from = _step_of(TOLD_FROM_BLOCKS * sampled_bytes / blocks / share) if blocks and share < 1 else 0
        lowest, capacities, ratios = 1.0, [], []
        for step in range(max(0, seen[0] - 1), seen[-1] + 1) if seen else ():
            hits += weights[step] if step >= seen[0] else 0
            lowest = min(lowest, max(0.0, 1 - max(0.0, hits) / max(1, uses))) if step >= seen[0] else 1.0
            if step >= told_from or step == seen[-1]:
                capacities.append(round(scale * 2 ** (SMALLEST_DISTANCE_LOG2 + step / STEPS_PER_DOUBLING)))
                ratios.append(lowest)
        return MissRatioCurve(capacities, ratios, uses, sampled_uses, repeated_uses, blocks, share)


def _step_of(distance_bytes: float) -> int:
    """The first step of the curve whose capacity holds so many bytes."""
    step = math.ceil(STEPS_PER_DOUBLING * (math.log2(max(1.0, distance_bytes)) - SMALLEST_DISTANCE_LOG2) - 1e-9)
    return min(max(step, 0), STEPS_PER_DOUBLING * (LARGEST_DISTANCE_LOG2 - SMALLEST_DISTANCE_LOG2))


class _RecentBytes:
    """Bytes by position, and their sums: a Fenwick tree. Positions are given out once each, until it is ``full``."""

    def __init__(self, positions_max: int) -> None:
        self._size = positions_max
        self.clear()

    def clear(self) -> None:
        self._tree = [0] * (self._size + 1)
        self._next = 1
        self.total = 0

    @property
    def full(self) -> bool:
        return self._next > self._size

    def append(self, size_bytes: int) -> int:
        """The position that follows all others, with so many bytes."""
        position, self._next = self._next, self._next + 1
        self.add(position, size_bytes)
        return position

    def add(self, position: int, size_bytes: int) -> None:
        self.total += size_bytes
        tree, size = self._tree, self._size
        while position <= size:
            tree[position] += size_bytes
            position += position & -position

    def after(self, position: int) -> int:
        """Bytes at later positions."""
        tree, rest = self._tree, self.total
        while position:
            rest -= tree[position]
            position &= position - 1
        return rest
