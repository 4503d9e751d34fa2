"""Every operation of a store in order, and what a drive would hold after any prefix of them.

A crash test records a run once, then replays prefixes of the log into memory devices and lets each lose its power:
``replay(log[:n]).crash(seed, "random")``.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeAlias

from .device import Device, DeviceFile, DeviceLock, IoBuffer, OpenMode
from .memory import MemoryDevice, MemoryFile
from .transfer import byte_views
from .wrapping import WrappingDevice, WrappingFile, pass_on, running_future


@dataclass(frozen=True, slots=True)
class MakeFolder:
    path: str


@dataclass(frozen=True, slots=True)
class Open:
    """``file`` is the number of this handle in the log."""

    file: int
    path: str
    mode: OpenMode


@dataclass(frozen=True, slots=True)
class Read:
    file: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Write:
    """A write was handed over: from here on any part of it may be on the drive. ``write`` is its number."""

    file: int
    write: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class WriteDone:
    """The future of a write was about to succeed: a sync that begins from here on covers it."""

    write: int


@dataclass(frozen=True, slots=True)
class Sync:
    """A sync returned. It covers what was done when it began, at position ``began`` of the log."""

    file: int
    began: int


@dataclass(frozen=True, slots=True)
class Preallocate:
    file: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Truncate:
    file: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Punch:
    file: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Close:
    file: int


@dataclass(frozen=True, slots=True)
class Remove:
    path: str


@dataclass(frozen=True, slots=True)
class Rename:
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class SyncFolder:
    """A folder's sync returned; ``began`` as for ``Sync``."""

    path: str
    began: int


@dataclass(frozen=True, slots=True)
class MakeLockFile:
    """A lock was asked for, which creates its file."""

    path: str


Operation: TypeAlias = (
    MakeFolder
    | Open
    | Read
    | Write
    | WriteDone
    | Sync
    | Preallocate
    | Truncate
    | Punch
    | Close
    | Remove
    | Rename
    | SyncFolder
    | MakeLockFile
)


class Log:
    """Operations in the order in which they took effect. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._operations: list[Operation] = []
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._operations)

    def add(self, operation: Operation) -> None:
        with self._lock:
            self._operations.append(operation)

    def number(self) -> int:
        """A new number for a handle or a write."""
        with self._lock:
            self._numbers += 1
            return self._numbers

    def snapshot(self) -> list[Operation]:
        """A copy of everything logged so far."""
        with self._lock:
            return list(self._operations)


class RecordingDevice(WrappingDevice):
    """Logs the operations on ``inner`` that succeed (writes from the moment that they are handed over)."""

    def __init__(self, inner: Device) -> None:
        super().__init__(inner)
        self.log = Log()

    def operations(self) -> list[Operation]:
        """What was done so far, in order."""
        return self.log.snapshot()

    def open(self, path: str, mode: OpenMode) -> DeviceFile:
        file = self.inner.open(path, mode)
        number = self.log.number()
        self.log.add(Open(number, path, mode))
        return _RecordingFile(file, number, self.log)

    def make_folder(self, path: str) -> None:
        self.inner.make_folder(path)
        self.log.add(MakeFolder(path))

    def remove(self, path: str) -> None:
        self.inner.remove(path)
        self.log.add(Remove(path))

    def rename(self, source: str, target: str) -> None:
        self.inner.rename(source, target)
        self.log.add(Rename(source, target))

    def sync_folder(self, path: str) -> None:
        began = len(self.log)
        self.inner.sync_folder(path)
        self.log.add(SyncFolder(path, began))

    def lock(self, path: str, *, shared: bool = False) -> DeviceLock | None:
        lock = self.inner.lock(path, shared=shared)
        self.log.add(MakeLockFile(path))
        return lock


class _RecordingFile(WrappingFile):
    def __init__(self, inner: DeviceFile, number: int, log: Log) -> None:
        super().__init__(inner)
        self._number = number
        self._log = log

    def read(self, offset: int, buffers: Sequence[IoBuffer]) -> Future[int]:
        future = self.inner.read(offset, buffers)
        self._log.add(Read(self._number, offset, sum(memoryview(buffer).nbytes for buffer in buffers)))
        return future

    def write(self, offset: int, buffers: Sequence[IoBuffer]) -> Future[int]:
        data = b"".join(byte_views(buffers, writable=False))
        number = self._log.number()
        self._log.add(Write(self._number, number, offset, data))
        future = running_future()

        def done(written: int) -> int:
            self._log.add(WriteDone(number))
            return written

        pass_on(self.inner.write(offset, buffers), future, done)
        return future

    def sync(self) -> None:
        began = len(self._log)
        self.inner.sync()
        self._log.add(Sync(self._number, began))

    def preallocate(self, size_bytes: int) -> None:
        self.inner.preallocate(size_bytes)
        self._log.add(Preallocate(self._number, size_bytes))

    def truncate(self, size_bytes: int) -> None:
        self.inner.truncate(size_bytes)
        self._log.add(Truncate(self._number, size_bytes))

    def punch(self, offset: int, length: int) -> None:
        self.inner.punch(offset, length)
        self._log.add(Punch(self._number, offset, length))

    def close(self) -> None:
        self.inner.close()
        self._log.add(Close(self._number))


def replay(operations: Sequence[Operation], base: MemoryDevice | None = None) -> MemoryDevice:
    """A memory device on which the operations were carried out, durable as far as their syncs say.

    ``operations`` is a log or a prefix of one, from the start. ``base`` is what the recorded device held before
    (default: nothing); it is not changed. Writes that were not done at the end are applied, unsynced.
    """
    replayer = _Replayer(MemoryDevice() if base is None else base.crash(keep="all"))
    for operation in _in_order_of_effect(operations):
        replayer.apply(operation)
    replayer.apply_unfinished_writes()
    return replayer.device


def _in_order_of_effect(operations: Sequence[Operation]) -> list[Operation]:
    """The log with each sync moved to where it began: it covers nothing that came later."""
    placed: list[tuple[float, int, Operation]] = []
    for position, operation in enumerate(operations):
        began = operation.began - 0.5 if isinstance(operation, Sync | SyncFolder) else position
        placed.append((began, position, operation))
    return [operation for _, _, operation in sorted(placed, key=lambda item: item[:2])]


class _Replayer:
    def __init__(self, device: MemoryDevice) -> None:
        self.device = device
        self._files: dict[int, MemoryFile] = {}
        self._unfinished: dict[int, Write] = {}

    def apply(self, operation: Operation) -> None:
        match operation:
            case MakeFolder(path):
                self.device.make_folder(path)
            case Open(file, path, mode):
                self._files[file] = self.device.open(path, "create" if mode == "create" else "write")
            case Write():
                self._unfinished[operation.write] = operation
            case WriteDone(write):
                self._write(self._unfinished.pop(write))
            case Remove(path):
                self.device.remove(path)
            case Rename(source, target):
                self.device.rename(source, target)
            case SyncFolder(path):
                self.device.sync_folder(path)
            case MakeLockFile(path):
                lock = self.device.lock(path, shared=True)
                if lock is not None:
                    lock.release()
            case _:
                self._apply_to_file(operation)

    def _apply_to_file(self, operation: Operation) -> None:
        match operation:
            case Sync(file):
                self._files[file].sync()
            case Preallocate(file, size_bytes):
                self._files[file].preallocate(size_bytes)
            case Truncate(file, size_bytes):
                self._files[file].truncate(size_bytes)
            case Punch(file, offset, length):
                self._files[file].punch(offset, length)
            case _:
                return  # reads and closed handles leave no trace on a drive; a handle stays for writes that were not done

    def apply_unfinished_writes(self) -> None:
        for write in self._unfinished.values():
            self._write(write)
        self._unfinished.clear()

    def _write(self, write: Write) -> None:
        self._files[write.file].write(write.offset, [write.data]).result()
