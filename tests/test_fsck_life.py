"""The whole life of every problem: it is found, explained, repaired, and gone; and nothing that was whole is lost on the way."""

from __future__ import annotations

import pytest

from fsck_fixtures import FIXTURES, Fixture, healthy, source_of
from fsck_stores import StoreUnderTest
from kvlode.gds.memory import MemoryDevice
from kvlode.tools.fsck.findings import ExitBit, Report
from kvlode.tools.fsck.options import CheckOptions, Level
from kvlode.tools.fsck.plan import make_plan
from kvlode.tools.fsck.problems import PROBLEMS, Repair, Severity
from kvlode.tools.fsck.repair import repair_store
from kvlode.tools.index_access import GivenSource

REPAIRED = [case for case in FIXTURES if PROBLEMS[case.id].repair is not Repair.NONE]
LEFT_ALONE = [case for case in FIXTURES if PROBLEMS[case.id].repair is Repair.NONE]
LOSSY = [case for case in REPAIRED if not PROBLEMS[case.id].lossless]


@pytest.fixture(scope="module")
def pristine() -> StoreUnderTest:
    return healthy()


@pytest.fixture
def target(pristine: StoreUnderTest) -> StoreUnderTest:
    return pristine.copy()


def options_for(target: StoreUnderTest, level: Level = Level.FULL) -> CheckOptions:
    return CheckOptions(level=level, now_ns=target.clock.now_ns())


def repair(target: StoreUnderTest, source: GivenSource, report: Report, *, lossy: bool, level: Level = Level.FULL) -> Report:
    """Repair, and let the store go on with the index that it then has."""
    done = repair_store(target.device, target.path, report, options_for(target, level), source, lossy=lossy, now_ns=target.clock.now_ns())
    target.index = source.index  # type: ignore[assignment]
    return done


def everything(target: StoreUnderTest, source: GivenSource) -> dict[str, object]:
    """Every file and every index entry."""
    assert isinstance(target.device, MemoryDevice)
    files: dict[str, object] = {path: target.read(path) for path, _ in target.device._names.files() if not path.endswith("/LOCK")}
    return files | {"index": None if source.index is None else dict(source.index.scan())}


def test_every_problem_has_a_fixture_and_every_fixture_a_problem() -> None:
    assert {case.id for case in FIXTURES} == set(PROBLEMS)


def test_a_healthy_store_is_clean(target: StoreUnderTest) -> None:
    report = target.check()
    assert not report.counts, [finding.text for finding in report.findings]
    assert report.exit_code == ExitBit.CLEAN
    assert report.coverage.complete


@pytest.mark.parametrize("case", FIXTURES, ids=str)
def test_it_is_found_alone_and_in_its_place(case: Fixture, target: StoreUnderTest) -> None:
    case.damage(target)
    report = target.check(source=source_of(case, target))
    assert set(report.counts) == {case.id} | case.also, [finding.text for finding in report.findings]
    found = [finding for finding in report.findings if finding.id == case.id]
    assert all(finding.path.startswith(case.path) and finding.path in finding.text for finding in found)
    assert PROBLEMS[case.id].explanation
    worst = max(PROBLEMS[name].severity is not Severity.NOTE for name in report.counts)
    assert report.exit_code == (ExitBit.LEFT if worst else ExitBit.CLEAN)


@pytest.mark.parametrize("case", REPAIRED, ids=str)
def test_it_is_repaired_and_nothing_whole_is_lost(case: Fixture, target: StoreUnderTest) -> None:
    lost = case.damage(target)
    source = source_of(case, target)
    first = target.check(source=source)
    done = repair(target, source, first, lossy=any(not PROBLEMS[name].lossless for name in first.counts))
    assert done.actions and not done.undone and not done.errors
    assert done.exit_code == ExitBit.REPAIRED, [finding.text for finding in done.findings]
    second = target.check(source=source)
    assert set(second.counts) <= case.after, [finding.text for finding in second.findings]
    assert second.exit_code == ExitBit.CLEAN and second.coverage.complete
    target.assert_serves_everything(but=lost)
    assert not set(target.check().counts) - case.after - {"QUA-SIZE"}


@pytest.mark.parametrize("case", LEFT_ALONE, ids=str)
def test_without_a_repair_nothing_is_touched_and_it_says_what_to_do(case: Fixture, target: StoreUnderTest) -> None:
    case.damage(target)
    source = source_of(case, target)
    before = everything(target, source)
    first = target.check(source=source)
    done = repair(target, source, first, lossy=True)
    assert not done.actions and done.counts == first.counts
    assert everything(target, source) == before
    plan = make_plan(first, lossy=True)
    assert not plan.actions
    if PROBLEMS[case.id].severity is not Severity.NOTE:
        assert any(case.id in reason or "version" in reason for reason in plan.left), plan.text


@pytest.mark.parametrize("case", LOSSY, ids=str)
def test_what_would_give_something_up_needs_to_be_asked_for(case: Fixture, target: StoreUnderTest) -> None:
    case.damage(target)
    source = source_of(case, target)
    before = everything(target, source)
    first = target.check(source=source)
    done = repair(target, source, first, lossy=False)
    assert not done.actions and done.counts == first.counts
    assert done.exit_code == ExitBit.LEFT
    assert everything(target, source) == before
    assert "--repair=lossy" in make_plan(first, lossy=False).text
