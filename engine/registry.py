"""The stores that this process has open: one handle per folder, dead after fork, closed before the interpreter ends."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import threading
from typing import TYPE_CHECKING

from ..format.errors import InvalidConfig

if TYPE_CHECKING:
    from .store import DiskStore

logger = logging.getLogger("kvlode")
EXIT_TIMEOUT_S = 20.0


class Registry:
    """Open stores by (device, inode) of their folder. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._stores: dict[tuple[int, int], DiskStore] = {}
        self._closes_at_exit = False

    @staticmethod
    def identity(path: str) -> tuple[int, int]:
        status = os.stat(path)
        return status.st_dev, status.st_ino

    def find(self, path: str) -> DiskStore | None:
        """The open store of a folder; call under ``lock``."""
        try:
            return self._stores.get(self.identity(path))
        except FileNotFoundError:
            return None

    def add(self, store: DiskStore) -> None:
        """Remember an open store; call under ``lock``."""
        if not self._closes_at_exit:
            # Exit handlers run last first. By now those of the worker threads and of RocksDB are registered: they run after
            # this one, which still needs both to write the last blocks.
            self._closes_at_exit = True
            atexit.register(self.close_all)
        self._stores[self.identity(store.path)] = store

    def remove(self, store: DiskStore) -> None:
        with self.lock:
            self._stores = {key: other for key, other in self._stores.items() if other is not store}

    def close_all(self) -> None:
        """At exit: stop every store's threads while the interpreter is still whole."""
        for store in list(self._stores.values()):
            if not store.close_for_good(EXIT_TIMEOUT_S):
                logger.warning("store %s could not be closed within %.0f s at exit", store.path, EXIT_TIMEOUT_S)
                _leak(store)

    def after_fork_in_child(self) -> None:
        """The child has none of the threads: its copies are dead, and must neither be closed nor collected."""
        self.lock = threading.RLock()
        stores, self._stores = list(self._stores.values()), {}
        for store in stores:
            store.abandon("the store belongs to the parent of this forked process")
            _leak(store)


def _leak(store: object) -> None:
    """Keep an object for ever, so that no destructor runs on a database that another process or thread still uses."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(store))


def check_same_options(path: str, requested: object, active: object) -> None:
    """A folder that is open already can only be opened again with the same options."""
    if requested != active:
        raise InvalidConfig(
            "the store is already open in this process with other options",
            where=path,
            expected=active,
            actual=requested,
            action="Open it with the same options (the handle is shared), or close the first handle.",
        )


registry = Registry()
os.register_at_fork(after_in_child=registry.after_fork_in_child)
