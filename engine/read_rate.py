"""How fast a store delivers what it holds: a moving rate, for ``BlockSpace.estimate``."""

from __future__ import annotations

import threading
import time

DISK_BYTES_PER_S = 1e9
"""What is assumed of a drive before the first read."""
MEMORY_BYTES_PER_S = 4e9
"""What a copy within memory is assumed to reach. Rough: loading from there is hardly ever the slower choice."""
HALF_LIFE_S = 2.0
"""Of busy time: what was read longer ago counts less and less."""
WINDOW_S = 0.25
"""A store that is never idle is looked at this often."""
_ASSUMED_S = 0.05
"""Weight of the assumed rate beside what was measured."""


class ReadRate:
    """Bytes a second while at least one read is under way, of all reads together. Thread-safe.

    Time in which nothing is read does not count, time lost to errors and to waiting for memory does: that is what the next
    load has to expect.
    """

    def __init__(self, assumed_bytes_per_s: float = DISK_BYTES_PER_S) -> None:
        self._lock = threading.Lock()
        self._seconds = _ASSUMED_S
        self._bytes = assumed_bytes_per_s * _ASSUMED_S
        self._running = 0
        self._since_s = 0.0
        self._window_bytes = 0

    def begin(self) -> None:
        """A read starts."""
        with self._lock:
            if self._running == 0:
                self._since_s = time.monotonic()
            self._running += 1

    def end(self, delivered_bytes: int) -> None:
        """It is over, having delivered so much (0 after an error)."""
        now_s = time.monotonic()
        with self._lock:
            self._running -= 1
            self._window_bytes += delivered_bytes
            elapsed_s = now_s - self._since_s
            if self._running == 0 or elapsed_s >= WINDOW_S:
                kept = 0.5 ** (elapsed_s / HALF_LIFE_S)
                self._seconds = self._seconds * kept + elapsed_s
                self._bytes = self._bytes * kept + self._window_bytes
                self._since_s, self._window_bytes = now_s, 0

    def seconds_for(self, size_bytes: int) -> float:
        """How long so many bytes take at the present rate."""
        if size_bytes == 0:
            return 0.0
        with self._lock:
            return size_bytes * self._seconds / max(self._bytes, 1.0)
