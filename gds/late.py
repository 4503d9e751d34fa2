"""A device that completes transfers only when the test lets them: for deadlines, cancellation and memory that is handed back.

A held read has not touched its buffers yet; released, it fills them. A store that gave the memory back in the
meantime is caught by a canary in it.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from ..format.errors import KvlodeError
from .device import Device, DeviceFile, IoBuffer, OpenMode
from .monitor import Monitor
from .transfer import Uses
from .wrapping import WrappingDevice, WrappingFile, pass_on, running_future


@dataclass(frozen=True, slots=True)
class HeldTransfer:
    """A read or write that waits for the test."""

    operation: str
    path: str
    offset: int
    start: Callable[[], None]


class LateDevice(WrappingDevice):
    """Holds the operations named in ``holding`` (``read``, ``write``) until they are released, in any order and number."""

    def __init__(self, inner: Device, holding: Collection[str] = ("read", "write")) -> None:
        super().__init__(inner)
        self._changed = Monitor()
        self._lock = self._changed.lock
        self._holding = frozenset(holding)
        self._held: collections.deque[HeldTransfer] = collections.deque()

    def hold(self, *operations: str) -> None:
        """From now on hold these operations, and let others pass. Those held already stay held."""
        with self._lock:
            self._holding = frozenset(operations)

    def held(self) -> list[HeldTransfer]:
        """What waits now, oldest first."""
        with self._lock:
            return list(self._held)

    def wait_for_held(self, count: int, timeout_s: float = 30.0) -> bool:
        """Wait until at least ``count`` transfers are held."""
        return self._changed.wait_for(lambda: len(self._held) >= count, timeout_s)

    def release(self, count: int | None = None) -> int:
        """Let the oldest ``count`` transfers (default: all) go to the inner device; how many went."""
        with self._lock:
            count = len(self._held) if count is None else min(count, len(self._held))
            released = [self._held.popleft() for _ in range(count)]
        for transfer in released:
            transfer.start()
        return len(released)

    def open(self, path: str, mode: OpenMode) -> DeviceFile:
        return _LateFile(self.inner.open(path, mode), self)

    def close(self) -> None:
        """Release everything, then close."""
        self.hold()
        self.release()
        self.inner.close()

    def admit(self, transfer: HeldTransfer) -> None:
        """Hold a transfer, or start it when its operation is not held."""
        with self._lock:
            if transfer.operation in self._holding:
                self._held.append(transfer)
                self._changed.notify_all()
                return
        transfer.start()


class _LateFile(WrappingFile):
    def __init__(self, inner: DeviceFile, device: LateDevice) -> None:
        super().__init__(inner)
        self._device = device
        self._uses = Uses(inner.path)

    def read(self, offset: int, buffers: Sequence[IoBuffer]) -> Future[int]:
        return self._admit("read", offset, lambda: self.inner.read(offset, buffers))

    def write(self, offset: int, buffers: Sequence[IoBuffer]) -> Future[int]:
        return self._admit("write", offset, lambda: self.inner.write(offset, buffers))

    def close(self) -> None:
        """Wait for the held transfers of this file too, as every device does."""
        if self._uses.close():
            self.inner.close()

    def _admit(self, operation: str, offset: int, issue: Callable[[], Future[int]]) -> Future[int]:
        self._uses.begin(operation)
        future = running_future()
        future.add_done_callback(lambda _: self._uses.end())

        def start() -> None:
            try:
                pass_on(issue(), future)
            except (KvlodeError, ValueError) as error:
                future.set_exception(error.with_traceback(None))  # its frames refer to the buffers

        self._device.admit(HeldTransfer(operation, self.path, offset, start))
        return future
