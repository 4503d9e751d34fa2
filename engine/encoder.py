"""From a block in memory to the payload of a record: stripes encoded on threads, raw when that is as good."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from ..format.checksum import xxh3_64
from ..format.codec import EncodedStripe, choose_codec, encode_stripe
from ..format.layout import STRIPE_BYTES_DEFAULT, Codec, stripe_bytes_for
from ..format.record import STRIPE_DTYPE
from ..gds.threads import WorkerPool
from .arena import Bytes, one_span
from .blocks import cut_spans
from .entry import Entry

SAMPLE_EVERY_BLOCKS = 64
RAW_UNLESS_SAVED = 16
"""A block stays raw unless encoding saves at least this fraction (one sixteenth) of it."""
STRIPES_PER_TASK = 4


@dataclass(slots=True)
class EncodedBlock:
    """The payload of one record. ``parts`` are laid one after the other; raw payloads are the buffer's own memory."""

    codec: Codec
    stripe_bytes: int
    stripes: np.ndarray[tuple[int], np.dtype[np.void]]
    stored_bytes: int
    parts: list[Bytes]
    intact: bool
    """False when the bytes no longer match the checksum that was taken when they were put."""


class CodecChoice:
    """The codec of a namespace's blocks: forced by configuration, or sampled anew every so many blocks."""

    def __init__(self, forced: Codec | None, element_size: int) -> None:
        self._forced = forced
        self._element_size = element_size
        self._lock = threading.Lock()
        self._chosen = Codec.RAW
        self._remaining = 0

    def choose(self, entry: Entry) -> Codec:
        if self._forced is not None:
            return self._forced
        with self._lock:
            if self._remaining == 0:
                stripe = one_span(cut_spans(entry.spans, 0, min(entry.size_bytes, STRIPE_BYTES_DEFAULT)))
                self._chosen = choose_codec(stripe, self._element_size)
                self._remaining = SAMPLE_EVERY_BLOCKS
            self._remaining -= 1
            return self._chosen


class _Encoding:
    """One block on its way: tasks over groups of stripes, then one decision for the whole block."""

    def __init__(self, entry: Entry, codec: Codec, wanted_stripe_bytes: int, pool: WorkerPool) -> None:
        self.entry = entry
        self.codec = codec
        self.element_size: int = entry.namespace.descriptor.element_size
        self.stripe_bytes = stripe_bytes_for(entry.size_bytes, wanted_stripe_bytes)
        self.count = -(-entry.size_bytes // self.stripe_bytes)
        groups = [range(i, min(i + STRIPES_PER_TASK, self.count)) for i in range(0, self.count, STRIPES_PER_TASK)]
        self.tasks: list[Future[list[EncodedStripe]]] = [pool.submit(self._encode_group, group) for group in groups]
        self.checksum: Future[int] = pool.submit(self._raw_checksum)

    def _raw(self, index: int) -> list[Bytes]:
        start = index * self.stripe_bytes
        return cut_spans(self.entry.spans, start, min(start + self.stripe_bytes, self.entry.size_bytes))

    def _encode_group(self, group: Sequence[int]) -> list[EncodedStripe]:
        return [self._encode_one(index, self.codec) for index in group]

    def _encode_one(self, index: int, codec: Codec) -> EncodedStripe:
        spans = self._raw(index)
        if codec is Codec.RAW:  # the checksum alone: the buffer's memory is the stored form
            stored = sum(span.size for span in spans)
            return EncodedStripe([], stored, 0, Codec.RAW, 0, xxh3_64(*spans))
        return encode_stripe(one_span(spans), codec, self.element_size)

    def _raw_checksum(self) -> int:
        return xxh3_64(*cut_spans(self.entry.spans, 0, self.entry.size_bytes))

    def finish(self) -> EncodedBlock:
        """Wait for the tasks; fall back to raw when the block did not shrink."""
        encoded = [stripe for task in self.tasks for stripe in task.result()]
        intact = self.checksum.result() == self.entry.raw_checksum
        stored_bytes = sum(-(-stripe.stored_length // 16) * 16 for stripe in encoded)
        if self.codec is not Codec.RAW and stored_bytes > self.entry.size_bytes * (RAW_UNLESS_SAVED - 1) // RAW_UNLESS_SAVED:
            self.codec = Codec.RAW
            encoded = self._encode_group(range(self.count))
        if self.codec is Codec.RAW:
            return self._assemble(encoded, list(self.entry.spans), self.entry.size_bytes, intact)
        parts, stored_bytes = _lay_out(encoded)
        return self._assemble(encoded, parts, stored_bytes, intact)

    def _assemble(self, encoded: list[EncodedStripe], parts: list[Bytes], stored_bytes: int, intact: bool) -> EncodedBlock:
        table = np.zeros(len(encoded), dtype=STRIPE_DTYPE)
        for row, stripe in zip(table, encoded, strict=True):
            row["stored_length"], row["first_plane_length"] = stripe.stored_length, stripe.first_plane_length
            row["codec"], row["plane_flags"], row["checksum"] = int(stripe.codec), stripe.plane_flags, stripe.checksum
        return EncodedBlock(self.codec, self.stripe_bytes, table, stored_bytes, parts, intact)


_PADDING = np.zeros(16, dtype=np.uint8)


def _lay_out(encoded: list[EncodedStripe]) -> tuple[list[Bytes], int]:
    """Stripes one after the other, each on a multiple of 16 bytes; the length ends with the last stripe."""
    parts: list[Bytes] = []
    position = 0
    for stripe in encoded:
        gap = -position % 16
        if gap:
            parts.append(_PADDING[:gap])
        parts += [np.frombuffer(part, dtype=np.uint8) for part in stripe.parts]
        position += gap + stripe.stored_length
    return parts, position


class Encoder:
    """Encodes batches of blocks on a pool of threads (the work runs outside the GIL)."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool

    def start(self, entry: Entry) -> _Encoding:
        """Begin to encode a block; ``finish`` of the answer waits for it."""
        namespace = entry.namespace
        return _Encoding(entry, namespace.codec_choice.choose(entry), namespace.stripe_bytes, self._pool)
