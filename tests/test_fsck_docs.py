"""The operator's page on fsck says what the code does: its table of problems is made from the table in the code."""

from __future__ import annotations

from pathlib import Path

import kvlode
from kvlode.tools.fsck.findings import ExitBit
from kvlode.tools.fsck.problems import PROBLEMS, Repair

PAGE = Path(kvlode.__file__).resolve().parent / "docs" / "fsck.md"
BEGIN, END = "<!-- generated: problems -->\n", "<!-- end: problems -->\n"


def problem_table() -> str:
    """The table of problems as it stands in docs/fsck.md."""
    lines = ["| id | severity | repair | what it means |", "| --- | --- | --- | --- |"]
    for problem in PROBLEMS.values():
        repair = "none" if problem.repair is Repair.NONE else problem.repair.value + ("" if problem.lossless else " (lossy)")
        lines.append(f"| `{problem.id}` | {problem.severity.value} | {repair} | {problem.explanation} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_problems_is_that_of_the_code() -> None:
    text = PAGE.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    assert text[start:end] == problem_table(), f"replace the table in {PAGE.name} by:\n{problem_table()}"


def test_every_exit_bit_is_explained() -> None:
    text = PAGE.read_text()
    rows = text[text.index("| bit | meaning |") : text.index("`1` alone")].splitlines()
    bits = [int(row.split("|")[1]) for row in rows if row.startswith("| ") and row.split("|")[1].strip().isdigit()]
    assert bits == sorted({int(ExitBit.CLEAN), *(int(bit) for bit in ExitBit)})
