"""A device that calls a test before each operation: to look at the drive, to cut the power, to fail, to interrupt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from kvlode.gds.device import Device, DeviceFile, IoBuffer, OpenMode
from kvlode.gds.wrapping import WrappingDevice, WrappingFile

Tap = Callable[[str, str], None]
"""Called with the name of the operation and the path, before it is carried out; may raise."""

CHANGES = ("create", "rename", "remove", "sync_folder", "write", "sync", "truncate", "punch", "preallocate")
"""Operations that change files, names, or what is durable of them; the others are ``open`` and ``read``."""


class TappingDevice(WrappingDevice):
    """Passes everything on; ``tap`` is called before each operation on files and names, but for closing and looking up."""

    def __init__(self, inner: Device, tap: Tap) -> None:
        super().__init__(inner)
        self.tap = tap

    def open(self, path: str, mode: OpenMode) -> DeviceFile:
        self.tap("create" if mode == "create" else "open", path)
        return _TappingFile(self.inner.open(path, mode), self)

    def rename(self, source: str, target: str) -> None:
        self.tap("rename", source)
        self.inner.rename(source, target)

    def remove(self, path: str) -> None:
        self.tap("remove", path)
        self.inner.remove(path)

    def sync_folder(self, path: str) -> None:
        self.tap("sync_folder", path)
        self.inner.sync_folder(path)


class _TappingFile(WrappingFile):
    def __init__(self, inner: DeviceFile, device: TappingDevice) -> None:
        super().__init__(inner)
        self._device = device

    def read(self, offset: int, buffers: Sequence[IoBuffer]) -> Future[int]:
        self._device.tap("read", self.path)
        return self.inner.read(offset, buffers)

    def write(self, offset: int, buffers: Sequence[IoBuffer]) -> Future[int]:
        self._device.tap("write", self.path)
        return self.inner.write(offset, buffers)

    def sync(self) -> None:
        self._device.tap("sync", self.path)
        self.inner.sync()

    def truncate(self, size_bytes: int) -> None:
        self._device.tap("truncate", self.path)
        self.inner.truncate(size_bytes)

    def punch(self, offset: int, length: int) -> None:
        self._device.tap("punch", self.path)
        self.inner.punch(offset, length)

    def preallocate(self, size_bytes: int) -> None:
        self._device.tap("preallocate", self.path)
        self.inner.preallocate(size_bytes)
