"""How fast the drive reads, for a store that has only been written to so far: some of it is read back, once.

Whether to encode depends on it, and nothing else tells: drives read 1.2 to 7 times as fast as they write (3.6 and 0.5 GB/s measured on
one). Taken to read as fast as it writes, such a drive got everything encoded, and reading waited for the cores at a third of its rate.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator

from ..format.errors import DeviceError, StoreClosed
from ..gds.buffers import SlotPool
from ..gds.threads import WorkerPool
from .drive_rate import WINDOW_BYTES_MIN, DriveRate
from .segments import Segment, SegmentTable

logger = logging.getLogger("kvlode")

PIECE_BYTES = 4 << 20
PROBE_BYTES = 4 * WINDOW_BYTES_MIN
"""20 ms of a fast drive."""
PIECES_AT_ONCE = 4
"""Enough to keep a drive busy, and few of the threads and of the memory that hosts' reads need."""


class ReadProbe:
    """See the module. ``drive_rate`` is the reader's: what it reads counts as well, and makes the probe needless. One thread asks."""

    def __init__(self, segments: SegmentTable, read_pool: WorkerPool, bounce: SlotPool, drive_rate: DriveRate) -> None:
        self._segments = segments
        self._read_pool = read_pool
        self._bounce = bounce
        self._drive_rate = drive_rate
        self._done = False

    def rate(self) -> DriveRate:
        """The rate as far as it is known. When it is not, and enough is stored, reading starts in the background."""
        if not self._done and self._drive_rate.bytes_per_s is None:
            pieces = deque(_pieces(self._segments.all()))
            if len(pieces) * PIECE_BYTES >= WINDOW_BYTES_MIN:
                self._done = True
                for _ in range(PIECES_AT_ONCE):
                    self._read_next(pieces)
        return self._drive_rate

    def _read_next(self, pieces: deque[tuple[int, int]]) -> None:
        """Hand one more piece to the threads that read, behind whatever hosts have asked for meanwhile."""
        try:
            self._read_pool.run(self._read, pieces)
        except StoreClosed:
            logger.debug("the store is closing: its drive is not measured any more")

    def _read(self, pieces: deque[tuple[int, int]]) -> None:
        try:
            segment_id, offset = pieces.popleft()
        except IndexError:
            return
        try:
            self._read_piece(segment_id, offset)
        except (DeviceError, StoreClosed) as error:  # whoever needs these bytes will meet it
            logger.info("the drive could not be measured: %s", error)
            return
        self._read_next(pieces)

    def _read_piece(self, segment_id: int, offset: int) -> None:
        slot = self._bounce.acquire(PIECE_BYTES)
        assert slot is not None  # it waits without limit: whoever has memory delivers from it without waiting for more
        try:
            with self._segments.reading(segment_id) as file:
                if file is not None:
                    with self._drive_rate.measuring(PIECE_BYTES):
                        file.read_now(offset, [slot[:PIECE_BYTES]])
        finally:
            self._bounce.release(slot)


def _pieces(segments: Iterable[Segment]) -> Iterator[tuple[int, int]]:
    """Segment id and offset of as many whole pieces as the probe reads, from segments that are written to no more."""
    left = PROBE_BYTES // PIECE_BYTES
    for segment in segments:
        if not segment.sealed or segment.retired_at_s is not None:
            continue
        for offset in range(0, segment.size_bytes - PIECE_BYTES + 1, PIECE_BYTES):
            if not left:
                return
            left -= 1
            yield segment.segment_id, offset
