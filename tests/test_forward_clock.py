"""A machine's clock that was set back while the store was closed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvlode import Status
from kvlode.engine.forward_clock import ForwardClock
from kvlode.engine.testing import ManualClock
from model import descriptor
from rig import KIB, MIB, Rig, read

HOUR_S = 3600.0


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(ManualClock(), capacity=4 * MIB, segment_bytes=128 * KIB, buffer=MIB, codec="raw")
    yield made
    made.close()


@pytest.mark.parametrize("crash", [False, True])
def test_expired_blocks_stay_expired_and_others_keep_their_time(rig: Rig, crash: bool) -> None:
    space = rig.store.namespace(descriptor(block_bytes_max=64 * KIB))
    space.put(b"short", b"x" * 100, ttl=10.0)
    rig.clock.advance(20.0)
    space.put(b"long", b"x" * 100, ttl=100.0)
    assert rig.store.flush(30.0)
    rig.clock.advance(-HOUR_S)
    if crash:
        rig.crash(1, keep="all")
    else:
        rig.reopen()
    space = rig.store.namespace(descriptor(block_bytes_max=64 * KIB))
    assert read(space, b"short", 100)[0] is Status.EXPIRED
    assert read(space, b"long", 100)[0] is Status.HIT
    rig.clock.advance(101.0)
    assert read(space, b"long", 100)[0] is Status.EXPIRED


def test_a_clock_that_is_right_is_left_alone() -> None:
    inner = ManualClock()
    clock = ForwardClock(inner)
    clock.not_before(inner.now_ns() - 5)
    assert clock.now_ns() == inner.now_ns()
    clock.not_before(inner.now_ns() + 7)
    assert clock.now_ns() == inner.now_ns() + 7
    assert clock.monotonic_s() == inner.monotonic_s()
