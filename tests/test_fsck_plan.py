"""What a repair would do about a report: order, what is given up, what is left; and who is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from kvlode.format.errors import InvalidConfig
from kvlode.format.layout import segment_name
from kvlode.tools.fsck.check_index import NO_SUCH_SEGMENT
from kvlode.tools.fsck.consent import agrees
from kvlode.tools.fsck.findings import Finding, Report
from kvlode.tools.fsck.plan import TARGETED_MAX, Plan, make_plan
from kvlode.tools.fsck.problems import Repair


def found(problem_id: str, segment_id: int | None = None, offset: int | None = None, length: int | None = None) -> Finding:
    path = "index" if segment_id is None or problem_id.startswith("IDX") else f"segments/{segment_name(segment_id)}"
    return Finding(problem_id, path, segment_id, offset, length, b"ident" if problem_id.startswith("IDX") else None)


def report_of(*findings: Finding) -> Report:
    report = Report("/store", "full")
    for finding in findings:
        report.add(finding)
    return report


def steps(plan: Plan) -> list[tuple[Repair, int | None]]:
    return [(action.repair, action.segment_id) for action in plan.actions]


def test_files_come_in_a_safe_order_and_the_index_waits_for_them() -> None:
    superblock = Finding("SB-CRC", "STORE", facts={"store_uuid": "00" * 16, "error": ""})
    plan = make_plan(
        report_of(
            found("IDX-ORPHAN", 9, 4096),
            found("SEG-SEAL-CRC", 3, 4096),
            found("SEG-NAME", None),
            found("SEG-HDR-CRC", 3, 0),
            superblock,
        ),
        lossy=False,
    )
    order = [Repair.REWRITE_SUPERBLOCK, Repair.REWRITE_HEADER, Repair.SET_ASIDE, Repair.RESEAL]
    assert [repair for repair, _ in steps(plan)] == order
    assert plan.index_follows and "index" in plan.text.splitlines()[4]


def test_a_segment_is_sealed_once_whatever_is_wrong_with_it() -> None:
    plan = make_plan(
        report_of(
            found("PAY-CRC", 3, 8192), found("REC-HDR-CRC", 3, 16384), found("SEG-SEAL-MISMATCH", 3, 4096), found("PAY-CRC", 5, 4096)
        ),
        lossy=True,
    )
    assert steps(plan) == [(Repair.RESEAL, 3), (Repair.RESEAL, 5)]
    assert [set(action.cut) for action in plan.actions] == [{8192, 16384}, {4096}]


def test_a_segment_with_damage_is_left_as_it_is_without_lossy() -> None:
    """Sealing it anew would make the damage disappear from the next report."""
    plan = make_plan(
        report_of(found("SEG-SEAL-CRC", 3, 90112), found("REC-GAP", 3, 8192, 4096), found("SEG-SEAL-CRC", 4, 4096)), lossy=False
    )
    assert steps(plan) == [(Repair.RESEAL, 4)]
    assert "--repair=lossy" in plan.left[0] and segment_name(3) in plan.left[0]


def test_a_file_that_is_set_aside_is_not_mended_before() -> None:
    plan = make_plan(report_of(found("SEG-BLANK", 3, 0), found("SEG-HDR-CRC", 3, 0)), lossy=False)
    assert steps(plan) == [(Repair.SET_ASIDE, 3)]


def test_what_a_newer_version_wrote_is_not_touched() -> None:
    plan = make_plan(report_of(found("REC-UNKNOWN", 3, 8192), found("SEG-SEAL-CRC", 3, 4096), found("SEG-SEAL-CRC", 4, 4096)), lossy=True)
    assert steps(plan) == [(Repair.RESEAL, 4)]
    newer = Finding("SB-VERSION", "STORE", facts={"error": "newer"})
    assert not make_plan(report_of(newer, found("SEG-SEAL-CRC", 4, 4096)), lossy=True).actions


@pytest.mark.parametrize("loss", ["REC-GAP", "SEG-CUT", "SEG-ALIEN", "SEG-BLANK"])
def test_blocks_whose_delete_may_be_lost_do_not_come_back(loss: str) -> None:
    before, behind = found("IDX-ORPHAN", 2, 8192), found("IDX-ORPHAN", 7, 8192)
    report = report_of(found(loss, 5, 4096, 4096), before, behind)
    careful = make_plan(report, lossy=False)
    assert careful.left
    assert all(before not in action.findings for action in careful.actions)
    assert not any(action.segment_id == 5 for action in careful.actions), "the loss would be forgotten"
    lossy = make_plan(report, lossy=True)
    assert [action.segment_id for action in lossy.actions] == [2, 5], "the loss stays visible until what it makes doubtful is given up"
    assert lossy.actions[0].cut == {8192} and lossy.actions[0].doubtful == 1


def test_a_segment_that_is_gone_is_a_loss_too() -> None:
    gone = dataclasses.replace(found("IDX-DANGLING", 5, 4096), facts={"error": NO_SUCH_SEGMENT, "key": ""})
    before, behind = found("IDX-ORPHAN", 2, 8192), found("IDX-ORPHAN", 7, 8192)
    careful = make_plan(report_of(gone, before, behind), lossy=False)
    assert [action.findings for action in careful.actions] == [(behind,)], "the entry stays: it shows the loss to the next run"
    lossy = make_plan(report_of(gone, before, behind), lossy=True)
    assert steps(lossy) == [(Repair.RESEAL, 2)] and lossy.index_follows
    assert steps(make_plan(report_of(gone, behind), lossy=False)) == [(Repair.DROP_ENTRIES, None), (Repair.ADD_ENTRIES, None)]


def test_without_an_index_nothing_knows_of_lost_deletes() -> None:
    report = report_of(found("REC-GAP", 5, 4096, 4096), found("IDX-ORPHAN", 2, 8192), found("IDX-MISSING"))
    assert steps(make_plan(report, lossy=True)) == [(Repair.RESEAL, 5)]


def test_the_index_is_mended_entry_by_entry_or_derived_anew() -> None:
    few = report_of(found("IDX-ORPHAN", 9, 4096), found("IDX-DANGLING", 9, 4096), found("IDX-DELETED", 2, 4096))
    assert [repair for repair, _ in steps(make_plan(few, lossy=False))] == [Repair.DROP_ENTRIES, Repair.ADD_ENTRIES]
    stale = report_of(found("IDX-ORPHAN", 9, 4096), found("IDX-STALE", 9, 4096))
    assert [repair for repair, _ in steps(make_plan(stale, lossy=False))] == [Repair.REBUILD_INDEX]
    many = report_of(*[found("IDX-ORPHAN", 9, 4096 * (n + 1)) for n in range(TARGETED_MAX + 1)])
    assert [repair for repair, _ in steps(make_plan(many, lossy=False))] == [Repair.REBUILD_INDEX]
    assert not make_plan(few, lossy=True, has_index=False).actions


def test_nothing_found_is_nothing_to_do() -> None:
    plan = make_plan(report_of(), lossy=True)
    assert not plan.actions and plan.text == "nothing to repair"


# --- consent ------------------------------------------------------------------------------------------------------


def asking(answer: str | None, questions: list[str]) -> Callable[[str], str]:
    def ask(question: str) -> str:
        questions.append(question)
        if answer is None:
            raise EOFError
        return answer

    return ask


@pytest.mark.parametrize(("answer", "agreed"), [("y", True), (" YES ", True), ("n", False), ("", False), ("yess", False), (None, False)])
def test_the_plan_is_shown_before_the_question(answer: str | None, agreed: bool) -> None:
    plan = make_plan(report_of(found("SEG-SEAL-CRC", 4, 4096)), lossy=False)
    shown: list[str] = []
    assert agrees(plan, yes=False, show=shown.append, ask=asking(answer, shown)) is agreed
    assert shown == [plan.text, "Carry this out? [y/N] "]


def test_yes_is_not_asked_again_but_the_plan_is_shown() -> None:
    plan = make_plan(report_of(found("SEG-SEAL-CRC", 4, 4096)), lossy=False)
    shown: list[str] = []
    assert agrees(plan, yes=True, show=shown.append, ask=asking("n", shown))
    assert shown == [plan.text]


def test_nobody_is_asked_about_an_empty_plan() -> None:
    shown: list[str] = []
    assert not agrees(make_plan(report_of(), lossy=False), yes=True, show=shown.append, ask=asking("y", shown))
    assert shown == ["nothing to repair"]


def test_without_a_terminal_the_plan_is_shown_and_consent_is_a_matter_of_usage() -> None:
    plan = make_plan(report_of(Finding("SEG-NAME", "segments/x")), lossy=False)
    for made in (plan, make_plan(report_of(), lossy=False)):
        shown: list[str] = []
        with pytest.raises(InvalidConfig, match="--yes"):
            agrees(made, yes=False, show=shown.append, ask=None)
        assert shown == [made.text]
    assert agrees(plan, yes=True, show=shown.append, ask=None)
