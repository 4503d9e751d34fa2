"""kvlode as a storage plug-in inside the engine's process: ``KvlodeBackend`` for LMCache's ``storage_plugins``.

    storage_plugins: ["kvlode"]
    extra_config:
      storage_plugin.kvlode.module_path: kvlode.adapters.lmcache_plugin
      storage_plugin.kvlode.class_name: KvlodeBackend
      kvlode: {path: /nvme/kv, capacity: 2TiB}

Written for and tested with LMCache 0.5.6 (``lmcache/v1/storage_backend/abstract_backend.py``, ``StoragePluginInterface``). Chunks are
stored from LMCache's host memory without a copy; a load allocates from ``local_cpu_backend`` and reads into that. A namespace is one
model, rank, dtype, memory format and chunk layout. With several ranks each has a store of its own, the folder ``rank-N`` in ``path``.

LMCache's default hash of chunks is Python's, which differs from process to process unless ``PYTHONHASHSEED`` is set: set it, or
``pre_caching_hash_algorithm: sha256_cbor``. LMCache logs why a plug-in was not created and goes on without it: look at its log.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, ClassVar

from ..engine.contract import Status
from ..format.errors import InvalidConfig, KvlodeError
from ..gds.threads import WorkerPool
from .attached import CLOSE_S, AttachedStore, QuietSpace
from .lmcache_chunks import Chunks
from .lmcache_identity import Revisions, Spaces, engine_key, engine_namespace, taken
from .lmcache_lane import Lane, Part, Task, TaskKind
from .lmcache_leases import LEASE_S, Leases
from .transfers import LOAD_TIMEOUT_S

logger = logging.getLogger("kvlode")

WHERE = "LMCache's extra_config, kvlode"
LOOKUP_TIMEOUT_S = 0.25
GRACE_S = 1.0
"""A load is called off by its own deadline; waiting a little longer for that tells it apart from a drive that hangs."""
LOADING_THREADS = 4
OWN_SETTINGS: Mapping[str, Any] = {
    "revision": None,
    "lookup_timeout_s": LOOKUP_TIMEOUT_S,
    "load_timeout_s": LOAD_TIMEOUT_S,
    "lease_s": LEASE_S,
}


@dataclass(frozen=True)
class LmcacheInterface:
    """Classes of LMCache 0.5.6; tests put others in their place."""

    base: type
    """``StoragePluginInterface`` (``storage_backend/abstract_backend.py``)."""
    memory_formats: Mapping[str, Any]
    """Members of ``MemoryFormat`` (``memory_management.py``) by name."""

    @classmethod
    def of_lmcache(cls) -> LmcacheInterface:
        """Of the LMCache that is installed. Raises ``ImportError``."""
        from lmcache.v1.memory_management import MemoryFormat
        from lmcache.v1.storage_backend.abstract_backend import StoragePluginInterface

        return cls(StoragePluginInterface, dict(MemoryFormat.__members__))


class Backend:
    """The methods of ``StoragePluginInterface``. Thread-safe.

    Settings are those of ``extra_config["kvlode"]``: ``path`` and whatever ``kvlode.open`` takes, and of the plug-in itself ``revision`` (a
    text that changes with the weights; without it that of the files, where the model's name is a folder), ``lookup_timeout_s``,
    ``load_timeout_s``, ``lease_s`` (how long a pin holds that LMCache forgot). Raises ``InvalidConfig`` for settings that cannot be, and
    for layerwise MLA and blending, whose chunks need more than their bytes. After that nothing raises.
    """

    _lmcache: ClassVar[LmcacheInterface]

    def __init__(
        self, config: Any = None, metadata: Any = None, local_cpu_backend: Any = None, loop: Any = None, dst_device: str = "cpu"
    ) -> None:
        self._lmcache.base.__init__(  # type: ignore[misc]
            self, dst_device=dst_device, config=config, metadata=metadata, local_cpu_backend=local_cpu_backend, loop=loop
        )
        if config is None or metadata is None:
            raise InvalidConfig("the plug-in needs LMCache's configuration and metadata", where=WHERE)
        own, options = taken(_settings(config), OWN_SETTINGS, WHERE)
        self._allocator = local_cpu_backend
        self._chunks = Chunks(config, metadata, self._lmcache.memory_formats, WHERE)
        if metadata.world_size > 1 and isinstance(options.get("path"), str) and options["path"]:
            options["path"] = os.path.join(options["path"], f"rank-{metadata.worker_id}")
        self._attached = AttachedStore.open(options, where=WHERE, follow=metadata.role == "scheduler")
        self._spaces = Spaces(self._attached)
        self._revisions = Revisions(own["revision"])
        self._lookup_timeout_s, self._load_timeout_s = float(own["lookup_timeout_s"]), float(own["load_timeout_s"])
        self._leases = Leases(own["lease_s"])
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._running: dict[int, Future[Task]] = {}
        self._putting: set[Any] = set()
        self._closing = threading.Lock()
        self._closed, self._memory_is_free = False, False
        self._loads = WorkerPool("kvlode-lmcache-load", LOADING_THREADS)
        self._lane = Lane(
            self._split, self._over, self._leases, lookup_timeout_s=self._lookup_timeout_s, load_timeout_s=self._load_timeout_s
        )
        self._close_before(local_cpu_backend)

    def __str__(self) -> str:
        return "KvlodeBackend"

    # --- lookups ------------------------------------------------------------------------------------------------------------

    def contains(self, key: Any, pin: bool = False) -> bool:
        """Whether a chunk is stored; waits for the index for at most ``lookup_timeout_s``. ``pin``: see there."""
        return self.batched_contains([key], pin) == 1

    def batched_contains(self, keys: Sequence[Any], pin: bool = False) -> int:
        """Length of the run of stored chunks from the front."""
        found = 0
        for space, group in itertools.groupby(keys, self._space):
            wanted = list(group)
            here = space.stored_prefixes([list(map(engine_key, wanted))], self._lookup_timeout_s)[0] if space is not None else 0
            found += here
            if here < len(wanted):
                break
        if pin:
            self._pin(keys[:found])
        return found

    async def batched_async_contains(self, lookup_id: str, keys: Sequence[Any], pin: bool = False) -> int:
        """``batched_contains`` for the event loop, which goes on meanwhile."""
        count: int = await self._on_thread(lambda: self.batched_contains(keys, pin), 0, lambda count: None)
        return count

    def exists_in_put_tasks(self, key: Any) -> bool:
        """Whether a chunk is being written."""
        return key in self._putting

    def touch_cache(self) -> None:
        """Nothing: the store counts loads as uses by itself."""

    # --- pins ---------------------------------------------------------------------------------------------------------------

    def pin(self, key: Any) -> bool:
        """Keep a chunk from being reclaimed until ``unpin``, as often as it was pinned, or for ``lease_s``; False if it is not stored."""
        return self.contains(key, pin=True)

    def unpin(self, key: Any) -> bool:
        """Never fails."""
        self._lane.run_in_background(lambda: self._leases.give_back(key))
        return True

    def _pin(self, keys: Sequence[Any]) -> None:
        def hold() -> None:
            for space, group in itertools.groupby(keys, self._space):
                if space is not None:
                    names = list(group)
                    self._leases.hold(space, list(map(engine_key, names)), names)

        if keys:
            self._lane.run_in_background(hold)  # pins and unpins in the order they came, and neither waits for the index here

    # --- stores -------------------------------------------------------------------------------------------------------------

    def batched_submit_put_task(
        self,
        keys: Sequence[Any],
        objs: Sequence[Any],
        transfer_spec: Any = None,
        on_complete_callback: Callable[[Any], None] | None = None,
    ) -> list[Future[Any]] | None:
        """Write chunks in the background; each ``MemoryObj`` has one reference more until its bytes are durable or refused.

        ``None`` when there is nothing to write: what is being written, or is no whole chunk of this model's layout. The callback is
        called for each chunk that is stored, on a thread of the plug-in.
        """
        taken_keys, taken_objects = [], []
        for key, memory_object in zip(keys, objs, strict=False):
            if not self._chunks.fit(memory_object):
                continue
            with self._lock:
                if key in self._putting:
                    continue
                self._putting.add(key)
            memory_object.ref_count_up()
            taken_keys.append(key)
            taken_objects.append(memory_object)
        if not taken_keys:
            return None
        told: Future[None] = Future()
        stored = self._start(TaskKind.STORE, taken_keys, taken_objects)
        stored.add_done_callback(lambda done: self._stored(done.result(), on_complete_callback, told))
        return [told]

    def _stored(self, task: Task, callback: Callable[[Any], None] | None, told: Future[None]) -> None:
        for key, memory_object, good in zip(task.keys, task.objects, task.good, strict=True):
            memory_object.ref_count_down()
            with self._lock:
                self._putting.discard(key)
            if good and callback is not None:
                try:
                    callback(key)
                except Exception as error:
                    logger.warning("LMCache's callback after a store failed: %s", error)
        told.set_result(None)

    def remove(self, key: Any, force: bool = True) -> bool:
        """Remove a chunk, in the background; False if it is not stored, or pinned and not ``force``."""
        space = self._space(key)
        if space is None or not self.contains(key) or (not force and self._leases.is_held(key)):
            return False
        self._lane.run_in_background(lambda: space.delete([engine_key(key)]))
        return True

    # --- loads --------------------------------------------------------------------------------------------------------------

    def get_blocking(self, key: Any) -> Any | None:
        """A ``MemoryObj`` with one reference, the caller's, or ``None``."""
        return self.batched_get_blocking([key])[0]

    def batched_get_blocking(self, keys: Sequence[Any]) -> list[Any | None]:
        """One a key. Waits for at most two times ``load_timeout_s`` (and a second each), not for memory: without room it is a miss."""
        found = self._load(keys, [self._chunks.tokens] * len(keys))
        shorter = [position for position, item in enumerate(found) if item is Status.WRONG_SIZE]
        tokens = [self._tokens_of(keys[position]) for position in shorter]
        again = self._load([keys[position] for position in shorter], tokens) if shorter else []
        for position, item in zip(shorter, again, strict=True):
            found[position] = item
        return [None if isinstance(item, Status) else item for item in found]

    async def batched_get_non_blocking(self, lookup_id: str, keys: Sequence[Any], transfer_spec: Any = None) -> list[Any]:
        """The run of chunks from the front that could be loaded; what the lookup before it pinned is unpinned."""
        try:
            found: list[Any] = await self._on_thread(lambda: self._load_prefix(keys), [], _give_up)
            return found
        finally:
            for key in keys:
                self.unpin(key)

    def _load_prefix(self, keys: Sequence[Any]) -> list[Any]:
        found = self.batched_get_blocking(keys)
        length = next((position for position, item in enumerate(found) if item is None), len(found))
        _give_up(found[length:])
        return found[:length]

    def _load(self, keys: Sequence[Any], tokens: Sequence[int]) -> list[Any]:
        """Per key a filled ``MemoryObj`` or the ``Status`` that says why there is none."""
        objects = list(self._allocated(tokens))
        future = self._start(TaskKind.LOAD, keys[: len(objects)], objects)
        try:
            task = future.result(self._load_timeout_s + GRACE_S)
        except TimeoutError:
            logger.warning("loading %d chunks was given up; their memory is free again once the drive answers", len(objects))
            future.add_done_callback(lambda done: _give_up(done.result().objects))
            return [Status.PENDING] * len(keys)
        found: list[Any] = [Status.PENDING] * len(keys)
        for position, (item, good, status) in enumerate(zip(task.objects, task.good, task.statuses, strict=True)):
            if good:
                found[position] = item
            else:
                item.ref_count_down()
                found[position] = Status.MISS if status is None else status
        return found

    def _allocated(self, tokens: Sequence[int]) -> Iterator[Any]:
        """Objects until the allocator has no more room. It may evict from LMCache's own memory, and does not wait."""
        for count in tokens:
            if not count or self._allocator is None:
                return
            try:
                made = self._allocator.allocate(self._chunks.shapes(count), self._chunks.dtypes(), self._chunks.format, busy_loop=False)
            except Exception as error:
                logger.error("LMCache gives no memory for a chunk: %s", error)
                return
            if made is None:
                return
            yield made

    def _tokens_of(self, key: Any) -> int:
        """Tokens of a chunk that is no whole one, from the length that the index has of it; 0 where this cannot be."""
        space = self._space(key)
        raw_bytes = space.estimate([engine_key(key)]).raw_bytes if space is not None else 0
        tokens, rest = divmod(raw_bytes, self._chunks.token_bytes())
        return tokens if not rest and tokens < self._chunks.tokens else 0

    # --- the rest -----------------------------------------------------------------------------------------------------------

    def get_allocator_backend(self) -> Any:
        """``local_cpu_backend``: chunks are stored from it and loaded into it."""
        return self._allocator

    def close(self) -> None:
        """Wait (at most 30 s for each step) until no job uses LMCache's memory, then close the store."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._loads.shutdown(CLOSE_S)
            self._memory_is_free = self._lane.close(CLOSE_S)
            if not self._memory_is_free:
                logger.error("LMCache: %d jobs did not end in %.0f s; the drive may still use their memory", self._lane.pending, CLOSE_S)
            self._leases.close()
            self._attached.close()

    def _close_before(self, allocator: Any) -> None:
        """LMCache closes its memory before its plug-ins, and frees it under the jobs that use it: make it wait for these."""
        closing = getattr(allocator, "close", None)
        if closing is None:
            return

        def close() -> None:
            self.close()
            if self._memory_is_free:
                closing()

        allocator.close = close

    async def _on_thread(self, call: Callable[[], Any], otherwise: Any, dispose: Callable[[Any], object]) -> Any:
        """What ``call`` gives on a thread of the plug-in. ``dispose`` takes it when nobody waits for it any more."""
        try:
            future = self._loads.submit(call)
        except KvlodeError:  # closed
            return otherwise
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            future.add_done_callback(lambda done: None if done.cancelled() or done.exception() else dispose(done.result()))
            raise
        except Exception as error:
            logger.error("LMCache: a lookup or load failed: %s", error)
            return otherwise

    def _start(self, kind: TaskKind, keys: Sequence[Any], objects: Sequence[Any]) -> Future[Task]:
        task = Task(next(self._numbers), kind, list(keys), list(objects))
        future: Future[Task] = Future()
        with self._lock:
            self._running[task.number] = future
        self._lane.submit(task)
        return future

    def _over(self, task: Task) -> None:
        with self._lock:
            future = self._running.pop(task.number)
        future.set_result(task)

    def _split(self, task: Task) -> Sequence[Part]:
        parts: dict[QuietSpace, Part] = {}
        for position, key in enumerate(task.keys):
            space = self._space(key)
            if space is not None:
                part = parts.setdefault(space, Part(space))
                part.positions.append(position)
                part.keys.append(engine_key(key))
        return list(parts.values())

    def _space(self, key: Any) -> QuietSpace | None:
        layout = self._chunks.layout(self._chunks.tokens)
        identity = (key.model_name, key.world_size, key.worker_id, str(key.dtype), layout)

        def describe() -> Any:
            revision = self._revisions.of(key.model_name)
            return engine_namespace(key, layout, self._chunks.format_name, self._chunks.tokens, revision)

        return self._spaces.of(identity, describe)


def _give_up(objects: Sequence[Any]) -> None:
    for memory_object in objects:
        if memory_object is not None:
            memory_object.ref_count_down()


def _settings(config: Any) -> Mapping[str, Any]:
    settings = (config.extra_config or {}).get("kvlode")
    if not isinstance(settings, Mapping):
        raise InvalidConfig("the plug-in has no settings", where=WHERE, expected="a mapping with path: a folder", actual=repr(settings))
    return settings


def backend_class(lmcache: LmcacheInterface) -> type:
    """``KvlodeBackend`` for one LMCache: the methods of ``Backend`` over LMCache's base class."""
    return type("KvlodeBackend", (Backend, lmcache.base), {"_lmcache": lmcache, "__module__": __name__, "__doc__": Backend.__doc__})


def __getattr__(name: str) -> Any:
    """``KvlodeBackend``, made once. Raises ``ImportError`` without LMCache."""
    if name != "KvlodeBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = backend_class(LmcacheInterface.of_lmcache())
    return made
