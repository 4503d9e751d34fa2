"""Structures as text: hex dumps with zeros left out, and the fields of a structure with their bytes and values.

Made from the byte tables, so that SPEC.md, ``kvlode inspect`` and the code cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .bytetable import ByteTable

_LINE_BYTES = 16
_SHOWN_BYTES = 16


@dataclass(frozen=True, slots=True)
class FieldValue:
    """One field of a structure in its place."""

    offset: int
    name: str
    data: bytes
    value: int | bytes
    """An integer for number fields, else the bytes."""
    meaning: str
    reserved: bool

    def __str__(self) -> str:
        shown = self.data[:_SHOWN_BYTES].hex(" ") + (" .." if len(self.data) > _SHOWN_BYTES else "")
        value = f" = {self.value}" if isinstance(self.value, int) else ""
        return f"{self.offset:08x}  {shown:<50}  {self.name}{value}"


def fields_of(table: ByteTable, data: bytes, *, base: int = 0) -> Iterator[FieldValue]:
    """Every field of the structure at the start of ``data``, damaged or not; ``base`` is added to the offsets.

    ``data`` may be shorter than the structure: the fields that are missing or cut are left out.
    """
    for field in table:
        part = bytes(data[field.offset : field.offset + field.size_bytes])
        if len(part) < field.size_bytes:
            return
        value = part if field.code[-1] == "s" else int.from_bytes(part, "little")
        yield FieldValue(base + field.offset, field.name, part, value, field.meaning, field.reserved)


def annotated(table: ByteTable, data: bytes, *, base: int = 0) -> Iterator[str]:
    """One line a field: offset, bytes (the first 16), name and value. Fields that are all zero are left out."""
    for field in fields_of(table, data, base=base):
        if any(field.data):
            yield str(field)


def hexdump(data: bytes, *, base: int = 0) -> Iterator[str]:
    """Lines of offset, 16 bytes and their ASCII; a run of zero lines is one ``*``."""
    in_zeros = False
    for start in range(0, len(data), _LINE_BYTES):
        line = bytes(data[start : start + _LINE_BYTES])
        if not any(line):
            if not in_zeros:
                yield "*"
            in_zeros = True
            continue
        in_zeros = False
        text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in line)
        yield f"{base + start:08x}  {line.hex(' '):<47}  |{text}|"
