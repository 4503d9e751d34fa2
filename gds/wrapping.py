"""A device around another device: everything is passed on. The wrappers for tests change what they are about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from .device import Device, DeviceFile, DeviceLock, FileStatus, IoBuffer, IoCounter, IoPath, OpenMode


class WrappingDevice:
    """Passes every call to ``inner``; files come wrapped by ``_wrap``."""

    def __init__(self, inner: Device) -> None:
        self.inner = inner
        self.alignment = inner.alignment
        self.accepts_device_memory = inner.accepts_device_memory

    def _wrap(self, file: DeviceFile, path: str, mode: OpenMode) -> DeviceFile:
        return WrappingFile(file)

    def open(self, path: str, mode: OpenMode) -> DeviceFile:
        return self._wrap(self.inner.open(path, mode), path, mode)

    def status(self, path: str) -> FileStatus | None:
        return self.inner.status(path)

    def list_folder(self, path: str) -> list[str]:
        return self.inner.list_folder(path)

    def make_folder(self, path: str) -> None:
        self.inner.make_folder(path)

    def remove(self, path: str) -> None:
        self.inner.remove(path)

    def rename(self, source: str, target: str) -> None:
        self.inner.rename(source, target)

    def sync_folder(self, path: str) -> None:
        self.inner.sync_folder(path)

    def free_bytes(self, path: str) -> int:
        return self.inner.free_bytes(path)

    def lock(self, path: str, *, shared: bool = False) -> DeviceLock | None:
        return self.inner.lock(path, shared=shared)

    def counters(self) -> Mapping[IoPath, IoCounter]:
        return self.inner.counters()

    def paths(self) -> Mapping[str, IoPath]:
        return self.inner.paths()

    def close(self) -> None:
        self.inner.close()


class WrappingFile:
    """Passes every call to ``inner``."""

    def __init__(self, inner: DeviceFile) -> None:
        self.inner = inner
        self.path = inner.path

    def read(self, offset: int, buffers: Sequence[IoBuffer]) -> Future[int]:
        return self.inner.read(offset, buffers)

    def read_now(self, offset: int, buffers: Sequence[IoBuffer]) -> int:
        """Through ``read``, so that a wrapper has only that to change."""
        return self.read(offset, buffers).result()

    def write(self, offset: int, buffers: Sequence[IoBuffer]) -> Future[int]:
        return self.inner.write(offset, buffers)

    def sync(self) -> None:
        self.inner.sync()

    def preallocate(self, size_bytes: int) -> None:
        self.inner.preallocate(size_bytes)

    def truncate(self, size_bytes: int) -> None:
        self.inner.truncate(size_bytes)

    def punch(self, offset: int, length: int) -> None:
        self.inner.punch(offset, length)

    def status(self) -> FileStatus:
        return self.inner.status()

    def close(self) -> None:
        self.inner.close()


def running_future() -> Future[int]:
    """A future that cannot be cancelled, as those of a running transfer."""
    future: Future[int] = Future()
    future.set_running_or_notify_cancel()
    return future


def pass_on(source: Future[int], target: Future[int], before: Callable[[int], int] | None = None) -> None:
    """End ``target`` as ``source`` ends; ``before`` sees (and may change) the result before anybody who waits does."""

    def ended(done: Future[int]) -> None:
        try:
            result = done.result()
            result = result if before is None else before(result)
        except BaseException as error:  # whatever it is, it belongs to whoever waits
            target.set_exception(error.with_traceback(None))  # its frames refer to the buffers
        else:
            target.set_result(result)

    source.add_done_callback(ended)
