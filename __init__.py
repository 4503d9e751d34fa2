"""kvlode: a storage engine for the KV cache of LLM inference.

``kvlode.open`` gives a ``Store``; ``store.namespace(kvlode.Namespace(...))`` gives the put/get surface of one family of
blocks (``kvlode.contract`` describes both). SPEC.md describes the bytes on disk.
"""

from __future__ import annotations

import os as _os
from collections.abc import Sequence as _Sequence
from typing import Any as _Any
from typing import overload as _overload

from .engine import contract
from .engine.config import StoreConfig
from .engine.contract import BlockInfo, BlockSpace, GetJob, LoadEstimate, PurgeReport, PutJob, PutState, PutStatus, Refusal, Status, Store
from .engine.events import EventBatch, EventKind, StoreEvent
from .engine.jobs import CompletionQueue
from .engine.limits import Limits
from .engine.memory_store import MemoryStore
from .engine.opening import follow_store, open_store
from .engine.store import DiskStore
from .engine.store_set import StoreSet, open_set
from .format.errors import (
    CorruptRecord,
    DeviceError,
    FormatError,
    InvalidBlock,
    InvalidConfig,
    InvalidKey,
    KvlodeError,
    NoSpace,
    PathUnavailable,
    StoreClosed,
    StoreFailed,
    StoreLocked,
    UnsupportedFormat,
)
from .format.keys import prefix_keys
from .format.namespace import Namespace

__version__ = "0.1.0"


@_overload
def open(
    path: str | _os.PathLike[str],
    capacity: int | str = "64GiB",
    buffer: int | str = "1GiB",
    gds: str = "auto",
    on_locked: str = "fail",
    **options: _Any,
) -> DiskStore: ...


@_overload
def open(
    path: _Sequence[str | _os.PathLike[str]],
    capacity: int | str = "64GiB",
    buffer: int | str = "1GiB",
    gds: str = "auto",
    on_locked: str = "fail",
    *,
    own: int = 1,
    **options: _Any,
) -> StoreSet: ...


def open(
    path: str | _os.PathLike[str] | _Sequence[str | _os.PathLike[str]],
    capacity: int | str = "64GiB",
    buffer: int | str = "1GiB",
    gds: str = "auto",
    on_locked: str = "fail",
    *,
    own: int = 1,
    **options: _Any,
) -> DiskStore | StoreSet:
    """Open or create the store in folder ``path``, or the store set of a list of folders.

    ``capacity`` caps everything below the folder, ``buffer`` is DRAM for dirty and recently used blocks (bytes, or text
    such as ``"200GiB"``). ``gds``: ``auto`` uses GPUDirect Storage where it works, ``require`` fails without it, ``off`` is
    plain O_DIRECT. ``on_locked``: what to do while another process writes to the store: ``fail``, ``wait`` or ``follow``
    (read beside it). Further ``options`` are the fields of ``StoreConfig``.

    Of a list, the first ``own`` folders are written by this process, which spreads its blocks over them, and the others are read
    beside their writers; a folder of the others that is not there yet, or not any more, costs what it holds and nothing else.
    Options apply to each store: two own folders take twice the ``capacity`` and the ``buffer``.

    Raises ``InvalidConfig``, ``UnsupportedFormat`` (not a store, or a newer one), ``CorruptRecord`` (damaged superblock),
    ``StoreLocked``, ``PathUnavailable``, ``DeviceError``; nothing on disk was changed then. Of a list, only own folders raise.
    """
    config = StoreConfig.build(capacity=capacity, buffer=buffer, gds=gds, on_locked=on_locked, **options)
    if isinstance(path, (str, _os.PathLike)):
        if own != 1:
            raise InvalidConfig("own is for a list of folders", expected="1 for a single folder", actual=own)
        return open_store(path, config)
    return open_set(path, config, own=own)


def follow(path: str | _os.PathLike[str], **options: _Any) -> DiskStore:
    """Open a store for reading beside its writer in another process.

    Puts are refused; what the writer has committed is seen by a lookup within 50 ms.
    """
    return follow_store(path, StoreConfig.build(**options))


__all__ = [
    "BlockInfo",
    "BlockSpace",
    "CompletionQueue",
    "CorruptRecord",
    "DeviceError",
    "DiskStore",
    "EventBatch",
    "EventKind",
    "FormatError",
    "GetJob",
    "InvalidBlock",
    "InvalidConfig",
    "InvalidKey",
    "KvlodeError",
    "Limits",
    "LoadEstimate",
    "MemoryStore",
    "Namespace",
    "NoSpace",
    "PathUnavailable",
    "PurgeReport",
    "PutJob",
    "PutState",
    "PutStatus",
    "Refusal",
    "Status",
    "Store",
    "StoreClosed",
    "StoreConfig",
    "StoreEvent",
    "StoreFailed",
    "StoreLocked",
    "StoreSet",
    "UnsupportedFormat",
    "contract",
    "follow",
    "open",
    "prefix_keys",
]
