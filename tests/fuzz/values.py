"""Namespaces, keys, what users type, index entries, and stripes of every codec."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np

import make_vectors
import spec_reader
from fuzz.oracle import both, same
from kvlode.engine.catalog import META_PREFIX, Catalog
from kvlode.engine.config import parse_bytes
from kvlode.engine.index import IndexDamaged
from kvlode.engine.index_entry import IndexEntry, expires_and_version
from kvlode.engine.index_memory import MemoryIndex
from kvlode.engine.stats import Counters
from kvlode.format.checksum import xxh3_64
from kvlode.format.codec import choose_codec, decode_stripe, encode_stripe
from kvlode.format.errors import CorruptRecord, InvalidConfig
from kvlode.format.keys import check_key, check_meta, key_digest, prefix_keys, tag_digest
from kvlode.format.layout import Codec, parse_segment_name, segment_name
from kvlode.format.namespace import Namespace
from kvlode.format.planes import merge, split
from kvlode.format.stripe import StripeEntry
from kvlode.tools.fsck.options import Sample
from kvlode.tools.inspect.command import parse_key, parse_segment_id

# --- namespaces, keys, text --------------------------------------------------------------------------------------------------


def run_namespace(data: bytes) -> str:
    value = Namespace.parse(data)
    same(value.canonical_json(), data, "canonical JSON")
    same(Namespace.parse(value.canonical_json()).digest, value.digest, "digest")
    return f"element of {value.element_size}"


def namespace_seeds() -> list[bytes]:
    plain = make_vectors.NAMESPACE.canonical_json()
    changes = [(b'"group":0', b'"group":4294967296'), (b'"lora":""', b'"\xc3\xa4":"\\u0001\\""'), (b"bfloat16", b"float64")]
    changes += [(b'"layer_bytes":4096', b'"layer_bytes":null'), (b'"group":0', b'"group":0,"hue":1'), (b":0", b":" + b"[" * 600)]
    return [plain, *(plain.replace(old, new) for old, new in changes), b"[]", b"{}", b'{"a":NaN}', b'"\\ud800"', b"1" * 4400, b" " * 65537]


def run_keys(data: bytes) -> str:
    """Keys and digests of arbitrary bytes, and prefix keys of bytes read as tokens."""
    key, rest = data[: data[0]] if data else b"", data[1:]
    tokens = np.frombuffer(rest[: len(rest) // 8 * 8], dtype="<u8")
    block_tokens = 1 + len(key) % 5
    keys = prefix_keys(tokens, block_tokens, key)
    same(keys, spec_reader.prefix_keys(tokens.tolist(), block_tokens, key), "prefix keys")
    same((len(key_digest(key)), len(tag_digest(key))), (16, 16), "digests")
    name = parse_segment_name(rest[:24].decode("latin-1"))
    if name is not None:
        same(segment_name(name).encode(), rest[:24], "segment name")
    check_meta(rest)
    check_key(key)
    return "a key"


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def run_size(data: bytes) -> str:
    text = text_of(data)
    size = parse_bytes(text)
    if not 0 < size < 1 << 80:
        raise AssertionError(f"{text!r} is {size} bytes")
    same(parse_bytes(str(size)), size, "the plain number")
    return "a size"


def run_sample(data: bytes) -> str:
    sample = Sample.parse(text_of(data))
    given = [sample.percent is not None, sample.share is not None, sample.size_bytes is not None]
    same(sum(given), 1, "one of three")
    chosen = sample.choose([(id_, 1 << 20) for id_ in range(20)], 1)
    if not chosen <= set(range(20)):
        raise AssertionError("segments that do not exist")
    return ("percent", "share", "size")[given.index(True)]


def run_identifiers(data: bytes) -> str:
    """What a user types to name a segment or a key."""
    text, outcomes = text_of(data), []
    for parse in (parse_segment_id, parse_key):
        try:
            parse(text)
            outcomes.append(parse.__name__)
        except InvalidConfig:
            continue
    return " ".join(outcomes) or "neither"


def run_index_entry(data: bytes) -> str:
    entry = IndexEntry.unpack(data)
    same(entry.pack(), data, "index entry packed again")
    same(expires_and_version(data), (entry.expires_at_ns, entry.version_seq), "the two fields read alone")
    return "an entry"


def run_index_notes(data: bytes) -> str:
    """The store's own entries in the index: the bytes as its checkpoint, and as the floor of a dropped namespace."""
    catalog = Catalog(MemoryIndex(dict.fromkeys((META_PREFIX + b"checkpoint", META_PREFIX + b"floor/" + bytes(16)), data)), Counters())
    try:
        checkpoint = catalog.checkpoint()
        assert checkpoint is not None
        same(Catalog.checkpoint_change(checkpoint)[1], data, "checkpoint packed again")
        return "a checkpoint"
    except IndexDamaged:
        catalog.load_floors()
        (floor,) = catalog.floors.values()
        same(Catalog.floor_change(bytes(16), floor)[1], data, "floor packed again")
        return "a floor"


# --- codecs ------------------------------------------------------------------------------------------------------------------

CODEC_HEAD = struct.Struct("<HHBB")
"""Input: raw bytes, first_plane_length, plane_flags, element size; then the stripe as stored."""
GUARD = 64


def run_codec(codec: Codec) -> Callable[[bytes], str]:
    """Decode arbitrary stored bytes under an entry with their checksum."""

    def run(data: bytes) -> str:
        if len(data) < CODEC_HEAD.size:
            raise CorruptRecord("length")
        raw_bytes, first, flags, element = CODEC_HEAD.unpack_from(data)
        stored = data[CODEC_HEAD.size :]
        element = (1, 2, 4, 8)[element & 3]
        entry: StripeEntry = (len(stored), first, int(codec), flags, b"", xxh3_64(stored))
        area = np.full(raw_bytes + 2 * GUARD, 0xA5, dtype=np.uint8)
        out = area[GUARD : GUARD + raw_bytes]

        def found() -> bytes:
            decode_stripe(np.frombuffer(stored, dtype=np.uint8), entry, out, element)
            return out.tobytes()

        try:
            if raw_bytes:
                both(found, lambda: text_decoded(stored, entry, raw_bytes, element), "stripe")
            else:
                found()
        finally:
            if (area[:GUARD] != 0xA5).any() or (area[GUARD + raw_bytes :] != 0xA5).any():
                raise AssertionError("bytes beside the destination were written")
        return f"decoded, flags {flags}" if codec is Codec.PLANES_ZSTD else "decoded"

    return run


def text_decoded(stored: bytes, entry: StripeEntry, raw_bytes: int, element: int) -> bytes:
    record = {"type": spec_reader.BLOCK, "codec": entry[2], "element_size": element, "raw_length": raw_bytes, "stripe_bytes": raw_bytes}
    stripes = [(*entry[:4], bytes(6), entry[5])]
    spec_reader.check_stripes(record | {"stored_length": len(stored), "stripes": stripes})
    return spec_reader.decode_stripe(element, stored, entry, raw_bytes)


def codec_seeds(codec: Codec) -> Callable[[], list[bytes]]:
    def seeds() -> list[bytes]:
        made = []
        for element, index in ((1, 0), (2, 1), (4, 2), (8, 3)):
            for raw in (make_vectors.floats(f"fuzz {element}", 2048, element), b"words " * 200, bytes(1024), bytes([1, 2, 3]) * 8):
                array = np.frombuffer(raw[: len(raw) // 8 * 8], dtype=np.uint8)
                stripe = encode_stripe(array, codec, element)
                if stripe.codec is codec:
                    head = CODEC_HEAD.pack(array.size, stripe.first_plane_length, stripe.plane_flags, index)
                    made.append(head + b"".join(bytes(part) for part in stripe.parts))
        return made

    return seeds


def run_encode(data: bytes) -> str:
    """Any bytes are a block: encoded, split and chosen for, they come back."""
    codec, element = list(Codec)[data[0] % 3] if data else Codec.RAW, (1, 2, 4, 8)[data[1] & 3] if len(data) > 1 else 1
    raw = np.frombuffer(data[2:], dtype=np.uint8)
    stripe = encode_stripe(raw, codec, element)
    out = np.empty(raw.size, dtype=np.uint8)
    decode_stripe(np.frombuffer(b"".join(bytes(part) for part in stripe.parts), dtype=np.uint8), stripe.entry, out, element)
    same(out.tobytes(), raw.tobytes(), "round trip")
    if element > 1 and raw.size % element == 0:
        count = raw.size // element
        first, rest = np.empty(count, dtype=np.uint8), np.empty(raw.size - count, dtype=np.uint8)
        split(raw, element, first, rest)
        merge(first, rest, element, out)
        same(out.tobytes(), raw.tobytes(), "split and merge")
    return f"{choose_codec(raw, element).name} {stripe.codec.name}"
