"""Statistics that a running store publishes, and what other processes make of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvlode
from command import run_here
from kvlode.engine.stats import Counters
from kvlode.engine.stats_file import FILES_MAX, StatsFile, file_bytes_max, folder_bytes_max, is_alive, own_process, read_stats
from kvlode.engine.testing import ManualClock
from rig import Rig, eventually

MIB = 1 << 20
CHILD = """
import sys, kvlode
store = kvlode.open(sys.argv[1], capacity="64MiB", buffer="8MiB", gds="off")
print("open", flush=True)
sys.stdin.readline()
store.close()
"""


def open_small(folder: Path) -> kvlode.DiskStore:
    return kvlode.open(folder, capacity="64MiB", buffer="8MiB", gds="off")


def stats_of(value: int) -> dict[str, Any]:
    return {"role": "writer", "value": value}


def file_in(folder: Path, stats: dict[str, Any], *, follower: bool = False, capacity_bytes: int = 64 * MIB) -> tuple[StatsFile, Counters]:
    counters = Counters()
    return StatsFile(str(folder), lambda: stats, counters, follower=follower, capacity_bytes=capacity_bytes), counters


def test_a_running_store_is_seen_from_outside_and_gone_after_a_clean_close(tmp_path: Path) -> None:
    store = open_small(tmp_path / "store")
    assert eventually(lambda: bool(read_stats(tmp_path / "store")))
    (published,) = read_stats(tmp_path / "store")
    assert (published.role, published.pid, published.alive, published.running) == ("writer", os.getpid(), True, True)
    assert published.stats["store_uuid"] == store.stats()["store_uuid"]
    assert 0 <= published.age_s < 60
    assert store.close()
    assert read_stats(tmp_path / "store") == []
    assert os.listdir(tmp_path / "store" / "stats") == []


def test_what_is_published_follows_the_store(tmp_path: Path) -> None:
    with open_small(tmp_path / "store") as store:
        space = store.namespace(
            kvlode.Namespace(model="m", revision="1", dtype="uint8", layout="x", tokens_per_block=16, block_bytes_max=MIB)
        )
        assert space.put(b"key", np.zeros(MIB, np.uint8))
        assert eventually(lambda: any(p.stats["counters"].get("put_blocks") == 1 for p in read_stats(tmp_path / "store")))


def test_a_killed_process_is_told_as_gone_and_a_later_writer_takes_its_place(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path / "store"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    assert child.stdout.readline() == b"open\n"
    assert eventually(lambda: bool(read_stats(tmp_path / "store")))
    assert [(p.pid, p.alive) for p in read_stats(tmp_path / "store")] == [(child.pid, True)]
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()
    (published,) = read_stats(tmp_path / "store")
    assert (published.pid, published.alive, published.running) == (child.pid, False, False)
    with open_small(tmp_path / "store"):
        assert eventually(lambda: [p.pid for p in read_stats(tmp_path / "store")] == [os.getpid()])


def test_followers_publish_beside_the_writer(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path / "store"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    assert child.stdout.readline() == b"open\n"
    with kvlode.follow(tmp_path / "store", gds="off"):
        assert eventually(lambda: [p.role for p in read_stats(tmp_path / "store")] == ["writer", "follower"])
        assert [p.pid for p in read_stats(tmp_path / "store")] == [child.pid, os.getpid()]
        assert run_here("fsck", tmp_path / "store", "--live").code == 0
    assert [p.role for p in read_stats(tmp_path / "store")] == ["writer"]
    child.communicate(b"\n", timeout=60)
    assert read_stats(tmp_path / "store") == []


def test_the_folder_may_be_deleted_under_a_running_store(tmp_path: Path) -> None:
    with open_small(tmp_path / "store") as store:
        assert eventually(lambda: bool(read_stats(tmp_path / "store")))
        (tmp_path / "store" / "stats" / "writer.json").unlink()
        assert eventually(lambda: bool(read_stats(tmp_path / "store")))
        assert store.flush()
    assert run_here("fsck", tmp_path / "store").code == 0


def test_fsck_takes_no_offence_at_statistics_that_were_left(tmp_path: Path) -> None:
    open_small(tmp_path / "store").close()
    leave_dead_file(tmp_path / "store")
    done = run_here("fsck", tmp_path / "store")
    assert done.code == 0, done.out
    assert "stats" not in done.out


def leave_dead_file(store: Path) -> None:
    """Statistics of a process that does not exist: this one's id, another time of start."""
    file, _ = file_in(store, stats_of(1))
    file.publish()
    path = store / "stats" / "writer.json"
    document = json.loads(path.read_text())
    document["process"]["started_ticks"] += 1
    path.write_text(json.dumps(document))


def test_an_id_that_was_given_again_is_not_the_process(tmp_path: Path) -> None:
    leave_dead_file(tmp_path)
    assert [p.alive for p in read_stats(tmp_path)] == [False]


@pytest.mark.parametrize("field", ["boot", "space"])
def test_a_process_of_elsewhere_is_judged_by_age(field: str, tmp_path: Path) -> None:
    assert is_alive(own_process()) is True
    assert is_alive(own_process() | {field: "another"}) is None
    file, _ = file_in(tmp_path, stats_of(1))
    file.publish()
    path = tmp_path / "stats" / "writer.json"
    document = json.loads(path.read_text())
    document["process"][field] = "another"
    path.write_text(json.dumps(document))
    assert [(p.alive, p.running) for p in read_stats(tmp_path)] == [(None, True)]
    path.write_text(json.dumps(document | {"written_at_s": time.time() - 3600}))
    assert [(p.alive, p.running) for p in read_stats(tmp_path)] == [(None, False)]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"null", b'{"version":1}', b"\xff\xfe", b'{"version":99,"process":{},"stats":{}}']
)
def test_a_file_that_holds_no_statistics_is_left_out(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "stats").mkdir()
    (tmp_path / "stats" / "writer.json").write_bytes(content)
    (tmp_path / "stats" / "strange").write_bytes(content)
    assert read_stats(tmp_path) == []


def test_no_store_and_no_folder_tell_nothing(tmp_path: Path) -> None:
    assert read_stats(tmp_path / "nothing") == []
    (tmp_path / "file").write_text("")
    assert read_stats(tmp_path / "file") == []


def test_what_cannot_be_written_is_counted_and_raises_nothing(tmp_path: Path) -> None:
    (tmp_path / "stats").write_text("a file in the place of the folder")
    file, counters = file_in(tmp_path, stats_of(1))
    file.publish()
    file.publish()
    file.remove()
    assert counters.get("stats_file_errors") >= 2


def test_statistics_that_cannot_be_had_are_counted_and_raise_nothing(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("closed")

    counters = Counters()
    StatsFile(str(tmp_path), fail, counters, follower=False, capacity_bytes=64 * MIB).publish()
    assert counters.get("stats_file_errors") == 1


@pytest.mark.parametrize("capacity_bytes", [4 * MIB, 16 * MIB, 64 * MIB, 1 << 40])
def test_files_stay_within_their_size(capacity_bytes: int, tmp_path: Path) -> None:
    decisions = [{"at_s": number, "event": "segment_freed", "reason": "room"} for number in range(2000)]
    spaces = {f"{number:032x}": {"model": "m" * 50} for number in range(3000)}
    file, counters = file_in(tmp_path, {"decisions": decisions, "namespaces": spaces, "value": 1}, capacity_bytes=capacity_bytes)
    file.publish()
    size_bytes = (tmp_path / "stats" / "writer.json").stat().st_size
    assert size_bytes <= file_bytes_max(capacity_bytes) <= folder_bytes_max(capacity_bytes) // FILES_MAX
    (published,) = read_stats(tmp_path)
    assert published.stats["value"] == 1 and published.stats["cut_short"] is True
    assert counters.get("stats_file_errors") == 0


def test_the_latest_decisions_are_the_ones_that_stay(tmp_path: Path) -> None:
    decisions = [{"at_s": number, "event": "segment_freed", "reason": "room " * 20} for number in range(1000)]
    file, _ = file_in(tmp_path, {"decisions": decisions, "namespaces": {"a": {}}})
    file.publish()
    (published,) = read_stats(tmp_path)
    assert published.stats["decisions"][-1]["at_s"] == 999
    assert 0 < len(published.stats["decisions"]) < 1000 and "cut_short" not in published.stats


def test_a_store_too_small_for_a_page_publishes_nothing(tmp_path: Path) -> None:
    file, counters = file_in(tmp_path, stats_of(1), capacity_bytes=4 * MIB - 1)
    file.publish()
    assert not (tmp_path / "stats").exists() and counters.get("stats_file_errors") == 0


def test_a_crowd_of_followers_stays_within_the_folder(tmp_path: Path) -> None:
    files = [file_in(tmp_path, stats_of(number), follower=True)[0] for number in range(FILES_MAX + 3)]
    for file in files:
        file.publish()
    writer, _ = file_in(tmp_path, stats_of(-1))
    writer.publish()
    assert len(os.listdir(tmp_path / "stats")) + 1 <= FILES_MAX
    assert read_stats(tmp_path)[0].role == "writer"
    for file in [*files, writer]:
        file.remove()
    assert os.listdir(tmp_path / "stats") == []


def test_what_dead_processes_left_is_taken_away(tmp_path: Path) -> None:
    leave_dead_file(tmp_path)
    dead = (tmp_path / "stats" / "writer.json").read_bytes()
    (tmp_path / "stats" / "follower-77.json").write_bytes(dead)
    (tmp_path / "stats" / "follower-78.json.new").write_bytes(dead[:50])
    file, _ = file_in(tmp_path, stats_of(2))
    file.publish()
    assert os.listdir(tmp_path / "stats") == ["writer.json"]
    assert [p.stats["value"] for p in read_stats(tmp_path)] == [2]


def test_a_store_on_a_device_that_was_handed_in_publishes_nothing() -> None:
    rig = Rig(ManualClock(), capacity=16 * MIB, buffer=4 * MIB, segment_bytes=MIB)
    assert rig.memory.status(f"{rig.store.path}/stats") is None and not os.path.exists(f"{rig.store.path}/stats")
    rig.close()
