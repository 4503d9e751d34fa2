"""Lifetime of a RocksDB handle: reads that tolerate damage, a close that waits for them, fork and interpreter exit.

What is guarded against here was measured with rocksdict 0.3.29:

* ``close`` during a read raises inside the binding, and a live iterator keeps the database locked: a gate counts the
  calls inside RocksDB, and ``close`` waits for them and takes the iterators away.
* A forked child that drops its copy of the handle hangs and writes into the parent's database: the copy is leaked.
  RocksDB's exit handler then joins threads that the child does not have, which hangs or crashes: the child ends before
  it. For the same want of threads a database that a child opens never flushes and hangs at close: it is refused.
* A thread inside RocksDB while the interpreter finalises aborts the process: open handles are closed at exit before that.
* A list get raises for all keys when one of them lies in a damaged block: it is repeated key by key.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from rocksdict import Rdict, RdictIter, ReadOptions

from ..format.errors import InvalidConfig, KvlodeError, StoreClosed
from ..gds.monitor import Monitor
from .index import IndexDamaged, IndexWriteError
from .index_lookup import LookupTeam

logger = logging.getLogger(__name__)

SCAN_CHUNK_ENTRIES = 256
EXIT_TIMEOUT_S = 5.0
REPLACE_WAIT_S = 0.05


class ReadGate:
    """Knows the threads inside RocksDB; once shut it lets nobody in. A context manager for the calls, one at a time a thread.

    A thread that an interrupt keeps from saying that it is out says so at its next call, or is the one that closes. While a
    thread wants to be ``alone``, those that come wait.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = Monitor()
        self._inside: dict[int, None] = {}
        self._shut = False
        self._held = False

    def __enter__(self) -> None:
        thread = threading.get_ident()
        while True:
            with self._changed.lock:
                if self._shut:
                    raise StoreClosed("index used after close, or in a forked child", where=self._name, action="Open the store again.")
                if not self._held:
                    self._inside[thread] = None
                    return
            self._changed.wait_for(lambda: not self._held or self._shut)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._changed.lock:
            self._inside.pop(threading.get_ident(), None)
            self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self, timeout_s: float) -> Iterator[bool]:
        """Let nobody in for the length of a ``with``; False when somebody was not out before the deadline."""
        with self._changed.lock:
            self._held = True
        try:
            yield self.wait_empty(timeout_s)
        finally:
            with self._changed.lock:
                self._held = False
                self._changed.notify_all()

    def shut(self) -> None:
        """Let nobody in from now on."""
        with self._changed.lock:
            self._shut = True
            self._changed.notify_all()

    def wait_empty(self, timeout_s: float) -> bool:
        """Wait until everybody is out; False when the deadline passed."""
        caller = {threading.get_ident()}
        return self._changed.wait_for(lambda: not self._inside.keys() - caller, timeout_s)

    def wait_shut(self, timeout_s: float) -> bool:
        """Wait for a moment, or less when the gate is shut; True when it is shut."""
        return self._changed.wait_for(lambda: self._shut, timeout_s)


def leak(handle: object) -> None:
    """Make sure that the object's destructor never runs in this process."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(handle))


class Scan:
    """Entries of one moment, fetched in chunks; see ``Index.scan``. For one thread at a time."""

    def __init__(self, gate: ReadGate, rows: RdictIter, prefix: bytes, where: str, on_damage: Callable[[], None]) -> None:
        self._gate = gate
        self._on_damage = on_damage
        self._rows: RdictIter | None = rows
        self._prefix = prefix
        self._where = where
        self._chunk: list[tuple[bytes, bytes]] = []
        self._ended = False

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return self

    def __next__(self) -> tuple[bytes, bytes]:
        if not self._chunk:
            if not self._ended:
                with self._gate:
                    self._chunk = self._fetch()
            if not self._chunk:
                raise StopIteration
        return self._chunk.pop()

    def _fetch(self) -> list[tuple[bytes, bytes]]:
        """The next entries, last one first."""
        rows = self._rows
        if rows is None:
            raise IndexWriteError("a scan was ended: the index was opened anew", where=self._where, action="Scan again.")
        chunk: list[tuple[bytes, bytes]] = []
        try:
            while len(chunk) < SCAN_CHUNK_ENTRIES:
                if not rows.valid():
                    self._check()
                    break
                key = rows.key()
                if not key.startswith(self._prefix):
                    break
                chunk.append((key, rows.value()))
                rows.next()
            else:
                chunk.reverse()
                return chunk
        finally:
            rows = None  # whoever keeps an error (a log, for one) keeps this frame, and an iterator keeps the database locked
        self._ended = True
        self.release()
        chunk.reverse()
        return chunk

    def _check(self) -> None:
        """Whether the iterator is at its end, or at damage."""
        assert self._rows is not None
        try:
            self._rows.status()
        except Exception as error:
            self._on_damage()
            self._ended = True
            self.release()
            raise IndexDamaged(
                "index scan stopped by damage", where=self._where, actual=str(error), action="Rebuild the index from the segments."
            ) from error

    def release(self) -> None:
        """Give the iterator back; entries fetched so far can still be taken."""
        self._rows = None

    def abandon(self, gate: ReadGate) -> None:
        """In a forked child; the gate's lock may be held by a thread that is no more, so there is a new one."""
        self._gate = gate
        if self._rows is not None:
            leak(self._rows)
            self._rows = None


class RocksReader:
    """The reading half of an index over one RocksDB handle, and its end. Any thread may call any method."""

    def __init__(self, path: str, handle: Rdict) -> None:
        self.path = path
        self._handle: Rdict | None = handle
        self._gate = ReadGate(path)
        self._scans: weakref.WeakSet[Scan] = weakref.WeakSet()
        self._count_lock = threading.Lock()
        self._close_lock = threading.Lock()
        self._damaged = 0
        self._team = LookupTeam(self._get_part)
        _open_readers.add(self)

    def _opened(self) -> Rdict:
        """The handle; only inside the gate."""
        handle = self._handle
        if handle is None:
            raise IndexDamaged("the index could not be opened again", where=self.path, action="Open the store again.")
        return handle

    # --- reads ----------------------------------------------------------------------------------------------------

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Values in the order of the keys; the interpreter lock is free while RocksDB works. See ``Index.get_many``."""
        if not keys:
            return []
        return self._team.look_up(keys if type(keys) is list else list(keys))

    def _get_part(self, keys: list[bytes]) -> list[bytes | None]:
        with self._gate:
            handle = self._handle
            if handle is None:  # it could not be opened again
                self._count_damage()
                return [None] * len(keys)
            try:
                values: list[bytes | None] = handle.get(keys)  # type: ignore[assignment,arg-type]  # the stub knows lists of strings
            except Exception as error:
                logger.warning("batched lookup in %s failed, repeating it key by key: %s", self.path, error)
                values = [self._get_one(handle, key) for key in keys]
        return values

    def _get_one(self, handle: Rdict, key: bytes) -> bytes | None:
        if not isinstance(key, bytes):
            raise TypeError(f"an index key is bytes, not {type(key).__name__}")
        try:
            value: bytes | None = handle.get(key)
        except Exception as error:
            self._count_damage()
            logger.warning("key %s of %s cannot be read: %s", key.hex(), self.path, error)
            return None
        return value

    def scan(self, prefix: bytes = b"", start: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """See ``Index.scan``. A scan that goes on after ``close`` raises ``StoreClosed``; it does not hold ``close`` up."""
        options = ReadOptions()
        options.fill_cache(False)  # type: ignore[call-arg]  # the stub lacks the argument
        with self._gate:
            rows = self._opened().iter(options)
            rows.seek(prefix if start is None else max(prefix, start))
            scan = Scan(self._gate, rows, prefix, self.path, self._count_damage)
            self._scans.add(scan)
        return scan

    def readable(self) -> bool:
        return self._handle is not None

    def damaged(self) -> int:
        """Lookups of single keys, and scans, that failed since open."""
        return self._damaged

    def _count_damage(self) -> None:
        with self._count_lock:
            self._damaged += 1

    def size_bytes(self) -> int:
        """Disk space allocated to the files of the index now, logs included."""
        with self._gate:
            return allocated_bytes(self.path)

    # --- the end --------------------------------------------------------------------------------------------------

    def close(self, timeout_s: float = 30.0) -> None:
        """Wait for running calls, then close. Closing twice is allowed.

        Calls that are still running at the deadline keep the handle: it is then leaked with a warning, and the
        database stays locked until the process ends.
        """
        self._gate.shut()
        with self._close_lock:
            if self._handle is None:
                return
            idle = self._gate.wait_empty(timeout_s)
            handle, self._handle = self._handle, None
            _open_readers.discard(self)
            self._team.close(timeout_s if idle else 0.0)
            if not idle:
                leak(handle)
                logger.error("index %s is still in use after %.1f s; its handle is left open", self.path, timeout_s)
                return
            for scan in list(self._scans):
                scan.release()
            try:
                handle.close()
            except Exception as error:
                logger.warning("index %s was closed without a last flush, recovery will catch up: %s", self.path, error)

    def _replace(self, opens: Sequence[Callable[[], Rdict]]) -> None:
        """Close the handle and take the first one that can be opened, between reads; raises why an earlier one could not.

        Without any, keys read as absent and count as damage. Scans that are under way end with
        ``IndexWriteError``.
        """
        with self._close_lock, self._gate.alone(REPLACE_WAIT_S) as idle:
            if not idle or self._gate.wait_shut(0.0):
                raise IndexWriteError("the index could not be opened again", where=self.path, actual="it is in use, or closed")
            for scan in list(self._scans):
                scan.release()
            handle, self._handle = self._handle, None
            try:
                if handle is not None:
                    handle.close()
            except Exception as error:  # what it could not write is why it is opened again
                logger.info("index %s was closed: %s", self.path, error)
            refused: KvlodeError | None = None
            for open_handle in opens:
                try:
                    self._handle = open_handle()
                    break
                except KvlodeError as error:
                    refused = refused or error
            if refused is not None:
                raise IndexWriteError("the index could not be opened again", where=self.path, actual=str(refused)) from refused

    def abandon(self) -> None:
        """In a forked child: make the copy of the handle unusable without touching the parent's database."""
        handle, self._handle = self._handle, None
        if handle is not None:
            leak(handle)
        self._gate = ReadGate(self.path)
        self._gate.shut()
        for scan in list(self._scans):
            scan.abandon(self._gate)
        self._count_lock = threading.Lock()
        self._close_lock = threading.Lock()
        _open_readers.discard(self)


def allocated_bytes(folder: str) -> int:
    """Disk space of the files directly inside a folder; files that vanish meanwhile are not counted."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                total += entry.stat(follow_symlinks=False).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


# --- fork and exit ------------------------------------------------------------------------------------------------------

_open_readers: weakref.WeakSet[RocksReader] = weakref.WeakSet()
_threads_pid: int | None = None
"""The process that RocksDB's background threads run in; ``None`` before the first open."""
_libc = ctypes.CDLL(None)
_on_exit = getattr(_libc, "on_exit", None)


def claim_threads(where: str, *, needs_threads: bool) -> None:
    """Call before opening a database. Raises ``InvalidConfig`` in a child forked after one was opened, unless it needs no threads."""
    global _threads_pid
    if _threads_pid is None:
        _threads_pid = os.getpid()
    elif needs_threads and _threads_pid != os.getpid():
        raise InvalidConfig(
            "an index cannot be opened for writing in a process that was forked from one that had used an index",
            where=where,
            expected=f"process {_threads_pid}, or a process that was started afresh",
            actual=f"its forked child {os.getpid()}",
            action="Start this process with the spawn method, or fork before the first store is opened.",
        )


def _after_fork_in_child() -> None:
    for reader in list(_open_readers):
        reader.abandon()
    if _threads_pid is not None and _on_exit is not None:
        # Exit handlers run last to first and get the status: streams are flushed, then the process ends. Without glibc there is no on_exit.
        _on_exit(_libc._exit, None)
        _on_exit(_libc.fcloseall, None)


def _close_all() -> None:
    for reader in list(_open_readers):
        reader.close(EXIT_TIMEOUT_S)


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_close_all)
