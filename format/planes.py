"""Byte planes: the bytes of equal significance of every element, next to each other.

Plane 0 holds the most significant byte of each little-endian element (of a float: sign and exponent, which compress);
``rest`` holds the other planes one after the other, from the next most significant byte down to the least (the mantissa,
which hardly does). Splitting by shift and cast, and merging by shift and or, run at memory speed where strided copies do not.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

_WORDS: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}


def split(raw: Bytes, element_size: int, first: Bytes, rest: Bytes) -> None:
    """Split ``raw`` (n elements of 2, 4 or 8 bytes) into ``first`` (n bytes) and ``rest`` (n * (element_size - 1) bytes)."""
    words = raw.view(_WORDS[element_size])
    count = words.size
    np.right_shift(words, 8 * (element_size - 1), out=first, casting="unsafe")
    for index in range(element_size - 1):
        plane, shift = rest[index * count : (index + 1) * count], 8 * (element_size - 2 - index)
        if shift:
            np.right_shift(words, shift, out=plane, casting="unsafe")
        else:
            np.copyto(plane, words, casting="unsafe")


def merge(first: Bytes, rest: Bytes, element_size: int, out: Bytes) -> None:
    """The inverse of ``split``: fill ``out`` (n * element_size bytes)."""
    words = out.view(_WORDS[element_size])
    count = words.size
    np.left_shift(first, 8, out=words, dtype=words.dtype, casting="unsafe")
    for index in range(element_size - 1):
        np.bitwise_or(words, rest[index * count : (index + 1) * count], out=words)
        if index < element_size - 2:
            np.left_shift(words, 8, out=words)
