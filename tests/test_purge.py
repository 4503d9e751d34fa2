"""Purging by tag, on the drive: what was put with the tag is gone, its bytes too where that was asked for, and nothing else is."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvlode
from command import run_here
from drive_words import files_on
from kvlode import BlockSpace, DiskStore, Status, StoreConfig, StoreFailed, StoreSet
from kvlode.engine.opening import follow_beside
from kvlode.engine.testing import ManualClock
from kvlode.format.layout import PAGE_BYTES
from kvlode.gds import posix
from kvlode.gds.device import Device
from kvlode.gds.faulty import Fault, FaultyDevice
from kvlode.gds.memory import MemoryDevice
from kvlode.gds.os_calls import fallocate
from kvlode.gds.recording import RecordingDevice, Write, replay
from model import block_bytes, descriptor
from rig import KIB, MIB, Rig, put_blocks, read

WAIT_S = 60.0
SECRET = b"the tenant's own words, which are nowhere else "
OTHER = b"what somebody else has stored, here for long ..."
SIZE = 20_000
SPACE = descriptor(block_bytes_max=64 * KIB)


def secret_block(number: int = 0, size: int = SIZE) -> np.ndarray:
    return pattern(SECRET, number, size)


def pattern(words: bytes, number: int, size: int = SIZE) -> np.ndarray:
    text = (words + b"%06d " % number) * (size // len(words) + 1)
    return np.frombuffer(text[:size], np.uint8).copy()


def files_with(folder: Path, words: bytes = SECRET) -> list[str]:
    """Files below a folder that hold these words, freed space that a file still has included."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and words in p.read_bytes())


def drive_holds(memory: MemoryDevice) -> list[str]:
    return files_on(memory, SECRET)


def open_here(folder: Path, **options: Any) -> DiskStore:
    small: dict[str, Any] = {"capacity": "64MiB", "buffer": "4MiB", "segment_bytes": MIB, "gds": "off", "codec": "raw"}
    return kvlode.open(folder, **(small | options))  # type: ignore[return-value]


def put_some(space: BlockSpace, count: int = 6) -> None:
    """Blocks of a tenant, each beside one of somebody else."""
    for number in range(count):
        assert space.put(b"secret %d" % number, secret_block(number), tag="tenant", meta=b"meta of " + SECRET)
        assert space.put(b"other %d" % number, pattern(OTHER, number), tag="other")


def assert_only_others(space: BlockSpace, count: int = 6) -> None:
    assert space.contains([b"secret %d" % n for n in range(count)]) == [False] * count
    for number in range(count):
        status, out = read(space, b"other %d" % number, SIZE)
        assert status is Status.HIT and np.array_equal(out, pattern(OTHER, number))


def assert_clean(folder: Path) -> None:
    done = run_here("fsck", folder, "--full")
    assert done.code == 0, done.out + done.err


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(ManualClock(), capacity=32 * MIB, buffer=4 * MIB, codec="raw")
    yield made
    made.close()


# --- bytes on the drive -------------------------------------------------------------------------------------------------


def test_a_physical_purge_leaves_none_of_the_bytes_in_any_file(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with open_here(folder) as store:
        space = store.namespace(SPACE)
        put_some(space)
        assert store.flush(WAIT_S)
        put_blocks(space, 0, 40, 64 * KIB)  # the segment is full, and sealed
        assert space.put(b"secret open", secret_block(90), tag="tenant") and store.flush(WAIT_S)
        assert space.put(b"secret dirty", secret_block(91), tag="tenant")
        assert len(files_with(folder)) >= 2
        report = store.purge("tenant", physical=True)
        assert report.complete and report.blocks == 8 and report.records_erased >= 7
        assert report.bytes_erased == report.records_erased * (PAGE_BYTES + 5 * PAGE_BYTES)
        assert files_with(folder) == [] and len(files_with(folder, OTHER)) >= 1
        assert_only_others(space)
        counters = store.stats()["counters"]
        assert counters["purged_blocks"] == 8 and counters["purged_bytes"] == report.bytes_erased
    assert files_with(folder) == []
    assert_clean(folder)
    for lose_index in (False, True):
        if lose_index:
            shutil.rmtree(folder / "index")
        with open_here(folder) as store:
            assert_only_others(store.namespace(SPACE))
            again = store.purge("tenant", physical=True)
            assert (again.complete, again.blocks, again.records_erased, again.bytes_erased) == (True, 0, 0, 0)
    assert_clean(folder)


def test_a_logical_purge_leaves_the_bytes_and_a_physical_one_afterwards_takes_them(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with open_here(folder) as store:
        put_some(store.namespace(SPACE))
        assert store.flush(WAIT_S)
        assert store.purge("tenant").blocks == 6
        assert files_with(folder)
    with open_here(folder) as store:  # a process that has not opened the namespace
        assert store.find_tagged("tenant") == (0, 6 * 6 * PAGE_BYTES)
        report = store.purge("tenant", physical=True)
        assert (report.complete, report.blocks, report.records_erased) == (True, 0, 6)
        assert store.find_tagged("tenant") == (0, 0)
        assert_only_others(store.namespace(SPACE))
    assert files_with(folder) == []
    assert_clean(folder)


def test_bytes_that_no_key_leads_to_any_more_go_too(rig: Rig) -> None:
    """Deleted, expired and put again, given up as damaged: the index knows none of these records."""
    space = rig.store.namespace(SPACE)
    assert space.put(b"deleted", secret_block(1), tag="tenant")
    assert space.put(b"expired", secret_block(2), tag="tenant", ttl=1)
    assert space.put(b"damaged", secret_block(3), tag="tenant") and rig.store.flush(WAIT_S)
    space.delete([b"deleted"])
    rig.clock.advance(5)
    assert space.put(b"expired", pattern(OTHER, 2)) and rig.store.flush(WAIT_S)
    core = rig.store._core
    entry = core.find([space.digest + b"damaged"])[0]
    assert entry is not None
    core.forget_entry(space.digest + b"damaged", entry, "corrupt_blocks")
    report = rig.store.purge("tenant", physical=True)
    assert report.complete and report.records_erased == 3
    assert drive_holds(rig.memory) == []
    reopened = rig.reopen(lose_index=True).namespace(SPACE)
    assert reopened.contains([b"deleted", b"expired", b"damaged"]) == [False] * 3


def test_a_table_that_is_damaged_does_not_hide_blocks_from_a_purge(rig: Rig) -> None:
    put_some(rig.store.namespace(SPACE))
    store = rig.reopen()
    segment = next(s for s in store._core.segments.all() if s.sealed)
    path = store._core.segments.path(segment.segment_id)
    page = np.zeros(PAGE_BYTES, np.uint8)
    file = rig.memory.open(path, "write")
    offset = segment.size_bytes - 2 * PAGE_BYTES
    file.read(offset, [page]).result()
    page[100] ^= 1
    file.write(offset, [page]).result()
    file.sync()
    file.close()
    report = store.purge("tenant", physical=True)
    assert report.complete and report.blocks == report.records_erased == 6
    assert drive_holds(rig.memory) == []
    assert_only_others(rig.reopen(lose_index=True).namespace(SPACE))


def test_what_a_repair_has_set_aside_is_emptied(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with open_here(folder) as store:
        put_some(store.namespace(SPACE))
    aside = folder / "quarantine" / "00000000000000aa.seg"
    aside.write_bytes(secret_block(5).tobytes())
    note = {"schema": 1, "what": "moved file", "first_page": "00", "headers": [{"offset": 0, "hex": SECRET.hex()}], "reason": "damage"}
    aside.with_name(aside.name + ".json").write_text(json.dumps(note))
    (folder / "quarantine" / "index.aside").mkdir()
    with open_here(folder) as store:
        report = store.purge("tenant", physical=True)
        assert report.complete and report.quarantine_files_erased == 1
        assert store.purge("tenant", physical=True).quarantine_files_erased == 0
    assert aside.exists() and not aside.stat().st_size
    kept = json.loads(aside.with_name(aside.name + ".json").read_text())
    assert "headers" not in kept and kept["reason"] == "damage"
    assert files_with(folder) == [] and files_with(folder, SECRET.hex().encode()) == []
    assert run_here("fsck", folder, "--full").code == 0


# --- memory -------------------------------------------------------------------------------------------------------------


def test_a_physical_purge_leaves_none_of_the_bytes_in_the_memory_of_the_store(rig: Rig) -> None:
    space = rig.store.namespace(SPACE)
    put_some(space)
    assert rig.store.flush(WAIT_S)
    for number in range(6):
        assert read(space, b"secret %d" % number, SIZE)[0] is Status.HIT
    core = rig.store._core
    small = block_bytes(b"small", 0, 3000)
    assert space.put(b"short secret", np.frombuffer(SECRET * 20, np.uint8), tag="tenant", meta=SECRET) and rig.store.flush(WAIT_S)
    assert SECRET in core.buffer._arena._memory.tobytes()
    assert rig.store.purge("tenant", physical=True).complete
    assert SECRET not in core.buffer._arena._memory.tobytes()
    for pool in (core._staging, core._bounce):
        assert not any(SECRET in array.tobytes() for array in pool._free)
        assert not pool.lent_slots or pool._to_wipe
    assert space.put(b"small", small) and np.array_equal(read(space, b"small", 3000)[1], small)


def test_memory_of_a_tagged_block_is_overwritten_when_the_buffer_lets_go_of_it(rig: Rig) -> None:
    space = rig.store.namespace(SPACE)
    assert space.put(b"secret", secret_block(), tag="tenant") and rig.store.flush(WAIT_S)
    rig.store._core.buffer.forget_clean([space.digest + b"secret"])
    assert SECRET not in rig.store._core.buffer._arena._memory.tobytes()
    assert np.array_equal(read(space, b"secret", SIZE)[1], secret_block())


# --- crashes, time, failures --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> tuple[list[Any], int]:
    """Every operation of a store that is filled and then purged, and where the purge began."""
    devices: list[RecordingDevice] = []

    def wrap(inner: Device) -> Device:
        devices.append(RecordingDevice(inner))
        return devices[-1]

    rig = Rig(ManualClock(), wrap=wrap, capacity=32 * MIB, buffer=4 * MIB, codec="raw")
    space = rig.store.namespace(SPACE)
    put_some(space, 4)
    assert rig.store.flush(WAIT_S)
    began = len(devices[0].operations())
    assert rig.store.purge("tenant", physical=True).complete
    operations = devices[0].operations()
    rig.close()
    return operations, began


@given(cut=st.floats(0, 1), seed=st.integers(0, 1000), keep=st.sampled_from(["none", "all", "random"]))
def test_a_purge_that_a_crash_cut_short_is_finished_by_the_next(recorded: tuple[list[Any], int], cut: float, seed: int, keep: Any) -> None:
    operations, began = recorded
    end = began + int(cut * (len(operations) - began))
    rig = Rig(ManualClock(), capacity=32 * MIB, buffer=4 * MIB, codec="raw")
    rig.close()
    rig._use(replay(operations[:end]).crash(seed, keep))
    rig.index = type(rig.index)()
    store = rig.open()
    whole = end == len(operations)
    present = store.namespace(SPACE).contains([b"secret %d" % n for n in range(4)])
    assert not whole or not any(present)
    report = store.purge("tenant", physical=True)
    assert report.complete and report.blocks <= 4
    assert drive_holds(rig.memory) == []
    assert_only_others(store.namespace(SPACE), 4)
    assert_only_others(rig.reopen(lose_index=True).namespace(SPACE), 4)
    assert drive_holds(rig.memory) == []
    rig.close()


def test_bytes_are_erased_only_when_the_deletes_are_durable(recorded: tuple[list[Any], int]) -> None:
    operations, began = recorded
    kinds = [type(operation).__name__ for operation in operations[began:]]
    first_hole = kinds.index("Punch")
    tombstones = [i for i, operation in enumerate(operations[began:]) if isinstance(operation, Write) and b"secret 0" in operation.data]
    assert tombstones and tombstones[0] < first_hole
    assert "Sync" in kinds[tombstones[0] : first_hole], kinds
    assert "Sync" in kinds[first_hole:]


def test_a_purge_without_time_says_so_and_can_be_asked_for_again(rig: Rig) -> None:
    put_some(rig.store.namespace(SPACE))
    report = rig.store.purge("tenant", timeout=0.0)
    assert not report.complete and "time" in report.reasons[0]
    assert rig.store.purge("tenant", physical=True).complete
    assert drive_holds(rig.memory) == []


def test_a_drive_that_refuses_holes_leaves_a_purge_incomplete_until_it_takes_them() -> None:
    devices: list[FaultyDevice] = []

    def wrap(inner: Device) -> Device:
        devices.append(FaultyDevice(inner))
        return devices[-1]

    rig = Rig(ManualClock(), wrap=wrap, capacity=32 * MIB, buffer=4 * MIB, codec="raw")
    put_some(rig.store.namespace(SPACE))
    assert rig.store.flush(WAIT_S)
    devices[0].inject(Fault("punch", errno=errno.EIO))
    report = rig.store.purge("tenant", physical=True)
    assert not report.complete and report.blocks == 6 and "punch" in report.reasons[0]
    assert drive_holds(rig.memory) != []
    devices[0].clear()
    report = rig.store.purge("tenant", physical=True)
    assert report.complete and (report.blocks, report.records_erased) == (0, 6)
    assert drive_holds(rig.memory) == []
    rig.close()


def test_where_the_file_system_cannot_punch_zeros_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, mode: int, offset: int, length: int) -> None:
        if mode:
            raise OSError(errno.EOPNOTSUPP, "no holes here")
        fallocate(descriptor, mode, offset, length)

    monkeypatch.setattr(posix, "fallocate", refuse)
    folder = tmp_path / "store"
    with open_here(folder) as store:
        put_some(store.namespace(SPACE))
        assert store.flush(WAIT_S)
        report = store.purge("tenant", physical=True)
        assert report.complete and report.records_erased == 6
        assert files_with(folder) == []
    assert_clean(folder)


def test_a_purge_of_a_follower_or_a_failed_store_is_refused(tmp_path: Path) -> None:
    with open_here(tmp_path / "store") as store:
        put_some(store.namespace(SPACE))
        assert store.flush(WAIT_S)
        store._core.health.latch(OSError("broken"))
        with pytest.raises(StoreFailed, match="purge needs a store that can write"):
            store.purge("tenant")
    with kvlode.follow(tmp_path / "store", gds="off") as follower, pytest.raises(StoreFailed, match="purge"):
        follower.purge("tenant")


# --- beside everything else ---------------------------------------------------------------------------------------------


def test_purges_beside_puts_reads_and_reclaim(rig: Rig) -> None:
    """Reclaim carries hot blocks of the tenant forward meanwhile: their copies are found."""
    space = rig.store.namespace(SPACE)
    failures: list[BaseException] = []
    stop = threading.Event()

    def guarded(work: Any) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    def fill() -> None:
        number = 0
        while not stop.is_set():
            key = b"load %d" % number
            space.put(key, block_bytes(key, 4 * number, 64 * KIB))
            number += 1

    def load() -> None:
        while not stop.is_set():
            for number in range(4):
                status, out = read(space, b"secret %d" % number, SIZE)
                assert status in (Status.HIT, Status.MISS, Status.CORRUPT), status
                assert status is not Status.HIT or np.array_equal(out, secret_block(number))

    put_some(space, 4)
    threads = [threading.Thread(target=guarded, args=(work,)) for work in (fill, load)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            for number in range(4):
                space.put(b"secret %d" % number, secret_block(number), tag="tenant")
            assert rig.store.flush(WAIT_S)
            space.touch([b"secret %d" % number for number in range(4)] * 8)
            report = rig.store.purge("tenant", physical=True, timeout=WAIT_S)
            assert report.complete, report.reasons
            assert space.contains([b"secret %d" % number for number in range(4)]) == [False] * 4
            assert drive_holds(rig.memory) == []
    finally:
        stop.set()
        for thread in threads:
            thread.join(WAIT_S)
    assert not failures, failures


def test_a_block_that_is_being_put_over_purged_bytes_stays(rig: Rig) -> None:
    """Its key was deleted with the tag before; the put is not finished when the purge comes."""
    space = rig.store.namespace(SPACE)
    assert space.put(b"k", secret_block(), tag="tenant") and rig.store.flush(WAIT_S)
    core = rig.store._core
    entry = core.find([space.digest + b"k"])[0]
    assert entry is not None
    core.forget_entry(space.digest + b"k", entry, "lost_blocks")
    rig.store._core.buffer.forget_clean([space.digest + b"k"])
    fresh = space._entry(b"k", None, None, None, b"")  # type: ignore[attr-defined]
    block = pattern(OTHER, 1)
    assert core.buffer.reserve(fresh, block.nbytes, 0.0, now_ns=rig.clock.now_ns())
    report = rig.store.purge("tenant", physical=True)
    assert report.complete and (report.blocks, report.records_erased) == (1, 1)
    core.buffer.withdraw(fresh)
    assert space.put(b"k", block) and rig.store.flush(WAIT_S)
    assert np.array_equal(read(rig.reopen(lose_index=True).namespace(SPACE), b"k", SIZE)[1], block)


def test_a_set_purges_the_stores_it_writes_to(tmp_path: Path) -> None:
    small: dict[str, Any] = {"capacity": "64MiB", "buffer": "4MiB", "segment_bytes": MIB, "gds": "off", "codec": "raw"}
    with kvlode.open([tmp_path / "a", tmp_path / "b"], own=2, **small) as store:
        assert isinstance(store, StoreSet)
        space = store.namespace(SPACE)
        put_some(space, 12)
        assert store.flush(WAIT_S)
        assert all(files_with(tmp_path / name) for name in "ab")
        report = store.purge("tenant", physical=True)
        assert report.complete and report.blocks == report.records_erased == 12
        assert_only_others(space, 12)
    assert files_with(tmp_path) == []
    assert os.listdir(tmp_path / "a" / "segments")


def test_a_follower_never_serves_a_wrong_byte_of_a_purged_block(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with open_here(folder, serve_clean=False) as store:
        put_some(store.namespace(SPACE))
        assert store.flush(WAIT_S)
        with follow_beside(folder, StoreConfig.build(gds="off")) as follower:
            seen = follower.namespace(SPACE)
            assert np.array_equal(read(seen, b"secret 0", SIZE)[1], secret_block(0))
            assert store.purge("tenant", physical=True).complete
            statuses = {read(seen, b"secret %d" % number, SIZE)[0] for number in range(6)}
            assert statuses <= {Status.MISS, Status.CORRUPT}
            assert_only_others(seen)


def test_a_scrub_of_a_purged_store_finds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with open_here(folder) as store:
        put_some(store.namespace(SPACE))
        assert store.flush(WAIT_S) and store.purge("tenant", physical=True).complete
    done = run_here("scrub", folder, "--once", "--rate", "none", "--json")
    assert done.code == 0, done.out + done.err


# --- the command --------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_would_do_and_does_it_with_consent(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with open_here(folder) as store:
        put_some(store.namespace(SPACE))
    dry = run_here("purge", folder, "--tag", "tenant", "--physical", "--json")
    assert (dry.code, dry.json["dry_run"], dry.json["blocks"], dry.json["bytes"]) == (0, True, 6, 6 * 6 * PAGE_BYTES)
    assert "6 blocks would be deleted" in run_here("purge", folder, "--tag", "tenant").out
    assert files_with(folder)
    done = run_here("purge", folder, "--tag", "tenant", "--physical", "--yes", "--json")
    assert (done.code, done.json["blocks"], done.json["records_erased"], done.json["complete"]) == (0, 6, 6, True)
    assert files_with(folder) == []
    assert "0 blocks deleted, 0 records (0 B) erased" in run_here("purge", folder, "--tag", "tenant", "--physical", "--yes").out
    with open_here(folder) as store:
        assert_only_others(store.namespace(SPACE))
        locked = run_here("purge", folder, "--tag", "tenant", "--yes", "--capacity", "64MiB")
        assert locked.code == 16 and "already open" in locked.err
    nowhere = run_here("purge", tmp_path / "nowhere", "--tag", "tenant", "--yes")
    assert nowhere.code == 16 and not (tmp_path / "nowhere").exists()
