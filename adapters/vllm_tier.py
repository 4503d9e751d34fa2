"""A kvlode store as a secondary tier of vLLM's KV offloading (GPU memory, then host memory, then this).

``kv_connector_extra_config`` names it, without anything registered in vLLM::

    "secondary_tiers": [{"type": "KvlodeTier", "module_path": "kvlode.adapters.vllm_tier", "path": "/nvme/kv", "capacity": "500GiB"}]

The interface is ``SecondaryTierManager`` of ``vllm/v1/kv_offload/tiering/base.py``; written for and tested with vLLM 0.32.0 (its
real classes) and read against 0.33.0. This module imports without vLLM: ``KvlodeTier`` is made when it is first asked for.

All methods run in the scheduler's process under the manager's lock, and none but ``drain_jobs`` and ``shutdown`` waits. Blocks
are the rows of the primary tier's memory, a chunk of all layers and all ranks each; they are read and written in place.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..engine.contract import Status
from .attached import CLOSE_S, AttachedStore, QuietSpace
from .transfers import LOAD_TIMEOUT_S
from .vllm_identity import TierNames, split_key
from .vllm_tier_interface import TierEvents, VllmInterface
from .vllm_tier_jobs import FinishedJob, Part, Rows, TierJobs, status_name

logger = logging.getLogger("kvlode")

WHERE = "secondary_tiers of kv_connector_extra_config"
LOOKUP_TIMEOUT_S = 1.0
"""A key that the index has not told of for so long counts as missing for that request: it is computed instead."""
DRAIN_TIMEOUT_S = 60.0
DEFAULTS: dict[str, Any] = {"gds": "off"}
"""The tier's memory is the host's, so a GPU has nothing to do with it."""

METRIC = "vllm:kv_offload_kvlode_"
METRICS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    METRIC + "loaded_blocks": ("Blocks read from the kvlode store into the primary tier.", ("tier",)),
    METRIC + "load_failures": ("Blocks that could not be read, by outcome; they are computed.", ("tier", "outcome")),
    METRIC + "stored_blocks": ("Blocks that are in the kvlode store after a store job, those it had already included.", ("tier",)),
    METRIC + "store_refusals": ("Blocks that the kvlode store did not take, by reason.", ("tier", "reason")),
    METRIC + "lookups_given_up": ("Lookups answered as a miss because the index took too long.", ("tier",)),
}


@dataclass(slots=True)
class _Request:
    """What is remembered of a request until it is finished."""

    born: int
    waiting: dict[bytes, float] = field(default_factory=dict)
    """Since when the index has been asked for a key, by the monotonic clock."""
    given_up: set[bytes] = field(default_factory=set)
    tails: dict[int, bytes] = field(default_factory=dict)
    """The block that was stored or loaded last, by cache group: the parent of the next one."""


class VllmTier:
    """The methods of ``KvlodeTier``; ``tier_class`` puts them in front of vLLM's base class.

    Settings beside ``path`` (a folder, or a list of folders: a store set) and those of ``kvlode.open``: ``revision`` (of the weights, see
    ``vllm_identity.model_revision``),
    ``identity`` (a mapping of whatever else changes the bytes and vLLM does not tell the tier: quantisation given on the command
    line, RoPE overrides), ``on_reset`` (``"forget"``: a reset of the cache starts a namespace that nothing else ever reads, as weights may
    have been replaced in memory; ``"keep"`` where they never are),
    ``locality``, ``enable_kv_events``, and the deadlines ``load_timeout_s``,
    ``lookup_timeout_s``, ``drain_timeout_s``, ``close_timeout_s``.

    Raises ``InvalidConfig`` for settings that cannot be; a store that cannot be opened is misses.
    """

    _vllm: VllmInterface
    _primary_kv_view: memoryview

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        *,
        locality: str | None = None,
        enable_kv_events: bool = False,
        revision: str | None = None,
        identity: Mapping[str, Any] | None = None,
        on_reset: str = "forget",
        load_timeout_s: float = LOAD_TIMEOUT_S,
        lookup_timeout_s: float = LOOKUP_TIMEOUT_S,
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
        close_timeout_s: float = CLOSE_S,
        **options: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)  # type: ignore[call-arg]
        self.locality = self._vllm.locality(locality) if locality is not None else None
        self._label = tier_type
        self._rows = Rows(primary_kv_view)
        self._names = TierNames(offloading_spec.config, self._rows.row_bytes, revision, identity, on_reset)
        self._lookup_timeout_s, self._drain_timeout_s, self._close_timeout_s = lookup_timeout_s, drain_timeout_s, close_timeout_s
        self._requests: OrderedDict[str, _Request] = OrderedDict()
        self._request_count = 0
        self._lost: OrderedDict[bytes, int] = OrderedDict()
        """Keys whose load failed, with the number of the next request then: whoever began before does not try again."""
        self._job_keys: dict[int, tuple[list[bytes], Any]] = {}
        self._counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._spaces: dict[int, QuietSpace] = {}
        self._closed = False
        path = options.get("path")
        self._path = ", ".join(path) if isinstance(path, list) else str(path)
        self._attached = AttachedStore.open(DEFAULTS | options, where=WHERE, sets=True)
        try:
            for group in [group.group_id for group in offloading_spec.config.groups] or [0]:
                self._space(group)
        except BaseException:
            self._attached.close()
            raise
        self._events = TierEvents(self._attached, self._events_wanted(offloading_spec, enable_kv_events))
        self._jobs = TierJobs(self._rows, load_timeout_s)

    def _events_wanted(self, spec: Any, enabled: bool) -> bool:
        if enabled and not spec.kv_events_config.enable_kv_cache_events:
            logger.warning("%s: enable_kv_events without kv_events_config does nothing", WHERE)
        return enabled and bool(spec.kv_events_config.enable_kv_cache_events)

    def _space(self, group: int) -> QuietSpace:
        space = self._spaces.get(group)
        if space is None:
            space = self._spaces[group] = self._attached.space(self._names.namespace(group))
        return space

    # --- requests -------------------------------------------------------------------------------------------------

    def on_new_request(self, req_context: Any) -> Any:
        self._request(req_context.req_id)
        return self._vllm.request_context()

    def _request(self, req_id: str) -> _Request:
        request = self._requests.get(req_id)
        if request is None:
            request = self._requests[req_id] = _Request(self._request_count)
            self._request_count += 1
        return request

    def on_request_finished(self, req_context: Any) -> None:
        self._requests.pop(req_context.req_id, None)
        oldest = next(iter(self._requests.values())).born if self._requests else self._request_count
        while self._lost and next(iter(self._lost.values())) <= oldest:  # in the order of their numbers
            self._lost.popitem(last=False)

    def lookup(self, key: bytes, req_context: Any) -> Any:
        """``HIT``, ``MISS``, or ``RETRY`` while the index is asked in the background; never longer than ``lookup_timeout_s``."""
        request = self._request(req_context.req_id)
        if key in request.given_up or self._lost.get(key, 0) > request.born or self._closed:
            return self._vllm.miss
        group, block_hash = split_key(key)
        if not block_hash:
            return self._vllm.miss
        status = self._space(group).lookup_nowait((block_hash,))[0]
        if status is not Status.PENDING:
            request.waiting.pop(key, None)
            return self._vllm.hit if status is Status.HIT else self._vllm.miss
        now_s = time.monotonic()
        if now_s - request.waiting.setdefault(key, now_s) <= self._lookup_timeout_s:
            return self._vllm.retry
        request.given_up.add(key)
        self._count("lookups_given_up")
        return self._vllm.miss

    def touch(self, keys: Collection[bytes], req_context: Any) -> None:
        by_group: dict[int, list[bytes]] = {}
        for key in keys:
            group, block_hash = split_key(key)
            by_group.setdefault(group, []).append(block_hash)
        if not self._closed:
            for group, hashes in by_group.items():
                self._jobs.touch(self._space(group), hashes)

    # --- jobs -----------------------------------------------------------------------------------------------------

    def submit_store(self, job_metadata: Any) -> None:
        self._submit(job_metadata, is_load=False)

    def submit_load(self, job_metadata: Any) -> None:
        self._submit(job_metadata, is_load=True)

    def _submit(self, job: Any, *, is_load: bool) -> None:
        """``job``: a ``TransferJob``; ``chunk_ids`` names one row of the primary tier for each key."""
        keys = [bytes(key) for key in job.keys]
        chunks = [int(chunk) for chunk in job.chunk_ids]
        request = self._requests.get(job.req_context.req_id)
        tails = request.tails if request is not None else {}
        by_group: dict[int, list[int]] = {}
        hashes: list[bytes] = []
        for position, key in enumerate(keys):
            group, block_hash = split_key(key)
            hashes.append(block_hash)
            by_group.setdefault(group, []).append(position)
        parts = []
        for group, positions in by_group.items():
            part_keys = [hashes[position] for position in positions]
            part_chunks = [chunks[position] for position in positions]
            parts.append(Part(self._space(group), part_keys, part_chunks, positions, parent=tails.get(group)))
            tails[group] = part_keys[-1]
        self._job_keys[job.job_id] = (keys, job.req_context)
        self._jobs.submit(job.job_id, parts, len(keys), is_load=is_load)

    def get_finished_jobs(self) -> Iterable[Any]:
        """Jobs that are over since the last call, as ``JobResult``; a load names the keys that it did deliver."""
        return [self._report(finished) for finished in self._jobs.finished()]

    def _report(self, finished: FinishedJob) -> Any:
        keys, _ = self._job_keys.pop(finished.job_id)
        good_keys = [key for key, good in zip(keys, finished.good, strict=True) if good]
        success = len(good_keys) == len(keys)
        self._count("loaded_blocks" if finished.is_load else "stored_blocks", len(good_keys))
        for key, good, status in zip(keys, finished.good, finished.statuses, strict=True):
            if not good:
                self._count("load_failures" if finished.is_load else "store_refusals", 1, status_name(status))
                if finished.is_load and self._requests:
                    self._lost[key] = self._request_count
                    self._lost.move_to_end(key)
        return self._vllm.job_result(
            job_id=finished.job_id,
            success=success,
            successful_keys=tuple(good_keys) if finished.is_load and good_keys and not success else None,
            transfer_time=finished.seconds,
            transfer_bytes=len(good_keys) * self._rows.row_bytes,
        )

    def has_pending_work(self) -> bool:
        """While jobs run: the engine keeps polling, and lets go of their rows."""
        return self._jobs.pending > 0

    def drain_jobs(self) -> None:
        """Wait until no job touches the primary tier; called when the engine resets its caches.

        Raises ``TimeoutError`` at ``drain_timeout_s``: vLLM is about to reuse the rows, and a drive that writes into them later
        would be wrong tokens. The reset has changed nothing by then, and fails as a call of its own.
        """
        if not self._jobs.drain(self._drain_timeout_s):
            raise TimeoutError(f"the kvlode tier has had jobs under way for {self._drain_timeout_s:.0f} s: the drive does not answer")
        if self._names.renew():
            self._spaces.clear()

    # --- metrics, events, end ----------------------------------------------------------------------------------------

    @classmethod
    def build_metric_definitions(cls, extra_config: Mapping[str, Any]) -> dict[str, Any]:
        return {name: cls._vllm.counter(documentation=text, labelnames=labels) for name, (text, labels) in METRICS.items()}

    def _count(self, name: str, by: int = 1, *labels: str) -> None:
        if by:
            self._counts[METRIC + name, (self._label, *labels)] += by

    def get_stats(self) -> Any:
        """What was counted since the last call (``OffloadingConnectorStats``), or ``None``."""
        if not self._counts:
            return None
        stats = self._vllm.stats()
        for (name, labels), value in self._counts.items():
            stats.increase_counter(name, value, labels)
        self._counts.clear()
        return stats

    @classmethod
    def config_info_keys(cls, tier_config: Mapping[str, Any]) -> tuple[str, ...]:
        return ("kvlode_path", "kvlode_store")

    def config_info(self) -> Mapping[str, str]:
        """Labels of vLLM's info metric (from 0.33 on): the folder, and ``open`` or why there is no store."""
        return {"kvlode_path": self._path, "kvlode_store": self._attached.reason or "open"}

    def take_events(self) -> Iterable[Any]:
        """Blocks that came into the store and left it since the last call, where ``enable_kv_events`` asks for it."""
        groups = {space.digest: group for group, space in self._spaces.items()}
        for keys, removed in self._events.take(groups):
            yield self._vllm.event(keys=keys, medium=self._vllm.storage, removed=removed, locality=self.locality)

    def shutdown(self) -> None:
        """Wait for the jobs, close the store, give up the primary tier's memory; each with a deadline. Never raises.

        A job that has not ended by then keeps its rows mapped, since it holds views of them.
        """
        if self._closed:
            return
        self._closed = True
        deadline_s = time.monotonic() + self._close_timeout_s
        if not self._jobs.close(self._close_timeout_s):
            logger.error("the kvlode tier ends with %d jobs under way", self._jobs.pending)
        if not self._attached.close(max(1.0, deadline_s - time.monotonic())):
            logger.error("the kvlode store of the tier was not closed in time")
        self._rows.close()


def tier_class(vllm: VllmInterface) -> type:
    """``KvlodeTier`` for one vLLM: the methods of ``VllmTier`` over vLLM's base class."""
    members = {"_vllm": vllm, "medium": vllm.storage, "__module__": __name__, "__doc__": VllmTier.__doc__}
    return type("KvlodeTier", (VllmTier, vllm.base), members)


def __getattr__(name: str) -> Any:
    """``KvlodeTier``, made once. Raises ``ImportError`` without vLLM."""
    if name != "KvlodeTier":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = tier_class(VllmInterface.of_vllm())
    return made
