"""Running ``kvlode report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...format.errors import InvalidConfig
from ..exit_codes import EXIT_DAMAGE, EXIT_FINE
from ..output import make_console, print_json, print_problems
from ..paths import naming, require_new_place
from .advice import advise
from .charts import require_matplotlib
from .collect import Report, collect
from .page import page


def run_report(path: Path, target: Path, *, as_json: bool) -> int:
    """Write the page; an older one of this name is replaced. The exit code tells of damage. Raises ``KvlodeError`` or ``OSError``."""
    require_new_place(target, "the page")
    folder = path.resolve()
    if folder in target.resolve().parents:
        raise InvalidConfig("the page would lie inside the store", where=target, expected=f"a place outside of {folder}")
    require_matplotlib()
    report = collect(path)
    with naming("write", target):
        target.write_text(page(report), encoding="utf-8")
    problems = report.sample.files.store["problems"] if report.sample.files is not None else []
    if as_json:
        print_json(_facts(report, target))
    else:
        console = make_console()
        console.print(f"wrote {target}", soft_wrap=True)
        for alert in report.view.alerts:
            console.print(f"{alert.level}: {alert.text}", soft_wrap=True)
        for line in advise(report.curve, report.view.capacity_bytes, report.view.reused).lines:
            console.print(line, soft_wrap=True)
        print_problems(console, problems)
    return EXIT_DAMAGE if problems else EXIT_FINE


def _facts(report: Report, target: Path) -> dict[str, Any]:
    histograms = report.histograms
    return report.view.facts() | {
        "html": str(target),
        "advice": advise(report.curve, report.view.capacity_bytes, report.view.reused).lines,
        "miss_ratio": None if report.curve is None else report.curve.facts(),
        "histograms": {name: getattr(histograms, name) for name in histograms.__slots__},
    }
