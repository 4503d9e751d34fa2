"""Sizes as people write them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from ..format.errors import InvalidConfig

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1 << 40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SIZE = re.compile(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([a-zA-Z]*)\s*\Z", re.ASCII)

_SHOWN_MAX = 80
"""Characters of a text that is no size that its error repeats."""


def parse_bytes(size: int | str, name: str = "size") -> int:
    """``"200GiB"``, ``"64 MB"`` or a plain number of bytes."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = _SIZE.match(size) if isinstance(size, str) else None
    unit = _UNITS.get(match.group(2).lower()) if match else None
    size_bytes = int(Fraction(match.group(1)) * unit) if match is not None and unit is not None else 0
    if size_bytes < 1:
        raise InvalidConfig(
            f"{name} is not a size",
            expected="a positive number of bytes, or text such as '200GiB' or '64 MB'",
            actual=repr(size)[:_SHOWN_MAX],
        )
    return size_bytes


def parse_sizes(options: dict[str, Any], names: Iterable[str]) -> None:
    """Replace sizes that were given as text, among the options of these names, by bytes."""
    for name in names:
        if isinstance(options.get(name), str):
            options[name] = parse_bytes(options[name], name)
