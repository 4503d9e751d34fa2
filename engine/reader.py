"""Reading blocks from the log: few large reads in flight, every byte checked, decoded straight into the destinations.

A job's blocks are sorted by place and neighbours merged into extents. The thread that runs ``Reader.run`` only issues
reads (it waits for bounce memory, which bounds the bytes in flight); checking and decoding happen on the decode pool as
the reads complete. A raw block with a page-aligned destination is read straight into it; everything else is
materialised once, from the bounce memory.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ..format.errors import CorruptRecord, DeviceError, FormatError, StoreClosed
from ..format.layout import PAGE_BYTES, STRIPES_MAX, Codec, RecordType
from ..format.record import RecordHeader, check_place
from ..gds.buffers import SlotPool
from ..gds.device import Device, DeviceFile
from ..gds.threads import WorkerPool
from .arena import Bytes
from .contract import Status
from .delivery import STRIPES_PER_TASK, Delivery, ReadRequest, whole_pages
from .jobs import ReadJob
from .segments import SegmentTable
from .stats import Counters

logger = logging.getLogger("kvlode")

EXTENT_BYTES_MAX = 8 << 20
GAP_BYTES_MAX = 64 << 10
"""Neighbouring records this close are read in one go, the gap included."""


@dataclass(slots=True)
class _Extent:
    """Neighbouring records of one segment, read by one request."""

    segment_id: int
    requests: list[ReadRequest]
    start: int
    stop: int
    file: DeviceFile | None = None
    slot: Bytes | None = None
    buffers: list[Any] = field(default_factory=list)
    remaining: int = 0


class Reader:
    """See the module. Thread-safe."""

    def __init__(
        self,
        device: Device,
        segments: SegmentTable,
        store_uuid: bytes,
        pool: WorkerPool,
        bounce: SlotPool,
        counters: Counters,
        on_useless: Callable[[ReadRequest, FormatError | None], None],
    ) -> None:
        self._device = device
        self._segments = segments
        self._store_uuid = store_uuid
        self._pool = pool
        self._bounce = bounce
        self._counters = counters
        self._on_useless = on_useless
        self._lock = threading.Lock()

    def run(self, job: ReadJob, requests: list[ReadRequest], *, direct: bool, stream: Any = None) -> None:
        """Issue the reads of a job; returns when all are issued (or cancelled). ``direct`` allows I/O into the destinations."""
        # Where there are blocks enough for all threads, each is one task: cutting it up costs the interpreter more than it wins.
        stripes_per_task = STRIPES_MAX if len(requests) >= 2 * self._pool.threads else STRIPES_PER_TASK
        for request in requests:
            request.direct = direct and self._direct_possible(request)
            request.stripes_per_task = stripes_per_task
        for extent in self._extents(requests):
            if job.cancelled:
                self._settle(job, extent, Status.CANCELLED)
                continue
            try:
                self._issue(job, extent, stream)
            except DeviceError as error:
                self._counters.add("read_errors")
                logger.warning("%s", error)
                self._settle(job, extent, Status.IO_ERROR)

    def _direct_possible(self, request: ReadRequest) -> bool:
        out = request.out
        if request.entry.codec != int(Codec.RAW) or request.entry.raw_length != out.nbytes or out.nbytes < PAGE_BYTES:
            return False
        if out.is_device:
            return self._device.accepts_device_memory and len(out.spans) == 1
        return len(out.spans) == 1 and int(out.spans[0].ctypes.data) % self._device.alignment == 0

    @staticmethod
    def _extents(requests: list[ReadRequest]) -> list[_Extent]:
        extents: list[_Extent] = []
        for request in sorted(requests, key=lambda r: (r.entry.segment_id, r.entry.offset)):
            start, stop = request.entry.offset, request.entry.offset + request.record_bytes
            last = extents[-1] if extents else None
            near = last is not None and last.segment_id == request.entry.segment_id and last.stop <= start <= last.stop + GAP_BYTES_MAX
            if last is not None and near and stop - last.start <= EXTENT_BYTES_MAX:
                last.requests.append(request)
                last.stop = stop
            else:
                extents.append(_Extent(request.entry.segment_id, [request], start, stop))
        return extents

    # --- issuing ----------------------------------------------------------------------------------------------

    def _issue(self, job: ReadJob, extent: _Extent, stream: Any) -> None:
        file = self._segments.pin(extent.segment_id)
        if file is None:  # freed since the index was asked, or its file is lost: the entry must not promise it for ever
            for request in extent.requests:
                self._on_useless(request, None)
            self._settle(job, extent, Status.MISS)
            return
        try:
            extent.file = file
            self._lay_out(extent)
            read = None if job.cancelled else file.read(extent.start, extent.buffers)
        except BaseException:
            self._segments.unpin(extent.segment_id)
            self._release_slot(extent)
            raise
        if read is None:  # cancelled while it waited for bounce memory
            self._segments.unpin(extent.segment_id)
            self._release_slot(extent)
            self._settle(job, extent, Status.CANCELLED)
            return
        read.add_done_callback(lambda done: self._arrived(job, extent, done, stream))

    def _arrived(self, job: ReadJob, extent: _Extent, read: Future[int], stream: Any) -> None:
        """A read is over (on a thread of the device). One that outlived a close is given up; its job must not wait for ever."""
        try:
            self._pool.run(self._complete, job, extent, read, stream)
        except StoreClosed:
            self._segments.unpin(extent.segment_id)
            self._release_slot(extent)
            self._settle(job, extent, Status.CANCELLED)

    def _lay_out(self, extent: _Extent) -> None:
        """Bounce memory for all that is not read straight into a destination, and the list of buffers in file order."""
        direct_bytes = sum(whole_pages(r.out.nbytes) for r in extent.requests if r.direct)
        extent.slot = self._bounce.acquire(extent.stop - extent.start - direct_bytes)
        assert extent.slot is not None  # waits without limit: decoding releases it
        extent.remaining = len(extent.requests)
        used, position = 0, extent.start
        run_start = 0
        for request in extent.requests:
            used += request.entry.offset - position
            request.page = extent.slot[used : used + PAGE_BYTES]
            used += PAGE_BYTES
            payload_bytes = request.record_bytes - PAGE_BYTES
            if request.direct:
                whole = whole_pages(request.out.nbytes)
                extent.buffers += [extent.slot[run_start:used], request.out.spans[0][:whole]]
                run_start, payload_bytes = used, payload_bytes - whole
            request.payload = extent.slot[used : used + payload_bytes]
            used += payload_bytes
            position = request.entry.offset + request.record_bytes
        if used > run_start:
            extent.buffers.append(extent.slot[run_start:used])

    # --- completing (decode pool) -------------------------------------------------------------------------------

    def _complete(self, job: ReadJob, extent: _Extent, read: Future[int], stream: Any) -> None:
        try:
            read_bytes = read.result()
            self._check_length(extent, read_bytes)
        except Exception as error:
            self._counters.add("read_errors")
            logger.warning("%s", error)
            self._release_slot(extent)
            self._settle(job, extent, Status.IO_ERROR)
            return
        finally:
            self._segments.unpin(extent.segment_id)
        for request in extent.requests:
            complete = request.entry.offset + request.record_bytes <= extent.start + read_bytes
            self._check_and_deliver(job, extent, request, complete, stream)

    @staticmethod
    def _check_length(extent: _Extent, read_bytes: int) -> None:
        """A read that ends before the file does has failed; only a file that ends too early has lost something."""
        assert extent.file is not None
        if extent.start + read_bytes < min(extent.stop, extent.file.status().size_bytes):
            length = extent.stop - extent.start
            raise DeviceError("read", extent.file.path, offset=extent.start, length=length, detail=f"it ended after {read_bytes} bytes")

    def _check_and_deliver(self, job: ReadJob, extent: _Extent, request: ReadRequest, complete: bool, stream: Any) -> None:
        try:
            header = self._checked_header(request, complete)
        except FormatError as error:
            self._finish(job, extent, request, error)
            return
        except Exception as defect:  # never leave a job without an answer
            self._finish(job, extent, request, CorruptRecord("unreadable-header", where=request.key.hex(), actual=repr(defect)))
            return
        if header.raw_length != request.out.nbytes:
            self._counters.add("wrong_size_reads")
            self._done_with(extent)
            job.settle(request.position, Status.WRONG_SIZE)
            return
        delivery = Delivery(job, request, header, stream, lambda error, verified: self._finish(job, extent, request, error, verified))
        for group in delivery.groups[1:]:
            try:
                self._pool.run(delivery.run, group)
            except StoreClosed:  # the pool works off what it has, this task for one
                delivery.run(group)
        delivery.run(delivery.groups[0])

    def _checked_header(self, request: ReadRequest, complete: bool) -> RecordHeader:
        entry = request.entry
        where = f"segment {entry.segment_id:016x} offset {entry.offset}"
        if not complete:
            raise CorruptRecord("record-truncated", where=where, expected=f"{request.record_bytes} bytes", actual="the end of the file")
        assert request.page is not None
        header = RecordHeader.parse(request.page, where=where)
        check_place(header, self._store_uuid, entry.segment_id, entry.offset)
        if header.record_type is not RecordType.BLOCK or header.namespace != request.namespace or header.key != request.key:
            raise CorruptRecord("record-identity", where=where, expected=f"block {request.key.hex()}", actual=header.key.hex())
        if header.payload_checksum != entry.payload_checksum or header.record_bytes != request.record_bytes:
            expected, actual = f"{entry.payload_checksum:016x}", f"{header.payload_checksum:016x}"
            raise CorruptRecord("index-digest", where=where, expected=expected, actual=actual)
        return header

    def _finish(self, job: ReadJob, extent: _Extent, request: ReadRequest, error: FormatError | None, verified: bool = True) -> None:
        self._done_with(extent)
        if error is None:
            self._counters.add_many({"disk_hits": 1, "disk_raw_bytes": request.entry.raw_length, "unverified_hits": int(not verified)})
            job.settle(request.position, Status.HIT, verified=verified)
            return
        self._counters.add("corrupt_reads")
        logger.error("%s", error)
        self._on_useless(request, error)
        job.settle(request.position, Status.CORRUPT)

    def _done_with(self, extent: _Extent) -> None:
        with self._lock:
            extent.remaining -= 1
            last = extent.remaining == 0
        if last:
            self._release_slot(extent)

    def _release_slot(self, extent: _Extent) -> None:
        slot, extent.slot = extent.slot, None
        if slot is not None:
            self._bounce.release(slot)

    @staticmethod
    def _settle(job: ReadJob, extent: _Extent, status: Status) -> None:
        for request in extent.requests:
            job.settle(request.position, status)
