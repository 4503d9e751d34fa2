"""Byte tables: the one definition of each structure from which packing, parsing, SPEC.md and hex dumps are made."""

from __future__ import annotations

import operator
import re
import struct
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .checksum import Buffer, xxh3_64
from .errors import CorruptRecord, UnsupportedFormat
from .layout import FORMAT_VERSION, PAGE_BYTES

_INTEGERS = {"u8": ("B", 1), "u16": ("H", 2), "u32": ("I", 4), "u64": ("Q", 8)}
_RUN = re.compile(r"(u8|zero)\[(\d+)\]")
_CHECKSUM = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Field:
    """One row of a byte table. ``kind``: ``u8`` to ``u64``, ``u8[n]`` (bytes), ``zero[n]`` (reserved, must be zero)."""

    offset: int
    kind: str
    name: str
    meaning: str
    valid: str = "any"

    @property
    def size_bytes(self) -> int:
        run = _RUN.fullmatch(self.kind)
        return int(run.group(2)) if run else _INTEGERS[self.kind][1]

    @property
    def code(self) -> str:
        """Format character of ``struct``."""
        return f"{self.size_bytes}s" if _RUN.fullmatch(self.kind) else _INTEGERS[self.kind][0]

    @property
    def reserved(self) -> bool:
        return self.kind.startswith("zero")


@dataclass(frozen=True)
class ByteTable:
    """Fields that cover ``size_bytes`` without gap or overlap (checked when the table is made)."""

    title: str
    size_bytes: int
    fields: tuple[Field, ...]

    def __post_init__(self) -> None:
        position = 0
        for field in self.fields:
            if field.offset != position:
                raise ValueError(f"{self.title}: {field.name} stands at {field.offset}, expected {position}")
            position += field.size_bytes
        if position != self.size_bytes:
            raise ValueError(f"{self.title}: fields end at {position}, expected {self.size_bytes}")

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(field.name for field in self.fields)

    @cached_property
    def struct(self) -> struct.Struct:
        return struct.Struct("<" + "".join(field.code for field in self.fields))

    @cached_property
    def _row(self) -> Any:
        return namedtuple("Row", self.names)

    @cached_property
    def offsets(self) -> dict[str, int]:
        return {field.name: field.offset for field in self.fields}

    @cached_property
    def _zeros(self) -> tuple[tuple[int, bytes], ...]:
        return tuple((number, bytes(field.size_bytes)) for number, field in enumerate(self.fields) if field.reserved)

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        return {field.name: b"" for field in self.fields if field.code[-1] == "s"}

    @cached_property
    def _in_order(self) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
        return operator.itemgetter(*self.names)

    def __iter__(self) -> Iterator[Field]:
        return iter(self.fields)

    def pack_into(self, buffer: Buffer, values: Mapping[str, Any]) -> None:
        """Lay the fields at the start of a writable buffer; byte fields that are not given are zero."""
        self.struct.pack_into(buffer, 0, *self._in_order({**self._defaults, **values}))

    def unpack(self, data: bytes, *, where: object = None) -> Any:
        """A named tuple of the fields' values. Raises ``CorruptRecord`` for the wrong length or reserved bytes that are not zero."""
        if len(data) != self.size_bytes:
            raise CorruptRecord("length", where=where, expected=f"{self.size_bytes} bytes of {self.title}", actual=len(data))
        row = self._row._make(self.struct.unpack(data))
        for number, zeros in self._zeros:
            if row[number] != zeros:
                expected = f"zeros in {self.names[number]} of {self.title}"
                raise CorruptRecord("reserved", where=where, expected=expected, actual=row[number].hex())
        return row


@dataclass(frozen=True)
class PageTable(ByteTable):
    """A page that starts with a magic and carries a checksum over all its other bytes.

    Every version of a structure keeps magic, ``version`` and ``checksum`` where they are, so that a reader of
    any version can tell a newer page from a damaged one.
    """

    magic: bytes = b""
    version_name: str = "version"
    checksum_name: str = "checksum"

    @cached_property
    def _common(self) -> dict[str, Any]:
        return {"magic": self.magic, self.version_name: FORMAT_VERSION, "header_bytes": PAGE_BYTES, self.checksum_name: 0}

    def seal(self, page: Buffer) -> None:
        """Compute the checksum of a filled page and store it."""
        _CHECKSUM.pack_into(page, self.offsets[self.checksum_name], self.checksum(page))

    def checksum(self, page: Buffer) -> int:
        """XXH3-64 over the page without the checksum field itself."""
        data, offset = bytes(page), self.offsets[self.checksum_name]
        return xxh3_64(data[:offset] + data[offset + 8 :])  # a copy of a page takes less time than a second call

    def pack_page(self, page: Buffer, values: Mapping[str, Any]) -> None:
        """Fill a writable buffer of one page: fields, magic, version, header length, checksum."""
        self.pack_into(page, {**self._common, **values})
        self.seal(page)

    def unpack_page(self, page: Buffer, *, where: object = None) -> Any:
        """A named tuple of the fields' values, of a page whose magic, checksum, version, length and reserved bytes are as they should be.

        Raises ``CorruptRecord`` for damage and ``UnsupportedFormat`` for an intact page of a newer version.
        """
        data = bytes(page)
        if len(data) != self.size_bytes:
            raise CorruptRecord("length", where=where, expected=f"a page of {self.size_bytes} bytes", actual=len(data))
        if data[:8] != self.magic:
            raise CorruptRecord("magic", where=where, expected=f"{self.title} {self.magic.hex()}", actual=data[:8].hex())
        stored, actual = _CHECKSUM.unpack_from(data, self.offsets[self.checksum_name])[0], self.checksum(data)
        if stored != actual:
            raise CorruptRecord("header-checksum", where=where, expected=f"{stored:016x}", actual=f"{actual:016x}")
        offset = self.offsets[self.version_name]
        version = int.from_bytes(data[offset : offset + 2], "little")
        if version > FORMAT_VERSION:
            raise UnsupportedFormat(
                f"{self.title} of a newer format",
                where=where,
                expected=f"version <= {FORMAT_VERSION}",
                actual=version,
                action="Use a newer kvlode.",
            )
        row = self.unpack(data, where=where)
        if version == 0 or row.header_bytes != PAGE_BYTES:
            raise CorruptRecord(
                "header-length", where=where, expected=f"version >= 1, {PAGE_BYTES} bytes", actual=(version, row.header_bytes)
            )
        return row


def magic(letter: str) -> bytes:
    """Eight bytes that text-mode, 7-bit and line-end conversions damage visibly, as PNG's do."""
    return b"\x89KV" + letter.encode() + b"\r\n\x1a\n"
