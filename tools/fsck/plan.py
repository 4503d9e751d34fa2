"""What a repair would do about a report: actions in an order that is safe to stop in anywhere. Reads and changes nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ..output import count_text
from .check_index import NO_SUCH_SEGMENT
from .findings import Finding, Report
from .problems import Repair, Severity

TARGETED_MAX = 5_000
"""More entries than this are not dropped or added one by one: the index is derived anew."""

_FILE_ORDER = (Repair.REWRITE_SUPERBLOCK, Repair.REWRITE_HEADER, Repair.SET_ASIDE, Repair.RESEAL)
_LOSS = ("REC-GAP", "SEG-CUT", "SEG-ALIEN", "SEG-BLANK")
"""Problems that mean that records of unknown content are lost: there may have been deletes among them."""
_NOT_TOUCHED = ("REC-UNKNOWN",)
"""Segments with one of these stay as they are: what another version wrote is not judged by this one."""


@dataclass(frozen=True, slots=True)
class Action:
    """One step: what is done to which file (or to the index), for which findings."""

    repair: Repair
    path: str
    segment_id: int | None
    findings: tuple[Finding, ...]
    cut: frozenset[int] = frozenset()
    """Offsets of the records that a new seal leaves out."""
    doubtful: int = 0
    """Of ``cut``: whole records that nobody knows of any more, and whose deletes may be among what was lost."""

    @property
    def problem_ids(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(finding.id for finding in self.findings))

    @property
    def text(self) -> str:
        """One line of the plan."""
        parts = [f"{self.path}: {self.repair.value} ({', '.join(self.problem_ids)}"]
        if self.repair in (Repair.DROP_ENTRIES, Repair.ADD_ENTRIES):
            parts.append(f"; {count_text(len(self.findings), 'entry', 'entries')}")
        if self.cut:
            parts.append(f"; leaves out {count_text(len(self.cut), 'record')}")
        if self.doubtful:
            parts.append(f", {self.doubtful} of them because their delete may have been lost")
        return "".join(parts) + ")"


@dataclass(frozen=True, slots=True)
class Plan:
    """Actions in order, and what is left with the reason."""

    actions: tuple[Action, ...]
    index_follows: bool
    """Files change: what the index needs is found by a check between."""
    left: tuple[str, ...]

    @property
    def text(self) -> str:
        """The plan as it is shown before anything is touched."""
        lines = [f"{number}. {action.text}" for number, action in enumerate(self.actions, 1)]
        if self.index_follows:
            lines.append(f"{len(lines) + 1}. index: brought in line with the repaired segments (entries dropped or added, or derived anew)")
        lines += [f"left: {reason}" for reason in self.left]
        return "\n".join(lines) if lines else "nothing to repair"


def make_plan(report: Report, *, lossy: bool, has_index: bool = True) -> Plan:
    """Actions for the findings of a report.

    Files come first. While files are to be changed there are no actions on the index: what it needs is decided by a check of
    the changed files. Without ``lossy`` whatever would give something up is left.
    """
    fatal = [f for f in report.findings if f.problem.severity is Severity.FATAL and f.problem.repair is Repair.NONE]
    if any(finding.segment_id is None for finding in fatal):
        return Plan((), False, tuple(f"{finding.text} Nothing else is repaired." for finding in fatal))
    left: list[str] = []
    doubtful = _doubtful(report)
    files = _file_actions(report, lossy, doubtful, left)
    index = () if files else tuple(_index_actions(report, lossy, doubtful, has_index, left))
    left += [f"{f.path}: {f.id}: no repair; kvlode fsck --explain {f.id} says what to do" for f in _first_of_each(report) if _helpless(f)]
    return Plan(tuple(files) + index, bool(files) and has_index, tuple(left))


def _file_actions(report: Report, lossy: bool, doubtful: list[Finding], left: list[str]) -> list[Action]:
    untouched = {finding.segment_id for finding in report.findings if finding.id in _NOT_TOUCHED}
    wanted: dict[tuple[Repair, str], list[Finding]] = defaultdict(list)
    for finding in report.findings:
        if finding.problem.repair in _FILE_ORDER:
            wanted[finding.problem.repair, finding.path].append(finding)
    if lossy:
        for finding in doubtful:
            wanted[Repair.RESEAL, _segment_path(finding, report)].append(finding)
    aside = {path for repair, path in wanted if repair is Repair.SET_ASIDE}
    doubted = {f.segment_id for f in doubtful}
    actions = []
    for (repair, path), findings in wanted.items():
        segment_id = findings[0].segment_id
        if repair is not Repair.SET_ASIDE and path in aside:
            continue
        if segment_id in untouched and segment_id is not None:
            left.append(f"{path}: not repaired, it has records of a newer version")
        elif not lossy and _gives_up(findings, doubted):
            left.append(f"{path}: {', '.join(sorted({f.id for f in findings}))}: repairing it gives up blocks; --repair=lossy does it")
        else:
            cut = frozenset(f.offset for f in findings if f.offset is not None and _cuts(f))
            actions.append(Action(repair, path, segment_id, tuple(findings), cut, sum(f.id == "IDX-ORPHAN" for f in findings)))
    return sorted(actions, key=_place_in_order)


def _is_loss(finding: Finding) -> bool:
    """Whether records of unknown content are lost; so is a segment that entries point to and that is not there."""
    return finding.id in _LOSS or (finding.id == "IDX-DANGLING" and finding.facts.get("error") == NO_SUCH_SEGMENT)


def _place_in_order(action: Action) -> tuple[int, int, int, str]:
    """By kind; and segments that give up doubtful records before the loss that makes them doubtful is sealed over and forgotten."""
    lost = any(_is_loss(finding) for finding in action.findings)
    if action.repair is Repair.SET_ASIDE and lost:
        return len(_FILE_ORDER), 0, action.segment_id or 0, action.path
    return _FILE_ORDER.index(action.repair), int(lost), action.segment_id or 0, action.path


def _gives_up(findings: Iterable[Finding], doubted: set[int | None]) -> bool:
    """Whether the repair of one file for these findings loses something: a record, or the trace of lost deletes."""
    return any(not f.problem.lossless or (_is_loss(f) and bool(doubted)) for f in findings)


def _cuts(finding: Finding) -> bool:
    """Whether the record at the finding's offset is what is given up; a segment's own problems say nothing of a record."""
    if finding.id == "IDX-ORPHAN":
        return True
    return finding.id.startswith(("PAY-", "REC-")) and finding.problem.repair is Repair.RESEAL


def _doubtful(report: Report) -> list[Finding]:
    """Orphans that lie before a loss while the index is intact: they are not in it, perhaps because of a delete that is lost now.

    A delete never lies in an earlier segment than the record that it kills. When the index has to be derived anew, nothing knows
    of such deletes any more, and the blocks come back (SPEC.md part 10).
    """
    if any(f.problem.repair is Repair.REBUILD_INDEX for f in report.findings):
        return []
    losses = [(f.segment_id, (f.offset or 0) + (f.length or 0) if f.id == "REC-GAP" else 1 << 62) for f in report.findings if _is_loss(f)]
    last = max(((segment, end) for segment, end in losses if segment is not None), default=(-1, 0))
    return [f for f in report.findings if f.id == "IDX-ORPHAN" and (f.segment_id or 0, f.offset or 0) < last]


def _segment_path(finding: Finding, report: Report) -> str:
    paths = (f.path for f in report.findings if f.segment_id == finding.segment_id and f.path.endswith(".seg"))
    return next(paths, f"segments/{finding.segment_id:016x}.seg")


def _index_actions(report: Report, lossy: bool, doubtful: list[Finding], has_index: bool, left: list[str]) -> Iterable[Action]:
    wanted: dict[Repair, list[Finding]] = defaultdict(list)
    doubted = {(f.segment_id, f.offset) for f in doubtful}
    for finding in report.findings:
        if finding.problem.repair in (Repair.DROP_ENTRIES, Repair.ADD_ENTRIES, Repair.REBUILD_INDEX):
            if finding.id == "IDX-ORPHAN" and (finding.segment_id, finding.offset) in doubted:
                continue
            if doubted and not lossy and _is_loss(finding):
                continue  # it is what shows that something is lost
            wanted[finding.problem.repair].append(finding)
    if doubtful and not lossy:
        left.append(
            f"index: not added, as a delete may be among what was lost: {count_text(len(doubtful), 'record')}; --repair=lossy gives up"
        )
    if not wanted:
        return []
    if not has_index:
        left.append("index: not repaired, there is no access to it")
        return []
    everything = [finding for findings in wanted.values() for finding in findings]
    many = sum(report.counts[name] for name in {f.id for f in everything}) > TARGETED_MAX
    if Repair.REBUILD_INDEX in wanted or (many and not doubtful):
        return [Action(Repair.REBUILD_INDEX, "index", None, tuple(everything))]
    order = (Repair.DROP_ENTRIES, Repair.ADD_ENTRIES)
    return [Action(repair, "index", None, tuple(wanted[repair])) for repair in order if repair in wanted]


def _first_of_each(report: Report) -> list[Finding]:
    """One finding of each id, in the order of the report."""
    first: dict[str, Finding] = {}
    for finding in report.findings:
        first.setdefault(finding.id, finding)
    return list(first.values())


def _helpless(finding: Finding) -> bool:
    return finding.problem.repair is Repair.NONE and finding.problem.severity is not Severity.NOTE
