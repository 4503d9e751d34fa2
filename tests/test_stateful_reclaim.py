"""Random histories of a store that is too small: reclaim runs all the time, beside everything else that a host can do.

What the store gives up is a miss and nothing else: no wrong byte, no deleted block back, no pinned block lost, no byte
over the capacity.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvlode import BlockSpace, GetJob, PutJob, PutState, Refusal, Status
from kvlode.engine.testing import ManualClock
from model import Ident, Model, Value, block_bytes, descriptor
from rig import KIB, MIB, Rig, put_blocks, read

SPACES = ("one", "two")
KEYS = [b"k%d" % i for i in range(6)]
SIZES = (1, 500, 4096, 30_000, 60_001)
FILLER_BYTES = 60_000
WAIT_S = 30.0
CANARY = 0xA5
ABSENT = (Status.MISS, Status.EXPIRED)
LOST = (Refusal.NO_SPACE, Refusal.BUFFER_FULL, Refusal.DELETED)
"""Why a healthy store may not keep a block."""

CHANGED_OPTIONS: list[dict[str, Any]] = [
    {},
    {"codec": "raw"},
    {"serve_clean": False},
    {"serve_clean": True},
    {"reinsert_hits_min": 0},
    {"reinsert_hits_min": 1},
    {"segment_bytes": 192 * KIB},
    {"segment_bytes": 128 * KIB},
    {"batch_bytes": 64 * KIB},
    {"buffer": 2 * MIB},
]

spaces = st.sampled_from(SPACES)
keys = st.sampled_from(KEYS)
key_lists = st.lists(keys, min_size=1, max_size=4, unique=True)
ttls = st.sampled_from([None, None, None, 5.0, 60.0])


@dataclass
class Reading:
    """A read in the background: what it reads, where to, and where in each block's history it began."""

    job: GetJob
    idents: list[Ident]
    outs: list[np.ndarray]
    since: list[int]


@dataclass
class Writing:
    """A put in the background, and the caller's memory that it may borrow."""

    job: PutJob
    memory: list[np.ndarray]


class ReclaimMachine(RuleBasedStateMachine):
    """See the module. Blocks of the namespace ``filler`` push the others out."""

    options: ClassVar[dict[str, Any]] = {"capacity": 3 * MIB, "buffer": MIB, "segment_bytes": 128 * KIB, "batch_bytes": 256 * KIB}

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.model = Model(self.clock, lossy=True)
        self.rig = Rig(self.clock, **self.options)
        self.pins: dict[Ident, AbstractContextManager[int]] = {}
        self.reading: list[Reading] = []
        self.writing: list[Writing] = []
        self.cancelled: list[np.ndarray] = []
        self.fillers = 0

    def space(self, name: str) -> BlockSpace:
        return self.rig.store.namespace(descriptor(name, block_bytes_max=64 * KIB))

    def teardown(self) -> None:
        self.finish_jobs()
        self.rig.close()

    @invariant()
    def the_capacity_holds(self) -> None:
        self.rig.assert_within_capacity()

    # --- changes --------------------------------------------------------------------------------------------------

    def value(self, size: int, ttl: float | None) -> Value:
        return Value(self.model.next_version(), size, None if ttl is None else self.clock.now_ns() + int(ttl * 1e9))

    def note_put(self, ident: Ident, value: Value, status: Any) -> None:
        self.model.put(ident, value, status)
        if status.state in (PutState.ACCEPTED, PutState.DURABLE):
            self.unpin(ident)  # what was pinned had expired or was gone: the new block is not durable yet

    @rule(name=spaces, key=keys, size=st.sampled_from(SIZES), ttl=ttls)
    def put(self, name: str, key: bytes, size: int, ttl: float | None) -> None:
        value = self.value(size, ttl)
        self.note_put((name, key), value, self.space(name).put(key, value.bytes_of(key), ttl=ttl))

    @rule(name=spaces, chosen=key_lists, size=st.sampled_from(SIZES), ttl=ttls, own=st.sampled_from(["copy", "borrow"]))
    def submit_put(self, name: str, chosen: list[bytes], size: int, ttl: float | None, own: Any) -> None:
        values = [self.value(size, ttl) for _ in chosen]
        memory = [value.bytes_of(key) for key, value in zip(chosen, values, strict=True)]
        job = self.space(name).submit_put(chosen, memory, ttl=ttl, own=own)
        for key, value, status in zip(chosen, values, job.statuses, strict=True):
            self.note_put((name, key), value, status)
        self.writing.append(Writing(job, memory))

    @rule()
    def poll_puts(self) -> None:
        for writing in [w for w in self.writing if w.job.done()]:
            self.writing.remove(writing)
            self.check_put(writing)

    def check_put(self, writing: Writing) -> None:
        """The memory is the caller's again: what it does with it must not reach the store."""
        for status in writing.job.statuses:
            assert status or status.reason in LOST, status
        for area in writing.memory:
            area[:] = CANARY

    @rule(name=spaces, chosen=key_lists)
    def delete(self, name: str, chosen: list[bytes]) -> None:
        present = self.space(name).contains(chosen)
        assert self.space(name).delete(chosen) <= sum(present)
        for key, was_present in zip(chosen, present, strict=True):
            self.unpin((name, key))
            self.model.delete((name, key), was_present)

    @rule(name=spaces)
    def drop(self, name: str) -> None:
        for ident in [ident for ident in self.pins if ident[0] == name]:
            self.unpin(ident)
        self.space(name).drop()
        self.model.drop(name)

    @rule(count=st.sampled_from([1, 4, 16]))
    def fill(self, count: int) -> None:
        """New blocks that push old ones out: at 16 a third of the store."""
        put_blocks(self.space("filler"), self.fillers, self.fillers + count, FILLER_BYTES)
        self.fillers += count

    @rule(seconds=st.sampled_from([1.0, 6.0, 70.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def flush(self) -> None:
        self.flush_well()

    def flush_well(self) -> bool:
        flushed = self.rig.store.flush(WAIT_S)
        if flushed:
            self.model.flushed()
        return flushed

    # --- keeping --------------------------------------------------------------------------------------------------

    @rule(name=spaces, key=keys)
    def pin(self, name: str, key: bytes) -> None:
        ident = (name, key)
        if ident in self.pins or not self.flush_well():
            return
        lease = self.space(name).pin([key])
        held = lease.__enter__()
        self.model.check_present(ident, held == 1)
        if held:
            self.pins[ident] = lease
        else:
            lease.__exit__(None, None, None)

    def unpin(self, ident: Ident) -> None:
        lease = self.pins.pop(ident, None)
        if lease is not None:
            lease.__exit__(None, None, None)

    @rule(number=st.integers(0, 11))
    def release_a_pin(self, number: int) -> None:
        for ident in sorted(self.pins)[number : number + 1]:
            self.unpin(ident)

    @rule(name=spaces, chosen=key_lists)
    def touch(self, name: str, chosen: list[bytes]) -> None:
        self.space(name).touch(chosen)

    # --- questions ------------------------------------------------------------------------------------------------

    def look(self, ident: Ident) -> None:
        value = self.model.value(ident)
        status, out = read(self.space(ident[0]), ident[1], SIZES[-1] if value is None else value.size)
        self.model.check_read(ident, status, out)
        if ident in self.pins and value is not None:
            assert status is Status.HIT, f"{ident} is pinned, the store says {status.name}"

    @rule(name=spaces, key=keys)
    def get(self, name: str, key: bytes) -> None:
        self.look((name, key))

    @rule()
    def get_what_is_pinned(self) -> None:
        for ident in sorted(self.pins):
            self.look(ident)

    @rule(back=st.integers(1, 60))
    def get_a_filler(self, back: int) -> None:
        number = self.fillers - back
        if number < 0:
            return
        key = b"filler %d" % number
        status, out = read(self.space("filler"), key, FILLER_BYTES)
        assert status in (Status.HIT, Status.MISS)
        if status is Status.HIT:
            assert np.array_equal(out, block_bytes(key, 4 * number, FILLER_BYTES)), f"{key!r}: wrong bytes"

    @rule(name=spaces)
    def match_prefix(self, name: str) -> None:
        self.model.check_prefix([(name, key) for key in KEYS], self.space(name).match_prefix(KEYS))

    @rule(name=spaces, chosen=key_lists)
    def submit_get(self, name: str, chosen: list[bytes]) -> None:
        idents = [(name, key) for key in chosen]
        values = [self.model.value(ident) for ident in idents]
        outs = [np.full(SIZES[-1] if value is None else value.size, CANARY, np.uint8) for value in values]
        since = [len(self.model.blocks[ident].history) - 1 for ident in idents]
        self.reading.append(Reading(self.space(name).submit_get(chosen, outs), idents, outs, since))

    @rule()
    def poll_gets(self) -> None:
        for reading in [r for r in self.reading if r.job.done()]:
            self.reading.remove(reading)
            self.check_reading(reading)

    def check_reading(self, reading: Reading) -> None:
        """Each hit is one of the values that the block has had since the read began."""
        for ident, out, since, status in zip(reading.idents, reading.outs, reading.since, reading.job.statuses, strict=True):
            values = [value for value in self.model.blocks[ident].history[since:] if value is not None]
            if status is Status.HIT:
                assert any(v.size == out.nbytes and np.array_equal(v.bytes_of(ident[1]), out) for v in values), f"{ident}: wrong bytes"
            elif status is Status.WRONG_SIZE:
                assert any(value.size != out.nbytes for value in values)
            else:
                assert status in (*ABSENT, Status.CANCELLED), f"{ident}: {status.name}"

    @rule()
    def cancel_a_get(self) -> None:
        if not self.reading:
            return
        reading = self.reading.pop()
        reading.job.cancel()
        assert reading.job.done()
        self.check_reading(reading)
        for out in reading.outs:
            out[:] = CANARY
        self.cancelled += reading.outs

    @invariant()
    def memory_of_cancelled_reads_is_left_alone(self) -> None:
        assert all((out == CANARY).all() for out in self.cancelled)

    # --- ends and beginnings --------------------------------------------------------------------------------------

    def finish_jobs(self) -> None:
        """Jobs do not outlive their store."""
        for reading in self.reading:
            assert reading.job.wait(WAIT_S)
            self.check_reading(reading)
        for writing in self.writing:
            assert writing.job.wait(WAIT_S)
            self.check_put(writing)
        self.reading, self.writing = [], []

    def look_around(self) -> None:
        """Read every block again; its value must be one that the model has left possible."""
        self.pins.clear()
        for ident in self.model.idents():
            info = self.space(ident[0]).info([ident[1]])[0]
            status, out = read(self.space(ident[0]), ident[1], SIZES[-1] if info is None else info.raw_bytes)
            assert status is Status.HIT or status in ABSENT, f"{ident}: {status.name}"
            self.model.learn(ident, out if status is Status.HIT else None)

    @rule(
        lose_index=st.booleans(),
        options=st.sampled_from(CHANGED_OPTIONS),
    )
    def reopen(self, lose_index: bool, options: dict[str, Any]) -> None:
        self.finish_jobs()
        self.flush()
        self.rig.reopen(lose_index=lose_index, **options)
        self.model.index_lost()
        self.look_around()

    @rule(
        seed=st.integers(0, 2**16),
        keep=st.sampled_from(["none", "all", "random"]),
        keep_index=st.booleans(),
        lose_index=st.booleans(),
    )
    def crash(self, seed: int, keep: Any, keep_index: bool, lose_index: bool) -> None:
        for reading in self.reading:
            reading.job.cancel()
        self.reading, self.writing = [], []
        self.rig.crash(seed, keep=keep, keep_index=keep_index, lose_index=lose_index)
        self.model.crashed()
        self.look_around()


def run_machine(examples: int, steps: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        ReclaimMachine,
        settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)),
    )


def test_a_store_that_is_too_small_answers_like_the_model() -> None:
    run_machine(examples=25, steps=40)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_store_that_is_too_small_answers_like_the_model_in_long_histories() -> None:
    run_machine(examples=200, steps=80)
