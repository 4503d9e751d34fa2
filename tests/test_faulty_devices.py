"""The wrappers for tests do what they say: each effect of a fault, and what a recorded run left on the drive at any moment."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_conformance import PAGE, content, done, error_of, noise, written
from kvlode.format.errors import DeviceError, NoSpace
from kvlode.gds.buffers import aligned_array
from kvlode.gds.memory import MemoryDevice
from kvlode.gds.testing import Effect, Fault, FaultyDevice, LateDevice, Read, RecordingDevice, Sync, Write, WriteDone, replay

DATA = noise(1, 8 * PAGE)


@pytest.fixture
def device() -> FaultyDevice:
    made = FaultyDevice(MemoryDevice())
    made.make_folder("/x")
    written(made, "/x/a", DATA).close()
    return made


CALLS: dict[str, Callable[[Any], Any]] = {
    "open": lambda device: device.open("/x/a", "read"),
    "status": lambda device: device.status("/x/a"),
    "list_folder": lambda device: device.list_folder("/x"),
    "make_folder": lambda device: device.make_folder("/x/y"),
    "remove": lambda device: device.remove("/x/a"),
    "rename": lambda device: device.rename("/x/a", "/x/b"),
    "sync_folder": lambda device: device.sync_folder("/x"),
    "free_bytes": lambda device: device.free_bytes("/x"),
    "lock": lambda device: device.lock("/x/lock"),
    "read": lambda device: done(device.open("/x/a", "read").read(0, [aligned_array(PAGE)])),
    "write": lambda device: done(device.open("/x/a", "write").write(0, [aligned_array(PAGE)])),
    "sync": lambda device: device.open("/x/a", "write").sync(),
    "preallocate": lambda device: device.open("/x/a", "write").preallocate(64 * PAGE),
    "truncate": lambda device: device.open("/x/a", "write").truncate(0),
    "punch": lambda device: device.open("/x/a", "write").punch(0, PAGE),
}
"""Every operation that can fail, as a call that reaches it once."""


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("operation", sorted(CALLS))
def test_an_error_strikes_its_operation_alone_and_changes_nothing(operation: str, code: int, device: FaultyDevice) -> None:
    before = device.inner.crash(keep="all")
    fault = device.inject(Fault(operation, errno=code))
    for other, call in CALLS.items():
        if other in ("list_folder", "status", "free_bytes") and other != operation:
            call(device)
    with pytest.raises(DeviceError) as caught:
        CALLS[operation](device)
    assert caught.value.errno == code and isinstance(caught.value, NoSpace) == (code != errno.EIO)
    assert fault.hits == 1
    assert device.inner.list_folder("/x") == before.list_folder("/x")
    assert np.array_equal(content(device.inner.open("/x/a", "read"), 16 * PAGE), content(before.open("/x/a", "read"), 16 * PAGE))
    CALLS[operation](device)


@given(nth=st.integers(1, 6), times=st.none() | st.integers(1, 4))
def test_the_nth_operation_fails_and_those_after_it_as_often_as_asked(nth: int, times: int | None) -> None:
    device = FaultyDevice(MemoryDevice(), [Fault("status", nth=nth, times=times)])
    failed = []
    for number in range(1, 13):
        try:
            device.status("/absent")
        except DeviceError:
            failed.append(number)
    assert failed == [n for n in range(1, 13) if n >= nth and (times is None or n < nth + times)]
    device.clear()
    assert device.status("/absent") is None


def test_a_fault_strikes_only_where_it_is_told_to(device: FaultyDevice) -> None:
    fault = device.inject(Fault("open", times=None, where=lambda path: path.endswith("b")))
    device.open("/x/a", "read").close()
    with pytest.raises(DeviceError, match="/x/b"):
        device.open("/x/b", "create")
    assert (fault.seen, fault.hits) == (1, 1)


def test_a_short_read_delivers_the_first_half_and_says_so(device: FaultyDevice) -> None:
    device.inject(Fault("read", Effect.SHORT))
    out = aligned_array(8 * PAGE)
    out[:] = 0xA5
    file = device.open("/x/a", "read")
    assert done(file.read(0, [out[:PAGE], out[PAGE:]])) == 4 * PAGE
    assert np.array_equal(out[: 4 * PAGE], DATA[: 4 * PAGE]) and (out[4 * PAGE :] == 0xA5).all()


def test_a_short_write_leaves_the_first_half_on_the_drive_and_fails(device: FaultyDevice) -> None:
    device.inject(Fault("write", Effect.SHORT, errno=errno.ENOSPC))
    file = device.open("/x/a", "write")
    new = noise(2, 8 * PAGE)
    assert isinstance(error_of(lambda: file.write(0, [new])), NoSpace)
    assert np.array_equal(content(file, 8 * PAGE), np.concatenate([new[: 4 * PAGE], DATA[4 * PAGE :]]))


@given(seed=st.integers(0, 1 << 32), length=st.integers(1, 8 * PAGE), cut=st.integers(0, 8 * PAGE))
def test_a_flip_changes_exactly_one_bit_of_what_was_read_and_is_the_same_for_a_seed(seed: int, length: int, cut: int) -> None:
    device = FaultyDevice(MemoryDevice())
    device.make_folder("/x")
    file = written(device, "/x/a", DATA)
    cut = min(cut, length)
    outs = []
    for _ in range(2):
        device.inject(Fault("read", Effect.BIT_FLIP, seed=seed))
        out = np.zeros(length, np.uint8)
        assert done(file.read(0, [out[:cut], out[cut:]])) == length
        outs.append(out)
        device.clear()
    assert np.array_equal(outs[0], outs[1])
    assert int(np.unpackbits(outs[0] ^ DATA[:length]).sum()) == 1
    assert np.array_equal(content(file, 8 * PAGE), DATA), "the drive holds what it held"


def test_a_lost_write_reports_success_and_a_lost_sync_makes_nothing_durable(device: FaultyDevice) -> None:
    file = device.open("/x/a", "write")
    device.inject(Fault("write", Effect.LOST))
    assert done(file.write(0, [noise(3, 2 * PAGE)])) == 2 * PAGE
    assert np.array_equal(content(file, 8 * PAGE), DATA)
    device.inner.sync_folder("/x")
    device.inject(Fault("sync", Effect.LOST))
    file.sync()
    assert device.inner.crash().status("/x/a").size_bytes == 0
    file.sync()
    assert device.inner.crash().status("/x/a").size_bytes == 8 * PAGE
    device.inject(Fault("sync_folder", Effect.LOST))
    device.open("/x/b", "create").close()
    device.sync_folder("/x")
    assert device.inner.crash().list_folder("/x") == ["a"]
    device.sync_folder("/x")
    assert device.inner.crash().list_folder("/x") == ["a", "b"]


# --- recording ------------------------------------------------------------------------------------------------------------

_PAGES = st.integers(0, 6)
STEPS = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 2), _PAGES, st.integers(1, 3)),
    st.tuples(st.just("sync"), st.integers(0, 2)),
    st.tuples(st.just("truncate"), st.integers(0, 2), _PAGES),
    st.tuples(st.just("preallocate"), st.integers(0, 2), st.integers(1, 6)),
    st.tuples(st.just("punch"), st.integers(0, 2), _PAGES, st.integers(1, 3)),
    st.tuples(st.just("rename"), st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.just("remove"), st.integers(0, 2)),
    st.tuples(st.just("sync_folder")),
    st.tuples(st.just("reopen"), st.integers(0, 2)),
)


class Script:
    """Does steps to a device; a name that is missing is made, so that every step means something."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.files: dict[int, Any] = {}
        self.device.make_folder("/x")

    def file(self, number: int) -> Any:
        if number not in self.files:
            mode = "create" if self.device.status(f"/x/{number}") is None else "write"
            self.files[number] = self.device.open(f"/x/{number}", mode)
        return self.files[number]

    def do(self, step: tuple[Any, ...], seed: int) -> None:
        match step:
            case ("write", number, page, pages):
                assert done(self.file(number).write(page * PAGE, [noise(seed, pages * PAGE)])) == pages * PAGE
            case ("sync", number):
                self.file(number).sync()
            case ("truncate" | "preallocate" as kind, number, pages):
                getattr(self.file(number), kind)(pages * PAGE)
            case ("punch", number, page, pages):
                self.file(number).punch(page * PAGE, pages * PAGE)
            case ("rename", source, target):
                self.file(source)
                if source != target:
                    self.device.rename(f"/x/{source}", f"/x/{target}")
                    self.files[target] = self.files.pop(source)
            case ("remove", number):
                self.file(number).close()
                self.device.remove(f"/x/{number}")
                del self.files[number]
            case ("sync_folder",):
                self.device.sync_folder("/x")
            case ("reopen", number):
                self.file(number).close()
                del self.files[number]


def held(device: MemoryDevice) -> dict[str, bytes]:
    """Names and contents of everything on a memory device."""
    found = {}
    for name in device.list_folder("/x"):
        file = device.open(f"/x/{name}", "read")
        found[name] = content(file, max(1, file.status().size_bytes)).tobytes()
        file.close()
    return found


@settings(max_examples=60)
@given(steps=st.lists(STEPS, min_size=1, max_size=12), crash_seed=st.integers(0, 1000))
def test_any_prefix_of_a_recorded_run_replays_to_what_the_drive_held_then_now_and_after_a_power_cut(
    steps: list[tuple[Any, ...]], crash_seed: int
) -> None:
    memory = MemoryDevice()
    recorder = RecordingDevice(memory)
    script = Script(recorder)
    moments: list[tuple[int, MemoryDevice]] = []
    for number, step in enumerate(steps):
        script.do(step, number)
        moments.append((len(recorder.operations()), number))
    log = recorder.operations()
    again = MemoryDevice()
    mirror = Script(again)
    for (length, number), step in zip(moments, steps, strict=True):
        mirror.do(step, number)
        replayed = replay(log[:length])
        assert held(replayed) == held(again)
        for keep in ("none", "all", "random"):
            assert held(replayed.crash(crash_seed, keep)) == held(again.crash(crash_seed, keep)), keep
    for length in range(1, len(log) + 1):
        replay(log[:length])  # every prefix is a run that could have happened


def test_a_sync_covers_only_the_writes_that_were_done_when_it_began() -> None:
    """The write ends while the sync runs: a drive need not have it."""
    late = LateDevice(MemoryDevice(), holding=())
    recorder = RecordingDevice(late)
    recorder.make_folder("/x")
    file = recorder.open("/x/a", "create")
    assert done(file.write(0, [DATA])) == DATA.nbytes
    recorder.sync_folder("/x")
    file.sync()
    late.hold("write")
    future = file.write(0, [noise(2, PAGE)])
    file.sync()
    late.hold()
    late.release()
    assert done(future) == PAGE
    log = recorder.operations()
    assert [type(entry) for entry in log[-3:]] == [Write, Sync, WriteDone]
    crashed = replay(log).crash()
    assert np.array_equal(content(crashed.open("/x/a", "read"), 8 * PAGE), DATA)
    moved = [*log[:-2], log[-1], log[-2]]
    assert np.array_equal(content(replay(moved).crash().open("/x/a", "read"), 8 * PAGE), DATA), "the sync's beginning counts, not its end"
    file.close()


def test_a_write_in_flight_is_in_the_log_from_its_start_and_a_failed_operation_never() -> None:
    faulty = FaultyDevice(MemoryDevice())
    recorder = RecordingDevice(faulty)
    recorder.make_folder("/x")
    file = recorder.open("/x/a", "create")
    faulty.inject(Fault("sync"))
    faulty.inject(Fault("truncate"))
    faulty.inject(Fault("write"))
    before = len(recorder.operations())
    for call in (file.sync, lambda: file.truncate(0)):
        with pytest.raises(DeviceError):
            call()
    assert len(recorder.operations()) == before
    error_of(lambda: file.write(0, [DATA]))
    assert [type(entry) for entry in recorder.operations()[before:]] == [Write], "any part of a failed write may be on the drive"
    assert done(file.read(0, [aligned_array(PAGE)])) == 0
    assert isinstance(recorder.operations()[-1], Read)
    file.close()


def test_replaying_on_a_base_leaves_the_base_alone() -> None:
    base = MemoryDevice()
    base.make_folder("/x")
    written(base, "/x/a", DATA).close()
    recorder = RecordingDevice(base.crash(keep="all"))
    file = recorder.open("/x/a", "write")
    assert done(file.write(0, [noise(2, PAGE)])) == PAGE
    file.close()
    replayed = replay(recorder.operations(), base)
    assert held(replayed)["a"] == np.concatenate([noise(2, PAGE), DATA[PAGE:]]).tobytes()
    assert held(base)["a"] == DATA.tobytes()
