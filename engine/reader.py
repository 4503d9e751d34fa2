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

import numpy as np

from ..format.checksum import xxh3_64
from ..format.codec import decode_stripe
from ..format.errors import CorruptRecord, DeviceError, FormatError
from ..format.layout import PAGE_BYTES, Codec, RecordType
from ..format.record import RecordHeader, check_place, stripe_offsets
from ..gds.buffers import SlotPool, aligned_array
from ..gds.device import Device, DeviceFile
from ..gds.threads import WorkerPool
from .arena import Bytes
from .blocks import BlockView
from .contract import Status
from .index_entry import IndexEntry
from .jobs import ReadJob
from .segments import SegmentTable
from .stats import Counters

logger = logging.getLogger("kvlode")

EXTENT_BYTES_MAX = 8 << 20
GAP_BYTES_MAX = 64 << 10
"""Neighbouring records this close are read in one go, the gap included."""
STRIPES_PER_TASK = 8


@dataclass(slots=True)
class ReadRequest:
    """One block to read: where it is and where it goes."""

    position: int
    namespace: bytes
    key: bytes
    out: BlockView
    entry: IndexEntry
    direct: bool = False
    """The payload is read straight into the destination."""
    page: Bytes | None = None
    payload: Bytes | None = None
    """Bounce memory: the stored payload, or (direct) only what is behind the last whole page of the destination."""

    @property
    def record_bytes(self) -> int:
        return self.entry.record_pages * PAGE_BYTES


@dataclass(slots=True)
class _Extent:
    """Neighbouring records of one segment, read by one request."""

    segment_id: int
    requests: list[ReadRequest]
    start: int
    stop: int
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
        for request in requests:
            request.direct = direct and self._direct_possible(request)
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
            read = self._start_read(extent, file)
        except BaseException:
            self._segments.unpin(extent.segment_id)
            self._release_slot(extent)
            raise
        read.add_done_callback(lambda done: self._pool.submit(self._complete, job, extent, done, stream))

    def _start_read(self, extent: _Extent, file: DeviceFile) -> Future[int]:
        self._lay_out(extent)
        return file.read(extent.start, extent.buffers)

    def _lay_out(self, extent: _Extent) -> None:
        """Bounce memory for all that is not read straight into a destination, and the list of buffers in file order."""
        direct_bytes = sum(_whole_pages(r.out.nbytes) for r in extent.requests if r.direct)
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
                whole = _whole_pages(request.out.nbytes)
                extent.buffers += [extent.slot[run_start:used], request.out.spans[0][:whole]]
                run_start, payload_bytes = used, payload_bytes - whole
            request.payload = extent.slot[used : used + payload_bytes]
            used += payload_bytes
            position = request.entry.offset + request.record_bytes
        if used > run_start:
            extent.buffers.append(extent.slot[run_start:used])

    # --- completing (decode pool) -------------------------------------------------------------------------------

    def _complete(self, job: ReadJob, extent: _Extent, read: Future[int], stream: Any) -> None:
        self._segments.unpin(extent.segment_id)
        try:
            read_bytes = read.result()
        except Exception as error:
            self._counters.add("read_errors")
            logger.warning("%s", error)
            self._release_slot(extent)
            self._settle(job, extent, Status.IO_ERROR)
            return
        for request in extent.requests:
            complete = request.entry.offset + request.record_bytes <= extent.start + read_bytes
            self._check_and_deliver(job, extent, request, complete, stream)

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
        delivery = _Delivery(self, job, extent, request, header, stream)
        groups = delivery.groups()
        for group in groups[1:]:
            self._pool.submit(delivery.run, group)
        delivery.run(groups[0])

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

    def _finish(self, job: ReadJob, extent: _Extent, request: ReadRequest, error: FormatError | None, *, verified: bool = True) -> None:
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


class _Delivery:
    """Checks and decodes the stripes of one record into its destination, in groups that may run in parallel."""

    def __init__(self, reader: Reader, job: ReadJob, extent: _Extent, request: ReadRequest, header: RecordHeader, stream: Any) -> None:
        self._reader = reader
        self._job = job
        self._extent = extent
        self._request = request
        self._header = header
        self._stream = stream
        self._offsets = stripe_offsets(header.stripes)
        self._lock = threading.Lock()
        self._remaining = 0
        self._error: FormatError | None = None
        self._verified = True
        self._host = request.out
        if request.out.is_device and not request.direct:
            self._landing = aligned_array(request.out.nbytes)
            self._host = BlockView.of_host(self._landing)

    def groups(self) -> list[range]:
        count = len(self._header.stripes)
        groups = [range(i, min(i + STRIPES_PER_TASK, count)) for i in range(0, count, STRIPES_PER_TASK)]
        self._remaining = len(groups)
        return groups

    def run(self, group: range) -> None:
        error: FormatError | None = None
        try:
            with self._job.delivering() as allowed:
                if allowed and self._error is None:
                    for index in group:
                        self._deliver(index)
        except FormatError as damage:
            error = damage
        except Exception as defect:  # never leave a job without an answer
            error = CorruptRecord("undecodable", where=self._where(), actual=repr(defect))
        with self._lock:
            self._error = self._error or error
            self._remaining -= 1
            last = self._remaining == 0
        if last:
            self._conclude()

    def _where(self) -> str:
        return f"segment {self._header.segment_id:016x} offset {self._header.offset}"

    def _deliver(self, index: int) -> None:
        header, request = self._header, self._request
        start = index * header.stripe_bytes
        stop = min(start + header.stripe_bytes, header.raw_length)
        stripe = header.stripes[index]
        if request.direct:
            self._check_in_place(stripe, start, stop)
            return
        assert request.payload is not None
        stored = request.payload[int(self._offsets[index]) : int(self._offsets[index]) + int(stripe["stored_length"])]
        targets = self._host.slice(start, stop)
        if len(targets) == 1:
            decode_stripe(stored, stripe, targets[0], header.element_size)
            return
        whole = np.empty(stop - start, dtype=np.uint8)
        decode_stripe(stored, stripe, whole, header.element_size)
        position = 0
        for target in targets:
            target[:] = whole[position : position + target.size]
            position += target.size

    def _check_in_place(self, stripe: Any, start: int, stop: int) -> None:
        """A stripe that was read straight into the destination; its tail behind the last whole page still lies in the bounce memory."""
        request = self._request
        whole = _whole_pages(request.out.nbytes)
        assert request.payload is not None
        if stop > whole:
            tail = request.payload[: stop - whole]
            if request.out.is_device:
                BlockView((request.out.spans[0][whole:stop],), stop - whole, True).copy_from_host([tail], self._stream)
            else:
                request.out.spans[0][whole:stop] = tail
        if request.out.is_device:  # no device-side checksum yet: reported as unverified
            self._verified = False
            return
        actual = xxh3_64(request.out.spans[0][start:stop])
        if actual != int(stripe["checksum"]):
            raise CorruptRecord("stripe-checksum", where=self._where(), expected=f"{int(stripe['checksum']):016x}", actual=f"{actual:016x}")

    def _conclude(self) -> None:
        try:
            if self._error is None and self._header.codec is not Codec.RAW:
                self._check_raw_bytes()
            if self._error is None and self._host is not self._request.out:
                with self._job.delivering() as allowed:
                    if allowed:
                        self._request.out.copy_from_host([self._landing], self._stream)
        except FormatError as damage:
            self._error = damage
        except Exception as defect:
            self._error = CorruptRecord("undeliverable", where=self._where(), actual=repr(defect))
        self._reader._finish(self._job, self._extent, self._request, self._error, verified=self._verified)

    def _check_raw_bytes(self) -> None:
        """What was decoded must be what was put: closes the gap between the host's memory and the encoder."""
        with self._job.delivering() as allowed:
            if not allowed:
                return
            actual = xxh3_64(*self._host.slice(0, self._header.raw_length))
        if actual != self._header.raw_checksum:
            raise CorruptRecord("raw-checksum", where=self._where(), expected=f"{self._header.raw_checksum:016x}", actual=f"{actual:016x}")


def _whole_pages(size_bytes: int) -> int:
    return size_bytes - size_bytes % PAGE_BYTES
