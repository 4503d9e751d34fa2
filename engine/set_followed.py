"""One store of a set that belongs to somebody else: opened when it is there, watched, given up when it is lost, tried again."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Hashable

from ..format.errors import KvlodeError
from ..format.layout import SUPERBLOCK_NAME
from ..format.namespace import Namespace
from ..gds.monitor import Monitor
from .contract import BlockSpace, Store

logger = logging.getLogger("kvlode")

RETRY_S = 1.0
"""How often a store that is not there is looked for, and one that is open is looked after."""
RETRY_S_MAX = 30.0
"""A store that is there and cannot be opened is tried at growing intervals up to this one."""
SILENT_S_MAX = 5.0
"""A store that does not answer a lookup for so long counts as lost until it does."""
CLOSE_S = 5.0
"""For closing a store that is lost; what still waits for its drive then is left behind."""
_PROBE_KEY = b"is anybody there?"


class _Opening:
    """An open store, what it is, and its namespaces."""

    def __init__(self, store: Store, identity: object, drive: Hashable) -> None:
        self.store = store
        self.identity = identity
        self.drive = drive
        self.spaces: dict[bytes, BlockSpace] = {}


class FollowedStore:
    """See the module. ``open_store`` opens it for reading and may raise; it is called on a thread that belongs to this object alone.

    ``identity`` tells which store is in the folder now, ``None`` when none is: a change means that it has to be opened again.
    Thread-safe; nothing but ``wait_tried`` and ``stop`` waits.
    """

    def __init__(self, path: str, open_store: Callable[[], Store], identity: Callable[[], object] | None = None) -> None:
        self.path = path
        self._open_store = open_store
        self._identity = identity or (lambda: superblock_identity(path))
        self._opening: _Opening | None = None
        self._reason = "not tried yet"
        self._asked_since_s: float | None = None
        self._suspicion: Exception | None = None
        self._pause_s = RETRY_S
        self._changed = Monitor()
        self._stopping = self._tried = False
        self._close_timeout_s: float | None = None
        self._closed_well = True
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="kvlode-follow", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait_tried(self, timeout_s: float) -> bool:
        """Wait until it was tried to open the store once; False when that took too long (it goes on in the background)."""
        return self._changed.wait_for(lambda: self._tried, timeout_s)

    @property
    def store(self) -> Store | None:
        """The open store; ``None`` while it is lost."""
        opening = self._opening
        return None if opening is None or self._silent() else opening.store

    @property
    def reason(self) -> str:
        """Why the store is lost; empty while it is not."""
        if self._opening is None:
            return self._reason
        return f"no answer for more than {SILENT_S_MAX:.0f} s" if self._silent() else ""

    @property
    def drive(self) -> Hashable:
        """Equal for stores on one drive."""
        opening = self._opening
        return self.path if opening is None else opening.drive

    def space(self, descriptor: Namespace) -> BlockSpace | None:
        """The surface of a namespace; ``None`` while the store is lost."""
        opening = self._opening
        if opening is None or self._silent():
            return None
        space = opening.spaces.get(descriptor.digest)
        if space is None:
            try:
                space = opening.spaces.setdefault(descriptor.digest, opening.store.namespace(descriptor))
            except KvlodeError as error:  # it is being closed
                logger.debug("%s: %s", self.path, error)
        return space

    def suspect(self, error: Exception) -> None:
        """The store has raised, which no store should: it is opened anew soon."""
        self._suspicion = error

    def _silent(self) -> bool:
        since_s = self._asked_since_s
        return since_s is not None and time.monotonic() - since_s > SILENT_S_MAX

    def begin_stop(self, timeout_s: float | None) -> None:
        """Ask the thread to close the store, within this time, and to end."""
        if os.getpid() != self._pid:
            return  # the thread is the parent's
        with self._changed.lock:
            self._stopping, self._close_timeout_s = True, timeout_s
            self._changed.notify_all()

    def wait_stopped(self, timeout_s: float | None) -> bool:
        """Wait for what ``begin_stop`` began; False when it did not end in time or the store did not close well."""
        if os.getpid() != self._pid or self._thread.ident is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive() and self._closed_well

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._look_after()
            except Exception as error:  # of whatever kind: somebody else's store must not end this process's use of its own
                self._pause_s = min(2 * self._pause_s, RETRY_S_MAX)
                self._lose(str(error))
            with self._changed.lock:
                self._tried = True
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopping, self._pause_s)
        self._closed_well = self._let_go(self._close_timeout_s)

    def _look_after(self) -> None:
        suspicion, self._suspicion = self._suspicion, None
        if suspicion is not None:
            raise suspicion
        identity = self._identity()
        opening = self._opening
        if opening is not None and opening.identity != identity:
            self._lose("it has gone" if identity is None else "another store has taken its place")
            opening = None
        if identity is None:
            self._pause_s = RETRY_S
            self._lose("there is no store yet")
        elif opening is None:
            self._opening = _Opening(self._open_store(), identity, drive_of(self.path))
            self._pause_s = RETRY_S
            logger.info("reading beside its writer: %s", self.path)
        else:
            self._probe(opening)

    def _probe(self, opening: _Opening) -> None:
        """Ask something: what does not answer here does not answer anybody else."""
        for space in list(opening.spaces.values())[:1]:
            self._asked_since_s = time.monotonic()
            try:
                space.contains([_PROBE_KEY])
            finally:
                self._asked_since_s = None

    def _lose(self, reason: str) -> None:
        if self._opening is None and reason == self._reason:
            return
        logger.info("what the store in %s holds is missed: %s", self.path, reason)
        self._reason = reason
        self._let_go(CLOSE_S)

    def _let_go(self, timeout_s: float | None) -> bool:
        opening, self._opening = self._opening, None
        if opening is None:
            return True
        try:
            return opening.store.close(timeout_s)
        except Exception as error:
            logger.warning("%s: %s", self.path, error)
            return False


def superblock_identity(path: str) -> object:
    """Which store is in a folder: changes when it is made anew; ``None`` when there is none, or the folder cannot be read."""
    try:
        status = os.stat(os.path.join(path, SUPERBLOCK_NAME))
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def drive_of(path: str) -> Hashable:
    """Equal for folders on one file system; a folder that cannot be asked has a drive of its own."""
    try:
        return os.stat(path).st_dev
    except OSError:
        return path
