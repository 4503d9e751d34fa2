"""Opening the index of a store: its share of the capacity, and what to do with a damaged one."""

from __future__ import annotations

import logging
import os

from ..format.errors import InvalidConfig
from ..format.layout import INDEX_FOLDER, PAGE_BYTES
from .config import MIB, StoreConfig
from .heat import heat_bytes, slots_for_capacity
from .index import Index, IndexDamaged
from .index_memory import MemoryIndex
from .index_rocksdb import RocksIndex, destroy, set_aside
from .reclaim import Budget
from .stats import Counters

logger = logging.getLogger("kvlode")

LOG_BYTES = 4 * MIB
WAL_BYTES_MAX = 32 * MIB
WAL_BYTES_MIN = 2 * MIB
SEGMENTS_AT_LEAST = 4
REBUILD_MARKER = "index.rebuild"
"""An empty file that tells the next open to derive the index again: damage was met while it was in use."""


def budget_for(config: StoreConfig) -> Budget:
    """The capacity formula with these options. Raises ``InvalidConfig`` when hardly anything would be left for segments."""
    rocksdb_bytes = 0 if config.index_kind == "memory" else _wal_bytes(config) + LOG_BYTES
    budget = Budget(config.capacity_bytes, 2 * PAGE_BYTES + heat_bytes(slots_for_capacity(config.capacity_bytes)) + rocksdb_bytes)
    smallest = SEGMENTS_AT_LEAST * (config.segment_bytes or 64 * PAGE_BYTES)
    if budget.for_segments(0, 0) < smallest:
        raise InvalidConfig(
            "the capacity is too small",
            expected=f"at least {budget.fixed_bytes + smallest} bytes with these options",
            actual=f"{config.capacity_bytes} bytes",
            action="Raise capacity, or set a smaller segment_bytes.",
        )
    return budget


def _wal_bytes(config: StoreConfig) -> int:
    return min(WAL_BYTES_MAX, max(WAL_BYTES_MIN, config.capacity_bytes // 64))


def open_index(path: str, config: StoreConfig, given: Index | None, counters: Counters) -> Index:
    """The store's index; a fresh, empty one when it is damaged or was marked."""
    if given is not None:
        return given
    if config.index_kind == "memory":
        return MemoryIndex()
    if os.path.exists(os.path.join(path, REBUILD_MARKER)):
        return fresh_index(path, config, counters)
    try:
        return _rocks_index(path, config)
    except IndexDamaged as error:
        logger.warning("the index is damaged and will be rebuilt from the segments: %s", error)
        return fresh_index(path, config, counters)


def _rocks_index(path: str, config: StoreConfig) -> RocksIndex:
    wal_bytes = _wal_bytes(config)
    return RocksIndex(
        f"{path}/{INDEX_FOLDER}",
        write_buffer_bytes=min(16 * MIB, wal_bytes // 2),
        wal_bytes_max=wal_bytes,
        block_cache_bytes=config.index_cache_bytes,
    )


def fresh_index(path: str, config: StoreConfig, counters: Counters) -> Index:
    """An empty index in place of the one on disk, which is set aside until the new one is complete."""
    counters.add("index_rebuilds")
    if not _on_disk(path, config):
        return MemoryIndex()
    set_aside(f"{path}/{INDEX_FOLDER}")
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
