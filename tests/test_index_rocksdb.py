"""RocksDB as the index: tuning that survives a reopen, damage, refusals, and a close that waits."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvlode.engine import index_rocksdb
from kvlode.engine.index import IndexDamaged, IndexWriteError
from kvlode.engine.index_rocksdb import RocksFollowerIndex, RocksIndex, destroy, set_aside
from kvlode.format.errors import DeviceError, KvlodeError, NoSpace, StoreClosed, StoreLocked

MIB = 1 << 20


def rows(count: int, generation: int = 0) -> list[tuple[bytes, bytes]]:
    """Entries of the size that the store writes, the same ones in every run."""
    draw = random.Random(generation)
    return [(b"namespace-digest" + number.to_bytes(32, "big"), draw.randbytes(98)) for number in range(count)]


def fill(index: RocksIndex, entries: list[tuple[bytes, bytes]]) -> None:
    for start in range(0, len(entries), 1000):
        index.apply(entries[start : start + 1000])


# --- tuning ------------------------------------------------------------------------------------------------------------


def _tuning_in_log(text: str) -> dict[str, str]:
    names = "filter_policy|no_block_cache|block_cache_name|capacity|block_size"
    return dict(re.findall(rf"^\s*({names})\s*: (.*?)\s*$", text, re.M))


def test_filter_and_cache_are_in_force_after_a_reopen_and_in_a_follower(tmp_path: Path) -> None:
    with contextlib.closing(RocksIndex(tmp_path / "index", block_cache_bytes=64 * MIB)) as index:
        fill(index, rows(3000))
    index = RocksIndex(tmp_path / "index", block_cache_bytes=96 * MIB)
    follower = RocksFollowerIndex(tmp_path / "index", block_cache_bytes=32 * MIB)
    follower_log = tmp_path / "follower-LOG"
    os.link(follower.log_path, follower_log)  # the folder goes at close, and only then has RocksDB written all of it
    follower.close()
    index.close()
    logs = {"writer": (tmp_path / "index" / "LOG").read_text(), "follower": follower_log.read_text()}
    for who, cache_bytes in (("writer", 96 * MIB), ("follower", 32 * MIB)):
        tuning = _tuning_in_log(logs[who])
        assert tuning["filter_policy"] == "bloomfilter", who
        assert tuning["block_cache_name"] == "AutoHyperClockCache", who
        assert int(tuning["capacity"]) == cache_bytes, who
        assert tuning["block_size"] == "1024", who


def test_it_has_no_cache_of_its_own_unless_it_is_given_one(tmp_path: Path) -> None:
    index = RocksIndex(tmp_path / "index")
    with contextlib.closing(index):
        fill(index, rows(3000))
        assert index.get_many([key for key, _ in rows(3000)]) == [value for _, value in rows(3000)]
    assert _tuning_in_log((tmp_path / "index" / "LOG").read_text())["no_block_cache"] == "1"


def test_its_logs_stay_bounded_over_many_opens(tmp_path: Path) -> None:
    for generation in range(6):
        with contextlib.closing(RocksIndex(tmp_path / "index")) as index:
            fill(index, rows(100, generation))
    names = sorted(path.name for path in (tmp_path / "index").iterdir())
    assert sum(name.startswith("LOG") for name in names) <= 2, names
    assert sum(name.endswith(".log") for name in names) <= 1, names


def log_bytes(index: Path) -> int:
    """The size of the write-ahead logs in bytes; one that RocksDB removes between listing and looking counts nothing."""
    size_bytes = 0
    for path in index.glob("*.log"):
        with contextlib.suppress(FileNotFoundError):
            size_bytes += path.stat().st_size
    return size_bytes


def test_its_write_ahead_log_is_bounded_while_entries_are_overwritten(tmp_path: Path) -> None:
    with contextlib.closing(RocksIndex(tmp_path / "index", write_buffer_bytes=MIB, wal_bytes_max=2 * MIB)) as index:
        for generation in range(20):
            fill(index, rows(2000, generation))
        assert index.get_many([key for key, _ in rows(2000)]) == [value for _, value in rows(2000, 19)]
        assert log_bytes(tmp_path / "index") <= 8 * MIB
        assert index.size_bytes() <= 40 * MIB


# --- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[tuple[RocksIndex, list[tuple[bytes, bytes]]]]:
    """An index with 64 bad bytes in the middle of a table."""
    entries = rows(20_000)
    with contextlib.closing(RocksIndex(tmp_path / "index")) as index:
        fill(index, entries)
    table = max((tmp_path / "index").glob("*.sst"), key=lambda path: path.stat().st_size)
    with open(table, "r+b") as file:
        file.seek(table.stat().st_size // 2)
        file.write(b"\xa5" * 64)
    with contextlib.closing(RocksIndex(tmp_path / "index")) as index:
        yield index, entries


def test_readers_wait_while_an_index_is_opened_anew(tmp_path: Path) -> None:
    entries = rows(5000)
    with contextlib.closing(RocksIndex(tmp_path / "index")) as index:
        fill(index, entries)
        index.sync()
        stop = threading.Event()
        wrong: list[object] = []

        def look() -> None:
            keys, values = [key for key, _ in entries[:50]], [value for _, value in entries[:50]]
            while not stop.is_set():
                try:
                    if index.get_many(keys) != values:
                        wrong.append("values")
                except Exception as error:
                    wrong.append(error)

        readers = [threading.Thread(target=look) for _ in range(3)]
        for reader in readers:
            reader.start()
        for _ in range(3):
            index._open_anew_at_s = 0.0  # not a moment ago
            index.open_anew()
        stop.set()
        for reader in readers:
            reader.join()
        assert not wrong
        index.apply([(b"new", b"1")])
        index.sync()
        assert index.get_many([b"new"]) == [b"1"]


def test_an_index_that_cannot_be_opened_anew_is_read_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(RocksIndex(tmp_path / "index")) as index:
        index.apply([(b"a", b"1")])
        index.sync()
        for readable, expected in ((True, b"1"), (False, None)):
            index._open_anew_at_s = 0.0
            with monkeypatch.context() as patch:
                patch.setattr(index_rocksdb, "open_handle", refusing(index_rocksdb.open_handle, readable))
                with pytest.raises(IndexWriteError, match="refused by the test"):
                    index.open_anew()
            assert index.get_many([b"a"]) == [expected]
            with pytest.raises(IndexWriteError):
                index.apply([(b"b", b"2")])
            with pytest.raises(IndexWriteError, match="a moment ago"):
                index.open_anew()
        index._open_anew_at_s = 0.0
        index.open_anew()
        index.apply([(b"b", b"2")])
        assert index.get_many([b"a", b"b"]) == [b"1", b"2"]


def test_an_index_in_use_is_not_opened_anew_and_holds_lookups_up_for_a_moment_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    waits_s: list[float] = []
    found: list[list[bytes | None]] = []
    with contextlib.closing(RocksIndex(tmp_path / "index")) as index:
        index.apply([(b"a", b"1")])
        beside = threading.Thread(target=lambda: found.append(index.get_many([b"a"])))

        def wait_empty(timeout_s: float) -> bool:
            nonlocal now_s
            now_s += timeout_s
            waits_s.append(timeout_s)
            beside.start()
            return False

        stuck = -1  # a thread that a failing drive holds
        index._gate._inside[stuck] = None
        with monkeypatch.context() as patch:
            patch.setattr(index_rocksdb.time, "monotonic", lambda: now_s)
            patch.setattr(index._gate, "wait_empty", wait_empty)
            with pytest.raises(IndexWriteError, match="in use"):
                index.open_anew()
            assert index._open_anew_at_s - now_s == index_rocksdb.OPEN_PAUSE_S, "the pause follows the wait"
        beside.join(30.0)
        assert found == [[b"1"]]
        assert waits_s[0] <= 0.05
        del index._gate._inside[stuck]


def test_a_scan_that_an_opening_ends_says_so(tmp_path: Path) -> None:
    with contextlib.closing(RocksIndex(tmp_path / "index")) as index:
        fill(index, rows(2000))
        index.sync()
        scan = index.scan()
        next(scan)
        index.open_anew()
        with pytest.raises(IndexWriteError, match="opened anew"):
            list(scan)
        assert len(list(index.scan())) == 2000


def refusing(open_handle: Callable[..., Any], readable: bool) -> Callable[..., Any]:
    """``open_handle`` that refuses to open for writing, and for reading where that is asked for."""
    calls = []

    def opened(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1 or not readable:
            raise NoSpace("open index", "index", errno=errno.ENOSPC, detail="refused by the test")
        return open_handle(*arguments)

    return opened


def test_keys_in_a_damaged_block_read_as_absent_and_are_counted_while_the_rest_is_served(
    damaged: tuple[RocksIndex, list[tuple[bytes, bytes]]],
) -> None:
    index, entries = damaged
    found = index.get_many([key for key, _ in entries])
    lost = sum(value is None for value in found)
    assert 0 < lost < 500
    assert all(value in (None, expected) for value, (_, expected) in zip(found, entries, strict=True))
    assert index.damaged() == lost


def test_a_scan_over_damage_raises_and_never_ends_early(damaged: tuple[RocksIndex, list[tuple[bytes, bytes]]]) -> None:
    index, entries = damaged
    seen = []
    with pytest.raises(IndexDamaged, match="Corruption"):
        seen += index.scan()
    assert seen == entries[: len(seen)]
    assert len(seen) < len(entries)


@pytest.mark.parametrize(
    ("victim", "how"),
    [
        (victim, how)
        for victim in ("CURRENT", "MANIFEST-*", "*.sst")
        for how in ("missing", "zeroed", "cut")
        if (victim, how) != ("MANIFEST-*", "cut")
    ],
)
def test_a_damaged_or_missing_file_is_damage_at_open(tmp_path: Path, victim: str, how: str) -> None:
    with contextlib.closing(RocksIndex(tmp_path / "index")) as index:
        fill(index, rows(5000))
    file = next((tmp_path / "index").glob(victim))
    size_bytes = file.stat().st_size
    if how == "missing":
        file.unlink()
    elif how == "zeroed":
        file.write_bytes(bytes(size_bytes))
    else:
        os.truncate(file, size_bytes // 2)
    with pytest.raises(IndexDamaged, match=re.escape(str(tmp_path))):
        RocksIndex(tmp_path / "index")


def test_a_torn_manifest_is_damage_or_an_earlier_state(tmp_path: Path) -> None:
    states: list[dict[bytes, bytes]] = [{}]
    for generation in range(3):
        with contextlib.closing(RocksIndex(tmp_path / "index")) as index:
            fill(index, [(b"generation", b"%d" % generation), *rows(1500, generation)])
            states.append(dict(index.scan()))
    manifest = next((tmp_path / "index").glob("MANIFEST-*")).read_bytes()
    outcomes = set()
    for cut in range(0, len(manifest), len(manifest) // 10):
        folder = tmp_path / f"cut-{cut}"
        shutil.copytree(tmp_path / "index", folder)
        os.truncate(next(folder.glob("MANIFEST-*")), cut)
        try:
            with contextlib.closing(RocksIndex(folder)) as index:
                outcomes.add(states.index(dict(index.scan())))
        except IndexDamaged:
            outcomes.add(-1)
    assert len(outcomes) > 1


def test_a_torn_log_leaves_a_prefix_of_whole_batches(tmp_path: Path) -> None:
    with contextlib.closing(RocksIndex(tmp_path / "index")) as index:
        for generation in range(30):
            index.apply([(key, b"%d" % generation) for key, _ in rows(20)])
        index.sync()
        log = next((tmp_path / "index").glob("*.log")).read_bytes()
        others = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir() if not path.name.startswith(("LOG", "LOCK"))}
    seen = set()
    for cut in range(0, len(log), len(log) // 12):
        folder = tmp_path / f"cut-{cut}"
        folder.mkdir()
        for name, content in others.items():
            (folder / name).write_bytes(log[:cut] if name.endswith(".log") else content)
        with contextlib.closing(RocksIndex(folder)) as torn:
            values = torn.get_many([key for key, _ in rows(20)])
        assert len(set(values)) == 1, "a batch was torn"
        seen.add(values[0])
    assert len(seen) > 5


def test_a_damaged_folder_is_set_aside_under_a_free_name_and_can_be_destroyed(tmp_path: Path) -> None:
    assert set_aside(tmp_path / "index") is None
    names = []
    for _ in range(3):
        with contextlib.closing(RocksIndex(tmp_path / "index")) as index:
            fill(index, rows(10))
        names.append(set_aside(tmp_path / "index"))
    assert names == [f"{tmp_path}/index.damaged-{number}" for number in (1, 2, 3)]
    for name in [*names, str(tmp_path / "never there")]:
        assert name is not None
        destroy(name)
    assert list(tmp_path.iterdir()) == []


# --- refusals ------------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_named(tmp_path: Path) -> None:
    with contextlib.closing(RocksIndex(tmp_path / "index")) as index:
        fill(index, rows(10))
        with pytest.raises(StoreLocked, match="follower"):
            RocksIndex(tmp_path / "index")
        script = (
            "import sys\n"
            "from kvlode.engine.index_rocksdb import RocksIndex\n"
            "from kvlode.format.errors import StoreLocked\n"
            "try:\n    RocksIndex(sys.argv[1])\n"
            "except StoreLocked:\n    sys.exit(7)\n"
        )
        assert subprocess.run([sys.executable, "-c", script, index.path], timeout=60).returncode == 7
        assert index.get_many([rows(1)[0][0]]) == [rows(1)[0][1]]
    with contextlib.closing(RocksIndex(tmp_path / "index")) as index:
        assert len(list(index.scan())) == 10


def test_a_path_that_is_a_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "index").write_text("not a folder")
    with pytest.raises(KvlodeError, match="index"):
        RocksIndex(tmp_path / "index")


def test_a_stall_is_waited_out_and_only_then_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stall = Exception("Result incomplete: Write stall")
    with contextlib.closing(RocksIndex(tmp_path / "index", stall_timeout_s=0.05)) as index:
        write, answers = index._write, [stall, stall]
        monkeypatch.setattr(index, "_write", lambda puts, deletes: answers.pop() if answers else write(puts, deletes))
        index.apply([(b"a", b"1")])
        assert index.get_many([b"a"]) == [b"1"]
        tries = []
        monkeypatch.setattr(index, "_write", lambda puts, deletes: tries.append(1) or stall)
        with pytest.raises(IndexWriteError, match="stall"):
            index.apply([(b"a", b"2")])
        assert len(tries) > 1
        tries.clear()
        monkeypatch.setattr(index, "_write", lambda puts, deletes: tries.append(1) or Exception("IO error: gone"))
        with pytest.raises(IndexWriteError, match="gone"):
            index.apply([(b"a", b"2")])
        assert len(tries) == 1


def test_writes_continue_while_flushes_and_compactions_lag_behind(tmp_path: Path) -> None:
    with contextlib.closing(RocksIndex(tmp_path / "index", write_buffer_bytes=64 << 10)) as index:
        for generation in range(30):
            fill(index, rows(2000, generation))
        assert dict(index.scan()) == dict(rows(2000, 29))


def test_a_full_drive_refuses_batches_and_leaves_reads_alone(tmp_path: Path) -> None:
    script = """
import resource, signal, sys
from kvlode.engine.index import IndexWriteError
from kvlode.engine.index_rocksdb import RocksIndex
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
index = RocksIndex(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
applied = 0
try:
    for number in range(1000):
        index.apply([(b"%03d-%03d" % (number, n), bytes(100)) for n in range(100)])
        applied += 1
except IndexWriteError as error:
    assert "File too large" in str(error), error
found = [sum(v is not None for v in index.get_many([b"%03d-%03d" % (n, m) for m in range(100)])) for n in range(applied + 1)]
assert found == [100] * applied + [0], (applied, found)
index.close()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
index = RocksIndex(sys.argv[1])
assert sum(1 for _ in index.scan()) == 100 * applied
index.close()
assert 10 < applied < 1000
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "index")], check=True, timeout=60)


@pytest.fixture
def small_drive(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "drive"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.root
def test_open_on_a_full_or_read_only_drive_is_told_apart_from_damage_and_can_be_followed(small_drive: Path) -> None:
    with contextlib.closing(RocksIndex(small_drive / "index")) as index:
        fill(index, rows(2000))
    with open(small_drive / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    with pytest.raises(NoSpace, match="No space left"):
        RocksIndex(small_drive / "index")
    with contextlib.closing(RocksFollowerIndex(small_drive / "index")) as follower:
        assert list(follower.scan()) == rows(2000)
    (small_drive / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_drive], check=True)
    with pytest.raises(DeviceError, match="Read-only"):
        RocksIndex(small_drive / "index")
    with contextlib.closing(RocksFollowerIndex(small_drive / "index")) as follower:
        assert list(follower.scan()) == rows(2000)


# --- close ----------------------------------------------------------------------------------------------------------------


def test_close_waits_for_lookups_and_scans_of_other_threads(tmp_path: Path) -> None:
    entries = rows(20_000)
    keys, expected = [key for key, _ in entries], [value for _, value in entries]
    index = RocksIndex(tmp_path / "index")
    fill(index, entries)
    errors: list[BaseException] = []
    started = threading.Barrier(5)

    def read(scanning: bool) -> None:
        try:
            started.wait()
            while True:
                if scanning:
                    assert list(index.scan()) == entries
                else:
                    assert index.get_many(keys) == expected
        except StoreClosed:
            return
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(number % 2 == 0,)) for number in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    index.close()
    for thread in threads:
        thread.join()
    assert errors == []
    assert index.damaged() == 0
    with contextlib.closing(RocksIndex(tmp_path / "index")) as again:  # the lock is free: nothing was left open
        assert again.get_many(keys[:5]) == expected[:5]


def test_a_scan_that_nobody_ends_keeps_nothing_locked(tmp_path: Path) -> None:
    index = RocksIndex(tmp_path / "index")
    fill(index, rows(2000))
    scan = index.scan()
    next(scan)
    index.close()
    with contextlib.closing(RocksIndex(tmp_path / "index")) as again:
        assert again.get_many([rows(1)[0][0]]) == [rows(1)[0][1]]
    with pytest.raises(StoreClosed):
        list(scan)


def test_a_wrong_kind_of_key_is_the_callers_error_and_no_damage(tmp_path: Path) -> None:
    with contextlib.closing(RocksIndex(tmp_path / "index")) as index:
        with pytest.raises(TypeError, match="str"):
            index.get_many(["text"])  # type: ignore[list-item]
        assert index.damaged() == 0
