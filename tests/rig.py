"""A real store on a device in memory whose power a test can cut: the whole engine, no files, no waiting for drives."""

from __future__ import annotations

from typing import Any, Literal

from kvlode import DiskStore
from kvlode.engine.index_memory import MemoryIndex
from kvlode.engine.testing import ManualClock, open_on_device
from kvlode.gds.memory import MemoryDevice

KIB, MIB = 1 << 10, 1 << 20
CLOSE_S = 30.0


class Rig:
    """Device and index of one store, across opens. ``options`` as for ``open_on_device``."""

    def __init__(self, clock: ManualClock, **options: Any) -> None:
        self.clock = clock
        self.device = MemoryDevice()
        self.index = MemoryIndex()
        self.options = options
        self.store = self.open()

    def open(self, **options: Any) -> DiskStore:
        """Open the store, with changed options if any are given."""
        self.options = self.options | options
        self.store = open_on_device(self.device, index=self.index, clock=self.clock, **self.options)
        return self.store

    def close(self) -> None:
        """Close cleanly, in bounded time."""
        assert self.store.close(CLOSE_S)

    def reopen(self, *, lose_index: bool = False, **options: Any) -> DiskStore:
        """Close cleanly and open again."""
        self.close()
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
