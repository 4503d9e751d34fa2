"""Every operation of a store may fail: no hang, no leak, no lie. See ``faults/sweep.py``; one line repeats a failure:

``KVLODE_FAULT="<line>" pytest tests/test_fail_nth.py -k one_line``
"""

from __future__ import annotations

import dataclasses
import os
import threading

import pytest

from faults.scenarios import SCENARIOS
from faults.sweep import HangError, Injection, Sweep, World, count_operations, injections, run, sample
from kvlode.gds.testing import Effect


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
    sweep = swept(name, sample(injections(SCENARIOS[name], seed), SCENARIOS[name].runs, seed))
    assert not sweep.failures, report(sweep)
    assert sum(outcome.struck for outcome in sweep.outcomes) > len(sweep.outcomes) // 2, "the faults did not reach the store"


@pytest.mark.exhaustive
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


FOUND = {
    "a short read dropped the block": "put-and-flush read /store/segments/0000000000000002.seg 1 short EIO once 1",
    "a half-made spare segment was in the way for ever": "seal preallocate /store/segments/spare.new 1 error EIO once 1",
    "a deleted block came back, its log unread": "open-after-crash sync /store/segments/0000000000000005.seg 1 error ENOSPC once 1",
    "the checkpoint passed over flushed blocks": "open-after-crash read /store/segments/0000000000000004.seg 4 error EIO once 1",
    "a rebuilt index passed over a segment": "rebuild-the-index open /store/segments/0000000000000002.seg 2 error EIO once 1",
}
"""What was wrong once, and the failure that showed it."""


@pytest.mark.parametrize("what", sorted(FOUND))
def test_what_was_found_stays_mended(what: str) -> None:
    injection = Injection.parse(FOUND[what])
    outcome = run(SCENARIOS[injection.scenario], injection)
    assert outcome.struck and not outcome.problems, "\n".join(outcome.problems)


@pytest.mark.parametrize(("operation", "effect", "words"), [("sync", Effect.LOST, "is gone"), ("read", Effect.BIT_FLIP, "CORRUPT")])
def test_the_sweep_notices_a_drive_that_lies(operation: str, effect: Effect, words: str, seed: int) -> None:
    """What no store can make good must show, or the oracle is blind."""
    everything = injections(SCENARIOS["put-and-flush"], seed)
    chosen = [injection for injection in everything if injection.operation == operation and injection.path.endswith(".seg")]
    outcomes = [run(SCENARIOS["put-and-flush"], dataclasses.replace(injection, effect=effect)) for injection in chosen]
    assert any(words in problem for outcome in outcomes for problem in outcome.problems)


def test_a_run_that_does_not_end_is_stopped_and_shows_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faults.sweep.HANG_S", 0.1)
    go_on = threading.Event()

    def stands_here(world: World) -> None:
        go_on.wait(60.0)

    stuck = dataclasses.replace(SCENARIOS["put-and-flush"], act=stands_here)
    with pytest.raises(HangError, match="stands_here"):
        count_operations(stuck)
    go_on.set()


def test_scenarios_do_what_they_are_named_after() -> None:
    def paths(name: str, operation: str) -> list[str]:
        return [path for (done, path), _ in count_operations(SCENARIOS[name]).items() if done == operation]

    assert len(paths("seal", "truncate")) >= 2, "segments are sealed"
    assert len([path for path in paths("reclaim", "remove") if path.endswith(".seg")]) >= 2, "segments are freed"
    assert paths("open-after-crash", "write"), "the torn segment is sealed"
    assert not paths("follow", "write") and not paths("follow", "sync")
