"""Repairs end to end: a store in a folder with RocksDB, damaged, repaired by the ``kvlode fsck`` command, opened again."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fsck_fixtures import FIXTURES, Lost, a_block, blocks_in
from fsck_stores import StoreUnderTest, fill, in_folder
from kvlode.engine.index_rocksdb import RocksIndex
from kvlode.format.layout import INDEX_FOLDER, QUARANTINE_FOLDER
from kvlode.tools.fsck.findings import ExitBit

BY_NAME = {str(case): case.damage for case in FIXTURES}
TIMEOUT_S = 100.0
COMMAND = [sys.executable, "-c", "from kvlode.tools.cli import main; main()", "fsck"]
STOPS_AFTER_EACH_COPY = """
import sys
from kvlode.tools.fsck.quarantine import Quarantine
inner = Quarantine.save
def save(*arguments):
    saved = inner(*arguments)
    print("saved", file=sys.stderr, flush=True)
    sys.stdin.readline()
    return saved
Quarantine.save = save
from kvlode.tools.cli import main
main()
"""
"""The command, waiting for a line on standard input whenever something was copied into quarantine."""


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreUnderTest]:
    made = fill(in_folder(tmp_path_factory.mktemp("fsck") / "store"), blocks=18)
    yield made
    made.device.close()


@pytest.fixture
def target(pristine: StoreUnderTest, tmp_path: Path) -> StoreUnderTest:
    """A copy in a folder of its own."""
    place = tmp_path / "store"
    shutil.copytree(pristine.path, place)
    return StoreUnderTest(
        pristine.device, str(place), None, pristine.clock, dict(pristine.options), dict(pristine.blocks), set(pristine.gone)
    )


def fsck(target: StoreUnderTest, *options: str) -> tuple[int, dict[str, object]]:
    """Run the command; its exit code and the summary."""
    command = [*COMMAND, *options, "--json", target.path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return done.returncode, json.loads(lines[-1])


def drop_an_entry(target: StoreUnderTest) -> Lost:
    block, _ = a_block(target)
    index = RocksIndex(Path(target.path) / INDEX_FOLDER)
    index.apply((), [block[0].digest + block[1]])
    index.sync()
    index.close()
    return set()


def remove_the_index(target: StoreUnderTest) -> Lost:
    shutil.rmtree(Path(target.path) / INDEX_FOLDER)
    return set()


def spoil_the_index(target: StoreUnderTest) -> Lost:
    (Path(target.path) / INDEX_FOLDER / "CURRENT").write_bytes(b"nothing that RocksDB would write\n")
    return set()


def lose_a_segment(target: StoreUnderTest) -> Lost:
    """The file of one segment is gone: entries dangle."""
    _, place = a_block(target)
    lost = blocks_in(target, place.segment_id)
    os.remove(target.segment_path(place.segment_id))
    return lost


DAMAGES: dict[str, Callable[[StoreUnderTest], Lost]] = {
    "a missing superblock": BY_NAME["SB-MISSING"],
    "a damaged superblock": BY_NAME["SB-CRC"],
    "a damaged block": BY_NAME["PAY-CRC"],
    "a damaged header": BY_NAME["REC-HDR-CRC-block"],
    "a damaged tombstone": BY_NAME["REC-HDR-CRC-tombstone"],
    "a damaged trailer": BY_NAME["SEG-SEAL-CRC-trailer"],
    "no seal": BY_NAME["SEG-SEAL-MISSING"],
    "a foreign file": BY_NAME["SEG-ALIEN"],
    "an entry lost": drop_an_entry,
    "no index": remove_the_index,
    "a broken index": spoil_the_index,
    "a segment lost": lose_a_segment,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_command_repairs_a_store_in_a_folder(name: str, target: StoreUnderTest) -> None:
    lost = DAMAGES[name](target)
    assert target.check().exit_code == ExitBit.LEFT
    code, done = fsck(target, "--full", "--repair=lossy", "--yes")
    assert code == ExitBit.REPAIRED, done
    code, clean = fsck(target, "--full")
    assert code == ExitBit.CLEAN, clean
    target.assert_serves_everything(but=lost)
    assert target.check().exit_code == ExitBit.CLEAN


def test_without_a_terminal_a_repair_needs_yes_and_nothing_is_touched(target: StoreUnderTest) -> None:
    BY_NAME["PAY-CRC"](target)
    before = {path: path.stat().st_mtime_ns for path in Path(target.path).rglob("*") if path.name != "LOCK"}
    code, _ = fsck(target, "--full", "--repair=lossy")
    assert code & ExitBit.USAGE
    assert {path: path.stat().st_mtime_ns for path in Path(target.path).rglob("*") if path.name != "LOCK"} == before


@pytest.mark.parametrize(("answer", "repaired"), [(b"y\n", True), (b"n\n", False)])
def test_on_a_terminal_the_plan_is_shown_and_asked_about(answer: bytes, repaired: bool, target: StoreUnderTest) -> None:
    BY_NAME["SEG-SEAL-CRC-trailer"](target)
    ours, theirs = pty.openpty()
    command = [*COMMAND, "--repair", target.path]
    try:
        process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        os.write(ours, answer)
        out, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        os.close(ours)
        os.close(theirs)
    assert b"1. segments/" in out and b"Carry this out?" in errors
    assert process.returncode == (ExitBit.REPAIRED if repaired else ExitBit.LEFT)
    kept = list((Path(target.path) / QUARANTINE_FOLDER).iterdir())
    assert bool(kept) is repaired


def test_a_process_killed_in_a_repair_leaves_a_store_that_a_further_repair_finishes(target: StoreUnderTest) -> None:
    """Killed between the copy of what is replaced and the replacing."""
    lost = BY_NAME["PAY-CRC"](target)
    command = [sys.executable, "-c", STOPS_AFTER_EACH_COPY, "fsck", "--full", "--repair=lossy", "--yes", "--json", target.path]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert any(line == b"saved\n" for line in process.stderr)
    process.kill()
    process.communicate(timeout=TIMEOUT_S)
    assert list((Path(target.path) / QUARANTINE_FOLDER).iterdir())
    code, done = fsck(target, "--full", "--repair=lossy", "--yes")
    assert code == ExitBit.REPAIRED, done
    target.assert_serves_everything(but=lost)


def test_a_signal_in_a_repair_ends_it_behind_the_action_and_says_what_is_left(target: StoreUnderTest) -> None:
    first = BY_NAME["SEG-SEAL-MISSING"](target)
    target.flip(target.segment_path(target.segment_ids()[-1]), 50)
    command = [sys.executable, "-c", STOPS_AFTER_EACH_COPY, "fsck", "--full", "--repair", "--yes", "--json", target.path]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert any(line == b"saved\n" for line in process.stderr)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(b"\n" * 100, timeout=TIMEOUT_S)
    summary = json.loads(out.splitlines()[-1])
    assert process.returncode == summary["exit_code"] and process.returncode & ExitBit.INTERRUPTED
    assert not process.returncode & ExitBit.OPERATIONAL
    assert summary["actions"] and summary["undone"]
    code, done = fsck(target, "--full", "--repair", "--yes")
    assert code == ExitBit.REPAIRED, done
    target.assert_serves_everything(but=first)
