"""Every operation of a store may fail: no hang, no leak, no lie. See ``faults/sweep.py``; one line repeats a failure:

``KVLODE_FAULT="<line>" pytest tests/test_fail_nth.py -k one_line``
"""

from __future__ import annotations

import os

import pytest

from faults.scenarios import SCENARIOS
from faults.sweep import Injection, Sweep, count_operations, injections, run, sample

DEFAULT_RUNS = 60
"""Of each scenario in the default run, or one of every kind where there are more."""


@pytest.fixture(autouse=True)
def a_writer_that_waits_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """For room that a failing drive does not give: it refuses all the same, only sooner."""
    monkeypatch.setattr("kvlode.engine.writer.SEGMENT_WAIT_S", 0.5)


def swept(scenario_name: str, chosen: list[Injection]) -> Sweep:
    sweep = Sweep()
    for injection in chosen:
        sweep.add(run(SCENARIOS[scenario_name], injection))
    print(f"{scenario_name}: {sweep.summary()}")
    return sweep


def report(sweep: Sweep) -> str:
    lines = [f"{len(sweep.failures)} of {len(sweep.outcomes)} faults led to something wrong:"]
    for outcome in sweep.failures[:20]:
        lines += [f'KVLODE_FAULT="{outcome.injection}"', *(f"    {problem}" for problem in outcome.problems[:4])]
    return "\n".join(lines)


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_a_failed_operation_is_neither_a_hang_nor_a_leak_nor_a_lie(name: str, seed: int) -> None:
    sweep = swept(name, sample(injections(SCENARIOS[name], seed), DEFAULT_RUNS, seed))
    assert not sweep.failures, report(sweep)
    assert sum(outcome.struck for outcome in sweep.outcomes) > len(sweep.outcomes) // 2, "the faults did not reach the store"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_no_operation_at_all_may_fail_badly(name: str, seed: int) -> None:
    sweep = swept(name, injections(SCENARIOS[name], seed))
    assert not sweep.failures, report(sweep)


def test_one_line_repeats_a_failure(seed: int) -> None:
    line = os.environ.get("KVLODE_FAULT")
    if line is None:
        injection = injections(SCENARIOS["put-and-flush"], seed)[0]
        assert Injection.parse(str(injection)) == injection
        assert run(SCENARIOS["put-and-flush"], injection).struck
        return
    injection = Injection.parse(line)
    outcome = run(SCENARIOS[injection.scenario], injection)
    assert outcome.struck and not outcome.problems, "\n".join(outcome.problems)


def test_scenarios_do_what_they_are_named_after() -> None:
    def paths(name: str, operation: str) -> list[str]:
        return [path for (done, path), _ in count_operations(SCENARIOS[name]).items() if done == operation]

    assert len(paths("seal", "truncate")) >= 2, "segments are sealed"
    assert len([path for path in paths("reclaim", "remove") if path.endswith(".seg")]) >= 2, "segments are freed"
    assert paths("open-after-crash", "write"), "the torn segment is sealed"
    assert not paths("follow", "write") and not paths("follow", "sync")
