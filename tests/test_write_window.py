"""How much is written at once while there are reads, with a clock that only a test moves."""

from __future__ import annotations

import itertools
import threading
from contextlib import ExitStack

import pytest

from kvlode.gds.write_window import (
    LOOKED_AT,
    PIECE_BYTES,
    READS_RECENT_S,
    WINDOW_BYTES_FIRST,
    WINDOW_BYTES_MAX,
    WINDOW_BYTES_MIN,
    WriteWindow,
)
from rig import eventually


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def write(window: WriteWindow, clock: Clock, seconds: float) -> None:
    """As much as the window lets through at once."""
    with ExitStack() as writes:
        for _ in range(window.window_bytes // PIECE_BYTES):
            writes.enter_context(window.turn(PIECE_BYTES))
        clock.now_s += seconds


def read(window: WriteWindow) -> None:
    with window.reading():
        pass


class Writer:
    """A write on a thread of its own, which goes on until it is told to end."""

    def __init__(self, window: WriteWindow, size_bytes: int = PIECE_BYTES) -> None:
        self.has_turn, self.may_end = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, args=(window, size_bytes))
        self.thread.start()

    def _run(self, window: WriteWindow, size_bytes: int) -> None:
        with window.turn(size_bytes):
            self.has_turn.set()
            assert self.may_end.wait(30.0)

    def end(self) -> None:
        self.may_end.set()
        self.thread.join(30.0)


def test_without_reads_everything_is_written_at_once(clock: Clock) -> None:
    window = WriteWindow(clock)
    with ExitStack() as writes:
        for _ in range(2 * WINDOW_BYTES_MAX // PIECE_BYTES):
            writes.enter_context(window.turn(PIECE_BYTES))
    assert window.piece_bytes == WINDOW_BYTES_MAX


def test_after_a_read_no_more_than_the_window_is_written_at_once(clock: Clock) -> None:
    window = WriteWindow(clock)
    read(window)
    with ExitStack() as writes:
        for _ in range(WINDOW_BYTES_FIRST // PIECE_BYTES):
            writes.enter_context(window.turn(PIECE_BYTES))
        late = Writer(window)
        assert not late.has_turn.wait(0.05)
    assert late.has_turn.wait(30.0), "the window is free, and the write still waits"
    late.end()


def test_while_a_read_is_under_way_one_piece_is_written_at_a_time(clock: Clock) -> None:
    window = WriteWindow(clock)
    with window.reading():
        first = Writer(window)
        assert first.has_turn.wait(30.0)
        second = Writer(window)
        assert not second.has_turn.wait(0.05)
        first.end()
        assert second.has_turn.wait(30.0), "writing never stops, whatever is read"
        second.end()


def test_the_end_of_a_read_lets_the_window_be_used_again(clock: Clock) -> None:
    window = WriteWindow(clock)
    with window.reading():
        first = Writer(window)
        assert first.has_turn.wait(30.0)
        second = Writer(window)
        assert not second.has_turn.wait(0.05)
    assert second.has_turn.wait(30.0)
    first.end()
    second.end()


def test_a_request_longer_than_the_window_is_written_alone(clock: Clock) -> None:
    window = WriteWindow(clock)
    read(window)
    with window.turn(4 * WINDOW_BYTES_MAX):
        late = Writer(window)
        assert not late.has_turn.wait(0.05)
    assert late.has_turn.wait(30.0)
    late.end()


def test_the_window_grows_where_writes_are_done_at_once(clock: Clock) -> None:
    window = WriteWindow(clock)
    for _ in range(20 * LOOKED_AT):
        read(window)
        write(window, clock, 0.0005)
    assert window.window_bytes == WINDOW_BYTES_MAX


def test_the_window_shrinks_where_even_the_quickest_write_waits(clock: Clock) -> None:
    window = WriteWindow(clock)
    for _ in range(20 * LOOKED_AT):
        read(window)
        write(window, clock, 0.02)
    assert window.window_bytes == WINDOW_BYTES_MIN
    assert window.piece_bytes == PIECE_BYTES


def test_writes_that_waited_for_the_processor_do_not_shrink_the_window(clock: Clock) -> None:
    window = WriteWindow(clock)
    for _ in range(20):
        for number in range(LOOKED_AT):
            window._learn(0.0005 if number == 3 else 0.02, full=True)
    assert window.window_bytes == WINDOW_BYTES_MAX


def test_single_writes_do_not_say_that_there_is_room_for_more(clock: Clock) -> None:
    window = WriteWindow(clock)
    for _ in range(20 * LOOKED_AT):
        with window.reading(), window.turn(PIECE_BYTES):
            clock.now_s += 0.0005
    assert window.window_bytes == WINDOW_BYTES_FIRST


def test_threads_have_their_turn_in_the_order_in_which_they_came(clock: Clock) -> None:
    window = WriteWindow(clock)
    with window.reading():
        writers = [Writer(window)]
        assert writers[0].has_turn.wait(30.0)
        for waiting in range(1, 6):
            writers.append(Writer(window))
            assert eventually(lambda waiting=waiting: len(window._line) == waiting)  # type: ignore[misc]
        for first, second in itertools.pairwise(writers):
            assert not second.has_turn.is_set()
            first.end()
            assert second.has_turn.wait(30.0)
        writers[-1].end()


def test_a_read_that_an_interrupt_left_open_ends_with_the_next_one_of_its_thread(clock: Clock) -> None:
    window = WriteWindow(clock)
    window.begin_read(threading.get_ident())  # and no ``end_read``
    read(window)
    clock.now_s += READS_RECENT_S
    assert not window.reads_recent


def test_a_while_after_the_last_read_nothing_holds_writes_up(clock: Clock) -> None:
    window = WriteWindow(clock)
    read(window)
    assert window.reads_recent
    clock.now_s += READS_RECENT_S
    assert not window.reads_recent
    with ExitStack() as writes:
        for _ in range(2 * WINDOW_BYTES_MAX // PIECE_BYTES):
            writes.enter_context(window.turn(PIECE_BYTES))


def test_a_write_that_fails_gives_its_turn_back(clock: Clock) -> None:
    window = WriteWindow(clock)
    read(window)
    with pytest.raises(OSError, match="full"), window.turn(WINDOW_BYTES_MAX):
        raise OSError("full")
    with window.turn(PIECE_BYTES):
        pass
