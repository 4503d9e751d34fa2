"""A device at the speed of drives that the machine does not have, in simulated time: for finding out what waits for what.

Nothing sleeps: bytes move at once, and a transfer is over when the simulated clock gets there.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from .device import Device, DeviceFile, IoBuffer, OpenMode
from .wrapping import WrappingDevice, WrappingFile, pass_on, running_future


class SimulatedTime:
    """A clock that jumps from one event to the next. Not thread-safe: one thread runs the simulation."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, time_s: float, event: Callable[[], None]) -> None:
        """Call ``event`` when it is ``time_s``, at the earliest now; events of the same time in the order in which they were given."""
        heapq.heappush(self._events, (max(time_s, self.now_s), next(self._order), event))

    def run(self) -> float:
        """Let time pass until nothing is left to happen; what time it is then."""
        while self._events:
            self.now_s, _, event = heapq.heappop(self._events)
            event()
        return self.now_s


class ThrottledDevice(WrappingDevice):
    """Reads and writes of ``inner`` at most at these rates, in bytes a second, one transfer after the other in each direction.

    Several drives below one folder are one device of their rates together. ``inner`` should end transfers at once, as a
    ``MemoryDevice`` without threads does.
    """

    def __init__(self, inner: Device, time: SimulatedTime, *, read_bytes_per_s: float, write_bytes_per_s: float) -> None:
        super().__init__(inner)
        self._time = time
        self._bytes_per_s = {"read": read_bytes_per_s, "write": write_bytes_per_s}
        self._free_at_s = {"read": 0.0, "write": 0.0}

    def _wrap(self, file: DeviceFile, path: str, mode: OpenMode) -> DeviceFile:
        return _ThrottledFile(file, self)

    def delay(self, operation: str, size_bytes: int, transfer: Future[int]) -> Future[int]:
        """The transfer, over when the drive has had the time for it."""
        start_s = max(self._time.now_s, self._free_at_s[operation])
        self._free_at_s[operation] = done_at_s = start_s + size_bytes / self._bytes_per_s[operation]
        delayed = running_future()
        self._time.at(done_at_s, lambda: pass_on(transfer, delayed))
        return delayed


class _ThrottledFile(WrappingFile):
    def __init__(self, inner: DeviceFile, device: ThrottledDevice) -> None:
        super().__init__(inner)
        self._device = device

    def read(self, offset: int, buffers: Sequence[IoBuffer]) -> Future[int]:
        return self._device.delay("read", _size_bytes(buffers), self.inner.read(offset, buffers))

    def write(self, offset: int, buffers: Sequence[IoBuffer]) -> Future[int]:
        return self._device.delay("write", _size_bytes(buffers), self.inner.write(offset, buffers))


def _size_bytes(buffers: Sequence[IoBuffer]) -> int:
    return sum(memoryview(buffer).nbytes for buffer in buffers)
