"""Raw blocks that were read whole, checked and delivered by the thread that read them: small ones many at a time.

What a read costs beside its bytes is the same for a block of 64 KiB as for one of 4 MiB; for the small ones it is all that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import xxhash

from ..format.checksum import xxh3_64
from ..format.errors import FormatError
from ..format.layout import Codec
from ..format.record import RecordHeader
from .blocks import copy_spans, neighbours
from .delivery import ReadRequest, compare_checksums, complete_in_place
from .jobs import ReadJob

PIECE_BYTES = 1 << 20
"""Hashed and copied in one step: small enough for the cache, long enough for the interpreter not to matter. A deadline waits for it."""

Item: TypeAlias = tuple[ReadRequest, RecordHeader]


def is_whole(request: ReadRequest, header: RecordHeader) -> bool:
    """Whether one thread delivers all of the block: its own checksum covers it, in fewer steps than those of its stripes."""
    return header.codec is Codec.RAW and not request.out.is_device and len(header.stripes) <= request.stripes_per_task


def deliver_whole(job: ReadJob, items: Sequence[Item]) -> list[FormatError | None]:
    """Check and deliver; what is wrong with each. Of a job that was called off meanwhile nothing is touched, and nothing is told."""
    errors: list[FormatError | None] = []
    for run in neighbours([header.raw_length for _, header in items], PIECE_BYTES):
        batch = items[run.start : run.stop]
        if len(batch) == 1 and batch[0][1].raw_length > PIECE_BYTES:
            errors.append(_error_of(_deliver_large, job, *batch[0]))
            continue
        with job.delivering() as allowed:
            errors += [_error_of(_deliver_small, *item) if allowed else None for item in batch]
    return errors


def _error_of(deliver: Callable[..., None], *arguments: object) -> FormatError | None:
    try:
        deliver(*arguments)
    except FormatError as error:
        return error
    return None


def _deliver_small(request: ReadRequest, header: RecordHeader) -> None:
    if request.direct:
        complete_in_place(request)
        compare_checksums("raw-checksum", header, xxh3_64(request.out.spans[0]), header.raw_checksum)
        return
    assert request.payload is not None
    payload = request.payload[: header.raw_length]
    spans = request.out.spans
    if len(spans) == 1:
        np.copyto(spans[0], payload)
    else:
        copy_spans([payload], spans)
    compare_checksums("raw-checksum", header, xxh3_64(payload), header.raw_checksum)


def _deliver_large(job: ReadJob, request: ReadRequest, header: RecordHeader) -> None:
    if request.direct:
        with job.delivering() as allowed:
            if allowed:
                _deliver_small(request, header)
        return
    assert request.payload is not None
    hasher = xxhash.xxh3_64()
    for start in range(0, header.raw_length, PIECE_BYTES):
        piece = request.payload[start : min(start + PIECE_BYTES, header.raw_length)]
        hasher.update(piece.data)
        with job.delivering() as allowed:
            if not allowed:
                return
            copy_spans([piece], request.out.slice(start, start + piece.size))
    compare_checksums("raw-checksum", header, hasher.intdigest(), header.raw_checksum)
