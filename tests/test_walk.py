"""Walking a segment: what a torn, holed or damaged log yields, against a plain model of the table in SPEC.md part 8.

A segment is drawn as a list of pieces (records, zeros, garbage, images of other segments), cut anywhere. The model works
on the pieces and never looks at bytes; kvlode works on the bytes and knows nothing of the pieces.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import make_vectors
import spec_reader
from kvlode.format.checksum import xxh3_64
from kvlode.format.errors import CorruptRecord, UnsupportedFormat
from kvlode.format.layout import PAGE_BYTES, Codec, RecordType
from kvlode.format.record import RECORD_TABLE, RecordHeader
from kvlode.format.seal import TRAILER_TABLE, SealBuilder, Trailer
from kvlode.format.walk import (
    Read,
    SegmentScan,
    WalkEndKind,
    check_payload,
    find_seal,
    parse_placed,
    resynchronise,
    scan_unsealed,
    walk_records,
)

UUID, SEGMENT_ID, EPOCH = make_vectors.STORE_UUID, make_vectors.SEGMENT_ID, make_vectors.EPOCH
OTHER_UUID = bytes(range(16))
PLACE = {"store_uuid": UUID.hex(), "segment_id": SEGMENT_ID}
RECORD_KINDS = ("block", "tombstone", "namespace", "drop", "skippable")
FOREIGN_KINDS = ("other uuid", "other segment", "other offset", "other uuid, newer", "a bit off")

# --- pieces and their bytes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a segment in whole pages. ``claim`` (0 to 1) places ``synced_bytes`` between 0 and the record's own offset."""

    kind: str
    pages: int = 1
    claim: float = 0.0
    payload_good: bool = True
    start: int = 0

    @property
    def end(self) -> int:
        return self.start + PAGE_BYTES * self.pages

    @property
    def synced_bytes(self) -> int:
        return int(self.claim * self.start) // PAGE_BYTES * PAGE_BYTES

    @property
    def is_record(self) -> bool:
        return self.kind in RECORD_KINDS or self.kind == "seal"


def placed(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces one after the other behind the segment's header page."""
    result, offset = [], PAGE_BYTES
    for piece in pieces:
        result.append(dataclasses.replace(piece, start=offset))
        offset = result[-1].end
    return result


@functools.cache
def segment_image(pages: int) -> bytes:
    """The first pages of a real sealed segment with this uuid and id: a payload may well hold such a file."""
    image = make_vectors.two_records().sealed()
    return (image * (pages * PAGE_BYTES // len(image) + 1))[: pages * PAGE_BYTES]


@functools.lru_cache(maxsize=1 << 12)
def bytes_of(piece: Piece, counter: int) -> bytes:
    if piece.is_record:
        return record_bytes(piece, counter)
    if piece.kind == "zeros":
        return bytes(PAGE_BYTES * piece.pages)
    if piece.kind == "garbage":
        return make_vectors.noise(f"garbage {counter}", PAGE_BYTES * piece.pages)
    return b"".join(foreign_page(piece.kind, piece.start + PAGE_BYTES * page) for page in range(piece.pages))


def record_bytes(piece: Piece, counter: int) -> bytes:
    fields = {"synced_bytes": piece.synced_bytes}
    if piece.kind == "block":
        raw = segment_image(piece.pages - 1)[:-7]
        data = make_vectors.block(piece.start, counter, raw, Codec.RAW, 2, **fields)
        return data if piece.payload_good else make_vectors.flipped(data, PAGE_BYTES + 100, 3)
    if piece.kind == "namespace":
        data = make_vectors.namespace_record(piece.start, counter, **fields)
        return data if piece.payload_good else make_vectors.flipped(data, PAGE_BYTES + 9)
    if piece.kind == "seal":
        builder = SealBuilder()
        place = {"store_uuid": UUID, "segment_id": SEGMENT_ID, "epoch": EPOCH, "offset": piece.start}
        return builder.pack(**place, record_seq=counter, written_at_ns=1, **fields)
    kind = RecordType.NAMESPACE_DROP if piece.kind == "drop" else RecordType.TOMBSTONE
    key = b"" if piece.kind == "drop" else b"gone"
    data = make_vectors.laid(make_vectors.header_of(kind, piece.start, counter, key=key, **fields))
    if piece.kind == "skippable":
        data = make_vectors.resealed(make_vectors.resealed(data, 16, b"\xc8"), 20, b"\1\0")
    return data


def foreign_page(kind: str, offset: int) -> bytes:
    """A page that is almost a record of this place."""
    header = make_vectors.header_of(RecordType.TOMBSTONE, offset, 1, key=b"image", synced_bytes=offset)
    if kind.startswith("other uuid"):
        header = dataclasses.replace(header, store_uuid=OTHER_UUID)
    elif kind == "other segment":
        header = dataclasses.replace(header, segment_id=SEGMENT_ID + 1)
    elif kind == "other offset":
        header = dataclasses.replace(header, offset=offset + PAGE_BYTES)
    page = make_vectors.laid(header)
    if kind.endswith("newer"):
        return make_vectors.resealed(page, 8, b"\7\0")
    return make_vectors.flipped(page, 300, 5) if kind == "a bit off" else page


def segment_of(pieces: Sequence[Piece]) -> bytes:
    header = make_vectors.Log(pages=64).data
    return header + b"".join(bytes_of(piece, counter) for counter, piece in enumerate(pieces, start=1))


def records_drawn() -> st.SearchStrategy[Piece]:
    claims = st.sampled_from((0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0))
    good = st.booleans() | st.just(True)
    return (
        st.builds(Piece, kind=st.just("block"), pages=st.integers(2, 4), claim=claims, payload_good=good)
        | st.builds(Piece, kind=st.just("namespace"), pages=st.just(2), claim=claims, payload_good=good)
        | st.builds(Piece, kind=st.sampled_from(("tombstone", "drop", "skippable")), claim=claims)
    )


def holes_drawn() -> st.SearchStrategy[Piece]:
    return st.builds(Piece, kind=st.sampled_from(("zeros", "zeros", "garbage", *FOREIGN_KINDS)), pages=st.integers(1, 3))


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[Piece], int]:
    """Pieces in place, and the size at which the file is cut."""
    seal = st.builds(Piece, kind=st.just("seal"), pages=st.just(3), claim=st.sampled_from((0.0, 1.0)))
    record = records_drawn()
    pieces = placed(draw(st.lists(record | record | record | holes_drawn() | seal, max_size=9)))
    end = pieces[-1].end if pieces else PAGE_BYTES
    size = draw(
        st.just(end) | st.just(end) | st.integers(PAGE_BYTES, end) | st.integers(1, end // PAGE_BYTES).map(lambda n: n * PAGE_BYTES)
    )
    return pieces, size


# --- the model ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expected:
    """What the table of part 8 makes of the pieces: offsets of the records that count, the end, the damage."""

    offsets: list[int]
    kind: WalkEndKind
    end: int
    damaged: list[tuple[int, int]]


def is_valid(piece: Piece, size: int) -> bool:
    """Whether the walk would accept the piece as a record: a seal needs its first page alone."""
    needed = piece.start + PAGE_BYTES if piece.kind == "seal" else piece.end
    return piece.is_record and needed <= size


def bad_kind(piece: Piece, size: int) -> WalkEndKind:
    if piece.start + PAGE_BYTES > size:
        return WalkEndKind.END
    return WalkEndKind.ZEROS if piece.kind == "zeros" else WalkEndKind.BREAK


def modelled(pieces: Sequence[Piece], size: int, durable_bytes: int) -> Expected:
    seals = [index for index, piece in enumerate(pieces) if piece.kind == "seal" and is_valid(piece, size)]
    seen = pieces[: seals[0] + 1] if seals else pieces
    durable = max([durable_bytes, *(piece.synced_bytes for piece in seen if is_valid(piece, size))])
    offsets: list[int] = []
    damaged: list[tuple[int, int]] = []
    kind, end, index = WalkEndKind.END, seen[-1].end if seen else PAGE_BYTES, 0
    while index < len(seen):
        piece = seen[index]
        if not is_valid(piece, size):
            following = next((later for later in seen[index:] if is_valid(later, size)), None)
            kind, end = bad_kind(piece, size), piece.start
            if piece.start >= durable or following is None:
                break
            damaged.append((piece.start, following.start))
            index = seen.index(following)
            kind, end = WalkEndKind.END, seen[-1].end
        elif piece.kind == "seal":
            return Expected(offsets, WalkEndKind.SEAL, piece.start, damaged)
        elif piece.end > durable and not piece.payload_good:
            return Expected(offsets, WalkEndKind.BREAK, piece.start, damaged)
        else:
            offsets.append(piece.start)
            index += 1
    if end < durable:
        damaged.append((end, durable))
    return Expected(offsets, kind, end, damaged)


# --- reading --------------------------------------------------------------------------------------------------------------


class CountingRead:
    """A read function that fails the test when it is asked for anything outside the range, and counts what is read."""

    def __init__(self, data: bytes, limit: int) -> None:
        self.data, self.limit, self.calls, self.bytes_read = data, limit, 0, 0

    def __call__(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.limit, f"read of {length} bytes at {offset}, the range ends at {self.limit}"
        self.calls += 1
        self.bytes_read += length
        return self.data[offset : offset + length]


def scanned(data: bytes, durable_bytes: int = 0, *, verify_payloads: bool = True) -> SegmentScan:
    read = CountingRead(data, len(data))
    place = {"store_uuid": UUID, "segment_id": SEGMENT_ID}
    scan = scan_unsealed(read, end=len(data), **place, durable_bytes=durable_bytes, verify_payloads=verify_payloads)
    pages = len(data) // PAGE_BYTES + 1
    assert read.calls <= 4 * pages and read.bytes_read <= (pages + 3) * pages * PAGE_BYTES, "each step makes progress"
    return scan


def found(scan: SegmentScan) -> Expected:
    return Expected([header.offset for header in scan.records], scan.end.kind, scan.end.offset, scan.damaged)


# --- torn tail or damage -----------------------------------------------------------------------------------------------


@settings(max_examples=250)
@given(logs(), st.just(0) | st.integers(0, 40))
def test_a_scan_follows_the_table_of_torn_tails(log: tuple[list[Piece], int], durable_pages: int) -> None:
    pieces, size = log
    data, durable_bytes = segment_of(pieces)[:size], PAGE_BYTES * durable_pages
    scan = scanned(data, durable_bytes)
    expected = modelled(pieces, size, durable_bytes)
    assert found(scan) == expected
    assert scan.data_end == (scan.records[-1].offset + scan.records[-1].record_bytes if scan.records else PAGE_BYTES)
    assert (scan.end.seal is not None) == (scan.end.kind is WalkEndKind.SEAL)
    assert (scan.end.error is not None) == (scan.end.kind is WalkEndKind.BREAK)


@settings(max_examples=100)
@given(logs(), st.just(0) | st.integers(0, 40))
def test_the_second_reader_finds_the_same_records_end_and_damage(log: tuple[list[Piece], int], durable_pages: int) -> None:
    pieces, size = log
    data = segment_of(pieces)[:size]
    scan = scanned(data, PAGE_BYTES * durable_pages)
    headers, ending = spec_reader.scan(data, PLACE, PAGE_BYTES * durable_pages)
    assert [header["offset"] for header in headers] == [header.offset for header in scan.records]
    expected = {"kind": scan.end.kind.name.lower(), "offset": scan.end.offset, "damaged": [list(part) for part in scan.damaged]}
    assert ending == expected


@settings(max_examples=60)
@given(logs())
def test_a_scan_without_payloads_takes_every_record_by_its_header(log: tuple[list[Piece], int]) -> None:
    pieces, size = log
    data = segment_of(pieces)[:size]
    trusting = [dataclasses.replace(piece, payload_good=True) for piece in pieces]
    assert found(scanned(data, verify_payloads=False)) == modelled(trusting, size, 0)


@settings(max_examples=60)
@given(logs(), st.integers(0, 40))
def test_more_durable_bytes_never_lose_a_record(log: tuple[list[Piece], int], durable_pages: int) -> None:
    pieces, size = log
    data = segment_of(pieces)[:size]
    fewer, more = scanned(data), scanned(data, PAGE_BYTES * durable_pages)
    assert [header.offset for header in fewer.records] == [header.offset for header in more.records][: len(fewer.records)]


@pytest.mark.parametrize(
    ("log", "durable_pages", "offsets", "kind", "end_page", "damaged_pages"),
    [
        ([], 0, [], WalkEndKind.END, 1, []),
        ([Piece("zeros")], 0, [], WalkEndKind.ZEROS, 1, []),
        ([Piece("tombstone"), Piece("zeros"), Piece("tombstone")], 0, [1], WalkEndKind.ZEROS, 2, []),
        ([Piece("tombstone"), Piece("zeros"), Piece("tombstone", claim=1.0)], 0, [1, 3], WalkEndKind.END, 4, [(2, 3)]),
        ([Piece("tombstone"), Piece("garbage"), Piece("tombstone")], 3, [1, 3], WalkEndKind.END, 4, [(2, 3)]),
        ([Piece("tombstone"), Piece("garbage", 3)], 4, [1], WalkEndKind.BREAK, 2, [(2, 4)]),
        ([Piece("block", 2, payload_good=False), Piece("tombstone")], 0, [], WalkEndKind.BREAK, 1, []),
        ([Piece("block", 2, payload_good=False), Piece("tombstone", claim=1.0)], 0, [1, 3], WalkEndKind.END, 4, []),
        ([Piece("other offset"), Piece("seal", 3, claim=1.0)], 0, [], WalkEndKind.SEAL, 2, [(1, 2)]),
        ([Piece("tombstone"), Piece("seal", 3), Piece("tombstone", claim=1.0)], 0, [1], WalkEndKind.SEAL, 2, []),
    ],
)
def test_the_rows_of_the_table_one_by_one(
    log: list[Piece], durable_pages: int, offsets: list[int], kind: WalkEndKind, end_page: int, damaged_pages: list[tuple[int, int]]
) -> None:
    """Spelled out, so that the model itself is checked against the text."""
    pieces = placed(log)
    damaged = [(PAGE_BYTES * start, PAGE_BYTES * end) for start, end in damaged_pages]
    expected = Expected([PAGE_BYTES * page for page in offsets], kind, PAGE_BYTES * end_page, damaged)
    data = segment_of(pieces)
    assert modelled(pieces, len(data), PAGE_BYTES * durable_pages) == expected
    assert found(scanned(data, PAGE_BYTES * durable_pages)) == expected


# --- walk and resynchronise ----------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(logs(), st.none() | st.integers(0, 40))
def test_a_walk_yields_the_unbroken_run_and_says_why_it_ended(log: tuple[list[Piece], int], verify_page: int | None) -> None:
    pieces, size = log
    data = segment_of(pieces)[:size]
    verify_from = None if verify_page is None else PAGE_BYTES * verify_page
    read: Read = CountingRead(data, size)
    walk = walk_records(read, start=PAGE_BYTES, end=size, store_uuid=UUID, segment_id=SEGMENT_ID, verify_from=verify_from)
    offsets, kind, end = [], WalkEndKind.END, pieces[-1].end if pieces else PAGE_BYTES
    for piece in pieces:
        torn = verify_from is not None and piece.end > verify_from and not piece.payload_good
        if not is_valid(piece, size) or torn or piece.kind == "seal":
            if not is_valid(piece, size):
                kind = bad_kind(piece, size)
            else:
                kind = WalkEndKind.BREAK if torn else WalkEndKind.SEAL
            end = piece.start
            break
        offsets.append(piece.start)
    assert [header.offset for header in walk] == offsets
    assert walk.end is not None and (walk.end.kind, walk.end.offset, walk.position) == (kind, end, end)
    assert list(walk) == [], "an exhausted walk stays exhausted"


@settings(max_examples=100)
@given(logs(), st.integers(1, 40))
def test_resynchronising_finds_the_next_record_of_this_place(log: tuple[list[Piece], int], start_page: int) -> None:
    pieces, size = log
    data, start = segment_of(pieces)[:size], PAGE_BYTES * start_page
    expected = next((piece.start for piece in pieces if piece.start >= start and is_valid(piece, size)), None)
    read: Read = CountingRead(data, size)
    assert resynchronise(read, start=start, end=size, store_uuid=UUID, segment_id=SEGMENT_ID) == expected


@pytest.mark.parametrize("page", [2, 255, 256, 257, 258, 511, 512, 513, 700])
def test_resynchronising_looks_behind_a_long_hole(page: int) -> None:
    """The search reads a MiB at a time: the record lies before, at and behind the seams."""
    pieces = placed([Piece("zeros", page - 1), Piece("tombstone"), Piece("tombstone")])
    data = segment_of(pieces)
    for start in (1, 2):
        read = CountingRead(data, len(data))
        place = {"store_uuid": UUID, "segment_id": SEGMENT_ID}
        assert resynchronise(read, start=PAGE_BYTES * start, end=len(data), **place) == PAGE_BYTES * page
        assert read.bytes_read <= len(data) and read.calls <= 1 + len(data) // (1 << 20)


def test_a_file_that_shrinks_while_it_is_searched_ends_the_search() -> None:
    data = segment_of(placed([Piece("garbage", 300), Piece("tombstone")]))
    for length in (0, 1, PAGE_BYTES, 5 * PAGE_BYTES + 3):
        short = data[:length]
        read: Read = lambda offset, size, short=short: short[offset : offset + size]  # noqa: E731
        place = {"store_uuid": UUID, "segment_id": SEGMENT_ID}
        assert resynchronise(read, start=PAGE_BYTES, end=len(data), **place) is None
        walk = walk_records(read, start=PAGE_BYTES, end=len(data), **place)
        assert list(walk) == [] and walk.end is not None and walk.end.kind is WalkEndKind.BREAK
        assert scan_unsealed(read, end=len(data), **place).records == []


def test_a_header_of_this_place_that_this_version_cannot_read_refuses_the_segment() -> None:
    tombstone = make_vectors.laid(make_vectors.header_of(RecordType.TOMBSTONE, 2 * PAGE_BYTES, 1, key=b"k"))
    for page in (make_vectors.resealed(tombstone, 8, b"\2\0"), make_vectors.resealed(tombstone, 16, b"\xc8")):
        for before in (Piece("tombstone"), Piece("zeros"), Piece("garbage")):
            data = segment_of(placed([before])) + page
            with pytest.raises(UnsupportedFormat):
                scanned(data)
        elsewhere = segment_of(placed([Piece("tombstone"), Piece("zeros")])) + page
        assert [header.offset for header in scanned(elsewhere).records] == [PAGE_BYTES]


def skippable_with_stripes(lengths: Sequence[int], stored_length: int) -> RecordHeader:
    """A record of an unknown type that may be skipped; its stripe table says what it likes."""
    header = make_vectors.header_of(RecordType.TOMBSTONE, PAGE_BYTES, 1, stored_length=stored_length, flags=1)
    stripes = make_vectors.np.zeros(len(lengths), dtype=make_vectors.STRIPE_DTYPE)
    stripes["stored_length"] = lengths
    stripes["checksum"] = [xxh3_64(bytes(min(length, PAGE_BYTES))) for length in lengths]
    return dataclasses.replace(header, record_type=200, stripes=stripes)


@pytest.mark.parametrize("lengths", [[4097], [(1 << 32) - 1] * 128, [4096, 1], [100, 3985]])
def test_the_payload_of_an_unknown_record_is_never_read_beyond_its_end(lengths: list[int]) -> None:
    """Nothing bounds its stripes but this check: what follows it is not its payload, whatever the table says."""
    header = skippable_with_stripes(lengths, 4096)
    data = segment_of([]) + make_vectors.laid(header) + bytes(8 * PAGE_BYTES)
    parsed = parse_placed(data[PAGE_BYTES : 2 * PAGE_BYTES], UUID, SEGMENT_ID, PAGE_BYTES)
    read = CountingRead(data, PAGE_BYTES + header.record_bytes)
    with pytest.raises(CorruptRecord, match="stripe-entry"):
        check_payload(read, parsed)
    check_payload(read, skippable_with_stripes([100, 3984], 4096))


# --- the seal --------------------------------------------------------------------------------------------------------------

SEALED = make_vectors.mixed().sealed()
SEALED_TRAILER = Trailer.parse(SEALED[-PAGE_BYTES:])


def sought(data: bytes, store_uuid: bytes = UUID, segment_id: int = SEGMENT_ID) -> int | None:
    """Records that the seal lists, ``None`` without a seal. Raises ``CorruptRecord`` for a damaged table."""
    result = find_seal(CountingRead(data, len(data)), len(data), store_uuid=store_uuid, segment_id=segment_id)
    return None if result is None else len(result[1])


def test_a_segment_is_sealed_if_its_last_page_is_its_own_trailer_and_nothing_else() -> None:
    assert sought(SEALED) == 10
    assert sought(SEALED, store_uuid=OTHER_UUID) is None
    assert sought(SEALED, segment_id=SEGMENT_ID + 1) is None
    assert sought(SEALED + bytes(PAGE_BYTES)) is None and sought(SEALED + b"\0") is None
    assert sought(SEALED[:PAGE_BYTES] + SEALED) is None, "the size that follows from the trailer is not the file's"
    for pages in range(len(SEALED) // PAGE_BYTES):
        assert sought(SEALED[: PAGE_BYTES * pages]) is None
    assert sought(b"") is None


def retrailered(**fields: int) -> bytes:
    """The sealed segment with another trailer whose checksum is right."""
    return SEALED[:-PAGE_BYTES] + dataclasses.replace(SEALED_TRAILER, **fields).pack()


def test_a_whole_trailer_over_a_table_that_does_not_fit_says_sealed_and_damaged() -> None:
    """The trailer alone makes the file durable as a whole, so this is no torn tail."""
    assert sought(retrailered()) == 10
    for count in (0, 9, 11, 1 << 63):
        with pytest.raises(CorruptRecord, match="toc-counts"):
            sought(retrailered(record_count=count))
    for checksum in (0, SEALED_TRAILER.toc_checksum ^ 1):
        with pytest.raises(CorruptRecord, match="toc-checksum"):
            sought(retrailered(toc_checksum=checksum))
    with pytest.raises(CorruptRecord, match="toc-checksum"):
        sought(retrailered(toc_bytes=SEALED_TRAILER.toc_bytes - 1))


def test_a_table_that_lists_records_behind_the_seal_is_damage() -> None:
    log = make_vectors.mixed()
    log.builder.add(make_vectors.header_of(RecordType.TOMBSTONE, len(log.data), 20, key=b"k"))
    with pytest.raises(CorruptRecord, match="toc-counts"):
        sought(log.sealed())


def test_a_trailer_of_a_newer_version_is_unsupported() -> None:
    page = bytearray(SEALED[-PAGE_BYTES:])
    page[8:10] = b"\2\0"
    TRAILER_TABLE.seal(page)
    with pytest.raises(UnsupportedFormat):
        sought(SEALED[:-PAGE_BYTES] + bytes(page))


def test_the_image_of_a_sealed_segment_inside_a_block_does_not_end_the_log() -> None:
    """A store may hold blocks that are segments of another store, or of this one under another offset."""
    log = make_vectors.Log(pages=200)
    log.add(make_vectors.namespace_record)
    log.add(make_vectors.block, SEALED, Codec.RAW, 2)
    log.note(RecordType.TOMBSTONE, key=b"last")
    scan = scanned(log.unsealed())
    assert [header.offset for header in scan.records] == log.offsets and scan.end.kind is WalkEndKind.ZEROS
    damaged = make_vectors.flipped(log.unsealed(), log.offsets[1] + RECORD_TABLE.offsets["depth"])
    scan = scanned(damaged, durable_bytes=log.offsets[2])
    assert [header.offset for header in scan.records] == [log.offsets[0], log.offsets[2]]
    assert scan.damaged == [(log.offsets[1], log.offsets[2])]
