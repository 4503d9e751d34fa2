"""The device interface: the only way kvlode touches its files.

A device is a small file system of its own (open, list, rename, remove, sync) whose files read and
write whole aligned pages from caller-owned buffers and answer with futures. The engine is written
against these protocols alone, so the same store runs on POSIX files, on cuFile, in memory, and behind
wrappers that record operations or inject faults.

Rules every implementation keeps (``tests/device_conformance.py`` checks them):

* Paths are ``str`` below any root; folders are created explicitly.
* ``offset``, every buffer's length and (for direct I/O) every buffer's address should be multiples of
  ``Device.alignment``. Requests that are not still work, through a slower path that is counted.
* Buffers belong to the operation until its future is done; afterwards the device keeps no reference.
* A completed write is *not* durable before ``sync`` returned (ext4 drops unsynced O_DIRECT appends).
* Errors are ``DeviceError`` (``NoSpace`` for ENOSPC/EDQUOT), raised by the call or through the future.
* All methods may be called from any thread.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

HostBuffer: TypeAlias = Any
"""A writable C-contiguous object of the buffer protocol, one byte per item (``numpy.uint8`` array or memoryview)."""

DeviceBuffer: TypeAlias = Any
"""Memory of a GPU: an object with ``__cuda_array_interface__``; only cuFile devices accept it."""

IoBuffer: TypeAlias = Any
"""A ``HostBuffer``, or a ``DeviceBuffer`` where ``Device.accepts_device_memory`` is true."""

OpenMode: TypeAlias = Literal["read", "write", "create"]
"""``read`` an existing file, ``write`` (read and write) an existing file, ``create`` a new one (fails if it exists)."""


class IoPath(enum.StrEnum):
    """How bytes travelled between memory and the drive; every byte is counted under exactly one."""

    GDS = "gds"
    CUFILE_COMPAT = "cufile-compat"
    DIRECT = "o_direct"
    BUFFERED = "buffered"
    MEMORY = "memory"


@dataclass(slots=True)
class IoCounter:
    """Operations and bytes of one ``IoPath`` since the device was made."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    write_bytes: int = 0


@dataclass(frozen=True, slots=True)
class FileStatus:
    """Size of a file and the bytes that the file system has allocated for it."""

    size_bytes: int
    allocated_bytes: int


@runtime_checkable
class DeviceFile(Protocol):
    """One open file of a device."""

    path: str

    def read(self, offset: int, buffers: Sequence[IoBuffer]) -> Future[int]:
        """Fill ``buffers`` one after the other from ``offset``; the future is the number of bytes read (short only at the file's end)."""
        ...

    def read_now(self, offset: int, buffers: Sequence[IoBuffer]) -> int:
        """``read``, for a thread that waits for it anyway: returns when the bytes are there, with their number."""
        ...

    def write(self, offset: int, buffers: Sequence[IoBuffer]) -> Future[int]:
        """Write ``buffers`` one after the other at ``offset``; the future is the number of bytes, always all of them."""
        ...

    def sync(self) -> None:
        """Make every write whose future is done, and the size, durable (fdatasync). After a failure the file must not be trusted."""
        ...

    def preallocate(self, size_bytes: int) -> None:
        """Reserve space up to ``size_bytes`` and set the size; the reserved range reads as zeros."""
        ...

    def truncate(self, size_bytes: int) -> None:
        """Cut or extend the file to ``size_bytes``, freeing what lies behind."""
        ...

    def punch(self, offset: int, length: int) -> None:
        """Free a range without changing the size; it reads as zeros afterwards."""
        ...

    def status(self) -> FileStatus:
        """Current size and allocation."""
        ...

    def close(self) -> None:
        """Release the handle; pending operations finish first. Closing twice is allowed."""
        ...


class DeviceLock(Protocol):
    """A held lock; released by ``release`` or by the end of the process, never by another handle's close."""

    def release(self) -> None: ...

    def abandon(self) -> None:
        """Drop this process's copy after ``fork`` without releasing the parent's lock."""
        ...


@runtime_checkable
class Device(Protocol):
    """A place for files; see the module's rules."""

    alignment: int
    accepts_device_memory: bool

    def open(self, path: str, mode: OpenMode) -> DeviceFile: ...

    def status(self, path: str) -> FileStatus | None:
        """Size and allocation of a file, ``None`` when there is none."""
        ...

    def list_folder(self, path: str) -> list[str]:
        """Names in a folder, sorted; a missing folder is an error."""
        ...

    def make_folder(self, path: str) -> None:
        """Create a folder and its missing parents, durably (no ``sync_folder`` needed); an existing one is fine."""
        ...

    def remove(self, path: str) -> None:
        """Unlink a file; a missing one is an error."""
        ...

    def rename(self, source: str, target: str) -> None:
        """Atomically rename a file, replacing the target."""
        ...

    def sync_folder(self, path: str) -> None:
        """Make creations, renames and removals in a folder durable."""
        ...

    def free_bytes(self, path: str) -> int:
        """Bytes that an unprivileged writer can still allocate below ``path``."""
        ...

    def lock(self, path: str, *, shared: bool = False) -> DeviceLock | None:
        """Take a lock on a file (made if missing); ``None`` when somebody else holds it. Never blocks."""
        ...

    def counters(self) -> Mapping[IoPath, IoCounter]:
        """Bytes and operations by path since the device was made."""
        ...

    def paths(self) -> Mapping[str, IoPath]:
        """The path that host-memory and device-memory transfers take here: keys ``host`` and ``device`` (absent if refused)."""
        ...

    def close(self) -> None:
        """Stop the device's threads; open files must be closed first. Bounded."""
        ...
