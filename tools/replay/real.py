"""Playing a trace through a store on a drive: real blocks, read back and compared, with the times that they took.

The store has as many segments as the simulated log, each with room for as many blocks, and its clock is that of the trace, so that
policies see the same ages. What differs from the simulation: a block between its put and its flush is in no segment yet (``flush_each``
leaves none behind a request), the store frees a segment one ahead of the need, and copies share a segment with new blocks as the
threads come to it.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ...engine.capacity import SEGMENTS_AHEAD, budget_for
from ...engine.config import MIB, SEGMENT_BYTES_MIN, StoreConfig, SystemClock
from ...engine.contract import BlockSpace, PutState, PutStatus, Refusal, Status
from ...engine.opening import Environment, open_store
from ...engine.store import DiskStore
from ...format.errors import CorruptRecord, InvalidConfig, StoreFailed
from ...format.layout import PAGE_BYTES, round_up_pages
from ...format.namespace import Namespace
from ...format.seal import toc_bytes
from .options import PolicyChoice, Settings
from .request import Request
from .runs import token_facts, written_facts
from .traces import Trace

KEY_BYTES = 16
GROUP_BYTES = 64 * MIB
"""Raw bytes of blocks that are put or read with one call."""
BUFFER_BYTES_MIN = 4 * GROUP_BYTES
FLUSH_S = 120.0
INDEX_BYTES_PER_BLOCK = 110
SEAL_ROW_BYTES_MAX = 512
_RECLAIM_OPTIONS = {"hits_min": "reinsert_hits_min", "write_amplification_max": "write_amplification_max"}
_ADMISSION_OPTIONS = {"bytes_per_day": "write_budget_bytes_per_day"}


class TraceClock:
    """The store's clock: stands still within a request and moves with the trace."""

    def __init__(self) -> None:
        self._start_ns = SystemClock().now_ns()
        self.passed_s = 0.0

    def now_ns(self) -> int:
        return self._start_ns + int(self.passed_s * 1e9)

    def monotonic_s(self) -> float:
        return self.passed_s


class BlockBytes:
    """Bytes of a block that follow from its id: every word differs between blocks and between places; zstd cannot make them smaller."""

    def __init__(self, block_bytes: int) -> None:
        self._base = np.random.default_rng(0).integers(0, 1 << 64, -(-block_bytes // 8), np.uint64)
        self._block_bytes = block_bytes

    def make(self, block: int) -> npt.NDArray[np.uint8]:
        word = np.uint64(xxhash.xxh3_64_intdigest(block.to_bytes(8, "little")))
        return (self._base ^ word).view(np.uint8)[: self._block_bytes]


@dataclass(slots=True)
class _Sums:
    asked: int = 0
    prefix_hits: int = 0
    block_hits: int = 0
    fresh: int = 0
    not_admitted: int = 0
    refused: int = 0
    hit_tokens: int = 0
    read_s: float = 0.0
    write_s: float = 0.0
    reinserted: int = 0
    segments: int = 0
    segment_bytes: int = 0
    """All that was written into segments, headers, padding and seals included."""


def store_options(settings: Settings, policy: PolicyChoice, capacity_blocks: int) -> StoreConfig:
    """Options of a store with the segments and the blocks of the simulated log. Raises ``InvalidConfig`` for a policy that no store has."""
    options = _options_of(policy, _RECLAIM_OPTIONS, "reclaim_policy")
    options |= _options_of(settings.admission, _ADMISSION_OPTIONS, "admission_policy")
    if settings.hbm is not None or settings.dram is not None:
        raise InvalidConfig("a real replay has no memories in front of the store", expected="no --hbm and no --dram with --real")
    segment_blocks = capacity_blocks // settings.segments
    segment_bytes = segment_bytes_for_blocks(segment_blocks, settings.block_bytes)
    if segment_bytes < SEGMENT_BYTES_MIN:
        raise InvalidConfig(
            "the segments of the store would be too small",
            expected=f"at least {SEGMENT_BYTES_MIN} bytes each",
            actual=f"{segment_bytes} bytes: {segment_blocks} blocks of {settings.block_bytes} bytes",
            action="Raise --block-bytes or the capacity, or ask for fewer --segments.",
        )
    config = StoreConfig.build(
        capacity=1 << 40,
        buffer=max(BUFFER_BYTES_MIN, 4 * settings.block_bytes),
        segment_bytes=segment_bytes,
        codec="raw",
        serve_clean=False,
        put_timeout_s=FLUSH_S,
        **options,
    )
    return _sized(config, settings.segments, capacity_blocks)


def _options_of(choice: PolicyChoice, known: dict[str, str], option: str) -> dict[str, object]:
    options: dict[str, object] = {option: choice.name}
    for name, value in choice.options.items():
        if name not in known:
            raise InvalidConfig(
                f"a store has no option for {name} of {choice.name}",
                expected=" or ".join(known),
                actual=choice.text,
                action="Leave --real out to simulate it.",
            )
        options[known[name]] = value
    return options


def segment_bytes_for_blocks(blocks: int, block_bytes: int) -> int:
    """A segment for so many blocks and not one more: header page, record of the namespace, records, seal and its spare page."""
    record_bytes = PAGE_BYTES + round_up_pages(block_bytes)
    seal_bytes = 3 * PAGE_BYTES + round_up_pages(toc_bytes(blocks + 2, (blocks + 2) * KEY_BYTES))
    reckoned_bytes = round_up_pages(blocks * SEAL_ROW_BYTES_MAX)  # what the writer sets aside for rows of the seal that it has yet to make
    return 3 * PAGE_BYTES + blocks * record_bytes + seal_bytes + min(reckoned_bytes, record_bytes - PAGE_BYTES)


def _sized(config: StoreConfig, segments: int, capacity_blocks: int) -> StoreConfig:
    """With the capacity that makes ``segments``: beside them there are the spare, the reserve of reinsertion, and the index."""
    assert config.segment_bytes is not None
    for _ in range(3):  # what is set aside depends on the capacity a little
        budget = budget_for(config)
        index_bytes = int(budget.index_factor * INDEX_BYTES_PER_BLOCK * capacity_blocks)
        growth_bytes = budget.index_growth_bytes(SEGMENTS_AHEAD * config.segment_bytes)
        capacity_bytes = budget.fixed_bytes + index_bytes + growth_bytes + (segments + 2) * config.segment_bytes + config.segment_bytes // 2
        config = StoreConfig.build(**{name: getattr(config, name) for name in config.__slots__} | {"capacity_bytes": capacity_bytes})
    return config


def run_real(
    trace: Trace,
    settings: Settings,
    policy: PolicyChoice,
    capacity_blocks: int,
    advance: Callable[[int], None] = lambda requests: None,
) -> dict[str, Any]:
    """Play the trace through a store in a new folder, which is removed at the end; the facts of the run.

    Raises ``CorruptRecord`` for a hit with a wrong byte, ``InvalidConfig`` for what no store can be opened with, and what a store raises.
    """
    config = store_options(settings, policy, capacity_blocks)
    folder = settings.folder or Path()
    folder.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(folder).free
    if config.capacity_bytes > free_bytes:
        raise InvalidConfig(
            "the drive has no room for the replay",
            where=folder.absolute(),
            expected=f"{config.capacity_bytes} bytes free",
            actual=f"{free_bytes} bytes",
            action="Choose a smaller capacity or --block-bytes, or another --folder.",
        )
    place = Path(tempfile.mkdtemp(prefix=".kvlode-replay-", dir=folder))
    try:
        with_store = _Player(place, config, trace, settings)
        began_s = time.perf_counter()
        with_store.play(advance)
        return with_store.facts(policy, capacity_blocks, time.perf_counter() - began_s)
    finally:
        shutil.rmtree(place, ignore_errors=True)


class _Player:
    """Asks the store for what a trace asks for, and puts what it lacks."""

    def __init__(self, place: Path, config: StoreConfig, trace: Trace, settings: Settings) -> None:
        self._place, self._config = place, config
        self._trace, self._settings = trace, settings
        self._clock = TraceClock()
        self._bytes = BlockBytes(settings.block_bytes)
        self._group = max(1, GROUP_BYTES // settings.block_bytes)
        self._outs = [np.empty(settings.block_bytes, np.uint8) for _ in range(self._group)]
        self._sums = _Sums()

    def play(self, advance: Callable[[int], None]) -> None:
        restart_at_s = self._settings.restart_at_s
        parts: list[Sequence[Request]] = [self._trace.requests]
        if restart_at_s is not None:
            split = sum(request.time_s < restart_at_s for request in self._trace.requests)
            parts = [self._trace.requests[:split], self._trace.requests[split:]]
        for requests in parts:
            with open_store(self._place, self._config, Environment(clock=self._clock)) as store:
                space = store.namespace(self._namespace())
                for request in requests:
                    self._clock.passed_s = max(self._clock.passed_s, request.time_s)
                    self._request(store, space, request)
                    advance(1)
                if not store.flush(FLUSH_S):
                    raise StoreFailed("blocks could not be written", where=self._place, actual=f"no flush within {FLUSH_S:.0f} s")
                self._count(store)

    def _namespace(self) -> Namespace:
        return Namespace(
            model="replay",
            revision="1",
            dtype="uint8",
            layout="bytes that follow from the id",
            tokens_per_block=self._trace.block_tokens,
            block_bytes_max=self._settings.block_bytes,
        )

    def _request(self, store: DiskStore, space: BlockSpace, request: Request) -> None:
        sums = self._sums
        blocks = list(request.blocks)
        keys = [block.to_bytes(KEY_BYTES, "big") for block in blocks]
        began_s = time.perf_counter()
        prefix = space.match_prefix(keys) if keys else 0
        sums.read_s += time.perf_counter() - began_s
        prefix = self._read(space, keys[:prefix], blocks)
        self._put(space, keys, blocks, prefix)
        if self._settings.flush_each and prefix < len(keys):
            began_s = time.perf_counter()
            store.flush(FLUSH_S)
            sums.write_s += time.perf_counter() - began_s
        sums.asked += len(keys)
        sums.prefix_hits += prefix
        sums.block_hits += prefix
        sums.hit_tokens += min(prefix * self._trace.block_tokens, request.input_tokens)

    def _read(self, space: BlockSpace, keys: list[bytes], blocks: list[int]) -> int:
        """Read a prefix run and compare its bytes; how much of it was there."""
        for start in range(0, len(keys), self._group):
            group = keys[start : start + self._group]
            outs = self._outs[: len(group)]
            began_s = time.perf_counter()
            statuses = space.get_many_into(group, outs)
            self._sums.read_s += time.perf_counter() - began_s
            for position, status in enumerate(statuses):
                if status is not Status.HIT:
                    return start + position
                if not np.array_equal(outs[position], self._bytes.make(blocks[start + position])):
                    raise CorruptRecord(
                        "a hit has other bytes than were put",
                        where=f"block {blocks[start + position]}",
                        action="Please report this: kvlode must never serve wrong bytes.",
                    )
        return len(keys)

    def _put(self, space: BlockSpace, keys: list[bytes], blocks: list[int], begin: int) -> None:
        """Put everything from ``begin`` on; what turns out to be there is a hit behind a gap."""
        for start in range(begin, len(keys), self._group):
            group = slice(start, start + self._group)
            made = [self._bytes.make(block) for block in blocks[group]]
            began_s = time.perf_counter()
            job = space.submit_put(keys[group], made, parent=keys[start - 1] if start else None)
            job.wait(FLUSH_S)
            self._sums.write_s += time.perf_counter() - began_s
            for status in job.statuses:
                self._count_put(status)

    def _count_put(self, status: PutStatus) -> None:
        sums = self._sums
        if status.state is PutState.EXISTS:
            sums.block_hits += 1
        elif status:
            sums.fresh += 1
        elif status.reason is Refusal.NOT_ADMITTED:
            sums.not_admitted += 1
        else:
            sums.refused += 1

    def _count(self, store: DiskStore) -> None:
        stats = store.stats()
        self._sums.reinserted += stats["reclaim"]["reinserted_blocks"]
        self._sums.segments = stats["segments"]["count"] - stats["segments"]["leaving"]
        self._sums.segment_bytes += stats["writes"]["segment_bytes"]

    def facts(self, policy: PolicyChoice, capacity_blocks: int, elapsed_s: float) -> dict[str, Any]:
        """The facts of the run, named as those of a simulated one."""
        sums, settings = self._sums, self._settings
        asked, block_bytes = max(1, sums.asked), settings.block_bytes
        reinserted = sums.reinserted
        return {
            "policy": policy.text,
            "admission": settings.admission.text,
            "capacity_blocks": capacity_blocks,
            "capacity_bytes": capacity_blocks * block_bytes,
            "capacity_share": capacity_blocks / max(1, self._trace.unique_blocks),
            "store_capacity_bytes": self._config.capacity_bytes,
            "segments": settings.segments,
            "segments_at_end": sums.segments,
            "block_bytes": block_bytes,
            "block_tokens": self._trace.block_tokens,
            "requests": len(self._trace.requests),
            "events": sums.asked,
            "events_per_s": round(sums.asked / elapsed_s) if elapsed_s else 0,
            "unique_blocks": self._trace.unique_blocks,
            "prefix_hit_ratio": sums.prefix_hits / asked,
            "block_hit_ratio": sums.block_hits / asked,
            "write_amplification": 1 + reinserted / max(1, sums.fresh),
            "fresh_blocks": sums.fresh,
            "reinserted_blocks": reinserted,
            "rejected_blocks": sums.not_admitted,
            "refused_blocks": sums.refused,
            "blocks_verified": sums.prefix_hits,
            "read_bytes_per_s": sums.prefix_hits * block_bytes / sums.read_s if sums.read_s else None,
            "write_bytes_per_s": sums.fresh * block_bytes / sums.write_s if sums.write_s else None,
            "elapsed_s": elapsed_s,
            **written_facts(self._trace, sums.segment_bytes, capacity_blocks * block_bytes),
            **token_facts(settings, sum(request.input_tokens for request in self._trace.requests), sums.hit_tokens),
        }
