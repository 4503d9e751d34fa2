"""The memories in front of a store: what they serve never reaches it, and a restart empties them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierSize:
    """A memory in front of the store. The first one given is the nearest to the compute units."""

    name: str
    capacity_blocks: int


class LruTier:
    """A memory that gives up the least recently used block."""

    def __init__(self, size: TierSize) -> None:
        self.name = size.name
        self.capacity_blocks = size.capacity_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def take(self, block: int) -> int | None:
        """Put a block in as the most recently used; returns the one that had to leave for it (itself, where there is no room at all)."""
        if not self.capacity_blocks:
            return block
        blocks = self._blocks
        if block in blocks:
            blocks.move_to_end(block)
            return None
        blocks[block] = None
        return blocks.popitem(last=False)[0] if len(blocks) > self.capacity_blocks else None

    def discard(self, block: int) -> None:
        self._blocks.pop(block, None)

    def clear(self) -> None:
        self._blocks.clear()


class Tiers:
    """Memories one behind the other. A block is in one of them at most: what the first gives up goes into the second, and so on.

    So their sizes add up, as where a host moves blocks out of GPU memory instead of keeping copies of them. All blocks of a request
    pass through the first one, from the tail to the head: the head of a prompt is used by more requests than its tail and leaves last.
    """

    def __init__(self, sizes: Sequence[TierSize]) -> None:
        self.levels = [LruTier(size) for size in sizes]

    def find(self, block: int) -> int:
        """Number of the level that holds a block, -1 where none does."""
        for number, level in enumerate(self.levels):
            if block in level:
                return number
        return -1

    def use(self, blocks: Sequence[int]) -> None:
        """A request has worked with these blocks, wherever they came from."""
        for block in reversed(blocks):
            for level in self.levels[1:]:
                level.discard(block)
            moving = block
            for level in self.levels:
                pushed_out = level.take(moving)
                if pushed_out is None:
                    break
                moving = pushed_out

    def clear(self) -> None:
        """A restart."""
        for level in self.levels:
            level.clear()
