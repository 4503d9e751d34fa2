"""A device that fails where a test wants it to: errors, short transfers, lost writes, flipped bits. Deterministic."""

from __future__ import annotations

import enum
import errno as _errno
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..format.errors import DeviceError, device_error
from .device import Device, DeviceFile, DeviceLock, FileStatus, IoBuffer, OpenMode
from .transfer import ByteView, byte_views
from .wrapping import WrappingDevice, WrappingFile, pass_on, running_future


class Effect(enum.Enum):
    """What a fault does."""

    ERROR = "error"
    """The operation is not carried out and fails with ``Fault.errno``."""
    SHORT = "short"
    """A read ends after half of its bytes and says so; a write carries out the first half, then fails with ``Fault.errno``."""
    BIT_FLIP = "bit-flip"
    """A read succeeds with one bit changed."""
    LOST = "lost"
    """A write or sync is not carried out and reports success: a drive that lies."""


def _everywhere(path: str) -> bool:
    return True


@dataclass(slots=True)
class Fault:
    """Which operations fail, and how.

    ``operation`` is the name of the method (``read``, ``write``, ``sync``, ``open``, ``preallocate``, ...). Of the
    operations on files for which ``where(path)`` holds, the ``nth`` fails, and the ones after it up to ``times`` in all
    (``None``: for good).
    """

    operation: str
    effect: Effect = Effect.ERROR
    errno: int = _errno.EIO
    nth: int = 1
    times: int | None = 1
    where: Callable[[str], bool] = _everywhere
    seed: int = 0
    """Decides which bit flips."""
    seen: int = field(default=0, init=False)
    """Matching operations so far."""
    hits: int = field(default=0, init=False)
    """How often it struck."""

    def strikes(self, operation: str, path: str) -> bool:
        """Count an operation; whether it is to fail."""
        if operation != self.operation or not self.where(path):
            return False
        self.seen += 1
        if self.seen < self.nth or (self.times is not None and self.hits >= self.times):
            return False
        self.hits += 1
        return True


class FaultyDevice(WrappingDevice):
    """Passes on to ``inner`` what no fault strikes. Faults may be added and cleared at any time."""

    def __init__(self, inner: Device, faults: Sequence[Fault] = ()) -> None:
        super().__init__(inner)
        self._faults = list(faults)
        self._lock = threading.Lock()

    def inject(self, fault: Fault) -> Fault:
        """Add a fault; returns it, for its ``hits``."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Everything works again."""
        with self._lock:
            self._faults.clear()

    def strike(self, operation: str, path: str) -> Fault | None:
        """The fault that strikes this operation."""
        with self._lock:
            struck = [fault for fault in self._faults if fault.strikes(operation, path)]
        return struck[0] if struck else None

    def check(self, operation: str, path: str) -> Fault | None:
        """Raise the error of a fault that strikes; a fault of another effect is returned."""
        fault = self.strike(operation, path)
        if fault is not None and fault.effect is not Effect.LOST:
            raise error_of(fault, operation, path)
        return fault

    def open(self, path: str, mode: OpenMode) -> DeviceFile:
        self.check("open", path)
        return _FaultyFile(self.inner.open(path, mode), self)

    def status(self, path: str) -> FileStatus | None:
        self.check("status", path)
        return self.inner.status(path)

    def list_folder(self, path: str) -> list[str]:
        self.check("list_folder", path)
        return self.inner.list_folder(path)

    def make_folder(self, path: str) -> None:
        self.check("make_folder", path)
        self.inner.make_folder(path)

    def remove(self, path: str) -> None:
        self.check("remove", path)
        self.inner.remove(path)

    def rename(self, source: str, target: str) -> None:
        self.check("rename", source)
        self.inner.rename(source, target)

    def sync_folder(self, path: str) -> None:
        if self.check("sync_folder", path) is None:
            self.inner.sync_folder(path)

    def free_bytes(self, path: str) -> int:
        self.check("free_bytes", path)
        return self.inner.free_bytes(path)

    def lock(self, path: str, *, shared: bool = False) -> DeviceLock | None:
        self.check("lock", path)
        return self.inner.lock(path, shared=shared)


class _FaultyFile(WrappingFile):
    def __init__(self, inner: DeviceFile, device: FaultyDevice) -> None:
        super().__init__(inner)
        self._device = device

    def read(self, offset: int, buffers: Sequence[IoBuffer]) -> Future[int]:
        fault = self._device.strike("read", self.path)
        if fault is None:
            return self.inner.read(offset, buffers)
        future = running_future()
        if fault.effect is Effect.ERROR:
            future.set_exception(error_of(fault, "read", self.path, offset))
            return future
        views = byte_views(buffers, writable=True)
        if fault.effect is Effect.SHORT:
            pass_on(self.inner.read(offset, first_half(views)), future)
        else:
            pass_on(self.inner.read(offset, buffers), future, lambda done: _flip_a_bit(views, done, fault.seed))
        return future

    def write(self, offset: int, buffers: Sequence[IoBuffer]) -> Future[int]:
        fault = self._device.strike("write", self.path)
        if fault is None:
            return self.inner.write(offset, buffers)
        future = running_future()
        error = error_of(fault, "write", self.path, offset)
        if fault.effect is Effect.LOST:
            future.set_result(sum(view.nbytes for view in byte_views(buffers, writable=False)))
        elif fault.effect is Effect.SHORT:

            def fail(_: int) -> int:
                raise error

            pass_on(self.inner.write(offset, first_half(byte_views(buffers, writable=False))), future, fail)
        else:
            future.set_exception(error)
        return future

    def sync(self) -> None:
        if self._device.check("sync", self.path) is None:
            self.inner.sync()

    def preallocate(self, size_bytes: int) -> None:
        self._device.check("preallocate", self.path)
        self.inner.preallocate(size_bytes)

    def truncate(self, size_bytes: int) -> None:
        self._device.check("truncate", self.path)
        self.inner.truncate(size_bytes)

    def punch(self, offset: int, length: int) -> None:
        self._device.check("punch", self.path)
        self.inner.punch(offset, length)


def error_of(fault: Fault, operation: str, path: str, offset: int | None = None) -> DeviceError:
    """The error that a fault reports (``NoSpace`` for its codes)."""
    return device_error(operation, path, OSError(fault.errno, "injected"), offset=offset)


def first_half(views: Sequence[ByteView]) -> list[ByteView]:
    """The first half of the bytes, in whole pages where there are several."""
    total_bytes = sum(view.nbytes for view in views)
    left_bytes = total_bytes // 2 // 4096 * 4096 or total_bytes // 2
    half: list[ByteView] = []
    for view in views:
        part = view[:left_bytes]
        left_bytes -= part.nbytes
        if part.nbytes:
            half.append(part)
    return half


def _flip_a_bit(views: Sequence[ByteView], read_bytes: int, seed: int) -> int:
    """Change one of the first ``read_bytes`` bytes by one bit; the seed says which."""
    if read_bytes:
        rng = random.Random(seed)
        position = rng.randrange(read_bytes)
        for view in views:
            if position < view.nbytes:
                view[position] ^= 1 << rng.randrange(8)
                break
            position -= view.nbytes
    return read_bytes
