"""``kvlode stat``, ``doctor``, ``version``: what they print of real stores, damaged ones, and folders that are none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvlode
from model import block_bytes, descriptor

MIB = 1 << 20
BLOCKS = 6


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    command = [sys.executable, "-c", "from kvlode.tools.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL, check=False)


def as_json(*arguments: object, code: int = 0) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.returncode == code, done.stdout + done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(answer, dict)
    return answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed store with two namespaces and one deleted block."""
    path = tmp_path_factory.mktemp("tools") / "store"
    with kvlode.open(path, capacity="256MiB", buffer="16MiB") as store:
        for name in ("one", "two"):
            space = store.namespace(descriptor(name))
            keys = [b"%s %d" % (name.encode(), i) for i in range(BLOCKS)]
            assert all(space.submit_put(keys, [block_bytes(key, i, 100_000) for i, key in enumerate(keys)]).statuses)
        assert store.flush()
        assert space.delete([keys[0]]) == 1
        assert store.flush()
    return path


def test_stat_counts_what_is_in_the_log(folder: Path) -> None:
    answer = as_json("stat", folder)
    assert answer["records"]["block"] == 2 * BLOCKS
    assert answer["records"]["tombstone"] == 1
    assert sorted(space["model"] for space in answer["namespaces"]) == ["one", "two"]
    assert answer["raw_bytes"] == 2 * BLOCKS * 100_000
    assert answer["segments"] == answer["segments_sealed"] == 1
    assert answer["allocated_bytes"] >= answer["stored_bytes"] > 0
    assert answer["problems"] == []


def test_stat_and_inspect_work_beside_a_running_writer(tmp_path: Path) -> None:
    with kvlode.open(tmp_path / "store", capacity="256MiB", buffer="16MiB") as store:
        space = store.namespace(descriptor())
        assert space.put(b"key", np.arange(50_000, dtype=np.uint8))
        assert store.flush()
        assert as_json("stat", tmp_path / "store")["records"]["block"] == 1
        answer = as_json("inspect", tmp_path / "store")
        assert [segment["state"] for segment in answer["rows"]] == ["open"]
        assert answer["writer"] is True
        assert space.put(b"other", b"1")
        assert store.flush()


@pytest.mark.parametrize("command", ["stat", "inspect"])
def test_a_folder_that_is_no_store_is_one_clear_line(command: str, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "STORE").write_bytes(b"something else" * 400)
    for path in (tmp_path / "foreign", tmp_path / "absent", tmp_path):
        done = run(command, path)
        assert done.returncode == 16
        assert len(done.stderr.strip().splitlines()) == 1
        assert str(path) in done.stderr
        assert "Traceback" not in done.stderr


def test_doctor_looks_at_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    done = run("doctor", tmp_path / "later" / "store", "--json")
    answer = json.loads(done.stdout.splitlines()[-1])
    assert {"file system", "O_DIRECT", "free space", "memlock"} <= {finding["name"] for finding in answer["findings"]}
    assert done.returncode == 4 * any(finding["level"] == "problem" for finding in answer["findings"])
    assert list(tmp_path.iterdir()) == []
    assert "O_DIRECT" in run("doctor", tmp_path).stdout


def test_version_names_package_and_format() -> None:
    answer = as_json("version")
    assert answer["kvlode"] == kvlode.__version__
    assert answer["format"] == 1
    assert answer["kvlode"] in run("version").stdout


def test_closed_standard_streams_are_no_traceback(folder: Path) -> None:
    for words in (["version"], ["stat", folder], ["fsck", folder], ["inspect", folder], ["--help"]):
        command = [sys.executable, "-c", "from kvlode.tools.cli import main; main()", *map(str, words)]
        done = subprocess.run(
            ["sh", "-c", 'exec "$@" <&- >&-', "sh", *command], stderr=subprocess.PIPE, text=True, timeout=100, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_in_the_place_of_a_segment_is_named(kind: str, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    place = copy / "segments" / "00000000000000ff.seg"
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    answer = as_json("stat", copy, code=4)
    assert any(place.name in problem and "not a regular file" in problem for problem in answer["problems"])
    assert answer["records"]["block"] == 2 * BLOCKS
    assert [row["state"] for row in as_json("inspect", copy, code=4)["rows"]] == ["sealed", "unreadable"]
