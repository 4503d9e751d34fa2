"""The cuFile device on host memory: kvikio's own calls, in its compat mode. ``test_kvikio.py`` runs this in a process with a driver.

kvikio raises on every transfer where ``libcuda.so.1`` cannot be loaded, and that is decided once in a process.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import kvikio
import kvikio.defaults
import numpy as np
import pytest

from device_conformance import PAGE, FileDeviceConformance, content, done, error_of, noise, written
from kvlode import Namespace, PathUnavailable, Status
from kvlode.engine.testing import open_on_device
from kvlode.format.errors import NoSpace
from kvlode.gds import machine
from kvlode.gds.buffers import aligned_array
from kvlode.gds.cufile import CuFileDevice, DeviceRange, device_range, is_device_buffer
from kvlode.gds.device import IoPath
from kvlode.gds.gds_proof import nvidia_fs_reads, why_not_gds
from kvlode.gds.posix import PosixDevice
from kvlode.gds.probe import open_device
from model import block_bytes


class TestCuFileDeviceOnHostMemory(FileDeviceConformance):
    io_paths: ClassVar[set[IoPath]] = {IoPath.CUFILE_COMPAT}
    unaligned_paths: ClassVar[set[IoPath]] = {IoPath.CUFILE_COMPAT}

    def make_device(self) -> Any:
        return CuFileDevice(threads=4, host="kvikio")


class TestCuFileDeviceOnHostMemoryWithSmallChunks(TestCuFileDeviceOnHostMemory):
    def make_device(self) -> Any:
        return CuFileDevice(threads=3, chunk_bytes=PAGE, host="kvikio")


class TestCuFileDeviceThatLeavesHostMemoryToPosix(FileDeviceConformance):
    """How a store opens it: cuFile is for GPU memory."""

    io_paths: ClassVar[set[IoPath]] = {IoPath.DIRECT, IoPath.BUFFERED, IoPath.CUFILE_COMPAT}
    unaligned_paths: ClassVar[set[IoPath]] = {IoPath.BUFFERED}

    def make_device(self) -> Any:
        return CuFileDevice(threads=4)


@pytest.fixture
def device() -> Iterator[CuFileDevice]:
    made = CuFileDevice(threads=4, host="kvikio")
    yield made
    made.close()


def test_the_transfers_really_go_through_kvikio(device: CuFileDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int]] = []
    for name in ("pread", "pwrite"):
        real = getattr(kvikio.CuFile, name)

        def spy(file: Any, memory: Any, size: int, offset: int, task_size: int, name: str = name, real: Any = real) -> Any:
            calls.append((name, size, offset))
            return real(file, memory, size, offset, task_size)

        monkeypatch.setattr(kvikio.CuFile, name, spy)
    file = written(device, str(tmp_path / "a"), noise(1, 4 * PAGE))
    assert np.array_equal(content(file, 4 * PAGE), noise(1, 4 * PAGE))
    assert calls == [("pwrite", 4 * PAGE, 0), ("pread", 4 * PAGE, 0)]
    file.close()


def test_errors_of_the_system_keep_their_code(device: CuFileDevice) -> None:
    full = device.open("/dev/full", "write")
    error = error_of(lambda: full.write(0, [aligned_array(PAGE)]))
    assert isinstance(error, NoSpace) and error.errno == errno.ENOSPC and error.path == "/dev/full"
    full.close()


def test_a_store_on_it_serves_what_was_put_and_counts_its_path(device: CuFileDevice, tmp_path: Path) -> None:
    descriptor = Namespace(model="m", revision="1", dtype="bfloat16", layout="flat", tokens_per_block=16, block_bytes_max=256 << 10)
    path = str(tmp_path / "store")
    keys = [b"block %d" % number for number in range(8)]
    blocks = [block_bytes(key, 0, 256 << 10) for key in keys]
    with open_on_device(device, path=path, serve_clean=False) as store:
        assert all(store.namespace(descriptor).submit_put(keys, blocks).statuses)
        assert store.flush(60.0)
    with open_on_device(device, path=path) as store:
        outs = [np.zeros(256 << 10, np.uint8) for _ in keys]
        assert store.namespace(descriptor).get_many_into(keys, outs) == [Status.HIT] * 8
        assert all(np.array_equal(out, block) for out, block in zip(outs, blocks, strict=True))
        io = store.stats()["io"]
    assert set(io) == {"cufile-compat"}


# --- what GDS needs -------------------------------------------------------------------------------------------------------


def test_gds_is_not_claimed_where_nothing_proves_it(tmp_path: Path) -> None:
    assert machine.has_cuda_driver(), "this process was to have a driver"
    assert why_not_gds(str(tmp_path)), "the stub moves no bytes to a GPU"
    with pytest.raises(PathUnavailable) as caught:
        open_device("require", str(tmp_path))
    assert "nvidia-fs" in str(caught.value) and "a GPU" in str(caught.value)
    assert "the NVIDIA driver" not in str(caught.value), "the driver is there"


def test_require_is_refused_even_when_only_the_proof_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything seems to be there: the transfer decides."""
    monkeypatch.setattr("kvlode.gds.probe.gds_missing", lambda folder: [])
    with pytest.raises(PathUnavailable, match="GPUDirect Storage was required") as caught:
        open_device("require", str(tmp_path))
    assert "missing: cuFile has no GDS here" in str(caught.value)
    device = CuFileDevice(threads=2, require_gds=True, host="kvikio")
    file = device.open(str(tmp_path / "a"), "create")
    with pytest.raises(PathUnavailable):
        done(file.write(0, [aligned_array(PAGE)]))
    assert device.counters() == {}, "no byte was moved on another path"
    file.close()
    device.close()


def test_auto_takes_cufile_only_where_a_gpu_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = open_device("auto", str(tmp_path))
    assert isinstance(device, PosixDevice) == (machine.gpu_count() == 0)
    device.close()
    monkeypatch.setattr(machine, "gpu_count", lambda: 1)
    device = open_device("auto", str(tmp_path))
    assert isinstance(device, CuFileDevice)
    assert device.paths()["device"] is IoPath.CUFILE_COMPAT, "GDS is said of a device only when a transfer proved it"
    device.close()
    monkeypatch.setattr(machine, "kvikio_import_error", lambda: "ImportError: libcufile.so.0")
    device = open_device("auto", str(tmp_path))
    assert isinstance(device, PosixDevice)
    device.close()


def test_settings_of_the_process_are_left_as_they_were_but_for_the_threads(tmp_path: Path) -> None:
    before = kvikio.defaults.get("compat_mode")
    device = CuFileDevice(threads=4, host="kvikio")
    written(device, str(tmp_path / "a"), noise(2, PAGE)).close()
    assert kvikio.defaults.get("compat_mode") == before
    assert kvikio.defaults.get("num_threads") >= 4
    device.close()


# --- GPU memory, as far as it can be told without one ----------------------------------------------------------------------


class FakeGpuArray:
    """Memory that says it is on a GPU."""

    def __init__(self, shape: tuple[int, ...], typestr: str, strides: tuple[int, ...] | None = None) -> None:
        self.__cuda_array_interface__ = {"shape": shape, "typestr": typestr, "data": (1 << 40, False), "version": 3, "strides": strides}


def test_gpu_buffers_are_taken_as_their_bytes() -> None:
    whole = FakeGpuArray((4, 8, 2), "<f2")
    assert is_device_buffer(whole) and not is_device_buffer(np.zeros(4, np.uint8))
    assert device_range(whole) == DeviceRange(1 << 40, 128, whole)
    assert device_range(FakeGpuArray((4, 8), "<f2", (16, 2))).nbytes == 64
    assert device_range(FakeGpuArray((1, 8), "<f2", (999, 2))).nbytes == 16, "the stride of a single row means nothing"
    for strides in ((2, 8), (32, 2), (16, 4)):
        with pytest.raises(ValueError, match="not contiguous"):
            device_range(FakeGpuArray((4, 8), "<f2", strides))


def test_nvidia_fs_reads_come_from_its_counters(tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    assert nvidia_fs_reads(str(stats)) is None
    stats.write_text("GDS Version: 1.14\nNVFS statistics(ver: 4.0)\nReads\t\t\t\t: n=17 ok=17 err=0 readMiB=3\n")
    assert nvidia_fs_reads(str(stats)) == 17
    stats.write_text("IO stats: Disabled\n")
    assert nvidia_fs_reads(str(stats)) is None
