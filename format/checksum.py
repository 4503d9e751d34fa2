"""The checksum of the format: XXH3-64 with seed 0 and the default secret. It finds damage, not forgery."""

from __future__ import annotations

from typing import Any, TypeAlias

import xxhash

Buffer: TypeAlias = Any
"""Anything with a C-contiguous buffer: bytes, memoryview, NumPy array (PEP 688 names it from Python 3.12 on)."""


def xxh3_64(*parts: Buffer) -> int:
    """XXH3-64 of the parts as if they were one run of bytes. Thread-safe; long parts are hashed outside the GIL."""
    if len(parts) == 1:
        return xxhash.xxh3_64_intdigest(parts[0])
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state.intdigest()
