"""Freeing segments in another order than they were written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from kvlode import Status
from kvlode.engine.policies.interface import Candidate, SegmentFacts
from kvlode.engine.testing import ManualClock
from model import block_bytes, descriptor
from rig import KIB, MIB, Rig, put_blocks, read

OPTIONS: dict[str, Any] = {"capacity": 4 * MIB, "segment_bytes": 128 * KIB, "codec": "raw", "buffer": 2 * MIB, "serve_clean": False}
WAIT_S = 60.0
BLOCK_BYTES = 20_000


class Second:
    """Gives up the second oldest segment."""

    name = "second"

    def __init__(self) -> None:
        self.asked: list[Sequence[SegmentFacts]] = []

    def victim(self, segments: Sequence[SegmentFacts]) -> int:
        self.asked.append(segments)
        return min(1, len(segments) - 1)

    def choose(self, candidates: Sequence[Candidate], segment_bytes: int) -> list[Candidate]:
        return []


@pytest.fixture
def policy() -> Second:
    return Second()


@pytest.fixture
def rig(policy: Second) -> Iterator[Rig]:
    made = Rig(ManualClock(), **OPTIONS)
    made.store._core.evictor.policy = policy
    yield made
    made.close()


def test_the_segment_that_the_policy_names_goes_and_the_oldest_stays(rig: Rig, policy: Second) -> None:
    space = rig.store.namespace(descriptor(block_bytes_max=64 * KIB))
    put_blocks(space, 0, 400, BLOCK_BYTES)
    assert rig.store.flush(WAIT_S)
    assert rig.counter("segments_freed") > 0
    assert space.contains([b"filler 0", b"filler 8"]) == [True, False]
    assert read(space, b"filler 0", BLOCK_BYTES)[0] is Status.HIT
    facts = policy.asked[0]
    assert [f.segment_id for f in facts] == sorted(f.segment_id for f in facts)
    assert all(0 < f.fresh_bytes <= f.size_bytes for f in facts)
    rig.assert_within_capacity()
    rig.reopen()
    space = rig.store.namespace(descriptor(block_bytes_max=64 * KIB))
    assert space.contains([b"filler 0", b"filler 8"]) == [True, False]


def test_deleted_blocks_do_not_come_back_when_the_index_is_rebuilt(rig: Rig) -> None:
    """The tombstones lie in the second segment, what they delete in the first."""
    space = rig.store.namespace(descriptor(block_bytes_max=64 * KIB))
    put_blocks(space, 0, 3, BLOCK_BYTES, b"gone ")
    assert rig.store.flush(WAIT_S)
    put_blocks(space, 0, 3, BLOCK_BYTES)
    assert space.delete([b"gone 0", b"gone 1", b"gone 2"]) == 3
    put_blocks(space, 3, 400, BLOCK_BYTES)
    assert rig.store.flush(WAIT_S)
    assert rig.counter("victims_with_deletes") > 0 and rig.counter("segments_freed") > 0
    rig.reopen(lose_index=True)
    space = rig.store.namespace(descriptor(block_bytes_max=64 * KIB))
    assert space.contains([b"gone 0", b"gone 1", b"gone 2"]) == [False] * 3


@pytest.mark.parametrize("seed", range(3))
def test_a_crash_in_any_order_of_freeing_leaves_right_blocks(rig: Rig, policy: Second, seed: int) -> None:
    space = rig.store.namespace(descriptor(block_bytes_max=64 * KIB))
    put_blocks(space, 0, 300, BLOCK_BYTES)
    rig.store.flush(WAIT_S)
    rig.crash(seed, keep="random", lose_index=bool(seed % 2))
    rig.store._core.evictor.policy = policy
    space = rig.store.namespace(descriptor(block_bytes_max=64 * KIB))
    answers = [read(space, b"filler %d" % n, BLOCK_BYTES) for n in range(300)]
    right = [block_bytes(b"filler %d" % n, 4 * n, BLOCK_BYTES) for n in range(300)]
    assert {status for status, _ in answers} == {Status.HIT, Status.MISS}
    assert all(bytes(out) == bytes(wanted) for (status, out), wanted in zip(answers, right, strict=True) if status is Status.HIT)
    assert sum(status is Status.HIT for status, _ in answers) > 80
    put_blocks(space, 300, 400, BLOCK_BYTES)
    assert rig.store.flush(WAIT_S)
    rig.assert_within_capacity()


def test_the_segment_that_was_used_last_is_known(rig: Rig, policy: Second) -> None:
    space = rig.store.namespace(descriptor(block_bytes_max=64 * KIB))
    put_blocks(space, 0, 100, BLOCK_BYTES)
    assert rig.store.flush(WAIT_S)
    rig.clock.advance(5.0)
    used = rig.segment_of(space, b"filler 50")
    assert read(space, b"filler 50", BLOCK_BYTES)[0] is Status.HIT
    before = len(policy.asked)
    put_blocks(space, 100, 300, BLOCK_BYTES)
    assert rig.store.flush(WAIT_S)
    facts = {f.segment_id: f for f in policy.asked[before]}
    assert used is not None and facts[used].last_used_s == max(f.last_used_s for f in facts.values()) > 0
