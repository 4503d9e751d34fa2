"""The scheduler side of the vLLM connector: what can be loaded, and what is loaded and stored with each step.

vLLM asks on its scheduler's thread, so everything here is answered from memory; blocks move in the workers alone.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.contract import Status
from ..format.namespace import Namespace
from .attached import AttachedStore, QuietSpace
from .identity import weights_revision
from .vllm_connector_worker import WHERE, Blocks, Settings, StepPlan, WorkerFacts, namespace_after_reset

logger = logging.getLogger("kvlode")

ASK_KEYS_MAX = 128
"""Keys that one call looks up: the scheduler's thread has no more than a millisecond, and a longer prefix asks again."""
LOOKUP_TIMEOUT_S = 2.0
"""A lookup that the index does not answer in this time is a miss."""


@dataclass(slots=True)
class _Tracked:
    """A request, from its first lookup to its end."""

    request: Any
    salt: bytes
    found: int = 0
    """Blocks from the front, after the local ones, that were found so far."""
    first: int = 0
    """Blocks of the local prefix cache at the last lookup."""
    asked_s: float | None = None
    given_up: bool = False
    """A load of it failed, or its lookup had no answer: it is computed."""
    planned: int = 0
    """Blocks from the front that are stored, or on their way."""
    loading: frozenset[int] = frozenset()
    loaded: tuple[int, int] | None = None
    """Which blocks came from the store, until the first plan after that."""
    outdated: bool = False
    """It has blocks from before a reset: none of its blocks is stored any more."""
    has_stores: bool = False
    """Stores were given out since it got the blocks that it has now."""


class SchedulerSide:
    """Lookups, and what is loaded and stored with each step. Called by the scheduler's thread alone; never waits."""

    def __init__(self, settings: Settings, *, block_tokens: int) -> None:
        self._settings = settings
        self._block_tokens = block_tokens
        self._attached: list[AttachedStore] = []
        self._spaces: list[QuietSpace] = []
        self._local = False
        self._tracked: dict[str, _Tracked] = {}
        self._loads: list[Blocks] = []
        self._kept: set[str] = set()
        self._epoch = ""

    def connect(self, facts: Sequence[WorkerFacts]) -> None:
        """Look blocks up in the stores of these workers; in all of them, as each has its own part of a block."""
        self._local = all(fact.process_id == os.getpid() for fact in facts)
        for fact in facts:
            attached = AttachedStore.open(self._settings.for_folder(fact.folder), where=WHERE, follow=True)
            self._attached.append(attached)
            self._spaces.append(attached.space(Namespace.parse(fact.descriptor_json)))

    # --- looking up ---------------------------------------------------------------------------------------------------

    def matched(self, request: Any, computed_tokens: int) -> int | None:
        """Tokens behind ``computed_tokens`` that can be loaded; ``None`` to be asked again."""
        tracked = self._track(request)
        if tracked is None or tracked.given_up or not self._spaces:
            return 0
        first = computed_tokens // self._block_tokens
        if first != tracked.first:
            tracked.first, tracked.found = first, 0
        limit = (request.num_tokens - 1) // self._block_tokens  # one token has to be computed for the next one
        start, stop = first + tracked.found, min(limit, len(request.block_hashes))
        keys = self._keys(tracked, start, min(stop, start + ASK_KEYS_MAX))
        found, pending = self._run_of_hits(keys)
        tracked.found += found
        if pending or (found == len(keys) and start + found < stop):
            now_s = time.monotonic()
            tracked.asked_s = now_s if tracked.asked_s is None or found else tracked.asked_s
            if now_s - tracked.asked_s < LOOKUP_TIMEOUT_S:
                return None
            tracked.given_up = True
            return 0
        tracked.asked_s = None
        tokens = tracked.found * self._block_tokens
        tracked.found = 0  # asked again, it may have changed
        return tokens if tokens >= max(1, self._settings.min_load_tokens) else 0

    def _run_of_hits(self, keys: Sequence[bytes]) -> tuple[int, bool]:
        """How many keys from the front every worker has, and whether what comes next is not known yet."""
        ends: list[tuple[int, Status]] = []
        for space in self._spaces:
            statuses = space.lookup_nowait(keys)
            ends += next(([(i, status)] for i, status in enumerate(statuses) if status is not Status.HIT), [])
        if not ends:
            return len(keys), False
        run = min(index for index, _ in ends)
        return run, all(status is Status.PENDING for index, status in ends if index == run)

    def _track(self, request: Any) -> _Tracked | None:
        """``None`` for a request whose blocks are not kept."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            salt = self._salt(request)
            if salt is None:
                return None
            tracked = self._tracked[request.request_id] = _Tracked(request, salt)
        return tracked

    def _salt(self, request: Any) -> bytes | None:
        """vLLM's hashes know a LoRA adapter by its name and path; its files may have changed. ``None`` when they cannot be read."""
        lora = getattr(request, "lora_request", None)
        if lora is None:
            return b""
        name, path = str(lora.lora_name), str(lora.lora_path)
        try:  # for every request anew: files are replaced under the same path
            return bytes.fromhex(weights_revision(Path(path))) if os.path.exists(path) else None
        except OSError as error:
            logger.warning("requests with the adapter %s are not kept, its files cannot be read: %s", name, error)
            return None

    def _keys(self, tracked: _Tracked, start: int, stop: int) -> tuple[bytes, ...]:
        return tuple(bytes(block_hash) + tracked.salt for block_hash in tracked.request.block_hashes[start:stop])

    # --- a step -------------------------------------------------------------------------------------------------------

    def allocated(self, request: Any, block_ids: Sequence[int], external_tokens: int) -> None:
        """vLLM has given a request its blocks; ``external_tokens`` of them are to be loaded."""
        tracked = self._track(request)
        if tracked is None or not external_tokens:
            return
        first, last = tracked.first, tracked.first + external_tokens // self._block_tokens
        loads = Blocks(request.request_id, self._keys(tracked, first, last), tuple(block_ids[first:last]))
        self._loads.append(loads)
        tracked.loading, tracked.loaded = frozenset(loads.block_ids), (first, last)

    def plan(self, output: Any) -> StepPlan:
        """What goes with this step. ``output``: vLLM's ``SchedulerOutput``."""
        preempted = frozenset(output.preempted_req_ids or ())
        for request_id in preempted & self._tracked.keys():
            self._tracked[request_id].has_stores = False  # settled by the workers before the step
        plan = StepPlan(self._loads, [], preempted, frozenset(self._kept), not output.num_scheduled_tokens, self._epoch)
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                plan.stores += self._stores_of(tracked, scheduled, output.kv_connector_block_state)
        self._loads, self._kept, self._epoch = [], set(), ""
        return plan

    def _stores_of(self, tracked: _Tracked, scheduled_tokens: int, block_state: Any) -> list[Blocks]:
        """Blocks that are full after this step and were not stored. Blocks of the local cache too: if they are stored already,
        that counts as a use of them, which the store would not see otherwise."""
        request = tracked.request
        computed = int(request.num_computed_tokens)
        full = min((computed + scheduled_tokens) // self._block_tokens, len(request.block_hashes))
        parts: list[tuple[int, int]] = []
        start = tracked.planned
        if tracked.loaded is not None:
            first, last = tracked.loaded[0], min(tracked.loaded[1], computed // self._block_tokens)  # less, where a load failed
            tracked.loaded = None
            if start < first < last:
                parts.append((start, first))
            if first < last:
                start = max(start, last)
        if start < full:
            parts.append((start, full))
        tracked.planned = max(start, full)
        if not parts or not self._spaces or tracked.outdated:
            return []
        block_ids = block_state.get_block_ids(request.request_id)[0]
        tracked.has_stores = True
        return [self._blocks(tracked, block_ids, start, stop) for start, stop in parts]

    def _blocks(self, tracked: _Tracked, block_ids: Sequence[int], start: int, stop: int) -> Blocks:
        above = self._keys(tracked, start - 1, start) if start else (None,)
        return Blocks(tracked.request.request_id, self._keys(tracked, start, stop), tuple(block_ids[start:stop]), above[0])

    def update(self, output: Any) -> None:
        """What the workers reported. ``output``: vLLM's ``KVConnectorOutput``."""
        bad = set(output.invalid_block_ids or ())
        if bad:
            for tracked in self._tracked.values():
                tracked.given_up = tracked.given_up or not bad.isdisjoint(tracked.loading)
        for request_id in output.finished_recving or ():
            if request_id in self._tracked:
                self._tracked[request_id].loading = frozenset()

    def finished(self, request: Any) -> bool:
        """Whether vLLM has to keep the request's blocks until the workers report it as sent."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None or tracked.loading or not tracked.has_stores:  # a load under way keeps its blocks by itself
            return False
        self._kept.add(request.request_id)
        return True

    def reset(self) -> None:
        """Forget every block. In other processes that happens with the next step, before anything else of it."""
        self._epoch = uuid.uuid4().hex
        if self._local:
            for space in self._spaces:
                space.drop()
        renewed = [namespace_after_reset(space.descriptor, self._epoch) for space in self._spaces]
        self._spaces = [attached.space(descriptor) for attached, descriptor in zip(self._attached, renewed, strict=True)]
        for tracked in self._tracked.values():
            tracked.found = 0
            if tracked.request.num_computed_tokens or tracked.loading:
                tracked.outdated = True
            else:
                tracked.planned = 0

    @property
    def has_news(self) -> bool:
        """Something that the workers must be told although nothing is scheduled."""
        return bool(self._epoch)

    def stats(self) -> list[Mapping[str, Any]]:
        return [attached.stats() for attached in self._attached]

    def shutdown(self) -> bool:
        """Close this side's handles of the stores."""
        attached, self._attached, self._spaces = self._attached, [], []
        closed = [store.close() for store in attached]
        return all(closed)
