"""Locks on files: between processes, and dropped by the kernel when their process dies."""

from __future__ import annotations

import errno
import os

from ..format.errors import device_error
from .os_calls import try_lock, unlock

_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


class PosixLock:
    """A lock held through one descriptor of its own."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._pid = os.getpid()

    def release(self) -> None:
        """Unlock. In a forked child this is ``abandon``: the lock belongs to the process that took it. Twice is allowed."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        try:
            if os.getpid() == self._pid:
                unlock(descriptor)  # explicitly: a forked child may still have a copy of the descriptor
        finally:
            os.close(descriptor)

    def abandon(self) -> None:
        """Close this process's copy and unlock nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def take_lock(path: str, *, shared: bool) -> PosixLock | None:
    """Lock a file, which is made when it is missing; ``None`` when another holder is in the way. Raises ``DeviceError``."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if not shared or error.errno not in _NOT_WRITABLE:
            raise device_error("open lock", path, error) from error
        descriptor = _open_to_share(path)
    try:
        if try_lock(descriptor, shared=shared):
            return PosixLock(path, descriptor)
    except OSError as error:
        os.close(descriptor)
        raise device_error("lock", path, error) from error
    os.close(descriptor)
    return None


def _open_to_share(path: str) -> int:
    """A read-only file system: an existing lock file can still be shared."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise device_error("open lock", path, error) from error
