"""What the processes of a server have used, by the kernel's own count; and its store's pages out of the kernel's memory."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROCESSES = Path("/proc")
IDLE_CPU_SHARE = 0.1
"""Below this share of one processor a server counts as idle."""
IDLE_INTERVAL_S = 0.5
IDLE_TIMEOUT_S = 60.0
_SESSION, _USER_TICKS, _SYSTEM_TICKS = 3, 11, 12
"""Places in ``/proc/PID/stat`` after the name (proc(5), fields 6, 14 and 15)."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Seconds of processor time, and bytes that were fetched from drives (those from the page cache are not among them)."""

    cpu_s: float
    read_bytes: int

    def __sub__(self, earlier: Usage) -> Usage:
        return Usage(self.cpu_s - earlier.cpu_s, self.read_bytes - earlier.read_bytes)


def usage_of(session: int, processes: Path = PROCESSES) -> Usage:
    """The sum over the living processes of a session."""
    ticks, read_bytes = 0, 0
    for folder in processes.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is somebody else's
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[_SESSION]) != session:
                continue
            ticks += int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS])
            found = re.search(r"^read_bytes: (\d+)$", (folder / "io").read_text(), re.MULTILINE)
            read_bytes += int(found.group(1)) if found else 0
    return Usage(ticks / os.sysconf("SC_CLK_TCK"), read_bytes)


def compute_cpus(allowed: Iterable[int]) -> str:
    """All processors but the last, which is left to front ends, clients and the store; for ``VLLM_CPU_OMP_THREADS_BIND``."""
    ordered = sorted(allowed)
    return ",".join(str(number) for number in ordered[:-1] or ordered)


def wait_idle(session: int, timeout_s: float = IDLE_TIMEOUT_S) -> bool:
    """Return when a session computes and stores nothing any more; ``False`` when it does not come to rest in time."""
    deadline_s = time.monotonic() + timeout_s
    waiting = threading.Event()
    before = usage_of(session)
    while time.monotonic() < deadline_s:
        waiting.wait(IDLE_INTERVAL_S)
        now = usage_of(session)
        if (now - before).cpu_s < IDLE_CPU_SHARE * IDLE_INTERVAL_S:
            return True
        before = now
    return False
