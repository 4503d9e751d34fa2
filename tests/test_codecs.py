"""The codecs: every stripe comes back as it went in, and a stripe that lies is refused without reading or writing outside its bounds."""

from __future__ import annotations

import struct
import threading
from typing import Any
from unittest import mock

import numpy as np
import pytest
import zstandard
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import make_vectors
import spec_reader
from kvlode.format import frames
from kvlode.format.checksum import xxh3_64
from kvlode.format.codec import EncodedStripe, choose_codec, decode_stripe, encode_stripe, encoded_bytes_max
from kvlode.format.errors import CorruptRecord
from kvlode.format.layout import Codec
from kvlode.format.planes import merge, split
from kvlode.format.record import ELEMENT_SIZES, RecordHeader
from kvlode.format.stripe import STRIPE_DTYPE, StripeEntry, align_stripe, entry_fits, stripe_offsets, stripe_raw_bytes

CANARY = 0xA5
GUARD_BYTES = 64
MEMORY_BYTES_MAX = 1 << 20
"""What a decoder may hold for the stripes of these tests: its own tables, one window, one block."""

# --- contents --------------------------------------------------------------------------------------------------------

SIZES = st.integers(0, 300) | st.sampled_from([4095, 4096, 4097, 8191, 8192, 12288, 16384, 70001, 131072, 262144]) | st.integers(0, 9000)


def bfloat16_values(size_bytes: int, seed: int) -> np.ndarray:
    """Bytes of normally distributed bf16 numbers, as a KV cache holds them; an odd last byte belongs to half a number."""
    values = np.random.default_rng(seed).standard_normal(-(-size_bytes // 2), dtype=np.float32)
    return (values.view("<u4") >> 16).astype("<u2").view(np.uint8)[:size_bytes]


def content(kind: str, size_bytes: int, seed: int) -> np.ndarray:
    """``size_bytes`` of one kind, always the same ones for the same arguments."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, size_bytes, dtype=np.uint8)
    if kind == "noise":
        return noise
    if kind == "constant":
        return np.full(size_bytes, seed & 255, dtype=np.uint8)
    if kind == "few values":
        return noise & 3
    if kind == "bf16":
        return bfloat16_values(size_bytes, seed)
    if kind == "text":
        return np.resize(np.frombuffer(b"the same words again, ", dtype=np.uint8), size_bytes).copy()
    noise[size_bytes // 3 :] = seed & 255
    return noise


KINDS = ("noise", "constant", "few values", "bf16", "text", "half noise")
CONTENTS = st.builds(content, st.sampled_from(KINDS), SIZES, st.integers(0, 1 << 32))
CODECS = st.sampled_from(list(Codec))
ELEMENTS = st.sampled_from(ELEMENT_SIZES)


def stored_bytes(stripe: EncodedStripe) -> bytes:
    return b"".join(bytes(part) for part in stripe.parts)


def decoded(stored: bytes, entry: StripeEntry, raw_bytes: int, element_size: int) -> bytes:
    """Decode between two guards, which must stay what they were, whether the stripe is accepted or not."""
    area = np.full(raw_bytes + 2 * GUARD_BYTES, CANARY, dtype=np.uint8)
    try:
        decode_stripe(np.frombuffer(stored, dtype=np.uint8), entry, area[GUARD_BYTES : GUARD_BYTES + raw_bytes], element_size)
    finally:
        assert (area[:GUARD_BYTES] == CANARY).all() and (area[GUARD_BYTES + raw_bytes :] == CANARY).all()
    return area[GUARD_BYTES : GUARD_BYTES + raw_bytes].tobytes()


def decoded_by_the_text(stored: bytes, entry: StripeEntry, raw_bytes: int, element_size: int) -> bytes | None:
    """What the second reader makes of a stripe by SPEC.md 4.4 alone; ``None`` when it refuses."""
    values: dict[str, Any] = {
        "type": spec_reader.BLOCK,
        "codec": entry[2],
        "element_size": element_size,
        "raw_length": raw_bytes,
        "stripe_bytes": max(raw_bytes, 1),
        "stored_length": len(stored),
        "stripes": [(*entry[:4], entry[4].ljust(6, b"\0"), entry[5])],
    }
    try:
        if entry[2] > spec_reader.PLANES:
            return None
        spec_reader.check_stripes(values)
        stored_parts = spec_reader.stored_stripes(values, stored)
        assert len(stored_parts) == 1
        return spec_reader.decode_stripe(element_size, stored_parts[0], entry, raw_bytes)
    except spec_reader.Damaged:
        return None


# --- round trips -----------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(CONTENTS, CODECS, ELEMENTS)
@example(np.zeros(0, dtype=np.uint8), Codec.PLANES_ZSTD, 2)
@example(np.zeros(0, dtype=np.uint8), Codec.ZSTD, 1)
@example(np.zeros(1, dtype=np.uint8), Codec.PLANES_ZSTD, 8)
def test_every_stripe_comes_back(raw: np.ndarray, codec: Codec, element_size: int) -> None:
    before = raw.tobytes()
    stripe = encode_stripe(raw, codec, element_size)
    stored = stored_bytes(stripe)
    assert raw.tobytes() == before, "encoding must not change its input"
    assert len(stored) == stripe.stored_length and xxh3_64(stored) == stripe.checksum
    assert entry_fits(stripe.entry, raw.size, int(codec), element_size), "a writer lays nothing that a reader would refuse"
    assert decoded(stored, stripe.entry, raw.size, element_size) == before
    if raw.size:
        assert decoded_by_the_text(stored, stripe.entry, raw.size, element_size) == before


@given(CONTENTS, CODECS, ELEMENTS)
def test_the_codec_of_a_stripe_is_the_wanted_one_or_a_weaker_one_and_saves_a_sixteenth_of_what_it_compresses(
    raw: np.ndarray, codec: Codec, element_size: int
) -> None:
    stripe = encode_stripe(raw, codec, element_size)
    whole = raw.size - max(1, raw.size >> 4)
    splits = codec is Codec.PLANES_ZSTD and element_size > 1 and raw.size > 0 and raw.size % element_size == 0
    if stripe.codec is Codec.RAW:
        assert stored_bytes(stripe) == raw.tobytes()
    elif stripe.codec is Codec.ZSTD:
        assert codec is not Codec.RAW and not splits and stripe.stored_length <= whole
    else:
        assert splits and stripe.stored_length < raw.size
        count = raw.size // element_size
        rest = stripe.stored_length - align_stripe(stripe.first_plane_length)
        sizes = [(stripe.first_plane_length, count, stripe.plane_flags & 1), (rest, raw.size - count, stripe.plane_flags >> 1 & 1)]
        for stored, plain, compressed in sizes:
            assert stored <= plain - max(1, plain >> 4) if compressed else stored == plain


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("element_size", ELEMENT_SIZES)
@pytest.mark.parametrize("size_bytes", [1, 7, 4096, 262144])
def test_noise_is_stored_raw_without_a_copy(codec: Codec, element_size: int, size_bytes: int) -> None:
    raw = content("noise", size_bytes, 1)
    stripe = encode_stripe(raw, codec, element_size)
    assert (stripe.codec, stripe.stored_length, stripe.first_plane_length, stripe.plane_flags) == (Codec.RAW, size_bytes, 0, 0)
    assert len(stripe.parts) == 1 and stripe.parts[0] is raw


def test_the_exponents_of_real_looking_values_compress_and_their_mantissas_stay_as_they_are() -> None:
    raw = bfloat16_values(1 << 16, 5)
    stripe = encode_stripe(raw, Codec.PLANES_ZSTD, 2)
    assert (stripe.codec, stripe.plane_flags) == (Codec.PLANES_ZSTD, 1)
    assert stripe.stored_length < 0.75 * raw.size
    assert stored_bytes(stripe).endswith(raw[::2].tobytes())


@pytest.mark.parametrize("start", [0, 8192, 16384 - 3000])
def test_mantissas_that_compress_at_their_start_middle_or_end_are_compressed(start: int) -> None:
    raw = bfloat16_values(2 * 16384, 6)
    mantissas = raw[::2]
    mantissas[start : start + 3000] = 0
    stripe = encode_stripe(raw, Codec.PLANES_ZSTD, 2)
    assert (stripe.codec, stripe.plane_flags) == (Codec.PLANES_ZSTD, 3)


def test_a_length_that_is_no_multiple_of_the_element_is_never_split() -> None:
    for element_size in (2, 4, 8):
        for surplus in range(1, element_size):
            stripe = encode_stripe(content("constant", 800 + surplus, 3), Codec.PLANES_ZSTD, element_size)
            assert stripe.codec is Codec.ZSTD


def test_threads_encode_and_decode_at_once_without_sharing_memory() -> None:
    stripes = [(content("bf16", 40000 + 2 * index, index), 2 if index % 2 else 4) for index in range(4)]
    failures: list[object] = []
    start = threading.Barrier(len(stripes))

    def work(raw: np.ndarray, element_size: int) -> None:
        start.wait()
        for _ in range(20):
            stripe = encode_stripe(raw, Codec.PLANES_ZSTD, element_size)
            if decoded(stored_bytes(stripe), stripe.entry, raw.size, element_size) != raw.tobytes():
                failures.append((raw.size, element_size))

    threads = [threading.Thread(target=work, args=arguments) for arguments in stripes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- the two coders of frames -------------------------------------------------------------------------------------------

CODERS = {"zstandard": frames._thorough_compressor()}
if frames._zstd is not None:
    CODERS["the zstd of Python"] = frames._sparse_compressor(frames._zstd)


@pytest.mark.parametrize("name", CODERS)
@settings(max_examples=100)
@given(raw=CONTENTS, codec=CODECS, element_size=ELEMENTS)
def test_stripes_of_either_coder_come_back(name: str, raw: np.ndarray, codec: Codec, element_size: int) -> None:
    with mock.patch.object(frames._contexts, "compress", CODERS[name]):
        stripe = encode_stripe(raw, codec, element_size)
    stored = stored_bytes(stripe)
    assert decoded(stored, stripe.entry, raw.size, element_size) == raw.tobytes()
    if raw.size:
        assert decoded_by_the_text(stored, stripe.entry, raw.size, element_size) == raw.tobytes()


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize("size_bytes", [1, 2000, 1 << 15, 1 << 17, (1 << 18) + 5])
def test_frames_declare_what_the_specification_asks_for(name: str, size_bytes: int) -> None:
    frame = CODERS[name](content("few values", size_bytes, 1).data)
    header = zstandard.get_frame_parameters(frame)
    assert (header.content_size, header.dict_id, header.has_checksum) == (size_bytes, 0, False)
    assert header.window_size <= max(size_bytes, frames.FRAME_WINDOW_BYTES_MIN)


@pytest.mark.parametrize("name", CODERS)
def test_either_coder_takes_exponents_text_and_runs_to_pieces(name: str) -> None:
    exponents = bfloat16_values(1 << 17, 3)[1::2].copy()
    assert len(CODERS[name](exponents.data)) < exponents.size / 2
    assert len(CODERS[name](content("text", 1 << 17, 1).data)) < 1 << 12
    assert len(CODERS[name](content("constant", 1 << 17, 1).data)) < 1 << 8


def test_what_is_encoded_lies_in_the_memory_that_was_given_for_it() -> None:
    for raw, codec, element_size in ONE_OF_EACH:
        area = np.full(encoded_bytes_max(raw.size) + GUARD_BYTES, CANARY, dtype=np.uint8)
        out = area[: encoded_bytes_max(raw.size)]
        stripe = encode_stripe(raw, codec, element_size, out)
        (part,) = stripe.parts
        assert np.shares_memory(part, raw if codec is Codec.RAW else out)
        assert (area[out.size :] == CANARY).all()
        assert decoded(stored_bytes(stripe), stripe.entry, raw.size, element_size) == raw.tobytes()


@settings(max_examples=100)
@given(CONTENTS, CODECS, ELEMENTS)
def test_encoding_stays_inside_the_memory_that_it_was_given(raw: np.ndarray, codec: Codec, element_size: int) -> None:
    area = np.full(encoded_bytes_max(raw.size) + 2 * GUARD_BYTES, CANARY, dtype=np.uint8)
    stripe = encode_stripe(raw, codec, element_size, area[GUARD_BYTES:-GUARD_BYTES])
    assert (area[:GUARD_BYTES] == CANARY).all() and (area[-GUARD_BYTES:] == CANARY).all()
    assert decoded(stored_bytes(stripe), stripe.entry, raw.size, element_size) == raw.tobytes()


# --- planes ----------------------------------------------------------------------------------------------------------


@given(st.sampled_from((2, 4, 8)), st.integers(0, 700), st.integers(0, 1 << 32), st.integers(0, 7))
def test_planes_hold_the_bytes_of_equal_significance_and_merge_undoes_split(
    element_size: int, count: int, seed: int, misalignment: int
) -> None:
    raw = content("noise", count * element_size, seed)
    first, rest = np.empty(count, dtype=np.uint8), np.empty(count * (element_size - 1), dtype=np.uint8)
    split(raw, element_size, first, rest)
    planes = [raw[element_size - 1 - index :: element_size].tobytes() for index in range(element_size)]
    assert first.tobytes() == planes[0] and rest.tobytes() == b"".join(planes[1:])
    out = np.full(count * element_size + 8, CANARY, dtype=np.uint8)
    merge(first, rest, element_size, out[misalignment : misalignment + raw.size])
    assert out[misalignment : misalignment + raw.size].tobytes() == raw.tobytes()
    assert (np.delete(out, np.s_[misalignment : misalignment + raw.size]) == CANARY).all()


# --- damaged and lying stripes -----------------------------------------------------------------------------------------

ONE_OF_EACH = [
    (content("noise", 777, 1), Codec.RAW, 1),
    (content("text", 900, 1), Codec.ZSTD, 1),
    (bfloat16_values(2048, 1), Codec.PLANES_ZSTD, 2),
    (content("few values", 2048, 1), Codec.PLANES_ZSTD, 4),
    (content("constant", 2048, 1), Codec.PLANES_ZSTD, 8),
]


@pytest.mark.parametrize(("raw", "codec", "element_size"), ONE_OF_EACH, ids=["raw", "zstd", "planes 2", "planes 4", "planes 8"])
def test_every_flipped_bit_of_a_stored_stripe_is_found(raw: np.ndarray, codec: Codec, element_size: int) -> None:
    stripe = encode_stripe(raw, codec, element_size)
    assert stripe.codec is codec
    stored = bytearray(stored_bytes(stripe))
    out = np.empty(raw.size, dtype=np.uint8)
    array = np.frombuffer(stored, dtype=np.uint8)
    found = 0
    for bit in range(8 * len(stored)):
        stored[bit // 8] ^= 1 << bit % 8
        try:
            decode_stripe(array, stripe.entry, out, element_size)
        except CorruptRecord as error:
            found += error.check == "stripe-checksum"
        stored[bit // 8] ^= 1 << bit % 8
    assert found == 8 * len(stored)


@pytest.mark.parametrize(("raw", "codec", "element_size"), ONE_OF_EACH, ids=["raw", "zstd", "planes 2", "planes 4", "planes 8"])
def test_a_stripe_of_another_length_is_refused(raw: np.ndarray, codec: Codec, element_size: int) -> None:
    stripe = encode_stripe(raw, codec, element_size)
    stored = stored_bytes(stripe)
    for other in (b"", stored[:-1], stored + b"\0"):
        with pytest.raises(CorruptRecord, match="stripe-entry"):
            decoded(other, stripe.entry, raw.size, element_size)
        lying = (len(other), *stripe.entry[1:5], xxh3_64(other))
        with pytest.raises(CorruptRecord, match="stripe-"):
            decoded(other, lying, raw.size, element_size)


@settings(max_examples=250)
@given(st.data())
def test_an_entry_that_lies_gives_what_the_specification_says_or_is_refused(data: st.DataObject) -> None:
    """Any fields, any stored bytes, a matching checksum: what is behind the checksum must hold by itself."""
    raw, codec, element_size = ONE_OF_EACH[data.draw(st.integers(0, len(ONE_OF_EACH) - 1))]
    stripe = encode_stripe(raw, codec, element_size)
    stored = bytearray(stored_bytes(stripe))
    for _ in range(data.draw(st.integers(0, 3))):
        stored[data.draw(st.integers(0, min(len(stored) - 1, 40)))] = data.draw(st.integers(0, 255))
    count = raw.size // element_size
    near = st.sampled_from([0, 1, count - 1, count, count + 1, len(stored), raw.size]) | st.integers(0, 2**32 - 1)
    entry: StripeEntry = (
        len(stored),
        data.draw(st.just(stripe.first_plane_length) | near),
        data.draw(st.just(int(stripe.codec)) | st.integers(0, 255)),
        data.draw(st.just(stripe.plane_flags) | st.integers(0, 255)),
        b"",
        xxh3_64(bytes(stored)),
    )
    raw_bytes = data.draw(st.just(raw.size) | st.integers(1, 2 * raw.size))
    element_size = data.draw(st.just(element_size) | ELEMENTS)
    expected = decoded_by_the_text(bytes(stored), entry, raw_bytes, element_size)
    try:
        found: bytes | None = decoded(bytes(stored), entry, raw_bytes, element_size)
    except CorruptRecord:
        found = None
    assert found == expected


def frame_header(content_bytes: int | None, window_log: int | None, dictionary_id: int = 0) -> bytes:
    """Magic and header of a zstd frame (RFC 8878, 3.1.1.1) with an 8-byte content size, or none."""
    single = window_log is None
    descriptor = (3 << 6 if content_bytes is not None else 0) | (1 << 5 if single else 0) | (3 if dictionary_id else 0)
    window = b"" if window_log is None else bytes([window_log - 10 << 3])
    dictionary = struct.pack("<I", dictionary_id) if dictionary_id else b""
    size = b"" if content_bytes is None else struct.pack("<Q", content_bytes)
    return struct.pack("<IB", 0xFD2FB528, descriptor) + window + dictionary + size


def block(kind: int, size: int, data: bytes, last: bool = True) -> bytes:
    return (last | kind << 1 | size << 3).to_bytes(3, "little") + data


RAW_BLOCK, RLE_BLOCK, RESERVED_BLOCK = 0, 1, 3
CONTENT_BYTES = 2000
RUN = block(RLE_BLOCK, CONTENT_BYTES, b"r")
SKIPPABLE = struct.pack("<II", 0x184D2A50, CONTENT_BYTES)

LYING_FRAMES: dict[str, bytes] = {
    "empty": b"",
    "no magic": b"\0" * 20,
    "cut in the header": frame_header(CONTENT_BYTES, None)[:8],
    "no block": frame_header(CONTENT_BYTES, None),
    "cut in a block header": frame_header(CONTENT_BYTES, None) + RUN[:2],
    "cut in a block": frame_header(CONTENT_BYTES, None) + RUN[:3],
    "no last block": frame_header(CONTENT_BYTES, None) + block(RLE_BLOCK, CONTENT_BYTES, b"r", last=False),
    "says more": frame_header(CONTENT_BYTES + 1, None) + RUN,
    "says less": frame_header(CONTENT_BYTES - 1, None) + RUN,
    "says 2^60 bytes": frame_header(1 << 60, None) + RUN,
    "says nothing": frame_header(None, 11) + RUN,
    "holds more": frame_header(CONTENT_BYTES, None) + block(RLE_BLOCK, CONTENT_BYTES + 1, b"r"),
    "holds less": frame_header(CONTENT_BYTES, None) + block(RLE_BLOCK, CONTENT_BYTES - 1, b"r"),
    "holds a bomb": frame_header(CONTENT_BYTES, None) + block(RLE_BLOCK, (1 << 17) - 1, b"r", last=False) * 400 + RUN,
    "a window of 1 GiB": frame_header(CONTENT_BYTES, 30) + RUN,
    "a window of 2^41": frame_header(CONTENT_BYTES, 41) + RUN,
    "a window of the next power of two": frame_header(CONTENT_BYTES, 11) + RUN,
    "a dictionary": frame_header(CONTENT_BYTES, None, dictionary_id=7) + RUN,
    "a reserved block": frame_header(CONTENT_BYTES, None) + block(RESERVED_BLOCK, 0, b""),
    "a byte behind it": frame_header(CONTENT_BYTES, None) + RUN + b"\0",
    "two frames": (frame_header(CONTENT_BYTES, None) + RUN) * 2,
    "a skippable frame behind it": frame_header(CONTENT_BYTES, None) + RUN + struct.pack("<II", 0x184D2A50, 0),
    "a skippable frame before it": struct.pack("<II", 0x184D2A50, 0) + frame_header(CONTENT_BYTES, None) + RUN,
    "a skippable frame that looks like blocks": SKIPPABLE + block(RAW_BLOCK, 0, b"", last=False) * 300 + block(RAW_BLOCK, 0, b""),
    "a wrong content checksum": bytes([*frame_header(CONTENT_BYTES, None)[:4], frame_header(CONTENT_BYTES, None)[4] | 4])
    + frame_header(CONTENT_BYTES, None)[5:]
    + RUN
    + b"\0\0\0\0",
}


@pytest.mark.parametrize("name", LYING_FRAMES)
def test_a_frame_that_is_not_exactly_one_with_the_right_content_is_refused_before_memory_is_spent_on_it(name: str) -> None:
    frame = LYING_FRAMES[name]
    entry: StripeEntry = (len(frame), 0, int(Codec.ZSTD), 0, b"", xxh3_64(frame))
    with pytest.raises(CorruptRecord):
        decoded(frame, entry, CONTENT_BYTES, 1)
    assert frames._contexts.decompressor.memory_size() < MEMORY_BYTES_MAX
    assert decoded_by_the_text(frame, entry, CONTENT_BYTES, 1) is None, "the second reader accepts what kvlode refuses"


def with_checksum(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=True, write_checksum=True).compress(raw)


@pytest.mark.parametrize(
    "frame",
    [frame_header(CONTENT_BYTES, None) + RUN, frame_header(CONTENT_BYTES, 10) + RUN[:3] + b"r", with_checksum(b"r" * CONTENT_BYTES)],
    ids=["single segment", "smallest window", "content checksum"],
)
def test_other_spellings_of_a_whole_frame_are_read(frame: bytes) -> None:
    assert zstandard.get_frame_parameters(frame).window_size <= CONTENT_BYTES
    entry: StripeEntry = (len(frame), 0, int(Codec.ZSTD), 0, b"", xxh3_64(frame))
    assert decoded(frame, entry, CONTENT_BYTES, 1) == b"r" * CONTENT_BYTES


def test_a_lying_plane_does_not_spoil_the_next_stripe() -> None:
    raw, _, element_size = ONE_OF_EACH[2]
    stripe = encode_stripe(raw, Codec.PLANES_ZSTD, element_size)
    stored = bytearray(stored_bytes(stripe))
    stored[stripe.first_plane_length - 3] ^= 0xFF
    entry = (*stripe.entry[:5], xxh3_64(bytes(stored)))
    outcome: bytes | None = None
    try:
        outcome = decoded(bytes(stored), entry, raw.size, element_size)
    except CorruptRecord:
        assert outcome is None
    assert outcome != raw.tobytes()
    assert decoded(stored_bytes(stripe), stripe.entry, raw.size, element_size) == raw.tobytes()


# --- where stripes lie -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 2**31), min_size=1, max_size=128))
def test_a_stripe_starts_at_the_next_multiple_of_16_behind_the_one_before(lengths: list[int]) -> None:
    stripes = np.zeros(len(lengths), dtype=STRIPE_DTYPE)
    stripes["stored_length"] = lengths
    expected, position = [], 0
    for length in lengths:
        position += -position % 16
        expected.append(position)
        position += length
    assert stripe_offsets(stripes).tolist() == expected


@given(st.integers(1, 1 << 22), st.integers(1, 64))
def test_stripes_cover_the_raw_bytes_without_gap_or_overlap(raw_length: int, stripe_pages: int) -> None:
    stripe_bytes = 4096 * stripe_pages
    count = -(-raw_length // stripe_bytes)
    sizes = [stripe_raw_bytes(raw_length, stripe_bytes, index) for index in range(count)]
    assert sum(sizes) == raw_length and set(sizes[:-1]) <= {stripe_bytes} and 1 <= sizes[-1] <= stripe_bytes


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(KINDS), CODECS), min_size=1, max_size=5), ELEMENTS, st.integers(1, 4096))
def test_a_record_of_many_stripes_comes_back_in_both_readers(parts: list[tuple[str, Codec]], element_size: int, last_bytes: int) -> None:
    sizes = [4096] * (len(parts) - 1) + [last_bytes]
    raw = b"".join(content(kind, size, index).tobytes() for index, ((kind, _), size) in enumerate(zip(parts, sizes, strict=True)))
    record = make_vectors.block(8192, 1, raw, [codec for _, codec in parts], element_size)
    header = RecordHeader.parse(record[:4096])
    assert make_vectors.raw_bytes(lambda offset, length: record[offset - 8192 :][:length], header) == raw
    place = {"store_uuid": make_vectors.STORE_UUID.hex(), "segment_id": make_vectors.SEGMENT_ID, "offset": 8192}
    assert spec_reader.decode_record(spec_reader.read_header(record[:4096], place, 8192), record[4096:]) == raw


def test_a_block_of_raw_stripes_lies_in_one_piece_behind_its_header_page() -> None:
    raw = make_vectors.noise("raw", 3 * 4096 + 17)
    record = make_vectors.block(8192, 1, raw, Codec.RAW, 2)
    assert record[4096 : 4096 + len(raw)] == raw and len(record) == 5 * 4096


# --- the choice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "element_size", "expected"),
    [
        ("noise", 2, Codec.RAW),
        ("noise", 1, Codec.RAW),
        ("bf16", 2, Codec.PLANES_ZSTD),
        ("text", 1, Codec.ZSTD),
        ("constant", 1, Codec.ZSTD),
        ("constant", 2, Codec.PLANES_ZSTD),
    ],
)
@pytest.mark.parametrize("size_bytes", [20000, 1 << 20])
def test_the_codec_suits_the_block(kind: str, element_size: int, expected: Codec, size_bytes: int) -> None:
    assert choose_codec(content(kind, size_bytes, 7), element_size) is expected


def test_nothing_needs_no_codec() -> None:
    assert choose_codec(np.zeros(0, dtype=np.uint8), 2) is Codec.RAW


@settings(max_examples=60)
@given(CONTENTS, ELEMENTS)
def test_a_chosen_codec_saves_a_sixteenth_of_a_small_block(raw: np.ndarray, element_size: int) -> None:
    chosen = choose_codec(raw, element_size)
    assume(raw.size <= 3 * (64 << 10))  # the whole block is the sample
    stored = {codec: encode_stripe(raw, codec, element_size).stored_length for codec in Codec}
    limit = raw.size - (raw.size >> 4)
    if chosen is Codec.RAW:
        assert min(stored.values()) > limit or not raw.size
    else:
        assert stored[chosen] <= limit and stored[chosen] <= min(stored.values()) + (raw.size >> 4)
    assert chosen is not Codec.PLANES_ZSTD or element_size > 1


def test_the_choice_looks_at_the_start_the_middle_and_the_end_of_a_large_block() -> None:
    size_bytes = 4 << 20
    noise = content("noise", size_bytes, 9)
    places = [0, size_bytes // 2 - (32 << 10), size_bytes - (64 << 10)]
    for place in places:
        sample = noise.copy()
        sample[place : place + (64 << 10)] = 0
        assert choose_codec(sample, 1) is Codec.ZSTD, place
    sample = noise.copy()
    sample[200 << 10 : 1 << 20] = 0
    assert choose_codec(sample, 1) is Codec.RAW
