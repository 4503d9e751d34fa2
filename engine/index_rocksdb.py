"""The index in RocksDB, through rocksdict: the writer's index, and the follower's view of it.

The options are built at every open and passed for the column family by name: with ``Rdict(path, options)`` alone an
existing database silently comes back without filter and cache, three to ten times slower.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    ChecksumType,
    DBCompactionStyle,
    DBCompressionType,
    DBRecoveryMode,
    Options,
    Rdict,
    WriteBatch,
    WriteOptions,
)

from ..format.errors import DeviceError, KvlodeError, NoSpace, StoreLocked
from .index import BATCH_ENTRIES_MAX, IndexDamaged, IndexWriteError
from .index_handle import RocksReader, claim_threads
from .index_source import SourceState, link_files, remove_folder, tables_are_there
from .rocks_logs import check_logs

logger = logging.getLogger("kvlode")

MIB = 1 << 20
_COLUMN_FAMILY = "default"
_OPEN_TRIES = 20
OPEN_FREE_BYTES_MIN = 16 * MIB
OPEN_PAUSE_S = 5.0
"""Between two tries to open anew: each makes readers wait."""


@dataclass(frozen=True)
class RocksTuning:
    """Sizes of a RocksDB index; the memory it takes is at most cache + 4 write buffers + 2.3 bytes an entry (filters, places of blocks)."""

    write_buffer_bytes: int = 4 * MIB
    """Bounds how much of its log an opening replays: 20 to 30 ms a MiB, with the interpreter lock held."""
    wal_bytes_max: int = 8 * MIB
    block_cache_bytes: int = 0
    """0: none. Keys are digests, so every lookup needs another block; the system's page cache gives a small one away in less time than
    RocksDB's cache takes to make room for it."""
    table_file_bytes: int = 32 * MIB
    log_bytes_max: int = MIB
    manifest_bytes_max: int = 4 * MIB
    stall_timeout_s: float = 2.0
    """How long a batch is retried while RocksDB's flushes lag behind."""

    def options(self) -> Options:
        """Fresh options with a cache of their own. An ``Options`` object is good for one open."""
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_paranoid_checks(True)
        options.set_block_based_table_factory(self._table())
        options.set_compression_type(DBCompressionType.none())
        options.set_compaction_style(DBCompactionStyle.level())
        options.set_level_compaction_dynamic_level_bytes(True)
        options.set_target_file_size_base(self.table_file_bytes)
        options.set_max_bytes_for_level_base(8 * self.table_file_bytes)  # one level up to two million keys, two up to twenty
        options.set_write_buffer_size(self.write_buffer_bytes)
        options.set_max_write_buffer_number(4)
        options.set_memtable_whole_key_filtering(True)
        options.set_memtable_prefix_bloom_ratio(0.02)
        options.set_max_total_wal_size(self.wal_bytes_max)
        options.set_wal_recovery_mode(DBRecoveryMode.point_in_time())
        options.set_max_background_jobs(2)
        options.set_max_open_files(-1)
        options.set_keep_log_file_num(2)
        options.set_max_log_file_size(self.log_bytes_max)
        options.set_max_manifest_file_size(self.manifest_bytes_max)
        options.set_manifest_preallocation_size(64 << 10)
        options.set_stats_dump_period_sec(0)
        options.set_stats_persist_period_sec(0)
        return options

    def _table(self) -> BlockBasedOptions:
        table = BlockBasedOptions()
        table.set_bloom_filter(10, False)
        if self.block_cache_bytes:
            table.set_block_cache(Cache.new_hyper_clock_cache(self.block_cache_bytes, 0))
        else:
            table.disable_cache()
        table.set_block_size(1 << 10)  # what a lookup reads, checks and throws away: about seven entries
        table.set_block_restart_interval(8)
        table.set_index_block_restart_interval(8)  # the first keys of small blocks are many and begin alike: half the memory
        table.set_checksum_type(ChecksumType.xxh3())
        table.set_format_version(6)
        return table


class RocksIndex(RocksReader):
    """``Index`` of the writing process. One thread calls ``apply`` and ``sync``; any thread may read or close.

    Opening creates the folder when it is missing. It raises ``StoreLocked`` when another handle has it open,
    ``NoSpace`` when the file system is full (RocksDB cannot open for writing then; a follower can), ``DeviceError``
    for permissions and limits, ``InvalidConfig`` in a forked child whose parent has used an index (RocksDB's threads are
    missing there; a follower can be opened), and ``IndexDamaged`` for everything that a rebuild would cure.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        write_buffer_bytes: int = RocksTuning.write_buffer_bytes,
        wal_bytes_max: int = RocksTuning.wal_bytes_max,
        block_cache_bytes: int = RocksTuning.block_cache_bytes,
        stall_timeout_s: float = RocksTuning.stall_timeout_s,
    ) -> None:
        tuning = RocksTuning(
            write_buffer_bytes=write_buffer_bytes,
            wal_bytes_max=wal_bytes_max,
            block_cache_bytes=block_cache_bytes,
            stall_timeout_s=stall_timeout_s,
        )
        folder = os.fspath(path)
        claim_threads(folder, needs_threads=True)
        _check_not_beheaded(folder)
        super().__init__(folder, open_handle(folder, folder, tuning, AccessType.read_write()))
        self._tuning = tuning
        self._open_anew_at_s = 0.0
        self._write_options = WriteOptions()
        self._write_options.no_slowdown = True

    def apply(self, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes] = ()) -> None:
        """See ``Index.apply``. The interpreter lock is held for the batch, about 1 us an entry; a stall of RocksDB is waited
        out without it, up to ``stall_timeout_s``."""
        if len(puts) + len(deletes) > BATCH_ENTRIES_MAX:
            raise ValueError(f"{len(puts) + len(deletes)} entries in one batch; at most {BATCH_ENTRIES_MAX} are allowed")
        deadline = time.monotonic() + self._tuning.stall_timeout_s
        pause_s = 0.001
        while True:
            error = self._write(puts, deletes)
            if error is None:
                return
            stalled = str(error).startswith("Result incomplete")
            if not stalled or time.monotonic() + pause_s > deadline or self._gate.wait_shut(pause_s):
                raise IndexWriteError("index refused a batch", where=self.path, actual=str(error)) from error
            pause_s = min(2 * pause_s, 0.05)

    def _write(self, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes]) -> Exception | None:
        """One try; a batch object cannot be written twice, even after an error."""
        batch = WriteBatch(raw_mode=True)
        for key, value in puts:
            batch.put(key, value)
        for key in deletes:
            batch.delete(key)
        with self._gate:
            try:
                self._opened().write(batch, self._write_options)
            except Exception as error:
                return error
        return None

    def sync(self) -> None:
        """See ``Index.sync``; the interpreter lock is free meanwhile."""
        with self._gate:
            try:
                self._opened().flush_wal(True)
            except Exception as error:
                raise IndexWriteError("index log could not be synced", where=self.path, actual=str(error)) from error

    def open_anew(self) -> None:
        """See ``Index.open_anew``. RocksDB goes on by itself after a write that found no room, but never after a sync that failed."""
        free_bytes = shutil.disk_usage(self.path).free
        if free_bytes < OPEN_FREE_BYTES_MIN:
            raise IndexWriteError("no room to open the index again", where=self.path, expected=OPEN_FREE_BYTES_MIN, actual=free_bytes)
        now_s = time.monotonic()
        if now_s < self._open_anew_at_s:
            raise IndexWriteError("the index could not be opened again a moment ago", where=self.path)
        accesses = (AccessType.read_write(), AccessType.read_only(False))
        try:
            _check_not_beheaded(self.path)
            self._replace([functools.partial(open_handle, self.path, self.path, self._tuning, access) for access in accesses])
        finally:
            self._open_anew_at_s = time.monotonic() + OPEN_PAUSE_S


class RocksFollowerIndex(RocksReader):
    """``Index`` of a process that follows the writer: RocksDB's secondary mode, read-only.

    It sees what the writer had applied, synced or not, at open and at the last ``catch_up``. RocksDB gets a temporary
    folder of links instead of the index folder, because rocksdict writes a file of its own into the folder that it
    opens: so the writer's folder is never written to, may be read-only, and is not created by mistake.
    """

    def __init__(self, path: str | os.PathLike[str], *, block_cache_bytes: int = RocksTuning.block_cache_bytes) -> None:
        self._source = os.fspath(path)
        self._tuning = RocksTuning(block_cache_bytes=block_cache_bytes)
        self._temporary = tempfile.mkdtemp(prefix="kvlode-follower-")
        self._remove_temporary = weakref.finalize(self, remove_folder, self._temporary, os.getpid())
        self._catch_up_lock = threading.Lock()
        self._opens = 0
        self._state = SourceState()
        self._links, self.log_path = "", ""
        try:
            super().__init__(self._source, self._open_links())
        except KvlodeError:
            self._remove_temporary()
            raise

    def _open_links(self) -> Rdict:
        """A handle over fresh links, tried again when the writer's files change meanwhile. Takes effect only when it succeeds."""
        for attempt in range(_OPEN_TRIES):
            self._opens += 1
            links = os.path.join(self._temporary, f"links-{self._opens}")
            own = os.path.join(self._temporary, f"own-{self._opens}")
            os.mkdir(links)
            state = SourceState.of(self._source)
            link_files(self._source, links)
            claim_threads(self._source, needs_threads=False)
            try:
                handle = open_handle(links, self._source, self._tuning, AccessType.secondary(own))
                if SourceState.of(self._source).keeps(state) and tables_are_there(links):
                    self._links, self._state, self.log_path = links, state, os.path.join(own, "LOG")
                    return handle
                handle.close()  # a file went away before it was read, perhaps: RocksDB does not tell, and shows something older or nothing
            except KvlodeError:
                if attempt == _OPEN_TRIES - 1:
                    raise
            finally:
                if self._links != links:
                    shutil.rmtree(links)
        raise IndexDamaged(
            "index cannot be followed",
            where=self._source,
            expected=f"files that stay while they are opened, in one of {_OPEN_TRIES} tries",
            action="Try again when the writer is less busy.",
        )

    def catch_up(self) -> None:
        """See what the writer has applied until now. Takes milliseconds and holds the interpreter lock.

        RocksDB forgets changes, or shows an older moment, when a flush of the writer meets its own way of catching up
        (measured with rocksdict 0.3.29). So that way is taken only when nothing but logs has grown; in all other cases the
        index is opened anew, which costs milliseconds and happens as seldom as the writer flushes. Threads that read
        meanwhile may see either moment.

        When the writer has replaced the index by a new one, that one is opened. Raises ``IndexDamaged`` when the
        writer's files cannot be followed now; what was seen before can still be read, and a later call may succeed.
        """
        with self._gate, self._catch_up_lock:
            state = SourceState.of(self._source)
            if state == self._state:
                return
            if state.grown_from(self._state) and self._follow() and SourceState.of(self._source).grown_from(state):
                self._state = state
                return
            self._state = SourceState()  # should opening fail, the next call opens as well
            outdated = self._links
            self._handle = self._open_links()
            shutil.rmtree(outdated, ignore_errors=True)

    def _follow(self) -> bool:
        try:
            self._opened().try_catch_up_with_primary()
        except Exception as error:
            logger.info("index %s is opened anew: %s", self._source, error)
            return False
        return True

    def apply(self, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes] = ()) -> None:
        """Always raises: a follower writes nothing."""
        raise IndexWriteError("a follower's index is read-only", where=self._source)

    def sync(self) -> None:
        """Nothing to do."""

    def open_anew(self) -> None:
        """Nothing to do: ``catch_up`` opens where that is needed."""

    def close(self, timeout_s: float = 30.0) -> None:
        """See ``RocksReader.close``."""
        super().close(timeout_s)
        self._remove_temporary()


def set_aside(path: str | os.PathLike[str]) -> str | None:
    """Rename a damaged index folder to the first free ``<path>.damaged-N`` and return that name, ``None`` when there is none.

    The index must be closed. The new folder still counts in the store's capacity until ``destroy``.
    """
    folder = os.fspath(path)
    if not os.path.lexists(folder):
        return None
    number = 1
    while os.path.lexists(target := f"{folder}.damaged-{number}"):
        number += 1
    os.rename(folder, target)
    return target


def destroy(path: str | os.PathLike[str]) -> None:
    """Delete the folder of a closed index; a missing one is fine."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return


# --- opening -------------------------------------------------------------------------------------------------------


def open_handle(folder: str, where: str, tuning: RocksTuning, access: AccessType) -> Rdict:
    check_logs(folder, where)
    options = tuning.options()
    try:
        return Rdict(folder, options, {_COLUMN_FAMILY: options}, access)
    except Exception as error:
        raise _open_error(where, str(error)) from error


def _check_not_beheaded(folder: str) -> None:
    """RocksDB takes a folder without ``CURRENT`` for a new database, and deletes the tables that it finds there."""
    try:
        names = os.listdir(folder)
    except OSError:
        return  # a missing folder is created; for the rest, RocksDB's own error says more
    if "CURRENT" not in names and any(name.startswith("MANIFEST-") or name.endswith(".sst") for name in names):
        raise IndexDamaged(
            "index has lost its CURRENT file",
            where=folder,
            expected="CURRENT beside the tables",
            actual=f"{len(names)} other files",
            action="Set it aside and rebuild it from the segments.",
        )


_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_DAMAGE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EFBIG)


def _open_error(where: str, message: str) -> KvlodeError:
    """The binding has one exception class; the cause is in the text."""
    if "lock hold by current process" in message or "While lock file" in message:
        return StoreLocked(
            "index is open already", where=where, actual=message, action="Close the other handle, or open the store as a follower."
        )
    for code in _FULL:
        if os.strerror(code) in message:
            return NoSpace("open index", where, errno=code, detail=message, action="Free space, or open the store read-only.")
    for code in _NOT_DAMAGE:
        if os.strerror(code) in message:
            return DeviceError("open index", where, errno=code, detail=message)
    return IndexDamaged("index cannot be opened", where=where, actual=message, action="Set it aside and rebuild it from the segments.")
