"""The buffer's memory: one slab cut into chunks that blocks of any size share."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..format.layout import PAGE_BYTES, round_up_pages

Bytes = npt.NDArray[np.uint8]

CHUNK_BYTES = 2 << 20
CHUNKS_MIN = 8


@dataclass(frozen=True, slots=True)
class Allocation:
    """Memory of one block: ``spans`` in order, the last one longer than needed by less than a page."""

    chunks: tuple[int, ...]
    spans: tuple[Bytes, ...]


class ChunkArena:
    """Bump allocation over chunks with reference counts. Not thread-safe: the buffer calls it under its lock.

    Blocks fill a chunk one after the other, so small blocks waste no chunk and large ones take whole chunks. Every
    block starts on a page and its last page is its own: the writer hands the very same memory to O_DIRECT.
    """

    def __init__(self, memory: Bytes) -> None:
        chunk_bytes = min(CHUNK_BYTES, memory.size // CHUNKS_MIN)
        self.chunk_bytes = max(PAGE_BYTES, chunk_bytes - chunk_bytes % PAGE_BYTES)
        self.chunk_count = memory.size // self.chunk_bytes
        self._memory = memory
        self._free = list(range(self.chunk_count))
        self._references = [0] * self.chunk_count
        self._current: int | None = None
        self._fill_bytes = 0

    @property
    def capacity_bytes(self) -> int:
        return self.chunk_count * self.chunk_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that ``allocate`` can hand out now."""
        tail = self.chunk_bytes - self._fill_bytes if self._current is not None else 0
        return len(self._free) * self.chunk_bytes + tail

    def allocate(self, size_bytes: int) -> Allocation | None:
        """Page-aligned memory for a block, or ``None`` when the free chunks do not hold it."""
        wanted = round_up_pages(size_bytes)
        if wanted > self.free_bytes:
            return None
        pieces: list[tuple[int, int]] = []
        chunks: list[int] = []
        while wanted:
            if self._current is None or self._fill_bytes == self.chunk_bytes:
                self._current, self._fill_bytes = heapq.heappop(self._free), 0
            start = self._current * self.chunk_bytes + self._fill_bytes
            length = min(wanted, self.chunk_bytes - self._fill_bytes)
            if pieces and pieces[-1][1] == start:
                pieces[-1] = (pieces[-1][0], start + length)
            else:
                pieces.append((start, start + length))
            self._references[self._current] += 1
            chunks.append(self._current)
            self._fill_bytes += length
            wanted -= length
        return Allocation(tuple(chunks), tuple(self._memory[start:stop] for start, stop in pieces))

    def release(self, allocation: Allocation) -> None:
        """Give a block's memory back; a chunk is free again when its last block is gone."""
        for chunk in allocation.chunks:
            self._references[chunk] -= 1
            if self._references[chunk]:
                continue
            if chunk == self._current:
                self._fill_bytes = 0
            else:
                heapq.heappush(self._free, chunk)


def one_span(spans: list[Bytes]) -> Bytes:
    """``spans`` as one array: itself when there is one, else a copy."""
    return spans[0] if len(spans) == 1 else np.concatenate(spans)
