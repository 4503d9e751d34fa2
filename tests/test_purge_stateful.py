"""Random lives of a store with two tenants: a purge takes everything of one, never anything of the other, and its bytes when asked to."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from drive_words import files_on
from kvlode import BlockSpace, Status
from kvlode.engine.testing import ManualClock
from model import block_bytes, descriptor
from rig import KIB, MIB, Rig, read

WAIT_S = 60.0
SPACE = descriptor(block_bytes_max=64 * KIB)
KEYS = st.integers(0, 5)
SIZE = 9000
TENANTS = ("first", "second")


def words(tenant: str) -> bytes:
    return f"<< what the {tenant} tenant has said, and nobody else >>".encode()


def block_of(tenant: str, key: int, version: int) -> np.ndarray:
    text = (words(tenant) + b"%d %d;" % (key, version)) * (SIZE // 40)
    return np.frombuffer(text[:SIZE], np.uint8)


def key_of(tenant: str, key: int) -> bytes:
    return f"{tenant} {key}".encode()


class TwoTenants(RuleBasedStateMachine):
    """Blocks are small and the log short, so that it seals, reclaims and carries forward."""

    @initialize()
    def begin(self) -> None:
        self.rig = Rig(ManualClock(), capacity=16 * MIB, buffer=MIB, segment_bytes=256 * KIB, codec="raw", reinsert_hits_min=1)
        self.values: dict[bytes, np.ndarray] = {}
        """What each key was last put with; it may have been reclaimed."""
        self.version = self.filler = 0

    @property
    def space(self) -> BlockSpace:
        return self.rig.store.namespace(SPACE)

    @rule(tenant=st.sampled_from(TENANTS), key=KEYS, ttl=st.sampled_from([None, 10.0]))
    def put(self, tenant: str, key: int, ttl: float | None) -> None:
        self.version += 1
        block = block_of(tenant, key, self.version)
        name = key_of(tenant, key)
        if not self.space.contains([name])[0]:
            assert self.space.put(name, block, tag=tenant, ttl=ttl, meta=words(tenant))
            self.values[name] = block

    @rule(tenant=st.sampled_from(TENANTS), key=KEYS)
    def delete(self, tenant: str, key: int) -> None:
        self.space.delete([key_of(tenant, key)])
        self.values.pop(key_of(tenant, key), None)

    @rule(tenant=st.sampled_from(TENANTS))
    def touch(self, tenant: str) -> None:
        self.space.touch([key_of(tenant, key) for key in range(6)] * 2)

    @rule()
    def flush(self) -> None:
        assert self.rig.store.flush(WAIT_S)

    @rule(count=st.integers(1, 60))
    def fill(self, count: int) -> None:
        for _ in range(count):
            self.filler += 1
            name = b"filler %d" % self.filler
            self.space.put(name, block_bytes(name, 4 * self.filler, 64 * KIB))

    @rule(seconds=st.integers(1, 20))
    def wait(self, seconds: int) -> None:
        self.rig.clock.advance(seconds)

    @rule(lose_index=st.booleans())
    def reopen(self, lose_index: bool) -> None:
        self.rig.reopen(lose_index=lose_index)

    @rule(seed=st.integers(0, 99), keep=st.sampled_from(["none", "all", "random"]), lose_index=st.booleans())
    def crash(self, seed: int, keep: str, lose_index: bool) -> None:
        assert self.rig.store.flush(WAIT_S)
        self.rig.crash(seed, keep=keep, lose_index=lose_index)  # type: ignore[arg-type]

    @rule(tenant=st.sampled_from(TENANTS), physical=st.booleans(), lose_index=st.booleans())
    def purge(self, tenant: str, physical: bool, lose_index: bool) -> None:
        other = TENANTS[tenant == TENANTS[0]]
        before = self.space.contains([key_of(other, key) for key in range(6)])
        report = self.rig.store.purge(tenant, physical=physical, timeout=WAIT_S)
        assert report.complete, report.reasons
        assert not any(self.space.contains([key_of(tenant, key) for key in range(6)]))
        after = self.space.contains([key_of(other, key) for key in range(6)])
        assert before == after or self.rig.counter("segments_retired")
        for key in range(6):
            self.values.pop(key_of(tenant, key), None)
        if physical:
            assert files_on(self.rig.memory, words(tenant)) == []
            assert words(tenant) not in self.rig.store._core.buffer._arena._memory.tobytes()
        if lose_index:
            self.rig.reopen(lose_index=True)
            assert not any(self.space.contains([key_of(tenant, key) for key in range(6)]))
        again = self.rig.store.purge(tenant, physical=physical)
        assert (again.complete, again.blocks, again.records_erased) == (True, 0, 0)

    @precondition(lambda self: hasattr(self, "rig"))
    @rule()
    def read_everything(self) -> None:
        for tenant in TENANTS:
            for key in range(6):
                status, out = read(self.space, key_of(tenant, key), SIZE)
                assert status in (Status.HIT, Status.MISS, Status.EXPIRED)
                if status is Status.HIT:
                    assert np.array_equal(out, self.values[key_of(tenant, key)])

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.close()


TestTwoTenants = TwoTenants.TestCase
TestTwoTenants.settings = settings(max_examples=25, stateful_step_count=20)
