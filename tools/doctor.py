"""``kvlode doctor``: what this machine can do for a store at a path, what that means, and what to do about it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..gds.probe import probe
from .exit_codes import EXIT_DAMAGE, EXIT_FINE
from .output import print_json

STYLES = {"good": "green", "note": "yellow", "problem": "red"}


def doctor(path: Path, *, as_json: bool) -> int:
    """Print the findings; the exit code tells when one of them is a problem for a store here."""
    report = probe(str(path))
    if as_json:
        print_json(report.to_dict())
    else:
        console = Console()
        table = Table("what", "found", "meaning", "what to do", title=f"a store at {report.path}", title_justify="left")
        for finding in report.findings:
            table.add_row(finding.name, f"[{STYLES[finding.level]}]{finding.value}[/]", finding.meaning, finding.advice or "-")
        console.print(table)
        if report.gds_missing:
            console.print("GPUDirect Storage cannot be used here; missing:")
            for missing in report.gds_missing:
                console.print(f"  - {missing}", highlight=False, markup=False)
    return EXIT_DAMAGE if any(finding.level == "problem" for finding in report.findings) else EXIT_FINE
