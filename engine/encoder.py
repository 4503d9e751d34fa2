"""From a block in memory to the payload of a record: stripes encoded on threads, raw when that is as good.

What is encoded lies in memory that the next batch uses again. Memory that is new for every stripe costs a third more time: the kernel
clears each page of it when it is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import xxhash

from ..format.checksum import xxh3_64
from ..format.codec import EncodedStripe, encode_stripe, encoded_bytes_max
from ..format.layout import Codec, stripe_bytes_for
from ..format.record import STRIPE_DTYPE
from ..gds.threads import WorkerPool
from .arena import Bytes, one_span
from .blocks import cut_spans
from .entry import Entry

RAW_UNLESS_SAVED = 16
"""A block stays raw unless encoding saves at least this fraction (one sixteenth) of it."""
STRIPES_PER_TASK = 4
IN_ORDER_BYTES_MAX = 8 << 20
"""A raw block up to this size is hashed by one thread; there are others in a batch for the rest of them."""
SMALL_BYTES_MAX = 256 << 10
KEPT_BYTES = 24 << 20
"""Memory that stays for encoded stripes: what a batch of the usual size needs. It is taken as it is touched."""


@dataclass(slots=True)
class EncodedBlock:
    """The payload of one record. ``parts`` are laid one after the other; raw payloads are the buffer's own memory, others are good until
    the encoder's next batch."""

    codec: Codec
    stripe_bytes: int
    stripes: np.ndarray[tuple[int], np.dtype[np.void]]
    stored_bytes: int
    parts: list[Bytes]
    intact: bool
    """False when the bytes no longer match the checksum that was taken when they were put."""


class _Encoding:
    """One block on its way: tasks over groups of stripes, then one decision for the whole block."""

    def __init__(self, entry: Entry, codec: Codec, wanted_stripe_bytes: int, pool: WorkerPool, memory: Callable[[int], Bytes]) -> None:
        self.entry = entry
        self.codec = codec
        self.element_size: int = entry.namespace.descriptor.element_size
        self.stripe_bytes = stripe_bytes_for(entry.size_bytes, wanted_stripe_bytes)
        self.count = -(-entry.size_bytes // self.stripe_bytes)
        self._room_bytes = encoded_bytes_max(min(self.stripe_bytes, entry.size_bytes))
        self._memory = memory(0 if codec is Codec.RAW else self.count * self._room_bytes)
        self._hasher = xxhash.xxh3_64()
        self.tasks: list[Future[list[EncodedStripe]]] = []
        if codec is Codec.RAW and entry.size_bytes <= IN_ORDER_BYTES_MAX:
            self.tasks.append(pool.submit(self._hash_in_order))
            return
        for start in range(0, self.count, STRIPES_PER_TASK):
            self.tasks.append(pool.submit(self._encode_group, range(start, min(start + STRIPES_PER_TASK, self.count))))
        self.tasks.append(pool.submit(self._hash))

    def _raw(self, index: int) -> list[Bytes]:
        start = index * self.stripe_bytes
        return cut_spans(self.entry.spans, start, min(start + self.stripe_bytes, self.entry.size_bytes))

    def _hash(self) -> list[EncodedStripe]:
        """The block's own checksum: what is in memory must still be what was put."""
        for span in cut_spans(self.entry.spans, 0, self.entry.size_bytes):
            self._hasher.update(span)
        return []

    def _hash_in_order(self) -> list[EncodedStripe]:
        """Both checksums of a raw block: memory that one of them has brought into the cache is nearly free for the other."""
        encoded = []
        for index in range(self.count):
            encoded.append(self._encode_one(index, Codec.RAW))
            for span in self._raw(index):
                self._hasher.update(span.data)
        return encoded

    def _encode_group(self, group: Sequence[int]) -> list[EncodedStripe]:
        return [self._encode_one(index, self.codec) for index in group]

    def _encode_one(self, index: int, codec: Codec) -> EncodedStripe:
        spans = self._raw(index)
        if codec is Codec.RAW:  # the checksum alone: the buffer's memory is the stored form
            stored = sum(span.size for span in spans)
            return EncodedStripe([], stored, 0, Codec.RAW, 0, xxh3_64(*spans))
        out = self._memory[index * self._room_bytes : (index + 1) * self._room_bytes]
        return encode_stripe(one_span(spans), codec, self.element_size, out)

    def finish(self) -> EncodedBlock:
        """Wait for the tasks; fall back to raw when the block did not shrink."""
        encoded = [stripe for task in self.tasks for stripe in task.result()]
        intact = self._hasher.intdigest() == self.entry.raw_checksum
        stored_bytes = sum(-(-stripe.stored_length // 16) * 16 for stripe in encoded)
        if self.codec is not Codec.RAW and stored_bytes > self.entry.size_bytes * (RAW_UNLESS_SAVED - 1) // RAW_UNLESS_SAVED:
            self.codec = Codec.RAW
            encoded = self._encode_group(range(self.count))
        if self.codec is Codec.RAW:
            return self._assemble(encoded, list(self.entry.spans), self.entry.size_bytes, intact)
        parts, stored_bytes = _lay_out(encoded)
        return self._assemble(encoded, parts, stored_bytes, intact)

    def _assemble(self, encoded: list[EncodedStripe], parts: list[Bytes], stored_bytes: int, intact: bool) -> EncodedBlock:
        table = np.array([stripe.entry for stripe in encoded], dtype=STRIPE_DTYPE)
        return EncodedBlock(self.codec, self.stripe_bytes, table, stored_bytes, parts, intact)


class _Small:
    """A raw block of one short stripe: hashed by the thread that writes it, for handing it to another takes longer. The stripe is the
    block, and so is its checksum."""

    def __init__(self, entry: Entry, stripe_bytes: int) -> None:
        self._entry = entry
        self._stripe_bytes = stripe_bytes

    def finish(self) -> EncodedBlock:
        """See ``_Encoding.finish``."""
        entry = self._entry
        checksum = xxh3_64(*cut_spans(entry.spans, 0, entry.size_bytes))
        table = np.array([EncodedStripe((), entry.size_bytes, 0, Codec.RAW, 0, checksum).entry], dtype=STRIPE_DTYPE)
        intact = checksum == entry.raw_checksum
        return EncodedBlock(Codec.RAW, self._stripe_bytes, table, entry.size_bytes, list(entry.spans), intact)


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
    """Encodes batches of blocks on a pool of threads (the work runs outside the GIL). Its methods are called by one thread."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._memory = np.empty(KEPT_BYTES, dtype=np.uint8)
        self._used_bytes = 0

    def begin_batch(self) -> None:
        """What was encoded so far is done with (written, or copied to be): its memory is used again from here on."""
        self._used_bytes = 0

    def start(self, entry: Entry) -> _Encoding | _Small:
        """Begin to encode a block; ``finish`` of the answer waits for it."""
        namespace = entry.namespace
        codec = namespace.codec_choice.choose(entry)
        if codec is Codec.RAW and entry.size_bytes <= SMALL_BYTES_MAX:
            stripe_bytes = stripe_bytes_for(entry.size_bytes, namespace.stripe_bytes)
            if entry.size_bytes <= stripe_bytes:
                return _Small(entry, stripe_bytes)
        return _Encoding(entry, codec, namespace.stripe_bytes, self._pool, self._take)

    def _take(self, size_bytes: int) -> Bytes:
        """Memory until the next batch; what does not fit beside the rest of the batch gets its own."""
        start, stop = self._used_bytes, self._used_bytes + size_bytes
        if stop > self._memory.size:
            return np.empty(size_bytes, dtype=np.uint8)
        self._used_bytes = stop
        return self._memory[start:stop]
