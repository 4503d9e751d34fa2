"""A store across processes: forks, exits under load, interrupts, few descriptors, a second writer, followers through reclaim."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvlode
from kvlode import Status, StoreClosed, StoreLocked
from model import block_bytes, descriptor

SIZE = 64 << 10
TESTS = Path(__file__).parent


Script = subprocess.CompletedProcess[str]
HEAD = """
import os, sys, threading
import numpy as np
import kvlode
from kvlode import Status
from model import block_bytes, descriptor
"""


def run(script: str, *arguments: object, timeout_s: float = 60.0, before: Callable[[], None] | None = None) -> Script:
    """A script in a process of its own that can import the tests' helpers."""
    return subprocess.run(
        [sys.executable, "-c", HEAD + textwrap.dedent(script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
        preexec_fn=before,
        check=False,
    )


def fill(space: kvlode.BlockSpace, first: int, last: int) -> None:
    for i in range(first, last):
        space.put(b"%d" % i, block_bytes(b"%d" % i, i, SIZE))


def answer(space: kvlode.BlockSpace, i: int) -> Status:
    """The status of a block that ``fill`` put; a hit is compared byte for byte."""
    out = np.zeros(SIZE, np.uint8)
    status = space.get_into(b"%d" % i, out)
    if status is Status.HIT:
        assert np.array_equal(out, block_bytes(b"%d" % i, i, SIZE)), f"block {i}: wrong bytes"
    return status


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir()) if path.is_file()}


def test_a_forked_child_has_a_dead_handle_exits_at_once_and_changes_nothing(tmp_path: Path) -> None:
    script = """
        import time
        store = kvlode.open(sys.argv[1], capacity="256MiB", buffer="8MiB")
        space = store.namespace(descriptor())
        space.put(b"a", b"1"); store.flush()
        child = os.fork()
        if child == 0:
            for call in (lambda: space.put(b"b", b"2"), lambda: space.contains([b"a"]), store.flush, store.stats):
                try:
                    call()
                except kvlode.StoreClosed as error:
                    assert "fork" in str(error), error
                else:
                    os._exit(7)
            sys.exit(0)
        started = time.monotonic()
        _, state = os.waitpid(child, 0)
        print("seconds", time.monotonic() - started)
        assert os.waitstatus_to_exitcode(state) == 0, state
        assert space.put(b"c", b"3") and store.flush() and store.close()
    """
    done = run(script, tmp_path / "store")
    assert done.returncode == 0, done.stdout + done.stderr
    with kvlode.open(tmp_path / "store", capacity="256MiB", buffer="8MiB") as store:
        assert store.namespace(descriptor()).contains([b"a", b"b", b"c"]) == [True, False, True]


def test_the_index_is_untouched_by_a_forked_child(tmp_path: Path) -> None:
    with kvlode.open(tmp_path / "store", capacity="256MiB", buffer="8MiB") as store:
        space = store.namespace(descriptor())
        assert space.put(b"a", b"1") and store.flush()
        before = files_of(tmp_path / "store" / "index")
        child = os.fork()
        if child == 0:
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert files_of(tmp_path / "store" / "index") == before


@pytest.mark.parametrize("ending", ["sys.exit(5)", "raise RuntimeError('on purpose')", ""])
def test_an_interpreter_that_ends_under_load_ends_in_order(tmp_path: Path, ending: str) -> None:
    script = f"""
        store = kvlode.open(sys.argv[1], capacity="512MiB", buffer="8MiB")
        space = store.namespace(descriptor())
        for i in range(20):
            assert space.put(b"%d" % i, block_bytes(b"%d" % i, i, {SIZE}))
        assert store.flush()
        ready = threading.Barrier(4)
        def load(first):
            ready.wait()
            i = first
            try:
                while True:
                    space.put(b"%d" % i, block_bytes(b"%d" % i, i, {SIZE}))
                    space.get_into(b"%d" % (i % 20), np.zeros({SIZE}, np.uint8))
                    i += 1
            except kvlode.StoreClosed:
                pass
        for number in range(3):
            threading.Thread(target=load, args=(1000 * (number + 1),), daemon=True).start()
        ready.wait()
        {ending}
    """
    done = run(script, tmp_path / "store")
    expected = {"sys.exit(5)": 5, "": 0}.get(ending, 1)
    assert done.returncode == expected, f"{done.returncode}: {done.stderr}"
    with kvlode.open(tmp_path / "store", capacity="512MiB", buffer="8MiB") as store:
        space = store.namespace(descriptor())
        assert [answer(space, i) for i in range(20)] == [Status.HIT] * 20


def test_a_store_that_nobody_closed_is_written_at_exit(tmp_path: Path) -> None:
    script = f"""
        store = kvlode.open(sys.argv[1], capacity="256MiB", buffer="16MiB", flush_after_s=60.0)
        space = store.namespace(descriptor())
        for i in range(100):
            assert space.put(b"%d" % i, block_bytes(b"%d" % i, i, {SIZE}))
    """
    done = run(script, tmp_path / "store", timeout_s=15.0)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    with kvlode.open(tmp_path / "store", capacity="256MiB", buffer="16MiB") as store:
        space = store.namespace(descriptor())
        assert {answer(space, i) for i in range(100)} == {Status.HIT}


def test_interrupts_during_puts_leave_the_store_usable_and_exact(tmp_path: Path) -> None:
    script = f"""
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background with it ignored
        store = kvlode.open(sys.argv[1], capacity="512MiB", buffer="8MiB")
        space = store.namespace(descriptor())
        block_bytes(b"", 0, 1)  # numpy imports its random numbers here, and an import of compiled code may swallow an interrupt
        interrupts, i = 0, 0
        while interrupts < 20:
            try:
                print("ready", flush=True)
                while True:
                    i += 1
                    space.put(b"%d" % i, block_bytes(b"%d" % i, i, {SIZE}))
                    if i % 5 == 0:
                        store.flush(20.0)
                    space.get_into(b"%d" % i, np.zeros({SIZE}, np.uint8))
            except KeyboardInterrupt:
                interrupts += 1
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert store.flush(20.0)
        for key in range(1, i):
            out = np.zeros({SIZE}, np.uint8)
            if space.get_into(b"%d" % key, out) is Status.HIT:
                assert np.array_equal(out, block_bytes(b"%d" % key, key, {SIZE})), key
        assert space.put(b"last", b"1") and store.flush(20.0) and store.close(20.0)
        print("done", flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + textwrap.dedent(script), str(tmp_path / "store")],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        for _ in range(20):
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait(30)
    assert output == "done\n", errors
    with kvlode.open(tmp_path / "store", capacity="512MiB", buffer="8MiB") as store:
        assert store.namespace(descriptor()).contains([b"last"]) == [True]


def test_a_store_of_many_segments_lives_with_256_descriptors(tmp_path: Path) -> None:
    script = f"""
        store = kvlode.open(sys.argv[1], capacity="512MiB", buffer="8MiB", segment_bytes=1 << 20, put_timeout_s=30.0)
        space = store.namespace(descriptor(block_bytes_max={SIZE}))
        for i in range(0, 4000, 4):
            assert space.put(b"%d" % i, block_bytes(b"%d" % i, i, {SIZE}))
        assert store.flush(60.0)
        assert store.close()
        store = kvlode.open(sys.argv[1], capacity="512MiB", buffer="8MiB", segment_bytes=1 << 20)
        space = store.namespace(descriptor(block_bytes_max={SIZE}))
        for i in range(0, 4000, 4):
            out = np.zeros({SIZE}, np.uint8)
            assert space.get_into(b"%d" % i, out) is Status.HIT, i
            assert np.array_equal(out, block_bytes(b"%d" % i, i, {SIZE}))
        print(len(os.listdir(os.path.join(sys.argv[1], "segments"))))
        assert store.close()
    """
    done = run(script, tmp_path / "store", before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40


def test_a_second_writing_process_is_told_who_is_in_the_way(tmp_path: Path) -> None:
    with kvlode.open(tmp_path / "store", capacity="256MiB", buffer="8MiB") as store:
        done = run("kvlode.open(sys.argv[1], capacity='256MiB', buffer='8MiB')", tmp_path / "store")
        assert done.returncode == 1
        assert "StoreLocked" in done.stderr and str(tmp_path / "store") in done.stderr
        (tmp_path / "link").symlink_to(tmp_path / "store")
        with kvlode.open(tmp_path / "link", capacity="256MiB", buffer="8MiB") as same:
            assert same.stats()["store_uuid"] == store.stats()["store_uuid"]
        assert store.namespace(descriptor()).put(b"a", b"1")
    with pytest.raises(StoreClosed):
        store.flush()


def test_a_follower_sees_right_bytes_or_nothing_while_the_writer_reclaims(tmp_path: Path) -> None:
    script = f"""
        store = kvlode.open(sys.argv[1], capacity="64MiB", buffer="4MiB", segment_bytes=1 << 20, reclaim_grace_s=0.5, put_timeout_s=30.0)
        space = store.namespace(descriptor(block_bytes_max={SIZE}))
        i = 0
        for line in sys.stdin:
            for _ in range(100):
                assert space.put(b"%d" % i, block_bytes(b"%d" % i, i, {SIZE}))
                i += 1
            assert store.flush(60.0)
            print(i, store.stats()["counters"].get("segments_freed", 0), flush=True)
        assert store.close()
    """
    writer = subprocess.Popen(
        [sys.executable, "-c", HEAD + textwrap.dedent(script), str(tmp_path / "store")],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdin is not None and writer.stdout is not None

    def write_more() -> tuple[int, int]:
        assert writer.stdin is not None and writer.stdout is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
        written, freed = writer.stdout.readline().split()
        return int(written), int(freed)

    try:
        written, freed = write_more()
        with kvlode.follow(tmp_path / "store") as follower:
            space = follower.namespace(descriptor(block_bytes_max=SIZE))
            descriptors = []
            for _ in range(25):
                written, freed = write_more()
                newest = wait_for(lambda last=written - 1: answer(space, last) is Status.HIT)
                assert newest, f"block {written - 1} was flushed, the follower does not see it"
                statuses = {answer(space, i) for i in range(0, written, 7)}
                assert statuses <= {Status.HIT, Status.MISS}
                descriptors.append(len(os.listdir("/proc/self/fd")))
            assert freed > 0, "nothing was reclaimed"
            assert max(descriptors[5:]) <= 400
            writer.stdin.close()
            assert writer.wait(60) == 0
            assert answer(space, written - 1) is Status.HIT
    finally:
        writer.kill()
        writer.wait(30)
        writer.stdout.close()


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Ask until it holds; nothing announces what another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
    return True


def test_a_locked_store_can_be_followed_instead(tmp_path: Path) -> None:
    script = """
        with kvlode.open(sys.argv[1], capacity="256MiB", buffer="8MiB") as store:
            assert store.namespace(descriptor()).put(b"a", b"1") and store.flush()
            print("ready", flush=True)
            sys.stdin.read()
    """
    writer = subprocess.Popen(
        [sys.executable, "-c", HEAD + textwrap.dedent(script), str(tmp_path / "store")],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdin is not None and writer.stdout is not None
    try:
        assert writer.stdout.readline() == "ready\n"
        with pytest.raises(StoreLocked):
            kvlode.open(tmp_path / "store", capacity="256MiB", buffer="8MiB")
        with kvlode.open(tmp_path / "store", capacity="256MiB", buffer="8MiB", on_locked="follow") as follower:
            out = bytearray(1)
            assert follower.namespace(descriptor()).get_into(b"a", out) is Status.HIT
            assert out == b"1"
        writer.stdin.close()
        assert writer.wait(60) == 0
        with kvlode.open(tmp_path / "store", capacity="256MiB", buffer="8MiB", on_locked="wait") as store:
            assert store.namespace(descriptor()).contains([b"a"]) == [True]
    finally:
        writer.kill()
        writer.wait(30)
        writer.stdout.close()
