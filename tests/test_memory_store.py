"""MemoryStore keeps the host contract, and what is particular to it."""

from __future__ import annotations

import numpy as np
import pytest

from conformance import StoreConformance, read
from kvlode import BlockSpace, InvalidConfig, MemoryStore, PutState, PutStatus, Refusal, Status, Store
from kvlode.engine.testing import ManualClock
from model import block_bytes, descriptor


class TestMemoryStore(StoreConformance):
    can_damage = True
    small_blocks_kept = 100
    pinned_blocks = 20

    def make_store(self, *, capacity_bytes: int | None = None) -> MemoryStore:
        return MemoryStore(capacity_bytes or "256MiB", clock=self.clock)

    def damage(self, store: Store, space: BlockSpace, key: bytes) -> Store:
        assert isinstance(store, MemoryStore)
        store.blocks[space.digest + key].data[12_345] ^= 1
        return store


class TestMemoryStoreThatLooksUpFirst(StoreConformance):
    def make_store(self, *, capacity_bytes: int | None = None) -> MemoryStore:
        return MemoryStore(capacity_bytes or "256MiB", clock=self.clock, pending_first=True)


KIB = 1024


def small_store(blocks: int) -> tuple[MemoryStore, BlockSpace]:
    store = MemoryStore(blocks * KIB, clock=ManualClock())
    return store, store.namespace(descriptor(block_bytes_max=KIB))


def put(space: BlockSpace, *names: str, parent: str | None = None) -> None:
    for name in names:
        key = name.encode()
        assert space.put(key, block_bytes(key, 0, KIB), parent=parent.encode() if parent else None)


def present(space: BlockSpace, names: str) -> str:
    return "".join(name for name, here in zip(names, space.contains([name.encode() for name in names]), strict=True) if here)


def test_the_first_lookup_of_a_key_is_pending_when_asked_for():
    store = MemoryStore(pending_first=True)
    space = store.namespace(descriptor())
    space.put(b"a", b"1")
    assert space.lookup_nowait([b"a", b"b"]) == [Status.PENDING, Status.PENDING]
    assert space.lookup_nowait([b"a", b"b", b"c"]) == [Status.HIT, Status.MISS, Status.PENDING]
    assert MemoryStore().namespace(descriptor()).lookup_nowait([b"a"]) == [Status.MISS]


def test_the_least_recently_used_blocks_go_first():
    _, space = small_store(4)
    put(space, *"abcd")
    space.touch([b"a"])
    assert read(space, b"b", KIB)[0] is Status.HIT
    put(space, "c")
    put(space, "e", "f")
    assert present(space, "abcdef") == "bcef"


def test_a_use_of_a_block_is_a_use_of_its_ancestors():
    _, space = small_store(4)
    put(space, "a")
    put(space, "b", parent="a")
    put(space, "c", parent="b")
    put(space, "x")
    space.touch([b"c"])
    put(space, "y", "z")
    assert present(space, "abcxyz") == "abyz"  # of a chain, the tail goes first


def test_a_block_that_only_pinned_ones_stand_in_the_way_of_is_refused():
    store, space = small_store(2)
    put(space, "a", "b")
    with space.pin([b"a", b"b"]):
        assert space.put(b"c", bytes(KIB)) == PutStatus(PutState.REFUSED, Refusal.NO_SPACE)
        assert present(space, "abc") == "ab"
    assert space.put(b"c", bytes(KIB))
    assert present(space, "abc") == "bc"
    assert store.stats()["used_bytes"] == 2 * KIB


def test_a_namespace_whose_blocks_do_not_fit_is_refused_with_what_is_needed():
    with pytest.raises(InvalidConfig, match=r"at least 4194304 bytes.*1048576 bytes"):
        MemoryStore("1MiB").namespace(descriptor())


def test_a_capacity_that_is_none_is_refused():
    for capacity in (0, -1, "much", "0GiB"):
        with pytest.raises(InvalidConfig, match="capacity"):
            MemoryStore(capacity)


def test_used_bytes_follow_puts_deletes_expiry_and_drops():
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    space = store.namespace(descriptor())
    space.put(b"a", bytes(100))
    space.put(b"b", bytes(50), ttl=1)
    space.put(b"c", bytes(25))
    assert (store.stats()["used_bytes"], store.stats()["blocks"]) == (175, 3)
    clock.advance(1)
    assert space.get_into(b"b", bytearray(50)) is Status.EXPIRED
    space.delete([b"c"])
    assert (store.stats()["used_bytes"], store.stats()["blocks"]) == (100, 1)
    space.drop()
    assert (store.stats()["used_bytes"], store.stats()["blocks"]) == (0, 0)


def test_blocks_are_released_when_the_store_is_closed():
    with MemoryStore() as store:
        store.namespace(descriptor()).put(b"a", np.zeros(1000, np.uint8))
    assert not store.blocks
