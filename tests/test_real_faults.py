"""The real thing: full and failing file systems, images of a drive without power, processes killed at named points. Root for mounts."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvlode
from faults.real import Mounts, Unavailable, copy_image, fill, run
from kvlode import DeviceError, DiskStore, KvlodeError, PutState, Refusal, Status
from kvlode.engine.catalog import Catalog
from kvlode.engine.index import IndexWriteError
from kvlode.engine.index_rocksdb import RocksIndex
from kvlode.engine.stats import Counters
from kvlode.engine.stats_file import StatsFile
from model import block_bytes, descriptor
from rig import KIB, MIB, eventually

TESTS = Path(__file__).parent
KILLED = TESTS / "faults" / "killed.py"
SIZE = 200_000
OPTIONS: dict[str, Any] = {"capacity": "2GiB", "buffer": "8MiB", "segment_bytes": 2 * MIB, "serve_clean": False, "put_timeout_s": 5.0}
WAIT_S = 60.0


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    """Mounts that are undone whatever happens; a machine that cannot mount skips."""
    made = Mounts(tmp_path)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def skip_where_unavailable() -> Iterator[None]:
    try:
        yield
    except Unavailable as error:
        pytest.skip(str(error))


def space_of(store: DiskStore) -> kvlode.BlockSpace:
    return store.namespace(descriptor(block_bytes_max=256 * KIB))


def put(store: DiskStore, number: int) -> kvlode.PutStatus:
    """Put a block that does not compress."""
    return space_of(store).put(b"%d" % number, block_bytes(b"%d" % number, 4 * number, SIZE))


def status_of(store: DiskStore, number: int) -> Status:
    """The status of a block that ``put`` made; a hit is compared byte for byte."""
    out = np.full(SIZE, 0xA5, np.uint8)
    status = space_of(store).get_into(b"%d" % number, out)
    if status is Status.HIT:
        assert np.array_equal(out, block_bytes(b"%d" % number, 4 * number, SIZE)), f"block {number}: wrong bytes"
    return status


def assert_says(error: KvlodeError, *words: str) -> None:
    for word in words:
        assert word in str(error), f"{word!r} is not in: {error}"


# --- full file systems -------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_a_file_system_smaller_than_the_capacity_is_a_smaller_cache(mounts: Mounts) -> None:
    with skip_where_unavailable():
        place = mounts.tmpfs("small", 48 * MIB)
    with kvlode.open(place / "store", **OPTIONS) as store:
        for number in range(500):
            assert put(store, number), f"block {number}"
            if number % 20 == 19:
                assert store.flush(WAIT_S)
        counters = store.stats()["counters"]
        assert counters["no_space_errors"] > 0 and counters["segments_freed"] > 0
        found = [status_of(store, number) for number in range(500)]
        assert set(found) == {Status.HIT, Status.MISS}
        assert found[-20:] == [Status.HIT] * 20
        assert store.stats()["failure"] is None
    with kvlode.open(place / "store", **OPTIONS) as store:
        assert [status_of(store, number) for number in range(480, 500)] == [Status.HIT] * 20
        assert put(store, 500) and store.flush(WAIT_S)


@pytest.mark.root
def test_a_file_system_that_others_fill_refuses_puts_and_recovers(mounts: Mounts) -> None:
    with skip_where_unavailable():
        place = mounts.tmpfs("shared", 64 * MIB)
    with kvlode.open(place / "store", **OPTIONS) as store:
        for number in range(20):
            assert put(store, number)
        assert store.flush(WAIT_S)
        ballast = fill(place)
        refused: set[Refusal | None] = set()
        for number in range(20, 120):
            refused.add(put(store, number).reason)
            if refused & {Refusal.NO_SPACE}:
                break
            store.flush(WAIT_S)
        for number in range(120):
            assert status_of(store, number) in (Status.HIT, Status.MISS)
        ballast.unlink()
        assert eventually(lambda: bool(put(store, 1000)), 60.0), "room came back, puts did not"
        assert eventually(lambda: store.flush(WAIT_S), 60.0)
        assert status_of(store, 1000) is Status.HIT
        assert store.stats()["failure"] is None
    with kvlode.open(place / "store", **OPTIONS) as store:
        assert status_of(store, 1000) is Status.HIT


@pytest.mark.root
def test_a_store_on_a_full_file_system_opens_by_giving_up_its_oldest_blocks_or_says_what_is_missing(mounts: Mounts) -> None:
    with skip_where_unavailable():
        place = mounts.tmpfs("full", 64 * MIB)
    with kvlode.open(place / "store", **OPTIONS) as store:
        for number in range(100):
            assert put(store, number)
        assert store.flush(WAIT_S)
    ballast = fill(place)
    try:
        with kvlode.open(place / "store", **OPTIONS) as store:
            assert {status_of(store, number) for number in range(100)} <= {Status.HIT, Status.MISS}
            assert status_of(store, 99) is Status.HIT, "the newest blocks were given up before the oldest"
    except KvlodeError as error:
        assert_says(error, str(place), "No space left")
    ballast.unlink()
    with kvlode.open(place / "store", **OPTIONS) as store:
        assert status_of(store, 99) is Status.HIT
        assert put(store, 200) and store.flush(WAIT_S)
        assert status_of(store, 200) is Status.HIT


@pytest.mark.root
def test_a_new_store_on_a_full_file_system_says_so_and_leaves_nothing_in_the_way(mounts: Mounts) -> None:
    with skip_where_unavailable():
        place = mounts.tmpfs("full", 32 * MIB)
    ballast = fill(place)
    with pytest.raises((KvlodeError, OSError)) as caught, kvlode.open(place / "store", **OPTIONS) as store:
        assert put(store, 1)
        assert not store.flush(WAIT_S), "a block is durable on a file system without room"
        raise DeviceError("flush", place, errno=28)
    assert "No space left" in str(caught.value) and str(place) in str(caught.value)
    ballast.unlink()
    with kvlode.open(place / "store", **OPTIONS) as store:
        assert put(store, 1) and store.flush(WAIT_S)


@pytest.mark.root
def test_an_index_without_room_is_served_from_memory_and_catches_up(mounts: Mounts, tmp_path: Path) -> None:
    with kvlode.open(tmp_path / "store", **OPTIONS):
        pass
    shutil.copytree(tmp_path / "store" / "index", tmp_path / "index")
    with skip_where_unavailable():
        mounts.cover(tmp_path / "store" / "index", 48 * MIB)  # RocksDB goes on when its write buffer, 16 MiB, is free
    shutil.copytree(tmp_path / "index", tmp_path / "store" / "index", dirs_exist_ok=True)
    space_of_small = descriptor("small", block_bytes_max=4 * KIB)
    with kvlode.open(tmp_path / "store", **OPTIONS) as store:
        assert put(store, 0) and store.flush(WAIT_S)
        ballast = fill(tmp_path / "store" / "index")
        space = store.namespace(space_of_small)
        number = 0
        while not store.stats()["index"]["waiting_changes"]:
            for _ in range(100):
                number += 1
                assert space.put(b"%0200d" % number, b"%d" % number), number
            assert store.flush(WAIT_S), "the index is derived data: its trouble loses no block"
            assert number < 20_000, "the index never ran out of room"
        assert store.stats()["failure"] is None
        assert store.stats()["counters"]["index_write_errors"] > 0
        for key in (1, number // 2, number):
            out = bytearray(len(b"%d" % key))
            assert space.get_into(b"%0200d" % key, out) is Status.HIT and out == b"%d" % key
        assert space.delete([b"%0200d" % 1]) == 1 and store.flush(WAIT_S)
        ballast.unlink()
        assert eventually(lambda: store.stats()["index"]["waiting_changes"] == 0, 60.0), "the index did not catch up"
        assert space.contains([b"%0200d" % 1, b"%0200d" % 2, b"%0200d" % number]) == [False, True, True]
    with kvlode.open(tmp_path / "store", **OPTIONS) as store:
        space = store.namespace(space_of_small)
        assert space.contains([b"%0200d" % 1, b"%0200d" % 2, b"%0200d" % number]) == [False, True, True]
        assert status_of(store, 0) is Status.HIT


# --- failing drives ---------------------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("mount_options", ["", "data=journal"])
def test_a_sync_that_the_drive_fails_is_no_success_and_loses_nothing_that_was_flushed(mounts: Mounts, mount_options: str) -> None:
    """The drive is a sparse file on a full file system: buffered writes are accepted, the sync fails, the next one would succeed."""
    with skip_where_unavailable():
        below = mounts.tmpfs("below", 80 * MIB)
        place = mounts.ext4("drive", below / "image", size_bytes=512 * MIB, options=mount_options)
    store = kvlode.open(place / "store", **(OPTIONS | {"capacity": "400MiB"}))
    for number in range(30):
        assert put(store, number)
    assert store.flush(WAIT_S)
    ballast = fill(below)
    late = []
    for number in range(30, 400):
        if put(store, number).state is not PutState.ACCEPTED:
            break
        late.append(number)
        if not store.flush(WAIT_S):
            break
    assert store.stats()["failure"], "the drive did not fail"
    assert not store.flush(WAIT_S), "a sync was tried again and believed"
    assert put(store, 1000).reason is Refusal.STORE_FAILED
    assert status_of(store, late[-1]) is Status.HIT, "a block that is only in memory cannot be read"
    store.close(WAIT_S)
    ballast.unlink()
    with contextlib.suppress(Unavailable):  # a journal that could not be written makes this fail; the device is let go all the same
        mounts.undo_last(2)
    subprocess.run(["e2fsck", "-fy", below / "image"], capture_output=True, check=False)
    place = mounts.ext4("again", below / "image")
    with kvlode.open(place / "store", **(OPTIONS | {"capacity": "400MiB"})) as store:
        assert [status_of(store, number) for number in range(30)] == [Status.HIT] * 30
        assert {status_of(store, number) for number in late} <= {Status.HIT, Status.MISS}
        assert put(store, 2000) and store.flush(WAIT_S)
        assert status_of(store, 2000) is Status.HIT


@pytest.mark.root
def test_a_drive_that_lost_its_end_gives_io_errors_and_never_wrong_bytes(
    mounts: Mounts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StatsFile, "publish", lambda _: None)  # a write behind the end would make the image whole again, with zeros
    image = tmp_path / "image"
    with skip_where_unavailable():
        place = mounts.ext4("drive", image, size_bytes=256 * MIB)
    with kvlode.open(place / "store", **(OPTIONS | {"capacity": "200MiB"})) as store:
        for number in range(400):
            assert put(store, number)
        assert store.flush(WAIT_S)
        whole = [status_of(store, number) for number in range(400)]
        assert whole == [Status.HIT] * 400
        os.truncate(image, 40 * MIB)
        found = [status_of(store, number) for number in range(400)]
        assert set(found) == {Status.HIT, Status.IO_ERROR}, "a read that failed is an I/O error, nothing is dropped for it"
        assert store.stats()["counters"]["read_errors"] > 0
        os.truncate(image, 256 * MIB)  # zeros where blocks were
        for number in range(400):
            assert status_of(store, number) is (Status.HIT if found[number] is Status.HIT else Status.CORRUPT)
        store.close(WAIT_S)


@pytest.mark.root
def test_an_index_whose_log_could_not_be_synced_goes_on_when_there_is_room(mounts: Mounts, tmp_path: Path) -> None:
    """RocksDB never writes again after such a sync; the write that found no room alone it gets over by itself."""
    with skip_where_unavailable():
        place = mounts.tmpfs("index", 48 * MIB)
    with contextlib.closing(RocksIndex(place / "index")) as index:
        catalog = Catalog(index, Counters())
        assert catalog.change({b"synced": b"1", b"deleted": b"1"}) and catalog.sync()
        assert catalog.change({b"not synced": b"2", b"deleted": None})
        ballast = fill(place)
        with pytest.raises(IndexWriteError):
            while True:
                index.apply([(b"filler", bytes(4 * KIB))])
        assert not catalog.sync()
        assert not catalog.sync(), "there is no room to open it again"
        looked_up = [b"synced", b"not synced", b"deleted"]
        assert catalog.values(looked_up) == [b"1", b"2", None]
        ballast.unlink()
        assert catalog.sync()
        assert catalog.values(looked_up) == [b"1", b"2", None]
        assert catalog.change({b"later": b"3"}) and catalog.sync()
    with contextlib.closing(RocksIndex(place / "index")) as index:
        assert index.get_many([*looked_up, b"later"]) == [b"1", b"2", None, b"3"]


# --- power cuts and kills ------------------------------------------------------------------------------------------------------


def lines_of(journal: Path) -> list[dict[str, Any]]:
    text = journal.read_text() if journal.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def check_promises(store: DiskStore, lines: list[dict[str, Any]], *, lossy_before: int = 0) -> int:
    """Compare the store with what flushes promised; blocks of the first lines may have been reclaimed. How many hits."""
    hits = 0
    for position, line in enumerate(lines):
        for name, version, size in line["kept"]:
            key, out = b"%d" % version, np.full(size, 0xA5, np.uint8)
            status = store.namespace(descriptor(name, block_bytes_max=256 * KIB)).get_into(key, out)
            if status is Status.HIT:
                assert np.array_equal(out, block_bytes(key, version, size)), f"{name} {version}: wrong bytes"
                hits += 1
            else:
                assert status is Status.MISS and position < lossy_before, f"{name} {version}: flushed, and now {status.name}"
        for name, version, _ in line["deleted"]:
            space = store.namespace(descriptor(name, block_bytes_max=256 * KIB))
            assert space.contains([b"%d" % version]) == [False], f"{name} {version} was deleted and is back"
    return hits


def reclaimable(lines: list[dict[str, Any]], room_bytes: int) -> int:
    """How many of the first lines a store with this room may have reclaimed by now."""
    for position in range(len(lines) - 1, -1, -1):
        room_bytes -= sum(size for _, _, size in [*lines[position]["kept"], *lines[position]["deleted"]])
        if room_bytes < 0:
            return position + 1
    return 0


@contextlib.contextmanager
def writer(mode: str, folder: Path, journal: Path, options: dict[str, Any], *rest: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(KILLED), mode, str(folder), str(journal), json.dumps(options), *map(str, rest)]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stderr is not None
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait(30)
        process.stdout.close()
        process.stderr.close()


ROOMY: dict[str, Any] = {"capacity": "512MiB", "buffer": "4MiB", "segment_bytes": MIB, "put_timeout_s": 10.0, "flush_after_s": 0.01}
SMALL = ROOMY | {"capacity": 16 * MIB}
POINTS = [
    (f"{when}:{operation}", nth)
    for operation in ("write", "sync", "sync_folder", "rename", "preallocate", "truncate", "index_apply", "index_sync", "remove")
    for when in ("before", "after")
    for nth in (1, 2, 9)
]
SOME_POINTS = POINTS[1::12] + POINTS[11::12]
"""Each operation once."""


def die_and_check(tmp_path: Path, point: str, nth: int) -> None:
    lossy = point.endswith("remove")
    options = SMALL if lossy else ROOMY
    folder, journal = tmp_path / "store", tmp_path / "journal"
    folder.mkdir()
    with writer("point", folder, journal, options, point, nth) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, f"it did not die at {point} {nth}: {errors}"
    lines = lines_of(journal)
    for lose_index in (False, True):
        if lose_index:
            shutil.rmtree(folder / "index")
        with kvlode.open(folder, **options) as store:
            hits = check_promises(store, lines, lossy_before=max(0, len(lines) - 2) if lossy else 0)
            assert hits or not any(line["kept"] for line in lines)
            assert put(store, lose_index + 5) and store.flush(WAIT_S)


@pytest.mark.parametrize(("point", "nth"), SOME_POINTS)
def test_a_writer_that_dies_at_a_named_point_keeps_its_promises(tmp_path: Path, point: str, nth: int) -> None:
    die_and_check(tmp_path, point, nth)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("point", "nth"), [case for case in POINTS if case not in SOME_POINTS])
def test_a_writer_that_dies_at_any_named_point_keeps_its_promises(tmp_path: Path, point: str, nth: int) -> None:
    die_and_check(tmp_path, point, nth)


def kill_among_threads(tmp_path: Path, options: dict[str, Any], rounds: int, seed: int) -> None:
    """In a small store any flushed block may have been reclaimed; what was deleted must not be back in any."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    folder, journal = tmp_path / "store", tmp_path / "journal"
    for number in range(rounds):
        before = len(lines_of(journal))
        with writer("threads", folder, journal, options, seed + number) as process:
            assert process.stdout is not None
            for _ in range(chance.randint(1, 15)):
                assert process.stdout.readline() == "flushed\n", "the writer ended by itself"
        if chance.random() < 0.4:
            shutil.rmtree(folder / "index")
        lines = lines_of(journal)
        assert len(lines) > before
        with kvlode.open(folder, **options) as store:
            hits = check_promises(store, lines, lossy_before=len(lines) if options is SMALL else 0)
            assert hits or not any(line["kept"] for line in lines)  # a slow machine may flush before anything is put


@pytest.mark.parametrize("options", [ROOMY, SMALL], ids=["roomy", "small"])
def test_a_writer_of_many_threads_that_is_killed_keeps_its_promises(tmp_path: Path, options: dict[str, Any]) -> None:
    kill_among_threads(tmp_path, options, 2, seed=42)


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
@pytest.mark.parametrize("options", [ROOMY | {"capacity": "2GiB"}, SMALL], ids=["roomy", "small"])
def test_a_writer_of_many_threads_that_is_killed_often_keeps_its_promises(tmp_path: Path, options: dict[str, Any]) -> None:
    kill_among_threads(tmp_path, options, 12, seed=1042)


def cut_the_power(mounts: Mounts, tmp_path: Path, cuts: int, seed: int) -> None:
    """Stop the writer, copy the drive, go on; each copy is a drive that lost its power, journal of the file system and all."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    image, journal = tmp_path / "image", tmp_path / "journal"
    with skip_where_unavailable():
        place = mounts.ext4("drive", image, size_bytes=768 * MIB)
    hits = 0
    with writer("threads", place / "store", journal, ROOMY, seed) as process:
        assert process.stdout is not None
        for cut in range(cuts):
            for _ in range(chance.randint(1, 6)):
                assert process.stdout.readline() == "flushed\n", "the writer ended by itself"
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            lines = lines_of(journal)
            copy_image(image, tmp_path / f"cut {cut}")
            process.send_signal(signal.SIGCONT)
            dark = mounts.ext4(f"after {cut}", tmp_path / f"cut {cut}")
            if chance.random() < 0.3:
                shutil.rmtree(dark / "store" / "index")
            with kvlode.open(dark / "store", **ROOMY) as store:
                hits += check_promises(store, lines, lossy_before=reclaimable(lines, 200 * MIB))
                assert put(store, 5) and store.flush(WAIT_S)
            mounts.undo_last(2)
            (tmp_path / f"cut {cut}").unlink()
    assert hits > 0


@pytest.mark.root
def test_a_drive_that_loses_its_power_has_what_was_flushed(mounts: Mounts, tmp_path: Path) -> None:
    cut_the_power(mounts, tmp_path, 2, seed=7)


@pytest.mark.root
@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_a_drive_that_loses_its_power_often_has_what_was_flushed(mounts: Mounts, tmp_path: Path) -> None:
    cut_the_power(mounts, tmp_path, 25, seed=1007)


# --- places that cannot be written ------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_a_read_only_file_system_is_named_and_can_be_followed(mounts: Mounts) -> None:
    with skip_where_unavailable():
        place = mounts.tmpfs("kept", 64 * MIB)
    with kvlode.open(place / "store", **OPTIONS) as store:
        assert put(store, 1) and store.flush(WAIT_S)
    mounts.remount(place, "ro")
    with pytest.raises(DeviceError) as caught:
        kvlode.open(place / "store", **OPTIONS)
    assert_says(caught.value, str(place / "store"), "Read-only file system")
    assert caught.value.action, f"it does not say what to do: {caught.value}"
    with kvlode.follow(place / "store") as follower:
        assert status_of(follower, 1) is Status.HIT
        assert put(follower, 2).reason is Refusal.READ_ONLY
    with pytest.raises((KvlodeError, OSError)) as caught_new:
        kvlode.open(place / "another", **OPTIONS)
    assert "Read-only file system" in str(caught_new.value) and str(place) in str(caught_new.value)
    mounts.remount(place, "rw")
    with kvlode.open(place / "store", **OPTIONS) as store:
        assert status_of(store, 1) is Status.HIT
        assert put(store, 2) and store.flush(WAIT_S)


@pytest.mark.root
@pytest.mark.parametrize("protected", ["", "STORE", "LOCK", "segments", "index"])
def test_a_place_without_permission_is_named_to_another_user(tmp_path: Path, protected: str) -> None:
    folder = tmp_path / "store"
    with kvlode.open(folder, **OPTIONS) as store:
        assert put(store, 1) and store.flush(WAIT_S)
    for place in (tmp_path, *tmp_path.parents):
        if place.stat().st_uid == 0 and place != place.parent and "pytest" in str(place):
            place.chmod(0o755)
    run("chown", "-R", "65534", folder)
    run("chown", "-R", "0", folder / protected)
    (folder / protected).chmod(0o700 if (folder / protected).is_dir() else 0o600)
    script = """
        import os, sys
        import kvlode
        os.setgid(65534); os.setuid(65534)
        try:
            kvlode.open(sys.argv[1], capacity="2GiB", buffer="8MiB")
        except kvlode.KvlodeError as error:
            print(type(error).__name__, "|", error, "|", error.action)
        else:
            print("opened")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(folder)], capture_output=True, text=True, timeout=60, check=False, cwd="/"
    )
    if "Traceback" in done.stderr and "ModuleNotFoundError" in done.stderr:
        pytest.skip("another user cannot read this interpreter's packages")
    kind, message, action = (part.strip() for part in done.stdout.split("|"))
    assert kind == "DeviceError", done.stdout + done.stderr
    assert str(folder / protected) in message and "Permission denied" in message, message
    assert action != "None", f"it does not say what to do: {message}"
    run("chown", "-R", "0", folder)
    with kvlode.open(folder, **OPTIONS) as store:
        assert status_of(store, 1) is Status.HIT
        assert put(store, 2) and store.flush(WAIT_S)
