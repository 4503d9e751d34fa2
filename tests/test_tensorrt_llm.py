"""The TensorRT-LLM connector against stand-ins of its base classes, driven step by step as its executor does it.

The stand-ins say what ``kv_cache_connector.py`` and ``kv_cache_layout.py`` (commits 035ab91c and 0972960b) say: names, signatures, order
of calls. The real ones cannot be imported without a GPU.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import pickle
import sys
import threading
import time
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapter_conformance import PREFIX, WAIT_S, AdapterConformance
from kvlode import InvalidConfig, prefix_keys
from kvlode.adapters import tensorrt_llm as adapter
from kvlode.adapters.tensorrt_llm import ConnectorMetadata, SchedulerSide, WorkerSide
from kvlode.adapters.tensorrt_llm_connection import OPTIONS_VARIABLE
from kvlode.gds.late import LateDevice
from kvlode.gds.memory import MemoryDevice
from kvlode.tools.damage import damage_payloads
from model import block_bytes
from rig import eventually

BLOCK_TOKENS = 16
LAYERS = 2
CONTENT_BYTES = 128 << 10
POOL_BLOCKS = 64
GARBAGE = 0x5A

# --- stand-ins of the engine ----------------------------------------------------------------------------------------------------


class BaseScheduler(ABC):
    def __init__(self, llm_args: Any) -> None:
        self._llm_args = llm_args
        super().__init__()

    @abstractmethod
    def build_connector_meta(self, scheduler_output: Any) -> object: ...

    @abstractmethod
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]: ...

    @abstractmethod
    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool: ...

    @abstractmethod
    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None: ...


class BaseWorker(ABC):
    def __init__(self, llm_args: Any) -> None:
        self._llm_args = llm_args
        self._metadata: object = None
        super().__init__()

    def bind_connector_meta(self, metadata: object) -> None:
        self._metadata = metadata

    def get_connector_meta(self) -> object:
        return self._metadata

    @abstractmethod
    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None: ...

    @abstractmethod
    def start_load_kv(self, stream: Any) -> None: ...

    @abstractmethod
    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None: ...

    @abstractmethod
    def save_kv_layer(self, layer_idx: int, stream: Any) -> None: ...

    @abstractmethod
    def wait_for_save(self, stream: Any) -> None: ...

    @abstractmethod
    def get_finished(self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]) -> tuple[list[int], list[int]]: ...


@dataclass
class RequestData:
    request_id: int
    new_tokens: list[int]
    new_block_ids: list[int]
    computed_position: int
    num_scheduled_tokens: int
    block_hashes: list[int] = field(default_factory=list)
    priorities: list[int] | None = None
    cache_salt: str | None = None


@dataclass
class SchedulerOutput:
    new_requests: list[RequestData] = field(default_factory=list)
    cached_requests: list[RequestData] = field(default_factory=list)


@dataclass
class Request:
    request_id: int
    tokens: list[int]
    cache_salt: str | None = None
    lora_task_id: int | None = None

    def get_tokens(self, beam: int) -> list[int]:
        return list(self.tokens)


def engine_arguments(**changes: Any) -> Any:
    values = {"model": "model", "tensor_parallel_size": 1, "pipeline_parallel_size": 1, "quant_config": None}
    cache = types.SimpleNamespace(tokens_per_block=BLOCK_TOKENS, dtype="auto")
    return types.SimpleNamespace(**(values | {"kv_cache_config": cache} | changes))


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engine's module, in place of the real one; the adapter binds its classes anew."""
    module = types.ModuleType(adapter.INTERFACES[0])
    module.KvCacheConnectorScheduler = BaseScheduler  # type: ignore[attr-defined]
    module.KvCacheConnectorWorker = BaseWorker  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, adapter.INTERFACES[0], module)
    names = ("KvlodeConnectorScheduler", "KvlodeConnectorWorker")
    for name in names:
        vars(adapter).pop(name, None)
    yield
    for name in names:
        vars(adapter).pop(name, None)


class TensorEngine:
    """One engine: a pool of blocks, and the executor's order of calls. A step computes whatever was not loaded."""

    def __init__(self, options: dict[str, Any], arguments: Any, dtype: torch.dtype = torch.bfloat16) -> None:
        os.environ[OPTIONS_VARIABLE] = json.dumps({"revision": "1", "staging": "16MiB", "saving": "64MiB"} | options)
        try:
            self.worker: Any = adapter.KvlodeConnectorWorker(arguments)
            self.scheduler: Any = adapter.KvlodeConnectorScheduler(arguments)
        finally:
            del os.environ[OPTIONS_VARIABLE]
        self.pool = torch.zeros((POOL_BLOCKS, LAYERS, 2, CONTENT_BYTES // dtype.itemsize // LAYERS // 2), dtype=dtype)
        self.worker.register_kv_caches(self.pool)
        self.bytes = self.pool.view(POOL_BLOCKS, -1).view(torch.uint8).numpy()
        self.connection = self.scheduler.connection
        self._ids = itertools.count()
        self._free = list(range(POOL_BLOCKS))

    def request(self, tokens: Sequence[int], **names: Any) -> Request:
        return Request(next(self._ids), list(tokens), **names)

    def matched(self, request: Request, computed_tokens: int = 0) -> int:
        started_s = time.monotonic()
        count, is_async = self.scheduler.get_num_new_matched_tokens(request, computed_tokens)
        assert not is_async
        assert time.monotonic() - started_s < WAIT_S
        return int(count)

    def allocate(self, request: Request) -> list[int]:
        count = -(-len(request.tokens) // BLOCK_TOKENS)
        block_ids, self._free = self._free[:count], self._free[count:]
        self.scheduler.update_state_after_alloc(request, block_ids)
        return block_ids

    def step(self, output: SchedulerOutput, compute: Callable[[], None] | None) -> ConnectorMetadata:
        """One iteration of the executor; without ``compute`` its forward pass fails."""
        metadata = pickle.loads(pickle.dumps(self.scheduler.build_connector_meta(output)))  # it is broadcast
        loads = list(metadata.loads)
        self.worker.bind_connector_meta(metadata)
        self.worker.start_load_kv(None)
        for layer in range(LAYERS):
            self.worker.wait_for_layer_load(layer, None)
            self.worker.save_kv_layer(layer, None)
        saves = list(metadata.saves)
        if compute is not None:
            compute()
            self.worker.wait_for_save(None)
        return ConnectorMetadata(loads, saves)

    def prefill(self, request: Request, blocks: Sequence[int] | None, computed_tokens: int = 0) -> tuple[int, list[int], ConnectorMetadata]:
        """Run a prompt through one step: how many tokens came from the connector, where its blocks are, what was done."""
        matched = self.matched(request, computed_tokens)
        block_ids = self.allocate(request)
        data = RequestData(request.request_id, request.get_tokens(0), list(block_ids), computed_tokens, len(request.tokens))
        data.num_scheduled_tokens -= computed_tokens + matched

        def compute() -> None:
            first = (computed_tokens + matched) // BLOCK_TOKENS
            for block, block_id in list(zip(blocks or (), block_ids, strict=False))[first:]:
                self.bytes[block_id] = content(block)

        # The engine leaves out what the connector matched; it comes back with the next step.
        done = self.step(SchedulerOutput(new_requests=[data]), compute if blocks is not None else None)
        return matched, block_ids, done

    def decode(self, request: Request, block_ids: list[int], token: int) -> ConnectorMetadata:
        """One more token, which the step after this one computes."""
        request.tokens.append(token)
        data = RequestData(request.request_id, [token], [], len(request.tokens) - 1, 1)
        return self.step(SchedulerOutput(cached_requests=[data]), lambda: None)

    def finish(self, request: Request, block_ids: Sequence[int]) -> None:
        """End a request; its blocks are overwritten as soon as the connector lets them go."""
        if self.scheduler.request_finished(request, list(block_ids)):
            saved, _ = self.worker.get_finished([request.request_id], [])
            deadline_s = time.monotonic() + WAIT_S
            while request.request_id not in saved:
                assert time.monotonic() < deadline_s, "a request does not end"
                saved, _ = self.worker.get_finished([], [])
        for block_id in block_ids:
            self.bytes[block_id] = GARBAGE
        self._free += block_ids

    # --- as the conformance suite drives it -----------------------------------------------------------------------------

    def store(self, prefix: Sequence[int]) -> None:
        request = self.request(tokens_of(prefix))
        _, block_ids, _ = self.prefill(request, prefix)
        self.decode(request, block_ids, 1)
        self.finish(request, block_ids)
        if len(self.connection.saver._free) < 32:
            self.connection.saver._transfers.drain(WAIT_S)  # the suite stores faster than any engine computes

    def flush(self) -> None:
        self.connection.attached.flush(WAIT_S)

    def lookup(self, prefix: Sequence[int]) -> int:
        request = self.request(tokens_of(prefix))
        count = self.matched(request)
        self.finish(request, [])
        return count // BLOCK_TOKENS

    def load(self, prefix: Sequence[int]) -> list[np.ndarray | None]:
        request = self.request(tokens_of(prefix))
        matched, block_ids, _ = self.prefill(request, None)
        found = [self.bytes[block_id].copy() if at < matched // BLOCK_TOKENS else None for at, block_id in enumerate(block_ids)]
        self.finish(request, block_ids)
        return found[: len(prefix)]

    def stop(self) -> None:
        self.connection.close(WAIT_S)


def tokens_of(prefix: Sequence[int]) -> list[int]:
    """A block's tokens are its number; one more follows, since a prompt is never restored whole."""
    return [*np.repeat(np.asarray(prefix, dtype=np.int64), BLOCK_TOKENS).tolist(), 1]


def content(block: int) -> np.ndarray:
    return block_bytes(b"%d" % block, block, CONTENT_BYTES)


class TestConformance(AdapterConformance):
    def start(
        self, options: dict[str, Any], *, model: str = "model", dtype: str = "bfloat16", rank: int = 0, world: int = 1
    ) -> TensorEngine:
        if world > 1:
            with pytest.raises(InvalidConfig, match="several GPUs"):
                TensorEngine(options, engine_arguments(tensor_parallel_size=world))
            pytest.skip("an engine of several ranks is refused at its start")
        waits = {"stage_wait_s": 2 * WAIT_S, "load_timeout_s": 2.0}
        return TensorEngine(options | waits, engine_arguments(model=model), getattr(torch, dtype))

    def content(self, block: int) -> np.ndarray:
        return content(block)


@pytest.fixture
def options(options: dict[str, Any]) -> dict[str, Any]:
    return options | {"stage_wait_s": WAIT_S}


@pytest.fixture
def engine(options: dict[str, Any]) -> Iterator[TensorEngine]:
    made = TensorEngine(options, engine_arguments())
    yield made
    made.stop()


# --- promises -------------------------------------------------------------------------------------------------------------------


def test_a_query_never_waits_unless_it_is_told_to(options: dict[str, Any]) -> None:
    engine = TensorEngine(options | {"stage_wait_s": 0.0}, engine_arguments())
    engine.store(PREFIX)
    engine.flush()
    assert engine.lookup(PREFIX) == 0, "it cannot be in memory yet"
    assert eventually(lambda: engine.lookup(PREFIX) == len(PREFIX))
    engine.stop()


def test_what_was_promised_is_loaded_even_if_the_store_is_gone_by_then(engine: TensorEngine, options: dict[str, Any]) -> None:
    engine.store(PREFIX)
    engine.flush()
    request = engine.request(tokens_of(PREFIX))
    assert engine.matched(request) == len(PREFIX) * BLOCK_TOKENS
    engine.connection.space.drop()
    assert damage_payloads(Path(options["path"]))
    for other in range(20, 40):  # other prefixes want the memory meanwhile
        engine.store([other])
        engine.lookup([other])
    block_ids = engine.allocate(request)
    data = RequestData(request.request_id, request.get_tokens(0), block_ids, 0, 1)
    engine.step(SchedulerOutput(new_requests=[data]), lambda: None)
    for block, block_id in zip(PREFIX, block_ids, strict=False):
        assert np.array_equal(engine.bytes[block_id], content(block))
    engine.finish(request, block_ids)


def test_a_prompt_is_never_promised_whole(engine: TensorEngine) -> None:
    engine.store(PREFIX)
    engine.flush()
    whole = tokens_of(PREFIX)[:-1]
    assert engine.matched(engine.request(whole)) == (len(PREFIX) - 1) * BLOCK_TOKENS
    assert engine.matched(engine.request(whole[:BLOCK_TOKENS])) == 0
    assert engine.matched(engine.request([])) == 0


def test_the_engines_own_blocks_are_not_loaded_again(engine: TensorEngine) -> None:
    engine.store(PREFIX)
    engine.flush()
    request = engine.request(tokens_of(PREFIX))
    matched, block_ids, done = engine.prefill(request, PREFIX, computed_tokens=3 * BLOCK_TOKENS)
    assert matched == 5 * BLOCK_TOKENS
    assert [block_id for _, block_id in done.loads] == block_ids[3:8]
    assert engine.matched(engine.request(tokens_of(PREFIX)), computed_tokens=3 * BLOCK_TOKENS + 1) == 0, "half a block"
    engine.finish(request, block_ids)


def test_rows_that_are_promised_are_not_reused(options: dict[str, Any]) -> None:
    engine = TensorEngine(options | {"staging": CONTENT_BYTES * 4}, engine_arguments())
    engine.store(PREFIX)
    engine.flush()
    first, second = engine.request(tokens_of(PREFIX)), engine.request(tokens_of(PREFIX[:2]))
    assert engine.matched(first) == 4 * BLOCK_TOKENS, "as much as there is memory for"
    engine.store([50])
    assert engine.lookup([50]) == 0, "every row is promised"
    assert engine.matched(second) == 2 * BLOCK_TOKENS, "the same rows, twice"
    engine.finish(first, [])
    assert engine.lookup([50]) == 1
    engine.finish(second, [])
    assert engine.lookup(PREFIX) == 4
    engine.stop()


def test_a_promise_is_used_once_and_an_old_step_is_not_repeated(engine: TensorEngine) -> None:
    engine.store(PREFIX)
    engine.flush()
    request = engine.request(tokens_of(PREFIX))
    _, block_ids, done = engine.prefill(request, PREFIX)
    assert len(done.loads) == len(PREFIX) and not done.saves
    for block_id in block_ids:
        engine.bytes[block_id] = GARBAGE
    engine.worker.start_load_kv(None)  # the engine had nothing to schedule and left the metadata bound
    engine.worker.wait_for_save(None)
    assert all((engine.bytes[block_id] == GARBAGE).all() for block_id in block_ids)
    assert not engine.decode(request, block_ids, 1).loads
    engine.finish(request, block_ids)


# --- saves ----------------------------------------------------------------------------------------------------------------------


def test_blocks_are_saved_when_they_are_complete(engine: TensorEngine) -> None:
    request = engine.request(tokens_of(PREFIX[:2])[:-1])
    _, block_ids, done = engine.prefill(request, PREFIX)
    assert [save.block_ids for save in done.saves] == [block_ids[:2]]
    engine._free = engine._free[1:]
    block_ids.append(engine._free.pop(0))
    request.tokens.append(2)
    data = RequestData(request.request_id, [2], [block_ids[2]], len(request.tokens) - 1, 1)
    assert not engine.step(SchedulerOutput(cached_requests=[data]), lambda: None).saves
    engine.bytes[block_ids[2]] = content(2)
    steps = [engine.decode(request, block_ids, 2) for _ in range(BLOCK_TOKENS - 1)]
    assert [bool(step.saves) for step in steps] == [False] * (BLOCK_TOKENS - 2) + [True]
    keys = prefix_keys(request.tokens, BLOCK_TOKENS)
    assert steps[-1].saves[0].keys == keys[2:] and steps[-1].saves[0].parent == keys[1]
    engine.finish(request, block_ids)
    engine.flush()
    assert engine.lookup(PREFIX[:3]) == 3


def test_a_prompt_in_chunks_is_saved_as_it_goes(engine: TensorEngine) -> None:
    request = engine.request(tokens_of(PREFIX[:4]))
    assert engine.matched(request) == 0
    block_ids = engine.allocate(request)
    for block, block_id in zip(PREFIX, block_ids, strict=False):
        engine.bytes[block_id] = content(block)
    first = RequestData(request.request_id, request.get_tokens(0), block_ids, 0, BLOCK_TOKENS + 3)
    done = engine.step(SchedulerOutput(new_requests=[first]), lambda: None)
    assert [save.block_ids for save in done.saves] == [block_ids[:1]], "only what this step computes"
    rest = RequestData(request.request_id, [], [], BLOCK_TOKENS + 3, 3 * BLOCK_TOKENS - 2)
    done = engine.step(SchedulerOutput(cached_requests=[rest]), lambda: None)
    assert [save.block_ids for save in done.saves] == [block_ids[1:4]]
    engine.finish(request, block_ids)


def test_a_request_that_lost_its_blocks_begins_anew(engine: TensorEngine) -> None:
    request = engine.request(tokens_of(PREFIX))
    _, block_ids, _ = engine.prefill(request, PREFIX)
    for block_id in block_ids:
        engine.bytes[block_id] = GARBAGE
    _, moved, _ = engine.prefill(request, PREFIX)
    assert not set(moved) & set(block_ids)
    for block, block_id in zip(PREFIX, moved, strict=False):
        assert np.array_equal(engine.bytes[block_id], content(block))
    engine.finish(request, moved)


def test_a_drive_that_hangs_costs_saves_and_no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    suite, late = TestConformance(), LateDevice(MemoryDevice(), holding=())
    engine = TensorEngine(suite.on_device(monkeypatch, late) | {"saving": 10 * CONTENT_BYTES, "stage_wait_s": 0.0}, engine_arguments())
    late.hold("write")
    try:
        for start in (0, 8, 16):
            prefix = range(start, start + 8)
            request = engine.request(tokens_of(prefix))
            _, block_ids, _ = engine.prefill(request, prefix)
            engine.finish(request, block_ids)
        assert engine.connection.saver.skipped_blocks == 3 * 8 - 10
    finally:
        late.hold()
        late.release()
    engine.flush()
    engine.stop()


# --- which requests -------------------------------------------------------------------------------------------------------------


def test_salts_and_adapters_are_kept_apart(engine: TensorEngine) -> None:
    request = engine.request(tokens_of(PREFIX), cache_salt="tenant")
    _, block_ids, done = engine.prefill(request, PREFIX)
    assert done.saves
    engine.finish(request, block_ids)
    engine.flush()
    assert engine.lookup(PREFIX) == 0
    assert engine.matched(engine.request(tokens_of(PREFIX), cache_salt="other")) == 0
    assert engine.matched(engine.request(tokens_of(PREFIX), cache_salt="tenant")) == len(PREFIX) * BLOCK_TOKENS
    adapted = engine.request(tokens_of(PREFIX), cache_salt="tenant", lora_task_id=1)
    matched, block_ids, done = engine.prefill(adapted, PREFIX)
    assert matched == 0 and not done.saves
    engine.finish(adapted, block_ids)


def test_requests_that_were_never_asked_about_are_left_alone(engine: TensorEngine) -> None:
    data = RequestData(99, tokens_of(PREFIX), list(range(9)), 0, 129)
    done = engine.step(SchedulerOutput(new_requests=[data], cached_requests=[RequestData(98, [1], [], 5, 1)]), lambda: None)
    assert not done.loads and not done.saves
    assert not engine.scheduler.request_finished(Request(99, []), [])
    assert engine.worker.get_finished([97], [96]) == ([97], [96])


def test_a_defect_is_no_exception_in_the_engine(engine: TensorEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.connection.staging, "take", lambda *_: 1 / 0)
    assert engine.lookup(PREFIX) == 0


def test_the_schedulers_calls_are_short(options: dict[str, Any]) -> None:
    engine = TensorEngine(options | {"stage_wait_s": 0.0}, engine_arguments())
    engine.store(PREFIX)
    engine.flush()
    request = engine.request(tokens_of(PREFIX))
    took_s = []
    for _ in range(50):
        started_s = time.thread_time()
        engine.scheduler.get_num_new_matched_tokens(request, 0)
        took_s.append(time.thread_time() - started_s)
    print(f"a query of {len(request.tokens)} tokens: median {sorted(took_s)[25] * 1e6:.0f} us of CPU time")
    assert sorted(took_s)[25] < 1e-3
    engine.stop()


# --- the start ------------------------------------------------------------------------------------------------------------------


def test_the_classes_are_the_engines_own(engine: TensorEngine) -> None:
    assert isinstance(engine.scheduler, (BaseScheduler, SchedulerSide)) and isinstance(engine.worker, (BaseWorker, WorkerSide))
    assert adapter.KvlodeConnectorWorker is adapter.KvlodeConnectorWorker
    assert engine.scheduler.connection is engine.worker.connection
    with pytest.raises(AttributeError):
        adapter.KvlodeConnectorLeader  # noqa: B018


def test_older_releases_have_the_interface_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, adapter.INTERFACES[1], sys.modules.pop(adapter.INTERFACES[0]))
    assert issubclass(adapter.KvlodeConnectorScheduler, BaseScheduler)


def test_without_the_engine_the_module_imports_and_the_classes_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, adapter.INTERFACES[0])
    assert importlib.reload(adapter)
    with pytest.raises(ModuleNotFoundError, match="tensorrt_llm"):
        adapter.KvlodeConnectorScheduler  # noqa: B018


@pytest.mark.parametrize("text", ["", "{", "[1]", "no-such-file"])
def test_missing_settings_stop_the_engine_at_its_start(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(OPTIONS_VARIABLE, text)
    with pytest.raises(InvalidConfig, match=OPTIONS_VARIABLE):
        adapter.KvlodeConnectorWorker(engine_arguments())


def test_settings_may_be_in_a_file(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(options | {"revision": "1"}))
    monkeypatch.setenv(OPTIONS_VARIABLE, os.fspath(tmp_path / "settings.json"))
    worker = adapter.KvlodeConnectorWorker(engine_arguments())
    assert worker.connection.stage_wait_s == WAIT_S
    assert worker.connection.close(WAIT_S)


def test_weights_need_an_identity(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setenv(OPTIONS_VARIABLE, json.dumps(options))
    with pytest.raises(InvalidConfig, match="revision"):
        adapter.KvlodeConnectorWorker(engine_arguments(model="nobody/knows-this-model"))


# --- the newer cache manager ----------------------------------------------------------------------------------------------------


@dataclass
class Region:
    tensor: torch.Tensor

    @property
    def size(self) -> int:
        return self.tensor.shape[1]

    buffers: tuple[Any, ...] = (types.SimpleNamespace(layer_id=0, role="key", expansion=1),)

    def as_tensor(self) -> torch.Tensor:
        return self.tensor


def layout_of(*windows: int | None) -> tuple[Any, list[torch.Tensor]]:
    """Two regions that lie between each other's rows, as the newer manager packs them."""
    memory = torch.zeros((POOL_BLOCKS, CONTENT_BYTES), dtype=torch.uint8)
    parts = [memory[:, : CONTENT_BYTES // 4], memory[:, CONTENT_BYTES // 4 :]]
    groups = [
        types.SimpleNamespace(window_size=window, regions=(Region(parts[0]),), replicated_regions=(Region(parts[1]),)) for window in windows
    ]
    return types.SimpleNamespace(groups=groups), [memory, *parts]


def test_a_cache_of_regions_is_stored_and_restored(options: dict[str, Any]) -> None:
    for run in range(2):
        engine = TensorEngine(options, engine_arguments())
        layout, (memory, *_) = layout_of(None)
        engine.worker.register_kv_cache_layout(layout)  # in place of the tensor
        engine.bytes = memory.numpy()
        if run == 0:
            engine.store(PREFIX)
            engine.flush()
        else:
            for block, found in zip(PREFIX, engine.load(PREFIX), strict=True):
                assert found is not None and np.array_equal(found, content(block))
        engine.stop()


@pytest.mark.parametrize("windows", [(None, 128), (128,)])
def test_windows_and_several_groups_are_refused(engine: TensorEngine, windows: tuple[int | None, ...]) -> None:
    with pytest.raises(InvalidConfig, match="full attention"):
        engine.worker.register_kv_cache_layout(layout_of(*windows)[0])


def test_no_thread_is_left(options: dict[str, Any]) -> None:
    before = set(threading.enumerate())
    engine = TensorEngine(options, engine_arguments())
    engine.store(PREFIX)
    engine.stop()
    assert eventually(lambda: not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("kvlode")])
