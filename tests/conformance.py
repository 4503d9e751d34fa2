"""The host contract as tests that any store must pass: inherit ``StoreConformance`` and say how a store is made.

Each sentence of ``kvlode.contract`` that can be observed from outside is a test here. What a store cannot do by its
nature (survive ``close``, be damaged) is switched off by a flag, and shows as a skip with its reason.
"""

from __future__ import annotations

import json
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kvlode import (
    BlockSpace,
    CompletionQueue,
    InvalidBlock,
    InvalidConfig,
    InvalidKey,
    KvlodeError,
    LoadEstimate,
    PutState,
    PutStatus,
    Refusal,
    Status,
    Store,
    StoreClosed,
)
from kvlode.engine.testing import ManualClock
from model import block_bytes, descriptor, version_of

WAIT_S = 30.0
"""Longer than anything here takes; reached only by a defect."""
SIZES = [1, 2, 511, 4095, 4096, 4097, 65_537, 262_144, 262_145, 1_048_579, 3 << 20]
KEYS = [bytes([65 + i]) * (1 + 36 * i) for i in range(8)]
"""Of 1 to 253 bytes."""


def read(space: BlockSpace, key: bytes, size: int, **options: Any) -> tuple[Status, np.ndarray]:
    """Read one block into a fresh destination that is not zero."""
    out = np.full(size, 0xA5, np.uint8)
    return space.get_into(key, out, **options), out


def assert_holds(space: BlockSpace, key: bytes, expected: np.ndarray) -> None:
    status, out = read(space, key, expected.nbytes)
    assert status is Status.HIT
    assert np.array_equal(out, expected)


def settled(space: BlockSpace, keys: list[bytes]) -> list[Status]:
    """``lookup_nowait`` asked until it knows."""
    deadline_s = time.monotonic() + WAIT_S
    pause = threading.Event()
    while True:
        statuses = space.lookup_nowait(keys)
        if Status.PENDING not in statuses:
            return statuses
        assert time.monotonic() < deadline_s, f"still pending: {statuses}"
        pause.wait(0.001)


def readable(queue: CompletionQueue, timeout_s: float) -> bool:
    """Whether the queue's descriptor is readable, now or within the time."""
    poll = select.poll()
    poll.register(queue.fileno(), select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


class StoreConformance:
    """See the module."""

    can_reopen = False
    """``reopen`` gives a store with the same durable content."""
    can_damage = False
    """``damage`` can change a stored byte behind the store's back."""
    small_blocks_kept = 8
    """Of the newest blocks of 64 KiB, how many a store of 8 MiB certainly still holds."""
    knows_depth = True
    """``BlockInfo.depth`` counts the whole chain: not where parent and child may lie on different drives."""
    pinned_blocks = 8
    """How many blocks of 64 KiB a store of 8 MiB lets a host pin."""

    clock: ManualClock

    def make_store(self, *, capacity_bytes: int | None = None) -> Store:
        """An empty store that expires blocks by ``self.clock``; closed by the caller."""
        raise NotImplementedError

    def reopen(self, store: Store) -> Store:
        """The store again after it was closed."""
        raise NotImplementedError

    def damage(self, store: Store, space: BlockSpace, key: bytes) -> Store:
        """Change a byte of a block's stored payload; the store to go on with."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _fresh_clock(self) -> None:
        self.clock = ManualClock()

    @pytest.fixture
    def store(self, _fresh_clock: None) -> Iterator[Store]:
        store = self.make_store()
        yield store
        assert store.close()

    @pytest.fixture
    def space(self, store: Store) -> BlockSpace:
        return store.namespace(descriptor())

    # --- identity -------------------------------------------------------------------------------------------------

    def test_it_has_the_shape_of_the_contract(self, store: Store, space: BlockSpace) -> None:
        assert isinstance(store, Store)
        assert isinstance(space, BlockSpace)
        assert space.descriptor == descriptor()
        assert space.digest == descriptor().digest

    def test_the_same_descriptor_gives_the_same_blocks(self, store: Store, space: BlockSpace) -> None:
        assert space.put(b"k", b"block")
        assert_holds(store.namespace(descriptor()), b"k", np.frombuffer(b"block", np.uint8))

    def test_the_same_key_in_another_namespace_is_another_block(self, store: Store, space: BlockSpace) -> None:
        others = [store.namespace(descriptor(**change)) for change in ({"revision": "r2"}, {"tp_rank": 1, "tp_size": 2}, {"group": 1})]
        assert space.put(b"k", block_bytes(b"k", 1, 100))
        for other in others:
            assert other.contains([b"k"]) == [False]
            assert read(other, b"k", 100)[0] is Status.MISS
        for version, other in enumerate(others, 2):
            assert other.put(b"k", block_bytes(b"k", version, 100)).state is PutState.ACCEPTED
        assert store.flush()
        for version, each in enumerate([space, *others], 1):
            assert_holds(each, b"k", block_bytes(b"k", version, 100))

    def test_what_is_no_descriptor_gives_no_namespace(self, store: Store) -> None:
        with pytest.raises(InvalidConfig, match="Namespace"):
            store.namespace({"model": "m"})  # type: ignore[arg-type]

    # --- round trips ----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("size", SIZES)
    def test_blocks_of_any_size_come_back_before_and_after_a_flush(self, store: Store, space: BlockSpace, size: int) -> None:
        blocks = {key: block_bytes(key, version, size) for version, key in enumerate(KEYS[:4])}
        for key, block in blocks.items():
            assert space.put(key, block).state in (PutState.ACCEPTED, PutState.DURABLE)
            assert_holds(space, key, block)
        assert store.flush()
        for key, block in blocks.items():
            assert_holds(space, key, block)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn", "int8", "uint8"])
    def test_tensors_of_every_dtype_come_back_bit_for_bit(self, store: Store, dtype: str) -> None:
        space = store.namespace(descriptor(dtype=dtype))
        bits = torch.from_numpy(block_bytes(b"k", 1, 24_576))  # NaNs of every kind included
        block = bits.view(getattr(torch, dtype)).reshape(3, 2, -1)
        assert space.put(b"k", block)
        assert store.flush()
        out = torch.zeros_like(block)
        assert space.get_into(b"k", out) is Status.HIT
        assert torch.equal(out.view(torch.uint8), block.view(torch.uint8))

    def test_a_block_may_be_put_and_read_in_pieces(self, store: Store, space: BlockSpace) -> None:
        whole = block_bytes(b"k", 1, 600_002)
        assert space.put(b"k", [whole[:7], torch.from_numpy(whole[7:300_000].copy()), whole[300_000:].tobytes()])
        for _ in range(2):
            outs = [np.zeros(250_001, np.uint8), bytearray(1), torch.zeros(175_000, dtype=torch.bfloat16)]
            assert space.get_into(b"k", outs) is Status.HIT
            assert b"".join([outs[0].tobytes(), bytes(outs[1]), outs[2].view(torch.uint8).numpy().tobytes()]) == whole.tobytes()
            assert store.flush()

    def test_bytes_beside_a_destination_are_left_alone(self, store: Store, space: BlockSpace) -> None:
        block = block_bytes(b"k", 1, 5000)
        assert space.put(b"k", block)
        for _ in range(2):
            area = np.full(3 * 4096, 0xA5, np.uint8)
            start = -area.ctypes.data % 4096
            assert space.get_into(b"k", area[start : start + 5000]) is Status.HIT
            assert np.array_equal(area[start : start + 5000], block)
            assert (area[:start] == 0xA5).all() and (area[start + 5000 :] == 0xA5).all()
            assert store.flush()

    def test_keys_of_every_length_name_different_blocks(self, store: Store, space: BlockSpace) -> None:
        keys = [b"\0", b"\0\0", b"x" * 254, b"x" * 255, bytes(255), b"\xff" * 36]
        job = space.submit_put(keys, [block_bytes(key, 0, 64) for key in keys], chained=False)
        assert job.wait(WAIT_S) and all(job.statuses)
        assert store.flush()
        for key in keys:
            assert_holds(space, key, block_bytes(key, 0, 64))

    # --- putting --------------------------------------------------------------------------------------------------

    def test_a_block_may_be_reused_as_soon_as_put_returns(self, store: Store, space: BlockSpace) -> None:
        expected = block_bytes(b"k", 1, 300_000)
        for put in (space.put, lambda key, block: space.submit_put([key], [block])):
            space.delete([b"k"])
            block = expected.copy()
            put(b"k", block)
            block[:] = 0
            assert_holds(space, b"k", expected)
            assert store.flush()
            assert_holds(space, b"k", expected)

    def test_putting_a_present_key_is_a_touch_and_changes_nothing(self, store: Store, space: BlockSpace) -> None:
        assert space.put(b"k", b"first").state is PutState.ACCEPTED
        for _ in range(2):
            assert space.put(b"k", b"other").state is PutState.EXISTS
            assert space.submit_put([b"k"], [b"third block"]).statuses == [PutStatus(PutState.EXISTS)]
            assert_holds(space, b"k", np.frombuffer(b"first", np.uint8))
            assert store.flush()

    def test_a_key_twice_in_one_put_is_stored_once(self, store: Store, space: BlockSpace) -> None:
        job = space.submit_put([b"a", b"b", b"a"], [b"1", b"2", b"3"], chained=False)
        assert [status.state for status in job.statuses][2] is PutState.EXISTS
        assert store.flush()
        assert_holds(space, b"a", np.frombuffer(b"1", np.uint8))

    def test_statuses_are_true_when_the_block_is_or_will_be_stored(self) -> None:
        assert all(PutStatus(state) for state in (PutState.ACCEPTED, PutState.DURABLE, PutState.EXISTS))
        assert not PutStatus(PutState.REFUSED, Refusal.NO_SPACE)

    def test_a_copying_put_is_done_at_once_and_becomes_durable_later(self, store: Store, space: BlockSpace) -> None:
        assert space.put(b"b", b"before")
        job = space.submit_put([b"a", b"b", b"c"], [b"1", b"2", b"3"])
        assert job.done() and job.wait(0)
        assert [s.state for s in job.statuses][1] is PutState.EXISTS
        assert all(s.state in (PutState.ACCEPTED, PutState.DURABLE) for s in job.statuses[::2])
        assert store.flush()
        assert [s.state for s in job.statuses] == [PutState.DURABLE, PutState.EXISTS, PutState.DURABLE]

    def test_borrowed_memory_is_free_when_the_job_is_done(self, store: Store, space: BlockSpace) -> None:
        blocks = [block_bytes(key, version, 100_001) for version, key in enumerate(KEYS)]
        borrowed = [block.copy() for block in blocks]
        assert space.put(KEYS[0], blocks[0])
        job = space.submit_put(KEYS, borrowed, own="borrow")
        for key, block in zip(KEYS, blocks, strict=True):
            assert_holds(space, key, block)
        assert job.wait(WAIT_S) and job.done()
        assert [s.state for s in job.statuses] == [PutState.EXISTS] + [PutState.DURABLE] * (len(KEYS) - 1)
        for block in borrowed:
            block[:] = 0
        for key, block in zip(KEYS, blocks, strict=True):
            assert_holds(space, key, block)

    def test_a_put_that_is_deleted_before_it_is_durable_says_so_or_was_durable(self, store: Store, space: BlockSpace) -> None:
        for own in ("copy", "borrow"):
            job = space.submit_put([b"k"], [np.ones(1000, np.uint8)], own=own)  # type: ignore[arg-type]
            space.delete([b"k"])
            assert store.flush()
            assert job.wait(WAIT_S)
            assert job.statuses[0] in (PutStatus(PutState.REFUSED, Refusal.DELETED), PutStatus(PutState.DURABLE))
            assert read(space, b"k", 1000)[0] is Status.MISS

    def test_a_chained_put_makes_each_key_the_parent_of_the_next(self, store: Store, space: BlockSpace) -> None:
        assert space.put(b"root", b"0")
        assert space.submit_put([b"a", b"b"], [b"1", b"2"], parent=b"root").wait(WAIT_S)
        assert space.submit_put([b"x", b"y"], [b"1", b"2"], chained=False).wait(WAIT_S)
        assert space.put(b"c", b"3", parent=b"b")
        assert store.flush()
        depths = [info.depth for info in space.info([b"root", b"a", b"b", b"c", b"x", b"y"]) if info]
        assert depths == [0, 1, 2, 3, 0, 0] if self.knows_depth else len(depths) == 6

    def test_an_empty_put_is_done(self, space: BlockSpace) -> None:
        job = space.submit_put([], [])
        assert job.done() and list(job.statuses) == []

    # --- facts ----------------------------------------------------------------------------------------------------

    def test_info_says_what_was_put(self, store: Store, space: BlockSpace) -> None:
        written_at_ns = self.clock.now_ns()
        assert space.put(b"k", bytes(10_000), ttl=60, tag="tenant", meta=b"m" * 512)
        assert space.put(b"plain", bytes(3))
        assert space.put(b"tagged", bytes(3), tag=b"tenant")
        self.clock.advance(1)
        for flushed in (False, True):
            k, absent, plain, tagged = space.info([b"k", b"absent", b"plain", b"tagged"])
            assert absent is None and k is not None and plain is not None and tagged is not None
            assert (k.raw_bytes, k.depth, k.meta) == (10_000, 0, b"m" * 512)
            assert k.written_at_ns == written_at_ns and k.expires_at_ns == written_at_ns + 60 * 10**9
            assert 0 < k.stored_bytes <= 10_000
            assert k.tag == tagged.tag != bytes(16) == plain.tag and len(k.tag) == 16
            assert (plain.expires_at_ns, plain.meta) == (None, b"")
            assert k.durable or not flushed
            assert store.flush()

    def test_every_key_of_a_put_may_have_metadata_of_its_own(self, store: Store, space: BlockSpace) -> None:
        assert space.submit_put([b"a", b"b"], [b"1", b"2"], metas=[b"", b"meta"], tag="t").wait(WAIT_S)
        assert store.flush()
        assert [info.meta for info in space.info([b"a", b"b"]) if info] == [b"", b"meta"]

    def test_an_estimate_tells_bytes_and_time_of_what_is_there(self, store: Store, space: BlockSpace) -> None:
        assert space.estimate([b"a", b"absent"]) == LoadEstimate(0, 0, 0.0) == space.estimate([])
        assert space.put(b"a", block_bytes(b"a", 0, 300_000)) and space.put(b"b", bytes(200_000)) and space.put(b"c", b"1", ttl=5)
        for _ in range(2):
            both, one = space.estimate([b"a", b"absent", b"b"]), space.estimate([b"a"])
            assert (both.raw_bytes, one.raw_bytes) == (500_000, 300_000)
            assert 0 < one.stored_bytes < both.stored_bytes <= both.raw_bytes
            assert 0 < one.seconds < both.seconds < 60
            assert store.flush()
            assert_holds(space, b"a", block_bytes(b"a", 0, 300_000))
        assert space.estimate([b"c"]).raw_bytes == 1
        self.clock.advance(5)
        space.delete([b"a"])
        assert space.estimate([b"a", b"c"]) == LoadEstimate(0, 0, 0.0)

    # --- looking up -----------------------------------------------------------------------------------------------

    def test_a_prefix_run_ends_at_the_first_absent_key(self, store: Store, space: BlockSpace) -> None:
        keys = [b"%04d" % i for i in range(40)]
        present = [i for i in range(40) if i not in (0, 25, 30)]
        assert space.submit_put([keys[i] for i in present], [b"x"] * len(present)).wait(WAIT_S)
        for _ in range(2):
            assert space.match_prefix(keys) == 0
            assert space.match_prefix(keys[1:]) == 24
            assert space.match_prefix(keys[1:20]) == 19
            assert space.match_prefix(keys[31:]) == 9
            assert space.match_prefix([]) == 0
            assert space.contains(keys) == [i in present for i in range(40)]
            assert store.flush()

    def test_a_prefix_run_may_be_thousands_of_blocks_long(self, store: Store, space: BlockSpace) -> None:
        keys = [b"key %d" % i for i in range(3000)]
        assert all(space.submit_put(keys, [b"x"] * 3000).statuses)
        assert store.flush()
        assert space.match_prefix(keys) == 3000
        space.delete([keys[2222]])
        assert space.match_prefix(keys) == 2222
        assert space.contains(keys).count(True) == 2999

    def test_a_lookup_that_does_not_wait_settles_on_the_truth(self, store: Store, space: BlockSpace) -> None:
        assert space.put(b"a", b"1")
        assert settled(space, [b"a", b"absent"]) == [Status.HIT, Status.MISS]
        assert store.flush()
        assert settled(space, [b"absent", b"a"]) == [Status.MISS, Status.HIT]
        assert space.lookup_nowait([]) == []

    def test_a_lookup_follows_puts_and_deletes_of_this_process_at_once(self, store: Store, space: BlockSpace) -> None:
        assert settled(space, [b"a"]) == [Status.MISS]
        for _ in range(3):
            assert space.put(b"a", b"1")
            assert space.lookup_nowait([b"a"]) != [Status.MISS]
            assert settled(space, [b"a"]) == [Status.HIT]
            assert store.flush()
            assert settled(space, [b"a"]) == [Status.HIT]
            space.delete([b"a"])
            assert space.lookup_nowait([b"a"]) != [Status.HIT]
            assert settled(space, [b"a"]) == [Status.MISS]
            assert store.flush()
            assert settled(space, [b"a"]) == [Status.MISS]

    # --- getting --------------------------------------------------------------------------------------------------

    def test_results_come_in_the_order_of_the_keys(self, store: Store, space: BlockSpace) -> None:
        keys = [b"%d" % i for i in range(64)]
        stored = {key: block_bytes(key, i, 8 + 997 * i) for i, key in enumerate(keys) if i % 3}
        half = list(stored)[: len(stored) // 2]
        assert space.submit_put(half, [stored[key] for key in half]).wait(WAIT_S)
        assert store.flush()  # some are read from where the store keeps them, some from its buffer
        rest = list(stored)[len(half) :]
        assert space.submit_put(rest, [stored[key] for key in rest]).wait(WAIT_S)
        order = np.random.default_rng(7).permutation(64)
        wanted = [keys[i] for i in order]
        outs = [np.zeros(8 + 997 * int(i), np.uint8) for i in order]
        statuses = space.get_many_into(wanted, outs)
        assert statuses == [Status.HIT if key in stored else Status.MISS for key in wanted]
        assert all(np.array_equal(out, stored[key]) for key, out in zip(wanted, outs, strict=True) if key in stored)

    def test_each_key_has_a_status_of_its_own(self, store: Store, space: BlockSpace) -> None:
        block = block_bytes(b"k", 1, 1000)
        assert space.put(b"k", block)
        assert space.put(b"old", block, ttl=5)
        self.clock.advance(5)
        for _ in range(2):
            outs = [np.zeros(size, np.uint8) for size in (1000, 1000, 999, 1001, 1000)]
            statuses = space.get_many_into([b"k", b"absent", b"k", b"k", b"k"], outs)
            assert statuses == [Status.HIT, Status.MISS, Status.WRONG_SIZE, Status.WRONG_SIZE, Status.HIT]
            assert np.array_equal(outs[0], block) and np.array_equal(outs[4], block)
            assert space.contains([b"k"]) == [True]
            assert store.flush()
        assert read(space, b"old", 1000)[0] is Status.EXPIRED

    def test_a_part_is_the_same_bytes_as_in_the_whole_block(self, store: Store, space: BlockSpace) -> None:
        sizes = (700_000, 1_200_001, 524_288)
        blocks = [block_bytes(key, version, size) for version, (key, size) in enumerate(zip(KEYS, sizes, strict=False))]
        assert space.submit_put(KEYS[:3], blocks).wait(WAIT_S)
        parts = [(0, 1), (5, 262_139), (262_144, 262_144), (262_143, 2), (100_003, 400_000), (524_287, 1)]
        for _ in range(2):
            for start, length in parts:
                around = [np.full(length + 64, 0xA5, np.uint8) for _ in range(4)]
                inner: list[Any] = [buffer[32:-32] for buffer in around]
                if length > 1:
                    inner[2] = [inner[2][: length // 2], inner[2][length // 2 :]]
                job = space.submit_get_range([*KEYS[:3], b"absent"], inner, start)
                assert job.wait(WAIT_S) and list(job.statuses) == [Status.HIT] * 3 + [Status.MISS]
                for block, buffer in zip(blocks, around, strict=False):
                    assert np.array_equal(buffer[32:-32], block[start : start + length])
                for buffer in around:
                    assert (buffer[:32] == 0xA5).all() and (buffer[-32:] == 0xA5).all()
            assert store.flush()

    def test_a_part_that_ends_behind_its_block_is_a_wrong_size(self, store: Store, space: BlockSpace) -> None:
        assert space.put(b"k", np.ones(1000, np.uint8))
        for _ in range(2):
            out = np.zeros(10, np.uint8)
            for start, status in ((990, Status.HIT), (991, Status.WRONG_SIZE), (1000, Status.WRONG_SIZE), (1 << 40, Status.WRONG_SIZE)):
                job = space.submit_get_range([b"k"], [out], start)
                assert job.wait(WAIT_S) and job.statuses[0] is status
            assert space.contains([b"k"]) == [True] and store.flush()
        with pytest.raises(InvalidConfig, match="begins before"):
            space.submit_get_range([b"k"], [out], -1)

    def test_a_part_that_is_damaged_is_reported_once_and_then_missed(self) -> None:
        if not self.can_damage:
            pytest.skip("this store cannot be damaged from outside")
        store = self.make_store()
        space = store.namespace(descriptor())
        assert space.put(b"k", block_bytes(b"k", 1, 500_000)) and store.flush()
        store = self.damage(store, space, b"k")
        space = store.namespace(descriptor())
        for status in (Status.CORRUPT, Status.MISS):
            job = space.submit_get_range([b"k"], [np.zeros(5000, np.uint8)], 0)
            assert job.wait(WAIT_S) and job.statuses[0] is status
            assert store.flush()
        assert space.contains([b"k"]) == [False]
        assert store.close()

    def test_a_job_is_done_when_every_status_is_final(self, store: Store, space: BlockSpace) -> None:
        blocks = [block_bytes(key, i, 70_000) for i, key in enumerate(KEYS)]
        assert space.submit_put(KEYS, blocks).wait(WAIT_S)
        for _ in range(2):
            outs = [np.zeros(70_000, np.uint8) for _ in range(9)]
            job = space.submit_get([*KEYS, b"absent"], outs)
            assert job.wait(WAIT_S) and job.done()
            assert list(job.statuses) == [Status.HIT] * 8 + [Status.MISS]
            assert list(job.verified) == [True] * 8 + [False]
            assert all(np.array_equal(out, block) for out, block in zip(outs, blocks, strict=False))
            assert store.flush()

    def test_after_cancel_no_key_is_pending_and_hits_are_whole(self, store: Store, space: BlockSpace) -> None:
        keys = [b"%d" % i for i in range(60)]
        assert space.submit_put(keys, [block_bytes(key, i, 50_000) for i, key in enumerate(keys)]).wait(WAIT_S)
        assert store.flush()
        for _ in range(5):
            outs = [np.zeros(50_000, np.uint8) for _ in keys]
            job = space.submit_get(keys, outs)
            job.cancel()
            assert job.done()
            assert set(job.statuses) <= {Status.HIT, Status.CANCELLED}
            for i, (key, status) in enumerate(zip(keys, job.statuses, strict=True)):
                assert status is not Status.HIT or np.array_equal(outs[i], block_bytes(key, i, 50_000))
            for out in outs:
                out[:] = 0x5A  # the caller's again
            assert all((out == 0x5A).all() for out in outs)

    def test_a_deadline_gives_hits_or_pending_and_never_touches_a_pending_destination_again(self, store: Store, space: BlockSpace) -> None:
        keys = [b"%d" % i for i in range(30)]
        assert space.submit_put(keys, [block_bytes(key, i, 90_000) for i, key in enumerate(keys)]).wait(WAIT_S)
        assert store.flush()
        for timeout in (0.0, 0.001, WAIT_S):
            outs = [np.full(90_000, 0xA5, np.uint8) for _ in keys]
            statuses = space.get_many_into(keys, outs, timeout=timeout)
            assert set(statuses) <= ({Status.HIT, Status.PENDING} if timeout < WAIT_S else {Status.HIT})
            left = [out.copy() for out in outs]
            space.get_many_into(keys, [np.zeros(90_000, np.uint8) for _ in keys])  # later reads do not reach the old destinations
            assert all(np.array_equal(before, out) for before, out in zip(left, outs, strict=True))
            for i, (key, status) in enumerate(zip(keys, statuses, strict=True)):
                assert status is not Status.HIT or np.array_equal(outs[i], block_bytes(key, i, 90_000))
        assert read(space, keys[0], 90_000, timeout=WAIT_S)[0] is Status.HIT

    def test_reading_nothing_is_done(self, space: BlockSpace) -> None:
        job = space.submit_get([], [])
        assert job.done() and job.wait(0) and list(job.statuses) == []
        job.cancel()
        assert space.get_many_into([], []) == [] and space.contains([]) == [] and space.info([]) == []

    # --- expiry ---------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("flush_first", [False, True])
    def test_a_block_is_gone_when_its_time_to_live_has_passed(self, store: Store, space: BlockSpace, flush_first: bool) -> None:
        assert space.submit_put([b"a", b"b"], [b"1", b"2"], ttl=10).wait(WAIT_S)
        assert space.put(b"c", b"3")
        assert not flush_first or store.flush()
        self.clock.advance(9.999)
        assert space.match_prefix([b"a", b"b", b"c"]) == 3
        assert read(space, b"a", 1)[0] is Status.HIT
        self.clock.advance(0.001)
        assert space.match_prefix([b"a", b"b", b"c"]) == 0
        assert space.contains([b"a", b"b", b"c"]) == [False, False, True]
        assert space.info([b"a"]) == [None]
        assert space.delete([b"b"]) == 0
        assert read(space, b"a", 1)[0] is Status.EXPIRED
        assert read(space, b"a", 1)[0] in (Status.EXPIRED, Status.MISS)
        assert read(space, b"c", 1)[0] is Status.HIT

    @pytest.mark.parametrize("flush_first", [False, True])
    @pytest.mark.parametrize("read_first", [False, True])
    def test_an_expired_key_can_be_put_again(self, store: Store, space: BlockSpace, flush_first: bool, read_first: bool) -> None:
        assert space.put(b"k", block_bytes(b"k", 1, 100), ttl=1)
        assert not flush_first or store.flush()
        self.clock.advance(2)
        assert not read_first or read(space, b"k", 100)[0] is Status.EXPIRED
        assert space.put(b"k", block_bytes(b"k", 2, 200)).state is PutState.ACCEPTED
        assert_holds(space, b"k", block_bytes(b"k", 2, 200))
        assert store.flush()
        assert_holds(space, b"k", block_bytes(b"k", 2, 200))
        assert settled(space, [b"k"]) == [Status.HIT]

    @pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf")])
    def test_a_time_to_live_that_is_none_is_refused(self, space: BlockSpace, ttl: float) -> None:
        with pytest.raises(InvalidConfig, match="ttl"):
            space.put(b"k", b"1", ttl=ttl)
        with pytest.raises(InvalidConfig, match="ttl"):
            space.submit_put([b"k"], [b"1"], ttl=ttl)
        assert space.contains([b"k"]) == [False]

    # --- removing -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("flush_first", [False, True])
    def test_a_deleted_block_is_gone_at_once(self, store: Store, space: BlockSpace, flush_first: bool) -> None:
        assert space.submit_put([b"a", b"b", b"c"], [b"1", b"2", b"3"]).wait(WAIT_S)
        assert not flush_first or store.flush()
        assert space.delete([b"b", b"absent"]) == 1
        for _ in range(2):
            assert space.contains([b"a", b"b", b"c"]) == [True, False, True]
            assert space.match_prefix([b"a", b"b", b"c"]) == 1
            assert read(space, b"b", 1)[0] is Status.MISS
            assert space.info([b"b"]) == [None]
            assert space.delete([b"b"]) == 0
            assert store.flush()
        assert space.delete([]) == 0

    def test_a_deleted_key_can_be_put_again(self, store: Store, space: BlockSpace) -> None:
        for version in range(6):
            assert space.put(b"k", block_bytes(b"k", version, 900 + version)).state is PutState.ACCEPTED
            assert version % 2 or store.flush()
            assert_holds(space, b"k", block_bytes(b"k", version, 900 + version))
            assert space.delete([b"k"]) == 1
            assert version % 3 or store.flush()
            assert read(space, b"k", 900 + version)[0] is Status.MISS

    @pytest.mark.parametrize("flush_first", [False, True])
    def test_drop_removes_its_own_namespace_alone(self, store: Store, space: BlockSpace, flush_first: bool) -> None:
        other = store.namespace(descriptor("other"))
        for each in (space, other):
            assert each.submit_put([b"a", b"b"], [b"1", b"2"]).wait(WAIT_S)
        assert not flush_first or store.flush()
        space.drop()
        for _ in range(2):
            assert space.contains([b"a", b"b"]) == [False, False]
            assert read(space, b"a", 1)[0] is Status.MISS
            assert settled(space, [b"a"]) == [Status.MISS]
            assert other.contains([b"a", b"b"]) == [True, True]
            assert_holds(other, b"a", np.frombuffer(b"1", np.uint8))
            assert store.flush()
        assert space.put(b"a", b"new").state is PutState.ACCEPTED
        assert store.flush()
        assert_holds(space, b"a", np.frombuffer(b"new", np.uint8))
        assert space.contains([b"a", b"b"]) == [True, False]

    # --- keeping --------------------------------------------------------------------------------------------------

    def test_a_pin_counts_the_blocks_that_are_there(self, store: Store, space: BlockSpace) -> None:
        assert space.submit_put([b"a", b"b"], [b"1", b"2"]).wait(WAIT_S)
        assert store.flush()
        with space.pin([b"a", b"absent", b"b"]) as held, space.pin([b"a"]) as again, space.pin([]) as none:
            assert (held, again, none) == (2, 1, 0)
            assert_holds(space, b"a", np.frombuffer(b"1", np.uint8))
            assert space.delete([b"b"]) == 1
        assert space.contains([b"a", b"b"]) == [True, False]

    def test_a_full_store_gives_up_old_blocks_and_keeps_pinned_ones(self) -> None:
        with_store = self.make_store(capacity_bytes=8 << 20)
        space = with_store.namespace(descriptor(block_bytes_max=64 << 10))
        size, total = 64 << 10, 300
        keys = [b"block %d" % i for i in range(total)]
        pinned = keys[: self.pinned_blocks]

        def fill(first: int, last: int) -> None:
            for i in range(first, last):
                assert space.put(keys[i], block_bytes(keys[i], 4 * i, size))
                if i % 8 == 7:
                    assert with_store.flush()

        fill(0, self.pinned_blocks)
        with space.pin(pinned) as held:
            assert held == len(pinned)
            fill(self.pinned_blocks, total)
            answers = [read(space, keys[i], size) for i in range(total)]
            present = [i for i, (status, _) in enumerate(answers) if status is Status.HIT]
            assert set(range(self.pinned_blocks)) <= set(present)
            assert set(range(total - self.small_blocks_kept, total)) <= set(present)
            assert len(present) * size <= 8 << 20
            for i in present:
                assert np.array_equal(answers[i][1], block_bytes(keys[i], 4 * i, size))
        assert with_store.close()

    def test_a_touch_is_allowed_for_any_key(self, space: BlockSpace) -> None:
        assert space.submit_put([b"a", b"b"], [b"1", b"2"]).wait(WAIT_S)
        space.touch([b"b", b"absent", b"a"])
        space.touch([])
        assert space.contains([b"a", b"b"]) == [True, True]

    # --- bad input ------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("key", [b"", b"k" * 256, "text", 7, bytearray(b"k")])
    def test_keys_that_no_store_takes_are_refused(self, store: Store, space: BlockSpace, key: Any) -> None:
        calls: list[Callable[[], object]] = [
            lambda: space.put(key, b"1"),
            lambda: space.put(b"good", b"1", parent=key),
            lambda: space.submit_put([b"good", key], [b"1", b"2"]),
            lambda: space.get_into(key, bytearray(1)),
            lambda: space.submit_get([key], [bytearray(1)]),
        ]
        for call in calls:
            with pytest.raises(InvalidKey, match="key"):
                call()
        assert space.contains([b"good"]) == [False]
        assert store.flush()

    def test_metadata_and_tags_have_limits(self, space: BlockSpace) -> None:
        for options in ({"meta": b"m" * 513}, {"meta": "text"}, {"tag": 7}):
            with pytest.raises(InvalidKey, match=r"metadata|tag"):
                space.put(b"k", b"1", **options)
        with pytest.raises(InvalidKey, match="metadata"):
            space.submit_put([b"k", b"l"], [b"1", b"2"], metas=[b"", b"m" * 513])
        assert space.contains([b"k", b"l"]) == [False, False]

    @pytest.mark.parametrize(
        "make",
        [
            lambda: bytes((4 << 20) + 1),
            lambda: b"",
            lambda: [],
            lambda: torch.zeros(8, 8, dtype=torch.bfloat16).t(),
            lambda: torch.zeros(8, dtype=torch.float32),
            lambda: np.zeros(16, np.uint8)[::2],
            lambda: "text",
        ],
    )
    def test_blocks_that_the_namespace_cannot_take_are_refused_whole(self, store: Store, space: BlockSpace, make: Any) -> None:
        with pytest.raises(InvalidBlock):
            space.put(b"bad", make())
        with pytest.raises(InvalidBlock):
            space.submit_put([b"good", b"bad"], [b"1", make()])
        assert space.contains([b"good", b"bad"]) == [False, False]
        assert space.put(b"good", b"1") and store.flush()
        assert_holds(space, b"good", np.frombuffer(b"1", np.uint8))

    @pytest.mark.parametrize("make", [lambda: b"frozen", lambda: torch.zeros(4, 4).t(), lambda: [], lambda: torch.zeros(3)])
    def test_destinations_that_cannot_be_filled_are_refused(self, space: BlockSpace, make: Any) -> None:
        assert space.put(b"k", bytes(6))
        good = np.full(6, 0xA5, np.uint8)
        for call in (lambda: space.get_into(b"k", make()), lambda: space.submit_get([b"k", b"k"], [good, make()])):
            with pytest.raises(InvalidBlock):
                call()
        assert (good == 0xA5).all()

    def test_lists_of_different_lengths_are_refused(self, space: BlockSpace) -> None:
        calls: list[Callable[[], object]] = [
            lambda: space.submit_put([b"a", b"b"], [b"1"]),
            lambda: space.submit_put([b"a"], [b"1"], metas=[]),
            lambda: space.submit_get([b"a"], []),
            lambda: space.get_many_into([b"a"], [bytearray(1), bytearray(1)]),
        ]
        for call in calls:
            with pytest.raises(InvalidConfig, match="differ in number"):
                call()
        with pytest.raises(InvalidConfig, match="own"):
            space.submit_put([b"a"], [b"1"], own="steal")  # type: ignore[arg-type]
        assert space.contains([b"a", b"b"]) == [False, False]

    def test_errors_are_one_family_that_says_what_to_do(self, space: BlockSpace) -> None:
        with pytest.raises(KvlodeError) as refusal:
            space.put(b"k", bytes((4 << 20) + 1))
        assert "4194304" in str(refusal.value) and "4194305" in str(refusal.value) and "block_bytes_max" in str(refusal.value)

    # --- the completion queue ---------------------------------------------------------------------------------------

    def test_a_poll_loop_hears_of_every_job_once(self, store: Store, space: BlockSpace) -> None:
        queue = CompletionQueue()
        assert queue.pop() is None and not readable(queue, 0)
        blocks = [block_bytes(key, i, 40_000) for i, key in enumerate(KEYS)]
        puts = [space.submit_put([key], [block], queue=queue) for key, block in zip(KEYS, blocks, strict=True)]
        puts.append(space.submit_put([b"borrowed"], [blocks[0]], own="borrow", queue=queue))
        assert store.flush()
        gets = [space.submit_get([key, b"absent"], [np.zeros(40_000, np.uint8), bytearray(1)], queue=queue) for key in KEYS]
        expected = {id(job) for job in [*puts, *gets]}
        while expected:
            assert readable(queue, WAIT_S)
            job = queue.pop()
            assert job is not None and job.done()
            expected.remove(id(job))
        assert queue.pop() is None and not readable(queue, 0)
        assert all(list(job.statuses) == [Status.HIT, Status.MISS] for job in gets)
        queue.close()
        queue.close()

    # --- flush, stats, close ----------------------------------------------------------------------------------------

    def test_flush_is_true_and_everything_is_durable(self, store: Store, space: BlockSpace) -> None:
        assert store.flush() and store.flush(timeout=WAIT_S)
        assert space.submit_put(KEYS, [b"x"] * len(KEYS)).wait(WAIT_S)
        assert store.flush(timeout=WAIT_S)
        assert all(info is not None and info.durable for info in space.info(KEYS))

    def test_stats_are_plain_values(self, store: Store, space: BlockSpace) -> None:
        assert space.put(b"k", b"1") and store.flush()
        assert read(space, b"k", 1)[0] is Status.HIT
        stats = json.loads(json.dumps(dict(store.stats())))
        assert stats["capacity_bytes"] > 0
        assert stats["counters"]["put_blocks"] == 1

    def test_a_closed_store_says_so(self) -> None:
        store = self.make_store()
        space = store.namespace(descriptor())
        put = space.submit_put([b"k"], [b"1"])
        get = space.submit_get([b"k"], [bytearray(1)])
        assert get.wait(WAIT_S)
        assert store.close() and store.close()
        assert [s.state for s in put.statuses] == [PutState.DURABLE] and list(get.statuses) == [Status.HIT]
        calls: list[Callable[[], object]] = [
            lambda: store.namespace(descriptor()),
            lambda: store.flush(),
            lambda: store.stats(),
            lambda: space.put(b"k", b"1"),
            lambda: space.submit_put([b"k"], [b"1"]),
            lambda: space.match_prefix([b"k"]),
            lambda: space.contains([b"k"]),
            lambda: space.lookup_nowait([b"k"]),
            lambda: space.submit_get([b"k"], [bytearray(1)]),
            lambda: space.get_into(b"k", bytearray(1)),
            lambda: space.get_many_into([b"k"], [bytearray(1)]),
            lambda: space.info([b"k"]),
            lambda: space.estimate([b"k"]),
            lambda: space.touch([b"k"]),
            lambda: space.pin([b"k"]).__enter__(),
            lambda: space.delete([b"k"]),
            lambda: space.drop(),
        ]
        for call in calls:
            with pytest.raises(StoreClosed, match="closed"):
                call()

    def test_what_was_there_at_close_is_there_after_opening(self) -> None:
        if not self.can_reopen:
            pytest.skip("this store does not outlive its process")
        store = self.make_store()
        space, other = store.namespace(descriptor()), store.namespace(descriptor("other"))
        blocks = {key: block_bytes(key, i, 30_000 + i) for i, key in enumerate(KEYS)}
        assert space.submit_put(KEYS, list(blocks.values()), metas=KEYS).wait(WAIT_S)
        assert space.put(b"short-lived", b"1", ttl=100) and space.put(b"deleted", b"1")
        assert other.put(b"dropped", b"1")
        assert store.flush()
        assert space.delete([b"deleted"]) == 1
        other.drop()
        assert space.put(b"late", b"unflushed")
        assert store.close()
        self.clock.advance(99)
        store = self.reopen(store)
        space, other = store.namespace(descriptor()), store.namespace(descriptor("other"))
        for key, block in blocks.items():
            assert_holds(space, key, block)
        infos = space.info(KEYS)
        assert [info.meta[:255] for info in infos if info] == KEYS
        assert not self.knows_depth or [info.depth for info in infos if info] == list(range(len(KEYS)))
        assert_holds(space, b"late", np.frombuffer(b"unflushed", np.uint8))
        assert space.contains([b"short-lived", b"deleted"]) == [True, False]
        assert other.contains([b"dropped"]) == [False]
        self.clock.advance(1)
        assert read(space, b"short-lived", 1)[0] is Status.EXPIRED
        assert store.close()

    def test_a_damaged_block_is_reported_once_and_then_missed(self) -> None:
        if not self.can_damage:
            pytest.skip("this store cannot be damaged from outside")
        store = self.make_store()
        space = store.namespace(descriptor())
        for version, key in enumerate(KEYS[:4]):  # as many contents as there are codecs
            assert space.put(key, block_bytes(key, version, 500_000))
        assert store.flush()
        store = self.damage(store, space, KEYS[1])
        space = store.namespace(descriptor())
        assert read(space, KEYS[1], 500_000)[0] is Status.CORRUPT
        assert store.flush()
        assert read(space, KEYS[1], 500_000)[0] is Status.MISS
        assert space.contains(KEYS[:4]) == [True, False, True, True]
        assert settled(space, [KEYS[1]]) == [Status.MISS]
        assert_holds(space, KEYS[2], block_bytes(KEYS[2], 2, 500_000))
        assert space.put(KEYS[1], block_bytes(KEYS[1], 9, 500_000)).state is PutState.ACCEPTED
        assert_holds(space, KEYS[1], block_bytes(KEYS[1], 9, 500_000))
        assert store.close()

    # --- threads ----------------------------------------------------------------------------------------------------

    def test_threads_on_their_own_keys_see_exactly_their_own_history(self, store: Store, space: BlockSpace) -> None:
        def work(number: int) -> None:
            rng = np.random.default_rng(number)
            held: dict[bytes, int] = {}
            for version in range(120):
                key = b"thread %d key %d" % (number, rng.integers(5))
                size = 600 + 37 * len(key)
                if key not in held and rng.random() < 0.7:
                    assert space.put(key, block_bytes(key, version, size)).state is PutState.ACCEPTED
                    held[key] = version
                elif key in held and rng.random() < 0.3:
                    assert space.delete([key]) == 1
                    del held[key]
                status, out = read(space, key, size)
                assert status is (Status.HIT if key in held else Status.MISS)
                assert key not in held or np.array_equal(out, block_bytes(key, held[key], size))
                if version % 40 == 39:
                    assert store.flush(WAIT_S)

        run_threads(4, work)

    def test_events_tell_what_came_and_went(self, store: Store, space: BlockSpace) -> None:
        since = store.events().next
        for key in (b"a", b"b"):
            assert space.put(key, block_bytes(key, 1, 5000))
        assert store.flush(WAIT_S)
        assert space.delete([b"a"]) == 1
        assert store.flush(WAIT_S)
        space.drop()
        assert store.flush(WAIT_S)
        told = [(event.kind.value, key) for event in store.events(since).events for key in event.keys or [b""]]
        assert set(told) == {("stored", b"a"), ("stored", b"b"), ("removed", b"a"), ("cleared", b"")}
        assert ("removed", b"a") in told[told.index(("stored", b"a")) :]
        assert not store.events(store.events(since).next).events

    @pytest.mark.parametrize("physical", [False, True])
    def test_a_purge_takes_every_block_of_its_tag_and_no_other(self, store: Store, space: BlockSpace, physical: bool) -> None:
        other = store.namespace(descriptor("purged too"))
        blocks = {key: block_bytes(key, 8, 5000 + 100 * i) for i, key in enumerate(KEYS)}
        for i, (key, block) in enumerate(blocks.items()):
            assert space.put(key, block, tag="tenant" if i % 2 else "another", meta=b"note")
            assert other.put(key, block, tag=b"tenant")
            if i == len(KEYS) // 2:
                assert store.flush(WAIT_S)
        assert space.put(b"untagged", blocks[KEYS[0]])
        report = store.purge("tenant", physical=physical, timeout=WAIT_S)
        assert report.complete and not report.reasons and report.physical is physical
        assert report.blocks == len(KEYS) // 2 + len(KEYS)
        assert (report.records_erased > 0, report.bytes_erased > 0) == (physical, physical)
        assert other.contains(KEYS) == [False] * len(KEYS)
        assert space.contains(KEYS) == [i % 2 == 0 for i in range(len(KEYS))]
        for i, (key, block) in enumerate(blocks.items()):
            if i % 2:
                assert read(space, key, block.nbytes)[0] is Status.MISS
            else:
                assert_holds(space, key, block)
        assert_holds(space, b"untagged", blocks[KEYS[0]])
        assert settled(other, KEYS) == [Status.MISS] * len(KEYS)
        again = store.purge(b"tenant", physical=physical, timeout=WAIT_S)
        assert again.complete and (again.tag, again.blocks, again.records_erased, again.bytes_erased) == (report.tag, 0, 0, 0)
        assert other.put(KEYS[0], blocks[KEYS[0]], tag="tenant") and store.flush(WAIT_S)
        assert_holds(other, KEYS[0], blocks[KEYS[0]])

    def test_what_was_purged_stays_away_after_a_reopening(self, store: Store, space: BlockSpace) -> None:
        if not self.can_reopen:
            pytest.skip("nothing outlives this store")
        kept, gone = block_bytes(b"kept", 1, 9000), block_bytes(b"gone", 2, 9000)
        assert space.put(b"kept", kept, tag="a") and space.put(b"gone", gone, tag="b") and store.flush(WAIT_S)
        assert store.purge("b").blocks == 1
        reopened = self.reopen(store).namespace(descriptor())
        assert read(reopened, b"gone", 9000)[0] is Status.MISS
        assert_holds(reopened, b"kept", kept)

    def test_a_purge_needs_a_tag(self, store: Store) -> None:
        for tag in (None, 7, object()):
            with pytest.raises(InvalidKey, match="tag"):
                store.purge(tag)  # type: ignore[arg-type]
        report = store.purge("nobody", physical=True)
        assert report.complete and report.blocks == report.records_erased == report.bytes_erased == 0

    def test_threads_on_shared_keys_see_whole_blocks_only(self, store: Store, space: BlockSpace) -> None:
        keys = [b"shared %d" % i for i in range(6)]
        size = 20_000

        def work(number: int) -> None:
            rng = np.random.default_rng(100 + number)
            for step in range(100):
                key = keys[rng.integers(len(keys))]
                action = rng.random()
                if action < 0.4:
                    assert space.put(key, block_bytes(key, number * 1000 + step, size))
                elif action < 0.55:
                    space.delete([key])
                elif action < 0.58:
                    space.drop()
                elif action < 0.6:
                    assert store.flush(WAIT_S)
                else:
                    outs = [np.zeros(size, np.uint8) for _ in keys]
                    job = space.submit_get(keys, outs)
                    assert job.wait(WAIT_S)
                    assert set(job.statuses) <= {Status.HIT, Status.MISS}
                    for each, status, out in zip(keys, job.statuses, outs, strict=True):
                        if status is Status.HIT:
                            version_of(each, out)

        run_threads(4, work)
        assert store.flush()


def run_threads(count: int, work: Callable[[int], None]) -> None:
    """Run ``work(number)`` on threads; the first failure of any of them is raised here."""
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,), name=f"test {number}") for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), f"{thread.name} hangs"
    if failures:
        raise failures[0]
