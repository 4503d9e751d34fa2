"""What the kernel knows: where the bytes of a read came from, what a folder takes on the drive; and memory that O_DIRECT takes."""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from .base import with_descriptor

HUGE_PAGE_BYTES = 2 << 20
SECTOR_BYTES = 512


def aligned_rows(rows: int, row_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Memory on whole huge pages where the kernel gives them: drives read into small pages more slowly. Rows begin one behind the other."""
    size_bytes = rows * row_bytes
    mapping = mmap.mmap(-1, size_bytes + 2 * HUGE_PAGE_BYTES)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(mapping, np.uint8)
    skip = -memory.ctypes.data % HUGE_PAGE_BYTES
    return memory[skip : skip + size_bytes].reshape(rows, row_bytes)


def device_read_bytes() -> int:
    """Bytes that the kernel has fetched from drives for this process: reads from the page cache are not among them."""
    match = re.search(r"^read_bytes: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)
    return int(match.group(1)) if match else 0


def disk_bytes(folder: Path) -> int:
    """What the files below ``folder`` take on the drive; holes take nothing, reserved space does."""
    return sum(path.lstat().st_blocks * SECTOR_BYTES for path in folder.rglob("*") if path.is_file())


def forget_pages(folder: Path) -> None:
    """Ask the kernel to drop what it holds of the files below ``folder``."""

    def forget(descriptor: int) -> None:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    for path in folder.rglob("*"):
        if path.is_file():
            with_descriptor(forget)(path)
