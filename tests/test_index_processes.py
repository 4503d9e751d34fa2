"""The index across processes: followers, forked children, killed writers, and interpreters that end while threads read."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from kvlode.engine import index_rocksdb
from kvlode.engine.index import IndexDamaged, IndexWriteError
from kvlode.engine.index_rocksdb import RocksFollowerIndex, RocksIndex, destroy, open_handle, set_aside
from kvlode.format.errors import StoreClosed


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of each file."""
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}


# --- followers -------------------------------------------------------------------------------------------------------------


def sees(follower: RocksFollowerIndex, keys: list[bytes], values: list[bytes | None]) -> bool:
    """Whether the follower catches up to these values. A catch-up that meets a flush of the writer may show it only at a later one."""
    for _ in range(100):
        follower.catch_up()
        if follower.get_many(keys) == values:
            return True
    return False


def test_a_follower_sees_every_put_and_delete_through_flushes_and_compactions(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    model: dict[bytes, bytes] = {}
    with contextlib.ExitStack() as stack:
        index = stack.enter_context(
            contextlib.closing(RocksIndex(tmp_path / "index", write_buffer_bytes=64 << 10, wal_bytes_max=256 << 10))
        )
        follower = stack.enter_context(contextlib.closing(RocksFollowerIndex(tmp_path / "index")))
        tables: set[str] = set()
        for number in range(150):
            puts = [(b"key-%04d" % draw.randrange(3000), b"%06d" % number + draw.randbytes(90)) for _ in range(300)]
            deletes = [b"key-%04d" % draw.randrange(3000) for _ in range(100)]
            index.apply(puts, deletes)
            model.update(puts)
            for key in deletes:
                model.pop(key, None)
            probe = [b"key-%04d" % draw.randrange(3000) for _ in range(200)]
            assert sees(follower, probe, [model.get(key) for key in probe])
            tables |= {path.name for path in (tmp_path / "index").glob("*.sst")}
        assert sees(follower, list(model), [model[key] for key in model])
        assert dict(follower.scan()) == model
        assert follower.damaged() == 0
    assert len(tables) > 20, "the writer has not flushed and compacted as often as this test needs"


def test_a_follower_shows_one_moment_until_it_catches_up(tmp_path: Path) -> None:
    with contextlib.closing(RocksIndex(tmp_path / "index")) as index:
        index.apply([(b"a", b"1")])
        with contextlib.closing(RocksFollowerIndex(tmp_path / "index")) as follower:
            index.apply([(b"b", b"2")], [b"a"])
            assert follower.get_many([b"a", b"b"]) == [b"1", None]
            scan = follower.scan()
            follower.catch_up()
            assert follower.get_many([b"a", b"b"]) == [None, b"2"]
            assert list(scan) == [(b"a", b"1")]


def test_a_follower_is_read_only_and_leaves_no_trace(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with pytest.MonkeyPatch.context() as patch, contextlib.closing(RocksIndex(tmp_path / "index")) as index:
        patch.setattr("tempfile.tempdir", str(temporary))
        index.apply([(b"a", b"1")])
        before = files_of(tmp_path / "index")
        follower = RocksFollowerIndex(tmp_path / "index")
        with pytest.raises(IndexWriteError, match="read-only"):
            follower.apply([(b"a", b"2")])
        follower.sync()
        follower.catch_up()
        assert follower.size_bytes() > 0
        follower.close()
        follower.close()
        assert files_of(tmp_path / "index") == before
        with pytest.raises(StoreClosed):
            follower.catch_up()
        assert list(temporary.iterdir()) == []


def test_following_what_is_not_there_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(IndexDamaged, match="nothing-here"):
        RocksFollowerIndex(tmp_path / "nothing-here")
    assert list(tmp_path.iterdir()) == []


def test_a_follower_that_opens_while_the_writer_merges_tables_sees_every_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RocksDB passes over tables that are gone when it opens them, and says nothing."""
    rows = [(b"key-%03d" % number, bytes(90)) for number in range(1000)]
    with contextlib.closing(RocksIndex(tmp_path / "index")) as index:
        index.apply(rows[::2])
        index._opened().compact_range(None, None)
        index.apply(rows[1::2])
        index._opened().flush()
        opens = []

        def opened_late(*arguments: Any) -> Any:
            opens.append(arguments)
            if len(opens) == 1:
                index._opened().compact_range(None, None)
            return open_handle(*arguments)

        monkeypatch.setattr(index_rocksdb, "open_handle", opened_late)
        with contextlib.closing(RocksFollowerIndex(tmp_path / "index")) as follower:
            assert follower.get_many([key for key, _ in rows]) == [value for _, value in rows]
            assert len(opens) == 2
            assert follower.damaged() == 0


def test_a_follower_goes_over_to_the_index_that_replaces_a_damaged_one(tmp_path: Path) -> None:
    index = RocksIndex(tmp_path / "index")
    index.apply([(b"old", b"1"), (b"both", b"1")])
    with contextlib.closing(RocksFollowerIndex(tmp_path / "index")) as follower:
        index.close()
        aside = set_aside(tmp_path / "index")
        assert aside is not None
        with pytest.raises(IndexDamaged):
            follower.catch_up()
        assert follower.get_many([b"old", b"both"]) == [b"1", b"1"], "what was seen before is still served"
        with contextlib.closing(RocksIndex(tmp_path / "index")) as rebuilt:
            rebuilt.apply([(b"both", b"2")])
            destroy(aside)
            follower.catch_up()
            assert follower.get_many([b"old", b"both"]) == [None, b"2"]
            rebuilt.apply([(b"both", b"3")])
            follower.catch_up()
            assert follower.get_many([b"both"]) == [b"3"]


def test_followers_read_while_the_writer_writes(tmp_path: Path) -> None:
    """Every batch gives all keys one new number: no lookup may see two numbers, nor a number go back."""
    keys = [b"key-%03d" % number for number in range(300)]
    errors: list[BaseException] = []
    index = RocksIndex(tmp_path / "index", write_buffer_bytes=64 << 10)
    index.apply([(key, b"%08d" % 0 + bytes(80)) for key in keys])
    finished = threading.Event()

    def follow(follower: RocksFollowerIndex) -> None:
        last = b""
        try:
            while not finished.is_set():
                follower.catch_up()
                seen = set(follower.get_many(keys))
                assert len(seen) == 1, seen
                (value,) = seen
                assert value is not None and value >= last
                last = value
        except BaseException as error:
            errors.append(error)

    followers = [RocksFollowerIndex(tmp_path / "index") for _ in range(2)]
    threads = [threading.Thread(target=follow, args=(follower,)) for follower in followers]
    for thread in threads:
        thread.start()
    for number in range(1, 250):
        index.apply([(key, b"%08d" % number + bytes(80)) for key in keys])
    finished.set()
    for thread, follower in zip(threads, followers, strict=True):
        thread.join()
        follower.catch_up()
        assert set(follower.get_many(keys)) == {b"%08d" % 249 + bytes(80)}
        follower.close()
    index.close()
    assert errors == []


# --- killed writers -----------------------------------------------------------------------------------------------------------


def test_what_was_synced_survives_a_killed_writer_and_batches_stay_whole(tmp_path: Path) -> None:
    script = """
        import sys
        from kvlode.engine.index_rocksdb import RocksIndex
        index = RocksIndex(sys.argv[1], write_buffer_bytes=256 << 10)
        number = int(sys.argv[2])
        while True:
            number += 1
            index.apply([(b"%08d-%02d" % (number, n), bytes(60)) for n in range(50)])
            if number % 10 == 0:
                index.sync()
                print(number, flush=True)
    """
    last = 0
    for _ in range(3):
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "index"), str(last)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            synced = [int(writer.stdout.readline()) for _ in range(40)][-1]
            writer.send_signal(signal.SIGKILL)
        with contextlib.closing(RocksIndex(tmp_path / "index")) as index:
            numbers = [key.split(b"-")[0] for key, _ in index.scan()]
        last = len(numbers) // 50
        assert last >= synced
        assert numbers == [b"%08d" % (n // 50 + 1) for n in range(50 * last)], "the batches are whole and without a gap"


# --- forked children ------------------------------------------------------------------------------------------------------------

FORK = """
    import os, signal, sys, threading
    from pathlib import Path
    from kvlode.engine.index_rocksdb import RocksFollowerIndex, RocksIndex
    from kvlode.format.errors import InvalidConfig, StoreClosed

    def files():
        return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in Path(sys.argv[1]).iterdir()}

    keys = [b"%05d" % n for n in range(5000)]

    def apply(index, keys):
        for start in range(0, len(keys), 1000):
            index.apply([(key, bytes(90)) for key in keys[start:start + 1000]])

    index = RocksIndex(sys.argv[1])
    apply(index, keys[:2500])
    index.close()  # flushes: from here on there is a table, and the write buffer is large enough that nothing moves by itself
    index = RocksIndex(sys.argv[1])
    follower = RocksFollowerIndex(sys.argv[1])
    apply(index, keys[2500:])
    follower.catch_up()
    scan = index.scan()
    next(scan)
    stop = threading.Event()

    def read():
        while not stop.is_set():
            assert None not in index.get_many(keys)

    readers = [threading.Thread(target=read, daemon=True) for _ in range(3)]
    for reader in readers:
        reader.start()
    before = files()
    for round in range(6):
        child = os.fork()
        if child == 0:
            signal.alarm(5)
            for dead in (index, follower):
                try:
                    dead.get_many(keys)
                except StoreClosed:
                    dead.close()
                else:
                    os._exit(3)
            try:
                rest = list(scan)
            except StoreClosed:
                pass
            else:
                os._exit(4)
            try:
                RocksIndex(sys.argv[1] + "-of-child")
            except InvalidConfig as error:
                assert "spawn" in str(error)
            else:
                os._exit(5)
            if sys.argv[2] == "os._exit":
                os._exit(17)
            elif sys.argv[2] == "collect":
                del index, follower, scan, dead
            print("the child's last words")
            sys.exit(17)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == 17, status
    assert files() == before
    stop.set()
    for reader in readers:
        reader.join()
    assert os.path.isdir(follower._temporary)
    index.apply([(b"after", b"1")])
    follower.catch_up()
    assert follower.get_many([b"after"]) == [b"1"]
    assert sum(1 for _ in scan) == 4999
    index.close()
    follower.close()
"""


@pytest.mark.parametrize("how", ["os._exit", "sys.exit", "collect"])
def test_a_forked_child_ends_at_once_and_changes_nothing_for_its_parent(tmp_path: Path, how: str) -> None:
    done = run_script(FORK, tmp_path / "index", how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the child's last words") == (0 if how == "os._exit" else 6)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_forked_child_can_follow_its_parent(tmp_path: Path) -> None:
    script = """
        import os, signal, sys
        from kvlode.engine.index_rocksdb import RocksFollowerIndex, RocksIndex
        index = RocksIndex(sys.argv[1])
        index.apply([(b"%05d" % n, bytes(90)) for n in range(1000)])
        child = os.fork()
        if child == 0:
            signal.alarm(5)
            follower = RocksFollowerIndex(sys.argv[1])
            assert sum(1 for _ in follower.scan()) == 1000
            follower.catch_up()
            follower.close()
            sys.exit(17)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
        index.apply([(b"after", b"1")])
        index.close()
    """
    done = run_script(script, tmp_path / "index")
    assert (done.returncode, done.stderr) == (0, "")


# --- the end of the interpreter ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("daemon", [True, False])
def test_an_interpreter_that_ends_while_threads_read_neither_aborts_nor_hangs(tmp_path: Path, daemon: bool) -> None:
    script = """
        import sys, threading
        from kvlode.engine.index_rocksdb import RocksFollowerIndex, RocksIndex
        from kvlode.format.errors import StoreClosed
        index = RocksIndex(sys.argv[1])
        keys = [b"%05d" % n for n in range(5000)]
        for start in range(0, 5000, 1000):
            index.apply([(key, bytes(90)) for key in keys[start:start + 1000]])
        follower = RocksFollowerIndex(sys.argv[1])
        started = threading.Barrier(7)

        def read(source, scanning):
            started.wait()
            try:
                while main.is_alive():
                    assert len(list(source.scan()) if scanning else source.get_many(keys)) == 5000
            except StoreClosed:
                pass

        main = threading.main_thread()
        for number in range(6):
            threading.Thread(target=read, args=((index, follower)[number % 2], number < 2), daemon=sys.argv[2] == "True").start()
        started.wait()
    """
    for _ in range(3):
        done = run_script(script, tmp_path / "index", daemon)
        assert (done.returncode, done.stderr) == (0, ""), done
    with contextlib.closing(RocksIndex(tmp_path / "index")) as index:
        assert sum(1 for _ in index.scan()) == 5000


def test_an_index_that_was_never_closed_is_closed_at_exit(tmp_path: Path) -> None:
    script = """
        import sys
        from kvlode.engine.index_rocksdb import RocksFollowerIndex, RocksIndex
        index = RocksIndex(sys.argv[1])
        index.apply([(b"a", b"1")])
        follower = RocksFollowerIndex(sys.argv[1])
        print(follower._temporary)
    """
    done = run_script(script, tmp_path / "index")
    assert (done.returncode, done.stderr) == (0, "")
    assert not os.path.exists(done.stdout.strip())
    assert list((tmp_path / "index").glob("*.sst")), "the memtable was flushed: nothing is left to replay"
    with contextlib.closing(RocksIndex(tmp_path / "index")) as index:
        assert index.get_many([b"a"]) == [b"1"]
