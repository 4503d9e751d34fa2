"""Whether somebody writes to a store, or follows it, without taking or making a lock."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

from ..format.layout import FOLLOWERS_NAME, LOCK_NAME

_FLOCK = struct.Struct("hhqqi4x")
_NOT_SUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)


def has_writer(store: Path) -> bool | None:
    """Whether a process holds the writer's lock; ``None`` when that cannot be told."""
    return _is_locked(store / LOCK_NAME)


def has_followers(store: Path) -> bool | None:
    """Whether processes read beside a writer; ``None`` when that cannot be told."""
    return _is_locked(store / FOLLOWERS_NAME)


def _is_locked(path: Path) -> bool | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked)
        kind: int = _FLOCK.unpack(answer)[0]
        return kind != fcntl.F_UNLCK
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:  # a file system without such locks; looking must not take one
            return None
        raise
    finally:
        os.close(descriptor)
