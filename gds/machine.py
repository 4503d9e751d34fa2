"""Facts about this machine that decide which I/O path can be had: mounts, drives, GPUs, drivers, kvikio. Reads only."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import resource
import tempfile
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from .buffers import aligned_array
from .os_calls import MEMORY_FILE_SYSTEMS, direct_alignment, file_system_of, set_direct

MOUNTS_PATH = "/proc/self/mountinfo"
NVIDIA_FS_PATH = "/proc/driver/nvidia-fs"
_KVIKIO_PACKAGES = ("kvikio-cu13", "kvikio-cu12", "kvikio")
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a path lies: mount point, file system as the mount table calls it, options, device number and source."""

    point: str
    file_system: str
    options: tuple[str, ...]
    device: str
    source: str


@dataclass(frozen=True, slots=True)
class DirectTrial:
    """What happened when O_DIRECT was really tried. ``works`` is ``None`` when no file could be made there."""

    works: bool | None
    detail: str
    memory_alignment_bytes: int = 0
    offset_alignment_bytes: int = 0


def existing_folder(path: str) -> str:
    """The path itself, or its nearest existing parent, as a folder."""
    folder = os.path.realpath(path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def mount_of(path: str, mounts_path: str = MOUNTS_PATH) -> Mount | None:
    """The mount that holds an existing path; ``None`` when the mount table does not tell."""
    path = os.path.realpath(path)
    best: Mount | None = None
    with suppress(OSError), open(mounts_path, encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            mount = _parse_mount(line)
            if mount is None or not _is_below(path, mount.point):
                continue
            if best is None or len(mount.point) >= len(best.point):  # of several on one point, the last covers the others
                best = mount
    return best


def _parse_mount(line: str) -> Mount | None:
    fields, separator, tail = line.rstrip("\n").partition(" - ")
    left, right = fields.split(" "), tail.split(" ")
    if not separator or len(left) < 6 or len(right) < 3:
        return None
    options = tuple(dict.fromkeys((left[5] + "," + right[2]).split(",")))
    return Mount(_unescape(left[4]), right[0], options, left[2], _unescape(right[1]))


def _unescape(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match.group(1), 8)), text)


def _is_below(path: str, point: str) -> bool:
    return point == "/" or path == point or path.startswith(point + "/")


def is_on_nvme(mount: Mount | None) -> bool | None:
    """Whether the drive behind a mount is an NVMe device of this machine; ``None`` when it has no block device."""
    if mount is None:
        return None
    block = os.path.realpath(f"/sys/dev/block/{mount.device}")
    return "/nvme" in block if os.path.exists(block) else None


def try_direct(folder: str) -> DirectTrial:
    """Write and read one page with O_DIRECT through a nameless temporary file in the folder."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=".kvlode-probe-", dir=folder)
    except OSError as error:
        return DirectTrial(None, f"no file could be made in {folder}: {error.strerror}")
    try:
        os.unlink(name)
        if file_system_of(descriptor) in MEMORY_FILE_SYSTEMS:
            return DirectTrial(False, "the file system lives in memory")
        if not set_direct(descriptor):
            return DirectTrial(False, "the file system refuses O_DIRECT")
        memory_bytes, offset_bytes = direct_alignment(descriptor) or (4096, 4096)
        page = aligned_array(4096)
        page[:] = np.arange(4096) % 251
        back = aligned_array(4096)
        if (
            os.pwritev(descriptor, [page.data], 0) != 4096
            or os.preadv(descriptor, [back.data], 0) != 4096
            or not np.array_equal(page, back)
        ):
            return DirectTrial(False, "a page written with O_DIRECT did not come back")
        return DirectTrial(True, "one page was written and read back", memory_bytes, offset_bytes)
    except OSError as error:
        return DirectTrial(False, f"a transfer of one page failed: {error.strerror}")
    finally:
        os.close(descriptor)


def has_cuda_driver() -> bool:
    """Whether ``libcuda.so.1`` can be loaded. CUDA is not initialised."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def gpu_count() -> int:
    """GPUs of NVIDIA that this process may open, counted without CUDA (initialising it would make forks unusable)."""
    try:
        names = os.listdir("/dev")
    except OSError:
        return 0
    return sum(re.fullmatch(r"nvidia\d+", name) is not None and os.access(f"/dev/{name}", os.R_OK | os.W_OK) for name in names)


def has_nvidia_fs() -> bool:
    """Whether the kernel module that cuFile moves data with is loaded."""
    return os.path.isdir(NVIDIA_FS_PATH) or os.path.isdir("/sys/module/nvidia_fs")


def kvikio_version() -> str | None:
    """Version of the installed kvikio, without importing it; ``None`` when there is none."""
    if importlib.util.find_spec("kvikio") is None:
        return None
    for package in _KVIKIO_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            return f"{package} {importlib.metadata.version(package)}"
    return "unknown"


def kvikio_import_error() -> str | None:
    """Why kvikio cannot be imported; ``None`` when it can."""
    try:
        importlib.import_module("kvikio")
    except Exception as error:  # its loader raises several unrelated types when an NVIDIA library is missing
        return f"{type(error).__name__}: {error}"
    return None


def memlock_bytes() -> int | None:
    """How much memory this process may lock; ``None`` for no limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if limit == resource.RLIM_INFINITY else limit
