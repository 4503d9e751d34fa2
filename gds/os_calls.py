"""Linux system calls that Python's ``os`` does not have, or has in a form that hides what happened.

``fallocate(2)`` is called directly because ``os.posix_fallocate`` writes every block where the file system cannot reserve space.
All functions raise ``OSError`` with the errno of the call.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02

FILE_SYSTEMS = {
    0x0000EF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0x794C7630: "overlay",
    0x00006969: "nfs",
    0x65735546: "fuse",
    0x2FC12FC1: "zfs",
    0xF2F52010: "f2fs",
    0x0BD00BD0: "lustre",
    0x517B: "smb",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x47504653: "gpfs",
}
MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})
"""File systems whose store *is* the page cache: O_DIRECT, where accepted, means nothing there."""

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_MASK_AT = 0x00
_STATX_DIO_AT = 0x98

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """``fallocate(2)``, repeated when a signal interrupts it."""
    while _libc.fallocate(descriptor, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def file_system_of(descriptor: int) -> str:
    """Name of the file system that holds an open file; its magic number in hex where the name is not known."""
    result = ctypes.create_string_buffer(512)
    if _libc.fstatfs(descriptor, result) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    magic = ctypes.c_long.from_buffer(result).value & 0xFFFFFFFF
    return FILE_SYSTEMS.get(magic, hex(magic))


def direct_alignment(descriptor: int) -> tuple[int, int] | None:
    """What O_DIRECT needs here, as (alignment of memory addresses, alignment of offsets and lengths), in bytes.

    ``None`` when the kernel (before 6.1) or the file system does not tell.
    """
    if not hasattr(_libc, "statx"):
        return None
    result = ctypes.create_string_buffer(512)
    if _libc.statx(descriptor, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, result) != 0:
        return None
    (mask,) = struct.unpack_from("I", result, _STATX_MASK_AT)
    memory_bytes, offset_bytes = struct.unpack_from("II", result, _STATX_DIO_AT)
    if not mask & _STATX_DIOALIGN or not memory_bytes or not offset_bytes:
        return None
    return memory_bytes, offset_bytes


def set_direct(descriptor: int) -> bool:
    """Switch an open file to O_DIRECT; ``False`` where its file system refuses.

    Done after opening: ``open`` with O_CREAT and O_DIRECT leaves a new file behind when it refuses.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY):
            return False
        raise
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def try_lock(descriptor: int, *, shared: bool) -> bool:
    """Lock a whole file for this open file description; ``False`` when another description holds it.

    Open-file-description locks belong to the descriptor, not to the process: a second one in the same process
    is refused, and closing another descriptor of the file does not drop it. Where they are missing, ``flock``.
    """
    kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock_struct(kind))
        return True
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS):
            raise
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def unlock(descriptor: int) -> None:
    """Drop a lock taken by ``try_lock``, for every copy of the descriptor (also those inherited by forked children)."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock_struct(fcntl.F_UNLCK))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS):
            raise
    fcntl.flock(descriptor, fcntl.LOCK_UN)


def _flock_struct(kind: int) -> bytes:
    """``struct flock`` of 64-bit Linux: type, whence, start, length, pid (0 for open-file-description locks)."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)
