"""Repairing a store: rounds of plan, actions and check, until nothing is left to do; and the report that says what was done.

Files are repaired first, then the store is checked again, because only then it is known what the index needs. The last
check is as deep as the first one was. An error ends the repair, an interrupt too; either way the store is consistent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ...format.errors import KvlodeError, StoreLocked
from ...format.layout import LOCK_NAME
from ...gds.device import Device
from .actions import Repairer
from .findings import Report
from .index_view import IndexSource
from .options import CheckOptions, Level, Progress, Silence, Stop
from .plan import Plan, make_plan
from .run import check_store

ROUNDS_MAX = 10
"""Findings are kept in full only up to a number for each id; a store with more of them is repaired in rounds."""


def repair_store(
    device: Device,
    path: str,
    report: Report,
    options: CheckOptions,
    index: IndexSource | None,
    *,
    lossy: bool,
    now_ns: int,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Report:
    """Repair what a check has found; the report of the check behind it, with what was done.

    ``options`` are those of the first check. Without ``lossy`` nothing is given up. The writer's lock is held all the time;
    raises ``StoreLocked`` when somebody else has it. Failed I/O ends up in ``errors``, an interrupt (``KeyboardInterrupt`` or
    ``stop``) in ``interrupted``, both with what was not done in ``undone``.
    """
    lock = device.lock(f"{path}/{LOCK_NAME}")
    if lock is None:
        raise StoreLocked(
            "a store in use cannot be repaired", where=path, actual="a process writes to it", action="Stop the process and try again."
        )
    try:
        repairer = Repairer(device, path, index, now_ns)
        quiet, going = progress or Silence(), stop or Stop()

        def check(level: Level) -> Report:
            return check_store(device, path, replace(options, level=level, locked=True), index, quiet, going)

        return _Rounds(report, repairer, check, going, options.level, lossy, index is not None).run()
    finally:
        lock.release()


@dataclass(slots=True)
class _Rounds:
    """One repair. ``report`` is that of the last check that ran to its end."""

    report: Report
    repairer: Repairer
    check: Callable[[Level], Report]
    stop: Stop
    level: Level
    lossy: bool
    has_index: bool
    done: list[str] = field(default_factory=list)
    undone: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    interrupted: bool = False
    checked: bool = True
    """Whether ``report`` is younger than the last action."""

    def run(self) -> Report:
        try:
            self._rounds()
        except KeyboardInterrupt:
            self.interrupted = True
        return self._combined()

    def _rounds(self) -> None:
        before: tuple[str, ...] = ()
        for _ in range(ROUNDS_MAX):
            plan = make_plan(self.report, lossy=self.lossy, has_index=self.has_index)
            tried = tuple(action.text for action in plan.actions)
            if not tried or tried == before:
                break
            before = tried
            if not self._carry_out(plan) or not self._check(Level.WALK if plan.index_follows else self.level):
                return
        if self.report.level != self.level:
            self._check(self.level)

    def _carry_out(self, plan: Plan) -> bool:
        """Every action in order; False after an error or an interrupt."""
        waiting = list(plan.actions)
        try:
            while waiting:
                if self.stop.interrupted:
                    self.interrupted = True
                    return False
                self.checked = False
                self.done.append(self.repairer.carry_out(waiting[0]))
                del waiting[0]
        except KvlodeError as error:
            self.errors.append(f"{waiting[0].path}: {waiting[0].repair.value}: {error}")
            self._check(self.level)
            return False
        finally:
            self.undone += [action.text for action in waiting]
            if waiting and plan.index_follows:
                self.undone.append("index: brought in line with the segments")
        return True

    def _check(self, level: Level) -> bool:
        """Look again; False when that did not come to its end."""
        try:
            report = self.check(level)
        except KvlodeError as error:
            self.errors.append(f"the check after the repair: {error}")
            return False
        self.interrupted = self.interrupted or report.interrupted
        self.errors += report.errors
        if not report.interrupted:
            self.report, self.checked = report, True
        return not report.interrupted and not report.errors

    def _combined(self) -> Report:
        report = self.report
        report.actions, report.undone, report.interrupted = self.done, self.undone, self.interrupted or report.interrupted
        report.errors = list(dict.fromkeys([*report.errors, *self.errors]))
        if not self.checked:
            report.skipped["check after the repair"] = "it was cut short: the findings are those from before"
        return report
