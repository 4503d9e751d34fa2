"""Which blocks are used: hit counters that decide what reclaim copies forward.

The table is ordinary memory of one process; ``heat_file`` brings it together with a file. Nothing orders what different
threads and processes do; a lost or doubled hit, or two blocks that are taken for one, make reclaim keep a block too many
or too few, never a wrong byte. So there are no locks here, and every value is bounded before it is used.

A block may lie in two buckets of eight slots, given by some bits of its digests, and is recognised there by a 31-bit
tag. With one fixed slot a digest, or one bucket, some slots are wanted twice in a table that is half full, and a chain
of thousands of blocks loses its way to the head there.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from ..format.layout import PAGE_BYTES

HEAT_MAGIC = b"\x89KVH\r\n\x1a\n"
HEAT_VERSION = 2
SLOTS_MIN, SLOTS_MAX = 1 << 15, 1 << 22
BUCKET_SLOTS = 8
SLOT_BYTES = 13
COUNT_MAX = 255
ANCESTORS_MAX = 4096
"""Ancestors credited above one block; a chain is seldom longer, and a damaged one must not be walked for ever."""

ONE_BY_ONE_MAX = 16
"""NumPy takes about 100 us for one block and for a hundred; so many take less one by one."""

Area: TypeAlias = npt.NDArray[np.uint8]

_TAG_SHIFT = 32
_HEADER = struct.Struct("<8sHHI16s")
_CHECKSUM = struct.Struct("<Q")


def slots_for_capacity(capacity_bytes: int) -> int:
    """Slots for a store: a power of two, about one for each MiB of capacity."""
    wanted = max(1, capacity_bytes >> 20)
    return min(max(1 << (wanted - 1).bit_length(), SLOTS_MIN), SLOTS_MAX)


def heat_bytes(slot_count: int) -> int:
    """Size of the file: a page that says what it is, and the table's memory."""
    return PAGE_BYTES + SLOT_BYTES * slot_count


def _usable_count(slot_count: int) -> bool:
    """Whether a table can have so many slots."""
    return BUCKET_SLOTS <= slot_count <= SLOTS_MAX and slot_count & (slot_count - 1) == 0


class HeatTable:
    """Hits by block, and for each block the place of its parent. Any thread may use it.

    A block is named by its ``slot`` value, which follows from its digests alone; 0 stands for "no block". Blocks that
    were never linked or credited, or that had to make room for others, have no hits. ``area`` is the table's memory: tags,
    parents, counts, seconds of the last use. One that cannot be written makes a table to look at.
    """

    def __init__(self, slot_count: int, area: Area | None = None) -> None:
        if not _usable_count(slot_count):
            raise ValueError(f"{slot_count} slots; a power of two from {BUCKET_SLOTS} to {SLOTS_MAX} is needed")
        self.slot_count = slot_count
        self._bucket_mask = slot_count // BUCKET_SLOTS - 1
        self._attach(np.zeros(SLOT_BYTES * slot_count, np.uint8) if area is None else area)

    def _attach(self, area: Area) -> None:
        """Arrays over the memory. A ``credit`` that is running goes on in the old ones, or in some of both: as large, and as good."""
        count = self.slot_count
        self.area = area
        self._tags: npt.NDArray[np.uint32] = np.frombuffer(area, "<u4", count)
        self._parents: npt.NDArray[np.uint32] = np.frombuffer(area, "<u4", count, 4 * count)
        self._counts: npt.NDArray[np.uint8] = np.frombuffer(area, np.uint8, count, 8 * count)
        self._used_at: npt.NDArray[np.uint32] = np.frombuffer(area, "<u4", count, 9 * count)
        # single items are read several times faster through a memoryview than through an array
        self._tag_items: memoryview[int] = memoryview(self._tags.data)
        self._parent_items: memoryview[int] = memoryview(self._parents.data)
        self._count_items: memoryview[int] = memoryview(self._counts.data)
        self._used_items: memoryview[int] = memoryview(self._used_at.data)

    @classmethod
    def view(cls, path: str | os.PathLike[str], store_uuid: bytes) -> HeatTable | None:
        """The table in a file, to look at alone: nothing is made or changed, and methods that count raise an error.

        ``None`` when there is no usable file. Raises ``OSError`` when it may not be read.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            found = slots_of_file(descriptor, store_uuid)
            if found is None:
                return None
            area = read_area(descriptor, found)
            area.setflags(write=False)
            return cls(found, area)
        finally:
            os.close(descriptor)

    # --- as a whole -------------------------------------------------------------------------------------------------

    def replace(self, other: HeatTable) -> None:
        """Become the other table, which must be of the same size and is not used by others any more."""
        self._attach(other.area)

    def counts(self) -> npt.NDArray[np.uint8]:
        """A copy of the counts, by place."""
        return self._counts.copy()

    def take_hits(self, other: HeatTable, known: npt.NDArray[np.uint8]) -> None:
        """Add the hits that the other table has counted beyond ``known``, of blocks that both have at the same place."""
        counted = other.counts()
        rows = np.flatnonzero((counted > known) & (other._tags == self._tags))
        sums = self._counts[rows].astype(np.uint16) + counted[rows] - known[rows]
        self._counts[rows] = np.minimum(sums, COUNT_MAX)
        self._used_at[rows] = np.maximum(self._used_at[rows], other._used_at[rows])

    # --- places -----------------------------------------------------------------------------------------------------

    def slot(self, namespace_digest: bytes, key_digest: bytes) -> int:
        """The value that names a block here, from its two 16-byte digests: above 0, below 2**63, valid for any table."""
        mixed = int.from_bytes(namespace_digest[:8], "little") ^ int.from_bytes(key_digest[:8], "little")
        return ((mixed >> 33) or 1) << _TAG_SHIFT | mixed & 0xFFFFFFFF

    def _buckets(self, slot: int) -> tuple[int, int]:
        """First index of each of the two buckets that a block may be in; index 0 belongs to nobody."""
        mask = self._bucket_mask
        return (slot & mask) * BUCKET_SLOTS or 1, ((slot ^ slot >> _TAG_SHIFT) & mask) * BUCKET_SLOTS or 1

    def _find(self, slot: int) -> int:
        """Index of a block in the arrays, 0 when it is not in the table."""
        if not slot:
            return 0
        tag = slot >> _TAG_SHIFT
        items = self._tag_items
        for first in self._buckets(slot):
            for index in range(first, (first | BUCKET_SLOTS - 1) + 1):
                if items[index] == tag:
                    return index
        return 0

    def _find_or_claim(self, slot: int) -> int:
        """Index of a block that is put in when it is missing."""
        index = self._find(slot)
        if not index and slot:
            index = self._free_index(slot)
            self._tag_items[index] = slot >> _TAG_SHIFT
            self._parent_items[index] = 0
            self._counts[index] = 0
            self._used_at[index] = 0
        return index

    def _free_index(self, slot: int) -> int:
        """A free place in the emptier bucket, else that of the coldest block, which ages the others."""
        buckets = [slice(first, (first | BUCKET_SLOTS - 1) + 1) for first in self._buckets(slot)]
        tags = [self._tag_items[bucket].tolist() for bucket in buckets]  # lists: NumPy takes ten times as long for eight numbers
        emptiest = 0 if tags[0].count(0) >= tags[1].count(0) else 1
        if 0 in tags[emptiest]:
            return buckets[emptiest].start + tags[emptiest].index(0)
        coldest = min(buckets, key=lambda bucket: int(self._counts[bucket].min()))
        counts = self._counts[coldest]
        index = coldest.start + int(np.argmin(counts))
        counts >>= 1
        return index

    def _find_many(self, slots: npt.NDArray[np.int64]) -> list[int]:
        """``_find_or_claim`` for many blocks; names that are 0 are left out."""
        slots = slots[slots > 0]
        tags = slots >> _TAG_SHIFT
        table = self._tags.reshape(-1, BUCKET_SLOTS)
        found = np.zeros(len(slots), np.int64)
        for buckets in (slots & self._bucket_mask, (slots ^ tags) & self._bucket_mask):
            equal = table[buckets] == tags[:, None].astype(np.uint32)
            found = np.where(equal.any(axis=1), buckets * BUCKET_SLOTS + equal.argmax(axis=1), found)
        indices: list[int] = found.tolist()
        for position in np.flatnonzero(found == 0).tolist():
            indices[position] = self._find_or_claim(int(slots[position]))
        return indices

    # --- use --------------------------------------------------------------------------------------------------------

    def link(self, slot: int, parent_slot: int) -> None:
        """A block was put: it starts without hits below this parent (0 for none)."""
        parent = self._find_or_claim(parent_slot)
        index = self._find_or_claim(slot)
        if index:
            self._parent_items[index] = parent
            self._counts[index] = 0
            self._used_at[index] = 0

    def credit(self, slots: Sequence[int] | npt.NDArray[Any], now_s: int = 0) -> None:
        """Count one hit for each of the blocks and for each of their ancestors, each once however often it is reached.

        ``now_s``: the store's time, UTC in seconds.

        Below 1 us a block for hundreds of them, ancestors included; 3 to 6 us for a few.
        """
        few = len(slots) <= ONE_BY_ONE_MAX
        listed = [self._find_or_claim(int(slot)) for slot in slots] if few else self._find_many(np.asarray(slots, dtype=np.int64))
        seen = set(listed)
        items, count = self._parent_items, self.slot_count
        for index in listed:
            parent, steps = items[index], 0
            while 0 < parent < count and parent not in seen and steps < ANCESTORS_MAX:
                seen.add(parent)
                parent = items[parent]
                steps += 1
        seen.discard(0)
        self._count_once(seen, now_s)

    def _count_once(self, indices: set[int], now_s: int) -> None:
        """One more for each, in the way that is quicker for so many."""
        if len(indices) <= ONE_BY_ONE_MAX:
            items = self._count_items
            for index in indices:
                items[index] = min(items[index] + 1, COUNT_MAX)
                self._used_items[index] = now_s
            return
        credited = np.fromiter(indices, dtype=np.int64, count=len(indices))
        counts = self._counts[credited]
        self._counts[credited] = counts + (counts < COUNT_MAX)
        self._used_at[credited] = now_s

    def count(self, slot: int) -> int:
        """Hits since the block was linked, halved as often as it was; 255 stands for that many or more."""
        index = self._find(slot)
        return int(self._counts[index]) if index else 0

    def used_at_s(self, slot: int) -> int:
        """When the block or one of its descendants was used last, UTC in seconds; 0 when it was not since it was linked."""
        index = self._find(slot)
        return int(self._used_at[index]) if index else 0

    def halve(self, slot: int) -> None:
        """A block was copied forward: let its hits fade."""
        index = self._find(slot)
        self._counts[index] >>= 1

    def clear(self, slot: int) -> None:
        """A block was freed: make room for others."""
        index = self._find(slot)
        if index:
            self._tag_items[index] = self._parent_items[index] = 0
            self._counts[index] = 0
            self._used_at[index] = 0


# --- the file --------------------------------------------------------------------------------------------------------------


def read_area(descriptor: int, slot_count: int) -> Area:
    """The file behind its header. Raises ``OSError``, also when it has become shorter."""
    area = np.empty(SLOT_BYTES * slot_count, np.uint8)
    count = os.preadv(descriptor, [area.data], PAGE_BYTES)
    if count != area.size:
        raise OSError(f"the heat table has {count} bytes behind its header, not {area.size}")
    return area


def header_page(store_uuid: bytes, slot_count: int) -> bytes:
    fields = _HEADER.pack(HEAT_MAGIC, HEAT_VERSION, PAGE_BYTES, slot_count, store_uuid)
    return (fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))).ljust(PAGE_BYTES, b"\0")


def slots_of_file(descriptor: int, store_uuid: bytes) -> int | None:
    """The slot count of a file with a valid header of this store, and of the size that it says."""
    page = os.pread(descriptor, PAGE_BYTES, 0)
    if len(page) != PAGE_BYTES:
        return None
    slot_count: int = _HEADER.unpack_from(page)[3]
    if not _usable_count(slot_count) or page != header_page(store_uuid, slot_count):
        return None
    return slot_count if os.fstat(descriptor).st_size == heat_bytes(slot_count) else None
