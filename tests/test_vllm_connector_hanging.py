"""The vLLM connector on an index that hangs: no step waits for it, and nothing is found that was given up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from adapter_conformance import PREFIX, WAIT_S
from kvlode.adapters.vllm_connector_saves import Save, Saver
from kvlode.adapters.vllm_connector_worker import StepPlan
from kvlode.engine.blocks import view_block
from kvlode.engine.contract import PutState, PutStatus, Refusal
from kvlode.engine.index_memory import MemoryIndex
from kvlode.gds.memory import MemoryDevice
from rig import eventually
from vllm_connector_rig import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    GivenBlocks,
    Request,
    StandIn,
    assert_right,
    content,
    given_up,
    make_caches,
    on_one_device,
    overwrite,
    vllm_config,
)


class HangingIndex(MemoryIndex):
    """From ``hang`` on the ``calls``-th question and those after it are not answered before ``answer``."""

    def __init__(self) -> None:
        super().__init__()
        self._calls_left: int | None = None
        self._answering = threading.Event()
        self.asked = threading.Event()

    def hang(self, calls: int = 1) -> None:
        self._calls_left = calls

    def answer(self) -> None:
        self._answering.set()

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if self._calls_left is not None and threading.current_thread().name == "kvlode-vllm-saves":
            self._calls_left -= 1
        if self._calls_left is not None and self._calls_left <= 0:
            self.asked.set()
            assert self._answering.wait(WAIT_S)
        return super().get_many(keys)


class Hanging:
    """An engine on an index that can hang. No call of the model's thread may take longer than ``CALL_S``."""

    CALL_S = 1.0
    TIMEOUT_S = 0.2

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.index = HangingIndex()
        worker = "kvlode.adapters.vllm_connector_worker."
        monkeypatch.setattr(worker + "PREEMPTION_TIMEOUT_S", self.TIMEOUT_S)
        monkeypatch.setattr(worker + "DRAIN_TIMEOUT_S", self.TIMEOUT_S)
        monkeypatch.setattr(worker + "CLOSE_TIMEOUT_S", self.TIMEOUT_S)
        monkeypatch.setattr("kvlode.adapters.vllm_connector_saves.STOP_S", self.TIMEOUT_S)
        place = on_one_device(monkeypatch, MemoryDevice(), self.index)
        self.engine = StandIn(vllm_config(place | {"store_timeout_s": self.TIMEOUT_S} | options), make_caches())
        for name in ("handle_preemptions", "start_load_kv", "wait_for_save", "get_finished", "get_block_ids_with_load_errors"):
            monkeypatch.setattr(self.engine.worker, name, self._in_time(getattr(self.engine.worker, name)))

    def _in_time(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            started_s = time.monotonic()
            answer = call(*args)
            assert time.monotonic() - started_s < self.CALL_S
            return answer

        return timed

    def begin(self, prefix: Sequence[int] = PREFIX) -> Request:
        """A request that has computed its blocks, in a step that gave their stores out."""
        request = Request(prefix)
        self.engine.scheduler._scheduler._track(request)
        self.engine.step(request, list(range(len(prefix))), prefix)
        return request

    def stalled(self) -> bool:
        return self.engine.worker._worker._saver.stalled(self.TIMEOUT_S)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    hanging = Hanging(monkeypatch)
    yield hanging
    hanging.index.answer()
    hanging.engine.stop()


@pytest.mark.parametrize("preempted", [False, True])
def test_stores_that_the_index_holds_up_are_given_up_and_never_found(hanging: Hanging, preempted: bool) -> None:
    engine = hanging.engine
    hanging.index.hang()
    request = hanging.begin()
    assert hanging.index.asked.wait(WAIT_S)
    if preempted:
        engine.step(preempted=[request.request_id])
    else:
        engine.finish(request)
    overwrite(engine, range(8))
    assert given_up(engine) == len(PREFIX)
    hanging.index.answer()
    assert eventually(lambda: engine.worker._worker._saver.idle)
    engine.flush()
    assert_right(engine, PREFIX, count=0)


def test_blocks_that_were_copied_before_the_index_hung_are_right_whatever_comes_into_their_memory(hanging: Hanging) -> None:
    engine = hanging.engine
    hanging.index.hang(calls=2)  # asked which blocks are there it answers, and then hangs in the put
    request = hanging.begin()
    assert hanging.index.asked.wait(WAIT_S)
    engine.finish(request)
    overwrite(engine, range(8))
    assert given_up(engine) == 0
    hanging.index.answer()
    assert eventually(lambda: engine.worker._worker._saver.idle)
    assert_right(engine, PREFIX, count=len(PREFIX))


def test_where_nothing_gets_on_no_step_waits_for_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = Hanging(monkeypatch, store_timeout_s=WAIT_S)
    engine, saver = hanging.engine, hanging.engine.worker._worker._saver
    hanging.index.hang()
    request = hanging.begin()
    assert eventually(hanging.stalled)
    timeouts_s: list[float] = []
    monkeypatch.setattr(saver, "wait", lambda condition, timeout_s: timeouts_s.append(timeout_s))
    worker = engine.worker._worker
    worker.handle_preemptions(StepPlan(preempted=frozenset([request.request_id])))
    assert timeouts_s == [0.0]
    assert given_up(engine) == len(PREFIX)
    monkeypatch.undo()
    hanging.index.answer()
    engine.stop()


def test_where_nothing_gets_on_no_more_stores_are_taken_until_it_does(hanging: Hanging) -> None:
    engine = hanging.engine
    hanging.index.hang()
    hanging.begin()
    assert eventually(hanging.stalled)
    engine.step()
    assert given_up(engine) == len(PREFIX), "of a request that is still running"
    hanging.begin(range(100, 104))
    assert engine.worker.store_stats()["connector"]["refused_blocks"] == 4
    hanging.index.answer()
    assert eventually(lambda: engine.worker._worker._saver.idle)
    engine.store(PREFIX)
    assert_right(engine, PREFIX, count=len(PREFIX))


def test_a_queue_that_is_full_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlode.adapters.vllm_connector_saves.QUEUED_MAX", 1)
    hanging = Hanging(monkeypatch, store_timeout_s=WAIT_S)
    hanging.index.hang()
    hanging.begin()
    assert hanging.index.asked.wait(WAIT_S)
    queued, refused = hanging.begin(range(100, 104)), hanging.begin(range(200, 203))
    assert hanging.engine.worker.store_stats()["connector"]["refused_blocks"] == 3
    hanging.engine.finish(refused)
    hanging.index.answer()
    hanging.engine.finish(queued)
    hanging.engine.stop()


def test_a_reset_while_the_index_hangs_forgets_what_was_stored_and_what_was_on_its_way(hanging: Hanging) -> None:
    engine = hanging.engine
    engine.store(PREFIX[:4])
    hanging.index.hang(calls=2)
    hanging.begin()
    assert hanging.index.asked.wait(WAIT_S)
    old = engine.worker._worker.space
    assert engine.scheduler.reset_cache() is True
    engine.step()
    assert all(found is None for found in engine.load(PREFIX)), "the new namespace is not there yet"
    hanging.index.answer()
    assert eventually(lambda: engine.worker._worker.space is not None)
    assert old is not None and not any(old.contains([block.to_bytes(32, "little") for block in PREFIX]))
    engine.store(PREFIX)
    assert_right(engine, PREFIX, count=len(PREFIX))


def test_a_load_that_the_index_holds_up_is_computed_and_leaves_its_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = Hanging(monkeypatch, load_timeout_s=1.0)
    engine = hanging.engine
    engine.store(PREFIX)
    engine.flush()
    request = Request(PREFIX)
    assert engine.matched(request) == len(PREFIX) * BLOCK_TOKENS
    hanging.index.hang(calls=0)
    engine.scheduler.update_state_after_alloc(request, GivenBlocks(list(range(8))), len(PREFIX) * BLOCK_TOKENS)
    engine.step()
    assert hanging.index.asked.wait(WAIT_S)
    engine.until(lambda: request.request_id in engine.received)
    assert engine.failed == set(range(8))
    engine.finish(request)
    overwrite(engine, range(8))
    before = [engine.read(block_id).copy() for block_id in range(8)]
    hanging.index.answer()
    engine.stop()
    assert all(np.array_equal(engine.read(block_id), kept) for block_id, kept in enumerate(before))


def test_a_shutdown_while_the_index_hangs_ends_in_time_and_nothing_is_stored_after_it(hanging: Hanging) -> None:
    engine = hanging.engine
    hanging.index.hang()
    hanging.begin()
    hanging.begin(range(100, 104))
    assert hanging.index.asked.wait(WAIT_S)
    saver, space = engine.worker._worker._saver, engine.scheduler._scheduler._spaces[0]
    started_s = time.monotonic()
    engine.worker.shutdown()
    assert time.monotonic() - started_s < 10 * hanging.TIMEOUT_S
    assert sum(saver.counts().values()) == len(PREFIX) + 4, "the second is refused where the machine is slow"
    overwrite(engine, range(8))
    hanging.index.answer()
    assert eventually(lambda: not saver._thread.is_alive())
    assert not any(space.contains([block.to_bytes(32, "little") for block in (*PREFIX, *range(100, 104))]))


class RefusingSpace:
    """Refuses every put."""

    def __init__(self, reason: Refusal) -> None:
        self.statuses = [PutStatus(PutState.REFUSED, reason)]
        self.lent: list[np.ndarray] = []

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [False] * len(keys)

    def submit_put(self, keys: Sequence[bytes], blocks: Sequence[np.ndarray], *, queue: Any, **options: Any) -> Any:
        self.lent += blocks
        queue.push(self)
        return self


@pytest.mark.parametrize(("reason", "puts"), [(Refusal.STORE_FAILED, 3), (Refusal.READ_ONLY, 1)])
def test_a_reader_of_a_store_puts_no_more(reason: Refusal, puts: int) -> None:
    space: Any = RefusingSpace(reason)
    saver = Saver(space, block_bytes=BLOCK_BYTES, memory_bytes=BLOCK_BYTES, device=torch.device("cpu"))
    for block in range(3):
        assert saver.submit(Save("request", [b"%d" % block], [[content(block)]]), WAIT_S)
    assert saver.wait(lambda: saver.idle, WAIT_S)
    assert len(space.lent) == puts
    assert saver.close(WAIT_S)


def test_what_is_withdrawn_while_it_is_copied_is_not_put(monkeypatch: pytest.MonkeyPatch) -> None:
    space: Any = RefusingSpace(Refusal.BUFFER_FULL)
    saver = Saver(space, block_bytes=BLOCK_BYTES, memory_bytes=BLOCK_BYTES, device=torch.device("cpu"))
    save = Save("request", [b"key"], [[content(0)]])
    lost: list[int] = []

    def view(*arguments: Any, **options: Any) -> Any:
        lost.append(saver.withdraw([save]))
        return view_block(*arguments, **options)

    monkeypatch.setattr("kvlode.adapters.vllm_connector_saves.view_block", view)
    assert saver.submit(save, WAIT_S)
    assert saver.wait(lambda: saver.idle, WAIT_S)
    assert (lost, space.lent) == ([1], [])
    assert saver.close(WAIT_S)
