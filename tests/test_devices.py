"""Every device keeps the promises of ``kvlode.gds.device`` (``device_conformance.py``), and what only some of them do."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from device_conformance import PAGE, WAIT_S, DeviceConformance, FileDeviceConformance, content, done, error_of, noise, written
from kvlode.format.errors import DeviceError, NoSpace
from kvlode.gds.buffers import aligned_array
from kvlode.gds.device import Device, DeviceFile, IoPath
from kvlode.gds.memory import MemoryDevice
from kvlode.gds.posix import PosixDevice
from kvlode.gds.testing import FaultyDevice, LateDevice, ManualClock, RecordingDevice
from kvlode.gds.wrapping import WrappingDevice


class PosixConformance(FileDeviceConformance):
    io_paths: ClassVar[set[IoPath]] = {IoPath.DIRECT, IoPath.BUFFERED}  # buffered where the file system of the tests refuses O_DIRECT
    unaligned_paths: ClassVar[set[IoPath]] = {IoPath.BUFFERED}

    def make_device(self) -> Any:
        return PosixDevice()


class TestPosixDevice(PosixConformance):
    pass


class TestPosixDeviceWithSmallChunks(PosixConformance):
    """Every request is cut into many."""

    def make_device(self) -> Any:
        return PosixDevice(threads=3, chunk_bytes=PAGE)


class TestPosixDeviceThroughThePageCache(PosixConformance):
    io_paths: ClassVar[set[IoPath]] = {IoPath.BUFFERED}

    def make_device(self) -> Any:
        return PosixDevice(direct=False)


class MemoryConformance(DeviceConformance):
    io_paths: ClassVar[set[IoPath]] = {IoPath.MEMORY}
    unaligned_paths: ClassVar[set[IoPath]] = {IoPath.MEMORY}

    def make_device(self) -> Any:
        return MemoryDevice()


class TestMemoryDevice(MemoryConformance):
    pass


class TestMemoryDeviceWithThreads(MemoryConformance):
    def make_device(self) -> Any:
        return MemoryDevice(threads=3)


class TestRecordingDevice(MemoryConformance):
    def make_device(self) -> Any:
        return RecordingDevice(MemoryDevice())


class TestFaultyDeviceWithoutFaults(PosixConformance):
    def make_device(self) -> Any:
        return FaultyDevice(PosixDevice())


class TestLateDeviceThatHoldsNothing(PosixConformance):
    def make_device(self) -> Any:
        return LateDevice(PosixDevice(), holding=())


class TestWrappersAroundEachOther(MemoryConformance):
    def make_device(self) -> Any:
        return LateDevice(FaultyDevice(WrappingDevice(MemoryDevice(threads=2))), holding=())


DEVICES = [PosixDevice, MemoryDevice, lambda: RecordingDevice(MemoryDevice()), lambda: FaultyDevice(MemoryDevice())]


@pytest.mark.parametrize("make", DEVICES)
def test_devices_and_their_files_have_every_method_of_the_protocol(make: Any, tmp_path: Path) -> None:
    device = make()
    assert isinstance(device, Device)
    device.make_folder(str(tmp_path / "below"))
    file = device.open(str(tmp_path / "below" / "a"), "create")
    assert isinstance(file, DeviceFile)
    file.close()
    device.close()


# --- POSIX ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def posix() -> Any:
    device = PosixDevice(threads=4, chunk_bytes=PAGE)
    yield device
    device.close()


def test_no_space_is_an_error_of_its_own(posix: PosixDevice) -> None:
    full = posix.open("/dev/full", "write")
    error = error_of(lambda: full.write(0, [aligned_array(PAGE)]))
    assert isinstance(error, NoSpace) and error.errno == errno.ENOSPC
    full.close()


def test_a_failed_sync_is_final(posix: PosixDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports a lost write once; a second sync would claim success."""
    file = written(posix, str(tmp_path / "a"), noise(1, PAGE))

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        with pytest.raises(DeviceError):
            file.sync()
    with pytest.raises(DeviceError, match="after a failed sync") as caught:
        file.sync()
    assert caught.value.errno == errno.EIO
    file.close()


def test_a_failed_request_ends_only_when_none_of_its_chunks_runs(
    posix: PosixDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then the drive may write into the caller's memory."""
    file = written(posix, str(tmp_path / "a"), noise(2, 4 * PAGE))
    failed, let_go = threading.Event(), threading.Event()
    read = os.preadv

    def preadv(descriptor: int, views: Any, offset: int) -> int:
        if offset == 0:
            failed.set()
            raise OSError(errno.EIO, "injected")
        assert let_go.wait(WAIT_S)
        return read(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    out = aligned_array(4 * PAGE)
    future = file.read(0, [out])
    assert failed.wait(WAIT_S)
    assert not future.done() and not future.cancel() and not out.any()
    let_go.set()
    with pytest.raises(DeviceError) as caught:
        done(future)
    assert caught.value.errno == errno.EIO and caught.value.offset == 0
    assert np.array_equal(out[PAGE:], noise(2, 4 * PAGE)[PAGE:]), "the other chunks were read to their end"
    file.close()


def test_system_calls_that_move_less_are_repeated(posix: PosixDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, offset: read(descriptor, [views[0][:512]], offset))
    monkeypatch.setattr(os, "pwritev", lambda descriptor, views, offset: write(descriptor, [views[0][:512]], offset))
    data = noise(3, 3 * PAGE + 1000)
    file = written(posix, str(tmp_path / "a"), data)
    assert np.array_equal(content(file, 4 * PAGE), data)
    file.close()


def test_a_file_system_that_refuses_o_direct_is_served_through_the_page_cache_and_says_so(tmp_path: Path) -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("no file system in memory at /dev/shm")
    device = PosixDevice()
    assert device.paths() == {"host": IoPath.DIRECT}
    path = f"/dev/shm/kvlode-test-{os.getpid()}"
    try:
        file = written(device, path, noise(4, 4 * PAGE))
        assert not file.direct
        assert np.array_equal(content(file, 4 * PAGE), noise(4, 4 * PAGE))
        file.close()
    finally:
        os.unlink(path)
    assert device.paths() == {"host": IoPath.BUFFERED}
    assert set(device.counters()) == {IoPath.BUFFERED}
    device.close()


def test_transfers_that_o_direct_refuses_are_repeated_through_the_page_cache(
    posix: PosixDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system may take the flag and refuse the transfer: a larger block size, a network mount."""
    file = written(posix, str(tmp_path / "a"), noise(5, 4 * PAGE))
    direct = file.fileno()
    read = os.preadv

    def preadv(descriptor: int, views: Any, offset: int) -> int:
        if descriptor == direct and file.direct:
            raise OSError(errno.EINVAL, "injected")
        return read(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert np.array_equal(content(file, 4 * PAGE), noise(5, 4 * PAGE))
    assert not file.direct and posix.paths() == {"host": IoPath.BUFFERED}
    file.close()


def test_preallocation_that_runs_out_gives_back_what_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = PosixDevice()
    file = written(device, str(tmp_path / "a"), noise(6, PAGE))

    def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
        os.posix_fallocate(descriptor, offset, length // 2)
        raise OSError(errno.ENOSPC, "injected")

    monkeypatch.setattr("kvlode.gds.posix.fallocate", fallocate)
    with pytest.raises(NoSpace):
        file.preallocate(64 * PAGE)
    assert file.status().size_bytes == PAGE
    file.close()
    device.close()


def test_no_descriptor_is_left_by_a_file_that_was_closed_or_forgotten(tmp_path: Path) -> None:
    device = PosixDevice()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(8):
        file = written(device, str(tmp_path / f"{number}"), noise(7, PAGE)[:100])
        if number % 2:
            file.close()
        del file
    assert len(os.listdir("/proc/self/fd")) == before
    device.close()


# --- memory ---------------------------------------------------------------------------------------------------------------


def test_a_memory_device_that_is_full_refuses_and_counts_freed_space_again() -> None:
    device = MemoryDevice(capacity_bytes=8 * PAGE)
    device.make_folder("/x")
    file = device.open("/x/a", "create")
    file.preallocate(6 * PAGE)
    assert device.free_bytes("/x") == 2 * PAGE
    assert isinstance(error_of(lambda: file.write(6 * PAGE, [aligned_array(3 * PAGE)])), NoSpace)
    with pytest.raises(NoSpace):
        file.preallocate(9 * PAGE)
    assert file.status().size_bytes == 6 * PAGE
    device.remove("/x/a")
    assert device.free_bytes("/x") == 2 * PAGE, "an open file holds its space"
    file.close()
    assert device.free_bytes("/x") == 8 * PAGE


def test_only_what_was_synced_survives_a_power_cut() -> None:
    device = MemoryDevice()
    device.make_folder("/x/y")
    file = written(device, "/x/y/a", noise(8, 2 * PAGE))
    assert device.crash().list_folder("/x/y") == [], "the name was not synced"
    file.sync()
    device.sync_folder("/x/y")
    assert done(file.write(0, [noise(9, PAGE)])) == PAGE
    assert done(file.write(2 * PAGE, [noise(9, PAGE)])) == PAGE
    old, new = noise(8, 2 * PAGE), noise(9, PAGE)
    for survivor, expected in ((device.crash(), old), (device.crash(keep="all"), np.concatenate([new, old[PAGE:], new]))):
        again = survivor.open("/x/y/a", "read")
        assert np.array_equal(content(again, 8 * PAGE), expected)
        again.close()
    device.power_off()
    with pytest.raises(DeviceError):
        file.sync()
    error_of(lambda: file.read(0, [aligned_array(PAGE)]))


def test_a_memory_device_of_limited_bandwidth_takes_its_time() -> None:
    clock = ManualClock()
    device = MemoryDevice(bandwidth_bytes_s=PAGE, clock=clock, threads=1)
    device.make_folder("/x")
    file = device.open("/x/a", "create")
    futures: list[Future[int]] = [file.write(0, [aligned_array(2 * PAGE)]), file.write(2 * PAGE, [aligned_array(PAGE)])]
    assert clock.wait_for_waiters(1)
    clock.advance(1.9)
    assert not futures[0].done()
    clock.advance(0.1)
    assert done(futures[0]) == 2 * PAGE
    assert clock.wait_for_waiters(1) and not futures[1].done()
    clock.advance(1.0)
    assert done(futures[1]) == PAGE
    file.close()
    device.close()


def test_a_pipe_or_a_folder_is_an_error_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    device = PosixDevice()
    try:
        for path in (tmp_path / "pipe", tmp_path):
            with pytest.raises(DeviceError, match=str(path)):
                device.open(str(path), "read")
    finally:
        device.close()
