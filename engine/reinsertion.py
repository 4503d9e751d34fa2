"""Copying a stored record forward: read it whole, check every byte, carry it through the writer's queue as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..format.checksum import xxh3_64
from ..format.errors import CorruptRecord, DeviceError
from ..format.layout import PAGE_BYTES
from ..format.record import RecordHeader, check_place, stripe_offsets
from ..gds.buffers import aligned_array
from ..gds.device import DeviceFile
from ..gds.monitor import Monitor
from .arena import Bytes
from .contract import PutStatus

SCAN_WINDOW_BYTES = 256 << 10
SCAN_NEAR_BYTES = 64 << 10
"""Records whose headers are this close to each other are read a window at a time."""


@dataclass(slots=True)
class Reinsertion:
    """A record to copy forward: its header as read and its payload as stored (page padded)."""

    header: RecordHeader
    payload: Bytes
    still_wanted: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class WriterRoom:
    """The room that a writer needs while copies wait for it; ``changed`` tells when it comes to need some."""

    changed: Monitor
    wanted: Callable[[], bool]
    """Whether the writer waits for a segment; called with the lock of ``changed`` held."""
    refused: Callable[[], bool]
    """Asked when it does: gives it a segment of the reserve. True when there is none left, or nothing is written any more."""


class CopyForward:
    """The reinsertions of one segment that is being freed: counts them down, and can call off those not yet placed."""

    def __init__(self, room: WriterRoom) -> None:
        self._room = room
        self._pending = 0
        self.pending_bytes = 0
        self.called_off = False

    def add(self, size_bytes: int) -> Callable[[PutStatus], None]:
        """One more of this size; returns what to call when it is settled."""
        with self._room.changed.lock:
            self._pending += 1
            self.pending_bytes += size_bytes
        return lambda _: self._settled(size_bytes)

    def _settled(self, size_bytes: int) -> None:
        with self._room.changed.lock:
            self._pending -= 1
            self.pending_bytes -= size_bytes
            self._room.changed.notify_all()

    def wait_for_turn(self, bytes_max: int, timeout_s: float) -> None:
        """Wait until no more than ``bytes_max`` are pending.

        Not while the writer waits for a segment: then all copies have to be there, since they go first into the one that it gets.
        """
        self._room.changed.wait_for(lambda: self.pending_bytes <= bytes_max or self._room.wanted(), timeout_s)

    def finish(self, timeout_s: float) -> bool:
        """Wait until all are settled. False when there was no room for them, or the time passed: the rest is called off."""
        room = self._room
        while True:
            in_time = room.changed.wait_for(lambda: self._pending == 0 or room.wanted(), timeout_s)
            if self._pending == 0:
                return True
            if not in_time or room.refused():
                self.called_off = True
                return False


def file_reader(file: DeviceFile) -> Callable[[int, int], memoryview]:
    """A blocking read function over a device file, as the format's walkers want it; short at the end of the file."""

    def read(offset: int, length: int) -> memoryview:
        start = offset - offset % PAGE_BYTES
        area = aligned_array(-(-(offset + length - start) // PAGE_BYTES) * PAGE_BYTES)
        count = file.read_now(start, [area])
        return memoryview(area.data)[offset - start : min(count, offset - start + length)]

    return read


def scan_reader(file: DeviceFile) -> Callable[[int, int], memoryview]:
    """``file_reader`` for a walk from record to record: where they are close together, one read fetches many of them.

    A page at a time costs about 130 us each, which is most of an opening after a crash when blocks are small. A window that cannot
    be read is no reason to give up a page that can: then exactly what was asked for is read.
    """
    read = file_reader(file)
    window, window_start, previous = memoryview(b""), 0, -SCAN_NEAR_BYTES - 1

    def scan(offset: int, length: int) -> memoryview:
        nonlocal window, window_start, previous
        near, previous = 0 <= offset - previous <= SCAN_NEAR_BYTES, offset
        if not window_start <= offset <= offset + length <= window_start + len(window):
            if not near or length > SCAN_WINDOW_BYTES:
                return read(offset, length)
            try:
                window, window_start = read(offset, SCAN_WINDOW_BYTES), offset
            except DeviceError:
                return read(offset, length)
        return window[offset - window_start :][:length]

    return scan


def load_header(file: DeviceFile, store_uuid: bytes, segment_id: int, offset: int) -> RecordHeader:
    """The checked header page of a record. Raises ``CorruptRecord`` or ``DeviceError``."""
    page = aligned_array(PAGE_BYTES)
    where = f"segment {segment_id:016x} offset {offset}"
    count = file.read_now(offset, [page])
    if count < PAGE_BYTES:
        raise CorruptRecord("record-truncated", where=where, expected=f"{PAGE_BYTES} bytes", actual=count)
    header = RecordHeader.parse(page, where=where)
    check_place(header, store_uuid, segment_id, offset)
    return header


def load_record(file: DeviceFile, store_uuid: bytes, segment_id: int, offset: int) -> tuple[RecordHeader, Bytes]:
    """A record's header and stored payload, every stripe checked: reclaim never launders damage into a fresh copy."""
    header = load_header(file, store_uuid, segment_id, offset)
    payload = aligned_array(header.record_bytes - PAGE_BYTES)
    if payload.size:
        count = file.read_now(offset + PAGE_BYTES, [payload])
        check_payload(header, payload[:count])
    return header, payload


def check_payload(header: RecordHeader, payload: Bytes) -> None:
    """Check the stripes of a stored payload. Raises ``CorruptRecord``."""
    where = f"segment {header.segment_id:016x} offset {header.offset}"
    if payload.size < header.stored_length:
        raise CorruptRecord("record-truncated", where=where, expected=f"{header.stored_length} bytes", actual=payload.size)
    for stripe, start in zip(header.stripes, stripe_offsets(header.stripes), strict=True):
        actual = xxh3_64(payload[int(start) : int(start) + int(stripe["stored_length"])])
        if actual != int(stripe["checksum"]):
            raise CorruptRecord("stripe-checksum", where=where, expected=f"{int(stripe['checksum']):016x}", actual=f"{actual:016x}")
