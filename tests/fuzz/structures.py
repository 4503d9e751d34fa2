"""Superblock, headers, stripe table, seal, whole segments: parsed, packed again, and read by the second reader."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import make_vectors
import spec_reader
from fuzz.oracle import OFFSET, PLACE, SEGMENT_ID, UUID, both, integers, same, vectors
from kvlode.format.bytetable import PageTable
from kvlode.format.checksum import xxh3_64
from kvlode.format.errors import CorruptRecord
from kvlode.format.layout import PAGE_BYTES, RecordType
from kvlode.format.record import RECORD_TABLE, RecordHeader
from kvlode.format.seal import COLUMNS, TOC_TABLE, TRAILER_TABLE, SealTable, Trailer, column_offsets
from kvlode.format.segment import SegmentHeader
from kvlode.format.stripe import stripe_offsets
from kvlode.format.superblock import Superblock
from kvlode.format.walk import find_seal, parse_placed, resynchronise, scan_unsealed, walk_records

# --- pages -------------------------------------------------------------------------------------------------------------------


def mend_page(table: PageTable) -> Callable[[bytearray], None]:
    def mend(data: bytearray) -> None:
        if len(data) == PAGE_BYTES:
            table.seal(data)

    return mend


def run_superblock(data: bytes) -> str:
    value = both(lambda: make_vectors.describe_superblock(data), lambda: spec_reader.read_superblock(data), "superblock")
    same(Superblock.parse(data).pack(), data, "superblock packed again")
    return "read-only" if value["read_only"] else "read-write"


def run_segment_header(data: bytes) -> str:
    value = SegmentHeader.parse(data)
    same(value.pack(), data, "segment header packed again")
    try:
        value.check_place(UUID, SEGMENT_ID)
    except CorruptRecord:
        same(spec_reader.read_segment_header(data, PLACE), None, "segment header of another place")
        return "elsewhere"
    same(make_vectors._segment_values(data), spec_reader.read_segment_header(data, PLACE), "segment header")
    return "here"


def packed(header: RecordHeader) -> bytes:
    page = bytearray(PAGE_BYTES)
    header.pack_into(page)
    return bytes(page)


def run_record_header(data: bytes) -> str:
    values = both(
        lambda: make_vectors.record_values(parse_placed(data, UUID, SEGMENT_ID, OFFSET)),
        lambda: spec_reader.record_values(spec_reader.read_header(data, PLACE, OFFSET)),
        "record header",
    )
    same(packed(RecordHeader.parse(data)), data, "record header packed again")
    return f"type {values['type']}" if 1 <= values["type"] <= 5 else "skipped"


def mend_record_header(data: bytearray) -> None:
    """Payload checksum and header checksum, whatever the lengths say."""
    if len(data) == PAGE_BYTES:
        key_end, table_end = 256 + data[234], 512 + 24 * min(int.from_bytes(data[22:24], "little"), 128)
        data[176:184] = struct.pack("<Q", xxh3_64(bytes(data[80:96] + data[256:key_end] + data[512:table_end])))
        RECORD_TABLE.seal(data)


def record_seeds() -> list[bytes]:
    pages = [data[:PAGE_BYTES] for data in vectors("record")]
    seal = bytearray(make_vectors.Log(pages=4).sealed()[PAGE_BYTES : 2 * PAGE_BYTES])
    seal[48:56] = struct.pack("<Q", OFFSET)
    mend_record_header(seal)
    another_key = bytearray(make_vectors.patched(pages[0], 256, b"K"))
    RECORD_TABLE.seal(another_key)
    return [*pages, bytes(seal), bytes(another_key)]


def run_trailer(data: bytes) -> str:
    trailer = Trailer.parse(data)
    same(trailer.pack(), data, "trailer packed again")
    if trailer.file_bytes > 1 << 20:
        return "of a large file"
    file = bytes(max(trailer.file_bytes, PAGE_BYTES) - PAGE_BYTES) + data
    here = (trailer.store_uuid, trailer.segment_id) == (UUID, SEGMENT_ID)
    expected = spec_reader.read_trailer(file, PLACE)
    same(make_vectors._trailer_values(trailer) if here else None, expected, "trailer")
    return "here" if here else "elsewhere"


# --- stripe table ------------------------------------------------------------------------------------------------------------

STRIPE_HEAD = struct.Struct("<IHBB")
"""Input: raw_length, pages of a stripe, codec, element size; then the entries."""


def run_stripe_table(data: bytes) -> str:
    """The stripe table of a block whose other fields are right: accepted tables stay inside the payload."""
    if len(data) < STRIPE_HEAD.size:
        raise CorruptRecord("length")
    raw_length, pages, codec, element = STRIPE_HEAD.unpack_from(data)
    entries = data[STRIPE_HEAD.size :][: 24 * 128]
    count = len(entries) // 24
    stored = stored_end(entries[: 24 * count])
    page = bytearray(make_vectors.laid(make_vectors.header_of(RecordType.TOMBSTONE, OFFSET, 1, key=b"k")))
    page[16:20] = bytes([RecordType.BLOCK, 1, codec, element])
    page[12:16] = struct.pack("<I", min(1 + -(-stored // PAGE_BYTES), (1 << 32) - 1))
    page[22:24] = struct.pack("<H", count)
    page[132:152] = struct.pack("<IQQ", min(pages * PAGE_BYTES, (1 << 32) - 1), raw_length, stored)
    page[512 : 512 + 24 * count] = entries[: 24 * count]
    mend_record_header(page)
    result = run_record_header(bytes(page))
    header = RecordHeader.parse(page)
    ends = stripe_offsets(header.stripes) + header.stripes["stored_length"]
    if int(ends[-1]) != header.stored_length or header.stored_length > raw_length + 16 * count:
        raise AssertionError("an accepted stripe table leaves its payload")
    return result + f" of codec {codec}"


def stored_end(entries: bytes) -> int:
    end = 0
    for index in range(0, len(entries), 24):
        end = -(-end // 16) * 16 + int.from_bytes(entries[index : index + 4], "little")
    return end


def stripe_seeds() -> list[bytes]:
    seeds = []
    for data in vectors("record"):
        stripes, codec, element = int.from_bytes(data[22:24], "little"), data[18], data[19]
        raw_length = int.from_bytes(data[136:144], "little")
        if stripes and data[16] == RecordType.BLOCK:
            seeds.append(STRIPE_HEAD.pack(raw_length, 1, codec, element) + data[512 : 512 + 24 * stripes])
    return seeds


# --- seal --------------------------------------------------------------------------------------------------------------------


def text_rows(data: bytes) -> list[dict[str, Any]]:
    """The rows of a table as the second reader has them, of a segment as large as can be."""
    return spec_reader.parse_toc(data, int.from_bytes(data[16:24], "little"), 1 << 40)


def run_table_of_contents(data: bytes) -> str:
    both(lambda: make_vectors._rows_of_table(SealTable.parse(data)), lambda: text_rows(data), "table of contents")
    table = SealTable.parse(data)
    heap = b"".join(table.keys)
    same(table.keys, [table.key(index) for index in range(len(table))], "keys one by one")
    same(data[len(data) - len(heap) :], heap, "key heap")
    if not PAGE_BYTES <= table.data_end <= 1 << 40:
        raise AssertionError(f"records end at {table.data_end}")
    return "rows" if len(table) else "empty"


def toc_fields() -> list[tuple[int, int]]:
    starts = column_offsets(10)
    columns = [
        (start + row * dtype.itemsize, dtype.itemsize) for start, (_, dtype) in zip(starts, COLUMNS, strict=False) for row in (0, 1, 9)
    ]
    return integers(TOC_TABLE) + [field for field in columns if field[1] <= 8]


def toc_seeds() -> list[bytes]:
    seeds = []
    for log in (make_vectors.Log(pages=4), make_vectors.two_records(), make_vectors.mixed()):
        data = log.sealed()
        seeds.append(data[len(log.data) + PAGE_BYTES :][: Trailer.parse(data[-PAGE_BYTES:]).toc_bytes])
    return seeds


def mend_segment(data: bytearray) -> None:
    """Checksums of the trailer and its table, and of every page that looks like a record header."""
    if len(data) >= PAGE_BYTES and len(data) % PAGE_BYTES == 0:
        toc_offset, toc_bytes = struct.unpack_from("<QQ", data, len(data) - PAGE_BYTES + 56)
        if toc_offset + toc_bytes <= len(data) - PAGE_BYTES:
            checksum = struct.pack("<Q", xxh3_64(bytes(data[toc_offset : toc_offset + toc_bytes])))
            data[len(data) - PAGE_BYTES + 80 : len(data) - PAGE_BYTES + 88] = checksum
        page = data[-PAGE_BYTES:]
        TRAILER_TABLE.seal(page)
        data[-PAGE_BYTES:] = page
    for start in range(PAGE_BYTES, len(data) - PAGE_BYTES + 1, PAGE_BYTES):
        if data[start : start + 8] == RECORD_TABLE.magic:
            page = data[start : start + PAGE_BYTES]
            mend_record_header(page)
            data[start : start + PAGE_BYTES] = page


# --- segments ----------------------------------------------------------------------------------------------------------------


def run_segment(data: bytes) -> str:
    """Header, seal, records, torn tail, damage, blocks: both readers must tell the same story of any file."""
    found = both(lambda: make_vectors.describe_segment(data), lambda: spec_reader.read_segment(data, PLACE), "segment")
    notes = [", no header"] * (found["header"] is None) + [", damage"] * bool(found["end"]["damaged"])
    return found["end"]["kind"] + "".join(notes)


class BoundedRead:
    """A read function that counts, and refuses offsets outside the file: a loop or a wild read ends the run."""

    def __init__(self, data: bytes) -> None:
        self.data, self.calls = data, 0

    def __call__(self, offset: int, length: int) -> bytes:
        self.calls += 1
        if not 0 <= offset <= offset + length <= len(self.data):
            raise AssertionError(f"a read of {length} bytes at {offset} of a file of {len(self.data)}")
        if self.calls > 400 + 140 * (len(self.data) // PAGE_BYTES):
            raise AssertionError(f"{self.calls} reads of a file of {len(self.data)} bytes: the walk does not end")
        return self.data[offset : offset + length]


def run_walk(data: bytes) -> str:
    read, place = BoundedRead(data), {"store_uuid": UUID, "segment_id": SEGMENT_ID}
    scan = scan_unsealed(read, end=len(data), **place)
    position = PAGE_BYTES
    for header in scan.records:
        if header.offset < position or header.offset + header.record_bytes > len(data):
            raise AssertionError("records overlap or leave the file")
        position = header.offset + header.record_bytes
    walk = walk_records(BoundedRead(data), start=PAGE_BYTES, end=len(data), **place)
    leading = [header.offset for header in walk]
    same(leading[: len(scan.records)], [header.offset for header in scan.records][: len(leading)], "the unbroken run")
    first = resynchronise(BoundedRead(data), start=PAGE_BYTES, end=len(data), **place)
    if leading:
        same(first, PAGE_BYTES, "the first record")
    ended = scan.end.error.check if scan.end.error is not None else scan.end.kind.name.lower()
    return f"{ended}, {sealed(data)}"


def sealed(data: bytes) -> str:
    """Whether the file is sealed, and which check of its table fails."""
    try:
        found = find_seal(BoundedRead(data), len(data), store_uuid=UUID, segment_id=SEGMENT_ID)
    except CorruptRecord as error:
        return error.check
    return "not sealed" if found is None else "sealed"


def segment_seeds() -> list[bytes]:
    log = make_vectors.two_records()
    holes = make_vectors.patched(log.unsealed(), log.offsets[0], bytes(PAGE_BYTES))[: 8 * PAGE_BYTES]
    skippable = make_vectors.Log(pages=8)
    skippable.note(RecordType.TOMBSTONE, key=b"a")
    page = make_vectors.resealed(make_vectors.resealed(skippable.data[PAGE_BYTES:], 16, b"\xc8"), 20, b"\1\0")
    made = [
        log.sealed(),
        log.unsealed()[: 7 * PAGE_BYTES],
        holes,
        make_vectors.Log(pages=4).sealed(),
        skippable.data[:PAGE_BYTES] + page * 2,
    ]
    return [*made, make_vectors.mixed().sealed()]


def segment_fields() -> list[tuple[int, int]]:
    return [field for page in (1, 3, 5) for field in integers(RECORD_TABLE, page * PAGE_BYTES)] + integers(TRAILER_TABLE, 7 * PAGE_BYTES)
