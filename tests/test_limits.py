"""Quotas, shares of writes and lifetimes by namespace, and room that the file system keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvlode import BlockSpace, InvalidConfig, Limits, Refusal, Status, StoreConfig
from kvlode.engine.admission import WriteShares
from kvlode.engine.limits import checked_limits, limits_of
from kvlode.engine.testing import ManualClock
from model import descriptor
from rig import KIB, MIB, Rig, eventually, put_blocks, read

OPTIONS: dict[str, Any] = {"capacity": 4 * MIB, "segment_bytes": 128 * KIB, "codec": "raw", "buffer": 2 * MIB, "serve_clean": False}
GREEDY, MODEST = descriptor("greedy", block_bytes_max=64 * KIB), descriptor("modest", block_bytes_max=64 * KIB)
BLOCK_BYTES = 20_000
WAIT_S = 60.0
QUOTA_BYTES = MIB


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(ManualClock(), **OPTIONS, limits={GREEDY: Limits(quota_bytes=QUOTA_BYTES)})
    yield made
    made.close()


def spaces(rig: Rig) -> tuple[BlockSpace, BlockSpace]:
    return rig.store.namespace(GREEDY), rig.store.namespace(MODEST)


def usage(rig: Rig) -> int:
    return rig.store._core.usage.bytes_of(GREEDY.digest)


def fill(rig: Rig, space: BlockSpace, start: int, stop: int) -> None:
    for first in range(start, stop, 10):
        assert eventually(lambda: usage(rig) <= QUOTA_BYTES), "the quota is not enforced"
        put_blocks(space, first, min(first + 10, stop), BLOCK_BYTES)
        assert rig.store.flush(WAIT_S)


def present(space: BlockSpace, count: int) -> int:
    return sum(space.contains([b"filler %d" % number for number in range(count)]))


def test_a_namespace_beyond_its_quota_loses_its_own_oldest_blocks(rig: Rig) -> None:
    greedy, modest = spaces(rig)
    put_blocks(modest, 0, 20, BLOCK_BYTES)
    fill(rig, greedy, 0, 90)
    assert eventually(lambda: usage(rig) <= QUOTA_BYTES)
    assert present(modest, 20) == 20, "the blocks of another namespace went"
    assert 20 <= present(greedy, 90) <= QUOTA_BYTES // BLOCK_BYTES
    assert greedy.contains([b"filler 89"]) == [True] and greedy.contains([b"filler 0"]) == [False]
    assert rig.counter("quota_evicted_blocks") > 0


def test_what_a_namespace_lost_to_its_quota_makes_room_before_the_blocks_of_others_go(rig: Rig) -> None:
    """Five times the capacity is written by the greedy namespace; the other's segments are older than all of that."""
    greedy, modest = spaces(rig)
    put_blocks(modest, 0, 20, BLOCK_BYTES)
    fill(rig, greedy, 0, 700)
    assert rig.counter("segments_freed") > 100
    assert present(modest, 20) >= 16, "only those that share a segment with the other may go"


def test_usage_is_the_same_after_reopening(rig: Rig) -> None:
    greedy, _ = spaces(rig)
    fill(rig, greedy, 0, 40)
    before = usage(rig)
    assert before > 40 * BLOCK_BYTES
    rig.reopen()
    assert eventually(lambda: rig.store._core.usage.loaded.is_set())
    assert usage(rig) == before
    rig.crash(1, keep="all")
    assert eventually(lambda: rig.store._core.usage.loaded.is_set())
    assert usage(rig) == before


def test_pinned_blocks_outlive_a_quota(rig: Rig) -> None:
    greedy, _ = spaces(rig)
    put_blocks(greedy, 0, 5, BLOCK_BYTES)
    with greedy.pin([b"filler %d" % number for number in range(5)]) as held:
        assert held == 5
        fill(rig, greedy, 5, 100)
        assert present(greedy, 5) == 5


def test_what_reclaim_cannot_keep_up_with_is_refused_and_taken_in_later(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy, modest = spaces(rig)
    monkeypatch.setattr(rig.store._core.keeper.housekeeping, "trim_one", lambda: False)
    refusals = []
    for number in range(120):
        status = greedy.put(b"filler %d" % number, bytes(BLOCK_BYTES))
        assert rig.store.flush(WAIT_S)
        refusals.append(status.reason)
    assert refusals[-1] is Refusal.QUOTA and refusals.index(Refusal.QUOTA) > QUOTA_BYTES // (BLOCK_BYTES + 8192)
    assert modest.put(b"other", b"x")
    assert rig.counter("refused_quota") > 0
    monkeypatch.undo()
    assert eventually(lambda: bool(greedy.put(b"later", b"x")))


def test_a_drop_gives_the_quota_back(rig: Rig) -> None:
    greedy, _ = spaces(rig)
    fill(rig, greedy, 0, 40)
    greedy.drop()
    assert rig.store.flush(WAIT_S)
    assert usage(rig) == 0
    put_blocks(greedy, 0, 1, BLOCK_BYTES)
    assert rig.store.flush(WAIT_S)
    assert 0 < usage(rig) < 2 * BLOCK_BYTES


def test_blocks_live_as_long_as_their_namespace_says_unless_the_put_does(rig: Rig) -> None:
    rig.store.reconfigure(limits={"*": Limits(ttl_s=10.0)})
    _, space = spaces(rig)
    space.put(b"short", b"x" * 100)
    space.put(b"long", b"x" * 100, ttl=1000.0)
    assert rig.store.flush(WAIT_S)
    rig.clock.advance(11.0)
    assert read(space, b"short", 100)[0] is Status.EXPIRED
    assert read(space, b"long", 100)[0] is Status.HIT


def test_a_share_of_writes_holds_once_the_store_is_full_and_only_beside_others(rig: Rig) -> None:
    rig.store.reconfigure(limits={GREEDY: Limits(write_share_max=0.5)})
    greedy, modest = spaces(rig)
    put_blocks(greedy, 0, 300, BLOCK_BYTES)
    assert rig.store.flush(WAIT_S) and rig.counter("segments_retired") > 0
    assert greedy.put(b"alone", b"x" * BLOCK_BYTES), "nobody else writes"
    assert modest.put(b"first", b"x" * BLOCK_BYTES)
    assert greedy.put(b"refused", b"x" * BLOCK_BYTES).reason is Refusal.WRITE_SHARE
    for number in range(30):
        assert modest.put(b"m %d" % number, b"x" * BLOCK_BYTES)
    assert greedy.put(b"again", b"x" * BLOCK_BYTES)


def test_shares_fade_with_what_is_written_since() -> None:
    shares = WriteShares(1000)
    shares.add(b"a", 900)
    assert not shares.exceeded(b"a", 0.5)
    shares.add(b"b", 90)
    assert shares.exceeded(b"a", 0.5) and not shares.exceeded(b"b", 0.5)
    for _ in range(30):
        shares.add(b"b", 90)
    assert not shares.exceeded(b"a", 0.5)


def test_room_that_the_file_system_keeps_is_left_to_it(rig: Rig) -> None:
    _, space = spaces(rig)
    put_blocks(space, 0, 100, BLOCK_BYTES)
    assert rig.store.flush(WAIT_S)
    free = rig.memory.free_bytes("/")
    rig.store.reconfigure(min_free_disk_bytes=free + MIB)
    assert eventually(lambda: rig.memory.free_bytes("/") >= free + MIB)
    put_blocks(space, 100, 300, BLOCK_BYTES)
    assert rig.store.flush(WAIT_S)
    assert rig.memory.free_bytes("/") >= free + MIB - 2 * OPTIONS["segment_bytes"]
    assert space.contains([b"filler 299"]) == [True]


@pytest.mark.parametrize(
    "limits",
    [
        {"model": Limits()},
        {GREEDY: 5},
        {GREEDY: Limits(quota_bytes=5 * MIB)},
        [Limits()],
    ],
)
def test_limits_that_cannot_be_are_refused(limits: Any) -> None:
    with pytest.raises(InvalidConfig):
        StoreConfig.build(capacity=4 * MIB, limits=limits)


def test_a_quota_above_the_capacity_names_both(rig: Rig) -> None:
    with pytest.raises(InvalidConfig, match=r"4194304 bytes[\s\S]*5242880 bytes"):
        rig.store.reconfigure(limits={GREEDY: Limits.build(quota="5 MiB")})
    assert rig.store.config.limits[GREEDY.digest.hex()].quota_bytes == QUOTA_BYTES, "the former limits hold"


@pytest.mark.parametrize("facts", [{"quota_bytes": 0}, {"write_share_max": 0.0}, {"write_share_max": 1.5}, {"ttl_s": -1.0}])
def test_values_of_limits_are_checked(facts: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig):
        Limits(**facts)


def test_a_namespace_without_limits_of_its_own_has_those_of_every_namespace() -> None:
    limits = checked_limits({"*": Limits(ttl_s=1.0), GREEDY.digest: Limits(ttl_s=2.0)})
    assert limits_of(limits, GREEDY.digest).ttl_s == 2.0
    assert limits_of(limits, MODEST.digest).ttl_s == 1.0
    assert limits_of({}, MODEST.digest) == Limits()
