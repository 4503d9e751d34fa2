"""The file of the hit counters, through which followers tell the writer what they use.

It is derived data: it may be deleted at any time, which forgets the hits. Nobody maps it: a page of a mapped file that the
drive below no longer gives ends the process, and an inference engine must not die of a hit counter. Each process counts in
memory of its own, and a thread brings the memory and the file together from time to time by ordinary reads and writes,
whose errors are counted and nothing else.

Nothing orders the exchanges of different processes: two at once may lose hits, which is allowed (see ``heat``).
"""

from __future__ import annotations

import logging
import os
import threading
import time

import numpy as np

from ..format.layout import PAGE_BYTES
from ..gds.monitor import Monitor
from .heat import HeatTable, header_page, heat_bytes, read_area, slots_of_file
from .stats import Counters
from .stats_file import PUBLISH_INTERVAL_S, StatsFile

logger = logging.getLogger("kvlode")

EXCHANGE_INTERVAL_S = 10.0
"""A crash forgets the hits of this time; those of a follower reach the writer after one or two of it."""
WRITE_BYTES = 64 << 10


class SharedHeat:
    """``table``, and the thread that exchanges its hits with the file. Without a file the hits stay in this process."""

    def __init__(self, table: HeatTable, descriptor: int | None, counters: Counters, *, writer: bool) -> None:
        self.table = table
        self._descriptor = descriptor
        self._counters = counters
        self._writer = writer
        self._known = table.counts()
        self._changed = Monitor()
        self._stopping = False
        self._stats_file: StatsFile | None = None
        self._thread = threading.Thread(target=self._run, name="kvlode-heat", daemon=True)

    @classmethod
    def open(cls, path: str, store_uuid: bytes, slot_count: int, counters: Counters, *, writer: bool) -> SharedHeat:
        """The table in the file ``path`` of this store.

        The writer replaces a file that is missing, damaged, of another store or of another size by an empty one. A follower
        takes the file as it is. Where there is no usable file and none can be made (no room, read-only, a drive that
        fails), the hits stay in this process.
        """
        try:
            found = _open_existing(path, store_uuid, slot_count if writer else None)
            if found is None and writer:
                _create(path, store_uuid, slot_count)
                found = _open_existing(path, store_uuid, slot_count)
        except OSError as error:
            logger.info("hits are not kept beyond this process: %s", error)
            found = None
        table, descriptor = found or (HeatTable(slot_count), None)
        return cls(table, descriptor, counters, writer=writer)

    def start(self, stats_file: StatsFile | None = None) -> None:
        """``stats_file`` is published by the same thread, every second; the first time at once, and removed at the end."""
        self._stats_file = stats_file
        if self._descriptor is not None or stats_file is not None:
            self._thread.start()

    def stop(self, timeout_s: float | None) -> bool:
        """Exchange once more and end; False when the file did not answer in time."""
        with self._changed.lock:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        self.close()
        return True

    def close(self) -> None:
        """Let go of the file, once nobody exchanges any more; hits counted afterwards go nowhere. Closing twice is allowed."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _run(self) -> None:
        stats_file = self._stats_file
        pause_s = EXCHANGE_INTERVAL_S if stats_file is None else PUBLISH_INTERVAL_S
        next_exchange_s = time.monotonic() + EXCHANGE_INTERVAL_S
        stopping = False
        while not stopping:
            if stats_file is not None:
                stats_file.publish()
            stopping = self._changed.wait_for(lambda: self._stopping, pause_s)
            if self._descriptor is not None and (stopping or time.monotonic() >= next_exchange_s):
                next_exchange_s = time.monotonic() + EXCHANGE_INTERVAL_S
                self.exchange()
        if stats_file is not None:
            stats_file.remove()

    def exchange(self) -> None:
        """Bring memory and file together: the writer takes over the hits of others, a follower adds its own to what the writer says."""
        try:
            self._exchange()
        except (OSError, MemoryError) as error:
            self._counters.add("heat_file_errors")
            logger.info("hits were not exchanged: %s", error)

    def _exchange(self) -> None:
        assert self._descriptor is not None
        table = self.table
        before = read_area(self._descriptor, table.slot_count)
        if self._writer:
            table.take_hits(HeatTable(table.slot_count, before), self._known)
        else:
            found = HeatTable(table.slot_count, before.copy())
            found.take_hits(table, self._known)
            table.replace(found)
        now = table.area.copy()  # hits go on meanwhile: what is written must be what counts as known
        self._known = HeatTable(table.slot_count, now).counts()
        for start in range(0, before.size, WRITE_BYTES):
            part = now[start : start + WRITE_BYTES]
            if not np.array_equal(part, before[start : start + WRITE_BYTES]):
                os.pwrite(self._descriptor, part.data, PAGE_BYTES + start)


def _open_existing(path: str, store_uuid: bytes, slot_count: int | None) -> tuple[HeatTable, int] | None:
    """Table and descriptor of a usable file (with so many slots, where that is asked for)."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        found = slots_of_file(descriptor, store_uuid)
        if found is not None and slot_count in (None, found):
            kept, descriptor = descriptor, -1
            return HeatTable(found, read_area(kept, found)), kept
        return None
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _create(path: str, store_uuid: bytes, slot_count: int) -> None:
    """Put an empty table in place of the file; all of it is allocated, so that what the store takes does not grow later."""
    temporary = f"{path}.new"
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, heat_bytes(slot_count))
        os.pwrite(descriptor, header_page(store_uuid, slot_count), 0)
        os.rename(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
    finally:
        os.close(descriptor)
