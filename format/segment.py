"""The header page of a segment file."""

from __future__ import annotations

from dataclasses import dataclass

from .bytetable import Field, PageTable, magic
from .checksum import Buffer
from .errors import CorruptRecord
from .layout import EPOCH_MAX, PAGE_BYTES, SEGMENT_BYTES_MAX, round_up_pages

SEGMENT_TABLE = PageTable(
    title="segment header",
    size_bytes=PAGE_BYTES,
    magic=magic("G"),
    fields=(
        Field(0, "u8[8]", "magic", "`89 4B 56 47 0D 0A 1A 0A`", "fixed"),
        Field(8, "u16", "version", "format version of this structure", "1"),
        Field(10, "u16", "header_bytes", "length of this structure; the first record follows", "4096"),
        Field(12, "u16", "flags", "none is defined", "0"),
        Field(14, "zero[2]", "reserved_0", "reserved", "0"),
        Field(16, "u8[16]", "store_uuid", "the store this segment belongs to", "as in the superblock"),
        Field(32, "u64", "segment_id", "the id in the file's name", "as in the name"),
        Field(40, "u64", "epoch", "epoch of the writer that made the segment", "1 to 2^24 - 1"),
        Field(48, "u64", "segment_bytes", "preallocated size of the file while it is open", "multiple of 4096, 12288 to 2^40"),
        Field(56, "u64", "first_live_segment", "smallest segment id that was live when this one was made", "<= segment_id"),
        Field(64, "u64", "created_at_ns", "UTC, nanoseconds since 1970", "any"),
        Field(72, "zero[4016]", "reserved_1", "reserved", "0"),
        Field(4088, "u64", "checksum", "XXH3-64 over bytes 0 to 4087", "any"),
    ),
)

SEGMENT_BYTES_MIN = 3 * PAGE_BYTES
"""A header page and the smallest seal of an empty segment need more; this only bounds the field."""


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """First page of a segment. Segments with an id below ``first_live_segment`` are leftovers of an undone unlink."""

    store_uuid: bytes
    segment_id: int
    epoch: int
    segment_bytes: int
    first_live_segment: int
    created_at_ns: int

    def pack(self) -> bytes:
        """The page."""
        page = bytearray(PAGE_BYTES)
        SEGMENT_TABLE.pack_page(page, {name: getattr(self, name) for name in self.__slots__} | {"flags": 0})
        return bytes(page)

    @classmethod
    def parse(cls, page: Buffer, *, where: object = None) -> SegmentHeader:
        """Raises ``CorruptRecord`` for damage, ``UnsupportedFormat`` for a newer version."""
        row = SEGMENT_TABLE.unpack_page(page, where=where)
        if row.flags:
            raise CorruptRecord("reserved", where=where, expected="no flags", actual=row.flags)
        size = row.segment_bytes
        if size % PAGE_BYTES or not SEGMENT_BYTES_MIN <= size <= SEGMENT_BYTES_MAX:
            raise CorruptRecord("segment-bytes", where=where, expected="a multiple of 4096, 12288 to 2^40", actual=size)
        if not 1 <= row.epoch <= EPOCH_MAX:
            raise CorruptRecord("epoch", where=where, expected=f"1 to {EPOCH_MAX}", actual=row.epoch)
        if row.first_live_segment > row.segment_id:
            raise CorruptRecord("first-live-segment", where=where, expected=f"at most {row.segment_id}", actual=row.first_live_segment)
        return cls(**{name: getattr(row, name) for name in cls.__slots__})

    @classmethod
    def derived(cls, *, store_uuid: bytes, segment_id: int, epoch: int, size_bytes: int, created_at_ns: int) -> SegmentHeader:
        """A header for a segment that has lost its own: of its first record's epoch and time, and the size of the file.

        Which segments were freed before is not guessed: with 0 none is taken for a leftover.
        """
        segment_bytes = min(max(round_up_pages(size_bytes), SEGMENT_BYTES_MIN), SEGMENT_BYTES_MAX)
        return cls(store_uuid, segment_id, epoch, segment_bytes, first_live_segment=0, created_at_ns=created_at_ns)

    def check_place(self, store_uuid: bytes, segment_id: int, *, where: object = None) -> None:
        """Raise ``CorruptRecord`` unless this header belongs to the store and file it was read from."""
        if self.store_uuid != store_uuid:
            raise CorruptRecord("store-uuid", where=where, expected=store_uuid.hex(), actual=self.store_uuid.hex())
        if self.segment_id != segment_id:
            raise CorruptRecord("segment-id", where=where, expected=segment_id, actual=self.segment_id)
