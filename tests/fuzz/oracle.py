"""What a fuzzed parser is compared with: its own bytes, and the second reader that was written from SPEC.md alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import make_vectors
import spec_reader
from kvlode.format.bytetable import ByteTable
from kvlode.format.errors import FormatError

UUID, SEGMENT_ID, OFFSET = make_vectors.STORE_UUID, make_vectors.SEGMENT_ID, 8192
PLACE = {"store_uuid": UUID.hex(), "segment_id": SEGMENT_ID, "offset": OFFSET}
Fields: TypeAlias = Sequence[tuple[int, int]]
"""(offset, size in bytes) of integers in an input."""
REFUSED = "refused"


def nothing(data: bytearray) -> None:
    """Nothing to mend."""


def same(found: Any, expected: Any, what: str) -> None:
    """Raise unless both are equal: two readers, or a value and its bytes."""
    if found != expected:
        raise AssertionError(f"{what}: found {str(found)[:500]}, expected {str(expected)[:500]}")


def by_the_text(read: Callable[[], Any]) -> Any:
    """What the second reader answers: a value, or ``REFUSED``."""
    try:
        return read()
    except (spec_reader.Damaged, spec_reader.Unsupported):
        return REFUSED


def both(found: Callable[[], Any], expected: Callable[[], Any], what: str) -> Any:
    """The answer of kvlode, which must be that of the second reader. Raises what kvlode raises."""
    text = by_the_text(expected)
    try:
        value = found()
    except FormatError:
        same(REFUSED, text, f"{what} refused by kvlode alone")
        raise
    same(value, text, what)
    return value


def integers(table: ByteTable, base: int = 0) -> list[tuple[int, int]]:
    return [(base + field.offset, field.size_bytes) for field in table if field.code[-1] != "s"]


def vectors(structure: str) -> list[bytes]:
    return [data for kind, _, data in make_vectors.all_vectors().values() if kind == structure]
