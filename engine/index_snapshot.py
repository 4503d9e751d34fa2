"""The index of a store that nobody has open, read as it lies there: for tools that must change nothing and miss no damage."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Sequence

from rocksdict import AccessType

from ..format.errors import KvlodeError
from .index import IndexWriteError
from .index_handle import RocksReader, claim_threads
from .index_rocksdb import RocksTuning, open_handle
from .index_source import link_files, remove_folder


class RocksSnapshotIndex(RocksReader):
    """``Index`` over RocksDB's read-only mode. It reads the log into memory and writes nothing into the index's folder.

    Unlike a follower it opens every table, so a missing or damaged one is an error: a follower passes over it, and its
    keys read as absent. Raises ``IndexDamaged`` and ``DeviceError`` as ``RocksIndex`` does.
    """

    def __init__(self, path: str | os.PathLike[str], *, block_cache_bytes: int = RocksTuning.block_cache_bytes) -> None:
        source = os.fspath(path)
        links = tempfile.mkdtemp(prefix="kvlode-index-")
        self._remove_links = weakref.finalize(self, remove_folder, links, os.getpid())
        try:
            link_files(source, links)
            claim_threads(source, needs_threads=False)
            tuning = RocksTuning(block_cache_bytes=block_cache_bytes)
            super().__init__(source, open_handle(links, source, tuning, AccessType.read_only(False)))
        except KvlodeError:
            self._remove_links()
            raise

    def apply(self, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes] = ()) -> None:
        """Always raises: nothing is written here."""
        raise IndexWriteError("this view of the index is read-only", where=self.path)

    def sync(self) -> None:
        """Nothing to do."""

    def open_anew(self) -> None:
        """Nothing to do."""

    def close(self, timeout_s: float = 30.0) -> None:
        """See ``RocksReader.close``."""
        super().close(timeout_s)
        self._remove_links()
