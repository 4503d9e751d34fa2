"""Devices for tests, under one name: recording, failing and late wrappers, and a clock that is moved by hand."""

from __future__ import annotations

from .faulty import Effect, Fault, FaultyDevice
from .late import HeldTransfer, LateDevice
from .monitor import Monitor
from .recording import (
    Close,
    Log,
    MakeFolder,
    MakeLockFile,
    Open,
    Operation,
    Preallocate,
    Punch,
    Read,
    RecordingDevice,
    Remove,
    Rename,
    Sync,
    SyncFolder,
    Truncate,
    Write,
    WriteDone,
    replay,
)

__all__ = [
    "Close",
    "Effect",
    "Fault",
    "FaultyDevice",
    "HeldTransfer",
    "LateDevice",
    "Log",
    "MakeFolder",
    "MakeLockFile",
    "ManualClock",
    "Open",
    "Operation",
    "Preallocate",
    "Punch",
    "Read",
    "RecordingDevice",
    "Remove",
    "Rename",
    "Sync",
    "SyncFolder",
    "Truncate",
    "Write",
    "WriteDone",
    "replay",
]


class ManualClock:
    """Time for ``MemoryDevice(bandwidth_bytes_s=..., clock=...)`` that stands still until the test moves it."""

    def __init__(self) -> None:
        self._changed = Monitor()
        self._lock = self._changed.lock
        self._now_s = 0.0
        self._waiting: list[float] = []

    def now_s(self) -> float:
        with self._lock:
            return self._now_s

    def wait_until(self, time_s: float) -> None:
        with self._lock:
            self._waiting.append(time_s)
            self._changed.notify_all()
        self._changed.wait_for(lambda: self._now_s >= time_s)
        with self._lock:
            self._waiting.remove(time_s)

    def advance(self, seconds: float) -> None:
        """Move the time on and wake who waited for it."""
        with self._lock:
            self._now_s += seconds
            self._changed.notify_all()

    def wait_for_waiters(self, count: int, timeout_s: float = 30.0) -> bool:
        """Wait until ``count`` threads wait for this clock."""
        return self._changed.wait_for(lambda: len(self._waiting) >= count, timeout_s)
