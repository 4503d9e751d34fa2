"""The capacity formula: what everything below a store's folder may take, and how large its segments are."""

from __future__ import annotations

from dataclasses import dataclass

from ..format.errors import InvalidConfig
from ..format.layout import DIGEST_BYTES, KEY_BYTES_MAX, PAGE_BYTES
from .config import MIB, SEGMENT_BYTES_MIN, SEGMENTS_MIN, StoreConfig
from .heat import heat_bytes, slots_for_capacity
from .index_entry import ENTRY_BYTES
from .stats_file import folder_bytes_max

SEGMENT_DEFAULT_MIN = 64 * MIB
SEGMENT_DEFAULT_MAX = 4096 * MIB
BLOCKS_PER_SEGMENT = 32
LOG_BYTES = 4 * MIB
WAL_BYTES_MAX = 8 * MIB
WAL_BYTES_MIN = 2 * MIB
SEGMENTS_AT_LEAST = 4
SEGMENTS_AHEAD = 2
"""Segments whose blocks the index does not have yet: the open one and the spare."""
INDEX_ENTRY_BYTES_MAX = DIGEST_BYTES + KEY_BYTES_MAX + ENTRY_BYTES


@dataclass(frozen=True, slots=True)
class Budget:
    """The capacity formula: what everything below the store's folder may take, and what is set aside beside the segments."""

    capacity_bytes: int
    fixed_bytes: int
    """Superblock, heat table, the bounded log and WAL of the index, published statistics."""
    index_factor: float = 2.2
    """The index may double during compaction."""

    def for_segments(self, index_bytes: int, quarantine_bytes: int) -> int:
        """Bytes left for segments, the open one and the spare included."""
        return self.capacity_bytes - self.fixed_bytes - int(self.index_factor * index_bytes) - quarantine_bytes

    def index_growth_bytes(self, segment_bytes: int) -> int:
        """What the index may come to take more for the blocks of so many bytes of segments: the smallest blocks, the longest keys."""
        return int(self.index_factor * INDEX_ENTRY_BYTES_MAX) * (segment_bytes // (2 * PAGE_BYTES))


def segment_bytes_for(config: StoreConfig, budget: Budget, block_bytes_max: int) -> int:
    """Size of the next segment: 32 of the largest block between 64 MiB and 4 GiB, at most a sixteenth of the store."""
    if config.segment_bytes is not None:
        return config.segment_bytes
    wanted = min(max(BLOCKS_PER_SEGMENT * block_bytes_max, SEGMENT_DEFAULT_MIN), SEGMENT_DEFAULT_MAX)
    share = max(budget.for_segments(0, 0) // SEGMENTS_MIN, SEGMENT_BYTES_MIN)
    size_bytes = min(wanted, share)
    return size_bytes - size_bytes % PAGE_BYTES


def budget_for(config: StoreConfig) -> Budget:
    """The capacity formula with these options. Raises ``InvalidConfig`` when hardly anything would be left for segments."""
    rocksdb_bytes = 0
    if config.index_kind != "memory":  # which has nothing on disk, and publishes nothing
        rocksdb_bytes = wal_bytes_for(config) + LOG_BYTES + folder_bytes_max(config.capacity_bytes)
    budget = Budget(config.capacity_bytes, 2 * PAGE_BYTES + heat_bytes(slots_for_capacity(config.capacity_bytes)) + rocksdb_bytes)
    segment_bytes = config.segment_bytes or 64 * PAGE_BYTES
    smallest = SEGMENTS_AT_LEAST * segment_bytes + budget.index_growth_bytes(SEGMENTS_AHEAD * segment_bytes)
    if budget.for_segments(0, 0) < smallest:
        raise InvalidConfig(
            "the capacity is too small",
            expected=f"at least {budget.fixed_bytes + smallest} bytes with these options",
            actual=f"{config.capacity_bytes} bytes",
            action="Raise capacity, or set a smaller segment_bytes.",
        )
    return budget


def wal_bytes_for(config: StoreConfig) -> int:
    return min(WAL_BYTES_MAX, max(WAL_BYTES_MIN, config.capacity_bytes // 64))
