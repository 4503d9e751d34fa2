"""What is done with a record once it was read: check and decode its stripes straight into the destination, in groups that may
run in parallel. Runs on the threads that read, with help of the decode pool; the work per byte is done outside the interpreter lock, the
work per stripe is kept small.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from ..format.checksum import xxh3_64
from ..format.codec import decode_stripe
from ..format.errors import CorruptRecord, FormatError
from ..format.layout import PAGE_BYTES, Codec, RecordType
from ..format.record import RecordHeader
from ..format.stripe import StripeEntry, stripe_offsets
from ..gds.buffers import aligned_array
from .arena import Bytes
from .blocks import BlockView, HostSpan, copy_spans
from .index_entry import IndexEntry
from .jobs import ReadJob

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
    stripes_per_task: int = STRIPES_PER_TASK
    page: Bytes | None = None
    payload: Bytes | None = None
    """Bounce memory: the stored payload, or (direct) only what is behind the last whole page of the destination."""

    @property
    def record_bytes(self) -> int:
        return self.entry.record_pages * PAGE_BYTES

    def check(self, header: RecordHeader) -> None:
        """Raise ``CorruptRecord`` unless this is the record that the index promised."""
        where = f"segment {self.entry.segment_id:016x} offset {self.entry.offset}"
        if header.record_type is not RecordType.BLOCK or header.namespace != self.namespace or header.key != self.key:
            raise CorruptRecord("record-identity", where=where, expected=f"block {self.key.hex()}", actual=header.key.hex())
        if header.payload_checksum != self.entry.payload_checksum or header.record_bytes != self.record_bytes:
            expected, actual = f"{self.entry.payload_checksum:016x}", f"{header.payload_checksum:016x}"
            raise CorruptRecord("index-digest", where=where, expected=expected, actual=actual)


class Delivery:
    """One record on its way to its destination. ``finish`` is called once, with what went wrong and whether the bytes were checked.

    Make each of ``groups`` the argument of one ``run``, on any thread. There is at least one.
    """

    def __init__(
        self, job: ReadJob, request: ReadRequest, header: RecordHeader, stream: Any, finish: Callable[[FormatError | None, bool], None]
    ) -> None:
        self._job = job
        self._request = request
        self._header = header
        self._stream = stream
        self._finish = finish
        self._lock = threading.Lock()
        self._error: FormatError | None = None
        self._verified = True
        self._host = request.out
        if request.out.is_device and not request.direct:
            self._landing = aligned_array(request.out.nbytes)
            self._host = BlockView.of_host(self._landing)
        count, size = len(header.stripes), request.stripes_per_task
        self.groups = [range(i, min(i + size, count)) for i in range(0, count, size)] or [range(0)]
        self._remaining = len(self.groups)
        # One thread delivers the stripes in order: each is hashed while it is still in the cache. Else all are, at the end.
        self._hasher = xxhash.xxh3_64() if header.codec is not Codec.RAW and len(self.groups) == 1 else None
        self._hashed_bytes = 0
        self._stripes: list[StripeEntry] = header.stripes.tolist()
        self._offsets: list[int] = stripe_offsets(header.stripes).tolist()

    def run(self, group: range) -> None:
        """Check and decode these stripes; the last group also concludes the delivery."""
        error: FormatError | None = None
        try:
            if self._error is None:
                self._deliver(group)
        except FormatError as damage:
            error = damage
        except Exception as defect:  # never leave a job without an answer
            error = CorruptRecord("undecodable", where=place_of(self._header), actual=repr(defect))
        with self._lock:
            self._error = self._error or error
            self._remaining -= 1
            last = self._remaining == 0
        if last:
            self._conclude()

    def _deliver(self, group: range) -> None:
        if self._request.direct:
            with self._job.delivering() as allowed:
                if allowed:
                    complete_in_place(self._request, self._stream)
                    self._check_in_place(group)
            return
        for index in group:
            with self._job.delivering() as allowed:  # a stripe at a time: a deadline waits for this
                if not allowed:
                    return
                self._decode(index)

    def _check_in_place(self, group: range) -> None:
        """A block that was read straight into the destination."""
        header, out = self._header, self._request.out
        if out.is_device:
            self._verified = False  # no device-side checksum yet
        else:
            for index in group:
                start = index * header.stripe_bytes
                stop = min(start + header.stripe_bytes, header.raw_length)
                compare_checksums("stripe-checksum", self._header, xxh3_64(out.spans[0][start:stop]), self._stripes[index][5])

    def _decode(self, index: int) -> None:
        start = index * self._header.stripe_bytes
        stop = min(start + self._header.stripe_bytes, self._header.raw_length)
        stripe, offset = self._stripes[index], self._offsets[index]
        assert self._request.payload is not None
        stored = self._request.payload[offset : offset + stripe[0]]
        targets = self._host.slice(start, stop)
        decode_part(stored, stripe, stop - start, self._header.element_size, targets)
        if self._hasher is not None:
            for target in targets:
                self._hasher.update(target)
            self._hashed_bytes += stop - start

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
            self._error = CorruptRecord("undeliverable", where=place_of(self._header), actual=repr(defect))
        self._finish(self._error, self._verified)

    def _check_raw_bytes(self) -> None:
        """What was decoded must be what was put: closes the gap between the host's memory and the encoder."""
        if self._hasher is None:
            with self._job.delivering() as allowed:
                if not allowed:
                    return
                actual = xxh3_64(*self._host.slice(0, self._header.raw_length))
        elif self._hashed_bytes == self._header.raw_length:
            actual = self._hasher.intdigest()
        else:
            return  # the job was called off between two stripes
        compare_checksums("raw-checksum", self._header, actual, self._header.raw_checksum)


def place_of(header: RecordHeader) -> str:
    """Where a record lies, for messages."""
    return f"segment {header.segment_id:016x} offset {header.offset}"


def compare_checksums(check: str, header: RecordHeader, actual: int, expected: int) -> None:
    """Raise ``CorruptRecord`` where they differ."""
    if actual != expected:
        raise CorruptRecord(check, where=place_of(header), expected=f"{expected:016x}", actual=f"{actual:016x}")


def decode_part(stored: Bytes, stripe: StripeEntry, raw_bytes: int, element_size: int, targets: Sequence[HostSpan], first: int = 0) -> None:
    """Check and decode a stripe of ``raw_bytes``; what ``targets`` take of it from ``first`` on goes there, straight where one takes all.

    Raises ``CorruptRecord``.
    """
    if len(targets) == 1 and targets[0].size == raw_bytes:
        decode_stripe(stored, stripe, targets[0], element_size)
        return
    whole = np.empty(raw_bytes, dtype=np.uint8)
    decode_stripe(stored, stripe, whole, element_size)
    copy_spans([whole[first : first + sum(target.size for target in targets)]], targets)


def whole_pages(size_bytes: int) -> int:
    """The part of a block that whole pages hold."""
    return size_bytes - size_bytes % PAGE_BYTES


def complete_in_place(request: ReadRequest, stream: Any = None) -> None:
    """The tail of a destination behind its last whole page still lies in the bounce memory. Every group may do this."""
    out, payload = request.out, request.payload
    whole = whole_pages(out.nbytes)
    if whole == out.nbytes:
        return
    assert payload is not None
    tail = payload[: out.nbytes - whole]
    BlockView((out.spans[0][whole:],), tail.size, out.is_device).copy_from_host([tail], stream)
