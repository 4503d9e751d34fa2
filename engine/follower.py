"""Reading a store beside its writer: following the index of another process."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from ..format.errors import KvlodeError
from ..format.layout import INDEX_FOLDER
from .index import Index
from .index_rocksdb import RocksFollowerIndex
from .segments import SegmentTable
from .stats import Counters

logger = logging.getLogger("kvlode")

CATCH_UP_INTERVAL_S = 0.05
"""A follower's view is at most this old at each lookup, plus what the writer has not committed yet (``flush_after``)."""


class CatchUp:
    """Brings a follower up to date before a lookup, at most every ``CATCH_UP_INTERVAL_S``. Thread-safe.

    Open segment files are closed with it: they would hold the space of segments that the writer has freed.
    """

    def __init__(self, index: RocksFollowerIndex, segments: SegmentTable, counters: Counters) -> None:
        self._index = index
        self._segments = segments
        self._counters = counters
        self._lock = threading.Lock()
        self._next_s = 0.0

    def __call__(self) -> None:
        if time.monotonic() < self._next_s or not self._lock.acquire(blocking=False):
            return
        try:
            self._index.catch_up()
            self._segments.close_files(unpinned_only=True)
            self._counters.add("catch_ups")
        except KvlodeError as error:
            self._counters.add("catch_up_errors")
            logger.warning("%s", error)
        finally:
            self._next_s = time.monotonic() + CATCH_UP_INTERVAL_S
            self._lock.release()


def open_follower_index(
    path: str, given: Index | None, segments: SegmentTable, counters: Counters
) -> tuple[Index, Callable[[], None] | None]:
    """The index to follow and how to catch up with it."""
    if given is not None:
        return given, None
    folder = os.path.join(path, INDEX_FOLDER)
    index = RocksFollowerIndex(folder)
    return index, CatchUp(index, segments, counters)
