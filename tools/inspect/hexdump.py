"""``inspect hexdump``: raw pages of the superblock or a segment, and the fields of every structure that begins there."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ...format.bytetable import ByteTable
from ...format.dump import fields_of, hexdump
from ...format.errors import InvalidConfig
from ...format.layout import PAGE_BYTES, SUPERBLOCK_NAME, segment_name
from ...format.record import RECORD_TABLE
from ...format.seal import TOC_MAGIC, TOC_TABLE, TRAILER_TABLE
from ...format.segment import SEGMENT_TABLE
from ...format.superblock import SUPERBLOCK_TABLE
from ..output import bytes_text
from ..store_files import StoreFiles, check_segment

LENGTH_MAX = 16 << 20
_TABLES: dict[bytes, ByteTable] = {table.magic: table for table in (SUPERBLOCK_TABLE, SEGMENT_TABLE, RECORD_TABLE, TRAILER_TABLE)} | {
    TOC_MAGIC: TOC_TABLE
}


def hexdump_facts(files: StoreFiles, segment_id: int | None, offset: int, length: int) -> dict[str, Any]:
    """``length`` bytes from ``offset`` of a segment, or of the superblock without one; shorter at the end of the file."""
    if offset < 0 or not 1 <= length <= LENGTH_MAX:
        raise InvalidConfig("those bytes cannot be shown", expected=f"offset >= 0, length 1 to {LENGTH_MAX}", actual=f"{offset}, {length}")
    if segment_id is None:
        name = SUPERBLOCK_NAME
        with (files.path / SUPERBLOCK_NAME).open("rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(length)
    else:
        check_segment(files, segment_id)
        name = segment_name(segment_id)
        with files.reading(segment_id) as read:
            data = bytes(read(offset, length))
    if not data:
        raise InvalidConfig("the file ends before that", where=name, expected="an offset inside the file", actual=offset)
    return {"file": name, "offset": offset, "structures": _structures(data, offset), "data_hex": data}


def _structures(data: bytes, base: int) -> list[dict[str, Any]]:
    """Structures that begin on a page of ``data``, known by their magic; their fields are shown whether or not they are intact."""
    found = []
    for start in range(-base % PAGE_BYTES, len(data), PAGE_BYTES):
        table = _TABLES.get(data[start : start + 8])
        if table is None:
            continue
        fields = [
            {
                "offset": value.offset,
                "name": value.name,
                "value": value.value,
                "meaning": value.meaning.replace("`", ""),
                "line": str(value),
            }
            for value in fields_of(table, data[start:], base=base + start)
            if any(value.data)
        ]
        found.append({"title": table.title, "offset": base + start, "fields": fields})
    return found


def print_hexdump(console: Console, facts: dict[str, Any]) -> None:
    """For people: first what was recognised, then the bytes."""
    console.print(f"{facts['file']}, {bytes_text(len(facts['data_hex']))} from offset {facts['offset']}", style="bold")
    for structure in facts["structures"]:
        console.print(f"{structure['title']} at {structure['offset']}", style="bold")
        for field in structure["fields"]:
            line, meaning = field["line"], field["meaning"]
            fits = console.width >= len(line) + len(meaning) + 3
            console.print(f"{line}   {meaning}" if fits else line, soft_wrap=True)
    if not facts["structures"]:
        console.print("no structure begins here: payload, padding, or bytes that are damaged")
    console.print("bytes", style="bold")
    for line in hexdump(facts["data_hex"], base=facts["offset"]):
        console.print(line, soft_wrap=True)
