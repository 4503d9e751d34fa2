"""A repair that is cut short anywhere, by a power cut, an error or an interrupt: the store is consistent, and a further repair finishes.

Consistent: it opens, every block that was whole is served byte for byte, and what was deleted stays deleted.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
from collections.abc import Callable
from typing import Literal

import pytest

from fsck_fixtures import FIXTURES, Fixture, Lost, changing_index, healthy, source_of, unseal
from fsck_stores import ONE, StoreUnderTest, in_memory
from kvlode import Status
from kvlode.engine.index_memory import MemoryIndex
from kvlode.format.errors import DeviceError, FormatError, StoreLocked, device_error
from kvlode.format.superblock import Superblock
from kvlode.gds.device import Device
from kvlode.gds.memory import MemoryDevice
from kvlode.tools.fsck.findings import ExitBit, Report
from kvlode.tools.fsck.options import CheckOptions, Level
from kvlode.tools.fsck.repair import repair_store
from kvlode.tools.index_access import GivenSource
from tapping import CHANGES, TappingDevice

BY_NAME = {str(case): case for case in FIXTURES}
CHOSEN = [
    "SB-CRC",
    "SB-MISSING",
    "SEG-HDR-CRC",
    "SEG-ALIEN",
    "SEG-UNSEALED",
    "SEG-SEAL-CRC-table",
    "SEG-SEAL-CRC-trailer",
    "SEG-CUT",
    "REC-HDR-CRC-block",
    "REC-HDR-CRC-last block of a segment",
    "REC-HDR-CRC-tombstone",
    "REC-GAP-without a table",
    "PAY-CRC",
]
"""One of each way to write."""
TOGETHER = ["IDX-DANGLING-no record", "REC-HDR-CRC-tombstone", "REC-GAP-without a table", "SEG-HDR-CRC", "SEG-NAME"]
"""Damaged all at once, with two lost entries and a lost seal: every kind of action on segments and index in one repair."""


def damage_together(target: StoreUnderTest) -> Lost:
    """The entry of a block behind the gap is added again. The one before it may have been deleted by what is lost: it is given up."""
    unseal(target, target.segment_ids()[3])
    changing_index(target, deletes=[ONE.digest + b"key 012", ONE.digest + b"key 002"])
    return {(ONE, b"key 002")}.union(*(BY_NAME[name].damage(target) for name in TOGETHER))


ALL_AT_ONCE = Fixture("SEG-NAME", "and much else", damage_together)
CASES = [*(BY_NAME[name] for name in CHOSEN), ALL_AT_ONCE]
FEW = [BY_NAME["SB-CRC"], ALL_AT_ONCE]
"""Together, all kinds of action."""
PARTS = 4
"""The operations of a repair are dealt out to so many tests, so that they can run side by side."""


@pytest.fixture(scope="module")
def pristine() -> StoreUnderTest:
    """Five segments: every state of a repair is looked at several times."""
    return healthy(blocks=18)


@dataclasses.dataclass
class Damaged:
    """A damaged store before its repair."""

    target: StoreUnderTest
    source: GivenSource
    lost: Lost
    first: Report
    hidden: Lost = dataclasses.field(default_factory=set)
    """Not served as it is; some of them come back by the repair."""

    def copy(self) -> Damaged:
        """The same on a device of its own."""
        target = self.target.copy()
        index = None if self.source.index is None else target.index
        return dataclasses.replace(self, target=target, source=GivenSource(target.device, target.path, index))

    def repair(self, device: Device, first: Report | None = None) -> Report:
        options = CheckOptions(level=Level.FULL, now_ns=self.target.clock.now_ns())
        now_ns = self.target.clock.now_ns()
        done = repair_store(device, self.target.path, first or self.first, options, self.source, lossy=True, now_ns=now_ns)
        self.target.index = self.source.index  # type: ignore[assignment]
        return done


def damaged(case: Fixture, pristine: StoreUnderTest) -> Damaged:
    target = pristine.copy()
    lost = case.damage(target)
    source = source_of(case, target)
    return Damaged(target, source, lost, target.check(source=source), unserved(target) or lost)


def unserved(target: StoreUnderTest) -> Lost | None:
    """Blocks that the store does not serve as it is now; ``None`` when it does not open because of its superblock."""
    try:
        Superblock.parse(target.read(target.superblock_path))
    except (FormatError, DeviceError):
        return None
    copy = target.copy()
    store = copy.open()
    try:
        return {block for block, status in copy.statuses(store).items() if status is not Status.HIT}
    finally:
        copy.close(store)


def assert_consistent(target: StoreUnderTest, lost: Lost, hidden: Lost) -> None:
    """It serves what it served before, and a further repair finishes."""
    now = unserved(target)
    assert now is None or now <= hidden | lost, f"served before and not now: {sorted(key for _, key in now - hidden - lost)}"
    again = target.copy()
    source = GivenSource(again.device, again.path, again.index)
    case = Damaged(again, source, lost, again.check(source=source))
    done = case.repair(again.device)  # its report is that of a full check behind it
    assert not done.errors and not done.undone
    assert done.exit_code & ~ExitBit.REPAIRED == ExitBit.CLEAN, [finding.text for finding in done.findings]
    again.assert_serves_everything(but=lost)


def fingerprint(device: MemoryDevice, index: MemoryIndex) -> bytes:
    """The same for drives and indexes that hold the same."""
    seen = hashlib.blake2b()
    for path, content in device._names.files():
        seen.update(f"{path} {content.size_bytes}".encode())
        for page in sorted(content.pages):
            seen.update(page.to_bytes(8, "little") + content.pages[page])
    for key, value in index.scan():
        seen.update(key + value)
    return seen.digest()


def operations_of(case: Damaged) -> list[str]:
    """What the whole repair does to the device."""
    seen: list[str] = []
    one = case.copy()
    assert one.repair(TappingDevice(one.target.device, lambda operation, _: seen.append(operation))).actions
    return seen


@pytest.mark.parametrize("keep", ["none", pytest.param("random", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_power_may_be_cut_at_any_operation(case: Fixture, keep: Literal["none", "random"], pristine: StoreUnderTest, seed: int) -> None:
    one = damaged(case, pristine)
    drive = one.target.device
    assert isinstance(drive, MemoryDevice)
    states: list[tuple[str, MemoryDevice, MemoryIndex]] = []
    known: set[bytes] = set()

    def cut(operation: str, path: str) -> None:
        if operation in CHANGES:
            index = one.source.index
            assert isinstance(index, MemoryIndex)
            after, entries = drive.crash(seed + len(known), keep), index.crash(0)
            print_of = fingerprint(after, entries)
            if print_of not in known:
                states.append((f"before {operation} of {path}", after, entries))
            known.add(print_of)

    done = one.repair(TappingDevice(drive, cut))
    assert done.actions and states
    for number, (moment, device, index) in enumerate(states):
        after = dataclasses.replace(one.target, device=device, index=index)
        try:
            assert_consistent(after, one.lost, one.hidden)
        except AssertionError as error:
            raise AssertionError(f"power cut {number}, {moment}, seed {seed + number}: {error}") from error


def failing(nth: int, times: int | None, code: int) -> Callable[[str, str], None]:
    """Fail the nth change, and the ones after it."""
    seen = 0

    def tap(operation: str, path: str) -> None:
        nonlocal seen
        if operation in CHANGES:
            seen += 1
            if seen >= nth and (times is None or seen < nth + times):
                raise device_error(operation, path, OSError(code, "injected"))

    return tap


@pytest.mark.parametrize(
    ("times", "code"), [(1, errno.EIO), pytest.param(None, errno.ENOSPC, marks=pytest.mark.exhaustive)], ids=["once", "full"]
)
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("case", FEW, ids=str)
def test_any_operation_may_fail(case: Fixture, part: int, times: int | None, code: int, pristine: StoreUnderTest) -> None:
    start = damaged(case, pristine)
    for nth in range(1 + part, sum(operation in CHANGES for operation in operations_of(start)) + 1, PARTS):
        one = start.copy()
        done = one.repair(TappingDevice(one.target.device, failing(nth, times, code)))
        assert done.errors and done.undone, f"change {nth} failed and nothing was said"
        assert done.exit_code & ExitBit.OPERATIONAL
        assert bool(done.exit_code & ExitBit.REPAIRED) == bool(done.actions)
        assert_consistent(one.target, one.lost, one.hidden)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("case", FEW, ids=str)
def test_an_interrupt_may_come_between_any_two_operations(case: Fixture, part: int, pristine: StoreUnderTest) -> None:
    start = damaged(case, pristine)
    operations = operations_of(start)
    step = max(1, len(operations) // 10)
    moments = [n for n, operation in enumerate(operations) if operation in CHANGES or n % step == 0]
    for moment in moments[part::PARTS]:
        one = start.copy()
        left = moment

        def interrupt(operation: str, path: str) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                raise KeyboardInterrupt

        done = one.repair(TappingDevice(one.target.device, interrupt))
        assert done.interrupted and done.exit_code & ExitBit.INTERRUPTED, f"operation {moment}"
        assert done.undone or done.actions or moment == 0
        assert_consistent(one.target, one.lost, one.hidden)


@pytest.mark.parametrize("name", ["IDX-ORPHAN", "IDX-DANGLING-no segment"])
def test_an_index_that_refuses_changes_is_an_error_and_a_further_repair_finishes(name: str, pristine: StoreUnderTest) -> None:
    one = damaged(BY_NAME[name], pristine)
    assert one.target.index is not None
    one.target.index.fail_next_apply()
    done = one.repair(one.target.device)
    assert done.errors and done.undone and not done.actions and done.exit_code == ExitBit.LEFT | ExitBit.OPERATIONAL
    assert_consistent(one.target, one.lost, one.hidden)


def test_a_store_in_use_is_not_repaired() -> None:
    target = in_memory()
    report = target.check()
    store = target.open()
    try:
        with pytest.raises(StoreLocked, match="in use"):
            repair_store(target.device, target.path, report, CheckOptions(), None, lossy=True, now_ns=1)
    finally:
        target.close(store)


def test_the_lock_is_free_again_after_a_repair_that_failed(pristine: StoreUnderTest) -> None:
    one = damaged(BY_NAME["PAY-CRC"], pristine)
    one.repair(TappingDevice(one.target.device, failing(1, None, errno.EIO)))
    lock = one.target.device.lock(f"{one.target.path}/LOCK")
    assert lock is not None
    lock.release()
