"""Writes the test vectors of SPEC.md part 13 (``python tests/make_vectors.py``) and describes bytes the way they do.

A vector is a folder of ``tests/vectors`` with ``data.bin`` and ``expected.json``. The bytes depend on nothing but this
file, the code of ``kvlode.format`` and, where zstd frames are in them, the version of libzstd that MANIFEST.json names.
``describe`` reads the bytes with kvlode; ``spec_reader.py`` does the same without it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import zstandard

from kvlode.format import frames
from kvlode.format.checksum import xxh3_64
from kvlode.format.codec import decode_stripe, encode_stripe
from kvlode.format.errors import CorruptRecord, FormatError, UnsupportedFormat
from kvlode.format.keys import key_digest, prefix_keys, tag_digest
from kvlode.format.layout import PAGE_BYTES, Codec, RecordType
from kvlode.format.namespace import Namespace
from kvlode.format.record import RECORD_TABLE, STRIPE_DTYPE, RecordHeader, stripe_offsets
from kvlode.format.seal import SealBuilder, SealTable, Trailer
from kvlode.format.segment import SegmentHeader
from kvlode.format.stripe import stripe_raw_bytes
from kvlode.format.superblock import SUPERBLOCK_TABLE, Superblock
from kvlode.format.walk import Read, find_seal, parse_placed, scan_unsealed

FOLDER = Path(__file__).resolve().parent / "vectors"
STORE_UUID = bytes.fromhex("6b766c6f64652d766563746f72732121")
SEGMENT_ID = 7
EPOCH = 3
CREATED_AT_NS = 1_800_000_000_000_000_000
STRIPE_BYTES = 4096

NAMESPACE = Namespace(
    model="example/model-1",
    revision="0123abc",
    dtype="bfloat16",
    layout="layer,kv,token,head,dim",
    tokens_per_block=16,
    block_bytes_max=65536,
    layer_bytes=4096,
    tp_rank=1,
    tp_size=2,
    extra={"rope": "θ=10000", "lora": ""},
)


def noise(name: str, size_bytes: int) -> bytes:
    """Bytes that look random and never change."""
    return hashlib.shake_128(name.encode()).digest(size_bytes)


def floats(name: str, size_bytes: int, element_size: int) -> bytes:
    """Elements whose most significant byte takes few values, as those of real caches do."""
    raw = np.frombuffer(noise(name, size_bytes), dtype=np.uint8).copy()
    raw[element_size - 1 :: element_size] = 0x3C + (raw[element_size - 1 :: element_size] & 3)
    return raw.tobytes()


# --- making bytes -----------------------------------------------------------------------------------------------------


def seq(counter: int) -> int:
    return EPOCH << 40 | counter


def header_of(kind: RecordType, offset: int, counter: int, **fields: Any) -> RecordHeader:
    base: dict[str, Any] = {
        "store_uuid": STORE_UUID,
        "segment_id": SEGMENT_ID,
        "epoch": EPOCH,
        "version_seq": seq(counter),
        "record_seq": seq(counter),
        "synced_bytes": 0,
        "namespace": NAMESPACE.digest,
        "written_at_ns": CREATED_AT_NS + counter * 10**9,
    }
    return RecordHeader(record_type=kind, offset=offset, **(base | fields))


def laid(header: RecordHeader, payload: bytes = b"") -> bytes:
    """Header page, payload, padding."""
    page = bytearray(PAGE_BYTES)
    header.pack_into(page)
    record = bytes(page) + payload
    return record.ljust(header.record_bytes, b"\0")


def encoded(raw: bytes, codecs: Codec | list[Codec], element_size: int) -> tuple[dict[str, Any], bytes]:
    """Header fields and payload of raw bytes in stripes of 4096; ``codecs`` may name the codec of each stripe."""
    array = np.frombuffer(raw, dtype=np.uint8)
    count = -(-len(raw) // STRIPE_BYTES)
    chosen = codecs if isinstance(codecs, list) else [codecs] * count
    stripes = np.zeros(count, dtype=STRIPE_DTYPE)
    payload = b""
    for index in range(count):
        with mock.patch.object(frames._contexts, "compress", frames._thorough_compressor()):  # of the library that MANIFEST.json names
            stripe = encode_stripe(array[index * STRIPE_BYTES : (index + 1) * STRIPE_BYTES], chosen[index], element_size)
        payload += bytes(-len(payload) % 16) + b"".join(bytes(part) for part in stripe.parts)
        stripes[index] = stripe.entry
    fields = {
        "element_size": element_size,
        "codec": max(chosen),
        "stripe_bytes": STRIPE_BYTES,
        "raw_length": len(raw),
        "stored_length": len(payload),
        "raw_checksum": xxh3_64(raw),
        "stripes": stripes,
    }
    return fields, payload


def block(offset: int, counter: int, raw: bytes, codecs: Codec | list[Codec], element_size: int, **fields: Any) -> bytes:
    stored, payload = encoded(raw, codecs, element_size)
    return laid(header_of(RecordType.BLOCK, offset, counter, **({"key": noise(f"key {counter}", 32)} | stored | fields)), payload)


def namespace_record(offset: int, counter: int, **fields: Any) -> bytes:
    stored, payload = encoded(NAMESPACE.canonical_json(), Codec.RAW, 1)
    return laid(header_of(RecordType.NAMESPACE, offset, counter, **(stored | fields)), payload)


def patched(data: bytes, offset: int, replacement: bytes) -> bytes:
    """The same bytes with some of them replaced."""
    assert offset + len(replacement) <= len(data)
    return data[:offset] + replacement + data[offset + len(replacement) :]


def flipped(data: bytes, offset: int, bit: int = 0) -> bytes:
    return patched(data, offset, bytes([data[offset] ^ 1 << bit]))


def resealed(page: bytes, offset: int, replacement: bytes) -> bytes:
    """A record page with a field replaced and a correct checksum: what a newer writer would lay."""
    changed = bytearray(patched(page, offset, replacement))
    RECORD_TABLE.seal(memoryview(changed)[:PAGE_BYTES])
    return bytes(changed)


class Log:
    """Builds the bytes of a segment, record after record."""

    def __init__(self, pages: int) -> None:
        header = SegmentHeader(STORE_UUID, SEGMENT_ID, EPOCH, pages * PAGE_BYTES, SEGMENT_ID - 2, CREATED_AT_NS)
        self.data = header.pack()
        self.segment_bytes = header.segment_bytes
        self.builder = SealBuilder()
        self.counter = 0
        self.offsets: list[int] = []

    def add(self, make: Callable[..., bytes], *arguments: Any, **fields: Any) -> None:
        self.counter += 1
        self.offsets.append(len(self.data))
        record = make(len(self.data), self.counter, *arguments, **fields)
        self.builder.add(RecordHeader.parse(record[:PAGE_BYTES]))
        self.data += record

    def note(self, kind: RecordType, **fields: Any) -> None:
        """A record without payload."""
        self.add(lambda offset, counter, **more: laid(header_of(kind, offset, counter, **more)), **fields)

    def sealed(self) -> bytes:
        return self.data + self.builder.pack(
            store_uuid=STORE_UUID,
            segment_id=SEGMENT_ID,
            epoch=EPOCH,
            offset=len(self.data),
            record_seq=seq(self.counter + 1),
            synced_bytes=len(self.data),
            written_at_ns=CREATED_AT_NS + 60 * 10**9,
        )

    def unsealed(self) -> bytes:
        """The preallocated file: zeros behind the last record."""
        return self.data.ljust(self.segment_bytes, b"\0")


def two_records() -> Log:
    """The segment of SPEC.md part 12: a namespace and one small block."""
    log = Log(pages=16)
    log.add(namespace_record)
    raw = b"The quick brown fox jumps over the lazy dog."
    log.add(block, raw, Codec.RAW, 2, key=b"key-1", meta=b"meta", tag=tag_digest("tenant"))
    return log


def mixed() -> Log:
    """A segment with every type of record.

    The block of key 3 is deleted, put again, and an old copy of it follows; that of key 4 is replaced.
    """
    log = Log(pages=36)
    log.add(namespace_record)
    log.add(block, floats("a", 3 * 4096 + 500, 2), Codec.PLANES_ZSTD, 2, depth=0)
    parent = key_digest(noise("key 2", 32))
    log.add(block, noise("b", 6000), Codec.RAW, 2, parent=parent, depth=1, tag=tag_digest("tenant"), meta=b"two", synced_bytes=8192)
    log.add(block, b"abcd" * 2000, Codec.ZSTD, 2, depth=2, expires_at_ns=CREATED_AT_NS + 10**15)
    log.note(RecordType.TOMBSTONE, key=noise("key 3", 32), synced_bytes=len(log.data))
    log.add(block, floats("c", 4096, 2), Codec.PLANES_ZSTD, 2, key=noise("key 4", 32), version_seq=seq(6))
    other = dataclasses.replace(NAMESPACE, group=1).digest
    log.note(RecordType.NAMESPACE_DROP, namespace=other)
    log.add(block, noise("d", 100), Codec.RAW, 2, namespace=other, version_seq=seq(2))
    log.add(block, noise("e", 100), Codec.RAW, 2, key=noise("key 3", 32))
    log.add(block, noise("b", 6000), Codec.RAW, 2, key=noise("key 3", 32), version_seq=seq(3))
    return log


# --- describing bytes with kvlode ---------------------------------------------------------------------------------------


def record_values(header: RecordHeader) -> dict[str, Any]:
    """A header as JSON: digests, keys and checksums in hexadecimal."""
    stripes = [[*entry[:4], f"{entry[5]:016x}"] for entry in header.stripes.tolist()]
    values = {name: getattr(header, name) for name in header.__slots__ if name not in ("record_type", "stripes")}
    values |= {"type": int(header.record_type), "codec": int(header.codec), "record_pages": header.record_pages, "stripes": stripes}
    values |= {"raw_checksum": f"{header.raw_checksum:016x}", "payload_checksum": f"{header.payload_checksum:016x}"}
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in sorted(values.items())}


def raw_bytes(read: Read, header: RecordHeader) -> bytes:
    """The decoded payload. Raises ``CorruptRecord``."""
    out = np.zeros(header.raw_length, dtype=np.uint8)
    for index, (start, entry) in enumerate(zip(stripe_offsets(header.stripes).tolist(), header.stripes, strict=True)):
        stored = np.frombuffer(read(header.offset + PAGE_BYTES + start, int(entry["stored_length"])), dtype=np.uint8)
        raw_start = index * header.stripe_bytes
        size = stripe_raw_bytes(header.raw_length, header.stripe_bytes, index)
        decode_stripe(stored, entry, out[raw_start : raw_start + size], header.element_size)
    if header.record_type != RecordType.SEAL and xxh3_64(out) != header.raw_checksum and header.raw_length:
        raise CorruptRecord("raw-checksum")
    return out.tobytes()


def reader_of(data: bytes) -> Read:
    return lambda offset, length: data[offset : offset + length]


def describe_superblock(data: bytes) -> dict[str, Any]:
    superblock = Superblock.parse(data)
    values = {name: getattr(superblock, name) for name in superblock.__slots__}
    return values | {"store_uuid": superblock.store_uuid.hex(), "read_only": superblock.read_only}


def describe_record(data: bytes) -> dict[str, Any]:
    """One record that begins the file but says that it lies at offset 8192."""
    header = parse_placed(data[:PAGE_BYTES], STORE_UUID, SEGMENT_ID, 8192)
    if header.record_type not in list(RecordType):
        return {"skipped_pages": header.record_pages}
    raw = raw_bytes(lambda offset, length: data[offset - 8192 :][:length], header)
    return {"record": record_values(header), "raw_sha256": hashlib.sha256(raw).hexdigest()}


def describe_segment(data: bytes) -> dict[str, Any]:
    """Header, seal, records, the end of the log, damage, and what is left of every block."""
    read = reader_of(data)
    place = {"store_uuid": STORE_UUID, "segment_id": SEGMENT_ID}
    found, trailer_only = None, False
    try:
        found = find_seal(read, len(data), **place)
    except CorruptRecord:
        trailer_only = True
    if found is None:
        scan = scan_unsealed(read, end=len(data), durable_bytes=len(data) if trailer_only else 0, **place)
        rows = [_row_of_header(header) for header in scan.records]
        ending = {"kind": scan.end.kind.name.lower(), "offset": scan.end.offset, "damaged": [list(part) for part in scan.damaged]}
    else:
        rows = _rows_of_table(found[1])
        ending = {"kind": "toc", "offset": found[0].data_end, "damaged": []}
    return {
        "header": _segment_values(data),
        "trailer": None if found is None else _trailer_values(found[0]),
        "end": ending,
        "records": rows,
        "blocks": _blocks(read, rows),
    }


def _segment_values(data: bytes) -> dict[str, Any] | None:
    try:
        header = SegmentHeader.parse(data[:PAGE_BYTES])
        header.check_place(STORE_UUID, SEGMENT_ID)
    except CorruptRecord:
        return None
    return {name: getattr(header, name) for name in header.__slots__} | {"store_uuid": header.store_uuid.hex()}


def _trailer_values(trailer: Trailer) -> dict[str, Any]:
    values = {name: getattr(trailer, name) for name in trailer.__slots__}
    return values | {
        "store_uuid": trailer.store_uuid.hex(),
        "toc_checksum": f"{trailer.toc_checksum:016x}",
        "toc_offset": trailer.toc_offset,
    }


_ROW = (
    *("type", "codec", "element_size", "record_pages", "depth", "raw_length", "stored_length", "version_seq", "record_seq"),
    *("written_at_ns", "expires_at_ns"),
)


def _row_of_header(header: RecordHeader) -> dict[str, Any]:
    values = record_values(header)
    row = {name: values[name] for name in (*_ROW, "payload_checksum", "namespace", "tag", "parent", "key")}
    return row | {"offset": header.offset}


def _rows_of_table(table: SealTable) -> list[dict[str, Any]]:
    return [
        {name: int(getattr(table, name)[i]) for name in _ROW}
        | {name: getattr(table, name)[i].tobytes().hex() for name in ("namespace", "tag", "parent")}
        | {"payload_checksum": f"{int(table.payload_checksum[i]):016x}"}
        | {"key": table.key(i).hex(), "offset": int(table.page[i]) * PAGE_BYTES}
        for i in range(len(table))
    ]


def _blocks(read: Read, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The state of every block record: present, deleted, superseded, purged or damaged."""
    kills: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["type"] in (RecordType.TOMBSTONE, RecordType.NAMESPACE_DROP):
            place = (row["namespace"], row["key"])
            kills[place] = max(kills.get(place, -1), row["version_seq"])

    def killed(row: dict[str, Any]) -> bool:
        by_key, by_drop = kills.get((row["namespace"], row["key"]), -1), kills.get((row["namespace"], ""), -1)
        return max(by_key, by_drop) > row["version_seq"]

    rows = [row for row in rows if row["type"] == RecordType.BLOCK]
    newest: dict[tuple[str, str], int] = {}
    for row in rows:
        place = (row["namespace"], row["key"])
        if not killed(row):
            newest[place] = max(newest.get(place, -1), row["record_seq"])
    blocks = []
    for row in rows:
        latest = row["record_seq"] == newest.get((row["namespace"], row["key"]))
        state = "deleted" if killed(row) else "present" if latest else "superseded"
        blocks.append({"offset": row["offset"], "key": row["key"]} | _content(read, row["offset"], state))
    return blocks


def _content(read: Read, offset: int, state: str) -> dict[str, Any]:
    page = bytes(read(offset, PAGE_BYTES))
    if state == "deleted" and not any(page):
        return {"state": "purged"}
    if state != "present":
        return {"state": state}
    try:
        header = parse_placed(page, STORE_UUID, SEGMENT_ID, offset)
        return {"state": state, "raw_sha256": hashlib.sha256(raw_bytes(read, header)).hexdigest()}
    except CorruptRecord:
        return {"state": "damaged"}


DESCRIBE: dict[str, Callable[[bytes], dict[str, Any]]] = {
    "superblock": describe_superblock,
    "record": describe_record,
    "segment": describe_segment,
}


def describe(structure: str, data: bytes) -> dict[str, Any]:
    """What kvlode reads in the bytes of a vector: the ``expected`` of its JSON."""
    if structure == "names":
        return describe_names()
    try:
        return DESCRIBE[structure](data)
    except UnsupportedFormat:
        return {"refused": "unsupported"}
    except FormatError:
        return {"refused": "damaged"}


def describe_names() -> dict[str, Any]:
    """Digests and keys, which are computed rather than read."""
    return {
        "namespace_json": NAMESPACE.canonical_json().decode(),
        "namespace_digest": NAMESPACE.digest.hex(),
        "key_digest": {"6b6579": key_digest(b"key").hex(), "00": key_digest(b"\0").hex()},
        "tag_digest": {"tenant": tag_digest("tenant").hex(), "mieter-ä": tag_digest("mieter-ä").hex()},
        "prefix_keys": {
            "tokens": [1, 2, 3, 4, 5, 6, 7, 2**40],
            "block_tokens": 3,
            "salt": b"salt".hex(),
            "keys": [key.hex() for key in prefix_keys([1, 2, 3, 4, 5, 6, 7, 2**40], 3, b"salt")],
        },
        "xxh3_64": {"": f"{xxh3_64(b''):016x}", b"kvlode".hex(): f"{xxh3_64(b'kvlode'):016x}"},
    }


# --- the vectors -----------------------------------------------------------------------------------------------------


def superblocks() -> dict[str, tuple[str, bytes]]:
    plain = Superblock(STORE_UUID, CREATED_AT_NS)
    page = plain.pack()
    newer = bytearray(page)
    newer[8:10] = (2).to_bytes(2, "little")
    SUPERBLOCK_TABLE.seal(newer)
    return {
        "superblock": ("a store", page),
        "superblock-read-only": ("an unknown ro_compat bit: read, do not write", dataclasses.replace(plain, ro_compat=4).pack()),
        "superblock-incompat": ("an unknown incompat bit: refuse", dataclasses.replace(plain, incompat=1).pack()),
        "superblock-newer": ("a newer read_version: refuse", bytes(newer)),
        "superblock-foreign": ("another kind of file", b"SQLite format 3\0".ljust(PAGE_BYTES, b"\1")),
        "superblock-damaged": ("one bit of the uuid flipped", flipped(page, 45, 6)),
    }


def records() -> dict[str, tuple[str, bytes]]:
    def one(raw: bytes, codecs: Codec | list[Codec], element_size: int, **fields: Any) -> bytes:
        return block(8192, 1, raw, codecs, element_size, **fields)

    chain = {"parent": key_digest(b"parent"), "depth": 9, "tag": tag_digest("tenant"), "meta": noise("meta", 512), "key": noise("k", 255)}
    planes = one(floats("p2", 10000, 2), Codec.PLANES_ZSTD, 2)
    compressible = floats("p4", 9000, 4)[:8192] + b"\0" * 808
    tombstone = laid(header_of(RecordType.TOMBSTONE, 8192, 1, key=b"gone"))
    unknown = resealed(tombstone, 16, b"\xc8")
    return {
        "record-raw": ("raw, element size 1, two stripes", one(noise("r", 5000), Codec.RAW, 1)),
        "record-zstd-1": ("zstd, element size 1", one(b"zstd " * 1700, Codec.ZSTD, 1)),
        "record-zstd-2": ("zstd, element size 2, a stripe of odd length", one(floats("z", 9001, 2), Codec.ZSTD, 2)),
        "record-planes-1": ("planes+zstd chosen for element size 1: zstd frames", one(floats("p1", 8192, 2), Codec.PLANES_ZSTD, 1)),
        "record-planes-2": ("planes+zstd, element size 2; plane 0 compressed, the rest raw", planes),
        "record-planes-4": (
            "planes+zstd, element size 4; both parts of the last stripe compress",
            one(compressible, Codec.PLANES_ZSTD, 4),
        ),
        "record-planes-8": ("planes+zstd, element size 8", one(floats("p8", 6000, 8), Codec.PLANES_ZSTD, 8)),
        "record-mixed": (
            "stripes of all three codecs in one record",
            one(noise("m", 4096) + floats("m", 8192, 2) + b"odd", [Codec.RAW, Codec.ZSTD, Codec.PLANES_ZSTD, Codec.PLANES_ZSTD], 2),
        ),
        "record-chain": ("longest key and metadata, parent, depth, tag, expiry", one(b"x", Codec.RAW, 2, expires_at_ns=1, **chain)),
        "record-tombstone": ("a tombstone", tombstone),
        "record-namespace": ("a namespace descriptor", namespace_record(8192, 1)),
        "record-namespace-drop": ("a namespace drop", laid(header_of(RecordType.NAMESPACE_DROP, 8192, 1))),
        "record-unknown-skippable": ("unknown type 200 with flag bit 0: skip", resealed(unknown, 20, b"\1\0")),
        "record-unknown": ("unknown type 200 without the flag: refuse", unknown),
        "record-newer": ("version 2: refuse", resealed(tombstone, 8, b"\2\0")),
        "record-other-place": ("intact, but it says that it lies elsewhere", laid(header_of(RecordType.TOMBSTONE, 12288, 1, key=b"gone"))),
        "record-damaged-header": ("one bit of the depth flipped", flipped(planes, 128)),
        "record-damaged-table": ("a stripe's checksum flipped: the header checksum covers the table", flipped(planes, 512 + 16)),
        "record-damaged-payload": ("one bit of the second stripe flipped", flipped(planes, PAGE_BYTES + 3000, 7)),
        "record-reserved": ("a reserved byte is 1, the checksum is right", resealed(planes, 237, b"\1")),
        "record-no-key": ("key_length 0 in a block, the checksum is right", resealed(planes, 234, b"\0")),
        "record-zeros": ("a page of zeros", bytes(PAGE_BYTES)),
    }


def segments() -> dict[str, tuple[str, bytes]]:
    small, log = two_records(), mixed()
    sealed, whole, offsets = log.sealed(), log.unsealed(), log.offsets
    later = mixed()
    later.add(block, noise("later", 5000), Codec.RAW, 2, synced_bytes=len(log.data))
    last_payload = later.offsets[-1] + PAGE_BYTES
    hole = patched(whole, offsets[5], bytes(offsets[6] - offsets[5]))
    return {
        "segment-two-records": ("sealed; the worked example of part 12", small.sealed()),
        "segment-empty": ("sealed without any record", Log(pages=4).sealed()),
        "segment-sealed": ("sealed, every type of record", sealed),
        "segment-open": ("not sealed, zeros behind the last record", whole),
        "segment-cut": ("not sealed, the file ends inside the last record", log.data[:-100]),
        "segment-torn-header": ("not sealed, one sector of the last header arrived", patched(whole, offsets[-1] + 512, bytes(3584))),
        "segment-torn-payload": ("not sealed, the last payload is zeros", patched(later.unsealed(), last_payload, bytes(8192))),
        "segment-torn-hole": ("not sealed, zeros and then records that claim nothing about them: a torn tail", hole),
        "segment-damaged": (
            "not sealed, a damaged header below synced_bytes of a later record: damage, the walk resynchronises",
            flipped(whole, offsets[2] + 130),
        ),
        "segment-torn-seal": ("not sealed: the trailer did not arrive, the seal record did", sealed[:-PAGE_BYTES] + bytes(PAGE_BYTES)),
        "segment-damaged-toc": (
            "sealed, one bit of the table of contents flipped: walk",
            flipped(sealed, len(sealed) - 2 * PAGE_BYTES + 80),
        ),
        "segment-damaged-header": ("sealed, the segment header is damaged: nothing is lost", flipped(sealed, 40)),
        "segment-damaged-block": ("sealed, one bit of a payload flipped: that block is lost", flipped(sealed, offsets[1] + 5000)),
        "segment-purged": ("sealed, a hole punched under the deleted block", patched(sealed, offsets[2], bytes(offsets[3] - offsets[2]))),
    }


def all_vectors() -> dict[str, tuple[str, str, bytes]]:
    """Name -> (structure, description, bytes)."""
    vectors = {"names": ("names", "digests, keys and checksums of given inputs; no bytes", b"")}
    for structure, group in (("superblock", superblocks()), ("record", records()), ("segment", segments())):
        vectors |= {name: (structure, text, data) for name, (text, data) in group.items()}
    return vectors


def document(structure: str, text: str, data: bytes) -> dict[str, Any]:
    """The JSON of a vector."""
    place = {"store_uuid": STORE_UUID.hex(), "segment_id": SEGMENT_ID} | ({"offset": 8192} if structure == "record" else {})
    head: dict[str, Any] = {"structure": structure, "description": text}
    if structure in ("record", "segment"):
        head["place"] = place
    return head | {"expected": describe(structure, data)}


def manifest() -> dict[str, Any]:
    return {"zstd_version": ".".join(map(str, zstandard.ZSTD_VERSION)), "vectors": {n: v[1] for n, v in all_vectors().items()}}


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> None:
    for name, (structure, text, data) in all_vectors().items():
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        if data:
            (folder / "data.bin").write_bytes(data)
        (folder / "expected.json").write_text(as_json(document(structure, text, data)))
    (FOLDER / "MANIFEST.json").write_text(as_json(manifest()))


if __name__ == "__main__":
    main()
