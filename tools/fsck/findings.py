"""What a check found: findings, how much was checked, and the report that sums both up with an exit code."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .options import OUT_OF_TIME
from .problems import PROBLEMS, Problem, Severity

FINDINGS_MAX = 10_000
"""Findings kept in full for each problem id; beyond that they are only counted, so that memory stays bounded."""


class ExitBit(enum.IntFlag):
    """The exit code of ``kvlode fsck`` is a sum of these."""

    CLEAN = 0
    REPAIRED = 1
    LEFT = 4
    """Problems that are left (found and not repaired)."""
    OPERATIONAL = 8
    """The check itself could not be carried out: an I/O error, a lock, a permission."""
    USAGE = 16
    INTERRUPTED = 32


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem in one place."""

    id: str
    path: str
    """File, relative to the store's folder (``segments/0000000000000001.seg``, ``STORE``, ``index``)."""
    segment_id: int | None = None
    offset: int | None = None
    """First byte of the damaged record or range in its file."""
    length: int | None = None
    ident: bytes | None = None
    """Index key of the block in question: namespace digest (16 bytes) and block key."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the template of the problem needs, plain values: ``expected``, ``actual``, ``error``, ..."""

    @property
    def problem(self) -> Problem:
        return PROBLEMS[self.id]

    @property
    def text(self) -> str:
        """The template, filled in."""
        place = {"path": self.path, "segment_id": self.segment_id, "offset": self.offset, "length": self.length}
        return self.problem.template.format(**place, **self.facts)


@dataclass(slots=True)
class Coverage:
    """How much there is and how much was checked. Under ``--full`` each pair must be equal."""

    segments_present: int = 0
    segments_checked: int = 0
    records_present: int = 0
    records_checked: int = 0
    bytes_present: int = 0
    """Bytes of segment files up to the end of their data."""
    bytes_checked: int = 0
    """Bytes that were read and compared with a checksum or a rule."""
    index_entries: int = 0

    @property
    def complete(self) -> bool:
        return self.bytes_present == self.bytes_checked and self.records_present == self.records_checked


@dataclass(slots=True)
class Report:
    """The result of one run; always printed, also after an error or an interrupt."""

    path: str
    level: str
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """By problem id, exact even where ``findings`` is cut."""
    coverage: Coverage = field(default_factory=Coverage)
    passes: list[str] = field(default_factory=list)
    """Names of the passes that ran to their end."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Passes that did not run, and why."""
    errors: list[str] = field(default_factory=list)
    """Operational errors: what could not be checked."""
    actions: list[str] = field(default_factory=list)
    """Repairs that were carried out, in order."""
    undone: list[str] = field(default_factory=list)
    """Repairs that were planned and not carried out, after an error or an interrupt."""
    interrupted: bool = False
    space: dict[str, int] = field(default_factory=dict)
    """Bytes by use: live, dead, torn, index, quarantine, other."""
    duration_s: float = 0.0

    def add(self, finding: Finding) -> None:
        """Count a finding, and keep it while there is room."""
        self.counts[finding.id] += 1
        if self.counts[finding.id] <= FINDINGS_MAX:
            self.findings.append(finding)

    def drop(self, findings: Sequence[Finding]) -> None:
        """Take findings back that turned out to be none."""
        places = {(finding.id, finding.path, finding.offset) for finding in findings}
        self.findings = [finding for finding in self.findings if (finding.id, finding.path, finding.offset) not in places]
        self.counts -= Counter(finding.id for finding in findings)

    @property
    def problems(self) -> int:
        """Findings that are not mere notes."""
        return sum(count for name, count in self.counts.items() if PROBLEMS[name].severity is not Severity.NOTE)

    @property
    def out_of_time(self) -> bool:
        """Whether the time that it was given ended the check before its end."""
        return OUT_OF_TIME in self.skipped.values()

    @property
    def exit_code(self) -> int:
        """A sum of ``ExitBit``. After a repair, what it did and what the check behind it found."""
        code = ExitBit.REPAIRED if self.actions else ExitBit.CLEAN
        if self.problems:
            code |= ExitBit.LEFT
        if self.errors:
            code |= ExitBit.OPERATIONAL
        if self.interrupted or self.out_of_time:
            code |= ExitBit.INTERRUPTED
        return int(code)
