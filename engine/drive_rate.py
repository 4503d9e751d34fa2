"""How fast the drive is, from the transfers that the store makes anyway: for the choice between its time and that of the cores."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .codec_policy import Resources

WINDOW_BYTES = 256 << 20
"""A drive that is never idle is looked at this often. Far more than what is in flight, which is counted where it ends."""
WINDOW_BYTES_MIN = 16 << 20
"""Less says nothing: the caches of a drive take it at any rate."""
WINDOWS_KEPT = 16


class DriveRate:
    """Bytes a second in one direction while at least one transfer is under way: the best of the last windows. Thread-safe.

    The best, because a drive that waits for the cores is slower than it could be, and taken for slow it would be spared even more
    at their cost.
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._rates: collections.deque[float] = collections.deque(maxlen=WINDOWS_KEPT)
        self._running = 0
        self._since_s = 0.0
        self._busy_s = 0.0
        self._bytes = 0

    def begin(self) -> None:
        """A transfer starts."""
        with self._lock:
            if self._running == 0:
                self._since_s = self._clock_s()
            self._running += 1

    def end(self, moved_bytes: int) -> None:
        """It is over, having moved so much (0 after an error)."""
        with self._lock:
            now_s = self._clock_s()
            self._busy_s += now_s - self._since_s
            self._since_s = now_s
            self._bytes += moved_bytes
            self._running -= 1
            full = self._bytes >= (WINDOW_BYTES if self._running else WINDOW_BYTES_MIN)
            if full and self._busy_s > 0:
                self._rates.append(self._bytes / self._busy_s)
                self._busy_s, self._bytes = 0.0, 0

    @contextmanager
    def measuring(self, size_bytes: int) -> Iterator[None]:
        """A transfer of so many bytes for as long as the block runs; an error moves none."""
        self.begin()
        moved_bytes = 0
        try:
            yield
            moved_bytes = size_bytes
        finally:
            self.end(moved_bytes)

    @property
    def bytes_per_s(self) -> float | None:
        """``None`` before the first window is full."""
        with self._lock:
            return max(self._rates, default=None)


def resources_now(cores: float, writes: DriveRate, reads: DriveRate) -> Resources | None:
    """With so many cores; ``None`` for a drive that nothing is known of yet. One that was only written to is taken to read as fast."""
    written, read = writes.bytes_per_s, reads.bytes_per_s
    return None if written is None else Resources(cores, written, max(read or 0.0, written))
