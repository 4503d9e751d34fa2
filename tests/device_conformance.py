"""What ``kvlode.gds.device`` promises, as tests that every device inherits.

A subclass says how to make its device and which paths its bytes may be counted under. ``test_devices.py`` has the
devices of this machine, ``kvikio_devices.py`` the one that needs a process with a CUDA driver (a stub will do).
"""

from __future__ import annotations

import errno
import gc
import os
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlode.format.errors import DeviceError
from kvlode.gds.buffers import aligned_array
from kvlode.gds.device import IoPath
from rig import eventually

PAGE = 4096
WAIT_S = 30.0


def noise(seed: int, size_bytes: int) -> np.ndarray:
    """Aligned bytes that follow from the seed."""
    area = aligned_array(size_bytes)
    area[:] = np.frombuffer(random.Random(seed).randbytes(size_bytes), np.uint8)
    return area


def done(future: Future[int]) -> int:
    """The result of a transfer, in bounded time."""
    return future.result(WAIT_S)


def error_of(request: Callable[[], Future[int]]) -> DeviceError:
    """The error of a request that must fail, whether the call raises it or the future has it."""
    with pytest.raises(DeviceError) as caught:
        done(request())
    return caught.value


def written(device: Any, path: str, data: np.ndarray) -> Any:
    """A new file with this content, open for writing."""
    file = device.open(path, "create")
    assert done(file.write(0, [data])) == data.nbytes
    return file


def content(file: Any, length: int, offset: int = 0) -> np.ndarray:
    """What a read of ``length`` bytes finds, cut to what it delivered."""
    out = aligned_array(-(-length // PAGE) * PAGE)[:length]
    out[:] = 0xA5
    return out[: done(file.read(offset, [out]))]


_PLACES = st.integers(1, 12 * PAGE) | st.integers(1, 12).map(lambda page: page * PAGE)
CHANGES = st.tuples(st.sampled_from(["write", "write", "punch", "truncate", "preallocate", "sync"]), _PLACES, _PLACES)
"""What is done to a file, from where, over how many bytes (truncation: to the first number, preallocation: to the second)."""


def _change(file: Any, held: bytearray, number: int, kind: str, start: int, length: int) -> None:
    """Do one of ``CHANGES`` to a file, and to the bytes that it should hold."""
    match kind:
        case "write":
            piece = noise(number, length)
            assert done(file.write(start, [piece[: length // 3], piece[length // 3 :]])) == length
            held.extend(bytes(max(0, start + length - len(held))))
            held[start : start + length] = piece.tobytes()
        case "punch":
            file.punch(start, length)
            stop = min(start + length, len(held))
            held[start:stop] = bytes(max(0, stop - start))
        case "truncate":
            file.truncate(start)
            held[:] = held[:start] + bytes(max(0, start - len(held)))
        case "preallocate":
            file.preallocate(length)
            held.extend(bytes(max(0, length - len(held))))
        case "sync":
            file.sync()


class DeviceConformance:
    """See the module."""

    io_paths: ClassVar[set[IoPath]]
    """Where bytes of aligned requests may be counted."""
    unaligned_paths: ClassVar[set[IoPath]]
    """Where bytes of other requests may be counted."""

    def make_device(self) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def device(self) -> Iterator[Any]:
        made = self.make_device()
        yield made
        made.close()

    @pytest.fixture
    def folder(self, device: Any, tmp_path: Path) -> str:
        path = str(tmp_path / "below")
        device.make_folder(path)
        return path

    # --- reading and writing ------------------------------------------------------------------------------------

    def test_several_buffers_are_filled_one_after_the_other_and_nothing_around_them(self, device: Any, folder: str) -> None:
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

    @pytest.mark.parametrize("count", [1025, 1500])
    def test_more_buffers_than_one_system_call_takes(self, device: Any, folder: str, count: int) -> None:
        data = noise(2, count * 64)
        pieces = [data[i * 64 : (i + 1) * 64] for i in range(count)]
        file = device.open(f"{folder}/a", "create")
        assert done(file.write(0, pieces)) == data.nbytes
        out = np.zeros(data.nbytes, np.uint8)
        assert done(file.read(0, [out[i * 64 : (i + 1) * 64] for i in range(count)])) == data.nbytes
        assert np.array_equal(out, data)
        file.close()

    def test_a_read_is_short_at_the_end_and_leaves_the_rest_of_the_buffer(self, device: Any, folder: str) -> None:
        data = noise(3, 2 * PAGE + 100)
        file = written(device, f"{folder}/a", data)
        out = aligned_array(4 * PAGE)
        out[:] = 0xA5
        assert done(file.read(PAGE, [out[:PAGE], out[PAGE:]])) == PAGE + 100
        assert np.array_equal(out[: PAGE + 100], data[PAGE:])
        assert done(file.read(2 * PAGE + 100, [out])) == 0
        assert done(file.read(8 * PAGE, [out])) == 0
        file.close()

    @pytest.mark.parametrize("offset", [0, PAGE, 100])
    def test_a_read_on_the_own_thread_is_the_same_read(self, device: Any, folder: str, offset: int) -> None:
        file = written(device, f"{folder}/a", noise(3, 20 * PAGE))
        for count in (0, 1, 3, 1100):  # more buffers than one system call takes
            ours, theirs = ([aligned_array(PAGE) for _ in range(count)] for _ in range(2))
            for buffer in (*ours, *theirs):
                buffer[:] = 0xA5
            assert file.read_now(offset, ours) == done(file.read(offset, theirs))
            assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        long = aligned_array(24 << 20)  # longer than one system call is meant to be
        assert file.read_now(offset, [long]) == 20 * PAGE - offset
        file.close()
        with pytest.raises(DeviceError) as caught:
            file.read_now(0, [long])
        assert caught.value.errno == errno.EBADF

    def test_a_request_without_bytes_is_done_at_once(self, device: Any, folder: str) -> None:
        file = written(device, f"{folder}/a", noise(4, PAGE))
        for buffers in ([], [np.zeros(0, np.uint8)], [b""]):
            assert done(file.write(PAGE, buffers)) == 0
        assert done(file.read(0, [])) == 0
        assert done(file.read(0, [np.zeros(0, np.uint8)])) == 0
        assert file.status().size_bytes == PAGE
        file.close()

    def test_a_write_behind_the_end_leaves_zeros_between(self, device: Any, folder: str) -> None:
        file = written(device, f"{folder}/a", noise(5, PAGE))
        assert done(file.write(5 * PAGE, [noise(6, PAGE)])) == PAGE
        assert file.status().size_bytes == 6 * PAGE
        assert not content(file, 4 * PAGE, PAGE).any()
        file.close()

    def test_bytes_and_arrays_of_other_types_are_written_as_their_bytes(self, device: Any, folder: str) -> None:
        values = np.arange(1024, dtype=np.float32).reshape(32, 32)
        file = device.open(f"{folder}/a", "create")
        assert done(file.write(0, [values, b"end"])) == 4096 + 3
        assert content(file, 4099).tobytes() == values.tobytes() + b"end"
        file.close()

    @pytest.mark.parametrize("offset", [1, 511, 512, 777, 4095])
    def test_unaligned_requests_are_served_all_the_same(self, device: Any, folder: str, offset: int) -> None:
        data = noise(7, 6 * PAGE)
        file = written(device, f"{folder}/a", data)
        assert done(file.write(offset, [data[:300], data[300:1001]])) == 1001
        expected = data.copy()
        expected[offset : offset + 1001] = data[:1001]
        out = np.zeros(5001, np.uint8)[1:]
        assert done(file.read(offset, [out[:123], out[123:]])) == 5000
        assert np.array_equal(out, expected[offset : offset + 5000])
        file.close()

    def test_many_transfers_from_many_threads_keep_apart(self, device: Any, folder: str) -> None:
        file = device.open(f"{folder}/a", "create")
        wrong: list[str] = []

        def run(thread: int) -> None:
            for number in range(thread, 64, 4):
                piece = noise(100 + number, 3 * PAGE)
                if done(file.write(number * 3 * PAGE, [piece])) != 3 * PAGE:
                    wrong.append(f"write {number}")
                if not np.array_equal(content(file, 3 * PAGE, number * 3 * PAGE), piece):
                    wrong.append(f"read {number}")

        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert not wrong and not any(thread.is_alive() for thread in threads)
        out = content(file, 64 * 3 * PAGE)
        assert all(np.array_equal(out[i * 3 * PAGE : (i + 1) * 3 * PAGE], noise(100 + i, 3 * PAGE)) for i in range(64))
        file.close()

    def test_no_reference_to_a_buffer_is_kept_once_its_future_is_done(self, device: Any, folder: str) -> None:
        file = device.open(f"{folder}/a", "create")
        reader = device.open(f"{folder}/a", "read")
        source, target, refused = aligned_array(16 * PAGE), aligned_array(16 * PAGE), aligned_array(PAGE)
        references = [weakref.ref(buffer) for buffer in (source, target, refused)]
        futures = [file.write(0, [source])]
        assert done(futures[0]) == 16 * PAGE
        futures.append(file.read(0, [target]))
        assert done(futures[1]) == 16 * PAGE
        with pytest.raises(DeviceError):
            futures.append(reader.write(0, [refused]))
            done(futures[2])
        del source, target, refused

        def collected() -> bool:
            gc.collect()
            return all(reference() is None for reference in references)

        assert eventually(collected), "the device, or a future that is done, still refers to a buffer"
        reader.close()
        file.close()

    def test_any_sequence_of_changes_leaves_what_a_byte_string_would_hold(self, device: Any, folder: str) -> None:
        @settings(max_examples=25)
        @given(st.lists(CHANGES, min_size=1, max_size=8))
        def check(changes: list[tuple[str, int, int]]) -> None:
            file = device.open(f"{folder}/any", "create")
            held = bytearray()
            for number, (kind, start, length) in enumerate(changes):
                _change(file, held, number, kind, start, length)
                assert file.status().size_bytes == len(held), kind
            assert content(file, len(held) + PAGE).tobytes() == bytes(held)
            file.close()
            device.remove(f"{folder}/any")

        check()

    # --- space ------------------------------------------------------------------------------------------------------

    def test_preallocated_space_is_there_reads_as_zeros_and_keeps_what_was_written(self, device: Any, folder: str) -> None:
        data = noise(8, PAGE)
        file = written(device, f"{folder}/a", data)
        file.preallocate(64 * PAGE)
        assert file.status().size_bytes == 64 * PAGE
        assert file.status().allocated_bytes >= 64 * PAGE
        assert np.array_equal(content(file, PAGE), data)
        assert not content(file, 63 * PAGE, PAGE).any()
        file.close()

    def test_truncation_cuts_and_frees_and_extends_with_zeros(self, device: Any, folder: str) -> None:
        file = written(device, f"{folder}/a", noise(9, 64 * PAGE))
        file.sync()
        before = file.status().allocated_bytes
        file.truncate(PAGE + 7)
        file.sync()
        assert file.status().size_bytes == PAGE + 7
        assert file.status().allocated_bytes < before
        file.truncate(3 * PAGE)
        assert np.array_equal(content(file, PAGE + 7), noise(9, 64 * PAGE)[: PAGE + 7])
        assert not content(file, 2 * PAGE - 7, PAGE + 7).any(), "what was cut off came back"
        file.close()
        assert device.status(f"{folder}/a").size_bytes == 3 * PAGE

    def test_a_punched_range_reads_as_zeros_and_its_neighbours_stay(self, device: Any, folder: str) -> None:
        data = noise(10, 64 * PAGE)
        file = written(device, f"{folder}/a", data)
        file.sync()
        before = file.status().allocated_bytes
        file.punch(2 * PAGE, 30 * PAGE)
        file.punch(40 * PAGE + 5, 10)
        file.punch(63 * PAGE, 10 * PAGE)
        file.sync()
        expected = data.copy()
        for start, length in ((2 * PAGE, 30 * PAGE), (40 * PAGE + 5, 10), (63 * PAGE, PAGE)):
            expected[start : start + length] = 0
        assert np.array_equal(content(file, 64 * PAGE), expected)
        assert file.status().size_bytes == 64 * PAGE
        assert file.status().allocated_bytes < before
        file.close()

    def test_free_space_can_be_asked_for(self, device: Any, folder: str) -> None:
        assert device.free_bytes(folder) > 0

    # --- errors -----------------------------------------------------------------------------------------------------

    def test_wrong_memory_and_wrong_places_are_refused(self, device: Any, folder: str) -> None:
        file = written(device, f"{folder}/a", noise(11, PAGE))
        for wrong in (
            lambda: file.read(0, [b"read-only memory"]),
            lambda: file.read(0, [aligned_array(PAGE)[::2]]),
            lambda: file.write(0, [aligned_array(PAGE)[::2]]),
            lambda: file.read(-PAGE, [aligned_array(PAGE)]),
            lambda: file.write(-PAGE, [aligned_array(PAGE)]),
        ):
            with pytest.raises(ValueError):
                done(wrong())
        assert np.array_equal(content(file, PAGE), noise(11, PAGE))
        file.close()

    def test_a_file_that_is_open_for_reading_refuses_changes(self, device: Any, folder: str) -> None:
        data = noise(12, 2 * PAGE)
        written(device, f"{folder}/a", data).close()
        file = device.open(f"{folder}/a", "read")
        assert f"{folder}/a" in str(error_of(lambda: file.write(0, [noise(13, PAGE)])))
        assert f"{folder}/a" in str(error_of(lambda: file.write(1, [b"unaligned"])))
        for change in (lambda: file.truncate(0), lambda: file.preallocate(4 * PAGE), lambda: file.punch(0, PAGE)):
            with pytest.raises(DeviceError):
                change()
        assert np.array_equal(content(file, 4 * PAGE), data)
        file.close()

    def test_errors_say_operation_path_and_code(self, device: Any, folder: str) -> None:
        absent, elsewhere = f"{folder}/absent", f"{folder}/no folder/a"
        for call in (
            lambda: device.open(absent, "read"),
            lambda: device.open(absent, "write"),
            lambda: device.open(elsewhere, "create"),
            lambda: device.remove(absent),
            lambda: device.rename(absent, f"{folder}/b"),
            lambda: device.list_folder(absent),
            lambda: device.sync_folder(absent),
            lambda: device.lock(elsewhere),
        ):
            with pytest.raises(DeviceError, match=r"absent|no folder") as caught:
                call()
            assert caught.value.errno == errno.ENOENT
        assert device.status(absent) is None
        assert device.status(elsewhere) is None
        written(device, f"{folder}/a", noise(14, PAGE)).close()
        with pytest.raises(DeviceError) as caught:
            device.open(f"{folder}/a", "create")
        assert caught.value.errno == errno.EEXIST
        assert device.status(f"{folder}/a").size_bytes == PAGE, "the file that was there is as it was"

    # --- the end of a file ------------------------------------------------------------------------------------------

    def test_a_closed_file_takes_no_more_requests_and_may_be_closed_again(self, device: Any, folder: str) -> None:
        file = written(device, f"{folder}/a", noise(15, PAGE))
        file.close()
        file.close()
        calls = (file.sync, file.status, lambda: file.truncate(0), lambda: file.preallocate(PAGE), lambda: file.punch(0, PAGE))
        for call in (*calls, lambda: done(file.read(0, [aligned_array(PAGE)])), lambda: done(file.write(0, [aligned_array(PAGE)]))):
            with pytest.raises(DeviceError) as caught:
                call()
            assert caught.value.errno == errno.EBADF
        assert device.status(f"{folder}/a").size_bytes == PAGE

    def test_closing_a_file_waits_for_its_transfers(self, device: Any, folder: str) -> None:
        file = device.open(f"{folder}/a", "create")
        pieces = [noise(200 + number, 64 * PAGE) for number in range(16)]
        futures = [file.write(number * 64 * PAGE, [piece]) for number, piece in enumerate(pieces)]
        file.close()
        assert all(future.done() for future in futures)
        assert [done(future) for future in futures] == [64 * PAGE] * 16
        again = device.open(f"{folder}/a", "read")
        assert np.array_equal(content(again, 16 * 64 * PAGE), np.concatenate(pieces))
        again.close()

    def test_closing_the_device_ends_what_was_submitted(self, tmp_path: Path) -> None:
        device = self.make_device()
        device.make_folder(str(tmp_path / "below"))
        file = device.open(str(tmp_path / "below" / "a"), "create")
        futures = [file.write(number * 64 * PAGE, [noise(number, 64 * PAGE)]) for number in range(8)]
        device.close()
        assert all(future.done() for future in futures)
        assert [done(future) for future in futures] == [64 * PAGE] * 8
        file.close()
        device.close()

    # --- names ------------------------------------------------------------------------------------------------------

    def test_folders_are_made_with_their_parents_and_may_exist(self, device: Any, folder: str) -> None:
        for _ in range(2):
            device.make_folder(f"{folder}/x/y/z")
        written(device, f"{folder}/x/y/z/file", noise(16, PAGE)).close()
        assert device.list_folder(folder) == ["x"]
        assert device.list_folder(f"{folder}/x/y") == ["z"]
        with pytest.raises(DeviceError):
            device.make_folder(f"{folder}/x/y/z/file/below")

    def test_names_are_listed_renamed_and_removed(self, device: Any, folder: str) -> None:
        for number, name in enumerate(("b", "a", "c")):
            written(device, f"{folder}/{name}", noise(number, PAGE)).close()
        assert device.list_folder(folder) == ["a", "b", "c"]
        device.rename(f"{folder}/a", f"{folder}/c")
        device.sync_folder(folder)
        assert device.list_folder(folder) == ["b", "c"]
        file = device.open(f"{folder}/c", "read")
        assert np.array_equal(content(file, PAGE), noise(1, PAGE)), "the target was replaced"
        file.close()
        device.remove(f"{folder}/b")
        assert device.list_folder(folder) == ["c"]
        assert device.status(f"{folder}/b") is None

    def test_an_open_file_outlives_its_name(self, device: Any, folder: str) -> None:
        file = written(device, f"{folder}/a", noise(17, 4 * PAGE))
        device.rename(f"{folder}/a", f"{folder}/b")
        device.remove(f"{folder}/b")
        out = np.zeros(100, np.uint8)
        assert done(file.read(1, [out])) == 100
        assert np.array_equal(out, noise(17, 4 * PAGE)[1:101])
        assert np.array_equal(content(file, 4 * PAGE), noise(17, 4 * PAGE))
        assert done(file.write(0, [b"unaligned"])) == 9
        file.sync()
        file.close()
        assert device.list_folder(folder) == []

    # --- locks ------------------------------------------------------------------------------------------------------

    def test_a_lock_has_one_holder_or_many_sharers(self, device: Any, folder: str) -> None:
        lock = device.lock(f"{folder}/lock")
        assert lock is not None
        assert device.lock(f"{folder}/lock") is None
        assert device.lock(f"{folder}/lock", shared=True) is None
        lock.release()
        lock.release()
        sharers = [device.lock(f"{folder}/lock", shared=True) for _ in range(2)]
        assert all(sharers)
        assert device.lock(f"{folder}/lock") is None
        sharers[0].release()
        assert device.lock(f"{folder}/lock") is None, "the other sharer is still there"
        sharers[1].release()
        again = device.lock(f"{folder}/lock")
        assert again is not None
        again.release()

    def test_closing_another_handle_of_the_locked_file_does_not_drop_the_lock(self, device: Any, folder: str) -> None:
        lock = device.lock(f"{folder}/lock")
        device.open(f"{folder}/lock", "write").close()
        device.open(f"{folder}/lock", "read").close()
        assert device.lock(f"{folder}/lock") is None
        lock.release()
        taken = device.lock(f"{folder}/lock")
        assert taken is not None
        taken.release()

    # --- what happened ----------------------------------------------------------------------------------------------

    def test_every_byte_is_counted_under_the_path_that_it_took(self, device: Any, folder: str) -> None:
        file = written(device, f"{folder}/a", noise(18, 8 * PAGE))
        assert content(file, 2 * PAGE).nbytes == 2 * PAGE
        aligned = device.counters()
        assert set(aligned) <= self.io_paths and set(device.paths().values()) <= self.io_paths
        assert sum(counter.write_bytes for counter in aligned.values()) == 8 * PAGE
        assert sum(counter.read_bytes for counter in aligned.values()) == 2 * PAGE
        out = np.zeros(1001, np.uint8)[1:]
        assert done(file.read(8 * PAGE - 600, [out])) == 600
        assert done(file.write(3, [b"seven b"])) == 7
        counters = device.counters()
        slower = {
            path: (
                counters[path].read_bytes - (aligned[path].read_bytes if path in aligned else 0),
                counters[path].write_bytes - (aligned[path].write_bytes if path in aligned else 0),
            )
            for path in counters
        }
        moved = {path for path, (read_bytes, write_bytes) in slower.items() if read_bytes or write_bytes}
        assert moved <= self.unaligned_paths
        assert sum(read_bytes for read_bytes, _ in slower.values()) == 600, "a short read counts what it delivered"
        assert sum(write_bytes for _, write_bytes in slower.values()) == 7
        assert sum(counter.read_bytes for counter in aligned.values()) == 2 * PAGE, "an answer does not change afterwards"
        assert all(counter.reads or counter.writes for counter in counters.values())
        file.close()

    def test_paths_say_what_host_memory_takes(self, device: Any, folder: str) -> None:
        assert set(device.paths()) <= {"host", "device"}
        assert device.paths()["host"] in self.io_paths
        assert ("device" in device.paths()) == device.accepts_device_memory


class FileDeviceConformance(DeviceConformance):
    """For devices whose files are those of the operating system: other devices and processes see them too."""

    def test_another_device_reads_what_was_synced_and_respects_the_lock(self, device: Any, folder: str) -> None:
        file = written(device, f"{folder}/a", noise(19, 3 * PAGE + 5))
        file.sync()
        lock = device.lock(f"{folder}/lock")
        os.close(os.open(f"{folder}/lock", os.O_RDWR))
        assert Path(folder, "a").read_bytes() == noise(19, 3 * PAGE + 5).tobytes()
        other = self.make_device()
        assert other.lock(f"{folder}/lock") is None
        lock.release()
        taken = other.lock(f"{folder}/lock")
        assert taken is not None
        taken.release()
        other.close()
        file.close()

    def test_a_forked_child_cannot_drop_the_lock_of_its_parent(self, device: Any, folder: str) -> None:
        lock = device.lock(f"{folder}/lock")
        for end in (lambda: lock.abandon(), lambda: lock.release(), lambda: None):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    end()
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitpid(child, 0)[1] == 0
            assert device.lock(f"{folder}/lock") is None
        lock.release()
        again = device.lock(f"{folder}/lock")
        assert again is not None
        again.release()
