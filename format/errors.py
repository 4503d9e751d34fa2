"""Every exception kvlode raises, as one tree.

::

    KvlodeError
    ├── InvalidConfig        the caller asked for something that cannot be opened
    ├── InvalidBlock         a block of the wrong size, dtype or memory layout
    ├── InvalidKey           an empty or over-long key, metadata over its limit
    ├── FormatError          bytes on disk that are not what they should be
    │   ├── UnsupportedFormat    a newer or foreign format: nothing was touched
    │   └── CorruptRecord        damage, with place, expected and actual
    ├── DeviceError          an I/O call failed (operation, path, offset, errno)
    │   └── NoSpace              ENOSPC or EDQUOT
    ├── PathUnavailable      the I/O path that was required cannot be had here
    ├── StoreLocked          another process writes to this store
    ├── StoreFailed          the writer is latched after a failed write or sync
    └── StoreClosed          used after close, or in a forked child

A miss, a corrupt block and an I/O error during a *get*, and a refused *put*, are statuses
(``kvlode.Status``, ``kvlode.PutStatus``), never exceptions: they belong to normal operation.
"""

from __future__ import annotations

import errno as _errno
import os


class KvlodeError(Exception):
    """Base of all kvlode errors; the message names what, where, expected, actual and what to do."""

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        actual: object = None,
        action: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.actual = actual
        self.action = action
        super().__init__(self._message())

    def _message(self) -> str:
        parts = [self.what]
        if self.where is not None:
            parts.append(f"at {self.where}")
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.actual is not None:
            parts.append(f"found {self.actual}")
        message = "; ".join(parts)
        return f"{message}. {self.action}" if self.action else message


class InvalidConfig(KvlodeError, ValueError):
    """An option, or a combination of options, that no store can be opened with."""


class InvalidBlock(KvlodeError, ValueError):
    """A block that the namespace cannot take: wrong size, wrong dtype, not contiguous."""


class InvalidKey(KvlodeError, ValueError):
    """A key or metadata outside the limits of SPEC.md."""


class FormatError(KvlodeError):
    """Bytes on disk that do not follow SPEC.md."""


class UnsupportedFormat(FormatError):
    """A folder or file that is not a kvlode store, or a store of a newer format."""


class CorruptRecord(FormatError):
    """Damage in a structure on disk; ``check`` is the short name of the test that failed."""

    def __init__(
        self,
        check: str,
        *,
        where: object = None,
        expected: object = None,
        actual: object = None,
        action: str | None = None,
    ) -> None:
        self.check = check
        super().__init__(f"corrupt: {check}", where=where, expected=expected, actual=actual, action=action)


_ACTIONS = {
    _errno.EACCES: "Give this user the rights to it, or run as the user that it belongs to.",
    _errno.EPERM: "Give this user the rights to it, or run as the user that it belongs to.",
    _errno.EROFS: "Mount the file system for writing, or read the store with kvlode.follow.",
    _errno.ENOSPC: "Free space on this file system, or move the store to a larger one.",
    _errno.EDQUOT: "Free space in this user's quota, or have it raised.",
    _errno.EMFILE: "Raise this process's limit of open files (ulimit -n).",
    _errno.ENOENT: "Check the path; something else may have removed it.",
    _errno.EIO: "Check the drive and the system's log; blocks elsewhere can still be read.",
}
"""What to do about an error of the operating system, where the caller knows nothing better."""


class DeviceError(KvlodeError, OSError):
    """An I/O call failed; ``errno`` has the code of the operating system where there is one."""

    def __init__(
        self,
        operation: str,
        path: object,
        *,
        offset: int | None = None,
        length: int | None = None,
        errno: int | None = None,
        detail: str = "",
        action: str | None = None,
    ) -> None:
        place = f"{path}" if offset is None else f"{path} offset {offset} length {length}"
        reason = os.strerror(errno) if errno is not None else detail
        if errno is not None and detail:
            reason = f"{reason} ({detail})"
        action = action or (_ACTIONS.get(errno) if errno is not None else None)
        KvlodeError.__init__(self, f"{operation} failed", where=place, actual=reason, action=action)
        self.operation = operation
        self.path = str(path)
        self.offset = offset
        self.length = length
        self.errno = errno


class NoSpace(DeviceError):
    """The file system has no room left (ENOSPC) or the quota is used up (EDQUOT)."""


def device_error(
    operation: str,
    path: object,
    error: OSError,
    *,
    offset: int | None = None,
    length: int | None = None,
) -> DeviceError:
    """The kvlode error for an ``OSError`` of the operating system."""
    kind = NoSpace if error.errno in (_errno.ENOSPC, _errno.EDQUOT) else DeviceError
    return kind(operation, path, offset=offset, length=length, errno=error.errno)


class PathUnavailable(KvlodeError):
    """The required I/O path (for example GDS) is not available; the message lists what is missing."""


class StoreLocked(KvlodeError):
    """Another process holds the writer's lock of this store."""


class StoreFailed(KvlodeError):
    """The writer stopped for good after a failed write or sync; reads still work."""


class StoreClosed(KvlodeError):
    """The handle was closed, or belongs to the parent of this forked process."""
