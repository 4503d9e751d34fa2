"""A device at the speed of other drives: bytes are real, time is simulated."""

from __future__ import annotations

import pytest

from device_conformance import PAGE, noise
from kvlode.format.errors import DeviceError
from kvlode.gds.buffers import aligned_array
from kvlode.gds.device import DeviceFile
from kvlode.gds.memory import MemoryDevice
from kvlode.gds.testing import Fault, FaultyDevice
from kvlode.gds.throttled import SimulatedTime, ThrottledDevice


def opened(time: SimulatedTime, *, read_bytes_per_s: float = 100 * PAGE, write_bytes_per_s: float = 10 * PAGE) -> DeviceFile:
    device = ThrottledDevice(MemoryDevice(), time, read_bytes_per_s=read_bytes_per_s, write_bytes_per_s=write_bytes_per_s)
    device.make_folder("/x")
    return device.open("/x/a", "create")


def test_a_transfer_ends_when_the_drive_has_had_the_time_for_it() -> None:
    time = SimulatedTime()
    file = opened(time)
    write = file.write(0, [noise(1, 20 * PAGE)])
    assert not write.done() and not write.cancel()
    assert time.run() == pytest.approx(2)
    assert write.result(0) == 20 * PAGE
    out = aligned_array(20 * PAGE)
    read = file.read(0, [out])
    assert time.run() == pytest.approx(2.2) and read.result(0) == 20 * PAGE
    assert (out == noise(1, 20 * PAGE)).all()


def test_transfers_of_one_direction_take_turns_and_those_of_the_other_do_not_wait_for_them() -> None:
    time = SimulatedTime()
    file = opened(time, read_bytes_per_s=10 * PAGE, write_bytes_per_s=10 * PAGE)
    ended: list[tuple[str, float]] = []
    for name in ("first", "second"):
        file.write(0, [noise(1, 10 * PAGE)]).add_done_callback(lambda _, name=name: ended.append((name, time.now_s)))
    file.read(0, [aligned_array(5 * PAGE)]).add_done_callback(lambda _: ended.append(("read", time.now_s)))
    time.run()
    assert ended == [("read", pytest.approx(0.5)), ("first", pytest.approx(1)), ("second", pytest.approx(2))]


def test_a_drive_that_was_idle_has_saved_up_nothing() -> None:
    time = SimulatedTime()
    file = opened(time)
    time.at(100, lambda: None)
    time.run()
    write = file.write(0, [noise(1, 10 * PAGE)])
    assert time.run() == pytest.approx(101) and write.done()


def test_what_follows_from_an_event_happens_after_it() -> None:
    time = SimulatedTime()
    seen: list[tuple[str, float]] = []
    time.at(2, lambda: (seen.append(("late", time.now_s)), time.at(1, lambda: seen.append(("past", time.now_s)))))
    time.at(2, lambda: seen.append(("later", time.now_s)))
    time.at(0.5, lambda: seen.append(("early", time.now_s)))
    assert time.run() == 2
    assert seen == [("early", 0.5), ("late", 2), ("later", 2), ("past", 2)]


def test_errors_of_the_drive_come_when_the_transfer_would_have_ended() -> None:
    time = SimulatedTime()
    faulty = FaultyDevice(MemoryDevice())
    faulty.make_folder("/x")
    file = ThrottledDevice(faulty, time, read_bytes_per_s=PAGE, write_bytes_per_s=PAGE).open("/x/a", "create")
    faulty.inject(Fault("write"))
    write = file.write(0, [noise(1, PAGE)])
    assert time.run() == pytest.approx(1)
    assert isinstance(write.exception(0), DeviceError)
