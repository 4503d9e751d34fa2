"""The scenario of ``fsck --repair`` for the sweep of faults: a check, the repair, and the check behind it, on a drive that fails."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from faults.sweep import FaultyIndex, Scenario, World
from fsck_fixtures import FIXTURES, Lost, healthy
from fsck_stores import StoreUnderTest
from kvlode.gds.memory import MemoryDevice
from kvlode.tools.fsck.findings import ExitBit, Report
from kvlode.tools.fsck.options import CheckOptions, Level
from kvlode.tools.fsck.repair import repair_store
from kvlode.tools.fsck.run import check_store
from kvlode.tools.index_access import GivenSource

DAMAGED = ("IDX-DANGLING-no segment", "REC-HDR-CRC-tombstone", "REC-GAP-without a table", "SEG-HDR-CRC", "SEG-NAME")
"""Every kind of action in one repair."""


@functools.cache
def damaged() -> tuple[StoreUnderTest, Lost]:
    """A store that needs a repair, and the blocks that no repair brings back."""
    target = healthy()
    by_name = {str(case): case for case in FIXTURES}
    lost = set().union(*(by_name[name].damage(target) for name in DAMAGED))
    return target, lost


@dataclass
class Repair:
    """One run's own state."""

    target: StoreUnderTest
    """On the failing device."""
    source: GivenSource
    lost: Lost
    report: Report | None = None


def _start(device: Any) -> Repair:
    original, lost = damaged()
    assert original.index is not None
    index = FaultyIndex(device, dict(original.index.scan()))
    copied = dataclasses.replace(original, device=device, index=index, blocks=dict(original.blocks), gone=set(original.gone))
    return Repair(copied, GivenSource(device, copied.path, index), lost)


def _fsck(target: StoreUnderTest, source: GivenSource) -> Report:
    """What ``kvlode fsck --full --repair=lossy --yes`` does."""
    now_ns = target.clock.now_ns()
    options = CheckOptions(level=Level.FULL, now_ns=now_ns)
    report = check_store(target.device, target.path, options, source)
    return repair_store(target.device, target.path, report, options, source, lossy=True, now_ns=now_ns)


def _act(world: World) -> None:
    state: Repair = world.state
    state.report = world.attempt(lambda: _fsck(state.target, state.source))
    if state.report is not None and state.report.errors and not world.struck:
        world.wrong(f"errors without a fault: {state.report.errors}")


def _verify(world: World) -> None:
    """What it said was true, and a repair on the healthy drive finishes without having lost anything more."""
    state: Repair = world.state
    assert isinstance(world.memory, MemoryDevice)
    target = dataclasses.replace(state.target, device=world.memory.crash(keep="all"))
    source = GivenSource(target.device, target.path, state.source.index)
    if state.report is not None and state.report.exit_code in (ExitBit.CLEAN, ExitBit.REPAIRED):
        found = check_store(target.device, target.path, CheckOptions(level=Level.FULL, now_ns=target.clock.now_ns()), source)
        if found.exit_code != ExitBit.CLEAN:
            world.wrong(f"the repair said all is well: {[finding.text for finding in found.findings][:3]} {found.errors}")
    again = _fsck(target, source)
    if again.errors or again.undone or again.exit_code not in (ExitBit.CLEAN, ExitBit.REPAIRED):
        world.wrong(f"a second repair does not finish: {again.errors} {again.undone} {[finding.text for finding in again.findings][:3]}")
    target.index = source.index  # type: ignore[assignment]
    try:
        target.assert_serves_everything(but=state.lost)
    except AssertionError as error:
        world.wrong(f"after the repair: {error}")


def _drive() -> MemoryDevice:
    device = damaged()[0].device
    assert isinstance(device, MemoryDevice)
    return device


REPAIR = Scenario("fsck-repair", _drive, _start, _act, _verify, runs=20)
