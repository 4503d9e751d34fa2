"""vLLM's side of a secondary tier, as far as a tier sees it, and classes that stand in for vLLM's where it is not installed."""

from __future__ import annotations

import enum
import itertools
import mmap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from adapter_conformance import WAIT_S
from kvlode.adapters.vllm_tier import tier_class
from kvlode.adapters.vllm_tier_interface import VllmInterface
from model import block_bytes

ROW_BYTES = 96 << 10
ROWS = 64
SCRIBBLE = 0x5A


class Lookup(enum.Enum):
    MISS = 1
    HIT = 2
    RETRY = 3


class StandInBase:
    """The constructor of vLLM's ``SecondaryTierManager``."""

    def __init__(self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, backpressure_detector: Any = None) -> None:
        self._offloading_spec = offloading_spec
        self._primary_kv_view = primary_kv_view
        self.tier_type = tier_type
        self.locality = None
        self._bp_detector = backpressure_detector


@dataclass
class Result:
    job_id: int
    success: bool
    successful_keys: Sequence[bytes] | None = None
    transfer_time: float | None = None
    transfer_bytes: int | None = None


@dataclass
class Job:
    job_id: int
    keys: Sequence[bytes]
    chunk_ids: Any
    is_promotion: bool
    req_context: Any


class Stats:
    def __init__(self) -> None:
        self.counters: dict[tuple[str, tuple[str, ...]], int] = {}

    def increase_counter(self, name: str, by: int, labels: tuple[str, ...] = ()) -> None:
        self.counters[name, labels] = self.counters.get((name, labels), 0) + by


STAND_IN = VllmInterface(
    base=StandInBase,
    job_result=Result,
    hit=Lookup.HIT,
    miss=Lookup.MISS,
    retry=Lookup.RETRY,
    request_context=lambda: "chunk_level",
    storage="STORAGE",
    locality=str,
    event=lambda **values: SimpleNamespace(**values),
    counter=lambda **values: SimpleNamespace(**values),
    stats=Stats,
)


@dataclass(frozen=True)
class Setting:
    """What of ``OffloadingConfig`` a test varies."""

    model: str = "model"
    dtype: str = "bfloat16"
    tp_size: int = 1
    portable: bool = False
    replicated: bool = False
    canonical: bool = False
    layout: str | None = "LBNHC"
    groups: tuple[tuple[int, int, tuple[str, ...]], ...] = ((0, 16, ("layer.0", "layer.1")),)
    blocks_per_chunk: int = 1
    worker_bytes: int = ROW_BYTES
    extra: dict[str, Any] = field(default_factory=dict)


def stand_in_spec(setting: Setting, *, kv_events: bool = False) -> Any:
    """An ``OffloadingSpec`` with the fields of vLLM's ``OffloadingConfig``."""
    config = SimpleNamespace(
        groups=tuple(SimpleNamespace(group_id=i, tokens_per_block=t, layer_names=n) for i, t, n in setting.groups),
        worker_kv_bytes_per_block=setting.worker_bytes,
        model=SimpleNamespace(name=setting.model, dtype=setting.dtype),
        cache=SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=setting.blocks_per_chunk),
        parallel=SimpleNamespace(
            rank=0,
            world_size=setting.tp_size,
            tp_size=setting.tp_size,
            pp_size=1,
            pcp_size=1,
            dcp_size=1,
            is_parallelism_agnostic=setting.portable,
        ),
        replicated_layout=setting.replicated,
        canonical_layout=setting.canonical,
        kv_cache_layout=setting.layout,
    )
    return SimpleNamespace(config=config, kv_events_config=SimpleNamespace(enable_kv_cache_events=kv_events))


def key_of(block: int, group: int = 0) -> bytes:
    """An ``OffloadKey``."""
    return block.to_bytes(32, "little") + group.to_bytes(4, "big")


def content(block: int) -> np.ndarray:
    return block_bytes(b"%d" % block, block, ROW_BYTES)


class TierEngine:
    """One engine with the tier under test; its primary tier is an anonymous mapping, which a tier has to let go of."""

    def __init__(self, options: dict[str, Any], setting: Setting = Setting(), *, kv_events: bool = False, rows: int = ROWS) -> None:
        self.memory = mmap.mmap(-1, rows * ROW_BYTES)
        self._view = memoryview(self.memory).cast("b", (rows, ROW_BYTES))
        self.tier: Any = tier_class(STAND_IN)(
            offloading_spec=stand_in_spec(setting, kv_events=kv_events),
            primary_kv_view=self._view,
            tier_type="KvlodeTier",
            backpressure_detector=None,
            **options,
        )
        self._ids = itertools.count()
        self.results: list[Result] = []

    # --- as the manager calls it ----------------------------------------------------------------------------------

    def request(self) -> Any:
        context = SimpleNamespace(req_id=f"request {next(self._ids)}")
        self.tier.on_new_request(context)
        return context

    def row(self, chunk: int) -> np.ndarray:
        """A copy of a row: a view would keep the mapping."""
        return np.array(np.frombuffer(self.memory, np.uint8, ROW_BYTES, chunk * ROW_BYTES))

    def fill(self, chunk: int, data: np.ndarray) -> None:
        self.memory[chunk * ROW_BYTES : (chunk + 1) * ROW_BYTES] = data.tobytes()

    def submit(self, keys: Sequence[bytes], chunks: Sequence[int], context: Any, *, is_load: bool) -> int:
        job = Job(next(self._ids), list(keys), np.asarray(chunks, np.int32), is_load, context)
        (self.tier.submit_load if is_load else self.tier.submit_store)(job)
        return job.job_id

    def wait(self, job_id: int) -> Result:
        found: list[Result] = []

        def reported() -> bool:
            self.results += self.tier.get_finished_jobs()
            found[:] = [result for result in self.results if result.job_id == job_id]
            return bool(found)

        poll(reported)
        self.results.remove(found[0])
        return found[0]

    def answer(self, key: bytes, context: Any) -> Lookup:
        """The answer of a lookup, asked for until it is one."""
        answers: list[Lookup] = []

        def answered() -> bool:
            answers[:] = [self.tier.lookup(key, context)]
            return answers[0] is not Lookup.RETRY

        poll(answered)
        return answers[0]

    # --- as the conformance suite has it --------------------------------------------------------------------------

    def store(self, prefix: Sequence[int]) -> None:
        context = self.request()
        for chunk, block in enumerate(prefix):
            self.fill(chunk, content(block))
        self.wait(self.submit([key_of(block) for block in prefix], range(len(prefix)), context, is_load=False))
        for chunk in range(len(prefix)):  # the rows are the engine's again, and used for something else
            self.fill(chunk, np.full(ROW_BYTES, SCRIBBLE, np.uint8))
        self.tier.on_request_finished(context)

    def flush(self) -> None:
        self.tier._attached.flush(WAIT_S)

    def lookup(self, prefix: Sequence[int]) -> int:
        context = self.request()
        answers = [self.answer(key_of(block), context) for block in prefix]
        self.tier.on_request_finished(context)
        return next((index for index, answer in enumerate(answers) if answer is not Lookup.HIT), len(answers))

    def load(self, prefix: Sequence[int]) -> list[np.ndarray | None]:
        context = self.request()
        keys = [key_of(block) for block in prefix]
        for chunk in range(len(prefix)):
            self.fill(chunk, np.full(ROW_BYTES, SCRIBBLE, np.uint8))
        result = self.wait(self.submit(keys, range(len(prefix)), context, is_load=True))
        self.tier.on_request_finished(context)
        good = set(keys if result.success else result.successful_keys or ())
        return [self.row(chunk) if key in good else None for chunk, key in enumerate(keys)]

    def stop(self) -> None:
        """As vLLM does it: the tier first, then the mapping, which refuses while anybody holds a view."""
        self.tier.shutdown()
        self._view.release()
        poll(self._unmapped)

    def _unmapped(self) -> bool:
        try:
            self.memory.close()
        except BufferError:
            return False
        return True


def poll(met: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    """As an engine polls: one step after the other, with a deadline."""
    deadline_s = time.monotonic() + timeout_s
    while not met():
        assert time.monotonic() < deadline_s, "it does not come about"
        time.sleep(0.0005)
