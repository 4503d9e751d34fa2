"""Files out of the page cache or into it, so that a measurement starts cold, or warm, and not by chance."""

from __future__ import annotations

import os
from pathlib import Path


def forget_pages(folder: Path) -> None:
    """Ask the kernel to drop what it holds of the files below ``folder``. Segments are read with O_DIRECT anyway where the file system
    takes it; the index is not."""
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def fetch_pages(folder: Path) -> None:
    """Read the files below ``folder``, so that the kernel holds them: as they are for a process that starts again, not for a machine."""
    memory = bytearray(1 << 20)
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(memory):
                    pass
