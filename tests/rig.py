"""A real store on a device in memory whose power a test can cut: the whole engine, no files, no waiting for drives."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from kvlode import BlockSpace, DeviceError, DiskStore, Status, StoreClosed
from kvlode.engine.index_memory import MemoryIndex
from kvlode.engine.testing import ManualClock, open_on_device
from kvlode.gds.device import Device, DeviceFile, OpenMode
from kvlode.gds.late import LateDevice
from kvlode.gds.memory import MemoryDevice
from kvlode.gds.wrapping import WrappingDevice, WrappingFile
from model import block_bytes

KIB, MIB = 1 << 10, 1 << 20
CLOSE_S = 30.0
DRIVE_BYTES = 1 << 40
"""Far more than any store here takes; makes the drive count what is allocated."""

INDEX_FACTOR = 2.2
"""The index may double while it is compacted."""


class Meter(WrappingDevice):
    """Notes the most that the drive ever held, files without a name included, and 2.2 times the index at that moment."""

    def __init__(self, inner: Device, index_bytes: Callable[[], int]) -> None:
        super().__init__(inner)
        self._index_bytes = index_bytes
        self._lock = threading.Lock()
        self.peak_bytes = 0

    def measure(self) -> int:
        """Look now; returns the peak so far."""
        try:
            used_bytes = DRIVE_BYTES - self.inner.free_bytes("/")
            index_bytes = self._index_bytes()
        except (DeviceError, StoreClosed):  # the power is off, or the index is closed: nothing grows any more
            return self.peak_bytes
        with self._lock:
            self.peak_bytes = max(self.peak_bytes, used_bytes + int(INDEX_FACTOR * index_bytes))
        return self.peak_bytes

    def _wrap(self, file: DeviceFile, path: str, mode: OpenMode) -> DeviceFile:
        return _MeteredFile(file, self)


class _MeteredFile(WrappingFile):
    def __init__(self, inner: DeviceFile, meter: Meter) -> None:
        super().__init__(inner)
        self._meter = meter

    def preallocate(self, size_bytes: int) -> None:
        self.inner.preallocate(size_bytes)
        self._meter.measure()

    def sync(self) -> None:
        self.inner.sync()
        self._meter.measure()


class Rig:
    """Device and index of one store, across opens. ``options`` as for ``open_on_device``.

    ``wrap`` puts a device of the test's choice (failing, late) around the one in memory, anew after each crash: ``device``
    is what the store sees, ``memory`` the drive itself, ``meter`` (outermost) what it ever held.
    """

    def __init__(self, clock: ManualClock, *, wrap: Callable[[Device], Device] | None = None, **options: Any) -> None:
        self.clock = clock
        self.options = options
        self._wrap = wrap
        self.index = MemoryIndex()
        self._use(MemoryDevice(capacity_bytes=DRIVE_BYTES))
        self.store = self.open()

    def _use(self, memory: MemoryDevice) -> None:
        self.memory = memory
        self.device: Any = memory if self._wrap is None else self._wrap(memory)
        self.meter = Meter(self.device, lambda: self.index.size_bytes())

    def open(self, **options: Any) -> DiskStore:
        """Open the store, with changed options if any are given."""
        self.options = self.options | options
        self.store = open_on_device(self.meter, index=self.index, clock=self.clock, **self.options)
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
        self.memory.power_off()  # first: what the index holds from now on was synced before
        index = MemoryIndex() if lose_index else self.index.crash(self.index.unsynced_batches if keep_index else 0)
        memory = self.memory.crash(seed, keep)
        if isinstance(self.device, LateDevice):
            self.device.hold()
            self.device.release()
        self.store.close(CLOSE_S)  # only ends its threads: the drive no longer answers
        self.index = index
        self._use(memory)
        return self.open(**options)

    # --- what tests ask and make happen ---------------------------------------------------------------------------

    def assert_within_capacity(self) -> None:
        """The drive never held more than the capacity formula allows (the heat table is in memory here: it is added)."""
        budget = self.store._core.budget
        peak_bytes = self.meter.measure() + budget.fixed_bytes
        assert peak_bytes <= budget.capacity_bytes, f"{peak_bytes} bytes were used, the capacity is {budget.capacity_bytes}"

    def counter(self, name: str) -> int:
        """A counter of the open store."""
        return int(self.store.stats()["counters"].get(name, 0))

    def segment_of(self, space: BlockSpace, key: bytes) -> int | None:
        """Id of the segment that the index says a block is in; ``None`` when it has no entry."""
        entry = self.store._core.catalog.find([space.digest + key])[0]
        return None if entry is None else entry.segment_id

    def segment_exists(self, segment_id: int) -> bool:
        """Whether the file of a segment is there."""
        return self.memory.status(self.store._core.segments.path(segment_id)) is not None


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether a condition that nobody announces comes true before the deadline."""
    deadline_s = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        pause.wait(0.002)
    return True


def read(space: BlockSpace, key: bytes, size: int) -> tuple[Status, np.ndarray]:
    """Read one block into a fresh destination that is not zero."""
    out = np.full(size, 0xA5, np.uint8)
    return space.get_into(key, out), out


def put_blocks(space: BlockSpace, first: int, last: int, size: int, prefix: bytes = b"filler ") -> None:
    """Put numbered blocks that do not compress; each must be accepted."""
    for number in range(first, last):
        key = prefix + b"%d" % number
        status = space.put(key, block_bytes(key, 4 * number, size))
        assert status, f"{key!r}: {status}"
