"""How the command prints: JSON on one last line, tables, sizes and times for people, and texts from a store made harmless."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
PIPE_COLUMNS = 200
"""Width of what goes into a file or another program: wide enough that no cell is cut."""
_AGES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def print_json(value: Any) -> None:
    """One object on one line of standard output; bytes become hex."""
    print(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if hasattr(value, "item"):
        return value.item()
    return str(value)


def make_console() -> Console:
    """Standard output as wide as the terminal; ``COLUMNS`` overrides, and what is no terminal is ``PIPE_COLUMNS`` wide."""
    fixed = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else PIPE_COLUMNS
    return Console(width=fixed, highlight=False, markup=False, emoji=False)


def make_table(*columns: str, right: Iterable[str] = (), title: str | None = None) -> Table:
    """A table with the given columns, those named in ``right`` flush right. Cells are cut rather than wrapped."""
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False, box=None, header_style="bold")
    numbers = set(right)
    for name in columns:
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=True, overflow="ellipsis")
    return table


def print_table(console: Console, table: Table) -> None:
    """Print a table of ``make_table``. Where the line is too short, texts are cut; numbers and the first column are not."""
    for number, column in enumerate(table.columns):
        if column.justify == "right" or number == 0:
            column.min_width = max(len(str(column.header)), *(len(str(cell)) for cell in column.cells), 0)
    console.print(table)


def print_facts(console: Console, facts: Iterable[tuple[str, str]]) -> None:
    """Names and values, one a line; a value that is too long for the line goes on below itself."""
    rows = list(facts)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def print_problems(console: Console, problems: Iterable[str], notes: Iterable[str] = ()) -> None:
    """Damage in red, remarks plain; each says which of the two it is."""
    for note in notes:
        console.print(f"note: {printable(note)}", soft_wrap=True)
    for problem in problems:
        console.print(f"damaged: {printable(problem)}", style="red", soft_wrap=True)


def print_left_out(console: Console, count: int, what: str) -> None:
    """Say that rows were left out; nothing for 0."""
    if count > 0:
        console.print(f"... and {count:,} more {what} (--limit)")


def printable(text: str) -> str:
    """Text from a store without what a terminal would obey: control characters become their code points."""
    return "".join(char if char.isprintable() or char == "\n" else f"\\u{ord(char):04x}" for char in text)


def bytes_text(size_bytes: float) -> str:
    """A size in binary units."""
    for unit in UNITS:
        if abs(size_bytes) < 1024 or unit == UNITS[-1]:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    raise AssertionError("unreachable")


def count_text(count: int, one: str, many: str = "") -> str:
    """``1 problem``, ``2 problems``; ``many`` for a plural that is more than an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def share_text(part: float, whole: float) -> str:
    """A share in whole percent; ``<1%`` for what would be rounded away, ``-`` of nothing."""
    if not whole:
        return "-"
    share = 100 * part / whole
    return "<1%" if 0 < share < 1 else f"{share:.0f}%"


def time_text(time_ns: int | None) -> str:
    """UTC to the second; ``-`` for none or zero."""
    if not time_ns:
        return "-"
    try:
        return datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):  # a damaged or odd time is still shown
        return f"{time_ns} ns"


def age_text(time_ns: int | None, now_ns: int) -> str:
    """How long ago, in the largest unit that fits; ``-`` for none or zero."""
    if not time_ns:
        return "-"
    seconds = (now_ns - time_ns) / 1e9
    if seconds < 0:
        return "in future"
    for size, unit in _AGES:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return "now"


def key_text(key: bytes, digits: int = 24) -> str:
    """The first hex digits of a key, with two dots where it goes on; ``-`` for none."""
    text = key.hex()
    return (text[:digits] + ".." if len(text) > digits else text) or "-"
