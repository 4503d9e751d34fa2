"""A set of stores keeps the host contract, and loses no more than what the lost ones hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import kvlode
from conformance import StoreConformance, assert_holds, read, settled
from kvlode import (
    BlockSpace,
    CompletionQueue,
    InvalidConfig,
    LoadEstimate,
    MemoryStore,
    PutState,
    PutStatus,
    Refusal,
    Status,
    Store,
    StoreClosed,
    StoreSet,
)
from kvlode.engine import read_rate, set_followed
from kvlode.engine.config import StoreConfig
from kvlode.engine.jobs import refused
from kvlode.engine.memory_store import MemorySpace
from kvlode.engine.opening import Environment
from kvlode.engine.read_rate import ReadRate
from kvlode.engine.set_followed import FollowedStore
from kvlode.engine.stats import Counters
from kvlode.engine.store_set import open_set
from kvlode.engine.testing import ManualClock
from kvlode.format.layout import SUPERBLOCK_NAME
from kvlode.gds.late import LateDevice
from model import block_bytes, descriptor
from rig import KIB, MIB, Rig, eventually
from test_disk_store import DiskConformance

SIZE = 64 * KIB
TESTS = Path(__file__).parent
SMALL: dict[str, Any] = {"capacity": "256MiB", "buffer": "8MiB", "gds": "off"}


def following(store: Store, path: str = "other") -> FollowedStore:
    """A store that is there from the start, as if it were somebody else's."""
    return FollowedStore(path, lambda: store, lambda: "there")


def set_of(*own: Store, others: list[Store] | None = None) -> StoreSet:
    """A set over open stores, of which the others were tried."""
    followed = [following(store) for store in others or []]
    opened = StoreSet(own, followed)
    assert all(each.wait_tried(30.0) for each in followed)
    return opened


# --- the contract -----------------------------------------------------------------------------------------------------


class SetConformance(DiskConformance):
    """Own stores on devices in memory; beside them three that are read: one with blocks, one that is not there, one that is broken."""

    own_count: ClassVar[int] = 1

    @pytest.fixture(autouse=True)
    def _sets(self) -> None:
        self.rigs_of: dict[int, list[Rig]] = {}

    def make_store(self, *, capacity_bytes: int | None = None) -> Store:
        count = self.own_count
        own = [DiskConformance.make_store(self, capacity_bytes=capacity_bytes and capacity_bytes // count) for _ in range(count)]
        return self.compose(self.rigs[-len(own) :])

    def compose(self, rigs: list[Rig]) -> StoreSet:
        def broken() -> Store:
            raise OSError("on purpose")

        other = MemoryStore(clock=self.clock)
        other.namespace(descriptor()).put(b"somebody else's", b"1")
        other.counters = Counters()  # as a follower's: what its writer did is not among them
        followed = [following(other), FollowedStore("missing", broken, lambda: None), FollowedStore("broken", broken, lambda: "there")]
        made = StoreSet([rig.store for rig in rigs], followed)
        assert all(each.wait_tried(30.0) for each in followed)
        self.rigs_of[id(made)] = rigs
        return made

    def reopen(self, store: Store) -> Store:
        rigs = self.rigs_of[id(store)]
        store.close()
        for rig in rigs:
            rig.reopen()
        return self.compose(rigs)

    def damage(self, store: Store, space: BlockSpace, key: bytes) -> Store:
        rigs = self.rigs_of[id(store)]
        holding = next(rig for rig in rigs if rig.segment_of(space, key) is not None)
        store.close()
        for rig in rigs:
            if rig is holding:
                super().damage(rig.store, space, key)
            else:
                rig.reopen()
        return self.compose(rigs)


class TestSetOfOneOwnStore(SetConformance):
    pass


class TestSetOfTwoOwnStores(SetConformance):
    own_count = 2
    knows_depth = False
    small_blocks_kept = 4
    pinned_blocks = 6


WRITER = """
import os, select, sys
import numpy as np
import kvlode
from kvlode import Status
from model import block_bytes, descriptor

number, size, folders = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
own = folders.pop(number)

def key(process, i):
    return b"process %d block %d" % (process, i)

def put(space, i):
    assert space.put(key(number, i), block_bytes(key(number, i), i, size))

def answer(space, process, i):
    out = np.zeros(size, np.uint8)
    status = space.get_into(key(process, i), out)
    if status is Status.HIT:
        assert np.array_equal(out, block_bytes(key(process, i), i, size)), (process, i)
    return status

store = kvlode.open([own, *folders], capacity="256MiB", buffer="8MiB", gds="off")
space = store.namespace(descriptor())
"""
"""What every writing process of a test begins with: its own folder, and the set of all."""


class Writers:
    """Processes that each write to a folder of its own and read all of them."""

    def __init__(self, folders: list[Path], numbers: list[int], script: str) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER + textwrap.dedent(script), str(number), str(SIZE), *map(str, folders)],
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in numbers
        ]

    def tell(self, line: str) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()

    def hear(self) -> list[str]:
        """A line of each."""
        return [process.stdout.readline().strip() for process in self.processes if process.stdout is not None]

    def end(self) -> list[str]:
        """Close their input and wait; what each still had to say. A process that failed fails the test."""
        outputs = [process.communicate(timeout=60)[0].strip() for process in self.processes]
        assert [process.returncode for process in self.processes] == [0] * len(self.processes)
        return outputs

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait(30)
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


class FolderConformance(StoreConformance):
    """Real folders: ``folders()`` gives those of a set, the first of which the suite writes to."""

    can_reopen = True

    @pytest.fixture(autouse=True)
    def _closing(self) -> Iterator[None]:
        self.opened: list[StoreSet] = []
        yield
        for store in self.opened:  # also after a failed test: the next one removes the folder
            store.close()

    def folders(self) -> list[Path]:
        raise NotImplementedError

    def open(self, paths: list[Path], options: dict[str, Any]) -> StoreSet:
        self.opened.append(open_set(paths, StoreConfig.build(**options), environment=Environment(clock=self.clock)))
        return self.opened[-1]

    def make_store(self, *, capacity_bytes: int | None = None) -> Store:
        if capacity_bytes is not None:
            pytest.skip("a store of 8 MiB in files is hardly more than its index: see the sets on devices in memory")
        self.options = {"capacity": 256 * MIB, "segment_bytes": 8 * MIB, "buffer": 32 * MIB, "gds": "off"}
        self.paths = self.folders()
        return self.open(self.paths, self.options)

    def reopen(self, store: Store) -> Store:
        return self.open(self.paths, self.options)


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("idle") / str(number) for number in range(2)]
    for number, folder in enumerate(folders):
        with kvlode.open(folder, **SMALL) as store:
            assert store.namespace(descriptor()).put(b"idle %d" % number, b"1")
    return folders


@pytest.mark.slow  # the suite among four writers, below, does more and is not
class TestSetOfFourFoldersWithOneWriter(FolderConformance):
    """Two of the others have a store that nobody writes to, one folder is not there."""

    @pytest.fixture(autouse=True)
    def _tmp(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path

    @pytest.fixture(autouse=True)
    def _idle(self, idle: list[Path]) -> None:
        self.idle_folders = idle

    def folders(self) -> list[Path]:
        return [self.tmp_path / f"own {len(list(self.tmp_path.iterdir()))}", *self.idle_folders, self.tmp_path / "missing"]


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    folders = [tmp_path_factory.mktemp("set") / str(number) for number in range(4)]
    script = """
        i = hits = 0
        others = [other for other in range(1, 4) if other != number]
        while not select.select([sys.stdin], [], [], 0.1)[0]:
            put(space, i)
            assert store.flush(30.0)
            if i == 0:
                print("ready", flush=True)
            hits += sum(answer(space, other, each) is Status.HIT for other in others for each in (0, i // 4, i // 2))
            assert answer(space, number, i) is Status.HIT
            i += 1
        assert store.close(30.0)
        print(hits, flush=True)
    """
    processes = Writers(folders, [1, 2, 3], script)
    try:
        assert processes.hear() == ["ready"] * 3
        yield folders
        assert all(int(output) > 0 for output in processes.end()), "a process read nothing of the others"
    finally:
        processes.kill()


class TestSetAmongFourWritingProcesses(FolderConformance):
    """Three other processes write to their folders and read all of them, this one's too, while the suite runs here."""

    @pytest.fixture(autouse=True)
    def _writers(self, writers: list[Path]) -> None:
        self.set_folders = writers

    def folders(self) -> list[Path]:
        shutil.rmtree(self.set_folders[0], ignore_errors=True)  # each test begins with an empty store, seen by the others as a new one
        return self.set_folders

    def test_it_reads_what_the_others_write(self) -> None:
        store = self.make_store()
        space = store.namespace(descriptor())
        keys = [b"process %d block 0" % number for number in (1, 2, 3)]
        for key in keys:
            assert_holds(space, key, block_bytes(key, 0, SIZE))
        assert settled(space, keys) == [Status.HIT] * 3
        assert space.match_prefix([*keys, b"absent"]) == 3
        assert space.put(keys[0], block_bytes(keys[0], 0, SIZE)).state is PutState.EXISTS
        assert store.close()


# --- where blocks come from -------------------------------------------------------------------------------------------


def memory(**blocks: bytes) -> MemoryStore:
    """A store that has these blocks."""
    store = MemoryStore()
    for name, block in blocks.items():
        assert store.namespace(descriptor()).put(name.encode(), block)
    return store


def test_a_get_takes_each_block_from_a_store_that_has_it_and_is_one_job() -> None:
    with set_of(memory(a=b"1"), others=[memory(b=b"2"), memory(c=b"3", a=b"1")]) as store:
        space = store.namespace(descriptor())
        keys = [b"c", b"absent", b"a", b"b"]
        for look_first in (False, True):
            if look_first:
                assert space.lookup_nowait(keys) == [Status.HIT, Status.MISS, Status.HIT, Status.HIT]
            queue = CompletionQueue()
            outs = [bytearray(1) for _ in keys]
            job = space.submit_get(keys, outs, queue=queue)
            assert job.wait(30) and queue.pop() is job and queue.pop() is None
            assert list(job.statuses) == [Status.HIT, Status.MISS, Status.HIT, Status.HIT]
            assert list(job.verified) == [True, False, True, True]
            assert [bytes(out) for out in outs] == [b"3", b"\0", b"1", b"2"]
            queue.close()
        assert space.get_many_into(keys, outs, timeout=30.0) == list(job.statuses)
        assert space.match_prefix([b"a", b"b", b"c", b"absent", b"a"]) == 3
        assert [info and info.raw_bytes for info in space.info(keys)] == [1, None, 1, 1]


def test_a_damaged_block_is_taken_from_another_store_and_reported_when_there_is_none() -> None:
    own, first, second = memory(), memory(a=bytes(100), b=bytes(100)), memory(b=bytes(100))
    for block in first.blocks.values():
        block.data[7] ^= 1
    with set_of(own, others=[first, second]) as store:
        space = store.namespace(descriptor())
        assert space.contains([b"a", b"b"]) == [True, True]
        outs = [np.full(100, 0xA5, np.uint8) for _ in range(2)]
        assert space.get_many_into([b"a", b"b"], outs) == [Status.CORRUPT, Status.HIT]
        assert not outs[1].any()
        first.namespace(descriptor()).submit_put([b"a"], [bytes(100)])  # nobody found out there: the copy is as bad as it was
        assert space.contains([b"a"]) == [False] and settled(space, [b"a"]) == [Status.MISS]
        assert read(space, b"a", 100)[0] is Status.MISS
        assert space.put(b"a", bytes(100)).state is PutState.ACCEPTED
        assert_holds(space, b"a", np.zeros(100, np.uint8))


def test_a_lookup_is_pending_only_while_no_store_says_hit() -> None:
    late = MemoryStore(pending_first=True)
    late.namespace(descriptor()).put(b"b", b"2")
    with set_of(memory(a=b"1"), others=[late]) as store:
        space = store.namespace(descriptor())
        assert space.lookup_nowait([b"a", b"b", b"c"]) == [Status.HIT, Status.PENDING, Status.PENDING]
        assert space.lookup_nowait([b"a", b"b", b"c"]) == [Status.HIT, Status.HIT, Status.MISS]


def test_a_block_that_another_store_is_known_to_have_is_not_written_again() -> None:
    own, other = memory(), memory(a=b"1")
    with set_of(own, others=[other]) as store:
        space = store.namespace(descriptor())
        assert space.put(b"a", b"1").state is PutState.EXISTS
        job = space.submit_put([b"x", b"a", b"y"], [b"1", b"1", b"2"], own="borrow")
        assert job.wait(30)
        assert [status.state for status in job.statuses] == [PutState.DURABLE, PutState.EXISTS, PutState.DURABLE]
        assert own.namespace(descriptor()).contains([b"x", b"a", b"y"]) == [True, False, True]
        assert [info.depth for info in space.info([b"x", b"y"]) if info] == [0, 1]


def test_deleting_and_dropping_leave_the_stores_of_others_alone() -> None:
    with set_of(memory(a=b"1", b=b"1"), others=[memory(a=b"1")]) as store:
        space = store.namespace(descriptor())
        assert space.delete([b"a", b"b", b"absent"]) == 2
        assert space.contains([b"a", b"b"]) == [True, False]
        space.drop()
        assert_holds(space, b"a", np.frombuffer(b"1", np.uint8))
        with space.pin([b"a", b"b"]) as kept:
            assert kept == 0


def test_after_cancel_no_other_store_is_asked() -> None:
    rig = Rig(ManualClock(), wrap=lambda inner: LateDevice(inner, holding=()), serve_clean=False)
    block = block_bytes(b"a", 1, SIZE)
    assert rig.store.namespace(descriptor(block_bytes_max=SIZE)).put(b"a", block) and rig.store.flush()
    other = memory()
    with set_of(rig.store, others=[other]) as store:
        space = store.namespace(descriptor(block_bytes_max=SIZE))
        rig.device.hold("read")
        out = np.zeros(SIZE, np.uint8)
        job = space.submit_get([b"absent", b"a"], [bytearray(1), out])
        assert rig.device.wait_for_held(1)
        assert list(job.statuses) == [Status.PENDING] * 2 and not job.done() and not job.wait(0.01)
        canceller = threading.Thread(target=job.cancel)
        canceller.start()
        assert eventually(lambda: job._cancelled)
        rig.device.hold()
        rig.device.release()
        canceller.join(30)
        assert job.done() and job.statuses[0] is Status.CANCELLED
        assert job.statuses[1] in (Status.CANCELLED, Status.HIT)
        assert other.counters.get("misses") == 0


def test_a_deadline_holds_while_a_drive_of_another_hangs() -> None:
    rig = Rig(ManualClock(), wrap=lambda inner: LateDevice(inner, holding=()), serve_clean=False)
    assert rig.store.namespace(descriptor(block_bytes_max=SIZE)).put(b"slow", block_bytes(b"slow", 1, SIZE)) and rig.store.flush()
    store = set_of(memory(), others=[rig.store])
    space = store.namespace(descriptor(block_bytes_max=SIZE))
    assert space.put(b"quick", b"1")
    rig.device.hold("read")
    out = np.full(SIZE, 0xA5, np.uint8)
    assert space.get_many_into([b"quick", b"slow"], [bytearray(1), out], timeout=0.1) == [Status.HIT, Status.PENDING]
    assert (out == 0xA5).all()
    started_s = time.monotonic()
    assert not store.close(timeout=0.2)
    assert time.monotonic() - started_s < 60
    rig.device.hold()
    rig.device.release()
    assert (out == 0xA5).all()


# --- stores that come and go ------------------------------------------------------------------------------------------


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_followed, "RETRY_S", 0.02)


@pytest.mark.usefixtures("quick_retries")
def test_a_folder_that_appears_is_read_and_one_that_goes_is_missed(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    key, block = b"k", block_bytes(b"k", 1, SIZE)
    with kvlode.open([own, other], **SMALL) as store:
        space = store.namespace(descriptor())
        assert read(space, key, SIZE)[0] is Status.MISS and not other.exists()
        for _ in range(2):
            with kvlode.open(other, **SMALL) as writer:
                assert writer.namespace(descriptor()).put(key, block) and writer.flush()
                assert eventually(lambda: space.contains([key]) == [True])
                assert_holds(space, key, block)
            assert_holds(space, key, block)  # there is no writer any more, and everything is there
            shutil.rmtree(other)
            assert eventually(lambda: space.contains([key]) == [False])
            assert read(space, key, SIZE)[0] is Status.MISS
            assert "gone" in store.stats()["stores"][1]["lost"] or "no store" in store.stats()["stores"][1]["lost"]


@pytest.mark.usefixtures("quick_retries")
def test_a_broken_store_is_misses_and_is_tried_again(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    with kvlode.open(other, **SMALL) as writer:
        assert writer.namespace(descriptor()).put(b"k", b"1")
    superblock = other / SUPERBLOCK_NAME
    whole = superblock.read_bytes()
    superblock.write_bytes(bytes(len(whole)))
    with kvlode.open([own, other], **SMALL) as store:
        space = store.namespace(descriptor())
        assert settled(space, [b"k"]) == [Status.MISS]
        assert store.stats()["stores"][1]["lost"]
        superblock.write_bytes(whole)
        assert eventually(lambda: space.contains([b"k"]) == [True])
        assert_holds(space, b"k", np.frombuffer(b"1", np.uint8))


class StuckStore(MemoryStore):
    """Does not answer while ``stuck`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()
        self.go_on.set()

    def namespace(self, descriptor: kvlode.Namespace) -> MemorySpace:
        return StuckSpace(self, descriptor)


class StuckSpace(MemorySpace):
    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        assert isinstance(self._store, StuckStore)
        assert self._store.go_on.wait(30)
        return super().contains(keys)

    def lookup_nowait(self, keys: Sequence[bytes]) -> list[Status]:
        return [Status.PENDING] * len(keys)


@pytest.mark.usefixtures("quick_retries")
def test_a_store_that_does_not_answer_counts_as_lost_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_followed, "SILENT_S_MAX", 0.1)
    other = StuckStore()
    with set_of(memory(), others=[other]) as store:
        space = store.namespace(descriptor())
        assert space.lookup_nowait([b"k"]) == [Status.PENDING]
        other.go_on.clear()
        assert eventually(lambda: space.lookup_nowait([b"k"]) == [Status.MISS])
        assert "no answer" in store.stats()["stores"][1]["lost"]
        other.go_on.set()
        assert eventually(lambda: space.lookup_nowait([b"k"]) == [Status.PENDING])


def test_any_error_of_another_store_is_a_miss() -> None:
    class BrokenStore(MemoryStore):
        def check_usable(self) -> None:
            raise OSError("on purpose")

        def close(self, timeout: float | None = None) -> bool:
            return True

    other = BrokenStore.__new__(BrokenStore)
    MemoryStore.__init__(other)
    followed = following(other)
    space_of = MemorySpace(other, descriptor())
    suspected = threading.Event()
    followed.space = lambda _descriptor: space_of  # type: ignore[method-assign]
    followed.suspect = lambda _error: suspected.set()  # type: ignore[method-assign]
    store = StoreSet([memory(a=b"1")], [followed])
    assert followed.wait_tried(30)
    space = store.namespace(descriptor())
    keys = [b"a", b"b"]
    assert space.contains(keys) == [True, False] and space.match_prefix(keys) == 1
    assert space.lookup_nowait(keys) == [Status.HIT, Status.MISS]
    assert space.get_many_into(keys, [bytearray(1), bytearray(1)]) == [Status.HIT, Status.MISS]
    assert space.get_many_into(keys, [bytearray(1), bytearray(1)], timeout=30) == [Status.HIT, Status.MISS]
    assert space.info(keys)[1] is None and space.estimate(keys).raw_bytes == 1
    space.touch(keys)
    assert space.put(b"b", b"2").state is PutState.ACCEPTED
    assert suspected.is_set()
    assert store.close()


@pytest.mark.usefixtures("quick_retries")
def test_a_store_that_raises_is_opened_anew() -> None:
    openings = [memory(a=b"1"), memory(a=b"1")]
    first = openings[0]
    followed = FollowedStore("other", lambda: openings.pop(0), lambda: "there")
    with StoreSet([memory()], [followed]) as store:
        space = store.namespace(descriptor())
        assert eventually(lambda: space.contains([b"a"]) == [True])
        first.blocks = None  # type: ignore[assignment]
        assert space.contains([b"a"]) == [False]
        assert eventually(lambda: space.contains([b"a"]) == [True])
        assert not openings


def test_two_sets_of_one_process_write_to_one_folder_each_and_read_both(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    with kvlode.open(folders, **SMALL) as first:
        with kvlode.open(folders[::-1], **SMALL) as second:
            spaces = [store.namespace(descriptor()) for store in (first, second)]
            for number, (store, space) in enumerate(zip((first, second), spaces, strict=True)):
                key = b"%d" % number
                assert space.put(key, block_bytes(key, number, SIZE)) and store.flush()
            for space in spaces:
                assert eventually(lambda space=space: space.contains([b"0", b"1"]) == [True, True])  # type: ignore[misc]
                for number in range(2):
                    assert_holds(space, b"%d" % number, block_bytes(b"%d" % number, number, SIZE))
            stats = first.stats()
            assert [each["role"] for each in stats["stores"]] == ["writer", "follower"]
            assert [each["own"] for each in stats["stores"]] == [True, False]
            assert stats["capacity_bytes"] == 256 * MIB
        assert_holds(spaces[0], b"1", block_bytes(b"1", 1, SIZE))
    with pytest.raises(StoreClosed):
        first.stats()


def test_four_processes_write_to_their_own_folders_and_read_all_of_them(tmp_path: Path) -> None:
    script = """
        for line in sys.stdin:
            if line == "put\\n":
                for i in range(20):
                    put(space, i)
                assert store.flush(60.0)
                print("done", flush=True)
            else:
                keys = [key(process, i) for process in range(4) for i in range(20)]
                deadline_s = time.monotonic() + 60
                while space.match_prefix(keys) < len(keys):  # nothing announces what other processes do
                    assert time.monotonic() < deadline_s, store.stats()["stores"]
                assert {answer(space, process, i) for process in range(4) for i in range(20)} == {Status.HIT}
                outs = [np.zeros(size, np.uint8) for _ in keys]
                assert set(space.get_many_into(keys, outs, timeout=60)) == {Status.HIT}
                print(sum(out.any() for out in outs), flush=True)
        assert store.close(30.0)
    """
    writers = Writers([tmp_path / str(number) for number in range(4)], [0, 1, 2, 3], "import time\n" + textwrap.dedent(script))
    try:
        writers.tell("put")
        assert writers.hear() == ["done"] * 4
        writers.tell("read")
        assert writers.hear() == ["80"] * 4
        assert writers.end() == [""] * 4
    finally:
        writers.kill()


def test_a_set_that_nobody_closed_is_written_at_exit_and_a_forked_child_has_a_dead_one(tmp_path: Path) -> None:
    script = """
        import time
        put(space, 1)
        child = os.fork()
        if child == 0:
            try:
                space.contains([b"k"])
            except kvlode.StoreClosed:
                sys.exit(0)
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    with kvlode.open(tmp_path / "1", **SMALL) as other:
        assert other.namespace(descriptor()).put(b"k", b"1") and other.flush()
        writers = Writers([tmp_path / "0", tmp_path / "1", tmp_path / "2"], [0], textwrap.dedent(script))
        try:
            assert writers.end() == [""]
        finally:
            writers.kill()
    with kvlode.open(tmp_path / "0", **SMALL) as store:
        key = b"process 0 block 1"
        assert_holds(store.namespace(descriptor()), key, block_bytes(key, 1, SIZE))


# --- several drives ---------------------------------------------------------------------------------------------------


def test_blocks_are_spread_over_the_own_folders(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    keys = [b"%d" % number for number in range(200)]
    with kvlode.open(folders, own=2, **SMALL) as store:
        space = store.namespace(descriptor())
        assert space.submit_put(keys, [b"1"] * 200).wait(30) and store.flush()
        puts = [each["counters"]["put_blocks"] for each in store.stats()["stores"][:2]]
        assert sum(puts) == 200 and min(puts) > 60
        assert space.match_prefix(keys) == 200
        kinds = [event.kind for event in store.events().events]
        assert kinds and not store.events(store.events().next).events
        with pytest.raises(InvalidConfig, match="events"):
            store.events(3)
    with kvlode.open([folders[1], folders[0]], **SMALL) as store:  # in another order, and one of them read only: nothing is lost
        space = store.namespace(descriptor())
        assert space.match_prefix(keys) == 200
        assert space.get_many_into(keys, [bytearray(1) for _ in keys]) == [Status.HIT] * 200
    with kvlode.open([folders[1], folders[0]], own=2, **SMALL) as store:
        space = store.namespace(descriptor())
        assert {status.state for status in space.submit_put(keys, [b"1"] * 200).statuses} == {PutState.EXISTS}
        assert space.delete(keys) == 200 and space.match_prefix(keys) == 0


class RefusingStore(MemoryStore):
    """Refuses every put, as a store does whose drive has failed."""

    def insert(self, ident: bytes, block: Any) -> PutStatus:
        return refused(Refusal.STORE_FAILED)


def test_what_a_failed_own_store_refuses_goes_to_the_next_one() -> None:
    good = memory()
    with set_of(RefusingStore(), good) as store:
        space = store.namespace(descriptor())
        keys = [b"%d" % number for number in range(40)]
        queue = CompletionQueue()
        job = space.submit_put(keys[:20], [b"1"] * 20, queue=queue)
        assert all(job.statuses) and job.done() and queue.pop() is job and queue.pop() is None
        assert all(space.put(key, b"1") for key in keys[20:])
        assert space.contains(keys) == [True] * 40
        assert store.flush() and [status.state for status in job.statuses] == [PutState.DURABLE] * 20
        queue.close()
    with set_of(RefusingStore(), RefusingStore()) as store:
        space = store.namespace(descriptor())
        assert space.submit_put([b"a", b"b"], [b"1", b"2"]).statuses == [PutStatus(PutState.REFUSED, Refusal.STORE_FAILED)] * 2
        assert space.put(b"a", b"1") == PutStatus(PutState.REFUSED, Refusal.STORE_FAILED)


def test_wrong_use_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for paths, own in ((folders, 0), (folders, 3), ([], 1), ([folders[0], folders[0]], 1)):
        with pytest.raises(InvalidConfig):
            kvlode.open(paths, own=own, **SMALL)
    with pytest.raises(InvalidConfig, match="own"):
        kvlode.open(folders[0], own=2, **SMALL)  # type: ignore[call-overload]
    with pytest.raises(InvalidConfig):
        StoreSet([])
    assert not list(tmp_path.iterdir())
    folders[1].write_text("no folder")
    with pytest.raises((kvlode.KvlodeError, OSError)):
        kvlode.open(folders, own=2, **SMALL)
    kvlode.open(folders[0], **SMALL).close()  # nobody holds it


# --- estimates --------------------------------------------------------------------------------------------------------


class TimedStore(MemoryStore):
    """Says that each block takes a second."""

    def namespace(self, descriptor: kvlode.Namespace) -> MemorySpace:
        return TimedSpace(self, descriptor)


class TimedSpace(MemorySpace):
    def estimate(self, keys: Sequence[bytes]) -> LoadEstimate:
        return LoadEstimate(10 * len(keys), 7 * len(keys), float(len(keys)))


def test_stores_on_one_drive_take_turns_and_drives_work_side_by_side() -> None:
    stores = [TimedStore() for _ in range(4)]
    for number, store in enumerate(stores):
        MemorySpace(store, descriptor()).submit_put([b"%d %d" % (number, i) for i in range(number + 1)], [b"1"] * (number + 1))
    followed = [following(stores[2], "one"), following(stores[3], "two")]
    keys = [b"%d %d" % (number, i) for number in range(4) for i in range(number + 1)]
    with StoreSet(stores[:2], followed, drives=["x", "one"]) as store:
        assert all(each.wait_tried(30) for each in followed)
        space = store.namespace(descriptor())
        assert space.estimate([*keys, b"absent"]) == LoadEstimate(100, 70, 5.0)  # on "one": 2 + 3; on "two": 4; on "x": 1
        assert space.estimate([b"absent"]) == LoadEstimate(0, 0, 0.0)


def test_a_read_rate_follows_recent_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(read_rate.time, "monotonic", lambda: now_s[0])
    rate = ReadRate()
    assert rate.seconds_for(10**9) == pytest.approx(1.0)
    for _ in range(40):
        rate.begin()
        rate.begin()  # two at once: their time counts once
        now_s[0] += 0.2
        rate.end(10**7)
        rate.end(10**7)
        now_s[0] += 5.0  # idle
    assert rate.seconds_for(10**9) == pytest.approx(10.0, rel=0.01)
    for _ in range(40):
        rate.begin()
        now_s[0] += 1.0
        rate.end(2 * 10**9)
    assert rate.seconds_for(10**9) == pytest.approx(0.5, rel=0.01)
    rate.begin()
    now_s[0] += 20.0
    rate.end(0)  # an error after a long time
    assert rate.seconds_for(10**9) > 5


def test_the_estimate_of_a_store_on_disk_follows_its_drive() -> None:
    rig = Rig(ManualClock(), wrap=lambda inner: LateDevice(inner, holding=()), serve_clean=False)
    space = rig.store.namespace(descriptor(block_bytes_max=SIZE))
    assert space.put(b"a", block_bytes(b"a", 0, SIZE))
    assert space.estimate([b"a"]).stored_bytes == SIZE  # in the buffer
    assert rig.store.flush()
    before = space.estimate([b"a"])
    rig.device.hold("read")
    job = space.submit_get([b"a"], [np.zeros(SIZE, np.uint8)])
    assert rig.device.wait_for_held(1)
    assert not job.wait(0.2)
    rig.device.hold()
    rig.device.release()
    assert job.wait(30)
    assert eventually(lambda: space.estimate([b"a"]).seconds > 2 * before.seconds)
    rig.close()
