"""A report for people and for programs: one line a problem, a summary in any case."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..output import bytes_text, count_text, printable
from .findings import Finding, Report
from .options import Level
from .problems import PROBLEMS, Problem, Severity
from .progress import SCHEMA

LINES_PER_PROBLEM = 20
"""Findings of one id that are printed for people; programs get all that were kept."""


def problem_json(finding: Finding) -> str:
    """One line of ``--json``."""
    problem = finding.problem
    line = {
        "type": "problem",
        "schema": SCHEMA,
        "id": finding.id,
        "severity": problem.severity,
        "path": finding.path,
        "segment": None if finding.segment_id is None else f"{finding.segment_id:016x}",
        "offset": finding.offset,
        "length": finding.length,
        "namespace": None if finding.ident is None else finding.ident[:16].hex(),
        "key": None if finding.ident is None else finding.ident[16:].hex(),
        "text": finding.text,
        "repair": problem.repair,
        "lossless": problem.lossless,
        "facts": finding.facts,
    }
    return json.dumps(line, default=str)


def finding_line(finding: Finding) -> str:
    """One line for people."""
    return printable(f"{finding.problem.severity:8} {finding.id}: {finding.text}")


def summary_json(report: Report, exit_code: int) -> str:
    """The last line of ``--json``."""
    coverage = report.coverage
    line: dict[str, Any] = {
        "type": "summary",
        "schema": SCHEMA,
        "path": report.path,
        "level": report.level,
        "exit_code": exit_code,
        "problems": report.problems,
        "counts": dict(sorted(report.counts.items())),
        "segments_present": coverage.segments_present,
        "segments_checked": coverage.segments_checked,
        "records_present": coverage.records_present,
        "records_checked": coverage.records_checked,
        "bytes_present": coverage.bytes_present,
        "bytes_checked": coverage.bytes_checked,
        "complete": coverage.complete,
        "index_entries": coverage.index_entries,
        "passes": report.passes,
        "skipped": report.skipped,
        "errors": report.errors,
        "actions": report.actions,
        "undone": report.undone,
        "interrupted": report.interrupted,
        "space_bytes": report.space,
        "duration_s": round(report.duration_s, 3),
    }
    return json.dumps(line, default=str)


def report_lines(report: Report, exit_code: int) -> Iterator[str]:
    """For people: findings by id, worst first, then the summary."""
    order = {severity: number for number, severity in enumerate((Severity.FATAL, Severity.DAMAGE, Severity.DEGRADED, Severity.NOTE))}
    shown: dict[str, int] = {}
    for finding in sorted(report.findings, key=lambda f: (order[f.problem.severity], f.id)):
        shown[finding.id] = shown.get(finding.id, 0) + 1
        if shown[finding.id] <= LINES_PER_PROBLEM:
            yield finding_line(finding)
        elif shown[finding.id] == LINES_PER_PROBLEM + 1:
            yield f"{finding.problem.severity:8} {finding.id}: and {report.counts[finding.id] - LINES_PER_PROBLEM:,} more"
    for error in report.errors:
        yield printable(f"error: {error}")
    for action in report.actions:
        yield printable(f"done: {action}")
    for action in report.undone:
        yield printable(f"not done: {action}")
    yield from _summary(report, exit_code)


def _summary(report: Report, exit_code: int) -> Iterator[str]:
    coverage = report.coverage
    for name, reason in report.skipped.items():
        if reason != f"not at level {report.level}":
            yield printable(f"not checked: {name}: {reason}")
    present = count_text(coverage.segments_present, "segment")
    yield (
        f"{report.path}: {coverage.segments_checked:,} of {present}, {coverage.records_checked:,} of "
        f"{count_text(coverage.records_present, 'record')}, {count_text(coverage.index_entries, 'index entry', 'index entries')} "
        f"in {report.duration_s:.1f} s"
    )
    yield _coverage_text(report)
    notes = sum(report.counts.values()) - report.problems
    verdict = "clean" if exit_code == 0 else count_text(report.problems, "problem")
    if report.interrupted:
        verdict += ", interrupted"
    elif report.out_of_time:
        verdict += ", out of time"
    if report.errors:
        verdict += f", {count_text(len(report.errors), 'error')}"
    yield f"{verdict}, {count_text(notes, 'note')} (exit code {exit_code})" if notes else f"{verdict} (exit code {exit_code})"


def _coverage_text(report: Report) -> str:
    coverage = report.coverage
    text = f"checked {coverage.bytes_checked:,} of {coverage.bytes_present:,} bytes ({bytes_text(coverage.bytes_present)})"
    if report.level == Level.FULL:
        text += ": every byte" if coverage.complete else ": NOT every byte"
    return text


def explanation(problem: Problem) -> str:
    """``--explain ID``."""
    lossless = "gives nothing up" if problem.lossless else "gives up what is damaged; needs --repair=lossy"
    repair = "none" if problem.repair == "nothing" else f"{problem.repair} ({lossless})"
    return f"{problem.id} ({problem.severity})\n  {problem.template}\n\n{problem.explanation}\n\nRepair: {repair}.\n"


def explanations(wanted: str) -> str | None:
    """The explanation of an id, or the list for ``all``; ``None`` for an unknown id."""
    if wanted.lower() == "all":
        return "\n".join(f"{problem.id:18} {problem.severity:9} {problem.template}" for problem in PROBLEMS.values()) + "\n"
    problem = PROBLEMS.get(wanted.upper())
    return None if problem is None else explanation(problem)
