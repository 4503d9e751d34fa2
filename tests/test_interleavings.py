"""Named interleavings on real files and processes: damaged tables, clocks, closing, forks, a follower that stands still."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvlode
from kvlode import Status, StoreClosed
from kvlode.engine.testing import ManualClock
from kvlode.gds.testing import LateDevice
from model import block_bytes, descriptor
from rig import KIB, MIB, Rig, eventually, put_blocks, read

SIZE = 60_000
TESTS = Path(__file__).parent
HEAD = """
import os, sys, threading, time
import numpy as np
import kvlode
from kvlode import Status, StoreClosed
from model import block_bytes, descriptor
"""


def start(script: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """A script in a process of its own that can import the tests' helpers."""
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + textwrap.dedent(script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def folder_bytes(folder: Path) -> int:
    """Space allocated to everything below a folder; files that vanish meanwhile are not counted."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


# --- a damaged index ------------------------------------------------------------------------------------------------

KEYS = 3000


def damaged_store(folder: Path) -> None:
    """A closed store of small blocks in two namespaces whose index has a damaged table."""
    with kvlode.open(folder, capacity="256MiB", buffer="16MiB", put_timeout_s=30.0) as store:
        for name in ("one", "two"):
            space = store.namespace(descriptor(name))
            for number in range(KEYS):
                assert space.put(b"%s %d" % (name.encode(), number), b"%d" % number)
        assert store.flush(60.0)
    with kvlode.open(folder, capacity="256MiB", buffer="16MiB") as store:  # reads its log into a table
        assert store.namespace(descriptor("one")).match_prefix([b"one %d" % number for number in range(KEYS)]) == KEYS
    tables = sorted((folder / "index").glob("*.sst"), key=lambda table: table.stat().st_size)
    assert tables, "the index has no table"
    with open(tables[-1], "r+b") as table:
        for offset in range(20_000, tables[-1].stat().st_size * 9 // 10, 40_000):
            table.seek(offset)
            table.write(b"\xff" * 64)


def statuses(store: kvlode.DiskStore, name: str) -> list[Status]:
    """Every block of a namespace, read as one list; hits are compared."""
    keys = [b"%s %d" % (name.encode(), number) for number in range(KEYS)]
    outs = [bytearray(len(b"%d" % number)) for number in range(KEYS)]
    answers = store.namespace(descriptor(name)).get_many_into(keys, outs)
    for number, (out, status) in enumerate(zip(outs, answers, strict=True)):
        assert status is not Status.HIT or out == b"%d" % number, f"{name} {number}: wrong bytes"
    return answers


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    damaged_store(tmp_path / "store")
    return tmp_path / "store"


def test_damaged_tables_give_misses_in_list_gets_and_everything_after_the_rebuild(damaged: Path) -> None:
    with kvlode.open(damaged, capacity="256MiB", buffer="16MiB") as store:
        found = statuses(store, "one")
        assert set(found) == {Status.HIT, Status.MISS}, "the damage was not met"
        assert store.namespace(descriptor("one")).put(b"new", b"1") and store.flush(30.0)
        assert eventually(lambda: (damaged / "index.rebuild").exists()), "the damage is forgotten at the next open"
    with kvlode.open(damaged, capacity="256MiB", buffer="16MiB") as store:
        assert set(statuses(store, "one")) == {Status.HIT}
        assert set(statuses(store, "two")) == {Status.HIT}
        assert store.namespace(descriptor("one")).contains([b"new"]) == [True]
    assert not (damaged / "index.rebuild").exists()


def test_a_namespace_dropped_over_damaged_tables_stays_dropped_and_the_store_goes_on(damaged: Path) -> None:
    with kvlode.open(damaged, capacity="256MiB", buffer="16MiB") as store:
        store.namespace(descriptor("two")).drop()
        assert store.flush(30.0)
        store._core.commit.call(lambda: None).result(30.0)
        assert store.stats()["failure"] is None, "damage to derived data stopped the store"
        assert set(statuses(store, "two")) == {Status.MISS}
        assert store.namespace(descriptor("two")).put(b"two 5", b"5") and store.flush(30.0)
        assert eventually(lambda: (damaged / "index.rebuild").exists())
    with kvlode.open(damaged, capacity="256MiB", buffer="16MiB") as store:
        assert set(statuses(store, "one")) == {Status.HIT}
        assert [number for number, status in enumerate(statuses(store, "two")) if status is Status.HIT] == [5]


# --- clocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump_s", [-86_400, 86_400])
def test_a_jump_of_the_wall_clock_neither_expires_nor_revives_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: int) -> None:
    with kvlode.open(tmp_path / "store", capacity="256MiB", buffer="8MiB", serve_clean=False) as store:
        space = store.namespace(descriptor())
        assert space.put(b"lasts", b"1", ttl=3600.0)
        assert space.put(b"ends", b"2", ttl=0.000_001)
        assert store.flush(30.0)
        real_ns = time.time_ns
        monkeypatch.setattr(time, "time_ns", lambda: real_ns() + jump_s * 1_000_000_000)
        assert space.get_into(b"lasts", bytearray(1)) is Status.HIT
        assert space.get_into(b"ends", bytearray(1)) in (Status.EXPIRED, Status.MISS)
        assert space.put(b"ends", b"3")
        assert space.put(b"later", b"4", ttl=3600.0)
        assert store.flush(30.0)
        assert space.contains([b"lasts", b"ends", b"later"]) == [True, True, True]
    monkeypatch.undo()
    with kvlode.open(tmp_path / "store", capacity="256MiB", buffer="8MiB") as store:
        assert store.namespace(descriptor()).contains([b"lasts", b"ends", b"later"]) == [True, True, True]


def test_a_block_that_expires_while_the_store_is_closed_is_expired_whatever_the_index_says() -> None:
    clock = ManualClock()
    rig = Rig(clock, serve_clean=False)
    space = rig.store.namespace(descriptor(block_bytes_max=KIB))
    assert space.put(b"k", b"1", ttl=10.0) and rig.store.flush(30.0)
    clock.advance(11.0)
    for lose_index in (False, True):
        rig.crash(lose_index=lose_index)
        space = rig.store.namespace(descriptor(block_bytes_max=KIB))
        assert space.contains([b"k"]) == [False]
        assert space.get_into(b"k", bytearray(1)) in (Status.EXPIRED, Status.MISS)
    rig.close()


# --- closing --------------------------------------------------------------------------------------------------------------


def test_a_read_that_outlives_a_close_ends_and_leaves_the_memory_alone_afterwards() -> None:
    rig = Rig(ManualClock(), wrap=lambda device: LateDevice(device, holding=()), serve_clean=False)
    space = rig.store.namespace(descriptor(block_bytes_max=64 * KIB))
    put_blocks(space, 0, 1, SIZE)
    assert rig.store.flush(30.0)
    rig.device.hold("read")
    out = np.full(SIZE, 0xA5, np.uint8)
    ended: list[object] = []

    def get() -> None:
        try:
            ended.append(space.get_into(b"filler 0", out))
        except StoreClosed as error:
            ended.append(error)

    reading = threading.Thread(target=get)
    reading.start()
    assert rig.device.wait_for_held(1)
    assert not rig.store.close(0.2), "a close that gave up said that it was done"
    rig.device.hold()
    rig.device.release()
    reading.join(30.0)
    assert not reading.is_alive(), "the caller waits for ever"
    if ended != [Status.HIT]:
        out[:] = 0x5A
    assert eventually(lambda: not rig.device.held())
    expected = block_bytes(b"filler 0", 0, SIZE) if ended == [Status.HIT] else np.full(SIZE, 0x5A, np.uint8)
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("seed", range(3))
def test_closing_under_readers_ends_all_of_them(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    store = kvlode.open(tmp_path / "store", capacity="256MiB", buffer="8MiB", serve_clean=False)
    space = store.namespace(descriptor())
    put_blocks(space, 0, 40, SIZE)
    assert store.flush(30.0)
    reads = threading.Semaphore(0)
    errors: list[BaseException] = []

    def hammer(number: int) -> None:
        outs = [np.zeros(SIZE, np.uint8) for _ in range(5)]
        try:
            while True:
                first = (number * 7) % 35
                keys = [b"filler %d" % i for i in range(first, first + 5)]
                for i, status in enumerate(space.get_many_into(keys, outs, timeout=5.0 if number % 2 else None)):
                    assert status in (Status.HIT, Status.CANCELLED, Status.PENDING), status
                    assert status is not Status.HIT or np.array_equal(outs[i], block_bytes(keys[i], 4 * (first + i), SIZE))
                reads.release()
                number += 1
        except StoreClosed:
            return
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(chance.randint(1, 40)):
        assert reads.acquire(timeout=30.0)
    assert store.close(30.0)
    for thread in threads:
        thread.join(30.0)
        assert not thread.is_alive(), "a reader hangs after close"
    assert errors == []


# --- forks -----------------------------------------------------------------------------------------------------------------


def test_a_worker_forked_in_the_middle_of_everything_has_a_dead_handle_and_harms_nobody(tmp_path: Path) -> None:
    script = f"""
        store = kvlode.open(sys.argv[1], capacity="256MiB", buffer="8MiB", put_timeout_s=30.0, serve_clean=False)
        space = store.namespace(descriptor())
        stop, errors, rounds = threading.Event(), [], threading.Semaphore(0)
        def load(first):
            i = first
            try:
                while not stop.is_set():
                    key = b"%d" % i
                    assert space.put(key, block_bytes(key, i, {SIZE}))
                    if i % 10 == 0:
                        assert store.flush(30.0)
                    out = np.zeros({SIZE}, np.uint8)
                    assert space.get_into(key, out) is Status.HIT and np.array_equal(out, block_bytes(key, i, {SIZE}))
                    i += 1
                    rounds.release()
            except BaseException as error:
                errors.append(error)
        threads = [threading.Thread(target=load, args=(1000 * n,)) for n in range(1, 4)]
        for thread in threads:
            thread.start()
        for _ in range(15):
            assert rounds.acquire(timeout=30)
            child = os.fork()
            if child == 0:
                try:
                    put, get = lambda: space.put(b"child", b"1"), lambda: space.get_into(b"1000", bytearray(1))
                    for call in (store.stats, put, get, store.flush):
                        try:
                            call()
                        except StoreClosed:
                            continue
                        os._exit(7)
                    os._exit(0)
                except BaseException:
                    os._exit(8)
            for _ in range(2000):
                done, state = os.waitpid(child, os.WNOHANG)
                if done:
                    break
                time.sleep(0.01)  # the child has no other way to tell
            else:
                os.kill(child, 9)
                os.waitpid(child, 0)
                errors.append("a forked child hangs")
                break
            if os.waitstatus_to_exitcode(state):
                errors.append(f"a forked child ended with {{state}}")
        stop.set()
        for thread in threads:
            thread.join(30)
        assert store.flush(30.0) and store.close(30.0)
        assert not errors, errors
        print("done")
    """
    process = start(script, tmp_path / "store", stderr=subprocess.PIPE)
    try:
        output, trouble = process.communicate(timeout=90)
    finally:
        process.kill()
        process.wait(30)
    assert output == "done\n", trouble
    with kvlode.open(tmp_path / "store", capacity="256MiB", buffer="8MiB") as store:
        assert store.namespace(descriptor()).contains([b"child", b"1000", b"2000", b"3000"]) == [False, True, True, True]


# --- followers ----------------------------------------------------------------------------------------------------------------

FOLLOWER = f"""
    follower = kvlode.follow(sys.argv[1])
    space = follower.namespace(descriptor(block_bytes_max=64 << 10))
    for line in sys.stdin:
        first, last = map(int, line.split())
        hits = 0
        for i in range(first, last):
            out = np.full({SIZE}, 0xA5, np.uint8)
            key = b"filler %d" % i
            status = space.get_into(key, out)
            assert status in (Status.HIT, Status.MISS), status
            if status is Status.HIT:
                assert np.array_equal(out, block_bytes(key, 4 * i, {SIZE})), i
                hits += 1
        print(hits, flush=True)
    follower.close()
"""


@pytest.fixture
def follower(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with kvlode.open(tmp_path / "store", capacity="32MiB", buffer="4MiB", segment_bytes=512 * KIB):
        pass
    process = start(FOLLOWER, tmp_path / "store")
    yield process
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait(30)
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        stream.close()


def ask(follower: subprocess.Popen[str], first: int, last: int) -> int:
    """Let the follower read blocks; how many it found."""
    assert follower.stdin is not None and follower.stdout is not None
    follower.stdin.write(f"{first} {last}\n")
    follower.stdin.flush()
    return int(follower.stdout.readline())


@pytest.mark.parametrize("stopped", [False, True])
def test_a_follower_reads_right_bytes_through_reclaim_and_the_cap_holds_meanwhile(
    tmp_path: Path, follower: subprocess.Popen[str], stopped: bool
) -> None:
    folder, capacity = tmp_path / "store", 32 * MIB
    options: dict[str, Any] = {"capacity": capacity, "buffer": "4MiB", "segment_bytes": 512 * KIB, "put_timeout_s": 30.0}
    with kvlode.open(folder, reclaim_grace_s=0.2, **options) as store:
        space = store.namespace(descriptor(block_bytes_max=64 * KIB))
        put_blocks(space, 0, 40, SIZE)
        assert store.flush(30.0)
        assert eventually(lambda: ask(follower, 0, 40) == 40), "the follower does not see what was flushed"
        peak = 0
        for turn in range(1, 13):
            if stopped and turn == 2:
                follower.send_signal(signal.SIGSTOP)
            put_blocks(space, 40 * turn, 40 * turn + 40, SIZE)
            assert store.flush(60.0)
            peak = max(peak, folder_bytes(folder))
            if not stopped:
                ask(follower, 40 * turn - 40, 40 * turn + 40)
        assert store.stats()["counters"]["segments_freed"] > 0, "nothing was reclaimed"
        assert peak <= capacity, f"{peak} bytes below the folder, the capacity is {capacity}"
        follower.send_signal(signal.SIGCONT)
        assert eventually(lambda: ask(follower, 40 * 12, 40 * 13) == 40)
        assert ask(follower, 0, 80) < 80
        status, out = read(space, b"filler %d" % (40 * 13 - 1), SIZE)
        assert status is Status.HIT and np.array_equal(out, block_bytes(b"filler 519", 4 * 519, SIZE))
