"""Stores for tests: on a given device (usually in memory), with an injected clock and the in-memory index."""

from __future__ import annotations

from typing import Any

from ..gds.device import Device
from .config import StoreConfig
from .index import Index
from .index_memory import MemoryIndex
from .opening import Environment, open_store
from .store import DiskStore

STORE_PATH = "/store"


class ManualClock:
    """A clock that only moves when told to. ``now_ns`` starts at 2026-01-01 UTC."""

    def __init__(self, now_ns: int = 1_767_225_600_000_000_000) -> None:
        self._start_ns = now_ns
        self._now_ns = now_ns

    def advance(self, seconds: float) -> None:
        self._now_ns += int(seconds * 1e9)

    def now_ns(self) -> int:
        return self._now_ns

    def monotonic_s(self) -> float:
        return (self._now_ns - self._start_ns) / 1e9


def open_on_device(device: Device, *, index: Index | None = None, clock: Any = None, path: str = STORE_PATH, **options: Any) -> DiskStore:
    """The real store on a device of the test's choice. Small by default: 1 MiB segments, 64 MiB capacity, 8 MiB buffer.

    Pass the same ``index`` (or its ``crash()``) again to reopen with it; without one the index starts empty and is rebuilt.
    The device stays open when the store is closed.
    """
    small: dict[str, Any] = {
        "capacity": 64 << 20,
        "buffer": 8 << 20,
        "segment_bytes": 1 << 20,
        "batch_bytes": 1 << 20,
        "bounce_bytes": 16 << 20,
        "encode_threads": 2,
        "io_threads": 6,
        "reclaim_grace_s": 0.0,
        "flush_after_s": 0.02,
        "put_timeout_s": 10.0,
        "index_kind": "memory",
    }
    config = StoreConfig.build(**(small | options))
    environment = Environment(device=device, clock=clock or ManualClock(), index=MemoryIndex() if index is None else index)
    return open_store(path, config, environment)
