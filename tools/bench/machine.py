"""What a figure is worth depends on the machine: its facts, and what the kernel says this process has used."""

from __future__ import annotations

import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

from ...format.errors import NoSpace
from ...gds.machine import mount_of, try_direct

LAST_LEVEL_CACHE_BYTES_ASSUMED = 64 << 20
_CACHE_FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def machine_facts(folder: str) -> dict[str, Any]:
    """Processor, memory, file system and whether O_DIRECT works in ``folder``."""
    mount = mount_of(folder)
    trial = try_direct(folder)
    return {
        "cpu": _cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "file_system": None if mount is None else mount.file_system,
        "mount_options": None if mount is None else list(mount.options),
        "o_direct": trial.works,
        "load_average": os.getloadavg()[0],
    }


def _cpu_name() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", text_of("/proc/cpuinfo"), re.MULTILINE)
    return match.group(1) if match else platform.machine()


def last_level_cache_bytes() -> int:
    """Size of the largest cache that the first processor sees, or an assumption where the system does not say."""
    sizes = [_cache_bytes(text_of(str(path))) for path in _CACHE_FOLDER.glob("index*/size")]
    return max(sizes, default=LAST_LEVEL_CACHE_BYTES_ASSUMED)


def _cache_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG])?", text.strip())
    return int(match.group(1)) * _UNITS.get(match.group(2) or "", 1) if match else 0


def available_memory_bytes() -> int:
    """Memory that can be used without swapping."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text_of("/proc/meminfo"), re.MULTILINE)
    return int(match.group(1)) << 10 if match else 0


def device_read_bytes() -> int:
    """Bytes that this process has made the kernel fetch from drives: reads from the page cache are not among them."""
    return _process_bytes("read_bytes")


def device_write_bytes() -> int:
    """Bytes that this process has caused to be written to drives: O_DIRECT writes, and pages that it dirtied."""
    return _process_bytes("write_bytes")


def _process_bytes(name: str) -> int:
    match = re.search(rf"^{name}: (\d+)$", text_of("/proc/self/io"), re.MULTILINE)
    return int(match.group(1)) if match else 0


def anonymous_bytes() -> int:
    """Private memory of this process that is really there (file pages, such as those of tables, are the kernel's to drop)."""
    match = re.search(r"^RssAnon:\s+(\d+) kB", text_of("/proc/self/status"), re.MULTILINE)
    return int(match.group(1)) << 10 if match else 0


def check_free_space(folder: str, needed_bytes: int) -> None:
    """Raise ``NoSpace`` when ``folder`` has less than ``needed_bytes`` and a reserve left."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise NoSpace(
            "bench",
            folder,
            detail=f"needs {needed_bytes / 2**30:.1f} GiB free, there are {free_bytes / 2**30:.1f} GiB",
            action="Free space, pass a folder on another drive, a smaller --size, or --quick.",
        )


def text_of(path: str) -> str:
    """A small file of the kernel; empty where it does not exist or may not be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
