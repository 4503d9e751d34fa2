"""How much is written to a drive while it is read from: as little as keeps it busy, for a read waits behind what is in flight.

A drive that takes 0.4 GB/s is as busy with one request of 1 MiB as with 64 MiB of them, and a read that comes behind those waits
for 150 ms. A fast one needs many. So the window follows the time that writes take, as TCP Vegas follows that of packets (Brakmo
and Peterson, 1995): it grows while they are done at once, and shrinks when even the quickest of some waited in a queue. Where
nobody reads, nobody waits, and everything is written at once. The store's own reads (of reclaim, scrub, the probe) are reads too.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .monitor import Monitor

PIECE_BYTES = 1 << 20
"""What waits for its turn by itself while there are reads."""
WINDOW_BYTES_MIN = 2 * PIECE_BYTES
WINDOW_BYTES_MAX = 64 * PIECE_BYTES
WINDOW_BYTES_FIRST = 4 * PIECE_BYTES
QUICK_S = 0.002
"""A write that takes no longer met a drive with room for more."""
SLOW_S = 0.004
LOOKED_AT = 8
"""Writes between two changes. The quickest of them counts: the others may have waited for the processor, not for the drive."""
READS_RECENT_S = 1.0
"""So long after a read another one is expected."""


class WriteWindow:
    """Turns of writes. Any thread may use it; threads that wait are served in the order in which they came."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.window_bytes = WINDOW_BYTES_FIRST
        """While there are reads."""
        self._clock_s = clock_s
        self._changed = Monitor()
        self._line: deque[object] = deque()
        self._in_flight_bytes = 0
        self._readers: set[object] = set()
        self._read_at_s = -READS_RECENT_S
        self._seen = 0
        self._quickest_s = float("inf")

    def begin_read(self, reader: object) -> None:
        """A read of this name is under way: no more than one piece is written at once until ``end_read``. Doing it twice is harmless."""
        with self._changed.lock:
            self._readers.add(reader)

    def end_read(self, reader: object) -> None:
        """The read is over."""
        with self._changed.lock:
            self._readers.discard(reader)
            self._read_at_s = self._clock_s()
            if not self._readers:
                self._changed.notify_all()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Both, for the calling thread. One that an interrupt keeps from the second makes up for it with its next read."""
        reader = threading.get_ident()
        self.begin_read(reader)
        try:
            yield
        finally:
            self.end_read(reader)

    @contextmanager
    def turn(self, size_bytes: int) -> Iterator[None]:
        """Wait until so many bytes may be written, and count them as in flight for as long as the block runs."""
        place = object()
        with self._changed.lock:
            self._line.append(place)
        self._changed.wait_for(lambda: self._take(place, size_bytes))
        started_s, full = self._clock_s(), self._in_flight_bytes > self.window_bytes // 2
        try:
            yield
        finally:
            with self._changed.lock:
                self._in_flight_bytes -= size_bytes
                if self.reads_recent:
                    self._learn(self._clock_s() - started_s, full)
                self._changed.notify_all()

    @property
    def reads_recent(self) -> bool:
        """Whether there are reads, or were a moment ago."""
        return bool(self._readers) or self._clock_s() - self._read_at_s < READS_RECENT_S

    @property
    def piece_bytes(self) -> int:
        """How long a request may be, so that some of them fit into the window."""
        return max(PIECE_BYTES, self.window_bytes // 8) if self.reads_recent else WINDOW_BYTES_MAX

    def _take(self, place: object, size_bytes: int) -> bool:
        if self._line[0] is not place:
            return False
        limit_bytes = PIECE_BYTES if self._readers else self.window_bytes
        if self._in_flight_bytes and self._in_flight_bytes + size_bytes > limit_bytes and self.reads_recent:
            return False
        self._in_flight_bytes += size_bytes
        self._line.popleft()
        if self._line:
            self._changed.notify_all()  # there may be room for the next one too
        return True

    def _learn(self, elapsed_s: float, full: bool) -> None:
        """``full``: the write began with the window mostly in flight. Only such a one tells that there was room for more."""
        if not full and elapsed_s < SLOW_S:
            return
        self._seen += 1
        self._quickest_s = min(self._quickest_s, elapsed_s)
        if self._seen < LOOKED_AT:
            return
        if self._quickest_s < QUICK_S:
            self.window_bytes = min(self.window_bytes * 3 // 2, WINDOW_BYTES_MAX)
        elif self._quickest_s > SLOW_S:
            self.window_bytes = max(self.window_bytes * 2 // 3, WINDOW_BYTES_MIN)
        self._seen, self._quickest_s = 0, float("inf")
