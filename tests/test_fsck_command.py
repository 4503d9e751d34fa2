"""``kvlode fsck`` as people and scripts meet it: exit codes, JSON lines, interrupts, and input that cannot be checked."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvlode
from fsck_stores import ONE, StoreUnderTest, fill, in_folder
from kvlode.format.layout import PAGE_BYTES
from kvlode.tools.fsck.findings import ExitBit, Finding, Report
from kvlode.tools.fsck.problems import PROBLEMS
from kvlode.tools.fsck.show import LINES_PER_PROBLEM, report_lines

COMMAND = [sys.executable, "-c", "from kvlode.tools.cli import main; main()", "fsck"]


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own, without a terminal."""
    words = [*COMMAND, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL, check=False, **options)


def as_json(*arguments: object, code: int) -> list[dict[str, Any]]:
    done = run(*arguments, "--json")
    assert done.returncode == code, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_one_line(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One clear line and the right exit code."""
    assert done.returncode == code, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("kvlode: "), done.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def target(tmp_path: Path) -> Iterator[StoreUnderTest]:
    made = fill(in_folder(tmp_path / "store"))
    yield made
    made.device.close()


def test_a_clean_store_is_zero_and_every_byte(target: StoreUnderTest) -> None:
    done = run("--full", target.path)
    assert done.returncode == 0 and done.stderr == ""
    assert "every byte" in done.stdout and "clean (exit code 0)" in done.stdout
    assert run(target.path).returncode == run("--quick", target.path).returncode == run("--sample", "1/2", target.path).returncode == 0


def test_json_lines_have_their_schema_and_end_with_the_summary(target: StoreUnderTest) -> None:
    segment_id = target.segment_ids()[0]
    target.flip(target.segment_path(segment_id), 2 * PAGE_BYTES + 3)
    lines = as_json(target.path, "--full", code=int(ExitBit.LEFT))
    assert {line["schema"] for line in lines} == {1}
    assert {line["type"] for line in lines[:-1]} == {"progress", "problem"}
    summary = lines[-1]
    assert summary["type"] == "summary" and summary["exit_code"] == ExitBit.LEFT
    assert summary["bytes_checked"] == summary["bytes_present"] and summary["complete"]
    problems = [line for line in lines if line["type"] == "problem"]
    assert {problem["id"]: 1 for problem in problems} == summary["counts"]
    problem = problems[0]
    assert problem["id"] in PROBLEMS and problem["severity"] == PROBLEMS[problem["id"]].severity
    assert problem["segment"] == f"{segment_id:016x}" and problem["path"] == f"segments/{segment_id:016x}.seg"
    assert isinstance(problem["offset"], int) and problem["text"] and problem["repair"]


def test_progress_as_json_goes_to_standard_error(target: StoreUnderTest) -> None:
    done = run(target.path, "--progress-json")
    assert done.returncode == 0 and "clean" in done.stdout
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert {line["type"] for line in lines} == {"progress"} and {line["pass"] for line in lines} >= {"record walk"}


def test_bars_are_drawn_on_a_terminal_and_gone_at_the_end(target: StoreUnderTest) -> None:
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [*COMMAND, target.path], stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=100, stdin=subprocess.DEVNULL, check=False
        )
        os.close(theirs)
        drawn = b""
        while part := _read(ours):
            drawn += part
    finally:
        os.close(ours)
    assert done.returncode == 0 and "clean" in done.stdout and "\x1b" not in done.stdout
    assert b"\x1b[2K" in drawn


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # nobody has the other side any more
        return b""


def test_explanations_need_no_store() -> None:
    assert run("--explain", "PAY-CRC").stdout.startswith("PAY-CRC (damage)")
    assert all(name in run("--explain", "all").stdout for name in ("SB-CRC", "QUA-SIZE"))
    assert_one_line(run("--explain", "NOPE"), int(ExitBit.USAGE), "NOPE")


# --- what cannot be checked -------------------------------------------------------------------------------------------------


def test_requests_that_make_no_sense_are_usage_errors(target: StoreUnderTest, tmp_path: Path) -> None:
    usage = int(ExitBit.USAGE)
    assert_one_line(run(), usage, "no path")
    assert_one_line(run("--quick", "--full", target.path), usage, "--full")
    assert_one_line(run("--sample", "0%", target.path), usage, "0%")
    assert_one_line(run("--nonsense", target.path), usage, "--nonsense")
    assert_one_line(run("--repair=perhaps", target.path), usage, "perhaps")
    assert_one_line(run("--repair", target.path), usage, "--yes")
    assert_one_line(run("--repair", "--yes", "--live", target.path), usage, "--live")
    assert_one_line(run("--repair", "--yes", target.segment_path(1)), usage, "segment")


def test_what_is_no_store_is_a_usage_error_with_a_summary_in_json(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"something")
    assert_one_line(run(tmp_path / "empty"), int(ExitBit.USAGE), "empty")
    assert_one_line(run(tmp_path / "absent"), int(ExitBit.USAGE), "absent")
    assert_one_line(run(tmp_path / "file"), int(ExitBit.USAGE), "not a kvlode store")
    lines = as_json(tmp_path / "absent", code=int(ExitBit.USAGE))
    assert lines[-1]["type"] == "summary" and lines[-1]["errors"]


def test_a_store_in_use_is_an_operational_error_with_a_summary(target: StoreUnderTest) -> None:
    store = kvlode.open(target.path, capacity="64MiB", buffer="8MiB")
    try:
        assert store.namespace(ONE).put(b"another", bytes(5000)) and store.flush()
        done = run(target.path)
        assert_one_line(done, int(ExitBit.OPERATIONAL), "--live")
        assert done.stdout == ""
        summary = as_json(target.path, code=int(ExitBit.OPERATIONAL))[-1]
        assert summary["type"] == "summary" and "--live" in summary["errors"][0]
        live = run("--live", "--full", target.path)
        assert live.returncode == 0, live.stdout
        assert "running writer" in live.stdout
    finally:
        store.close()
    assert run(target.path).returncode == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission_are_an_operational_error(target: StoreUnderTest) -> None:
    os.chmod(target.segment_path(1), 0)
    done = run(target.path)
    assert done.returncode & ExitBit.OPERATIONAL and "Permission denied" in done.stdout


def test_huge_and_empty_segments_are_one_line_each(target: StoreUnderTest) -> None:
    newest = target.segment_ids()[-1]
    Path(target.segment_path(newest + 1)).write_bytes(b"")
    with open(target.segment_path(newest + 2), "wb") as file:
        file.truncate(5 << 30)
    summary = as_json(target.path, "--full", code=0)[-1]
    assert summary["counts"] == {"SEG-EMPTY": 2} and summary["complete"]
    assert run("--full", target.segment_path(newest + 2)).returncode == 0


def test_a_reader_of_the_output_that_goes_away_is_no_traceback(target: StoreUnderTest) -> None:
    for number in range(40):
        (Path(target.path) / f"stranger {number}").write_text("x" * 100)
    process = subprocess.Popen([*COMMAND, target.path, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(100) in (0, ExitBit.OPERATIONAL)
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


def test_a_text_from_the_store_cannot_write_to_the_terminal(target: StoreUnderTest) -> None:
    (Path(target.path) / "evil\x1b[2J").write_text("x")
    done = run(target.path)
    assert "\x1b" not in done.stdout and "SPC-STRANGE" in done.stdout


SLOW_READS = """
import sys, time
from kvlode.gds import posix
inner = posix.PosixFile.read
def read(self, offset, buffers):
    print("reading", file=sys.stderr, flush=True)
    time.sleep(0.05)
    return inner(self, offset, buffers)
posix.PosixFile.read = read
from kvlode.tools.cli import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [1, 5, 12])
def test_a_signal_ends_the_check_with_a_summary(number: signal.Signals, after: int, target: StoreUnderTest) -> None:
    command = [sys.executable, "-c", SLOW_READS, "fsck", "--full", "--json", target.path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    for _ in range(after):
        assert process.stderr.readline() == "reading\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    summary = json.loads(out.splitlines()[-1])
    assert process.returncode == summary["exit_code"] == ExitBit.INTERRUPTED, out + err
    assert summary["interrupted"] and "interrupted" in summary["skipped"].values()
    assert "Traceback" not in err


def test_the_time_can_be_limited(target: StoreUnderTest) -> None:
    summary = as_json("--full", "--max-duration", "0", target.path, code=int(ExitBit.INTERRUPTED))[-1]
    assert set(summary["skipped"].values()) == {"the time was up"} and not summary["interrupted"]
    done = run("--max-duration", "0", target.path)
    assert "out of time" in done.stdout and "clean" not in done.stdout


def test_a_repair_is_asked_for_shown_and_done(target: StoreUnderTest) -> None:
    (Path(target.path) / "segments" / "stranger").write_bytes(b"x")
    assert run(target.path).returncode == ExitBit.LEFT
    done = run("--repair", "--yes", target.path)
    assert done.returncode == ExitBit.REPAIRED, done.stdout + done.stderr
    assert "1. segments/stranger" in done.stdout and "done: " in done.stdout
    assert run(target.path).returncode == 0
    target.assert_serves_everything()


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_repair_that_nobody_agreed_to_shows_its_plan_and_touches_nothing(extra: list[str], target: StoreUnderTest) -> None:
    stranger = Path(target.path) / "segments" / "stranger"
    stranger.write_bytes(b"x")
    done = run("--repair", *extra, target.path)
    assert done.returncode == ExitBit.USAGE, done.stdout + done.stderr
    assert "1. segments/stranger" in (done.stderr if extra else done.stdout)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("kvlode: ") and "--yes" in last and stranger.exists()


# --- text -------------------------------------------------------------------------------------------------------------------


def test_many_findings_of_one_id_are_cut_and_counted() -> None:
    report = Report("/store", "walk")
    for number in range(LINES_PER_PROBLEM + 7):
        report.add(Finding("SEG-NAME", f"segments/{number}"))
    lines = list(report_lines(report, report.exit_code))
    assert sum("SEG-NAME: segments/" in line for line in lines) == LINES_PER_PROBLEM
    assert any("and 7 more" in line for line in lines)


def test_one_is_one_and_more_are_many() -> None:
    report = Report("/store", "walk", errors=["an error"])
    report.add(Finding("SEG-NAME", "segments/0"))
    assert "1 problem, 1 error (exit code 12)" in list(report_lines(report, report.exit_code))
    report.add(Finding("SEG-NAME", "segments/1"))
    assert "2 problems, 1 error (exit code 12)" in list(report_lines(report, report.exit_code))


def test_an_unreadable_index_is_described_once(target: StoreUnderTest) -> None:
    (Path(target.path) / "index" / "CURRENT").write_bytes(b"nonsense")
    text = next(line for line in run(target.path).stdout.splitlines() if "IDX-UNREADABLE" in line)
    assert text.count("cannot be opened") == 1 and "; at " not in text
