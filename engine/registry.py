"""The stores that this process has open: one per folder with any number of handles, dead after fork, closed before the interpreter ends."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import threading
import time
from collections.abc import Iterator

from ..format.errors import InvalidConfig, StoreLocked
from ..gds.monitor import Monitor
from .core import Core

logger = logging.getLogger("kvlode")
EXIT_TIMEOUT_S = 20.0


class OpenStore:
    """A store and its handles; it is closed with the last of them."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self._handles: set[object] = set()
        self._changed = Monitor()
        self.closing = False
        """Nobody gets a handle any more."""
        self._close_began = False
        self._closed_well: bool | None = None

    @property
    def closed(self) -> bool:
        """Whether nothing of it is left."""
        return self._closed_well is True

    def hold(self, handle: object) -> None:
        """One handle more; call under the registry's lock."""
        self._handles.add(handle)

    def let_go(self, handle: object, timeout_s: float | None) -> bool:
        """Without this handle; when none is left, flush and stop. False when that did not finish in time."""
        with registry.lock:
            self._handles.discard(handle)
            if self._handles:
                return True
            self.closing = True
        return self.close(timeout_s)

    def close(self, timeout_s: float | None) -> bool:
        """Flush and stop, whatever handles there are (exit of the process). False when it did not finish in time."""
        with self._changed.lock:
            begins, self._close_began, self.closing = not self._close_began, True, True
        if begins:
            closed_well = False
            try:
                closed_well = self.core.close(timeout_s)
            finally:
                with self._changed.lock:
                    self._closed_well = closed_well
                    self._changed.notify_all()
                if closed_well:
                    registry.remove(self)
        self._changed.wait_for(lambda: self._closed_well is not None, timeout_s)
        return self._closed_well is True

    def wait_closed(self, timeout_s: float) -> None:
        """Wait for a close that has begun. Raises ``StoreLocked`` when the store is not closed then: its threads still hold it."""
        self._changed.wait_for(lambda: self._closed_well is not None, timeout_s)
        if self._closed_well is not True:
            raise StoreLocked(
                "this process has not finished closing this store",
                where=self.core.path,
                expected="a close that ends",
                actual="it is still running" if self._closed_well is None else "it was given up: threads and files were left behind",
                action="Wait until what the drive has not answered is over, or open the store in another process after this one has ended.",
            )

    def abandon(self, reason: str) -> None:
        """In a forked child: refuse every further call and let go of the lock's copy, nothing else."""
        self.core.closed_reason = reason
        self._changed = Monitor()  # another thread of the parent may have held its lock
        self.closing, self._close_began, self._closed_well = True, True, False
        if self.core.lock is not None:
            self.core.lock.abandon()


class Registry:
    """Open stores by (device, inode) of their folder. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._stores: dict[tuple[int, int], OpenStore] = {}
        self._closes_at_exit = False

    @staticmethod
    def identity(path: str) -> tuple[int, int]:
        status = os.stat(path)
        return status.st_dev, status.st_ino

    def find(self, path: str) -> OpenStore | None:
        """The open store of a folder, one that is being closed included; call under ``lock``."""
        try:
            return self._stores.get(self.identity(path))
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def when_not_closing(self, path: str, timeout_s: float) -> Iterator[OpenStore | None]:
        """The open store of a folder, with ``lock`` held; one that this process is closing is waited for.

        Raises ``StoreLocked`` when such a store has not let go of its folder in time.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            with self.lock:
                active = self.find(path)
                if active is not None and active.closed:  # an interrupt kept it from taking itself out
                    active = None
                if active is None or not active.closing:
                    yield active
                    return
            active.wait_closed(max(0.0, deadline_s - time.monotonic()))

    def add(self, store: OpenStore, *, shared: bool = True) -> None:
        """Remember an open store; call under ``lock``. One that is not ``shared`` is closed at exit too, and found by nobody."""
        if not self._closes_at_exit:
            # Exit handlers run last first. By now those of the worker threads and of RocksDB are registered: they run after
            # this one, which still needs both to write the last blocks.
            self._closes_at_exit = True
            atexit.register(self.close_all)
        self._stores[self.identity(store.core.path) if shared else (-1, id(store))] = store

    def remove(self, store: OpenStore) -> None:
        with self.lock:
            self._stores = {key: other for key, other in self._stores.items() if other is not store}

    def close_all(self) -> None:
        """At exit: stop every store's threads while the interpreter is still whole."""
        for store in list(self._stores.values()):
            if not store.close(EXIT_TIMEOUT_S):
                logger.warning("store %s could not be closed within %.0f s at exit", store.core.path, EXIT_TIMEOUT_S)
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


def check_same_options(path: str, requested: object, active: object, opened_with: object) -> None:
    """A folder that is open already can only be opened again with the same options: those in force, or those before they were changed."""
    if requested not in (active, opened_with):
        raise InvalidConfig(
            "the store is already open in this process with other options",
            where=path,
            expected=active,
            actual=requested,
            action="Open it with the same options (the handle is shared), or close the first handle.",
        )


registry = Registry()
os.register_at_fork(after_in_child=registry.after_fork_in_child)
