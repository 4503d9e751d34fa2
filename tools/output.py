"""How the command prints: JSON on one last line, sizes and times for people."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def print_json(value: Any) -> None:
    """One object on one line of standard output; bytes become hex."""
    print(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if hasattr(value, "item"):
        return value.item()
    return str(value)


def bytes_text(size_bytes: float) -> str:
    """A size in binary units."""
    for unit in UNITS:
        if abs(size_bytes) < 1024 or unit == UNITS[-1]:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    raise AssertionError("unreachable")


def time_text(time_ns: int | None) -> str:
    """UTC to the second; ``-`` for none or zero."""
    if not time_ns:
        return "-"
    try:
        return datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):  # a damaged or odd time is still shown
        return f"{time_ns} ns"
