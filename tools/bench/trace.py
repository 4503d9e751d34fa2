"""What a store asked of its drive: places, lengths, order, preallocation and syncs, for the bare loop to do the same."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ...gds.device import Device, DeviceFile, IoBuffer, OpenMode
from ...gds.wrapping import WrappingDevice, WrappingFile

Kind: TypeAlias = Literal["create", "preallocate", "write", "sync", "truncate", "close", "read"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One request. ``lane`` is the thread that made it; ``after`` (of a sync) counts the writes that had ended by then."""

    kind: Kind
    file: int
    lane: str
    offset: int = 0
    length: int = 0
    after: int = 0


@dataclass(slots=True)
class Trace:
    """The operations of a store on its segments, in the order in which they were asked for."""

    operations: list[Operation] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    """Path of each file number."""
    in_flight_bytes_max: int = 0
    in_flight_max: int = 0
    """Requests, however large."""
    prepared: int = 0
    """How many of the operations were made before the measurement began (a segment that was made in advance)."""

    def cut(self) -> Trace:
        """What was noted until now."""
        return dataclasses.replace(self, operations=list(self.operations), paths=list(self.paths))

    def of_kind(self, kind: Kind) -> list[Operation]:
        """Operations of the measured part."""
        return [operation for operation in self.operations[self.prepared :] if operation.kind == kind]

    def total_bytes(self, kind: Kind) -> int:
        return sum(operation.length for operation in self.of_kind(kind))

    def typical_bytes(self, kind: Kind) -> int:
        """Median length of the requests; 0 without any."""
        lengths = sorted(operation.length for operation in self.of_kind(kind))
        return lengths[len(lengths) // 2] if lengths else 0


class TracingDevice(WrappingDevice):
    """Passes everything on and notes what happens to segment files from its making on; ``begin`` marks where the measurement starts."""

    def __init__(self, inner: Device) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._in_flight = 0
        self._in_flight_bytes = 0
        self._writes_ended = 0
        self.trace = Trace()

    def begin(self) -> Trace:
        """What follows is measured."""
        with self._lock:
            self.trace.prepared = len(self.trace.operations)
            self.trace.in_flight_max, self.trace.in_flight_bytes_max = self._in_flight, self._in_flight_bytes
            return self.trace

    def _wrap(self, file: DeviceFile, path: str, mode: OpenMode) -> DeviceFile:
        if not path.endswith((".seg", ".new")):
            return file
        with self._lock:
            known = path in self.trace.paths and mode != "create"
            number = self.trace.paths.index(path) if known else len(self.trace.paths)
            if not known:
                self.trace.paths.append(path)
        if mode == "create":
            self.note("create", number)
        return _TracingFile(file, self, number)

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        with self._lock:
            self.trace.paths = [target if path == source else path for path in self.trace.paths]

    def note(self, kind: Kind, file: int, offset: int = 0, length: int = 0) -> None:
        operation_lane = threading.current_thread().name
        with self._lock:
            operation = Operation(kind, file, operation_lane, offset, length, self._writes_ended)
            self.trace.operations.append(operation)

    def began(self, length: int) -> None:
        with self._lock:
            self._in_flight += 1
            self._in_flight_bytes += length
            self.trace.in_flight_max = max(self.trace.in_flight_max, self._in_flight)
            self.trace.in_flight_bytes_max = max(self.trace.in_flight_bytes_max, self._in_flight_bytes)

    def ended(self, length: int, *, write: bool) -> None:
        with self._lock:
            self._in_flight -= 1
            self._in_flight_bytes -= length
            self._writes_ended += write


class _TracingFile(WrappingFile):
    """One segment file: notes, then passes on."""

    def __init__(self, inner: DeviceFile, device: TracingDevice, number: int) -> None:
        super().__init__(inner)
        self._device = device
        self._number = number

    def read(self, offset: int, buffers: Sequence[IoBuffer]) -> Future[int]:
        length = sum(buffer.nbytes for buffer in buffers)
        self._device.note("read", self._number, offset, length)
        return self._counted(super().read(offset, buffers), length, write=False)

    def read_now(self, offset: int, buffers: Sequence[IoBuffer]) -> int:
        length = sum(buffer.nbytes for buffer in buffers)
        self._device.note("read", self._number, offset, length)
        self._device.began(length)
        try:
            return self.inner.read_now(offset, buffers)
        finally:
            self._device.ended(length, write=False)

    def write(self, offset: int, buffers: Sequence[IoBuffer]) -> Future[int]:
        length = sum(buffer.nbytes for buffer in buffers)
        self._device.note("write", self._number, offset, length)
        return self._counted(super().write(offset, buffers), length, write=True)

    def _counted(self, future: Future[int], length: int, *, write: bool) -> Future[int]:
        self._device.began(length)
        future.add_done_callback(lambda _: self._device.ended(length, write=write))
        return future

    def sync(self) -> None:
        self._device.note("sync", self._number)
        super().sync()

    def preallocate(self, size_bytes: int) -> None:
        self._device.note("preallocate", self._number, length=size_bytes)
        super().preallocate(size_bytes)

    def truncate(self, size_bytes: int) -> None:
        self._device.note("truncate", self._number, length=size_bytes)
        super().truncate(size_bytes)

    def close(self) -> None:
        self._device.note("close", self._number)
        super().close()
