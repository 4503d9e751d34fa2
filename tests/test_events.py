"""What a store tells of blocks that come and go."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvlode import BlockSpace, InvalidConfig
from kvlode.engine.events import EventBatch, EventKind, EventLog
from kvlode.engine.testing import ManualClock
from model import block_bytes, descriptor
from rig import KIB, Rig, put_blocks

WAIT_S = 30.0
SIZE = 30_000
OPTIONS = {"capacity": 4 << 20, "buffer": 1 << 20, "segment_bytes": 256 * KIB, "batch_bytes": 128 * KIB}


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(ManualClock(), **OPTIONS)
    yield made
    made.close()


def space_of(rig: Rig, model: str = "m") -> BlockSpace:
    return rig.store.namespace(descriptor(model=model, block_bytes_max=64 * KIB))


def put(rig: Rig, *keys: bytes) -> None:
    for key in keys:
        assert space_of(rig).put(key, block_bytes(key, 0, SIZE))
    assert rig.store.flush(WAIT_S)


def told(batch: EventBatch) -> list[tuple[EventKind, bytes]]:
    """One pair a key, in order; drops with an empty key."""
    return [(event.kind, key) for event in batch.events for key in event.keys or [b""]]


def test_blocks_are_told_of_when_they_are_durable_and_once(rig: Rig) -> None:
    put(rig, b"a", b"b")
    first = rig.store.events()
    assert told(first) == [(EventKind.STORED, b"a"), (EventKind.STORED, b"b")]
    assert {event.namespace for event in first.events} == {space_of(rig).digest}
    assert not first.missed
    assert rig.store.events(first.next).events == []
    put(rig, b"c")
    assert told(rig.store.events(first.next)) == [(EventKind.STORED, b"c")]


def test_deletes_and_drops_are_told_of(rig: Rig) -> None:
    put(rig, b"a", b"b")
    since = rig.store.events().next
    assert space_of(rig).delete([b"a"]) == 1
    assert rig.store.flush(WAIT_S)
    space_of(rig).drop()
    assert rig.store.flush(WAIT_S)
    assert told(rig.store.events(since)) == [(EventKind.REMOVED, b"a"), (EventKind.CLEARED, b"")]


def test_what_reclaim_gives_up_is_told_of_and_what_it_carries_forward_is_not(rig: Rig) -> None:
    put(rig, b"held")
    with space_of(rig).pin([b"held"]) as held:
        assert held == 1
        put_blocks(space_of(rig), 0, 300, SIZE)
        assert rig.store.flush(WAIT_S)
        believed: set[bytes] = set()
        for kind, key in told(rig.store.events()):
            if kind is EventKind.STORED:
                assert key not in believed, f"{key!r} is stored twice"
                believed.add(key)
            else:
                believed.remove(key)
        assert rig.counter("evicted_blocks") > 0 and rig.counter("reinserted_blocks") > 0
        keys = [b"held", *(b"filler %d" % number for number in range(300))]
        assert believed == {key for key, there in zip(keys, space_of(rig).contains(keys), strict=True) if there}


def test_a_host_that_asks_too_seldom_is_told_that_it_missed_some() -> None:
    log = EventLog(kept_keys_max=10)
    namespace = bytes(15) + b"n"
    for number in range(20):
        log.add(EventKind.STORED, [namespace + b"%d" % number])
    events, end, missed = log.since(0)
    assert missed and end == 20 and [key for event in events for key in event.keys] == [b"15", b"16", b"17", b"18", b"19"]
    assert log.since(15)[2] is False
    assert log.since(20) == ([], 20, False)


def test_events_of_several_namespaces_stay_in_their_order() -> None:
    log = EventLog()
    one, two = bytes(15) + b"1", bytes(15) + b"2"
    log.add(EventKind.REMOVED, [one + b"a", one + b"b", two + b"a", one + b"c"])
    assert [(event.namespace, event.keys) for event in log.since(0)[0]] == [(one, (b"a", b"b")), (two, (b"a",)), (one, (b"c",))]


def test_a_place_that_no_call_gave_is_refused(rig: Rig) -> None:
    with pytest.raises(InvalidConfig):
        rig.store.events("yesterday")
