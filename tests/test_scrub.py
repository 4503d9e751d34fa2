"""``kvlode scrub``: what it finds beside a writer, in which order it goes, what it remembers, how fast it reads and how it ends."""

from __future__ import annotations

import ast
import errno
import json
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvlode
from command import command_line, run_apart, run_here
from fsck_fixtures import FIXTURES, Fixture, Place, a_block, headers_of, place_of, uuid_of
from fsck_stores import ONE, TWO, StoreUnderTest, fill, in_folder, in_memory
from kvlode.engine.testing import ManualClock
from kvlode.format.checksum import xxh3_64
from kvlode.format.errors import DeviceError, InvalidConfig
from kvlode.format.layout import PAGE_BYTES, SCRUB_NAME, segment_name
from kvlode.gds.device import Device, DeviceFile, OpenMode
from kvlode.gds.faulty import Fault, FaultyDevice
from kvlode.gds.wrapping import WrappingDevice
from kvlode.tools.fsck.findings import ExitBit, Finding, Report
from kvlode.tools.fsck.options import Silence
from kvlode.tools.fsck.problems import Severity
from kvlode.tools.fsck.source import SegmentRef
from kvlode.tools.scrub.pace import BURST_S, Pace, PacedDevice, WaitingStop, parse_interval, parse_rate
from kvlode.tools.scrub.scrubber import Scrubber, ScrubOptions
from kvlode.tools.scrub.state import ScrubState, SegmentState

LEFT, OPERATIONAL, USAGE, INTERRUPTED = (int(bit) for bit in (ExitBit.LEFT, ExitBit.OPERATIONAL, ExitBit.USAGE, ExitBit.INTERRUPTED))
DAY_S = 86400.0


class Recorder:
    """``Output`` that remembers; ``after`` is called with each segment that was checked."""

    def __init__(self, after: Callable[[int], None] | None = None) -> None:
        self.findings: list[Finding] = []
        self.errors: list[str] = []
        self.remarks: list[str] = []
        self.order: list[int] = []
        self.incomplete: list[int] = []
        self._after = after

    def finding(self, finding: Finding) -> None:
        self.findings.append(finding)

    def error(self, text: str) -> None:
        self.errors.append(text)

    def remark(self, text: str) -> None:
        self.remarks.append(text)

    def segment(self, ref: SegmentRef, report: Report, left: int) -> None:
        self.order.append(ref.segment_id)
        if not report.coverage.complete:
            self.incomplete.append(ref.segment_id)
        if self._after is not None:
            self._after(ref.segment_id)


class ScriptedStop(WaitingStop):
    """Takes one step of a script instead of each wait, and asks for the end behind the last."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        super().__init__()
        self._steps = list(steps)

    def pause(self, seconds: float) -> bool:
        if self._steps:
            self._steps.pop(0)()
        else:
            self.interrupt()
        return not self.interrupted


def scrub(
    target: StoreUnderTest,
    *,
    recorder: Recorder | None = None,
    stop: WaitingStop | None = None,
    device: Device | None = None,
    once: bool = True,
) -> tuple[Recorder, Scrubber]:
    """One run in this process, at the time of the store's clock."""
    recorder = recorder or Recorder()
    options = ScrubOptions(once=once)
    stop = stop or WaitingStop()
    scrubber = Scrubber(device or target.device, target.path, options, recorder, Silence(), stop, target.clock.now_ns)
    try:
        scrubber.run()
    finally:
        scrubber.close()
    return recorder, scrubber


def state_of(target: StoreUnderTest) -> dict[int, SegmentState]:
    return ScrubState.load(target.device, target.path, uuid_of(target)).segments


def remember(target: StoreUnderTest, segments: dict[int, SegmentState]) -> None:
    state = ScrubState(uuid_of(target))
    state.segments = segments
    state.save(target.device, target.path)


def damage_payload(target: StoreUnderTest, place: Place) -> None:
    target.flip(target.segment_path(place.segment_id), place.offset + PAGE_BYTES + 5)


@pytest.fixture(scope="module")
def pristine() -> StoreUnderTest:
    return fill(in_memory())


@pytest.fixture
def target(pristine: StoreUnderTest) -> StoreUnderTest:
    return pristine.copy()


# --- what it finds ------------------------------------------------------------------------------------------------------


def test_a_healthy_store_is_clean_and_every_byte_of_it_is_checked(target: StoreUnderTest) -> None:
    recorder, scrubber = scrub(target)
    assert recorder.order == target.segment_ids() and not recorder.incomplete
    assert not recorder.findings and not recorder.errors and not recorder.remarks
    assert scrubber.exit_code() == 0 and scrubber.totals.bytes_checked > 10 * PAGE_BYTES
    report = target.check()
    assert not report.counts, "the state file is one of the store's own names"
    target.assert_serves_everything()


_IDS = ("PAY-", "REC-", "SEG-SEAL", "SEG-HDR-CRC", "SEG-CUT", "SEG-BLANK")
SEALED_FIXTURES = [case for case in FIXTURES if case.id.startswith(_IDS) and case.name != "in an open segment"]


@pytest.mark.parametrize("case", SEALED_FIXTURES, ids=str)
def test_it_finds_what_a_full_check_finds_in_the_segments(case: Fixture, target: StoreUnderTest) -> None:
    case.damage(target)
    expected = sorted(finding.text for finding in target.check().findings)
    recorder, scrubber = scrub(target)
    assert expected and sorted(finding.text for finding in recorder.findings) == expected
    assert recorder.order == target.segment_ids()
    problems = any(finding.problem.severity is not Severity.NOTE for finding in recorder.findings)
    assert scrubber.exit_code() == (LEFT if problems else 0)


def test_a_flipped_byte_is_found_while_a_writer_keeps_putting(tmp_path: Path) -> None:
    target = fill(in_folder(tmp_path / "store"))
    _, place = a_block(target, lambda header: header.stored_length > 8)
    store = target.open()
    halt, failures, rounds = threading.Event(), list[str](), list[int]()
    started = threading.Event()

    def write() -> None:
        number = 0
        while not halt.is_set() and number < 2000:
            status = store.namespace(ONE).put(b"more %d" % (number % 200), bytes(20_000 + number))
            if not status or not store.flush():
                failures.append(f"put {number}: {status}")
            number += 1
            rounds.append(number)
            if number == 10:
                started.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert started.wait(60.0)
        damage_payload(target, place)
        recorder, scrubber = scrub(target)
    finally:
        halt.set()
        writer.join(60.0)
        target.close(store)
        target.device.close()
    assert not failures and len(rounds) >= 10
    assert [(finding.id, finding.segment_id, finding.offset) for finding in recorder.findings] == [
        ("PAY-CRC", place.segment_id, place.offset)
    ]
    assert not recorder.errors and scrubber.exit_code() == LEFT


def test_zeros_are_damage_in_a_live_block_and_a_purge_in_a_deleted_one(target: StoreUnderTest) -> None:
    deleted = next(
        Place(segment_id, header)
        for segment_id in target.segment_ids()
        for header in headers_of(target, segment_id)
        if header.key == b"key 004"
    )
    _, live = a_block(target)  # before the zeros: a walk that knows no deletes ends there
    zeros = bytes(deleted.header.record_bytes)
    target.write(target.segment_path(deleted.segment_id), deleted.offset, zeros)
    recorder, scrubber = scrub(target)
    assert not recorder.findings and scrubber.exit_code() == 0
    assert state_of(target)[deleted.segment_id].findings == {}
    target.write(target.segment_path(live.segment_id), live.offset, bytes(live.header.record_bytes))
    recorder, scrubber = scrub(target)
    assert [(finding.id, finding.offset) for finding in recorder.findings] == [("REC-HDR-CRC", live.offset)]


def test_a_delete_that_a_writer_has_not_sealed_yet_explains_zeros_too(target: StoreUnderTest) -> None:
    block, place = a_block(target)
    store = target.open()
    try:
        assert store.namespace(block[0]).delete([block[1]]) and store.flush()
        target.write(target.segment_path(place.segment_id), place.offset, bytes(place.header.record_bytes))
        recorder, _ = scrub(target)
        assert not recorder.findings and target.segment_ids()[-1] not in recorder.order
    finally:
        target.close(store)


# --- order and memory ---------------------------------------------------------------------------------------------------


def test_damaged_segments_come_first_then_new_ones_then_the_least_recently_checked(target: StoreUnderTest) -> None:
    ids = target.segment_ids()
    assert len(ids) >= 5
    now_ns = target.clock.now_ns()
    target.clock.advance(DAY_S)
    times = {segment_id: SegmentState(now_ns - 1000 * number) for number, segment_id in enumerate(ids)}
    del times[ids[1]]
    times[ids[2]] = SegmentState(now_ns + 5, {"PAY-CRC": 1})
    times[ids[3]] = SegmentState(now_ns + 4, {}, unreadable=True)
    remember(target, times | {99_999: SegmentState(now_ns)})
    recorder, _ = scrub(target)
    rest = [segment_id for segment_id in reversed(ids) if segment_id not in (ids[1], ids[2], ids[3])]
    assert recorder.order == [ids[3], ids[2], ids[1], *rest]
    state = state_of(target)
    assert sorted(state) == ids, "segments that are gone are forgotten"
    assert {entry.checked_ns for entry in state.values()} == {target.clock.now_ns()}


def test_a_scrub_that_was_cut_short_goes_on_where_it_ended(target: StoreUnderTest) -> None:
    ids = target.segment_ids()
    stop = WaitingStop()
    first, scrubber = scrub(target, recorder=Recorder(lambda segment_id: stop.interrupt() if segment_id == ids[1] else None), stop=stop)
    assert first.order == ids[:2] and scrubber.exit_code() == INTERRUPTED
    second, _ = scrub(target, once=False, stop=ScriptedStop())
    assert second.order == ids[2:]


def test_damage_that_an_earlier_run_found_is_still_known(target: StoreUnderTest) -> None:
    _, place = a_block(target)
    damage_payload(target, place)
    scrub(target)
    recorder, scrubber = scrub(target, once=False, stop=ScriptedStop())
    assert recorder.order == [] and scrubber.exit_code() == LEFT | INTERRUPTED and scrubber.damaged_segments() == 1


def test_without_once_it_waits_until_something_is_due(target: StoreUnderTest) -> None:
    ids = target.segment_ids()
    recorder = Recorder()
    seen: list[int] = []

    def look() -> None:
        seen.append(len(recorder.order))

    def seal_more() -> None:
        look()
        store = target.open()
        for number in range(8):
            target.put(store, TWO, b"later %d" % number, number, 30_000)
        assert store.flush()
        target.close(store)

    def wait_a_week() -> None:
        look()
        target.clock.advance(7 * DAY_S)

    _, scrubber = scrub(target, recorder=recorder, stop=ScriptedStop(look, seal_more, look, wait_a_week, look), once=False)
    later = target.segment_ids()
    assert seen[:2] == [len(ids), len(ids)], "nothing new, nothing to do"
    assert len(later) > len(ids) and recorder.order == [*later, *later]
    assert seen[2:] == [len(later), len(later), 2 * len(later)]
    assert scrubber.interrupted and not recorder.findings


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: bytes([content[0] ^ 1]) + content[1:],
        lambda content: content + b"x",
        lambda content: b"",
        lambda content: bytes(len(content)),
        lambda content: summed(b"[1, 2]"),
        lambda content: summed(b"\xff\xfe"),
        lambda content: summed(content.splitlines()[0].replace(b'"schema": 1', b'"schema": 2')),
        lambda content: summed(content.splitlines()[0].replace(b'"PAY-CRC"', b'"PAY-NEW"')),
        lambda content: summed(b"[" * 100_000),
    ],
)
def test_a_state_file_that_is_not_right_is_begun_anew(spoil: Callable[[bytes], bytes], target: StoreUnderTest) -> None:
    ids = target.segment_ids()
    place = f"{target.path}/{SCRUB_NAME}"
    remember(target, {ids[-1]: SegmentState(1, {"PAY-CRC": 2})})
    assert list(state_of(target)) == [ids[-1]]
    target.replace(place, spoil(target.read(place)))
    assert state_of(target) == {}
    recorder, scrubber = scrub(target)
    assert recorder.order == ids and not recorder.remarks and scrubber.exit_code() == 0
    assert sorted(state_of(target)) == ids


def summed(line: bytes) -> bytes:
    return line + b"\n%016x\n" % xxh3_64(line)


def test_the_state_file_of_another_store_is_begun_anew(target: StoreUnderTest) -> None:
    other = ScrubState(bytes(range(16)))
    other.segments = {segment_id: SegmentState(target.clock.now_ns()) for segment_id in target.segment_ids()}
    other.save(target.device, target.path)
    recorder, _ = scrub(target, once=False, stop=ScriptedStop())
    assert recorder.order == target.segment_ids()


class ReadOnly(WrappingDevice):
    """Media that cannot be written to."""

    def _wrap(self, file: DeviceFile, path: str, mode: OpenMode) -> DeviceFile:
        if mode != "read":
            file.close()
            raise DeviceError("open", path, errno=errno.EROFS)
        return file

    def rename(self, source: str, target: str) -> None:
        raise DeviceError("rename", source, errno=errno.EROFS)

    def remove(self, path: str) -> None:
        raise DeviceError("remove", path, errno=errno.EROFS)


def test_on_media_that_can_only_be_read_it_says_once_that_nothing_is_remembered(target: StoreUnderTest) -> None:
    recorder, scrubber = scrub(target, device=ReadOnly(target.device))
    assert recorder.order == target.segment_ids() and len(recorder.remarks) == 1 and "remembered" in recorder.remarks[0]
    assert scrubber.exit_code() == 0 and state_of(target) == {}


# --- the drive, and segments that go ------------------------------------------------------------------------------------


class Vanishing(WrappingDevice):
    """Removes a segment as soon as something behind its first page is read."""

    def __init__(self, inner: Device, path: str) -> None:
        super().__init__(inner)
        self._path = path
        self.opened = 0

    def _wrap(self, file: DeviceFile, path: str, mode: OpenMode) -> DeviceFile:
        self.opened += path == self._path
        return file

    def status(self, path: str) -> Any:
        if path == self._path and self.opened == 2:  # the superblock's pass, then the segment's own
            self.inner.remove(path)
            self.opened += 1
        return super().status(path)


@pytest.mark.parametrize("once", [True, False])
def test_a_segment_that_vanishes_while_it_is_checked_is_no_problem(once: bool, target: StoreUnderTest) -> None:
    ids = target.segment_ids()
    damage_payload(target, next(Place(ids[0], header) for header in headers_of(target, ids[0]) if header.stored_length > 5))
    device = Vanishing(target.device, target.segment_path(ids[0]))
    recorder, scrubber = scrub(target, device=device, once=once, stop=ScriptedStop())
    assert recorder.order == ids[1:] and not recorder.findings and not recorder.errors
    assert scrubber.totals.vanished == 1 and scrubber.exit_code() & LEFT == 0
    assert sorted(state_of(target)) == ids[1:]


def test_what_cannot_be_read_is_an_error_and_comes_first_the_next_time(target: StoreUnderTest) -> None:
    ids = target.segment_ids()
    bad = target.segment_path(ids[2])
    device = FaultyDevice(target.device, [Fault("read", nth=4, times=None, where=lambda path: path == bad)])
    recorder, scrubber = scrub(target, device=device)
    assert recorder.order == ids and recorder.errors and segment_name(ids[2]) in recorder.errors[0]
    assert scrubber.exit_code() == OPERATIONAL and state_of(target)[ids[2]].unreadable
    recorder, scrubber = scrub(target)
    assert recorder.order[0] == ids[2] and scrubber.exit_code() == 0


# --- rate ---------------------------------------------------------------------------------------------------------------


class Waits:
    """A manual clock whose waits pass at once."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.waited_s = 0.0

    def pause(self, seconds: float) -> bool:
        self.waited_s += seconds
        self.clock.advance(seconds + 1e-9)
        return True


@pytest.mark.parametrize("seed", range(5))
def test_never_more_bytes_than_the_rate_allows(seed: int) -> None:
    print(f"seed {seed}")
    draw, waits = random.Random(seed), Waits()
    rate = draw.choice([1000, 1 << 20, 100 << 20])
    pace = Pace(rate, waits.clock.monotonic_s, waits.pause)
    taken: list[tuple[float, int]] = []
    for _ in range(300):
        if draw.random() < 0.2:
            waits.clock.advance(draw.uniform(0, 3 * BURST_S))
        size = draw.randrange(1, rate * 2)
        pace.take(size)
        taken.append((waits.clock.monotonic_s(), size))
    for first in range(0, 300, 7):
        total = 0
        for at_s, size in taken[first + 1 :]:
            total += size
            assert total <= rate * (at_s - taken[first][0] + BURST_S) * (1 + 1e-6)
    idle_free = sum(size for _, size in taken) / rate
    assert waits.waited_s <= idle_free * (1 + 1e-6), "and it does not wait for longer than the bytes are worth"


def test_a_whole_scrub_keeps_to_the_rate_and_none_does_not_wait(target: StoreUnderTest) -> None:
    waits = Waits()
    scrub(target, device=PacedDevice(target.device, Pace(1 << 20, waits.clock.monotonic_s, waits.pause)))
    assert waits.clock.monotonic_s() >= sum(len(target.read(target.segment_path(i))) for i in target.segment_ids()) / (1 << 20)
    unlimited = Waits()
    scrub(target, device=PacedDevice(target.device, Pace(None, unlimited.clock.monotonic_s, unlimited.pause)))
    assert unlimited.waited_s == 0


def test_an_interrupt_ends_a_wait_for_the_rate() -> None:
    stop, waits = WaitingStop(), list[float]()

    def pause(seconds: float) -> bool:
        waits.append(seconds)
        stop.interrupt()
        return stop.pause(seconds)

    Pace(1, ManualClock().monotonic_s, pause).take(1 << 40)
    assert len(waits) == 1 and not stop.pause(3600.0)


def test_rates_and_intervals_as_people_write_them() -> None:
    assert [parse_rate(text) for text in ("100MiB/s", "1.5GiB", "4096", " 20 mib/s ", "0", "none", "None", "0/s")] == [
        100 << 20, 3 << 29, 4096, 20 << 20, None, None, None, None,
    ]  # fmt: skip
    assert [parse_interval(text) for text in ("7d", "12h", "30min", "90s", "0.5 d")] == [7 * DAY_S, DAY_S / 2, 1800, 90, DAY_S / 2]
    for text in ("", "fast", "-1", "0.0", "5 parsecs", "1e9"):
        with pytest.raises(InvalidConfig, match="rate"):
            parse_rate(text)
    for text in ("", "7", "0s", "week", "-1d"):
        with pytest.raises(InvalidConfig, match="interval"):
            parse_interval(text)


# --- the command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[StoreUnderTest]:
    made = fill(in_folder(tmp_path / "store"))
    yield made
    made.device.close()


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_the_command_prints_findings_as_fsck_does(folder: StoreUnderTest) -> None:
    done = run_here("scrub", "--once", "--rate", "none", folder.path)
    assert done.code == 0 and done.err == "" and "(exit code 0)" in done.out and len(done.out.splitlines()) == 1
    place = place_of(folder, (ONE, b"key 000"))
    damage_payload(folder, place)
    done = run_here("scrub", "--once", "--rate", "none", folder.path)
    checked = run_here("fsck", "--full", folder.path)
    assert done.code == checked.code == LEFT
    assert done.out.splitlines()[0] == checked.out.splitlines()[0] and done.out.startswith("damage   PAY-CRC: ")
    done = run_here("scrub", "--once", "--rate", "none", "--json", folder.path)
    lines = lines_of(done.out)
    assert {line["schema"] for line in lines} == {1} and [line["type"] for line in lines[:2]] == ["problem", "segment"]
    assert lines[0]["id"] == "PAY-CRC" and lines[1]["counts"] == {"PAY-CRC": 1} and lines[0]["segment"] == lines[1]["segment"]
    assert [line["left"] for line in lines[1:-1]] == list(reversed(range(len(folder.segment_ids()))))
    assert lines[-1]["type"] == "summary" and lines[-1]["exit_code"] == LEFT and lines[-1]["segments_damaged"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_with_a_summary(number: signal.Signals, folder: StoreUnderTest) -> None:
    process = subprocess.Popen(command_line("scrub", "--json", folder.path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line).get("left") == 0:
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == INTERRUPTED and err == ""
    summary = lines_of(out)[-1]
    assert summary["type"] == "summary" and summary["interrupted"] and summary["segments_checked"] == len(folder.segment_ids())


def test_a_kill_loses_at_most_the_segment_in_progress(folder: StoreUnderTest) -> None:
    words = command_line("scrub", "--json", "--rate", "200KiB/s", folder.path)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        told = [json.loads(process.stdout.readline())["segment"] for _ in range(2)]
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    kept = [f"{segment_id:016x}" for segment_id in state_of(folder)]
    assert told[0] in kept and set(kept) >= set(told[:-1])
    again = lines_of(run_here("scrub", "--once", "--json", folder.path).out)
    order = [line["segment"] for line in again if line["type"] == "segment"]
    assert order[-len(kept) :] == kept, "those that were checked are the last to be checked again"
    assert not run_here("fsck", folder.path).code


def test_requests_that_cannot_work_are_one_line_and_usage(folder: StoreUnderTest, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"something")
    for words in ((tmp_path / "empty",), (tmp_path / "absent",), (tmp_path / "file",), (), (folder.path, "--rate", "x"),
                  (folder.path, "--interval", "soon"), (folder.path, "--nonsense")):  # fmt: skip
        done = run_here("scrub", "--once", *words)
        assert done.code == USAGE and done.out == "" and len(done.err.splitlines()) == 1 and done.err.startswith("kvlode: "), words


def test_a_store_of_which_nothing_can_be_told_is_damage(folder: StoreUnderTest) -> None:
    folder.write(folder.superblock_path, 0, b"another!")
    for segment_id in folder.segment_ids():
        folder.replace(folder.segment_path(segment_id), bytes(PAGE_BYTES))
    done = run_apart("scrub", "--once", folder.path)
    assert done.code == LEFT | OPERATIONAL and "SB-VERSION" in done.out and "Traceback" not in done.err


def test_a_folder_that_cannot_be_read_is_an_operational_error(target: StoreUnderTest) -> None:
    device = FaultyDevice(target.device, [Fault("list_folder", errno=errno.EACCES)])
    with pytest.raises(DeviceError, match="list_folder"):
        scrub(target, device=device)


def test_scrub_reads_with_format_and_gds_alone() -> None:
    root = Path(kvlode.__file__).resolve().parent / "tools"
    wrong = [
        f"{path.name}:{node.lineno}"
        for path in [root / "scrub_cli.py", *sorted((root / "scrub").glob("*.py"))]
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and "engine" in (node.module or "").split("."))
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] in ("rocksdict", "kvlode") for alias in node.names))
    ]
    assert not wrong


def test_an_interrupt_wakes_all_readers_that_wait_for_the_rate() -> None:
    stop = WaitingStop()
    pace = Pace(1, ManualClock().monotonic_s, stop.pause)
    readers = [threading.Thread(target=pace.take, args=(1 << 30,), daemon=True) for _ in range(5)]
    for reader in readers:
        reader.start()
    stop.interrupt()
    for reader in readers:
        reader.join(10.0)
    assert not any(reader.is_alive() for reader in readers)
