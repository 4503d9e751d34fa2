"""Encoding and decoding of one stripe, and the choice of a codec by sampling.

Stripes are independent: any number of threads may encode and decode at once. Compression, checksums and the copies
of large arrays run outside the GIL. Compression contexts and scratch planes belong to the calling thread.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import zstandard

from .checksum import Buffer, xxh3_64
from .errors import CorruptRecord
from .layout import STRIPE_ALIGNMENT_BYTES, Codec
from .planes import Bytes, merge, split
from .stripe import PLANE_FIRST_ZSTD, PLANE_REST_ZSTD, StripeEntry, align_stripe, entry_fits

SAVED_MIN_SHIFT = 4
"""Encoding must save at least 1/16 (2^-4) of a plane or stripe, or it stays raw: decoding is not free."""
FRAME_WINDOW_BYTES_MIN = 1024
"""Smallest window a zstd frame can declare."""

_SCRATCH_KEPT_BYTES_MAX = 8 << 20
_SAMPLE_SLICE_BYTES = 2048
_CHOICE_SLICE_BYTES = 64 << 10
_CHOICE_SLICES = 3
_PADDING = bytes(STRIPE_ALIGNMENT_BYTES)
_BLOCK_HEADER_BYTES = 3
_BLOCK_RLE, _BLOCK_RESERVED = 1, 3


@dataclass(frozen=True, slots=True)
class EncodedStripe:
    """A stripe as stored: ``parts`` one after the other (padding included) and the values of its stripe entry."""

    parts: Sequence[Buffer]
    stored_length: int
    first_plane_length: int
    codec: Codec
    plane_flags: int
    checksum: int

    @property
    def entry(self) -> StripeEntry:
        return (self.stored_length, self.first_plane_length, int(self.codec), self.plane_flags, b"", self.checksum)


class _Contexts(threading.local):
    """zstd contexts and scratch memory of one thread.

    The parameters make zstd nearly a pure entropy coder: on the byte planes of a KV cache higher levels are slower
    and compress less.
    """

    def __init__(self) -> None:
        parameters = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST,
            window_log=17,
            hash_log=6,
            min_match=7,
            target_length=0,
            write_content_size=1,
            write_checksum=0,
            write_dict_id=0,
        )
        self.compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self.decompressor = zstandard.ZstdDecompressor()
        self._scratch: dict[str, Bytes] = {}

    def scratch(self, name: str, size_bytes: int) -> Bytes:
        """Uninitialised memory that the next call with this name hands out again; a huge one is not kept."""
        kept = self._scratch.get(name)
        if kept is None or kept.size < size_bytes:
            kept = np.empty(size_bytes, dtype=np.uint8)
            if size_bytes <= _SCRATCH_KEPT_BYTES_MAX:
                self._scratch[name] = kept
        return kept[:size_bytes]


_contexts = _Contexts()


def encode_stripe(raw: Bytes, codec: Codec, element_size: int) -> EncodedStripe:
    """Encode one stripe (1-D contiguous ``uint8``); the answer's codec is weaker where ``codec`` would not save 1/16.

    The parts may refer to ``raw`` itself: they are good as long as the caller leaves it unchanged.
    """
    if codec is Codec.PLANES_ZSTD and element_size > 1 and raw.size and raw.size % element_size == 0:
        encoded = _encode_planes(raw, element_size)
    elif codec is not Codec.RAW:
        encoded = _encode_whole(raw)
    else:
        encoded = None
    return encoded if encoded is not None else EncodedStripe([raw], raw.size, 0, Codec.RAW, 0, xxh3_64(raw))


def _encode_whole(raw: Bytes) -> EncodedStripe | None:
    frame = _compressed(raw)
    return None if frame is None else EncodedStripe([frame], len(frame), 0, Codec.ZSTD, 0, xxh3_64(frame))


def _encode_planes(raw: Bytes, element_size: int) -> EncodedStripe | None:
    """Split and compress each plane that is worth it; ``None`` when nothing is saved."""
    count = raw.size // element_size
    first, rest = _contexts.scratch("first", count), np.empty(raw.size - count, dtype=np.uint8)
    split(raw, element_size, first, rest)
    first_frame = _compressed(first)
    rest_frame = _compressed(rest) if _promising(rest) else None
    if first_frame is None and rest_frame is None:
        return None
    first_stored: Buffer = first_frame if first_frame is not None else first.copy()
    rest_stored: Buffer = rest_frame if rest_frame is not None else rest
    gap = align_stripe(len(first_stored)) - len(first_stored)
    parts = [first_stored, _PADDING[:gap], rest_stored] if gap else [first_stored, rest_stored]
    stored_length = sum(len(part) for part in parts)
    if stored_length >= raw.size:  # a tiny stripe whose padding eats the saving
        return None
    flags = (PLANE_FIRST_ZSTD if first_frame is not None else 0) | (PLANE_REST_ZSTD if rest_frame is not None else 0)
    return EncodedStripe(parts, stored_length, len(first_stored), Codec.PLANES_ZSTD, flags, xxh3_64(*parts))


def _compressed(plain: Bytes) -> bytes | None:
    """The zstd frame of ``plain`` if it saves at least 1/16."""
    frame = _contexts.compressor.compress(plain.data)
    return frame if len(frame) <= plain.size - max(1, plain.size >> SAVED_MIN_SHIFT) else None


def _promising(plane: Bytes) -> bool:
    """Whether a small sample of a plane compresses at all: most mantissas do not, and finding out on the whole plane costs a third."""
    size, half = plane.size, plane.size // 2
    if size <= 4 * _SAMPLE_SLICE_BYTES:
        return True
    slices = (plane[:_SAMPLE_SLICE_BYTES], plane[half : half + _SAMPLE_SLICE_BYTES], plane[size - _SAMPLE_SLICE_BYTES :])
    return _compressed(np.concatenate(slices)) is not None


def decode_stripe(stored: Bytes, entry: np.void | StripeEntry, out: Bytes, element_size: int, *, where: object = None) -> None:
    """Check a stored stripe and decode it straight into ``out`` (1-D contiguous ``uint8`` of the stripe's raw length).

    ``entry`` is an element of a stripe table or its tuple. The checksum is compared first: a decoder never sees
    damaged bytes. Raises ``CorruptRecord``; ``out`` then holds nothing of use.
    """
    values = cast(StripeEntry, entry.item()) if isinstance(entry, np.void) else entry
    stored_length, first_length, codec, flags, _, checksum = values
    if stored.size != stored_length or not entry_fits(values, out.size, codec, element_size):
        raise CorruptRecord("stripe-entry", where=where, expected=f"an entry for {stored.size} stored, {out.size} raw bytes", actual=values)
    actual = xxh3_64(stored)
    if actual != checksum:
        raise CorruptRecord("stripe-checksum", where=where, expected=f"{checksum:016x}", actual=f"{actual:016x}")
    if codec == Codec.RAW:
        np.copyto(out, stored)
    elif codec == Codec.ZSTD:
        _decode_frame(stored, out, where)
    else:
        count = out.size // element_size
        first: Bytes = stored[:first_length]
        rest: Bytes = stored[align_stripe(first_length) :]
        if flags & PLANE_FIRST_ZSTD:
            first = _decode_frame(first, _contexts.scratch("first", count), where)
        if flags & PLANE_REST_ZSTD:
            rest = _decode_frame(rest, _contexts.scratch("rest", out.size - count), where)
        merge(first, rest, element_size, out)


def _decode_frame(frame: Bytes, out: Bytes, where: object) -> Bytes:
    """Decode one zstd frame that fills ``out`` exactly.

    Reading the stream into place is about twice as fast as ``decompress`` with its new memory and copy.
    """
    try:
        if not _is_one_frame(frame.data, out.size):
            raise CorruptRecord("stripe-frame", where=where, expected=f"one zstd frame of {out.size} bytes", actual="something else")
        with _contexts.decompressor.stream_reader(frame.data, read_size=frame.size) as reader:
            filled = reader.readinto(out)
            surplus = reader.read(1)
    except zstandard.ZstdError as error:
        raise CorruptRecord("stripe-frame", where=where, expected=f"a zstd frame of {out.size} bytes", actual=str(error)) from None
    if filled != out.size or surplus:
        raise CorruptRecord("stripe-frame", where=where, expected=f"{out.size} decoded bytes", actual=filled + len(surplus))
    return out


def _is_one_frame(frame: memoryview, content_bytes: int) -> bool:
    """Whether the bytes are exactly one standard frame that declares ``content_bytes``, no dictionary, and a bounded window.

    Walks the block headers, so that a second frame or other bytes behind the first are found before anything is decoded.
    """
    parameters = zstandard.get_frame_parameters(frame)
    window_bytes_max = max(content_bytes, FRAME_WINDOW_BYTES_MIN)
    if parameters.content_size != content_bytes or parameters.dict_id or parameters.window_size > window_bytes_max:
        return False
    position, last = zstandard.frame_header_size(frame), 0
    while not last:
        if position + _BLOCK_HEADER_BYTES > len(frame):
            return False
        header = int.from_bytes(frame[position : position + _BLOCK_HEADER_BYTES], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        if kind == _BLOCK_RESERVED:
            return False
        position += _BLOCK_HEADER_BYTES + (1 if kind == _BLOCK_RLE else size)
    return position + (4 if parameters.has_checksum else 0) == len(frame)


def choose_codec(sample: Bytes, element_size: int) -> Codec:
    """The codec that suits blocks like ``sample``: encodes a few slices of it; below 1/16 saved, raw."""
    slices = _choice_slices(sample)
    total = sum(part.size for part in slices)
    limit = total - (total >> SAVED_MIN_SHIFT)
    stored = {codec: sum(encode_stripe(part, codec, element_size).stored_length for part in slices) for codec in Codec}
    if total == 0 or min(stored.values()) > limit:
        return Codec.RAW
    margin = total >> SAVED_MIN_SHIFT  # planes are the faster ones: zstd on the whole must be clearly smaller
    return Codec.PLANES_ZSTD if element_size > 1 and stored[Codec.PLANES_ZSTD] <= stored[Codec.ZSTD] + margin else Codec.ZSTD


def _choice_slices(sample: Bytes) -> list[Bytes]:
    """Up to three slices from the start, middle and end, at offsets that keep elements whole."""
    if sample.size <= _CHOICE_SLICES * _CHOICE_SLICE_BYTES:
        return [sample]
    last = (sample.size - _CHOICE_SLICE_BYTES) // STRIPE_ALIGNMENT_BYTES
    starts = [last * index // (_CHOICE_SLICES - 1) * STRIPE_ALIGNMENT_BYTES for index in range(_CHOICE_SLICES)]
    return [sample[start : start + _CHOICE_SLICE_BYTES] for start in starts]
