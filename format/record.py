"""The header page of a record: what it holds, where it lies, how its payload is stored, and the checks that bind these."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .bytetable import Field, PageTable, magic
from .checksum import Buffer, xxh3_64
from .errors import CorruptRecord, UnsupportedFormat
from .layout import (
    BLOCK_BYTES_MAX,
    EPOCH_MAX,
    KEY_BYTES_MAX,
    META_BYTES_MAX,
    NAMESPACE_BYTES_MAX,
    PAGE_BYTES,
    SEGMENT_BYTES_MAX,
    STRIPES_MAX,
    ZERO_DIGEST,
    ChecksumId,
    Codec,
    RecordType,
    page_count,
)
from .stripe import NO_STRIPES, STRIPE_TABLE, Stripes, align_stripe, entry_fits, stripe_raw_bytes
from .stripe import STRIPE_DTYPE as STRIPE_DTYPE
from .stripe import stripe_offsets as stripe_offsets

FLAG_SKIPPABLE = 1
"""A reader that does not know the record's type may skip the record."""
ELEMENT_SIZES = (1, 2, 4, 8)

RECORD_TABLE = PageTable(
    title="record header",
    size_bytes=PAGE_BYTES,
    magic=magic("R"),
    checksum_name="header_checksum",
    fields=(
        Field(0, "u8[8]", "magic", "`89 4B 56 52 0D 0A 1A 0A`", "fixed"),
        Field(8, "u16", "version", "format version of this structure", "1"),
        Field(10, "u16", "header_bytes", "length of this structure; the payload follows", "4096"),
        Field(12, "u32", "record_pages", "pages of the whole record, this one included", "1 + pages of stored_length (+ 1 for a seal)"),
        Field(16, "u8", "type", "1 block, 2 tombstone, 3 namespace, 4 namespace drop, 5 seal", "1 to 5; others: part 6"),
        Field(17, "u8", "checksum_id", "1 XXH3-64; 2 is reserved for checksums computed on a device", "1"),
        Field(18, "u8", "codec", "what the writer chose: 0 raw, 1 zstd, 2 planes+zstd", "0 to 2"),
        Field(19, "u8", "element_size", "bytes of one element", "1, 2, 4, 8"),
        Field(20, "u16", "flags", "bit 0: a reader that does not know the type may skip the record", "0 or 1"),
        Field(22, "u16", "stripe_count", "entries in use in the stripe table", "0 to 128, see below"),
        Field(24, "u8[16]", "store_uuid", "the store", "as in the superblock"),
        Field(40, "u64", "segment_id", "the segment", "as in the segment header"),
        Field(48, "u64", "offset", "byte offset of this page in the file", "its own; multiple of 4096, >= 4096"),
        Field(56, "u64", "epoch", "epoch of the writer that laid the record", "1 to 2^24 - 1"),
        Field(64, "u64", "version_seq", "sequence number given at put or delete; kept by reinsertion", "any"),
        Field(72, "u64", "record_seq", "sequence number of this record's place in the log", "any"),
        Field(80, "u8[16]", "namespace", "digest of the namespace descriptor", "zero in a seal"),
        Field(96, "u8[16]", "tag", "digest of the tag; zero: none", "any"),
        Field(112, "u8[16]", "parent", "digest of the parent block's key; zero: none", "any"),
        Field(128, "u32", "depth", "position in the prefix chain, 0 for the first block", "any"),
        Field(132, "u32", "stripe_bytes", "raw bytes of each stripe but the last", "0 without stripes; else multiple of 4096, <= 2^30"),
        Field(136, "u64", "raw_length", "bytes of the payload before encoding", "see below"),
        Field(144, "u64", "stored_length", "bytes of the payload on disk, without the padding of its last page", "see below"),
        Field(152, "u64", "written_at_ns", "UTC, nanoseconds since 1970", "any"),
        Field(160, "u64", "expires_at_ns", "UTC, nanoseconds since 1970; 0: never", "any"),
        Field(168, "u64", "raw_checksum", "XXH3-64 of all raw bytes; 0 without payload", "any"),
        Field(176, "u64", "payload_checksum", "XXH3-64 over namespace, key, and the entries in use of the stripe table", "any"),
        Field(184, "zero[48]", "encryption", "reserved for key id, nonce and tag", "0"),
        Field(232, "u16", "meta_length", "bytes of user metadata", "0 to 512"),
        Field(234, "u8", "key_length", "bytes of the key", "1 to 255 for blocks and tombstones, else 0"),
        Field(235, "zero[5]", "reserved_0", "reserved", "0"),
        Field(240, "u64", "synced_bytes", "end of the part of this segment known durable when this header was laid", "<= offset"),
        Field(248, "u64", "header_checksum", "XXH3-64 over bytes 0 to 247 followed by 256 to 4095", "any"),
        Field(256, "u8[255]", "key", "the key, zero-padded", "zero after key_length"),
        Field(511, "zero[1]", "reserved_1", "reserved", "0"),
        Field(512, "u8[3072]", "stripes", "stripe table: 128 entries of 24 bytes", "zero after stripe_count"),
        Field(3584, "u8[512]", "meta", "user metadata, opaque, zero-padded", "zero after meta_length"),
    ),
)

_TYPES: dict[int, RecordType] = {int(kind): kind for kind in RecordType}
_CODECS: dict[int, Codec] = {int(codec): codec for codec in Codec}


@dataclass(slots=True, eq=False)
class RecordHeader:
    """The header page of a record as values; fields as in SPEC.md part 4. Never change one: it is not frozen only because
    every read makes one, and ``dataclasses`` takes four times as long to make a frozen one."""

    record_type: RecordType | int
    """An ``int`` only for an unknown type that may be skipped."""
    store_uuid: bytes
    segment_id: int
    offset: int
    epoch: int
    version_seq: int
    record_seq: int
    synced_bytes: int
    namespace: bytes
    key: bytes = b""
    tag: bytes = ZERO_DIGEST
    parent: bytes = ZERO_DIGEST
    depth: int = 0
    element_size: int = 1
    codec: Codec = Codec.RAW
    flags: int = 0
    stripe_bytes: int = 0
    raw_length: int = 0
    stored_length: int = 0
    written_at_ns: int = 0
    expires_at_ns: int = 0
    raw_checksum: int = 0
    meta: bytes = b""
    stripes: Stripes = field(default_factory=lambda: NO_STRIPES)

    @property
    def payload_checksum(self) -> int:
        """XXH3-64 over namespace, key and stripe table: what the index repeats to bind entry, header and stripes."""
        return xxh3_64(self.namespace + self.key + self.stripes.tobytes())

    @property
    def record_bytes(self) -> int:
        """Bytes of the whole record: header page, payload rounded up to pages, and the trailer page of a seal."""
        return PAGE_BYTES * self.record_pages

    @property
    def record_pages(self) -> int:
        trailer_pages = 1 if self.record_type is RecordType.SEAL else 0
        return 1 + page_count(self.stored_length) + trailer_pages

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RecordHeader):
            return NotImplemented
        names = [name for name in self.__slots__ if name != "stripes"]
        return all(getattr(self, name) == getattr(other, name) for name in names) and self.stripes.tobytes() == other.stripes.tobytes()

    def __hash__(self) -> int:
        return hash((self.store_uuid, self.segment_id, self.offset, self.record_seq))

    def placed(self, *, store_uuid: bytes, segment_id: int, epoch: int, offset: int, record_seq: int, synced_bytes: int) -> RecordHeader:
        """The same record at a place in the log; ``version_seq`` 0 becomes ``record_seq``."""
        # written out: ``dataclasses.replace`` takes five times as long, which is felt with small blocks
        return RecordHeader(
            self.record_type,
            store_uuid,
            segment_id,
            offset,
            epoch,
            self.version_seq or record_seq,
            record_seq,
            synced_bytes,
            self.namespace,
            self.key,
            self.tag,
            self.parent,
            self.depth,
            self.element_size,
            self.codec,
            self.flags,
            self.stripe_bytes,
            self.raw_length,
            self.stored_length,
            self.written_at_ns,
            self.expires_at_ns,
            self.raw_checksum,
            self.meta,
            self.stripes,
        )

    def pack_into(self, page: Buffer) -> None:
        """Fill a writable buffer of 4096 bytes."""
        values: dict[str, Any] = dict(zip(_SAME_NAME, _values_of(self), strict=True))
        values |= {
            "type": self.record_type,
            "record_pages": self.record_pages,
            "checksum_id": ChecksumId.XXH3_64,
            "stripe_count": len(self.stripes),
            "stripes": self.stripes.tobytes(),
            "payload_checksum": self.payload_checksum,
            "meta_length": len(self.meta),
            "key_length": len(self.key),
        }
        RECORD_TABLE.pack_page(page, values)

    @classmethod
    def parse(cls, page: Buffer, *, where: object = "") -> RecordHeader:
        """The header in a page of 4096 bytes, every length bounded.

        Raises ``CorruptRecord`` (``check`` names the test) and, for an intact header that this version cannot
        interpret, ``UnsupportedFormat``.
        """
        row = RECORD_TABLE.unpack_page(page, where=where)
        _check_fixed(row, where)
        kind = _TYPES.get(row.type, row.type)
        header = cls(
            record_type=kind,
            store_uuid=row.store_uuid,
            segment_id=row.segment_id,
            offset=row.offset,
            epoch=row.epoch,
            version_seq=row.version_seq,
            record_seq=row.record_seq,
            synced_bytes=row.synced_bytes,
            namespace=row.namespace,
            key=_cut_padded("key", row.key, row.key_length, KEY_BYTES_MAX, where),
            tag=row.tag,
            parent=row.parent,
            depth=row.depth,
            element_size=row.element_size,
            codec=_CODECS[row.codec],
            flags=row.flags,
            stripe_bytes=row.stripe_bytes,
            raw_length=row.raw_length,
            stored_length=row.stored_length,
            written_at_ns=row.written_at_ns,
            expires_at_ns=row.expires_at_ns,
            raw_checksum=row.raw_checksum,
            meta=_cut_padded("meta", row.meta, row.meta_length, META_BYTES_MAX, where),
            stripes=_cut_stripes(row.stripes, row.stripe_count, where),
        )
        if row.payload_checksum != header.payload_checksum:
            raise _corrupt("payload-checksum", where, f"{header.payload_checksum:016x}", f"{row.payload_checksum:016x}")
        if row.record_pages != header.record_pages:
            raise _corrupt("record-pages", where, header.record_pages, row.record_pages)
        _TYPE_CHECKS.get(kind, _check_unknown)(header, where)
        if header.stripes.size:
            _check_stripes(header, where)
        return header


_SAME_NAME = tuple(name for name in RecordHeader.__slots__ if name not in ("record_type", "stripes"))
_values_of = operator.attrgetter(*_SAME_NAME)


def check_place(header: RecordHeader, store_uuid: bytes, segment_id: int, offset: int, *, where: object = None) -> None:
    """Raise ``CorruptRecord`` unless the header belongs where it was read from: an image of another segment does not."""
    if header.store_uuid != store_uuid:
        raise _corrupt("store-uuid", where, store_uuid.hex(), header.store_uuid.hex())
    if header.segment_id != segment_id:
        raise _corrupt("segment-id", where, segment_id, header.segment_id)
    if header.offset != offset:
        raise _corrupt("own-offset", where, offset, header.offset)


def _corrupt(check: str, where: object, expected: object, actual: object) -> CorruptRecord:
    return CorruptRecord(check, where=where, expected=expected, actual=actual)


def _check_fixed(row: Any, where: object) -> None:
    """Ranges of the fields that mean the same in every type."""
    if row.checksum_id != ChecksumId.XXH3_64:
        raise UnsupportedFormat(
            "a record with an unknown checksum", where=where, expected=1, actual=row.checksum_id, action="Use a newer kvlode."
        )
    if row.codec not in _CODECS:
        raise UnsupportedFormat("a record with an unknown codec", where=where, actual=row.codec, action="Use a newer kvlode.")
    if row.element_size not in ELEMENT_SIZES:
        raise _corrupt("element-size", where, ELEMENT_SIZES, row.element_size)
    if row.flags & ~FLAG_SKIPPABLE:
        raise _corrupt("reserved", where, "no flag but bit 0", row.flags)
    if not 1 <= row.epoch <= EPOCH_MAX:
        raise _corrupt("epoch", where, f"1 to {EPOCH_MAX}", row.epoch)
    offset = row.offset
    if offset % PAGE_BYTES or not PAGE_BYTES <= offset < SEGMENT_BYTES_MAX:
        raise _corrupt("own-offset", where, "a multiple of 4096, 4096 to 2^40", offset)
    if row.synced_bytes > offset:
        raise _corrupt("synced-bytes", where, f"at most {offset}", row.synced_bytes)
    if offset + PAGE_BYTES * row.record_pages > SEGMENT_BYTES_MAX:
        raise _corrupt("record-pages", where, f"an end within {SEGMENT_BYTES_MAX}", row.record_pages)


def _cut_padded(name: str, area: bytes, length: int, size_max: int, where: object) -> bytes:
    """The used part of a zero-padded area."""
    if length > size_max:
        raise _corrupt(f"{name}-length", where, f"at most {size_max}", length)
    if area[length:] != bytes(len(area) - length):
        raise _corrupt("reserved", where, f"zeros behind the {name}", area[length:].hex()[:64])
    return area[:length]


def _cut_stripes(area: bytes, count: int, where: object) -> Stripes:
    if count > STRIPES_MAX:
        raise _corrupt("stripe-count", where, f"at most {STRIPES_MAX}", count)
    used = count * STRIPE_DTYPE.itemsize
    if area[used:] != bytes(len(area) - used):
        raise _corrupt("reserved", where, "zeros behind the stripe table", area[used:].hex()[:64])
    return np.frombuffer(area, dtype=STRIPE_DTYPE, count=count) if count else NO_STRIPES


def _check_geometry(header: RecordHeader, raw_length_max: int, where: object) -> None:
    """A payload in stripes: lengths within their limits and the right number of stripes."""
    raw, stripe_bytes = header.raw_length, header.stripe_bytes
    if not 1 <= raw <= raw_length_max:
        raise _corrupt("raw-length", where, f"1 to {raw_length_max}", raw)
    if stripe_bytes % PAGE_BYTES or not PAGE_BYTES <= stripe_bytes <= BLOCK_BYTES_MAX:
        raise _corrupt("stripe-bytes", where, "a multiple of 4096, 4096 to 2^30", stripe_bytes)
    count = -(-raw // stripe_bytes)
    if len(header.stripes) != count:
        raise _corrupt("stripe-count", where, count, len(header.stripes))


def _check_block(header: RecordHeader, where: object) -> None:
    if not header.key:
        raise _corrupt("key-length", where, "a key", 0)
    _check_geometry(header, BLOCK_BYTES_MAX, where)


def _check_namespace(header: RecordHeader, where: object) -> None:
    _check_no_key(header, where)
    _check_geometry(header, NAMESPACE_BYTES_MAX, where)
    if header.codec is not Codec.RAW or len(header.stripes) != 1:
        raise _corrupt("namespace-payload", where, "one raw stripe", (header.codec.name, len(header.stripes)))


def _check_tombstone(header: RecordHeader, where: object) -> None:
    if not header.key:
        raise _corrupt("key-length", where, "a key", 0)
    _check_no_payload(header, where)


def _check_drop(header: RecordHeader, where: object) -> None:
    _check_no_key(header, where)
    _check_no_payload(header, where)


def _check_seal(header: RecordHeader, where: object) -> None:
    _check_no_key(header, where)
    if header.namespace != ZERO_DIGEST:
        raise _corrupt("namespace", where, "zeros in a seal", header.namespace.hex())
    if len(header.stripes) or header.stripe_bytes or header.codec is not Codec.RAW:
        raise _corrupt("stripe-count", where, "no stripes in a seal", len(header.stripes))
    if header.raw_length != header.stored_length or not header.raw_length:
        raise _corrupt("stored-length", where, f"raw length {header.raw_length}", header.stored_length)


def _check_unknown(header: RecordHeader, where: object) -> None:
    if not header.flags & FLAG_SKIPPABLE:
        raise UnsupportedFormat(
            "a record of an unknown type",
            where=where,
            expected="types 1 to 5",
            actual=int(header.record_type),
            action="Use a newer kvlode.",
        )


def _check_no_key(header: RecordHeader, where: object) -> None:
    if header.key:
        raise _corrupt("key-length", where, 0, len(header.key))


def _check_no_payload(header: RecordHeader, where: object) -> None:
    lengths = (header.raw_length, header.stored_length, header.stripe_bytes, len(header.stripes), int(header.codec), header.raw_checksum)
    if any(lengths):
        raise _corrupt("stored-length", where, "no payload", lengths)


_TYPE_CHECKS = {
    RecordType.BLOCK: _check_block,
    RecordType.TOMBSTONE: _check_tombstone,
    RecordType.NAMESPACE: _check_namespace,
    RecordType.NAMESPACE_DROP: _check_drop,
    RecordType.SEAL: _check_seal,
}


def _check_stripes(header: RecordHeader, where: object) -> None:
    """Every stripe entry against its raw length; the lengths add up to the payload."""
    if header.record_type not in _TYPES or (header.codec is Codec.RAW and _stored_as_they_are(header)):
        return
    codec, end = int(header.codec), 0
    for index, entry in enumerate(header.stripes.tolist()):
        raw_bytes = stripe_raw_bytes(header.raw_length, header.stripe_bytes, index)
        if not entry_fits(entry, raw_bytes, codec, header.element_size):
            raise _corrupt("stripe-entry", where, f"lengths and codec that fit {raw_bytes} raw bytes", f"stripe {index}: {entry}")
        end = align_stripe(end) + entry[0]
    if end != header.stored_length:
        raise _corrupt("stored-length", where, end, header.stored_length)


def _stored_as_they_are(header: RecordHeader) -> bool:
    """Whether a raw record's stripes are all as they must be. What the loop over them would find, in a few steps: reads wait for it."""
    if header.stored_length != header.raw_length:
        return False
    if len(header.stripes) == 1:
        return bool(header.stripes.item(0)[:5] == (header.raw_length, *_AS_IT_IS))
    rows = header.stripes.view(np.uint8).reshape(len(header.stripes), STRIPE_DTYPE.itemsize)
    lengths = header.stripes["stored_length"].tolist()
    last_bytes = stripe_raw_bytes(header.raw_length, header.stripe_bytes, len(lengths) - 1)
    same = lengths[-1] == last_bytes and lengths.count(header.stripe_bytes) - (last_bytes == header.stripe_bytes) == len(lengths) - 1
    return same and not rows[:, _AFTER_LENGTH].any()


_AS_IT_IS = (0, int(Codec.RAW), 0, b"")
_AFTER_LENGTH = slice(STRIPE_TABLE.offsets["first_plane_length"], STRIPE_TABLE.offsets["checksum"])
