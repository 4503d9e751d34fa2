"""Opening the index of a store, and what to do with a damaged one."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ..format.layout import INDEX_FOLDER
from .capacity import wal_bytes_for
from .config import MIB, StoreConfig
from .index import Index, IndexDamaged
from .index_memory import MemoryIndex
from .index_rocksdb import RocksIndex, destroy, set_aside
from .stats import Counters

logger = logging.getLogger("kvlode")

READ_AHEAD_BYTES_MAX = 512 * MIB
"""Of the index's tables, about 3 million keys."""
READ_AHEAD_STEP_BYTES = MIB
REBUILD_MARKER = "index.rebuild"
"""An empty file that tells the next open to derive the index again: damage was met while it was in use."""


def open_index(path: str, config: StoreConfig, given: Index | None, counters: Counters) -> Index:
    """The store's index; a fresh, empty one when it is damaged or was marked."""
    if given is not None:
        return given
    if config.index_kind == "memory":
        return MemoryIndex()
    if os.path.exists(os.path.join(path, REBUILD_MARKER)):
        return fresh_index(path, config, counters, "damage was met while it was in use")
    try:
        return _rocks_index(path, config)
    except IndexDamaged as error:
        logger.warning("the index is damaged and will be rebuilt from the segments: %s", error)
        return fresh_index(path, config, counters, str(error))


def _rocks_index(path: str, config: StoreConfig) -> RocksIndex:
    wal_bytes = wal_bytes_for(config)
    return RocksIndex(
        f"{path}/{INDEX_FOLDER}",
        write_buffer_bytes=min(4 * MIB, wal_bytes // 2),
        wal_bytes_max=wal_bytes,
        block_cache_bytes=config.index_cache_bytes,
    )


def read_ahead(path: str) -> None:
    """Read the index's tables once, so that they are in the page cache; as fast as the drive reads in sequence.

    After a restart of the machine each lookup would otherwise wait for a random read of its own: measured 190 us a key.
    (Advice to the system is no help: Linux reads ahead as little as 128 KiB for each call.)
    """
    memory = bytearray(READ_AHEAD_STEP_BYTES)
    left_bytes = READ_AHEAD_BYTES_MAX
    for table in sorted(Path(path, INDEX_FOLDER).glob("*.sst"), reverse=True):
        try:
            left_bytes -= table.stat().st_size
            if left_bytes < 0:
                return
            with open(table, "rb", buffering=0) as file:
                while file.readinto(memory):
                    pass
        except OSError:  # compacted away meanwhile, or unreadable: RocksDB finds out by itself
            continue


def fresh_index(path: str, config: StoreConfig, counters: Counters, reason: str = "it is of another store, or incomplete") -> Index:
    """An empty index in place of the one on disk, which is set aside until the new one is complete."""
    counters.add("index_rebuilds")
    counters.decisions.note("index_rebuilt", reason, index=config.index_kind)
    if not _on_disk(path, config):
        return MemoryIndex()
    set_aside(f"{path}/{INDEX_FOLDER}")
    counters.decisions.note("index_set_aside", reason)
    return _rocks_index(path, config)


def mark_for_rebuild(path: str, config: StoreConfig) -> None:
    """Let the next open rebuild the index."""
    if _on_disk(path, config):
        logger.error("the index of %s is damaged: keys that it cannot read count as misses; the next open rebuilds it", path)
        with open(os.path.join(path, REBUILD_MARKER), "wb"):
            pass


def remove_damaged_indexes(path: str, config: StoreConfig) -> None:
    """The index is complete again: delete what was set aside, which counts against the capacity."""
    if not _on_disk(path, config):
        return
    for name in os.listdir(path):
        if name.startswith(f"{INDEX_FOLDER}.damaged-"):
            destroy(os.path.join(path, name))
    marker = os.path.join(path, REBUILD_MARKER)
    if os.path.exists(marker):
        os.remove(marker)


def _on_disk(path: str, config: StoreConfig) -> bool:
    return config.index_kind == "rocksdb" and os.path.isdir(path)
