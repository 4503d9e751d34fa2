"""Encoding and decoding of one stripe, and the choice of a codec by sampling.

Stripes are independent: any number of threads may encode and decode at once. Compression, checksums and the copies
of large arrays run outside the GIL. Scratch planes belong to the calling thread.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from .checksum import Buffer, xxh3_64
from .errors import CorruptRecord
from .frames import decode_frame, encode_frame
from .layout import STRIPE_ALIGNMENT_BYTES, Codec
from .planes import Bytes, merge, split_first, split_rest
from .stripe import PLANE_FIRST_ZSTD, PLANE_REST_ZSTD, StripeEntry, align_stripe, entry_fits

SAVED_MIN_SHIFT = 4
"""Encoding must save at least 1/16 (2^-4) of a plane or stripe, or it stays raw: decoding is not free."""

_SCRATCH_KEPT_BYTES_MAX = 8 << 20
_SAMPLE_SLICE_BYTES = 2048
_CHOICE_SLICE_BYTES = 64 << 10
_CHOICE_SLICES = 3


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


class _Scratch(threading.local):
    """Memory of one thread that every stripe uses anew."""

    def __init__(self) -> None:
        self._kept: dict[str, Bytes] = {}

    def take(self, name: str, size_bytes: int) -> Bytes:
        """Uninitialised memory that the next call with this name hands out again; a huge one is not kept."""
        kept = self._kept.get(name)
        if kept is None or kept.size < size_bytes:
            kept = np.empty(size_bytes, dtype=np.uint8)
            if size_bytes <= _SCRATCH_KEPT_BYTES_MAX:
                self._kept[name] = kept
        return kept[:size_bytes]


_scratch = _Scratch()


def encode_stripe(raw: Bytes, codec: Codec, element_size: int, out: Bytes | None = None) -> EncodedStripe:
    """Encode one stripe (1-D contiguous ``uint8``); the answer's codec is weaker where ``codec`` would not save 1/16.

    What is encoded lies in ``out``, memory of the caller's for ``encoded_bytes_max(raw.size)``; without it in memory of its own. What
    stays raw is ``raw`` itself: the parts are good as long as the caller leaves both unchanged.
    """
    encoded = None
    if codec is not Codec.RAW:
        splits = codec is Codec.PLANES_ZSTD and element_size > 1 and raw.size > 0 and raw.size % element_size == 0
        out = np.empty(encoded_bytes_max(raw.size), dtype=np.uint8) if out is None else out
        encoded = _encode_planes(raw, element_size, out) if splits else _encode_whole(raw, out)
    return encoded if encoded is not None else EncodedStripe([raw], raw.size, 0, Codec.RAW, 0, xxh3_64(raw))


def encoded_bytes_max(raw_bytes: int) -> int:
    """Memory that a stripe needs while it is encoded: planes that stay as they are, and the padding between them."""
    return raw_bytes + STRIPE_ALIGNMENT_BYTES


def _encode_whole(raw: Bytes, out: Bytes) -> EncodedStripe | None:
    stored_length = _compress(raw, out)
    if stored_length is None:
        return None
    stored = out[:stored_length]
    return EncodedStripe([stored], stored_length, 0, Codec.ZSTD, 0, xxh3_64(stored))


def _encode_planes(raw: Bytes, element_size: int, out: Bytes) -> EncodedStripe | None:
    """Split, and compress each plane that is worth it; ``None`` when nothing is saved.

    The other planes go straight to their place, which is known when plane 0 is compressed.
    """
    first = _scratch.take("first", raw.size // element_size)
    split_first(raw, element_size, first)
    first_length = _compress(first, out)
    first_flag = PLANE_FIRST_ZSTD
    if first_length is None:
        first_length, first_flag = first.size, 0
        out[:first_length] = first
    start = align_stripe(first_length)
    out[first_length:start] = 0
    rest = out[start : start + raw.size - first.size]
    split_rest(raw, element_size, rest)
    rest_length = _compress(rest, rest) if _promising(rest) else None
    rest_flag = PLANE_REST_ZSTD
    if rest_length is None:
        rest_length, rest_flag = rest.size, 0
    stored = out[: start + rest_length]
    if not first_flag | rest_flag or stored.size >= raw.size:  # or a tiny stripe whose padding eats the saving
        return None
    return EncodedStripe([stored], stored.size, first_length, Codec.PLANES_ZSTD, first_flag | rest_flag, xxh3_64(stored))


def _compress(plain: Bytes, out: Bytes) -> int | None:
    """Put the zstd frame of ``plain`` at the start of ``out`` (which may be the same memory) if it saves at least 1/16: its length."""
    frame = encode_frame(plain)
    if not _saves(len(frame), plain.size):
        return None
    out[: len(frame)] = np.frombuffer(frame, dtype=np.uint8)
    return len(frame)


def _saves(stored_bytes: int, plain_bytes: int) -> bool:
    return stored_bytes <= plain_bytes - max(1, plain_bytes >> SAVED_MIN_SHIFT)


def _promising(plane: Bytes) -> bool:
    """Whether a small sample of a plane compresses at all: most mantissas do not, and finding out on the whole plane costs a third."""
    size, half = plane.size, plane.size // 2
    if size <= 4 * _SAMPLE_SLICE_BYTES:
        return True
    slices = (plane[:_SAMPLE_SLICE_BYTES], plane[half : half + _SAMPLE_SLICE_BYTES], plane[size - _SAMPLE_SLICE_BYTES :])
    sample = np.concatenate(slices)
    return _saves(len(encode_frame(sample)), sample.size)


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
        np.copyto(out, decode_frame(stored, out.size, where=where))
    else:
        count = out.size // element_size
        first: Bytes = stored[:first_length]
        rest: Bytes = stored[align_stripe(first_length) :]
        if flags & PLANE_FIRST_ZSTD:
            first = decode_frame(first, count, where=where)
        if flags & PLANE_REST_ZSTD:
            rest = decode_frame(rest, out.size - count, where=where)
        merge(first, rest, element_size, out, _scratch.take("merged", out.size + 1))


def choose_codec(sample: Bytes, element_size: int) -> Codec:
    """The codec that suits blocks like ``sample``: encodes a few slices of it; below 1/16 saved, raw."""
    slices = [sample[start:stop] for start, stop in sampled_ranges(sample.size)]
    stored = {codec: sum(encode_stripe(part, codec, element_size).stored_length for part in slices) for codec in Codec}
    return suited_codec(stored, sum(part.size for part in slices), element_size)


def suited_codec(stored_bytes: Mapping[Codec, int], raw_bytes: int, element_size: int) -> Codec:
    """The codec that suits blocks of which each codec made so much of so many bytes."""
    margin = raw_bytes >> SAVED_MIN_SHIFT
    if raw_bytes == 0 or min(stored_bytes.values()) > raw_bytes - margin:
        return Codec.RAW
    # planes are the faster ones: zstd on the whole must be clearly smaller
    splits = element_size > 1 and stored_bytes[Codec.PLANES_ZSTD] <= stored_bytes[Codec.ZSTD] + margin
    return Codec.PLANES_ZSTD if splits else Codec.ZSTD


def sampled_ranges(size_bytes: int) -> list[tuple[int, int]]:
    """Where to look at so many bytes to choose a codec: start, middle and end, at offsets that keep elements whole; all of a few."""
    if size_bytes <= _CHOICE_SLICES * _CHOICE_SLICE_BYTES:
        return [(0, size_bytes)]
    last = (size_bytes - _CHOICE_SLICE_BYTES) // STRIPE_ALIGNMENT_BYTES
    starts = [last * index // (_CHOICE_SLICES - 1) * STRIPE_ALIGNMENT_BYTES for index in range(_CHOICE_SLICES)]
    return [(start, start + _CHOICE_SLICE_BYTES) for start in starts]
