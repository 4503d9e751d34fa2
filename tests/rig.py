"""A real store on a device in memory whose power a test can cut: the whole engine, no files, no waiting for drives."""

from __future__ import annotations

from typing import Any, Literal

from kvlode import DiskStore, StoreConfig
from kvlode.engine.index_memory import MemoryIndex
from kvlode.engine.opening import Environment, open_store
from kvlode.gds.memory import MemoryDevice
from model import ManualClock

KIB, MIB = 1 << 10, 1 << 20
PATH = "store"
CLOSE_S = 30.0
DEFAULTS = {
    "capacity": 64 * MIB,
    "buffer": 16 * MIB,
    "segment_bytes": MIB,
    "batch_bytes": MIB,
    "bounce_bytes": 8 * MIB,
    "encode_threads": 1,
    "io_threads": 2,
    "gds": "off",
    "index_kind": "memory",
}


class Rig:
    """Device and index of one store, across opens. ``options`` are fields of ``StoreConfig``; capacity and buffer in bytes."""

    def __init__(self, clock: ManualClock, **options: Any) -> None:
        self.clock = clock
        self.device = MemoryDevice()
        self.index = MemoryIndex()
        self.options: dict[str, Any] = DEFAULTS | options
        self.store = self.open()

    def open(self, **options: Any) -> DiskStore:
        """Open the store, with changed options if any are given."""
        self.options |= options
        environment = Environment(device=self.device, clock=self.clock, index=self.index)
        self.store = open_store(PATH, StoreConfig.build(**self.options), environment)
        return self.store

    def close(self) -> None:
        assert self.store.close(CLOSE_S)

    def reopen(self, *, lose_index: bool = False, **options: Any) -> DiskStore:
        """Close cleanly and open again."""
        self.close()
        self.device = self.device.crash(keep="all")
        self.index = MemoryIndex() if lose_index else self.index.reopen()
        return self.open(**options)

    def crash(
        self,
        seed: int = 0,
        *,
        keep: Literal["none", "all", "random"] = "none",
        keep_index: bool = False,
        lose_index: bool = False,
        **options: Any,
    ) -> DiskStore:
        """Cut the power and open again. ``keep`` is what happens to unsynced writes, ``keep_index`` to unsynced index entries."""
        self.device.power_off()  # first: what the index holds from now on was synced before
        index = MemoryIndex() if lose_index else self.index.crash(self.index.unsynced_batches if keep_index else 0)
        device = self.device.crash(seed, keep)
        self.store.close(CLOSE_S)  # only ends its threads: the drive no longer answers
        self.device, self.index = device, index
        return self.open(**options)
