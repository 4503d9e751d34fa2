"""The superblock: one page in the file ``STORE`` that says which store this is and who may open it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .bytetable import Field, PageTable, magic
from .checksum import Buffer
from .errors import CorruptRecord, UnsupportedFormat
from .layout import ALIGNMENT_LOG2, BLOCK_BYTES_MAX, FORMAT_VERSION, PAGE_BYTES, STRIPE_BYTES_DEFAULT

COMPAT_KNOWN = 0
RO_COMPAT_KNOWN = 0
INCOMPAT_KNOWN = 0

SUPERBLOCK_TABLE = PageTable(
    title="superblock",
    size_bytes=PAGE_BYTES,
    magic=magic("O"),
    version_name="read_version",
    fields=(
        Field(0, "u8[8]", "magic", "`89 4B 56 4F 0D 0A 1A 0A`", "fixed"),
        Field(8, "u16", "read_version", "lowest format version a reader must know", "1; higher: refuse to open"),
        Field(10, "u16", "header_bytes", "length of this structure", "4096"),
        Field(12, "u16", "write_version", "lowest format version a writer must know", "1; higher: open read-only"),
        Field(14, "u8", "alignment_log2", "log2 of the alignment of everything", "12"),
        Field(15, "zero[1]", "reserved_0", "reserved", "0"),
        Field(16, "u64", "compat", "features that a reader and a writer may ignore", "any"),
        Field(24, "u64", "ro_compat", "features that a reader may ignore and a writer must know", "0; unknown bit: open read-only"),
        Field(32, "u64", "incompat", "features that a reader must know", "0; unknown bit: refuse to open"),
        Field(40, "u8[16]", "store_uuid", "random; repeated in every segment and record", "not all zero"),
        Field(56, "u64", "created_at_ns", "UTC, nanoseconds since 1970", "any"),
        Field(64, "u32", "stripe_bytes_default", "stripe size where a namespace asks for none", "multiple of 4096, 4096 to 2^30"),
        Field(68, "zero[4020]", "reserved_1", "reserved", "0"),
        Field(4088, "u64", "checksum", "XXH3-64 over bytes 0 to 4087", "any"),
    ),
)


@dataclass(frozen=True, slots=True)
class Superblock:
    """What the file ``STORE`` says. Feature bits follow SPEC.md part 6."""

    store_uuid: bytes
    created_at_ns: int
    stripe_bytes_default: int = STRIPE_BYTES_DEFAULT
    compat: int = 0
    ro_compat: int = 0
    incompat: int = 0
    read_version: int = FORMAT_VERSION
    write_version: int = FORMAT_VERSION

    @property
    def read_only(self) -> bool:
        """True when this code may read the store but must not write to it."""
        return bool(self.ro_compat & ~RO_COMPAT_KNOWN) or self.write_version > FORMAT_VERSION

    def pack(self) -> bytes:
        """The page."""
        page = bytearray(PAGE_BYTES)
        values = {name: getattr(self, name) for name in self.__slots__}
        SUPERBLOCK_TABLE.pack_page(page, values | {"alignment_log2": ALIGNMENT_LOG2})
        return bytes(page)

    @classmethod
    def parse(cls, page: Buffer, *, where: object = None) -> Superblock:
        """Raises ``UnsupportedFormat`` for a foreign file or a newer store, ``CorruptRecord`` for a damaged superblock."""
        data = bytes(page)
        if data[:8] != SUPERBLOCK_TABLE.magic and any(data[:PAGE_BYTES]):
            raise UnsupportedFormat(
                "this is not a kvlode store",
                where=where,
                expected=f"a file that starts with {SUPERBLOCK_TABLE.magic.hex()}",
                actual=data[:8].hex() or "an empty file",
                action="Name a new or empty folder, or the folder of a store.",
            )
        row = SUPERBLOCK_TABLE.unpack_page(data, where=where)
        if unknown := row.incompat & ~INCOMPAT_KNOWN:
            raise UnsupportedFormat(
                "the store uses features this version does not know",
                where=where,
                expected=f"incompat bits within {INCOMPAT_KNOWN:#x}",
                actual=f"{unknown:#x} besides",
                action="Use a newer kvlode.",
            )
        _check_row(row, where)
        return cls(**{name: getattr(row, name) for name in cls.__slots__})


def _check_row(row: Any, where: object) -> None:
    stripe_bytes = row.stripe_bytes_default
    if row.write_version < 1:
        raise CorruptRecord("write-version", where=where, expected="version >= 1", actual=row.write_version)
    if row.alignment_log2 != ALIGNMENT_LOG2:
        raise CorruptRecord("alignment", where=where, expected=ALIGNMENT_LOG2, actual=row.alignment_log2)
    if stripe_bytes % PAGE_BYTES or not PAGE_BYTES <= stripe_bytes <= BLOCK_BYTES_MAX:
        raise CorruptRecord("stripe-bytes", where=where, expected="a multiple of 4096, at most 2^30", actual=stripe_bytes)
    if not any(row.store_uuid):
        raise CorruptRecord("store-uuid", where=where, expected="a uuid", actual="zeros")
