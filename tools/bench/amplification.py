"""Bytes that reached the drive, as the kernel counts them: of this process, and of the whole drive."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .machine import device_write_bytes, text_of

DRIVE_COUNTERS = "/proc/diskstats"
SECTOR_BYTES = 512
"""Of /proc/diskstats, whatever the drive's own are."""
_SECTORS_WRITTEN = 9


@dataclass(frozen=True, slots=True)
class Written:
    """Bytes written since the machine, or the process, was started.

    ``process_bytes`` are those that this process caused: O_DIRECT writes, and pages that it dirtied. ``drive_bytes`` also are the
    file system's own journal, and everybody else's; ``None`` where the folder lies on no drive that the kernel counts.
    """

    process_bytes: int
    drive_bytes: int | None

    @classmethod
    def now(cls, folder: str) -> Written:
        """The counters at this moment; ``folder`` lies on the drive that is meant."""
        return cls(device_write_bytes(), drive_write_bytes(text_of(DRIVE_COUNTERS), os.stat(folder).st_dev))

    def since(self, before: Written) -> Written:
        """What was written between two readings."""
        drive_bytes = None
        if self.drive_bytes is not None and before.drive_bytes is not None:
            drive_bytes = self.drive_bytes - before.drive_bytes
        return Written(self.process_bytes - before.process_bytes, drive_bytes)


def drive_write_bytes(counters: str, device: int) -> int | None:
    """What the lines of /proc/diskstats say of a drive or partition; ``None`` when they do not know it."""
    for line in counters.splitlines():
        fields = line.split()
        if fields[:2] == [str(os.major(device)), str(os.minor(device))] and len(fields) > _SECTORS_WRITTEN:
            return int(fields[_SECTORS_WRITTEN]) * SECTOR_BYTES
    return None
