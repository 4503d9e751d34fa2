"""kvlode: a storage engine for the KV cache of LLM inference.

``kvlode.open`` gives a ``Store``; ``store.namespace(kvlode.Namespace(...))`` gives the put/get surface of one family of
blocks (``kvlode.contract`` describes both). SPEC.md describes the bytes on disk.
"""

from __future__ import annotations

import os as _os
from typing import Any as _Any

from .engine import contract
from .engine.config import StoreConfig
from .engine.contract import BlockInfo, BlockSpace, GetJob, PutJob, PutState, PutStatus, Refusal, Status, Store
from .engine.jobs import CompletionQueue
from .engine.memory_store import MemoryStore
from .engine.opening import follow_store, open_store
from .engine.store import DiskStore
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


def open(
    path: str | _os.PathLike[str],
    capacity: int | str = "64GiB",
    buffer: int | str = "1GiB",
    gds: str = "auto",
    on_locked: str = "fail",
    **options: _Any,
) -> DiskStore:
    """Open or create the store in folder ``path``.

    ``capacity`` caps everything below the folder, ``buffer`` is DRAM for dirty and recently used blocks (bytes, or text
    such as ``"200GiB"``). ``gds``: ``auto`` uses GPUDirect Storage where it works, ``require`` fails without it, ``off`` is
    plain O_DIRECT. ``on_locked``: what to do while another process writes to the store: ``fail``, ``wait`` or ``follow``
    (read beside it). Further ``options`` are the fields of ``StoreConfig``.

    Raises ``InvalidConfig``, ``UnsupportedFormat`` (not a store, or a newer one), ``CorruptRecord`` (damaged superblock),
    ``StoreLocked``, ``PathUnavailable``, ``DeviceError``; nothing on disk was changed then.
    """
    config = StoreConfig.build(capacity=capacity, buffer=buffer, gds=gds, on_locked=on_locked, **options)
    return open_store(path, config)


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
    "FormatError",
    "GetJob",
    "InvalidBlock",
    "InvalidConfig",
    "InvalidKey",
    "KvlodeError",
    "MemoryStore",
    "Namespace",
    "NoSpace",
    "PathUnavailable",
    "PutJob",
    "PutState",
    "PutStatus",
    "Refusal",
    "Status",
    "Store",
    "StoreClosed",
    "StoreConfig",
    "StoreFailed",
    "StoreLocked",
    "UnsupportedFormat",
    "contract",
    "follow",
    "open",
    "prefix_keys",
]
