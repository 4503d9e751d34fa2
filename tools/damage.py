"""Damage to a store on purpose: for demonstrations and tests of what an engine makes of it."""

from __future__ import annotations

from pathlib import Path

from ..format.layout import PAGE_BYTES

HEADER_MAGIC = b"\x89KV"


def damage_payloads(store: Path) -> int:
    """Flip a bit in every page of every segment that is no header; how many pages."""
    count = 0
    for path in sorted((store / "segments").glob("*.seg")):
        data = bytearray(path.read_bytes())
        for offset in range(PAGE_BYTES, len(data), PAGE_BYTES):
            page = data[offset : offset + PAGE_BYTES]
            if not page.startswith(HEADER_MAGIC) and any(page):
                data[offset] ^= 0x10
                count += 1
        path.write_bytes(data)
    return count
