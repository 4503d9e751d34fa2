"""The value of an index entry: where a record lies and what is known of it without reading it.

A packed entry has one fixed size. Its first byte is the version of this layout; an entry of another version makes the
whole index unusable, which costs a rebuild and nothing else. ``version_seq`` and ``expires_at_ns`` keep their place in
every version, so that ``expires_and_version`` need not look at it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..format.layout import PAGE_BYTES
from .index import IndexDamaged

ENTRY_VERSION = 1

_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("version_seq", "Q", "<u8"),
    ("expires_at_ns", "Q", "<u8"),
    ("segment_id", "Q", "<u8"),
    ("offset", "Q", "<u8"),
    ("raw_length", "Q", "<u8"),
    ("stored_length", "Q", "<u8"),
    ("record_seq", "Q", "<u8"),
    ("written_at_ns", "Q", "<u8"),
    ("payload_checksum", "Q", "<u8"),
    ("record_pages", "I", "<u4"),
    ("depth", "I", "<u4"),
    ("parent", "16s", "V16"),
    ("codec", "B", "u1"),
)
"""Name, struct code and NumPy type of every field after the version byte; ``IndexEntry`` has the same order."""

_ENTRY = struct.Struct("<B" + "".join(code for _, code, _ in _COLUMNS))
_SEQUENCE_AND_EXPIRY = struct.Struct("<QQ")
_SEQUENCE_OFFSET = 1
_SHORTEST_BYTES = _SEQUENCE_OFFSET + _SEQUENCE_AND_EXPIRY.size

ENTRY_DTYPE = np.dtype([("version", "u1"), *((name, kind) for name, _, kind in _COLUMNS)])
ENTRY_BYTES = _ENTRY.size


class IndexEntry(NamedTuple):
    """One block as the index knows it. Lengths in bytes, times in UTC nanoseconds; the fields are those of the record's header."""

    version_seq: int
    expires_at_ns: int
    """0 = never."""
    segment_id: int
    offset: int
    """Of the record's header page in its segment."""
    raw_length: int
    stored_length: int
    record_seq: int
    written_at_ns: int
    payload_checksum: int
    record_pages: int
    depth: int = 0
    parent: bytes = bytes(16)
    codec: int = 0

    def pack(self) -> bytes:
        """``ENTRY_BYTES`` bytes."""
        return _ENTRY.pack(ENTRY_VERSION, *self)

    @classmethod
    def unpack(cls, value: bytes) -> IndexEntry:
        """The entry of a packed value. Raises ``IndexDamaged`` for a value of another size or version."""
        if len(value) != ENTRY_BYTES or value[0] != ENTRY_VERSION:
            raise IndexDamaged(
                "index entry of an unknown layout",
                expected=f"{ENTRY_BYTES} bytes of version {ENTRY_VERSION}",
                actual=f"{len(value)} bytes, first byte {value[:1].hex() or 'missing'}",
                action="Rebuild the index from the segments.",
            )
        return cls._make(_ENTRY.unpack(value)[1:])


def expires_and_version(value: bytes) -> tuple[int, int]:
    """``(expires_at_ns, version_seq)`` of a packed entry: the two fields that decide whether a key is present.

    A value that is too short for them counts as long expired: its key is absent.
    """
    if len(value) < _SHORTEST_BYTES:
        return 1, 0
    version_seq, expires_at_ns = _SEQUENCE_AND_EXPIRY.unpack_from(value, _SEQUENCE_OFFSET)
    return expires_at_ns, version_seq


def unexpired(values: Sequence[bytes | None], now_ns: int) -> list[bool]:
    """Whether each value is there and not expired; in one step for all of them where their sizes are those of this layout."""
    found = values if None not in values else [value for value in values if value is not None]
    joined = b"".join(found)  # type: ignore[arg-type]  # None is not in it
    if len(joined) != len(found) * ENTRY_BYTES:
        return [value is not None and not 0 < expires_and_version(value)[0] <= now_ns for value in values]
    expires_at_ns = np.frombuffer(joined, ENTRY_DTYPE)["expires_at_ns"]
    if not expires_at_ns.any():
        return [True] * len(values) if found is values else [value is not None for value in values]
    live = iter((~((expires_at_ns > 0) & (expires_at_ns <= now_ns))).tolist())
    return [value is not None and next(live) for value in values]


class SealColumns(Protocol):
    """What ``pack_table`` reads of ``format.seal.SealTable``: one array a column, a row a record.

    ``parent`` has 16 bytes a row, of any dtype; the others are integers. ``page`` is the record's offset in pages.
    """

    page: Any
    record_pages: Any
    depth: Any
    raw_length: Any
    stored_length: Any
    version_seq: Any
    record_seq: Any
    written_at_ns: Any
    expires_at_ns: Any
    payload_checksum: Any
    parent: Any
    codec: Any


_SAME_NAME = tuple(name for name, _, _ in _COLUMNS if name not in ("segment_id", "offset", "parent"))


def pack_table(table: SealColumns, segment_id: int, rows: Sequence[int] | npt.NDArray[Any] | None = None) -> list[bytes]:
    """Packed entries of a seal's records at once, in the order of ``rows`` (indices or a mask; all of them by default)."""
    pick: Any = slice(None) if rows is None else np.asarray(rows, dtype=None if len(rows) else np.intp)
    page = np.asarray(table.page)[pick]
    packed = np.zeros(len(page), ENTRY_DTYPE)
    packed["version"] = ENTRY_VERSION
    packed["segment_id"] = segment_id
    packed["offset"] = page.astype(np.uint64) * np.uint64(PAGE_BYTES)
    for name in _SAME_NAME:
        packed[name] = np.asarray(getattr(table, name))[pick]
    parent = np.ascontiguousarray(table.parent).view("V16").reshape(-1)
    packed["parent"] = parent[pick]
    data = packed.tobytes()
    return [data[start : start + ENTRY_BYTES] for start in range(0, len(data), ENTRY_BYTES)]
