"""The operator's page names only metrics, policies and options that exist."""

from __future__ import annotations

import re

import pytest

from command import run_here
from kvlode.engine.policies.registry import ADMISSION_POLICIES, RECLAIM_POLICIES
from kvlode.tools.metrics.names import ALL_METRICS
from readme import ROOT, fenced

PAGE = "docs/operating.md"
TEXT = (ROOT / PAGE).read_text()


def test_every_metric_of_the_runbook_exists() -> None:
    known = {metric.name for metric in ALL_METRICS} | {f"{metric.name}_bucket" for metric in ALL_METRICS if metric.kind == "histogram"}
    named = set(re.findall(r"\bkvlode_[a-z_]+[a-z]\b", TEXT))
    assert len(named) > 10 and named <= known, named - known


@pytest.mark.parametrize(("option", "policies"), [("reclaim_policy", RECLAIM_POLICIES), ("admission_policy", ADMISSION_POLICIES)])
def test_every_policy_is_in_its_options_row(option: str, policies: dict[str, object]) -> None:
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{option}`"))
    assert all(f"`{name}`" in row for name in policies), row


def test_the_plan_of_the_page_runs() -> None:
    lines = [line for block in fenced(PAGE, "sh") for line in block.splitlines() if line.startswith("kvlode plan")]
    assert lines and all(run_here(*line.split()[1:]).code == 0 for line in lines)
