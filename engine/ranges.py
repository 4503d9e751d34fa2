"""The same part of many blocks: only the stripes that cover it are read, checked and decoded.

For hosts that load layer by layer. Each stripe's own checksum vouches for its bytes, since the checksum of the whole block cannot be
computed from a part. What it does not see is memory that changed between the put and the encoder; a get of the whole block does.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from ..format.errors import CorruptRecord, DeviceError, FormatError, StoreClosed
from ..format.layout import PAGE_BYTES
from ..format.record import RecordHeader
from ..format.stripe import stripe_offsets
from ..gds.buffers import ByteArray, aligned_array
from ..gds.device import DeviceFile
from .blocks import BlockView
from .contract import Status
from .delivery import ReadRequest, decode_part, place_of
from .jobs import ReadJob
from .reader import check_length, forget_frames
from .reinsertion import load_header

if TYPE_CHECKING:
    from .core import Core

logger = logging.getLogger("kvlode")


def read_parts(core: Core, job: ReadJob, requests: list[ReadRequest], start: int, stream: Any) -> None:
    """Start reading bytes ``[start, start + destination)`` of each block; returns at once."""
    for request in sorted(requests, key=lambda r: (r.entry.segment_id, r.entry.offset)):
        try:
            core.read_pool.run(_settle_part, core, job, request, start, stream)
        except StoreClosed:
            job.settle(request.position, Status.CANCELLED)


def _settle_part(core: Core, job: ReadJob, request: ReadRequest, start: int, stream: Any) -> None:
    try:
        status = _read_part(core, job, request, start, stream)
    except FormatError as error:
        core.counters.add_for(request.namespace, {"corrupt_reads": 1})
        forget_frames(error)
        core.on_useless(request, error)
        status = Status.CORRUPT
    except Exception as error:  # never leave a job without an answer
        core.counters.add("read_errors")
        logger.warning("%s", error, exc_info=None if isinstance(error, DeviceError) else error)
        forget_frames(error)
        status = Status.IO_ERROR
    job.settle(request.position, status)


def _read_part(core: Core, job: ReadJob, request: ReadRequest, start: int, stream: Any) -> Status:
    if job.cancelled:
        return Status.CANCELLED
    with core.segments.reading(request.entry.segment_id) as file:
        if file is None:
            core.on_useless(request, None)
            return Status.MISS
        header = load_header(file, core.superblock.store_uuid, request.entry.segment_id, request.entry.offset)
        request.check(header)
        if header.raw_length < start + request.out.nbytes:
            core.counters.add("wrong_size_reads")
            return Status.WRONG_SIZE
        first, last = start // header.stripe_bytes, (start + request.out.nbytes - 1) // header.stripe_bytes
        stored = _read_stripes(file, header, first, last)
    host = BlockView.of_host(aligned_array(request.out.nbytes)) if request.out.is_device else request.out
    for index in range(first, last + 1):
        with job.delivering() as allowed:  # a stripe at a time: a deadline waits for this
            if allowed:
                _decode(header, index, stored[index - first], host, start)
    with job.delivering() as allowed:
        if allowed and host is not request.out:
            request.out.copy_from_host(host.spans, stream)
    core.counters.add_for(request.namespace, {"disk_hits": 1, "disk_raw_bytes": request.out.nbytes})
    core.counters.latency.observe("get_drive_block", time.perf_counter() - job.began_s)
    return Status.HIT


def _read_stripes(file: DeviceFile, header: RecordHeader, first: int, last: int) -> list[ByteArray]:
    """The stored bytes of neighbouring stripes, read with one request of whole pages."""
    lengths = header.stripes["stored_length"]
    begins = [int(offset) + header.offset + PAGE_BYTES for offset in stripe_offsets(header.stripes)[first : last + 1]]
    ends = [begin + int(length) for begin, length in zip(begins, lengths[first : last + 1], strict=True)]
    page_start = begins[0] // PAGE_BYTES * PAGE_BYTES
    pages = aligned_array(-(-(ends[-1] - page_start) // PAGE_BYTES) * PAGE_BYTES)
    count = file.read_now(page_start, [pages])
    check_length(file, page_start, pages.size, count)
    if count < ends[-1] - page_start:
        raise CorruptRecord("record-truncated", where=place_of(header), expected=f"{ends[-1] - page_start} bytes", actual=count)
    return [pages[begin - page_start : end - page_start] for begin, end in zip(begins, ends, strict=True)]


def _decode(header: RecordHeader, index: int, stored: ByteArray, out: BlockView, start: int) -> None:
    begin = index * header.stripe_bytes
    end = min(begin + header.stripe_bytes, header.raw_length)
    first, stop = max(begin, start), min(end, start + out.nbytes)
    targets = out.slice(first - start, stop - start)
    decode_part(stored, header.stripes[index].item(), end - begin, header.element_size, targets, first - begin)
