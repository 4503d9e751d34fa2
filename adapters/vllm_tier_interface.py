"""What the secondary tier uses of vLLM, imported when the tier's class is first asked for; and the events that vLLM publishes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..engine.events import EventKind, StoreEvent
from ..format.errors import KvlodeError
from .attached import AttachedStore
from .vllm_identity import join_key

logger = logging.getLogger("kvlode")


@dataclass(frozen=True)
class VllmInterface:
    """Classes and values of vLLM 0.32.0 and 0.33.0; tests put others in their place."""

    base: type
    """``SecondaryTierManager`` (``tiering/base.py``)."""
    job_result: Callable[..., Any]
    """``JobResult`` (``tiering/base.py``)."""
    hit: Any
    miss: Any
    retry: Any
    """``LookupResult`` (``kv_offload/base.py``)."""
    request_context: Callable[[], Any]
    """``RequestOffloadingContext``: offload new chunks only."""
    storage: Any
    """``Medium.STORAGE``."""
    locality: Callable[[str], Any]
    event: Callable[..., Any]
    """``OffloadingEvent``."""
    counter: Callable[..., Any]
    """``OffloadingCounterMetadata``."""
    stats: Callable[[], Any]
    """``OffloadingConnectorStats`` (``kv_connector/v1/offloading/metrics.py``)."""

    @classmethod
    def of_vllm(cls) -> VllmInterface:
        """Of the vLLM that is installed. Raises ``ImportError``."""
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
        from vllm.v1.kv_offload import base as offload
        from vllm.v1.kv_offload.tiering import base as tiering

        return cls(
            base=tiering.SecondaryTierManager,
            job_result=tiering.JobResult,
            hit=offload.LookupResult.HIT,
            miss=offload.LookupResult.MISS,
            retry=offload.LookupResult.RETRY,
            request_context=offload.RequestOffloadingContext,
            storage=offload.Medium.STORAGE,
            locality=offload.Locality,
            event=offload.OffloadingEvent,
            counter=offload.OffloadingCounterMetadata,
            stats=OffloadingConnectorStats,
        )


class TierEvents:
    """What came into the store and left it, as vLLM's events have it; nothing unless ``enabled``."""

    def __init__(self, attached: AttachedStore, enabled: bool) -> None:
        self._attached = attached
        self._enabled = enabled and attached.store is not None
        self._since: object = None
        for _ in self._batch():  # what was there before is not news
            pass

    def take(self, groups: Mapping[bytes, int]) -> Iterator[tuple[list[bytes], bool]]:
        """Keys and whether they are gone; ``groups``: the cache group of each namespace of the tier, by digest."""
        for event in self._batch():
            group = groups.get(event.namespace)
            if group is None:
                continue
            if event.kind is EventKind.CLEARED:
                logger.warning("cache group %d was cleared, which no event of vLLM says: its subscribers believe otherwise", group)
                continue
            yield [join_key(group, key) for key in event.keys], event.kind is EventKind.REMOVED

    def _batch(self) -> list[StoreEvent]:
        events: Callable[[object], Any] | None = getattr(self._attached.store, "events", None) if self._enabled else None
        if events is None:
            return []
        try:
            batch = events(self._since)
        except KvlodeError as error:
            logger.warning("the events of the store cannot be had: %s", error)
            return []
        if batch.missed and self._since is not None:
            logger.warning("events of the store were forgotten before vLLM asked for them")
        self._since = batch.next
        return list(batch.events)
