"""From a block in memory to the payload of a record: what the encoder lays is what the format's decoder reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlode.engine.arena import Bytes
from kvlode.engine.encoder import KEPT_BYTES, EncodedBlock, Encoder
from kvlode.engine.entry import Entry, Kind
from kvlode.engine.namespaces import NamespaceState
from kvlode.format.checksum import xxh3_64
from kvlode.format.codec import decode_stripe
from kvlode.format.layout import Codec
from kvlode.format.stripe import stripe_offsets, stripe_raw_bytes
from kvlode.gds.threads import WorkerPool
from model import descriptor

KIB, MIB = 1 << 10, 1 << 20
STRIPE_BYTES = 256 * KIB


@pytest.fixture(scope="module")
def encoder() -> Iterator[Encoder]:
    pool = WorkerPool("test-encode", 2)
    yield Encoder(pool)
    assert pool.shutdown(30)


def bfloat16_bytes(size_bytes: int, seed: int = 1) -> Bytes:
    values = np.random.default_rng(seed).standard_normal(-(-size_bytes // 2), dtype=np.float32)
    return (values.view("<u4") >> 16).astype("<u2").view(np.uint8)[:size_bytes].copy()


def noise_bytes(size_bytes: int, seed: int = 1) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size_bytes, dtype=np.uint8)


def entry_of(raw: Bytes, codec: Codec | None, cuts: list[int] | None = None) -> Entry:
    """A block as the buffer hands it over; ``cuts`` are where its memory is torn apart."""
    entry = Entry(Kind.BLOCK, NamespaceState(descriptor(), codec), b"key")
    places = [0, *sorted(cuts or []), raw.size]
    entry.spans = tuple(raw[start:stop].copy() for start, stop in itertools.pairwise(places) if start < stop)
    entry.size_bytes = raw.size
    entry.raw_checksum = xxh3_64(raw)
    return entry


def decoded(block: EncodedBlock, raw_bytes: int, element_size: int = 2) -> bytes:
    payload = np.concatenate(block.parts)
    assert payload.size >= block.stored_bytes
    out = np.zeros(raw_bytes, dtype=np.uint8)
    for index, (stripe, offset) in enumerate(zip(block.stripes, stripe_offsets(block.stripes).tolist(), strict=True)):
        start = index * block.stripe_bytes
        stored = payload[offset : offset + int(stripe["stored_length"])]
        decode_stripe(stored, stripe, out[start : start + stripe_raw_bytes(raw_bytes, block.stripe_bytes, index)], element_size)
    return out.tobytes()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2, 4095, 4096, STRIPE_BYTES - 2, STRIPE_BYTES, STRIPE_BYTES + 2, 5 * STRIPE_BYTES + 4098]),
    st.sampled_from([None, *Codec]),
    st.sampled_from(["bf16", "noise", "half"]),
    st.lists(st.integers(0, 2 * MIB), max_size=3),
)
def test_every_block_comes_back(encoder: Encoder, size_bytes: int, codec: Codec | None, kind: str, cuts: list[int]) -> None:
    raw = noise_bytes(size_bytes) if kind == "noise" else bfloat16_bytes(size_bytes)
    if kind == "half":
        raw[: size_bytes // 2] = noise_bytes(size_bytes // 2)
    block = encoder.start(entry_of(raw, codec, [cut for cut in cuts if cut < size_bytes])).finish()
    assert block.intact
    assert decoded(block, size_bytes) == raw.tobytes()
    if block.codec is not Codec.RAW:
        assert block.stored_bytes <= size_bytes * 15 // 16
        assert block.stored_bytes == stripe_offsets(block.stripes)[-1] + block.stripes["stored_length"][-1]


def test_a_block_that_does_not_shrink_is_its_own_memory(encoder: Encoder) -> None:
    raw = noise_bytes(MIB)
    for codec in (None, *Codec):
        entry = entry_of(raw, codec, [300_000])
        block = encoder.start(entry).finish()
        assert block.codec is Codec.RAW and block.stored_bytes == MIB
        assert [part.ctypes.data for part in block.parts] == [span.ctypes.data for span in entry.spans]
        assert not block.stripes["codec"].any()


def test_stripes_that_do_not_shrink_stay_raw_among_those_that_do(encoder: Encoder) -> None:
    raw = bfloat16_bytes(4 * STRIPE_BYTES)
    raw[STRIPE_BYTES : 2 * STRIPE_BYTES] = noise_bytes(STRIPE_BYTES)
    block = encoder.start(entry_of(raw, Codec.PLANES_ZSTD)).finish()
    assert block.stripes["codec"].tolist() == [2, 0, 2, 2]
    assert decoded(block, raw.size) == raw.tobytes()


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("place", [0, 700_000, 5 * STRIPE_BYTES - 1])
@pytest.mark.parametrize("stripes", [5, 40])
def test_bytes_that_changed_since_they_were_put_are_noticed(encoder: Encoder, codec: Codec, place: int, stripes: int) -> None:
    entry = entry_of(bfloat16_bytes(stripes * STRIPE_BYTES), codec, [1000])
    span = entry.spans[0] if place < 1000 else entry.spans[1]
    span[place if place < 1000 else place - 1000] ^= 1
    assert not encoder.start(entry).finish().intact


def test_memory_of_a_batch_is_used_again_in_the_next(encoder: Encoder) -> None:
    raw = bfloat16_bytes(MIB)
    places: list[list[int]] = []
    for _ in range(2):
        encoder.begin_batch()
        blocks = [encoder.start(entry_of(raw, Codec.PLANES_ZSTD)).finish() for _ in range(3)]
        assert [decoded(block, raw.size) for block in blocks] == [raw.tobytes()] * 3, "blocks of one batch do not share memory"
        places.append([part.ctypes.data for block in blocks for part in block.parts if part.size > 16])
    assert places[0] == places[1] and len(set(places[0])) == 12


def test_a_batch_beyond_the_kept_memory_is_encoded_all_the_same(encoder: Encoder) -> None:
    raw = bfloat16_bytes(3 * MIB)
    encoder.begin_batch()
    started = [encoder.start(entry_of(raw, Codec.PLANES_ZSTD)) for _ in range(KEPT_BYTES // raw.size + 3)]
    assert all(decoded(encoding.finish(), raw.size) == raw.tobytes() for encoding in started)


def test_an_encoder_that_is_never_told_of_batches_keeps_what_it_gave(encoder: Encoder) -> None:
    raws = [bfloat16_bytes(3 * MIB, seed) for seed in range(KEPT_BYTES // (3 * MIB) + 3)]
    blocks = [encoder.start(entry_of(raw, Codec.PLANES_ZSTD)).finish() for raw in raws]
    assert all(decoded(block, raw.size) == raw.tobytes() for block, raw in zip(blocks, raws, strict=True))
