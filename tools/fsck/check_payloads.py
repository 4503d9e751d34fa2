"""Payloads: every stripe of a block against its checksum, decoded, and the decoded bytes against those that were put."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

from ...format.checksum import xxh3_64
from ...format.codec import decode_stripe
from ...format.errors import CorruptRecord, UnsupportedFormat
from ...format.layout import PAGE_BYTES, Codec
from ...format.namespace import Namespace, namespace_digest
from ...format.record import RecordHeader
from ...format.stripe import StripeEntry, stripe_offsets, stripe_raw_bytes
from ...gds.buffers import ByteArray
from .findings import Finding
from .source import SegmentRef
from .stream import ByteStream, Piece

SCRATCH_KEPT_BYTES_MAX = 8 << 20


class _Scratch(threading.local):
    """Memory that stripes are decoded into, one a thread."""

    def __init__(self) -> None:
        self._memory: ByteArray = np.empty(0, np.uint8)

    def take(self, size_bytes: int) -> ByteArray:
        if self._memory.size < size_bytes:
            memory = np.empty(size_bytes, np.uint8)
            if size_bytes > SCRATCH_KEPT_BYTES_MAX:
                return memory
            self._memory = memory
        return self._memory[:size_bytes]


_scratch = _Scratch()


class BlockCheck:
    """The payload of one block. For one thread."""

    def __init__(self, header: RecordHeader, ref: SegmentRef) -> None:
        self.header = header
        self.findings: list[Finding] = []
        self.readable = True
        self.zeros = False
        """A page of zeros lies in a stripe that fails: a hole, where the block is a deleted one."""
        self._ref = ref
        self._entries: list[StripeEntry] = header.stripes.tolist()
        self._raw: Any = xxhash.xxh3_64()
        self._padding = 0

    def run(self, stream: ByteStream) -> None:
        """Check what the stream has next: the stripes, each with the padding behind it."""
        if self.header.codec is Codec.RAW and self._check_as_it_lies(stream):
            return
        offsets = [*stripe_offsets(self.header.stripes).tolist(), self.header.record_bytes - PAGE_BYTES]
        first, count = 0, len(self._entries)
        while first < count:
            room = stream.whole_bytes()
            last = first + 1
            while last < count and offsets[last + 1] - offsets[first] <= room:
                last += 1
            self._check(first, offsets[first : last + 1], stream.take(offsets[last] - offsets[first]))
            first = last
        self._finish()

    def _check_as_it_lies(self, stream: ByteStream) -> bool:
        """Whether the block was checked in one step, as a reader checks it: its stripes are stored as they are, one behind the other."""
        header = self.header
        length = header.record_bytes - PAGE_BYTES
        if stream.whole_bytes() < length:
            return False
        data = stream.peek(length)
        if xxh3_64(data[: header.raw_length]) != header.raw_checksum:
            return False
        stream.skip(length)
        self._padding = int(np.count_nonzero(data[header.raw_length :]))
        self._add_padding()
        return True

    def _check(self, first: int, offsets: Sequence[int], piece: Piece) -> None:
        """Neighbouring stripes: where each starts in the payload, and where the last one ends."""
        if not piece.readable:
            self.readable = False
            return
        for position, (start, stop) in enumerate(itertools.pairwise(offsets)):
            self._check_stripe(first + position, start, piece.data[start - offsets[0] : stop - offsets[0]])

    def _check_stripe(self, index: int, offset: int, data: ByteArray) -> None:
        entry = self._entries[index]
        stored, padding = data[: entry[0]], data[entry[0] :]
        if padding.size:
            self._padding += int(np.count_nonzero(padding))
        if self.findings:  # one finding a block is enough; the padding is still looked at
            return
        header = self.header
        raw_bytes = stripe_raw_bytes(header.raw_length, header.stripe_bytes, index)
        try:
            self._raw.update(_decoded(stored, entry, raw_bytes, header.element_size))
        except CorruptRecord as error:
            name = "PAY-CRC" if error.check == "stripe-checksum" else "PAY-DECODE"
            self.zeros = holds_a_hole(stored, header.offset + PAGE_BYTES + offset)
            self._add(name, stripe=index, error=str(error))

    def _finish(self) -> None:
        header = self.header
        if self.readable and not self.findings and self._raw.intdigest() != header.raw_checksum:
            error = CorruptRecord("raw-checksum", expected=f"{header.raw_checksum:016x}", actual=f"{self._raw.intdigest():016x}")
            self._add("PAY-RAW", error=str(error))
        self._add_padding()

    def _add_padding(self) -> None:
        if self._padding:
            self._add("PAY-PAD", count=self._padding)

    def _add(self, problem_id: str, **facts: Any) -> None:
        header = self.header
        named = {"key": header.key.hex(), "namespace": header.namespace.hex()} | facts
        place = (self._ref.name, header.segment_id, header.offset, header.record_bytes)
        self.findings.append(Finding(problem_id, *place, ident=header.namespace + header.key, facts=named))


def _decoded(stored: ByteArray, entry: StripeEntry, raw_bytes: int, element_size: int) -> ByteArray:
    """The raw bytes of a stripe. A raw stripe is not copied. Raises ``CorruptRecord``."""
    if entry[2] == Codec.RAW:
        actual = xxh3_64(stored)
        if actual != entry[5] or stored.size != raw_bytes:
            raise CorruptRecord("stripe-checksum", expected=f"{entry[5]:016x}", actual=f"{actual:016x}")
        return stored
    raw = _scratch.take(raw_bytes)
    decode_stripe(stored, entry, raw, element_size)
    return raw


def holds_a_hole(data: ByteArray, offset: int) -> bool:
    """Whether bytes that lie at an offset of the file hold a page of zeros, or are nothing but zeros: what a punched hole leaves."""
    lead = -offset % PAGE_BYTES
    pages = data[lead : lead + (data.size - lead) // PAGE_BYTES * PAGE_BYTES] if data.size > lead else data[:0]
    return not data.any() or (pages.size > 0 and not pages.reshape(-1, PAGE_BYTES).any(axis=1).all())


def check_descriptor(header: RecordHeader, payload: ByteArray, ref: SegmentRef) -> list[Finding]:
    """A namespace record: its stripe, its JSON, its digest, its padding."""
    stored = payload[: header.stored_length]
    found: list[Finding] = []
    place = (ref.name, header.segment_id, header.offset, header.record_bytes)
    try:
        actual, expected = xxh3_64(stored), int(header.stripes["checksum"][0])
        if actual != expected or stored.size != header.raw_length or actual != header.raw_checksum:
            raise CorruptRecord("stripe-checksum", expected=f"{expected:016x}", actual=f"{actual:016x}")
        digest = namespace_digest(stored.tobytes())
        if digest != header.namespace:
            raise CorruptRecord("namespace-digest", expected=header.namespace.hex(), actual=digest.hex())
        Namespace.parse(stored.tobytes(), where=ref.name)
    except UnsupportedFormat:
        pass  # whole, and of a newer version: its digest is right
    except CorruptRecord as error:
        found.append(Finding("REC-NS-DAMAGED", *place, facts={"namespace": header.namespace.hex(), "error": str(error)}))
    padding = int(np.count_nonzero(payload[header.stored_length :]))
    if padding:
        found.append(Finding("PAY-PAD", *place, facts={"count": padding}))
    return found
