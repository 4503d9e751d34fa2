"""The stripe entry: how one independently encoded part of a payload is stored, and which lengths are possible."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from .bytetable import ByteTable, Field
from .layout import STRIPE_ALIGNMENT_BYTES, Codec

PLANE_FIRST_ZSTD = 1
"""Plane 0 is a zstd frame."""
PLANE_REST_ZSTD = 2
"""The planes after plane 0 are one zstd frame."""

STRIPE_TABLE = ByteTable(
    title="stripe entry",
    size_bytes=24,
    fields=(
        Field(0, "u32", "stored_length", "bytes of the stripe on disk", "see below"),
        Field(4, "u32", "first_plane_length", "stored bytes of plane 0; 0 when the stripe is not split", "see below"),
        Field(8, "u8", "codec", "0 raw, 1 zstd, 2 planes+zstd", "0 or the record's codec; 1 also in a planes+zstd record"),
        Field(9, "u8", "plane_flags", "bit 0: plane 0 is a zstd frame; bit 1: the rest is a zstd frame", "1 to 3 when split, else 0"),
        Field(10, "zero[6]", "reserved", "reserved", "0"),
        Field(16, "u64", "checksum", "XXH3-64 of the stripe as stored", "any"),
    ),
)

_NUMPY_KINDS = {"u8": "u1", "u16": "<u2", "u32": "<u4", "u64": "<u8"}
STRIPE_DTYPE = np.dtype([(field.name, _NUMPY_KINDS.get(field.kind, f"S{field.size_bytes}")) for field in STRIPE_TABLE])
"""One stripe entry; ``item()`` gives a ``StripeEntry``."""

_SPLIT_FLAGS = PLANE_FIRST_ZSTD | PLANE_REST_ZSTD
_RAW, _ZSTD, _PLANES_ZSTD = (int(codec) for codec in Codec)
"""Plain integers: looking up an enum member costs more than everything else in ``entry_fits``."""

Stripes: TypeAlias = np.ndarray[Any, np.dtype[np.void]]
StripeEntry: TypeAlias = tuple[int, int, int, int, bytes, int]
"""(stored_length, first_plane_length, codec, plane_flags, reserved, checksum)"""

NO_STRIPES: Stripes = np.zeros(0, dtype=STRIPE_DTYPE)
NO_STRIPES.setflags(write=False)


def align_stripe(position: int) -> int:
    """The first place at or after ``position`` where a stripe or a plane may start."""
    return -(-position // STRIPE_ALIGNMENT_BYTES) * STRIPE_ALIGNMENT_BYTES


def stripe_offsets(stripes: Stripes) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Start of each stripe inside the payload, in bytes: one after the other, each on a multiple of 16."""
    starts = np.zeros(len(stripes), dtype=np.int64)
    lengths = stripes["stored_length"][:-1].astype(np.int64)
    np.cumsum((lengths + STRIPE_ALIGNMENT_BYTES - 1) // STRIPE_ALIGNMENT_BYTES * STRIPE_ALIGNMENT_BYTES, out=starts[1:])
    return starts


def stripe_raw_bytes(raw_length: int, stripe_bytes: int, index: int) -> int:
    """Raw bytes of stripe ``index``: ``stripe_bytes``, or what is left for the last one."""
    return min(stripe_bytes, raw_length - index * stripe_bytes)


def entry_fits(entry: StripeEntry, raw_bytes: int, codec: int, element_size: int) -> bool:
    """Whether an entry is one that a writer lays for ``raw_bytes`` in a record of this codec (SPEC.md part 4).

    Everything a decoder computes from an entry that fits stays inside the stored stripe and inside ``raw_bytes``.
    """
    stored, first, own_codec, flags, reserved, _ = entry
    if reserved:
        return False
    if own_codec == _RAW:
        return stored == raw_bytes and first == 0 and flags == 0
    if not 0 < stored < raw_bytes:
        return False
    if own_codec == _ZSTD:
        return codec != _RAW and first == 0 and flags == 0
    if own_codec != _PLANES_ZSTD or codec != _PLANES_ZSTD:
        return False
    return _split_fits(stored, first, flags, raw_bytes, element_size)


def _split_fits(stored: int, first: int, flags: int, raw_bytes: int, element_size: int) -> bool:
    if element_size < 2 or raw_bytes % element_size or not 1 <= flags <= _SPLIT_FLAGS:
        return False
    plane_bytes = raw_bytes // element_size
    rest, rest_bytes = stored - align_stripe(first), raw_bytes - plane_bytes
    first_fits = 0 < first < plane_bytes if flags & PLANE_FIRST_ZSTD else first == plane_bytes
    rest_fits = 0 < rest < rest_bytes if flags & PLANE_REST_ZSTD else rest == rest_bytes
    return first_fits and rest_fits
