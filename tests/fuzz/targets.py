"""The parsers to fuzz, by name. What may come out of one is a value that holds, or one of its documented errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fuzz import structures, values
from fuzz.oracle import Fields, integers, nothing, vectors
from kvlode.engine.index import IndexDamaged
from kvlode.engine.index_entry import ENTRY_BYTES
from kvlode.format.errors import CorruptRecord, InvalidConfig, InvalidKey, UnsupportedFormat
from kvlode.format.layout import PAGE_BYTES, Codec
from kvlode.format.record import RECORD_TABLE
from kvlode.format.seal import TRAILER_TABLE
from kvlode.format.segment import SEGMENT_TABLE
from kvlode.format.stripe import STRIPE_TABLE
from kvlode.format.superblock import SUPERBLOCK_TABLE
from make_vectors import floats

MEMORY_FREE_BYTES = 256 << 10
"""What any parser may allocate whatever its input: errors, small objects, the values of the second reader."""


@dataclass(frozen=True, slots=True)
class Target:
    """One parser."""

    name: str
    run: Callable[[bytes], str]
    """Parses the bytes, checks the answer, and returns a short name of what was found."""
    seeds: Callable[[], Iterable[bytes]]
    refusals: tuple[type[Exception], ...] = (CorruptRecord, UnsupportedFormat)
    """The errors that the parser is documented to raise. Anything else is a crash."""
    mend: Callable[[bytearray], None] = nothing
    """Computes the checksums of a mutated input anew, so that it gets behind them."""
    fields: Fields = ()
    input_bytes_max: int = PAGE_BYTES
    memory_factor: int = 6
    """Bytes that may be allocated for each byte of the input, besides ``MEMORY_FREE_BYTES``."""

    def memory_bytes_max(self, size_bytes: int) -> int:
        """Most that may be allocated at once for an input of this size."""
        return self.memory_factor * size_bytes + MEMORY_FREE_BYTES


def _page(name: str, run: Callable[[bytes], str], seeds: Callable[[], Iterable[bytes]], table: structures.PageTable) -> Target:
    return Target(name, run, seeds, mend=structures.mend_page(table), fields=integers(table))


def _codec(name: str, codec: Codec) -> Target:
    """Fields: the head of the input, then what stands where in a frame."""
    fields = [(0, 2), (2, 2), (4, 1), (5, 1), (10, 1), (11, 2), (13, 3), (16, 3)]
    return Target(name, values.run_codec(codec), values.codec_seeds(codec), fields=fields, memory_factor=12)


def _text(name: str, run: Callable[[bytes], str]) -> Target:
    return Target(name, run, lambda: TEXTS, refusals=(InvalidConfig,), input_bytes_max=8192)


TEXTS = [
    *(b"200GiB", b"64 MB", b"1", b"0.5TiB", b"0.1", b"5%", b"2/10", b"-1", b"", b"1e3", b"9007199254740993", "\u0663 GiB".encode()),
    *(b"0000000000000007.seg", b"7", b"0x1f", b"6b6579", b"6b 65", b"+f", b"f" * 511, b"_", b"1__0"),
    *(b"9" * 400 + b"GiB", b"9" * 5000, b"1/" + b"9" * 5000, b"9" * 400 + b"%"),
]
KEYS = [b"\x05key-1", bytes(range(200)) * 2, b"\0" + TEXTS[12]]
ENTRIES = [bytes([1]) + bytes(ENTRY_BYTES - 1), bytes([1]) * ENTRY_BYTES, b""]
NOTES = [bytes(range(24)), bytes(8), b""]
BLOCKS = [b"\0\0", b"\1\0" + b"words " * 99, b"\2\1" + floats("fuzz", 4096, 2), b"\2\3" + bytes(800)]
_FILE_BYTES_MAX = 24 * PAGE_BYTES

_ALL = (
    _page("superblock", structures.run_superblock, lambda: vectors("superblock"), SUPERBLOCK_TABLE),
    _page("segment-header", structures.run_segment_header, lambda: [data[:PAGE_BYTES] for data in vectors("segment")], SEGMENT_TABLE),
    _page("trailer", structures.run_trailer, lambda: [data[-PAGE_BYTES:] for data in structures.segment_seeds()], TRAILER_TABLE),
    Target(
        name="record-header",
        run=structures.run_record_header,
        seeds=structures.record_seeds,
        mend=structures.mend_record_header,
        fields=integers(RECORD_TABLE) + integers(STRIPE_TABLE, 512),
    ),
    Target(
        name="stripe-table",
        run=structures.run_stripe_table,
        seeds=structures.stripe_seeds,
        fields=[(0, 4), (4, 2), (6, 1), (7, 1), *integers(STRIPE_TABLE, 8), *integers(STRIPE_TABLE, 32)],
        memory_factor=12,
    ),
    Target(
        name="table-of-contents",
        run=structures.run_table_of_contents,
        seeds=structures.toc_seeds,
        fields=structures.toc_fields(),
        input_bytes_max=8192,
        memory_factor=60,
    ),
    Target(
        name="segment",
        run=structures.run_segment,
        seeds=structures.segment_seeds,
        mend=structures.mend_segment,
        fields=structures.segment_fields(),
        input_bytes_max=_FILE_BYTES_MAX,
    ),
    Target(
        name="walk",
        run=structures.run_walk,
        seeds=structures.segment_seeds,
        mend=structures.mend_segment,
        fields=structures.segment_fields(),
        input_bytes_max=_FILE_BYTES_MAX,
    ),
    Target("namespace", values.run_namespace, values.namespace_seeds, input_bytes_max=80 << 10, memory_factor=60),
    Target("keys", values.run_keys, lambda: KEYS, refusals=(InvalidKey,), input_bytes_max=1024, memory_factor=40),
    _text("size", values.run_size),
    _text("sample", values.run_sample),
    _text("identifiers", values.run_identifiers),
    Target("index-entry", values.run_index_entry, lambda: ENTRIES, refusals=(IndexDamaged,), input_bytes_max=512),
    Target("index-notes", values.run_index_notes, lambda: NOTES, refusals=(IndexDamaged,), input_bytes_max=64),
    _codec("codec-raw", Codec.RAW),
    _codec("codec-zstd", Codec.ZSTD),
    _codec("codec-planes", Codec.PLANES_ZSTD),
    Target("encode", values.run_encode, lambda: BLOCKS, input_bytes_max=16384, memory_factor=12),
)
TARGETS = {target.name: target for target in _ALL}
