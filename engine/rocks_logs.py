"""RocksDB's log files (manifest and write-ahead log) looked at before RocksDB reads them, for one kind of damage.

Measured with rocksdict 0.3.29: a record whose type byte says "recyclable", behind a first record that does not, makes opening
loop for ever, in every mode and with the interpreter lock held. One flipped bit does that (1 becomes 5). Logs are never
recycled here, so such a type is damage in any case.
"""

from __future__ import annotations

import os
from pathlib import Path

from .index import IndexDamaged

_BLOCK_BYTES = 32 << 10
"""Records do not span blocks of this size; what is left of a block behind the last header that fits is padding."""
_HEADER_BYTES = 7
"""Checksum (4), length (2, little-endian), type (1)."""
_RECYCLABLE = frozenset((5, 6, 7, 8, 11))


def check_logs(folder: str, where: str) -> None:
    """Raise ``IndexDamaged`` when a log in ``folder`` has a record that RocksDB would never come back from.

    Files that cannot be read are left to RocksDB, whose own error says more.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    for name in names:
        if name.startswith("MANIFEST-") or name.endswith(".log"):
            try:
                offset = _recyclable_record(Path(folder, name))
            except OSError:  # removed meanwhile by a running writer, or not readable
                continue
            if offset is not None:
                raise IndexDamaged(
                    "a log of the index is damaged",
                    where=f"{where}/{name} offset {offset}",
                    expected="a record of a log that is not recycled",
                    actual="the type of a recycled one",
                    action="Set it aside and rebuild it from the segments.",
                )


def _recyclable_record(path: Path) -> int | None:
    """Offset of the first record with such a type; ``None`` when there is none up to the end or to zeros."""
    with path.open("rb", buffering=0) as file:
        start = 0
        while block := file.read(_BLOCK_BYTES):
            position = 0
            while position + _HEADER_BYTES <= len(block):
                length, kind = block[position + 4] | block[position + 5] << 8, block[position + 6]
                if kind in _RECYCLABLE:
                    return start + position
                if kind == 0 and length == 0:  # preallocated and not written yet
                    return None
                position += _HEADER_BYTES + length
            start += len(block)
    return None
