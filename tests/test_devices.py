"""One suite for every device: what is written is read, sync and sizes mean what they say, wrong use is an error that says so."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvlode.format.errors import DeviceError, KvlodeError
from kvlode.gds.buffers import aligned_array
from kvlode.gds.memory import MemoryDevice
from kvlode.gds.posix import PosixDevice
from kvlode.gds.recording import RecordingDevice

PAGE = 4096
WAIT_S = 30.0

MAKERS: dict[str, Callable[[], Any]] = {
    "posix with O_DIRECT": PosixDevice,
    "posix with small chunks": lambda: PosixDevice(threads=3, chunk_bytes=PAGE),
    "posix through the page cache": lambda: PosixDevice(direct=False),
    "memory": MemoryDevice,
    "recording": lambda: RecordingDevice(MemoryDevice()),
}


@pytest.fixture(params=sorted(MAKERS))
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = MAKERS[request.param]()
    yield made
    made.close()


@pytest.fixture
def folder(device: Any, tmp_path: Path) -> str:
    path = str(tmp_path / "below")
    device.make_folder(path)
    return path


def noise(seed: int, size_bytes: int) -> np.ndarray:
    area = aligned_array(size_bytes)
    area[:] = np.frombuffer(random.Random(seed).randbytes(size_bytes), np.uint8)
    return area


def done(future: Future[int]) -> int:
    return future.result(WAIT_S)


def test_what_is_written_is_read_into_one_or_several_buffers(device: Any, folder: str) -> None:
    data = noise(1, 40 * PAGE)
    file = device.open(f"{folder}/a", "create")
    assert done(file.write(0, [data[: 8 * PAGE], data[8 * PAGE :]])) == data.nbytes
    file.sync()
    padded = aligned_array(42 * PAGE)
    padded[:] = 0xA5
    out = padded[PAGE : 41 * PAGE]
    assert done(file.read(0, [out[:PAGE], out[PAGE : 17 * PAGE], out[17 * PAGE :]])) == data.nbytes
    assert np.array_equal(out, data)
    assert (padded[:PAGE] == 0xA5).all() and (padded[41 * PAGE :] == 0xA5).all()
    file.close()


def test_a_read_over_the_end_is_short(device: Any, folder: str) -> None:
    file = device.open(f"{folder}/a", "create")
    assert done(file.write(0, [noise(2, 2 * PAGE)])) == 2 * PAGE
    out = aligned_array(4 * PAGE)
    assert done(file.read(PAGE, [out])) == PAGE
    assert done(file.read(8 * PAGE, [out])) == 0
    file.close()


def test_unaligned_requests_are_served_all_the_same(device: Any, folder: str) -> None:
    data = noise(3, 6 * PAGE)
    file = device.open(f"{folder}/a", "create")
    assert done(file.write(0, [data])) == data.nbytes
    out = np.zeros(5000, np.uint8)
    assert done(file.read(777, [out[:123], out[123:]])) == 5000
    assert np.array_equal(out, data[777:5777])
    file.close()


def test_preallocated_space_reads_as_zeros_and_truncation_cuts(device: Any, folder: str) -> None:
    file = device.open(f"{folder}/a", "create")
    file.preallocate(64 * PAGE)
    out = noise(4, PAGE)
    assert file.status().size_bytes == 64 * PAGE
    assert done(file.read(5 * PAGE, [out])) == PAGE
    assert not out.any()
    file.truncate(3 * PAGE)
    assert file.status().size_bytes == 3 * PAGE
    file.close()
    assert device.status(f"{folder}/a").size_bytes == 3 * PAGE


def test_a_punched_range_reads_as_zeros_and_its_neighbours_stay(device: Any, folder: str) -> None:
    data = noise(5, 8 * PAGE)
    file = device.open(f"{folder}/a", "create")
    assert done(file.write(0, [data])) == data.nbytes
    file.punch(2 * PAGE, 3 * PAGE)
    out = aligned_array(8 * PAGE)
    assert done(file.read(0, [out])) == data.nbytes
    assert not out[2 * PAGE : 5 * PAGE].any()
    assert np.array_equal(out[: 2 * PAGE], data[: 2 * PAGE]) and np.array_equal(out[5 * PAGE :], data[5 * PAGE :])
    file.close()


def test_many_transfers_at_once_keep_apart(device: Any, folder: str) -> None:
    pieces = [noise(100 + i, 3 * PAGE) for i in range(64)]
    file = device.open(f"{folder}/a", "create")
    writes = [file.write(i * 3 * PAGE, [piece]) for i, piece in enumerate(pieces)]
    assert [done(write) for write in writes] == [3 * PAGE] * 64
    outs = [aligned_array(3 * PAGE) for _ in pieces]
    reads = [file.read(i * 3 * PAGE, [out]) for i, out in enumerate(outs)]
    assert [done(read) for read in reads] == [3 * PAGE] * 64
    assert all(np.array_equal(out, piece) for out, piece in zip(outs, pieces, strict=True))
    file.close()


def test_names_are_listed_renamed_and_removed(device: Any, folder: str) -> None:
    for name in ("a", "b"):
        device.open(f"{folder}/{name}", "create").close()
    device.rename(f"{folder}/a", f"{folder}/c")
    device.sync_folder(folder)
    assert sorted(device.list_folder(folder)) == ["b", "c"]
    device.remove(f"{folder}/b")
    assert device.list_folder(folder) == ["c"]
    assert device.status(f"{folder}/b") is None
    assert device.free_bytes(folder) > 0


def test_what_is_missing_is_an_error_with_the_path(device: Any, folder: str) -> None:
    with pytest.raises(DeviceError, match="absent"):
        device.open(f"{folder}/absent", "read")


def test_a_closed_file_takes_no_more_requests(device: Any, folder: str) -> None:
    file = device.open(f"{folder}/a", "create")
    file.close()
    file.close()
    with pytest.raises((KvlodeError, ValueError)):
        done(file.read(0, [aligned_array(PAGE)]))


def test_a_lock_has_one_holder_or_many_sharers(device: Any, folder: str) -> None:
    lock = device.lock(f"{folder}/lock")
    assert lock is not None
    assert device.lock(f"{folder}/lock") is None
    assert device.lock(f"{folder}/lock", shared=True) is None
    lock.release()
    sharers = [device.lock(f"{folder}/lock", shared=True) for _ in range(2)]
    assert all(sharers)
    assert device.lock(f"{folder}/lock") is None
    for sharer in sharers:
        sharer.release()


def test_every_byte_is_counted_by_its_path(device: Any, folder: str) -> None:
    file = device.open(f"{folder}/a", "create")
    assert done(file.write(0, [noise(6, 4 * PAGE)])) == 4 * PAGE
    assert done(file.read(0, [aligned_array(2 * PAGE)])) == 2 * PAGE
    file.close()
    counters = device.counters().values()
    assert sum(counter.write_bytes for counter in counters) == 4 * PAGE
    assert sum(counter.read_bytes for counter in counters) == 2 * PAGE
