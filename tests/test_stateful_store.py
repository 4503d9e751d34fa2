"""Random histories of a store against a model: puts, reads, deletes, drops, expiry, pins, flushes, reopening, crashes, lost indexes."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from kvlode import Status
from kvlode.engine.testing import ManualClock
from model import Ident, Model, Value, block_bytes, descriptor
from rig import KIB, MIB, Rig

SPACES = ("one", "two")
KEYS = [b"k%d" % i for i in range(6)]
SIZES = (1, 500, 4096, 40_000, 300_001)
WAIT_S = 30.0
ABSENT = (Status.MISS, Status.EXPIRED)

spaces = st.sampled_from(SPACES)
keys = st.sampled_from(KEYS)


class StoreMachine(RuleBasedStateMachine):
    """A store with room for everything: what was flushed must be there, whatever happens."""

    options: ClassVar[dict[str, Any]] = {"capacity": 64 * MIB, "buffer": 8 * MIB, "segment_bytes": MIB}

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.model = Model(self.clock)
        self.rig = Rig(self.clock, **self.options)

    def space(self, name: str) -> Any:
        return self.rig.store.namespace(descriptor(name, block_bytes_max=512 * KIB))

    def teardown(self) -> None:
        self.rig.close()

    # --- changes --------------------------------------------------------------------------------------------------

    def put_one(self, name: str, key: bytes, size: int, ttl: float | None) -> None:
        version = self.model.next_version()
        expires_at_ns = None if ttl is None else self.clock.now_ns() + int(ttl * 1e9)
        status = self.space(name).put(key, block_bytes(key, version, size), ttl=ttl)
        self.model.put((name, key), Value(version, size, expires_at_ns), status)

    @rule(name=spaces, key=keys, size=st.sampled_from(SIZES), ttl=st.sampled_from([None, None, 5.0, 60.0]))
    def put(self, name: str, key: bytes, size: int, ttl: float | None) -> None:
        self.put_one(name, key, size, ttl)

    @rule(name=spaces, chosen=st.lists(keys, min_size=1, max_size=4, unique=True), size=st.sampled_from(SIZES))
    def put_many(self, name: str, chosen: list[bytes], size: int) -> None:
        values = [Value(self.model.next_version(), size) for _ in chosen]
        job = self.space(name).submit_put(chosen, [value.bytes_of(key) for key, value in zip(chosen, values, strict=True)])
        for key, value, status in zip(chosen, values, job.statuses, strict=True):
            self.model.put((name, key), value, status)
        job.wait(WAIT_S)

    @rule(name=spaces, key=keys)
    def delete(self, name: str, key: bytes) -> None:
        self.model.delete((name, key), self.space(name).delete([key]) == 1)

    @rule(name=spaces)
    def drop(self, name: str) -> None:
        self.space(name).drop()
        self.model.drop(name)

    @rule()
    def flush(self) -> None:
        assert self.rig.store.flush(WAIT_S)
        self.model.flushed()

    @rule(seconds=st.sampled_from([1.0, 6.0, 70.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    # --- questions ------------------------------------------------------------------------------------------------

    def read(self, ident: Ident, size: int) -> np.ndarray | None:
        out = np.full(size, 0xA5, np.uint8)
        status = self.space(ident[0]).get_into(ident[1], out)
        assert status is Status.HIT or status in ABSENT, f"{ident}: {status}"
        return out if status is Status.HIT else None

    def look(self, ident: Ident) -> None:
        """The store and the model agree about a block, to the last byte."""
        value = self.model.value(ident)
        data = self.read(ident, SIZES[-1] if value is None else value.size)
        if value is None:
            assert data is None, f"{ident} is gone, the store gave a block"
        else:
            assert data is not None, f"{ident} holds {value}, the store gave nothing"
            assert np.array_equal(data, value.bytes_of(ident[1])), f"{ident}: wrong bytes"

    @rule(name=spaces, key=keys)
    def get(self, name: str, key: bytes) -> None:
        self.look((name, key))

    @rule(name=spaces)
    def match_and_contains(self, name: str) -> None:
        present = self.space(name).contains(KEYS)
        expected = [self.model.value((name, key)) is not None for key in KEYS]
        assert present == expected
        assert self.space(name).match_prefix(KEYS) == (expected.index(False) if False in expected else len(KEYS))

    @rule(name=spaces, chosen=st.lists(keys, min_size=1, max_size=4, unique=True))
    def get_many(self, name: str, chosen: list[bytes]) -> None:
        values = [self.model.value((name, key)) for key in chosen]
        outs = [np.zeros(SIZES[-1] if value is None else value.size, np.uint8) for value in values]
        for key, value, out, status in zip(chosen, values, outs, self.space(name).get_many_into(chosen, outs), strict=True):
            if status is Status.HIT:
                assert value is not None and np.array_equal(out, value.bytes_of(key))
            else:
                assert status in ABSENT and value is None, f"{key!r}: {status}, expected {value}"

    @rule(name=spaces, chosen=st.lists(keys, max_size=3, unique=True))
    def pin_touch_and_release(self, name: str, chosen: list[bytes]) -> None:
        space = self.space(name)
        with space.pin(chosen) as held:
            assert held <= len(chosen)
            space.touch(chosen)
            for key in chosen:
                self.look((name, key))

    # --- ends and beginnings --------------------------------------------------------------------------------------

    @rule(
        lose_index=st.booleans(),
        options=st.sampled_from([{}, {"codec": "raw"}, {"codec": "zstd"}, {"serve_clean": False}, {"buffer": 4 * MIB}]),
    )
    def reopen(self, lose_index: bool, options: dict[str, Any]) -> None:
        self.rig.reopen(lose_index=lose_index, **options)
        self.model.flushed()

    @rule(
        seed=st.integers(0, 2**16),
        keep=st.sampled_from(["none", "all", "random"]),
        keep_index=st.booleans(),
        lose_index=st.booleans(),
    )
    def crash(self, seed: int, keep: Any, keep_index: bool, lose_index: bool) -> None:
        self.rig.crash(seed, keep=keep, keep_index=keep_index, lose_index=lose_index)
        self.model.crashed()
        for ident in self.model.idents():
            sizes = {value.size for value in self.model.blocks[ident].candidates if value is not None}
            info = self.space(ident[0]).info([ident[1]])[0]
            size = SIZES[-1] if info is None else info.raw_bytes
            assert info is None or size in sizes, f"{ident}: {size} bytes, possible {sizes}"
            self.model.learn(ident, self.read(ident, size))


def test_a_store_answers_like_the_model() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        StoreMachine,
        settings=settings(max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)),
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_store_answers_like_the_model_in_long_histories() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        StoreMachine,
        settings=settings(max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)),
    )
