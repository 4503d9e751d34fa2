"""The index for ``kvlode fsck``: the check itself imports no engine, so whoever runs it hands in one of these sources.

Reading goes through RocksDB's read-only mode, or its secondary mode beside a writer; neither writes anything into the index's
folder. What a view shows is one moment: the index as it was when the view was opened.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..engine.catalog import META_PREFIX, Catalog
from ..engine.index import Index, IndexDamaged
from ..engine.index_entry import IndexEntry
from ..engine.index_memory import MemoryIndex
from ..engine.index_open import REBUILD_MARKER
from ..engine.index_rocksdb import RocksFollowerIndex, RocksIndex, RocksTuning, set_aside
from ..engine.index_snapshot import RocksSnapshotIndex
from ..engine.stats import Counters
from ..format.errors import KvlodeError
from ..format.layout import INDEX_FOLDER
from ..format.record import RecordHeader
from ..gds.device import Device
from .fsck.index_view import IndexState, IndexUnreadable

_UUID_BYTES = 16


class EngineIndexView:
    """``IndexView`` over an index of the engine. For one thread."""

    def __init__(self, index: Index, *, owned: bool) -> None:
        self._index = index
        self._owned = owned

    def state(self) -> IndexState:
        catalog = Catalog(self._index, Counters())
        try:
            identity = catalog.identity()
            checkpoint = catalog.checkpoint()
            catalog.load_floors()
        except (IndexDamaged, struct.error) as error:
            raise _unreadable(error) from error
        self._check_damage()
        if identity is not None and len(identity) != _UUID_BYTES:
            raise IndexUnreadable("it does not say whose it is", expected=f"{_UUID_BYTES} bytes of uuid", actual=identity.hex())
        place = None if checkpoint is None else (checkpoint.segment_id, checkpoint.offset, checkpoint.sequence)
        return IndexState(identity, place, catalog.floors)

    def get_many(self, idents: Sequence[bytes]) -> list[IndexEntry | None]:
        values = self._index.get_many(list(idents))
        self._check_damage()
        return [None if value is None else _unpacked(value) for value in values]

    def scan(self) -> Iterator[tuple[bytes, IndexEntry | None]]:
        try:
            for ident, value in self._index.scan():
                if not ident.startswith(META_PREFIX):
                    yield ident, _unpacked(value)
        except IndexDamaged as error:
            raise _unreadable(error) from error

    def _check_damage(self) -> None:
        """Damaged keys read as absent in the engine; for a check they are damage."""
        if self._index.damaged():
            raise IndexUnreadable("entries cannot be read", actual=f"{self._index.damaged()} failed reads")

    def close(self) -> None:
        if self._owned:
            self._index.close()


def _unreadable(error: KvlodeError | struct.error) -> IndexUnreadable:
    """The error itself in a check's words: its place is that of the finding, and what to do is a matter of the repair."""
    if isinstance(error, KvlodeError):
        return IndexUnreadable(error.what, expected=error.expected, actual=error.actual)
    return IndexUnreadable("its own entries have another layout", actual=error)


def _unpacked(value: bytes) -> IndexEntry | None:
    try:
        return IndexEntry.unpack(value)
    except IndexDamaged:
        return None


def open_to_look(
    folder: str | os.PathLike[str], *, live: bool, cache_bytes: int = RocksTuning.block_cache_bytes
) -> RocksFollowerIndex | RocksSnapshotIndex | None:
    """The RocksDB in a folder, read-only; ``None`` where there is none. Raises ``IndexDamaged`` or ``DeviceError``.

    It is followed only beside a writer (``live``): a follower passes over tables that are missing, read-only mode tells of them.
    """
    if not os.path.isdir(folder) or not os.listdir(folder):
        return None
    kind = RocksFollowerIndex if live else RocksSnapshotIndex
    return kind(folder, block_cache_bytes=cache_bytes)


class RocksSource:
    """``IndexSource`` of a store's folder: the RocksDB in ``index/``."""

    def __init__(self, device: Device, path: str) -> None:
        self.path = path
        self._device = device
        self._folder = os.path.join(path, INDEX_FOLDER)

    def open_view(self, *, live: bool) -> EngineIndexView | None:
        """See ``IndexSource``. Beside a writer a damaged table may go unnoticed, its entries being absent."""
        if os.path.isdir(self._folder) and os.path.exists(os.path.join(self.path, REBUILD_MARKER)):
            raise IndexUnreadable("damage was met while it was in use", actual=f"a file {REBUILD_MARKER}")
        try:
            index = open_to_look(self._folder, live=live)
        except KvlodeError as error:
            raise _unreadable(error) from error
        return None if index is None else EngineIndexView(index, owned=True)

    # --- repair -------------------------------------------------------------------------------------------------------

    def drop(self, idents: Iterable[bytes]) -> int:
        """See ``IndexSource``."""
        from .index_repair import drop_entries

        return self._changing(lambda index: drop_entries(index, idents))

    def add(self, records: Iterable[RecordHeader]) -> int:
        """See ``IndexSource``."""
        from .index_repair import add_entries

        return self._changing(lambda index: add_entries(index, records))

    def rebuild(self) -> int:
        """See ``IndexSource``."""
        from .index_repair import rebuild_index

        index, count = rebuild_index(self._device, self.path, self._fresh)
        index.close()
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(self.path, REBUILD_MARKER))
        return count

    def _fresh(self) -> Index:
        set_aside(self._folder)
        return RocksIndex(self._folder)

    def _changing(self, change: Callable[[Index], int]) -> int:
        index = RocksIndex(self._folder)
        try:
            return change(index)
        finally:
            index.close()


class GivenSource:
    """``IndexSource`` of an index that the caller has open, such as a ``MemoryIndex``. ``rebuild`` replaces ``index``."""

    def __init__(self, device: Device, path: str, index: Index | None) -> None:
        self.path = path
        self.index = index
        self._device = device

    def open_view(self, *, live: bool) -> EngineIndexView | None:
        """See ``IndexSource``."""
        return None if self.index is None else EngineIndexView(self.index, owned=False)

    # --- repair -------------------------------------------------------------------------------------------------------

    def drop(self, idents: Iterable[bytes]) -> int:
        """See ``IndexSource``."""
        from .index_repair import drop_entries

        return 0 if self.index is None else drop_entries(self.index, idents)

    def add(self, records: Iterable[RecordHeader]) -> int:
        """See ``IndexSource``."""
        from .index_repair import add_entries

        return 0 if self.index is None else add_entries(self.index, records)

    def rebuild(self) -> int:
        """See ``IndexSource``."""
        from .index_repair import rebuild_index

        self.index, count = rebuild_index(self._device, self.path, MemoryIndex)
        return count
