"""Byte planes: the bytes of equal significance of every element, next to each other.

Plane 0 holds the most significant byte of each little-endian element (of a float: sign and exponent, which compress);
``rest`` holds the other planes one after the other, from the next most significant byte down to the least (the mantissa,
which hardly does). NumPy's casts between integers run at the speed of memory where its shifts and strided copies take three to
five times as long, so planes are narrowed out of words and widened into them, and no byte is moved by itself.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

_WORDS: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}


def split(raw: Bytes, element_size: int, first: Bytes, rest: Bytes) -> None:
    """Split ``raw`` (n elements of 2, 4 or 8 bytes) into ``first`` (n bytes) and ``rest`` (n * (element_size - 1) bytes)."""
    split_first(raw, element_size, first)
    split_rest(raw, element_size, rest)


def split_first(raw: Bytes, element_size: int, first: Bytes) -> None:
    """Plane 0 alone."""
    _narrow(raw, element_size, element_size - 1, first)


def split_rest(raw: Bytes, element_size: int, rest: Bytes) -> None:
    """The other planes."""
    count = raw.size // element_size
    for index in range(element_size - 1):
        _narrow(raw, element_size, element_size - 2 - index, rest[index * count : (index + 1) * count])


def _narrow(raw: Bytes, element_size: int, significance: int, plane: Bytes) -> None:
    """Byte ``significance`` of each element (0 is the lowest): the lowest byte of the words that begin there."""
    if significance == 0:
        np.copyto(plane, raw.view(_WORDS[element_size]), casting="unsafe")
    elif plane.size:  # the last of those words would reach beyond the end
        words = raw[significance : significance - element_size].view(_WORDS[element_size])
        np.copyto(plane[:-1], words, casting="unsafe")
        plane[-1] = raw[significance - element_size]


def merge(first: Bytes, rest: Bytes, element_size: int, out: Bytes, scratch: Bytes | None = None) -> None:
    """The inverse of ``split``: fill ``out`` (n * element_size bytes).

    ``scratch`` is memory for one byte more than ``out``, at an even address, whatever it holds; without it some is made.
    """
    count = first.size
    lowest = rest[(element_size - 2) * count :]
    np.copyto(out.view(_WORDS[element_size]), lowest)
    if element_size == 2:
        _merge_upper(first, out, np.empty(out.size + 1, dtype=np.uint8) if scratch is None else scratch)
        return
    out[element_size - 1 :: element_size] = first
    for index in range(element_size - 2):
        out[element_size - 2 - index :: element_size] = rest[index * count : (index + 1) * count]


def _merge_upper(first: Bytes, out: Bytes, scratch: Bytes) -> None:
    """Put ``first`` into the upper bytes of words of two: words written one byte late have their lower byte in the upper place."""
    late = scratch[1 : 1 + out.size].view(_WORDS[2])
    np.copyto(late, first)
    scratch[0] = 0
    words = out.view(_WORDS[2])
    np.bitwise_or(words, scratch[: out.size].view(_WORDS[2]), out=words)
