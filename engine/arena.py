"""The buffer's memory: one slab cut into chunks that blocks of any size share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..format.layout import PAGE_BYTES, round_up_pages

Bytes = npt.NDArray[np.uint8]

CHUNK_BYTES = 2 << 20
CHUNKS_MIN = 8


@dataclass(slots=True)
class Allocation:
    """Memory of one block: ``spans`` in order, the last one longer than needed by less than a page."""

    chunks: npt.NDArray[np.intp] | int
    """The one that it lies in, or several; empty once it was released."""
    spans: tuple[Bytes, ...]


_NO_CHUNKS = np.empty(0, dtype=np.intp)


class ChunkArena:
    """Bump allocation over chunks with reference counts. Not thread-safe: the buffer calls it under its lock.

    Blocks fill a chunk one after the other, so small blocks waste no chunk and large ones take whole chunks. Every
    block starts on a page and its last page is its own: the writer hands the very same memory to O_DIRECT.

    The counts alone say what is free, and change in single steps: an interrupt at any moment loses no memory.
    """

    def __init__(self, memory: Bytes) -> None:
        chunk_bytes = min(CHUNK_BYTES, memory.size // CHUNKS_MIN)
        self.chunk_bytes = max(PAGE_BYTES, chunk_bytes - chunk_bytes % PAGE_BYTES)
        self.chunk_count = memory.size // self.chunk_bytes
        self._memory = memory
        self._references = np.zeros(self.chunk_count, dtype=np.int64)
        self._current = 0
        self._fill_bytes = 0

    @property
    def capacity_bytes(self) -> int:
        return self.chunk_count * self.chunk_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that ``allocate`` can hand out now."""
        free = self.chunk_count - int(np.count_nonzero(self._references))
        return free * self.chunk_bytes + self._tail_bytes

    @property
    def _tail_bytes(self) -> int:
        """What is left of the chunk that was begun."""
        return self.chunk_bytes - self._fill_bytes if self._references[self._current] else 0

    def fits(self, size_bytes: int) -> bool:
        """Whether ``allocate`` would hand out so much now. Small blocks nearly always fit into the chunk that was begun."""
        wanted = round_up_pages(size_bytes)
        return wanted <= self._tail_bytes or wanted <= self.free_bytes

    def allocate(self, size_bytes: int) -> Allocation | None:
        """Page-aligned memory for a block, or ``None`` when the free chunks do not hold it."""
        wanted = round_up_pages(size_bytes)
        fill = self.chunk_bytes - self._tail_bytes
        if 0 < wanted <= self.chunk_bytes - fill:
            return self._allocate_in_current(fill, wanted)
        fresh = -(-max(0, wanted - (self.chunk_bytes - fill)) // self.chunk_bytes)
        free = np.flatnonzero(self._references == 0)[:fresh] if fresh else _NO_CHUNKS
        if free.size < fresh:
            return None
        starts = [chunk * self.chunk_bytes for chunk in free.tolist()]
        chunks = free
        if fill < self.chunk_bytes and wanted:
            starts.insert(0, self._current * self.chunk_bytes + fill)
            chunks = np.concatenate(([self._current], free))
        pieces: list[tuple[int, int]] = []
        for start in starts:
            stop = start + min(wanted, self.chunk_bytes - start % self.chunk_bytes)
            wanted -= stop - start
            if pieces and pieces[-1][1] == start:
                start = pieces.pop()[0]
            pieces.append((start, stop))
        allocation = Allocation(chunks, tuple(self._memory[start:stop] for start, stop in pieces))
        if pieces:
            last = int(chunks[-1])
            fill = pieces[-1][1] - last * self.chunk_bytes
            self._current, self._fill_bytes = last, fill  # no call from here to the end
        self._references[chunks] += 1
        return allocation

    def _allocate_in_current(self, fill: int, wanted: int) -> Allocation:
        start = self._current * self.chunk_bytes + fill
        allocation = Allocation(self._current, (self._memory[start : start + wanted],))
        self._fill_bytes = fill + wanted  # no call from here to the end
        self._references[self._current] += 1
        return allocation

    def release(self, allocation: Allocation, *, wipe: bool = False) -> None:
        """Give a block's memory back; a chunk is free again when its last block is gone. Doing it twice is harmless.

        ``wipe`` overwrites it first, so that nothing of a block that may have to be purged stays behind where nobody knows of it.
        """
        if wipe and allocation.chunks is not _NO_CHUNKS:
            for span in allocation.spans:
                span[:] = 0
        chunks, allocation.chunks = allocation.chunks, _NO_CHUNKS  # no call between this and the next line
        self._references[chunks] -= 1


def one_span(spans: list[Bytes]) -> Bytes:
    """``spans`` as one array: itself when there is one, else a copy."""
    return spans[0] if len(spans) == 1 else np.concatenate(spans)
