"""What other caches would hit on the same trace: for comparison, not policies of a store.

They give up single blocks, not segments, which a log cannot do without writing most of it again.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .request import Request

S3_SMALL_SHARE = 0.1
S3_COUNT_MAX = 3


@dataclass(frozen=True, slots=True)
class ReferenceOutcome:
    """Ratios of all blocks that were asked for; see ``simulation.Outcome``."""

    name: str
    block_hit_ratio: float
    prefix_hit_ratio: float
    write_amplification: float
    capacity_blocks: int


class _ObjectCache(Protocol):
    moved: int
    """Blocks that a log would have written again."""

    def has(self, block: int) -> bool: ...

    def use(self, block: int) -> None:
        """A use of a block, which is put in when it is absent."""
        ...


class _Lru:
    def __init__(self, capacity_blocks: int) -> None:
        self._capacity = capacity_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self.moved = 0

    def has(self, block: int) -> bool:
        return block in self._blocks

    def use(self, block: int) -> None:
        self._blocks[block] = None
        self._blocks.move_to_end(block)
        if len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)


class _S3Fifo:
    """Yang and others, SOSP '23, algorithm 1: a small queue of 10 %, a main queue with reinsertion, ghosts as many as main has blocks."""

    def __init__(self, capacity_blocks: int) -> None:
        self._small_max = max(1, int(capacity_blocks * S3_SMALL_SHARE))
        self._capacity = capacity_blocks
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._count: dict[int, int] = {}
        self.moved = 0

    def has(self, block: int) -> bool:
        return block in self._count

    def use(self, block: int) -> None:
        if block in self._count:
            self._count[block] = min(self._count[block] + 1, S3_COUNT_MAX)
            return
        while len(self._count) >= self._capacity:
            if len(self._small) >= self._small_max or not self._main:
                self._evict_small()
            else:
                self._evict_main()
        known = block in self._ghosts
        self._ghosts.pop(block, None)
        (self._main if known else self._small).append(block)
        self._count[block] = 0

    def _evict_small(self) -> None:
        block = self._small.popleft()
        if self._count[block] > 1:
            self._main.append(block)
            self._count[block] = 0
            self.moved += 1
            return
        del self._count[block]
        self._ghosts[block] = None
        if len(self._ghosts) > self._capacity - self._small_max:
            self._ghosts.popitem(last=False)

    def _evict_main(self) -> None:
        block = self._main.popleft()
        if self._count[block]:
            self._count[block] -= 1
            self._main.append(block)
            self.moved += 1
        else:
            del self._count[block]


def object_lru(requests: Iterable[Request], capacity_blocks: int) -> ReferenceOutcome:
    """The least recently used block leaves; of one request the tail leaves first. Memory: the blocks that are kept."""
    return _play("object LRU", requests, capacity_blocks, _Lru)


def object_s3_fifo(requests: Iterable[Request], capacity_blocks: int) -> ReferenceOutcome:
    """S3-FIFO by blocks, from the tail of each request to its head. Its write amplification is what a log would write."""
    return _play("object S3-FIFO", requests, capacity_blocks, _S3Fifo)


def _play(name: str, requests: Iterable[Request], capacity_blocks: int, make: Callable[[int], _ObjectCache]) -> ReferenceOutcome:
    cache = make(capacity_blocks)
    asked = block_hits = prefix_hits = 0
    for request in requests:
        found = [cache.has(block) for block in request.blocks]
        asked += len(found)
        block_hits += sum(found)
        prefix_hits += found.index(False) if False in found else len(found)
        if capacity_blocks:
            for block in reversed(request.blocks):
                cache.use(block)
    written = max(1, asked - block_hits)
    return ReferenceOutcome(name, block_hits / max(1, asked), prefix_hits / max(1, asked), 1 + cache.moved / written, capacity_blocks)


def belady(requests: Sequence[Request], capacity_blocks: int) -> ReferenceOutcome:
    """The optimum for single blocks, which knows the future: the block that is used next after all others leaves, of equals the one that
    is deepest in its chain. A missing block is written in any case, and may be the one that leaves. Descendants are never used before
    their ancestors, so what it keeps is closed: hits are prefix hits. Memory is proportional to the blocks of all requests.
    """
    never = len(requests)
    next_uses = _next_uses(requests)
    kept: dict[int, int] = {}
    heap: list[tuple[int, int, int]] = []
    """(-next use, -depth, block); entries that are out of date are passed over."""
    asked = block_hits = prefix_hits = 0
    for request, following in zip(requests, next_uses, strict=True):
        found = [block in kept for block in request.blocks]
        asked += len(found)
        block_hits += sum(found)
        prefix_hits += found.index(False) if False in found else len(found)
        for depth, (block, next_use) in enumerate(zip(request.blocks, following, strict=True)):
            kept[block] = next_use if next_use >= 0 else never
            heapq.heappush(heap, (-kept[block], -depth, block))
        while len(kept) > capacity_blocks:
            next_use, _, block = heapq.heappop(heap)
            if kept.get(block) == -next_use:
                del kept[block]
    return ReferenceOutcome("Belady's optimum", block_hits / max(1, asked), prefix_hits / max(1, asked), 1.0, capacity_blocks)


def _next_uses(requests: Sequence[Request]) -> list[list[int]]:
    """For each block of each request the number of the next request that has it, -1 for none."""
    upcoming: dict[int, int] = {}
    answers: list[list[int]] = []
    for number in range(len(requests) - 1, -1, -1):
        blocks = requests[number].blocks
        answers.append([upcoming.get(block, -1) for block in blocks])
        upcoming.update(dict.fromkeys(blocks, number))
    answers.reverse()
    return answers
