"""kvlode as an L2 adapter of LMCache's multiprocess server: ``KvlodeL2``, loaded by LMCache's plug-in type.

    lmcache server ... --l2-adapter '{"type": "plugin", "module_path": "kvlode.adapters.lmcache_l2", "class_name": "KvlodeL2",
        "adapter_params": {"path": "/nvme/kv", "capacity": "2TiB"}}'

Written for and tested with LMCache 0.5.6 (``lmcache/v1/distributed/l2_adapters/base.py``, ``plugin_l2_adapter.py``). An object is
stored as it lies in LMCache's L1 memory, without a copy. A namespace is one model, ``kv_rank``, object group and layout (shapes and
dtypes, which lookups bring along), so that objects of another dtype are never found. With LMCache's ``serde`` lookups do not tell what
is stored: set ``"serialized": true``, and ``revision`` to a text that changes with the serde's settings.

LMCache's own eviction is not needed: the store keeps to its ``capacity`` itself, and the adapter declares none to LMCache.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..engine.contract import PutState, Status
from ..format.errors import InvalidConfig
from ..format.namespace import Namespace
from .attached import CLOSE_S, AttachedStore, QuietSpace
from .lmcache_identity import Layout, Revisions, Spaces, object_key, object_namespace, taken
from .lmcache_lane import Lane, Part, Task, TaskKind
from .lmcache_leases import LEASE_S, Leases
from .transfers import LOAD_TIMEOUT_S

logger = logging.getLogger("kvlode")

WHERE = "LMCache's --l2-adapter, adapter_params"
LOOKUP_TIMEOUT_S = 1.0
OWN_SETTINGS: Mapping[str, Any] = {
    "revision": None,
    "serialized": False,
    "serialized_bytes_max": 64 << 20,
    "lookup_timeout_s": LOOKUP_TIMEOUT_S,
    "load_timeout_s": LOAD_TIMEOUT_S,
    "lease_s": LEASE_S,
}
RESULTS_KEPT_MAX = 1 << 14
"""Results that LMCache never asks for (it forgets tasks of requests that failed) are forgotten, the oldest first."""
KEYS_KNOWN_MAX = 1 << 18
"""Keys of which the adapter remembers the length, for LMCache's account of users and for listings."""


@dataclass(frozen=True)
class LmcacheInterface:
    """Classes of LMCache 0.5.6; tests put others in their place."""

    base: type
    """``L2AdapterInterface`` (``l2_adapters/base.py``)."""
    bitmap: Callable[[int], Any]
    """``lmcache.lmcache_native.Bitmap``."""
    store_result: Callable[[bool, int], Any]
    """``L2StoreResult`` (``distributed/internal_api.py``)."""
    key_entry: Callable[..., Any]
    key_page: Callable[..., Any]
    """``KeyEntry`` and ``KeyListPage`` (``distributed/api.py``)."""

    @classmethod
    def of_lmcache(cls) -> LmcacheInterface:
        """Of the LMCache that is installed. Raises ``ImportError``."""
        from lmcache.lmcache_native import Bitmap
        from lmcache.v1.distributed.api import KeyEntry, KeyListPage
        from lmcache.v1.distributed.internal_api import L2StoreResult
        from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface

        return cls(L2AdapterInterface, Bitmap, L2StoreResult, KeyEntry, KeyListPage)


class L2Adapter:
    """The methods of ``L2AdapterInterface``. Thread-safe; none waits, except ``close`` (at most 30 s for each of two steps).

    ``config``: ``adapter_params``, which are ``path`` (a folder, or a list of them: a store set) and whatever ``kvlode.open``
    takes, and of the adapter itself: ``revision`` (a text that changes with the weights; without it that of the files, where the model's
    name is a folder), ``serialized`` and ``serialized_bytes_max`` (of one object, 64 MiB; another value finds nothing of what was
    stored before), ``lookup_timeout_s``, ``load_timeout_s``, ``lease_s`` (how long a lock holds that LMCache forgot).
    Raises ``InvalidConfig`` for settings that cannot be; a store that cannot be opened is reported once, and then everything is a miss.
    """

    _lmcache: ClassVar[LmcacheInterface]

    def __init__(self, config: Mapping[str, Any], l1_memory_desc: Any = None) -> None:
        own, options = taken(config, OWN_SETTINGS, WHERE)
        self._lmcache.base.__init__(self, max_capacity_bytes=0)  # type: ignore[misc]
        self._serialized = bool(own["serialized"])
        self._serialized_bytes_max = int(own["serialized_bytes_max"])
        self._attached = AttachedStore.open(options, where=WHERE, sets=True)
        self._spaces = Spaces(self._attached)
        self._revisions = Revisions(own["revision"])
        self._leases = Leases(own["lease_s"])
        self._lock = threading.Lock()
        self._closed = False
        self._next_number = 0
        self._events = {kind: os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for kind in TaskKind}
        self._results: dict[TaskKind, OrderedDict[int, Any]] = {kind: OrderedDict() for kind in TaskKind}
        self._layouts: dict[tuple[str, int, int], Layout] = {}
        self._known: OrderedDict[Any, int] = OrderedDict()
        self._warned = False
        self._lane = Lane(
            self._split, self._over, self._leases, lookup_timeout_s=own["lookup_timeout_s"], load_timeout_s=own["load_timeout_s"]
        )

    # --- event descriptors ------------------------------------------------------------------------------------------------

    def get_store_event_fd(self) -> int:
        """An eventfd that is readable once a store task is over; closed by ``close``, like the other two."""
        return self._events[TaskKind.STORE]

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._events[TaskKind.LOOKUP]

    def get_load_event_fd(self) -> int:
        return self._events[TaskKind.LOAD]

    # --- stores -----------------------------------------------------------------------------------------------------------

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        """``keys``: ``ObjectKey``; ``objects``: a ``MemoryObj`` in host memory each, left alone by LMCache until the task is over."""
        return self._submit(TaskKind.STORE, keys, objects)

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        """Store tasks that are over: good when all of their objects are durable (or were before)."""
        with self._lock:
            done, self._results[TaskKind.STORE] = self._results[TaskKind.STORE], OrderedDict()
        return dict(done)

    # --- lookups ----------------------------------------------------------------------------------------------------------

    def submit_lookup_and_lock_task(self, keys: list[Any], group_layout_descs: Mapping[int, Any]) -> int:
        """``group_layout_descs``: the layout of each object group. For a group without one, the layout that was last seen counts."""
        return self._submit(TaskKind.LOOKUP, keys, layouts=group_layout_descs)

    def query_lookup_and_lock_result(self, task_id: int) -> Any | None:
        """A ``Bitmap`` of the keys that are stored, once; they are not reclaimed before ``submit_unlock``."""
        return self._take(TaskKind.LOOKUP, task_id)

    def submit_unlock(self, keys: list[Any]) -> None:
        """Never fails. A key that was locked several times is unlocked once."""
        for key in keys:
            self._leases.give_back(key)

    # --- loads ------------------------------------------------------------------------------------------------------------

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int:
        """``objects``: a ``MemoryObj`` in host memory each, which is the adapter's until the task is over."""
        return self._submit(TaskKind.LOAD, keys, objects)

    def query_load_result(self, task_id: int) -> Any | None:
        """A ``Bitmap`` of the objects that hold what was stored, checked against its checksum, once. All others hold nothing usable."""
        return self._take(TaskKind.LOAD, task_id)

    # --- keys and status --------------------------------------------------------------------------------------------------

    def delete(self, keys: list[Any]) -> None:
        """Remove objects, in the background. Of keys whose layout this process has not seen there is nothing to remove."""
        self._lane.run_in_background(lambda: self._delete(list(keys)))

    def list_l2_keys(self, model_name: str | None = None, page_size: int = 500, cursor: str | None = None) -> Any:
        """Keys that this process stored (the latest 262,144). Raises ``ValueError`` as LMCache asks, and nothing else."""
        if page_size <= 0:
            raise ValueError(f"page_size must be positive, not {page_size}")
        if cursor is not None and not cursor.isdecimal():
            raise ValueError(f"this cursor was not given by list_l2_keys: {cursor!r}")
        start = int(cursor or 0)
        with self._lock:
            known = [(key, size) for key, size in self._known.items() if model_name is None or key.model_name == model_name]
        page = known[start : start + page_size]
        entries = tuple(self._lmcache.key_entry(key=key.to_encoded_object_key(), size_bytes=size) for key, size in page)
        return self._lmcache.key_page(entries=entries, next_page_token=str(start + page_size) if start + page_size < len(known) else None)

    def report_status(self) -> dict[str, Any]:
        """``is_healthy`` is False without a store, and with one that failed; LMCache then works without it."""
        try:
            stats = {} if self._closed else self._attached.stats()
        except Exception as error:
            stats = {"failure": str(error)}
        return {
            "is_healthy": not self._closed and self._attached.store is not None and stats.get("failure") is None,
            "type": "KvlodeL2",
            "reason": self._attached.reason or stats.get("failure"),
            "role": stats.get("role"),
            "capacity_bytes": stats.get("capacity_bytes", 0),
            "used_bytes": stats.get("used_bytes", 0),
            "pending_tasks": self._lane.pending,
            "locked_key_count": len(self._leases),
            "namespaces": len(self._spaces),
            "counters": dict(stats.get("counters", {})),
        }

    def close(self) -> None:
        """Wait until no task uses LMCache's memory, then close the store and the descriptors. Calling it again changes nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if not self._lane.close(CLOSE_S):
            logger.error("LMCache: %d tasks did not end in %.0f s; the drive may still use their memory", self._lane.pending, CLOSE_S)
        self._leases.close()
        self._attached.close()
        with self._lock:
            for descriptor in self._events.values():
                os.close(descriptor)

    # --- tasks ------------------------------------------------------------------------------------------------------------

    def _submit(self, kind: TaskKind, keys: Sequence[Any], objects: Sequence[Any] = (), layouts: Any = None) -> int:
        with self._lock:
            self._next_number += 1
            number = self._next_number
        self._lane.submit(Task(number, kind, list(keys), list(objects), layouts, serialized=self._serialized))
        return number

    def _take(self, kind: TaskKind, number: int) -> Any | None:
        with self._lock:
            return self._results[kind].pop(number, None)

    def _over(self, task: Task) -> None:
        """Runs on the lane's thread: tell LMCache of the end of a task."""
        if task.kind is TaskKind.STORE:
            result = self._stored(task)
        else:
            result = self._lmcache.bitmap(len(task.keys))
            for position, good in enumerate(task.good):
                if good:
                    result.set(position)
        with self._lock:
            results = self._results[task.kind]
            results[task.number] = result
            while len(results) > RESULTS_KEPT_MAX:
                results.popitem(last=False)
            if not self._closed:
                os.eventfd_write(self._events[task.kind], 1)
        self._notify(task)

    def _stored(self, task: Task) -> Any:
        written = [bool(status) and status.state is not PutState.EXISTS for status in task.statuses]
        size_bytes = sum(size for size, new in zip(task.sizes, written, strict=False) if new)
        return self._lmcache.store_result(all(task.good), size_bytes)

    def _notify(self, task: Task) -> None:
        """LMCache's account of keys: its listeners are called on the lane's thread, and must not end it."""
        good = [key for key, good in zip(task.keys, task.good, strict=True) if good]
        try:
            if task.kind is TaskKind.STORE:
                new = self._learn(task)
                if new:
                    self._base("_notify_keys_stored", [key for key, _ in new], [size for _, size in new])
            elif task.kind is TaskKind.LOOKUP and good:
                self._base("_notify_keys_accessed", good)
            elif task.kind is TaskKind.LOAD:
                gone = (Status.MISS, Status.CORRUPT, Status.EXPIRED)
                self._forget([key for key, status in zip(task.keys, task.statuses, strict=True) if status in gone])
        except Exception as error:
            logger.error("LMCache's listeners failed: %s", error)

    def _base(self, name: str, *arguments: Any) -> None:
        getattr(self, name)(*arguments)

    def _learn(self, task: Task) -> list[tuple[Any, int]]:
        """Keys that were not known to be stored, with their lengths."""
        new: list[tuple[Any, int]] = []
        with self._lock:
            for key, size, good in zip(task.keys, task.sizes, task.good, strict=False):
                if good and key not in self._known:
                    self._known[key] = size
                    new.append((key, size))
            too_many = [self._known.popitem(last=False) for _ in range(len(self._known) - KEYS_KNOWN_MAX)]
        if too_many:  # LMCache's account is of what is known here, or it would only ever grow
            self._base("_notify_keys_deleted", [key for key, _ in too_many], [size for _, size in too_many])
        return new

    def _forget(self, keys: Sequence[Any]) -> None:
        with self._lock:
            gone = [(key, self._known.pop(key)) for key in dict.fromkeys(keys) if key in self._known]
        if gone:
            self._base("_notify_keys_deleted", [key for key, _ in gone], [size for _, size in gone])

    def _delete(self, keys: list[Any]) -> None:
        for key in keys:
            space = self._space(key, None)
            if space is not None and space.contains([object_key(key)])[0]:
                space.delete([object_key(key)])
        self._forget(keys)

    # --- namespaces -------------------------------------------------------------------------------------------------------

    def _split(self, task: Task) -> Sequence[Part]:
        parts: dict[QuietSpace, Part] = {}
        layouts: dict[int, Layout] = {}
        if task.objects:
            if len(task.objects) != len(task.keys):
                raise InvalidConfig("keys and objects differ in number", where=WHERE, expected=len(task.keys), actual=len(task.objects))
        else:
            layouts = {group: Layout.of(desc.shapes, desc.dtypes) for group, desc in (task.layouts or {}).items()}
        for position, key in enumerate(task.keys):
            layout = Layout.of_object(task.objects[position]) if task.objects else layouts.get(key.object_group_id)
            space = self._space(key, layout)
            if space is not None:
                part = parts.setdefault(space, Part(space))
                part.positions.append(position)
                part.keys.append(object_key(key))
        return list(parts.values())

    def _space(self, key: Any, layout: Layout | None) -> QuietSpace | None:
        """Without a layout that which was last seen. ``None`` where nothing can be stored, or where nobody knows the layout."""
        family = (key.model_name, key.kv_rank, key.object_group_id)
        if self._serialized:
            layout = None
        else:
            layout = layout or self._layouts.get(family)
            if layout is None:
                return None
            self._layouts[family] = layout
            if layout.is_plain_bytes and not self._warned:
                self._warned = True
                logger.warning(
                    "LMCache stores rows of bytes, as its serde makes them; lookups will not find these without %r in %s",
                    "serialized: true",
                    WHERE,
                )

        def describe() -> Namespace:
            return object_namespace(key, layout, self._revisions.of(key.model_name), self._serialized_bytes_max)

        return self._spaces.of((family, layout), describe)


def adapter_class(lmcache: LmcacheInterface) -> type:
    """``KvlodeL2`` for one LMCache: the methods of ``L2Adapter`` over LMCache's base class."""
    return type("KvlodeL2", (L2Adapter, lmcache.base), {"_lmcache": lmcache, "__module__": __name__, "__doc__": L2Adapter.__doc__})


def __getattr__(name: str) -> Any:
    """``KvlodeL2``, made once. Raises ``ImportError`` without LMCache."""
    if name != "KvlodeL2":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = adapter_class(LmcacheInterface.of_lmcache())
    return made
