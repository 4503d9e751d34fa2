"""The handle of a store on disk that the host gets."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from ..format.errors import InvalidConfig
from ..format.layout import PAGE_BYTES
from ..format.namespace import Namespace
from .capacity import segment_bytes_for
from .config import StoreConfig
from .core import Core
from .registry import registry
from .space import Space


class DiskStore:
    """A store on disk (``contract.Store``). Made by ``kvlode.open`` and ``kvlode.follow``; thread-safe.

    Opening the same folder again in one process gives the same handle; it closes with the last ``close``.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._opens = 1
        self._lock = threading.Lock()
        self._spaces: dict[bytes, Space] = {}
        self._closed_well = False

    @property
    def path(self) -> str:
        return self._core.path

    @property
    def config(self) -> StoreConfig:
        return self._core.config

    def namespace(self, descriptor: Namespace) -> Space:
        """See ``contract.Store.namespace``. Raises ``InvalidConfig`` when the store is too small for one such block."""
        self._core.check_usable()
        if not isinstance(descriptor, Namespace):
            raise InvalidConfig("namespace takes a kvlode.Namespace", expected="Namespace", actual=type(descriptor).__name__)
        if not self._core.follower:
            self._check_block_fits(descriptor)
            self._core.keeper.register_block_bytes(descriptor.block_bytes_max)
        with self._lock:
            space = self._spaces.get(descriptor.digest)
            if space is None:
                space = self._spaces[descriptor.digest] = Space(self._core, self._core.namespaces.register(descriptor))
            return space

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
        self._core.check_usable()
        return self._core.flush(timeout)

    def warm_up(self, timeout: float | None = None) -> bool:
        """Wait until the buffer's memory is there, which opening began in the background; puts may be slower before. False: too late."""
        self._core.check_usable()
        return self._core.buffer.wait_prefaulted(timeout)

    def stats(self) -> Mapping[str, Any]:
        self._core.check_usable()
        return self._core.stats()

    def close(self, timeout: float | None = 30.0) -> bool:
        """Flush and stop; the last of several handles does the work. False when it did not finish in time."""
        with registry.lock:
            self._opens -= 1
            if self._opens > 0:
                return True
        return self.close_for_good(timeout)

    def close_for_good(self, timeout_s: float | None) -> bool:
        """Flush and stop, whoever else holds the handle (exit of the process). False when it did not finish in time."""
        with self._lock:
            if self._core.closed_reason is None:
                registry.remove(self)
                self._closed_well = self._core.close(timeout_s)
            return self._closed_well

    def share(self) -> DiskStore:
        """One more handle of the same store; call under the registry's lock."""
        self._opens += 1
        return self

    def abandon(self, reason: str) -> None:
        """In a forked child: refuse every further call and let go of the lock's copy, nothing else."""
        self._core.closed_reason = reason
        self._lock = threading.Lock()  # another thread of the parent may have held it
        if self._core.lock is not None:
            self._core.lock.abandon()

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
