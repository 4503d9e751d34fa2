"""Whether cuFile really moves bytes of a file system by GDS, found by moving some.

cuFile's compat mode is silent: with ``allow_compat_mode`` (the default of cufile.json) a file on an unsupported file system
opens as if nothing were wrong. So a megabyte is written and read, and nvidia-fs must have counted the read.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from typing import Any

import kvikio
import kvikio.cufile_driver
import kvikio.defaults

NVIDIA_FS_STATS_PATH = "/proc/driver/nvidia-fs/stats"
PROOF_BYTES = 1 << 20
_READS = re.compile(r"^Reads\s*:\s*n=(\d+)", re.MULTILINE)


def why_not_gds(folder: str) -> str:
    """Why bytes of files in this folder do not travel by GDS; empty when a transfer proved that they do."""
    if kvikio.defaults.is_compat_mode_preferred() or not kvikio.cufile_driver.get("is_gds_available"):
        return "cuFile has no GDS here (nvidia-fs is not loaded, or compat mode is configured: KVIKIO_COMPAT_MODE, cufile.json)"
    try:
        before = nvidia_fs_reads()
        came_back = _round_trip(folder)
        after = nvidia_fs_reads()
    except (OSError, RuntimeError, ImportError) as error:
        return f"a transfer between GPU and a temporary file failed: {error}"
    if not came_back:
        return "bytes written from the GPU did not come back"
    if not kvikio.cufile_driver.get("allow_compat_mode"):
        return ""  # cuFile would have refused rather than copy through host memory
    if before is None or after is None:
        return (
            "it cannot be told from compat mode: set allow_compat_mode to false in cufile.json, or load nvidia-fs with rw_stats_enabled=1"
        )
    return "" if after > before else "cuFile copied through host memory: its file system or drive is not supported by GDS"


def nvidia_fs_reads(stats_path: str = NVIDIA_FS_STATS_PATH) -> int | None:
    """Reads that nvidia-fs has carried out since it was loaded; ``None`` when it does not count them."""
    try:
        with open(stats_path, encoding="ascii", errors="replace") as stats:
            match = _READS.search(stats.read())
    except OSError:
        return None
    return None if match is None else int(match.group(1))


def device_memory(size_bytes: int) -> Any:
    """Uninitialised GPU memory as a flat byte array with ``__cuda_array_interface__``, from torch or cupy."""
    import torch  # slow to import, and this is called only where a GPU is

    if torch.cuda.is_available():
        return torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
    import cupy

    return cupy.empty(size_bytes, dtype=cupy.uint8)


def _round_trip(folder: str) -> bool:
    source, target = device_memory(PROOF_BYTES), device_memory(PROOF_BYTES)
    source[:] = 0xA5
    target[:] = 0
    synchronise()
    descriptor, name = tempfile.mkstemp(prefix=".kvlode-probe-", dir=folder)
    try:
        with kvikio.defaults.set("compat_mode", kvikio.CompatMode.OFF), kvikio.CuFile(name, "r+") as file:
            file.pwrite(source, PROOF_BYTES, 0).get()
            os.fdatasync(descriptor)
            file.pread(target, PROOF_BYTES, 0).get()
    finally:
        os.close(descriptor)
        os.unlink(name)
    return bool((source == target).all())


def synchronise() -> None:
    """Wait for everything that was issued to the GPU by torch or cupy in this thread."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return
    cupy = sys.modules.get("cupy")
    if cupy is not None:
        cupy.cuda.runtime.deviceSynchronize()
