"""Reading blocks from the log: few large reads in flight, every byte checked, decoded straight into the destinations.

A job's blocks are sorted by place and neighbours merged into extents. Each thread of the reading pool takes an extent, reads
it, and checks and decodes it itself: no work changes threads on the way, which costs more than it is worth where a thread
gets to run only after another has let go of the interpreter. Fewer reads are in flight than there are threads: were all of them
to wait for the drive together, they would then work on what came together, and the drive would wait. Jobs take turns extent
by extent. Where a job has too few blocks to keep all cores busy, the decode pool helps with their stripes.

A raw block with a page-aligned destination is read straight into it; everything else is materialised once, from bounce
memory.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..format.errors import CorruptRecord, DeviceError, FormatError, StoreClosed
from ..format.layout import PAGE_BYTES, STRIPES_MAX, Codec
from ..format.record import RecordHeader, check_place
from ..gds.buffers import SlotPool, aligned_array
from ..gds.device import Device, DeviceFile
from ..gds.threads import WorkerPool
from .arena import Bytes
from .contract import Status
from .delivery import STRIPES_PER_TASK, Delivery, ReadRequest, whole_pages
from .drive_rate import DriveRate
from .jobs import ReadJob
from .raw_delivery import deliver_whole, is_whole
from .read_probe import ReadProbe
from .read_rate import ReadRate
from .segments import SegmentTable
from .stats import Counters

logger = logging.getLogger("kvlode")

EXTENT_BYTES_MAX = (8 << 20) + (256 << 10)
"""What one request reads: 8 MiB of payload, and header pages."""
GAP_BYTES_MAX = 64 << 10
"""Neighbouring records this close are read in one go, the gap included."""
OWN_MEMORY_BYTES_MAX = 256 << 10
"""Header pages beside blocks that are read in place: so little memory is not worth a slot of the bounce memory, nor the wait for one."""


@dataclass(slots=True)
class _Extent:
    """Neighbouring records of one segment, read by one request."""

    segment_id: int
    requests: list[ReadRequest]
    start: int
    stop: int
    slot: Bytes | None = None
    """Of the bounce memory, to be given back when the last record is delivered."""
    remaining: int = 0


@dataclass(frozen=True, slots=True)
class _Reads:
    """What is left to read for a job."""

    job: ReadJob
    extents: deque[_Extent]
    stream: Any


class Reader:
    """See the module. Thread-safe."""

    def __init__(
        self,
        device: Device,
        segments: SegmentTable,
        store_uuid: bytes,
        read_pool: WorkerPool,
        decode_pool: WorkerPool,
        bounce: SlotPool,
        counters: Counters,
        on_useless: Callable[[ReadRequest, FormatError | None], None],
    ) -> None:
        self._device = device
        self._segments = segments
        self._store_uuid = store_uuid
        self._read_pool = read_pool
        self._decode_pool = decode_pool
        self._bounce = bounce
        self._counters = counters
        self._on_useless = on_useless
        self.rate = ReadRate()
        """Of stored payload bytes."""
        self.drive_rate = DriveRate()
        self.probe = ReadProbe(segments, read_pool, bounce, self.drive_rate)
        self._lock = threading.Lock()
        self._turns = threading.Semaphore(max(1, read_pool.threads * 5 // 8))

    def run(self, job: ReadJob, requests: list[ReadRequest], *, direct: bool, stream: Any = None) -> None:
        """Start reading for a job; returns at once. ``direct`` allows I/O into the destinations."""
        # Where there are blocks enough for all cores, each is one task: cutting it up costs the interpreter more than it wins.
        stripes_per_task = STRIPES_MAX if len(requests) >= 2 * self._decode_pool.threads else STRIPES_PER_TASK
        for request in requests:
            request.direct = direct and self._direct_possible(request)
            request.stripes_per_task = stripes_per_task
        reads = _Reads(job, deque(self._extents(requests)), stream)
        for _ in range(min(len(reads.extents), self._read_pool.threads)):
            self._enqueue(reads)

    def _enqueue(self, reads: _Reads) -> None:
        """One more turn for a job. After a close there is none: what it has not read is given up, for it must not wait for ever."""
        try:
            self._read_pool.run(self._take_turn, reads)
        except StoreClosed:
            while (extent := _next(reads)) is not None:
                self._settle(reads.job, extent, Status.CANCELLED)

    def _take_turn(self, reads: _Reads) -> None:
        """Read one extent; the job then goes to the end of the queue."""
        extent = _next(reads)
        if extent is None:
            return
        self.rate.begin()
        delivered_bytes = 0
        try:
            delivered_bytes = self._read(reads.job, extent, reads.stream)
        except Exception as error:
            self._counters.add("read_errors")
            logger.warning("%s", error, exc_info=None if isinstance(error, DeviceError) else error)
            forget_frames(error)
            self._settle(reads.job, extent, Status.IO_ERROR)
        finally:
            self.rate.end(delivered_bytes)
        if reads.extents:
            self._enqueue(reads)

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

    # --- reading ----------------------------------------------------------------------------------------------

    def _read(self, job: ReadJob, extent: _Extent, stream: Any) -> int:
        """Read an extent and deliver its blocks; how many stored bytes of them were read.

        An error means that none of them was settled and nothing reads into them any more.
        """
        file = None if job.cancelled else self._segments.pin(extent.segment_id)
        if file is None:
            self._not_read(job, extent)
            return 0
        try:
            buffers = self._lay_out(extent)
            read_bytes = self._fill(job, extent, file, buffers)
        except BaseException:
            self._release_slot(extent)
            raise
        finally:
            self._segments.unpin(extent.segment_id)
        if read_bytes is None:
            self._release_slot(extent)
            return 0
        self._deliver(job, extent, read_bytes, stream)
        return sum(request.entry.stored_length for request in extent.requests)

    def _fill(self, job: ReadJob, extent: _Extent, file: DeviceFile, buffers: list[Any]) -> int | None:
        """Read; ``None`` when the job was called off first. Only what is read straight into destinations counts as a delivery: a job
        that is called off while the drive fills bounce memory is done at once."""
        into_destinations = any(request.direct for request in extent.requests)
        with self._turns, job.delivering() if into_destinations else contextlib.nullcontext(not job.cancelled) as allowed:
            if not allowed:
                return None
            with self.drive_rate.measuring(extent.stop - extent.start):
                read_bytes = file.read_now(extent.start, buffers)
        check_length(file, extent.start, extent.stop - extent.start, read_bytes)
        return read_bytes

    def _not_read(self, job: ReadJob, extent: _Extent) -> None:
        """Called off; or freed since the index was asked, or its file is lost: the entry must not promise it for ever."""
        if not job.cancelled:
            for request in extent.requests:
                self._on_useless(request, None)
            self._settle(job, extent, Status.MISS)

    def _lay_out(self, extent: _Extent) -> list[Any]:
        """The list of buffers in file order: destinations, and bounce memory for all that is not read straight into one."""
        direct_bytes = sum(whole_pages(r.out.nbytes) for r in extent.requests if r.direct)
        slot = self._memory(extent, extent.stop - extent.start - direct_bytes)
        extent.remaining = len(extent.requests)
        buffers: list[Any] = []
        used, position = 0, extent.start
        run_start = 0
        for request in extent.requests:
            used += request.entry.offset - position
            request.page = slot[used : used + PAGE_BYTES]
            used += PAGE_BYTES
            payload_bytes = request.record_bytes - PAGE_BYTES
            if request.direct:
                whole = whole_pages(request.out.nbytes)
                buffers += [slot[run_start:used], request.out.spans[0][:whole]]
                run_start, payload_bytes = used, payload_bytes - whole
            request.payload = slot[used : used + payload_bytes]
            used += payload_bytes
            position = request.entry.offset + request.record_bytes
        if used > run_start:
            buffers.append(slot[run_start:used])
        return buffers

    def _memory(self, extent: _Extent, size_bytes: int) -> Bytes:
        if size_bytes <= OWN_MEMORY_BYTES_MAX:
            return aligned_array(size_bytes)
        slot = self._bounce.acquire(size_bytes)
        assert slot is not None  # waits without limit: whoever has memory delivers from it without waiting for more
        extent.slot = slot
        return slot

    # --- completing ---------------------------------------------------------------------------------------------

    def _deliver(self, job: ReadJob, extent: _Extent, read_bytes: int, stream: Any) -> None:
        whole: list[tuple[ReadRequest, RecordHeader]] = []
        others: list[tuple[ReadRequest, RecordHeader]] = []
        for request in extent.requests:
            complete = request.entry.offset + request.record_bytes <= extent.start + read_bytes
            header = self._usable_header(job, extent, request, complete)
            if header is not None:
                (whole if is_whole(request, header) else others).append((request, header))
        if whole:
            self._deliver_whole(job, extent, whole)
        for request, header in others:
            self._deliver_stripes(job, extent, request, header, stream)

    def _usable_header(self, job: ReadJob, extent: _Extent, request: ReadRequest, complete: bool) -> RecordHeader | None:
        """The record's header; ``None`` where the request is over because of it."""
        try:
            header = self._checked_header(request, complete)
        except FormatError as error:
            self._finish(job, extent, request, error)
            return None
        except Exception as defect:  # never leave a job without an answer
            self._finish(job, extent, request, CorruptRecord("unreadable-header", where=request.key.hex(), actual=repr(defect)))
            return None
        if header.raw_length == request.out.nbytes:
            return header
        self._counters.add("wrong_size_reads")
        self._done_with(extent)
        job.settle(request.position, Status.WRONG_SIZE)
        return None

    def _deliver_whole(self, job: ReadJob, extent: _Extent, items: list[tuple[ReadRequest, RecordHeader]]) -> None:
        try:
            errors = deliver_whole(job, items)
        except Exception as defect:  # never leave a job without an answer
            errors = [CorruptRecord("undeliverable", where=f"segment {extent.segment_id:016x}", actual=repr(defect))] * len(items)
        good: list[ReadRequest] = []
        for (request, _), error in zip(items, errors, strict=True):
            if error is None:
                good.append(request)
            else:
                self._finish(job, extent, request, error)
        self._done_with(extent, len(good))
        if good:
            raw_bytes = sum(request.entry.raw_length for request in good)
            self._counters.add_for(good[0].namespace, {"disk_hits": len(good), "disk_raw_bytes": raw_bytes})
            self._counters.latency.observe("get_drive_block", time.perf_counter() - job.began_s, len(good))
        job.settle_many([request.position for request in good], [Status.HIT] * len(good))

    def _deliver_stripes(self, job: ReadJob, extent: _Extent, request: ReadRequest, header: RecordHeader, stream: Any) -> None:
        try:
            delivery = Delivery(job, request, header, stream, lambda error, verified: self._finish(job, extent, request, error, verified))
        except Exception as defect:  # never leave a job without an answer
            self._finish(job, extent, request, CorruptRecord("undeliverable", where=request.key.hex(), actual=repr(defect)))
            return
        for group in delivery.groups[1:]:
            try:
                self._decode_pool.run(delivery.run, group)
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
        request.check(header)
        return header

    def _finish(self, job: ReadJob, extent: _Extent, request: ReadRequest, error: FormatError | None, verified: bool = True) -> None:
        self._done_with(extent)
        if error is None:
            counts = {"disk_hits": 1, "disk_raw_bytes": request.entry.raw_length, "unverified_hits": int(not verified)}
            self._counters.add_for(request.namespace, counts)
            self._counters.latency.observe("get_drive_block", time.perf_counter() - job.began_s)
            job.settle(request.position, Status.HIT, verified=verified)
            return
        self._counters.add_for(request.namespace, {"corrupt_reads": 1})
        forget_frames(error)
        logger.error("%s", error)
        self._on_useless(request, error)
        job.settle(request.position, Status.CORRUPT)

    def _done_with(self, extent: _Extent, count: int = 1) -> None:
        if not count:
            return
        with self._lock:
            extent.remaining -= count
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


def check_length(file: DeviceFile, start: int, length: int, read_bytes: int) -> None:
    """A read that ends before the file does has failed; only a file that ends too early has lost something. Raises ``DeviceError``."""
    if read_bytes < length and start + read_bytes < min(start + length, file.status().size_bytes):
        raise DeviceError("read", file.path, offset=start, length=length, detail=f"it ended after {read_bytes} bytes")


def forget_frames(error: BaseException | None) -> None:
    """Whoever keeps an error (a log handler, say) must not keep destinations by its frames: they are the host's to unmap."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _next(reads: _Reads) -> _Extent | None:
    """The next extent that nobody else reads; ``None`` when there is none."""
    try:
        return reads.extents.popleft()
    except IndexError:
        return None
