"""SGLang keeps its KV pages in kvlode: a dynamic storage backend of HiCache, on the calls that move whole batches of pages.

Written against SGLang 0.5.23: ``HiCacheStorage`` and ``HiCacheStorageConfig`` of ``sglang/srt/mem_cache/hicache_storage.py``,
loaded by ``StorageBackendFactory`` of ``sglang/srt/mem_cache/storage/backend_factory.py``. SGLang is started with
``--enable-hierarchical-cache --hicache-storage-backend dynamic --hicache-storage-backend-extra-config`` and this JSON::

    {"backend_name": "kvlode", "module_path": "kvlode.adapters.sglang", "class_name": "KvlodeHiCache", "interface_v1": 1,
     "path": "/nvme/kvlode", "capacity": "500GiB"}

One page of SGLang (all layers of ``page_size`` tokens) is one block. Each rank that writes has a store of its own below
``path`` (``capacity`` is that of one rank); the replicas of an MLA model share the store of the rank that SGLang lets write.
This module imports without SGLang; only ``KvlodeHiCache`` itself needs it.
"""

from __future__ import annotations

import collections
import functools
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from ..engine.contract import Block, Refusal, Status
from ..format.errors import InvalidConfig
from ..format.layout import SUPERBLOCK_NAME
from .attached import CLOSE_S, AttachedStore, QuietSpace
from .sglang_pages import WHERE, HostPages, identity_of, namespace_of, shard_of

logger = logging.getLogger("kvlode")

T = TypeVar("T")
P = ParamSpec("P")

TESTED_WITH = "0.5.23"
SETTINGS: dict[str, Any] = {
    "path": None,
    "model": None,  # the folder or the name of the weights, where SGLang's own arguments do not tell
    "revision": None,  # of the weights, instead of a digest of their files
    "load_timeout_s": 10.0,  # for one batch (at most 128 pages); what is late is computed
    "store_timeout_s": 10.0,  # for one batch to find room in the buffer
    "lookup_timeout_s": 1.0,
}
"""The adapter's own settings and their defaults; others are those of ``kvlode.open``."""
OF_SGLANG = frozenset(
    {
        "backend_name", "module_path", "class_name", "interface_v1", "prefetch_threshold", "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token", "hicache_storage_pass_prefix_keys", "tp_lcm_size",
    }
)  # fmt: skip
"""What SGLang itself reads from the same JSON."""

FOLLOW_RETRY_S = 5.0
KV_POOL = "kv"
OPERATIONS_MAX = 1024
"""Measurements kept until SGLang fetches them."""


def _quietly(otherwise: Callable[[Any], T]) -> Callable[[Callable[Concatenate[Any, Any, P], T]], Callable[Concatenate[Any, Any, P], T]]:
    """Whatever goes wrong in a call is logged, and answered with ``otherwise`` of its first argument (the keys)."""

    def wrap(call: Callable[Concatenate[Any, Any, P], T]) -> Callable[Concatenate[Any, Any, P], T]:
        @functools.wraps(call)
        def quiet(self: Any, keys: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return call(self, keys, *args, **kwargs)
            except Exception as error:  # whatever it is: SGLang must not end because of its cache
                logger.error("%s failed, SGLang goes on without the store's answer: %s", call.__name__, error)
                return otherwise(keys)

        return quiet

    return wrap


class HiCacheBackend:
    """All of ``KvlodeHiCache`` but its base class. Thread-safe: SGLang calls from a prefetch and a backup thread at once.

    ``storage_config``: a ``HiCacheStorageConfig``; ``kwargs`` is empty in the tested release. Raises ``InvalidConfig`` for
    wrong settings, here and in ``register_mem_pool_host``; nothing else raises, ever. A store that cannot be opened is misses.

    Keys are SGLang's page hashes. Pages that go through the v1 calls and flat pages that go through the generic ones have
    their bytes in another order, so they are two namespaces; ``exists`` and ``batch_exists`` speak of the one that
    ``interface_v1`` makes SGLang use.
    """

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        given = dict(storage_config.extra_config or {})
        self._config = storage_config
        self._settings = SETTINGS | {name: given[name] for name in SETTINGS if name in given}
        self._options = {name: value for name, value in given.items() if name not in OF_SGLANG and name not in SETTINGS}
        self._uses_pages = bool(given.get("interface_v1", 0))
        self._identity = identity_of(storage_config, self._settings)
        _check_timeouts(self._settings)
        if not self._uses_pages:
            logger.warning('%s: without "interface_v1": 1 SGLang copies every page twice', WHERE)
        self.writes = bool(storage_config.is_storage_writer)
        self._lock = threading.Lock()
        self._closed = False
        self._side_pools: list[str] = []
        self._host_pages: HostPages | None = None
        self._spaces: dict[bool, QuietSpace] = {}
        self._follow_again_s = 0.0
        self._read: collections.deque[tuple[int, float]] = collections.deque(maxlen=OPERATIONS_MAX)
        self._written: collections.deque[tuple[int, float]] = collections.deque(maxlen=OPERATIONS_MAX)
        self._attached = self._attach()

    # --- the store ----------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> str | None:
        """This rank's store."""
        path = self._settings["path"]
        return os.path.join(path, shard_of(self._config)) if isinstance(path, str) and path else path

    def _attach(self) -> AttachedStore:
        options = {"put_timeout_s": self._settings["store_timeout_s"]} | self._options | {"path": self.folder}
        if self.writes or not self.folder or not isinstance(self.folder, str):
            return AttachedStore.open(options, where=WHERE)
        if not os.path.exists(os.path.join(self.folder, SUPERBLOCK_NAME)):
            return AttachedStore(None, "the rank that writes has not made its store yet")
        return AttachedStore.open(options, where=WHERE, follow=True)

    def _follow_if_possible(self) -> None:
        """A replica may have been started before the rank that writes had made the store."""
        if self.writes or self._attached.store is not None or time.monotonic() < self._follow_again_s:
            return
        with self._lock:
            if self._closed or self._attached.store is not None or time.monotonic() < self._follow_again_s:
                return
            self._attached = self._attach()
            self._follow_again_s = time.monotonic() + FOLLOW_RETRY_S
            self._open_spaces()

    def _open_spaces(self) -> None:
        pages = self._host_pages
        if pages is not None:
            orders = {True: "pages", False: "flat"}
            namespaces = {of_pages: namespace_of(self._config, pages, self._identity, order=order) for of_pages, order in orders.items()}
            self._spaces = {of_pages: self._attached.space(namespace) for of_pages, namespace in namespaces.items()}

    def _space(self, of_pages: bool) -> QuietSpace | None:
        """``None`` before a pool was registered, after ``close``, and where a part of every page would be missing."""
        self._follow_if_possible()
        return None if self._closed or self._side_pools else self._spaces.get(of_pages)

    # --- pools --------------------------------------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The pool that pages are read into and written from. Raises ``InvalidConfig`` when the store has no room for its pages."""
        try:
            pages = HostPages(mem_pool_host)
        except InvalidConfig:
            raise
        except Exception as error:
            logger.error("%s has no pages that can be stored, every lookup is a miss: %s", type(mem_pool_host).__name__, error)
            return
        with self._lock:
            self.mem_pool_host, self._host_pages = mem_pool_host, pages
            self._open_spaces()

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Models with state beside their KV pages (sliding windows, Mamba, a draft model) are not stored: a page alone restores nothing."""
        name = str(getattr(host_pool_name, "value", host_pool_name))
        if name != KV_POOL and name not in self._side_pools:
            self._side_pools.append(name)
            logger.warning("the host pool %r is not stored, so this model is not: every lookup is a miss", name)

    def on_host_pools_registered(self) -> None:
        """Nothing is left to do."""

    # --- batches of pages -----------------------------------------------------------------------------------------------

    @_quietly(lambda keys: 0)
    def batch_exists(self, keys: Sequence[str], extra_info: Any = None) -> int:
        """Length of the run of stored pages from the front. Asks the index in the background and waits ``lookup_timeout_s`` at most."""
        space = self._space(self._uses_pages)
        return 0 if space is None or not keys else space.stored_prefixes([_idents(keys)], self._settings["lookup_timeout_s"])[0]

    @_quietly(lambda keys: [False] * len(keys))
    def batch_get_v1(self, keys: Sequence[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Read pages into the host pool; True for those whose every byte is there. ``host_indices``: integers, a page's worth a key.

        After the call nothing writes to the pool any more, also when ``load_timeout_s`` has passed.
        """
        space = self._space(True)
        if space is None or self._host_pages is None or not keys:
            return [False] * len(keys)
        return self._get(space, keys, self._host_pages.blocks(host_indices, len(keys)))

    @_quietly(lambda keys: [False] * len(keys))
    def batch_set_v1(self, keys: Sequence[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Copy pages out of the host pool; True for those that are, or were, stored. SGLang reuses the pages at once.

        A rank that only replicates what another one stores answers True and stores nothing.
        """
        if not self.writes:
            return [True] * len(keys)
        space = self._space(True)
        if space is None or self._host_pages is None or not keys:
            return [False] * len(keys)
        prefix = getattr(extra_info, "prefix_keys", None)
        return self._put(space, keys, self._host_pages.blocks(host_indices, len(keys)), prefix[-1] if prefix else None)

    def batch_exists_v2(self, keys: Sequence[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        """Without side pools like ``batch_exists``; with them nothing is ever stored."""
        result = importlib.import_module("sglang.srt.mem_cache.hicache_storage").PoolTransferResult
        return result(0 if pool_transfers else self.batch_exists(keys, extra_info), {})

    def batch_get_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        """Side pools are not stored."""
        return {transfer.name: [False] * len(transfer.keys or ()) for transfer in transfers}

    def batch_set_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        """Side pools are not stored."""
        return self.batch_get_v2(transfers)

    # --- one page or several, as flat tensors -----------------------------------------------------------------------------

    @_quietly(lambda key: False)
    def exists(self, key: str) -> bool:
        return bool(self.batch_exists([key]))

    @_quietly(lambda key: None)
    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """The page, in ``target_location`` (a contiguous tensor in host memory) or a new tensor; ``None`` when it is not there."""
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    @_quietly(lambda keys: [None] * len(keys))
    def batch_get(self, keys: Sequence[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        """See ``get``; one tensor or ``None`` a key."""
        space = self._space(False)
        if space is None or self._host_pages is None or not keys:
            return [None] * len(keys)
        targets = target_locations
        if targets is None:
            targets = [self.mem_pool_host.get_dummy_flat_data_page() for _ in keys]
        good = self._get(space, keys, list(targets))
        return [target if came else None for target, came in zip(targets, good, strict=True)]

    @_quietly(lambda key: False)
    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Store one flat page; False when it is not."""
        return self.batch_set([key], [value])

    @_quietly(lambda keys: False)
    def batch_set(self, keys: Sequence[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None) -> bool:
        """Store flat pages (tensors); True when all of them are stored."""
        if not self.writes:
            return True
        space = self._space(False)
        if space is None or values is None or any(value is None for value in values):
            return False
        return all(self._put(space, keys, [value.contiguous() for value in values], None))

    # --- both ---------------------------------------------------------------------------------------------------------

    def _get(self, space: QuietSpace, keys: Sequence[str], outs: Sequence[Block]) -> list[bool]:
        started_s = time.monotonic()
        good = [status is Status.HIT for status in space.get_many_into(_idents(keys), outs, timeout=self._settings["load_timeout_s"])]
        self._measure(self._read, sum(good), started_s)
        return good

    def _put(self, space: QuietSpace, keys: Sequence[str], blocks: Sequence[Block], parent: str | None) -> list[bool]:
        """Copies, so that the pages are SGLang's again: borrowed ones could not be given back when a drive hangs."""
        started_s = time.monotonic()
        good: list[bool] = []
        before = parent.encode() if parent else None
        late = False
        for ident, block in zip(_idents(keys), blocks, strict=True):
            if not late:
                status = space.submit_put([ident], [block], parent=before, own="copy").statuses[0]
                late = status.reason is Refusal.BUFFER_FULL or time.monotonic() - started_s > self._settings["store_timeout_s"]
                good.append(bool(status))
            else:
                good.append(False)
            before = ident
        self._measure(self._written, sum(good), started_s)
        return good

    def _measure(self, operations: collections.deque[tuple[int, float]], pages: int, started_s: float) -> None:
        if pages and self._host_pages is not None:
            operations.append((pages, pages * self._host_pages.page_bytes / max(time.monotonic() - started_s, 1e-9)))

    # --- life ---------------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget all pages of this model and rank, durably. Where another rank writes, it does."""
        for space in self._spaces.values() if self.writes and not self._closed else ():
            space.drop()

    def get_stats(self) -> Any:
        """SGLang's ``StorageMetrics`` (pages an operation, GB/s) of what was moved since the last call; ``None`` outside SGLang."""
        module = sys.modules.get("sglang.srt.observability.metrics_collector")
        if module is None or not self._config.enable_storage_metrics:
            return None
        read, written = _taken(self._read), _taken(self._written)
        return module.StorageMetrics(
            prefetch_pgs=[pages for pages, _ in read],
            backup_pgs=[pages for pages, _ in written],
            prefetch_bandwidth=[rate / 1e9 for _, rate in read],
            backup_bandwidth=[rate / 1e9 for _, rate in written],
        )

    def store_stats(self) -> Any:
        """The counters of the store, see ``Store.stats``."""
        return self._attached.stats()

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Make durable what was stored; SGLang does not call it."""
        return self._attached.flush(timeout_s)

    def close(self) -> None:
        """Write out what was stored and let go of the store. May be called twice, and beside other calls: they miss."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._attached.close()


def _idents(keys: Sequence[str]) -> list[bytes]:
    return [key.encode() for key in keys]


def _taken(operations: collections.deque[tuple[int, float]]) -> list[tuple[int, float]]:
    """What was measured until now; other threads go on measuring."""
    return [operations.popleft() for _ in range(len(operations))]


def _check_timeouts(settings: dict[str, Any]) -> None:
    for name in ("load_timeout_s", "store_timeout_s", "lookup_timeout_s"):
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise InvalidConfig(f"{name} cannot be used", where=WHERE, expected="a positive number of seconds", actual=repr(value))


@functools.cache
def _hicache_class() -> type:
    base = importlib.import_module("sglang.srt.mem_cache.hicache_storage").HiCacheStorage
    return type("KvlodeHiCache", (HiCacheBackend, base), {"__doc__": HiCacheBackend.__doc__, "__module__": __name__})


def __getattr__(name: str) -> Any:
    """``KvlodeHiCache``: ``HiCacheBackend`` as the ``HiCacheStorage`` that SGLang loads. Raises ``ImportError`` without SGLang."""
    if name == "KvlodeHiCache":
        return _hicache_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
