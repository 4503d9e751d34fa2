"""``kvlode stat``, ``inspect``, ``doctor``, ``version``: what they print of real stores, damaged ones, and folders that are none."""

from __future__ import annotations

import json
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


def segment_file(folder: Path) -> Path:
    return sorted((folder / "segments").glob("*.seg"))[0]


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
        assert [segment["sealed"] for segment in answer["segments"]] == [False]
        assert space.put(b"other", b"1")
        assert store.flush()


def test_inspect_goes_from_the_store_to_a_segment_to_a_record(folder: Path) -> None:
    store = as_json("inspect", folder)
    assert store["segments_left_out"] == 0
    segment = as_json("inspect", folder, "--segment", store["segments"][0]["segment"])
    assert as_json("inspect", segment_file(folder))["rows"] == segment["rows"]
    block = next(row for row in segment["rows"] if bytes.fromhex(row["key"]) == b"two 3")
    record = as_json("inspect", folder, "--segment", segment["segment"], "--record", block["offset"])
    assert record["problem"] is None
    assert bytes.fromhex(record["record"]["key"]) == b"two 3"
    assert sum(stripe["stored_length"] for stripe in record["stripes"]) <= record["record"]["stored_length"]
    assert len(bytes.fromhex(record["page_hex"])) == 4096
    shown = run("inspect", folder, "--segment", segment["segment"], "--record", block["offset"])
    assert shown.returncode == 0
    assert "header and all stripes match their checksums" in shown.stdout
    assert f"{block['offset']:08x}  89 4b 56" in shown.stdout


def test_inspect_limits_its_rows_and_says_so(folder: Path) -> None:
    shown = run("inspect", segment_file(folder), "--limit", 2)
    assert "more records (--limit)" in shown.stdout
    assert len(as_json("inspect", segment_file(folder), "--limit", 2)["rows"]) == 2


def test_a_damaged_record_is_shown_with_its_damage(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "segments").mkdir(parents=True)
    (copy / "STORE").write_bytes((folder / "STORE").read_bytes())
    data = bytearray(segment_file(folder).read_bytes())
    rows = as_json("inspect", segment_file(folder))["rows"]
    offset = next(row["offset"] for row in rows if row["record_type"] == "block")
    data[offset + 4096 + 10] ^= 1
    (copy / "segments" / segment_file(folder).name).write_bytes(data)
    answer = as_json("inspect", copy, "--segment", 1, "--record", offset, code=1)
    assert "stripe-checksum" in answer["problem"]
    data[offset + 20] ^= 1
    (copy / "segments" / segment_file(folder).name).write_bytes(data)
    answer = as_json("inspect", copy, "--segment", 1, "--record", offset, code=1)
    assert answer["record"] is None and answer["problem"]


def test_a_truncated_segment_shows_the_records_that_are_left(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "segments").mkdir(parents=True)
    (copy / "STORE").write_bytes((folder / "STORE").read_bytes())
    rows = as_json("inspect", segment_file(folder))["rows"]
    cut = rows[4]["offset"]
    (copy / "segments" / segment_file(folder).name).write_bytes(segment_file(folder).read_bytes()[:cut])
    done = run("inspect", copy, "--segment", 1, "--json")
    answer = json.loads(done.stdout.splitlines()[-1])
    assert not answer["sealed"]
    assert [row["offset"] for row in answer["rows"]] == [row["offset"] for row in rows[:4]]


@pytest.mark.parametrize("command", ["stat", "inspect"])
def test_a_folder_that_is_no_store_is_one_clear_line(command: str, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "STORE").write_bytes(b"something else" * 400)
    for path in (tmp_path / "foreign", tmp_path / "absent", tmp_path):
        done = run(command, path)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
        assert str(path) in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--segment", "zz"), "hex"),
        (("--segment", "77"), "no such segment"),
        (("--segment", "1", "--record", "5"), "4096"),
        (("--record", "4096"), "--segment"),
    ],
)
def test_questions_that_have_no_answer_say_what_would(folder: Path, options: tuple[str, ...], word: str) -> None:
    done = run("inspect", folder, *options)
    assert done.returncode == 2
    assert word in done.stderr


def test_doctor_looks_at_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    done = run("doctor", tmp_path / "later" / "store", "--json")
    answer = json.loads(done.stdout.splitlines()[-1])
    assert {"file system", "O_DIRECT", "free space", "memlock"} <= {finding["name"] for finding in answer["findings"]}
    assert done.returncode == int(any(finding["level"] == "problem" for finding in answer["findings"]))
    assert list(tmp_path.iterdir()) == []
    assert "O_DIRECT" in run("doctor", tmp_path).stdout


def test_version_names_package_and_format() -> None:
    answer = as_json("version")
    assert answer["kvlode"] == kvlode.__version__
    assert answer["format"] == 1
    assert answer["kvlode"] in run("version").stdout
