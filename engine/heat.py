"""Which blocks are used: hit counters that decide what reclaim copies forward.

The writer and its followers share one file, ``heat``, mapped into each process. It is derived data: it may be deleted
at any time, which forgets the hits. Nothing orders the writes of different threads and processes; a lost or doubled
hit, or two blocks that are taken for one, make reclaim keep a block too many or too few, never a wrong byte. So there
are no locks here, and every value read from the file is bounded before it is used.

A block may lie in two buckets of eight slots, given by some bits of its digests, and is recognised there by a 31-bit
tag. With one fixed slot a digest, or one bucket, some slots are wanted twice in a table that is half full, and a chain
of thousands of blocks loses its way to the head there.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ..format.layout import PAGE_BYTES

HEAT_MAGIC = b"\x89KVH\r\n\x1a\n"
HEAT_VERSION = 1
SLOTS_MIN, SLOTS_MAX = 1 << 16, 1 << 22
BUCKET_SLOTS = 8
SLOT_BYTES = 9
COUNT_MAX = 255
ANCESTORS_MAX = 4096
"""Ancestors credited above one block; a chain is seldom longer, and a damaged one must not be walked for ever."""

_TAG_SHIFT = 32
_HEADER = struct.Struct("<8sHHI16s")
_CHECKSUM = struct.Struct("<Q")
_NO_FILE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EFBIG)


def slots_for_capacity(capacity_bytes: int) -> int:
    """Slots for a store: a power of two, about one for each MiB of capacity."""
    wanted = max(1, capacity_bytes >> 20)
    return min(max(1 << (wanted - 1).bit_length(), SLOTS_MIN), SLOTS_MAX)


def heat_bytes(slot_count: int) -> int:
    """Size of the file."""
    return PAGE_BYTES + SLOT_BYTES * slot_count


class HeatTable:
    """Hits by block, and for each block the place of its parent. Any thread of any process may use it.

    A block is named by its ``slot`` value, which follows from its digests alone; 0 stands for "no block". Blocks that
    were never linked or credited, or that had to make room for others, have no hits. ``shared`` says whether hits
    reach other processes.
    """

    def __init__(self, slot_count: int, memory: mmap.mmap | None = None) -> None:
        if not _usable_count(slot_count):
            raise ValueError(f"{slot_count} slots; a power of two from {BUCKET_SLOTS} to {SLOTS_MAX} is needed")
        self.slot_count = slot_count
        self.shared = memory is not None
        self._bucket_mask = slot_count // BUCKET_SLOTS - 1
        self._attach(memory)

    def _attach(self, memory: mmap.mmap | None) -> None:
        """Arrays over the mapping; it is unmapped when the last of them is gone, so that a running ``credit`` is safe."""
        count = self.slot_count
        area: Any = np.zeros(heat_bytes(count), np.uint8) if memory is None else memory
        self._tags: npt.NDArray[np.uint32] = np.frombuffer(area, "<u4", count, PAGE_BYTES)
        self._parents: npt.NDArray[np.uint32] = np.frombuffer(area, "<u4", count, PAGE_BYTES + 4 * count)
        self._counts: npt.NDArray[np.uint8] = np.frombuffer(area, np.uint8, count, PAGE_BYTES + 8 * count)
        # single items are read several times faster through a memoryview than through an array
        self._tag_items: memoryview[int] = memoryview(self._tags.data)
        self._parent_items: memoryview[int] = memoryview(self._parents.data)

    @classmethod
    def open(cls, path: str | os.PathLike[str], store_uuid: bytes, slot_count: int, *, create: bool) -> HeatTable:
        """The table in the file ``path`` of this store.

        The writer passes ``create=True``: a file that is missing, damaged, of another store or of another size is
        replaced by an empty one. A follower takes the file as it is. Where there is no usable file and none can be
        made (no room, read-only), the table is in this process's memory alone.
        """
        file_path = os.fspath(path)
        try:
            table = cls._open_existing(file_path, store_uuid, slot_count if create else None)
            if table is None and create:
                _create(file_path, store_uuid, slot_count)
                table = cls._open_existing(file_path, store_uuid, slot_count)
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
            table = None
        return table or cls(slot_count)

    @classmethod
    def _open_existing(cls, path: str, store_uuid: bytes, slot_count: int | None) -> HeatTable | None:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            found = _slots_of_header(os.pread(descriptor, PAGE_BYTES, 0), store_uuid)
            status = os.fstat(descriptor)
            if found is None or slot_count not in (None, found) or status.st_size != heat_bytes(found):
                return None
            if status.st_blocks * 512 < status.st_size:
                return None  # a hole: storing into it could kill the process on a full drive
            return cls(found, mmap.mmap(descriptor, status.st_size))
        finally:
            os.close(descriptor)

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
            found = _slots_of_header(os.pread(descriptor, PAGE_BYTES, 0), store_uuid)
            size_bytes = os.fstat(descriptor).st_size
            if found is None or size_bytes != heat_bytes(found):
                return None
            return cls(found, mmap.mmap(descriptor, size_bytes, prot=mmap.PROT_READ))
        finally:
            os.close(descriptor)

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

    def credit(self, slots: Sequence[int] | npt.NDArray[Any]) -> None:
        """Count one hit for each of the blocks and for each of their ancestors, each once however often it is reached.

        Well below 1 us a block, ancestors included.
        """
        listed = self._find_many(np.asarray(slots, dtype=np.int64))
        seen = set(listed)
        items, count = self._parent_items, self.slot_count
        for parent in self._parents[listed].tolist() if listed else ():
            steps = 0
            while 0 < parent < count and parent not in seen and steps < ANCESTORS_MAX:
                seen.add(parent)
                parent = items[parent]
                steps += 1
        seen.discard(0)
        credited = np.fromiter(seen, dtype=np.int64, count=len(seen))
        counts = self._counts[credited]
        self._counts[credited] = counts + (counts < COUNT_MAX)

    def count(self, slot: int) -> int:
        """Hits since the block was linked, halved as often as it was; 255 stands for that many or more."""
        index = self._find(slot)
        return int(self._counts[index]) if index else 0

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

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return heat_bytes(self.slot_count) if self.shared else 0

    def close(self) -> None:
        """Let the file go; hits counted afterwards go nowhere. Closing twice is allowed."""
        self.shared = False
        self._attach(None)


def _usable_count(slot_count: int) -> bool:
    return BUCKET_SLOTS <= slot_count <= SLOTS_MAX and slot_count & (slot_count - 1) == 0


def _header(store_uuid: bytes, slot_count: int) -> bytes:
    fields = _HEADER.pack(HEAT_MAGIC, HEAT_VERSION, PAGE_BYTES, slot_count, store_uuid)
    return (fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))).ljust(PAGE_BYTES, b"\0")


def _slots_of_header(page: bytes, store_uuid: bytes) -> int | None:
    """The slot count of a valid header page of this store."""
    if len(page) != PAGE_BYTES:
        return None
    slot_count: int = _HEADER.unpack_from(page)[3]
    return slot_count if _usable_count(slot_count) and page == _header(store_uuid, slot_count) else None


def _create(path: str, store_uuid: bytes, slot_count: int) -> None:
    """Put an empty table in place of the file; processes that have the old one mapped keep it, unlinked.

    All of it is allocated: storing into a hole of a mapped file on a full drive would kill the process.
    """
    temporary = f"{path}.new"
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, heat_bytes(slot_count))
        os.pwrite(descriptor, _header(store_uuid, slot_count), 0)
        os.rename(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
    finally:
        os.close(descriptor)
