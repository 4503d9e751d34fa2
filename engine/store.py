"""The handle of a store on disk that the host gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..format.errors import InvalidConfig, StoreClosed
from ..format.layout import PAGE_BYTES
from ..format.namespace import Namespace
from .capacity import segment_bytes_for
from .config import StoreConfig
from .contract import PurgeReport
from .core import Core
from .events import EventBatch
from .purge import find_tagged, purge_store
from .reconfigure import reconfigure
from .registry import OpenStore
from .space import Space
from .store_stats import store_stats


class DiskStore:
    """A store on disk (``contract.Store``). Made by ``kvlode.open`` and ``kvlode.follow``; thread-safe.

    Opening the same folder again in one process gives another handle of the same store; it is closed with the last of them.
    """

    def __init__(self, opened: OpenStore) -> None:
        opened.hold(self)
        self._opened = opened
        self._core: Core = opened.core
        self._closed = False

    @property
    def path(self) -> str:
        return self._core.path

    @property
    def config(self) -> StoreConfig:
        return self._core.config

    def namespace(self, descriptor: Namespace) -> Space:
        """See ``contract.Store.namespace``. Raises ``InvalidConfig`` when the store is too small for one such block."""
        self._check_usable()
        if not isinstance(descriptor, Namespace):
            raise InvalidConfig("namespace takes a kvlode.Namespace", expected="Namespace", actual=type(descriptor).__name__)
        if not self._core.follower:
            self._check_block_fits(descriptor)
            self._core.keeper.register_block_bytes(descriptor.block_bytes_max)
        return Space(self._core, self._core.namespaces.register(descriptor))

    def _check_usable(self) -> None:
        if self._closed:
            raise StoreClosed("this handle of the store is closed", where=self.path, action="Open the store again.")
        self._core.check_usable()

    def _check_block_fits(self, descriptor: Namespace) -> None:
        core = self._core
        needed = descriptor.block_bytes_max + 16 * PAGE_BYTES
        segment_bytes = segment_bytes_for(core.config, core.budget, descriptor.block_bytes_max)
        if needed > segment_bytes:
            raise InvalidConfig(
                "the store is too small for a block of this namespace",
                where=core.path,
                expected=f"segments of at least {needed} bytes (capacity {16 * needed + core.budget.fixed_bytes} or more)",
                actual=f"segments of {segment_bytes} bytes (capacity {core.config.capacity_bytes})",
                action="Raise capacity (and segment_bytes, where it is set), or use smaller blocks.",
            )
        if descriptor.block_bytes_max > core.buffer.capacity_bytes:
            raise InvalidConfig(
                "the buffer is too small for a block of this namespace",
                where=core.path,
                expected=f"buffer of at least {descriptor.block_bytes_max} bytes",
                actual=f"{core.buffer.capacity_bytes} bytes",
                action="Raise buffer, or use smaller blocks.",
            )

    def flush(self, timeout: float | None = None) -> bool:
        self._check_usable()
        return self._core.flush(timeout)

    def purge(self, tag: str | bytes, *, physical: bool = False, timeout: float | None = None) -> PurgeReport:
        self._check_usable()
        return purge_store(self._core, tag, physical=physical, timeout_s=timeout)

    def find_tagged(self, tag: str | bytes) -> tuple[int, int]:
        """Blocks that ``purge`` would delete now, and bytes that ``physical`` would erase, deleted blocks included. Changes nothing."""
        self._check_usable()
        return find_tagged(self._core, tag)

    def warm_up(self, timeout: float | None = None) -> bool:
        """Wait until the buffer's memory is there, which opening began in the background; puts may be slower before. False: too late."""
        self._check_usable()
        return self._core.buffer.wait_prefaulted(timeout)

    def events(self, since: object = None) -> EventBatch:
        self._check_usable()
        return self._core.catalog.events.batch(since)

    def reconfigure(self, **options: Any) -> StoreConfig:
        """Change options while the store runs, all of them or none: ``capacity="100GiB"``, ``limits={...}``, ``codec=...`` and what else
        ``engine.reconfigure.CHANGEABLE`` names. Returns the configuration from now on. Raises ``InvalidConfig``."""
        self._check_usable()
        return reconfigure(self._core, options)

    def stats(self) -> Mapping[str, Any]:
        self._check_usable()
        return store_stats(self._core)

    def close(self, timeout: float | None = 30.0) -> bool:
        """Give up this handle; the last one of the store flushes and stops it. False when that did not finish in time.

        Closing a handle again changes nothing.
        """
        self._closed = True
        return self._opened.let_go(self, timeout)

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
