"""Every flipped bit and every truncation of a small segment: found, or in a byte that nobody reads; never a wrong value.

The file is divided into parts, without gap or overlap. Each part has the one reader that looks at its bytes, so a flip in a
part can change only what that reader says: for each bit it must refuse (``found``) or say the same as before (``harmless``).
Which parts are harmless is stated exactly: the padding of payloads and of the table of contents, as SPEC.md part 2 has it. What
a found flip costs is read from the whole file, for one bit of every part (every byte in the slow run), against SPEC.md part 10.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import make_vectors
from kvlode.format.codec import decode_stripe
from kvlode.format.errors import CorruptRecord, FormatError
from kvlode.format.layout import PAGE_BYTES, Codec, RecordType, round_up_pages
from kvlode.format.record import RecordHeader
from kvlode.format.seal import Trailer
from kvlode.format.segment import SegmentHeader
from kvlode.format.stripe import stripe_offsets, stripe_raw_bytes
from kvlode.format.walk import find_seal, parse_placed, scan_unsealed

UUID, SEGMENT_ID = make_vectors.STORE_UUID, make_vectors.SEGMENT_ID

# --- a segment with every type of record, and its parts -------------------------------------------------------------------


def small_log() -> make_vectors.Log:
    """Every type of record, every codec, payloads that end inside a page, a stripe with padding behind it."""
    log = make_vectors.Log(pages=40)
    log.add(make_vectors.namespace_record)
    log.add(make_vectors.block, make_vectors.floats("flips", 4096 + 606, 2), Codec.PLANES_ZSTD, 2, key=b"planes", meta=b"meta")
    log.add(make_vectors.block, b"words and words, " * 45, Codec.ZSTD, 1, key=b"zstd", synced_bytes=len(log.data))
    log.add(make_vectors.block, make_vectors.noise("flips", 333), Codec.RAW, 2, key=b"raw", synced_bytes=len(log.data))
    log.add(make_vectors.block, b"more words, " * 55, Codec.ZSTD, 1, key=b"gone")
    log.note(RecordType.TOMBSTONE, key=b"gone")
    log.note(RecordType.NAMESPACE_DROP, namespace=bytes(16), version_seq=make_vectors.seq(1))
    log.add(skippable)
    return log


def skippable(offset: int, counter: int, **fields: Any) -> bytes:
    """A record of an unknown type that may be skipped, with a payload in one raw stripe."""
    data = make_vectors.block(offset, counter, make_vectors.noise("skip", 99), Codec.RAW, 1, **fields)
    return make_vectors.resealed(make_vectors.resealed(data, 16, b"\xc8"), 20, b"\1\0")


LOG = small_log()
SEALED = LOG.sealed()
UNSEALED = LOG.data + bytes(2 * PAGE_BYTES)
SYNCED = len(LOG.data)
"""The unsealed file is read with this much known durable, as an index's checkpoint would have it."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes ``start`` to ``stop`` of the file and the check of the reader that looks at them; without one, nobody does."""

    name: str
    start: int
    stop: int
    check: Callable[[bytearray], object] | None


def check_stripe(data: bytearray, header: RecordHeader, index: int) -> bytes:
    start = header.offset + PAGE_BYTES + int(stripe_offsets(header.stripes)[index])
    entry = header.stripes[index]
    out = np.zeros(stripe_raw_bytes(header.raw_length, header.stripe_bytes, index), dtype=np.uint8)
    stored = np.frombuffer(data, dtype=np.uint8, count=int(entry["stored_length"]), offset=start)
    decode_stripe(stored, entry, out, header.element_size)
    return out.tobytes()


def check_header(data: bytearray, offset: int) -> RecordHeader:
    return parse_placed(data[offset : offset + PAGE_BYTES], UUID, SEGMENT_ID, offset)


def check_segment(data: bytearray) -> SegmentHeader:
    return SegmentHeader.parse(data[:PAGE_BYTES])


def check_trailer(data: bytearray) -> Trailer:
    return Trailer.parse(data[-PAGE_BYTES:])


def check_table(data: bytearray) -> bytes:
    found = find_seal(lambda offset, length: data[offset : offset + length], len(data), store_uuid=UUID, segment_id=SEGMENT_ID)
    assert found is not None, "the trailer is whole"
    return found[1].keys.__repr__().encode() + found[1].payload_checksum.tobytes()


def record_parts(data: bytes, offset: int) -> Iterator[Part]:
    header = RecordHeader.parse(data[offset : offset + PAGE_BYTES])
    name = f"{header.record_type!s} at {offset}"
    yield Part(f"header of {name}", offset, offset + PAGE_BYTES, functools.partial(check_header, offset=offset))
    position, payload = offset + PAGE_BYTES, offset + PAGE_BYTES
    for index, (start, entry) in enumerate(zip(stripe_offsets(header.stripes).tolist(), header.stripes, strict=True)):
        yield Part(f"padding before stripe {index} of {name}", position, payload + start, None)
        position = payload + start + int(entry["stored_length"])
        check = functools.partial(check_stripe, header=header, index=index)
        yield Part(f"stripe {index} of {name}", payload + start, position, check)
    yield Part(f"padding of {name}", position, offset + header.record_bytes, None)


def parts_of(data: bytes, *, sealed: bool) -> list[Part]:
    parts = [Part("segment header", 0, PAGE_BYTES, check_segment)]
    for offset in LOG.offsets:
        parts += record_parts(data, offset)
    end = len(LOG.data)
    if sealed:
        toc_start = end + PAGE_BYTES
        toc_stop = toc_start + Trailer.parse(data[-PAGE_BYTES:]).toc_bytes
        parts.append(Part("header of the seal", end, toc_start, functools.partial(check_header, offset=end)))
        parts.append(Part("table of contents", toc_start, toc_stop, check_table))
        parts.append(Part("padding of the table of contents", toc_stop, len(data) - PAGE_BYTES, None))
        parts.append(Part("trailer", len(data) - PAGE_BYTES, len(data), check_trailer))
    else:
        parts.append(Part("behind the log", end, len(data), None))
    return [part for part in parts if part.stop > part.start]


FILES = {"sealed": SEALED, "unsealed": UNSEALED}
PARTS = {name: parts_of(data, sealed=name == "sealed") for name, data in FILES.items()}
STRUCTURAL = ("segment header", "header of", "trailer")


@pytest.mark.parametrize("name", FILES)
def test_the_parts_cover_the_file_and_padding_is_all_that_nobody_reads(name: str) -> None:
    position = 0
    for part in PARTS[name]:
        assert part.start == position
        position = part.stop
    assert position == len(FILES[name])
    unread = [part for part in PARTS[name] if part.check is None]
    assert all(part.name.startswith("padding") or part.name == "behind the log" for part in unread)
    assert not any(any(FILES[name][part.start : part.stop]) for part in unread), "padding is written as zeros"
    read_bytes = sum(part.stop - part.start for part in PARTS[name] if part.check is not None)
    assert read_bytes + sum(part.stop - part.start for part in unread) == len(FILES[name])


# --- one bit: the reader that sees it ---------------------------------------------------------------------------------------


def undetected(data: bytearray, part: Part, bits: Iterator[int]) -> list[int]:
    """Bits (counted from the file's start) whose flip the part's reader does not refuse; the data is left as it was."""
    check, missed = part.check, []
    assert check is not None
    for bit in bits:
        data[bit >> 3] ^= 1 << (bit & 7)
        try:
            check(data)
            missed.append(bit)
        except CorruptRecord:
            pass
        finally:
            data[bit >> 3] ^= 1 << (bit & 7)
    return missed


def all_bits(part: Part) -> Iterator[int]:
    return iter(range(8 * part.start, 8 * part.stop))


def one_bit_a_byte(part: Part, seed: int) -> Iterator[int]:
    drawn = np.random.default_rng((seed, part.start)).integers(0, 8, part.stop - part.start).tolist()
    return iter(8 * (part.start + index) + bit for index, bit in enumerate(drawn))


def read_parts(name: str, structural: bool) -> list[Part]:
    return [part for part in PARTS[name] if part.check is not None and part.name.startswith(STRUCTURAL) == structural]


@pytest.mark.parametrize("part", read_parts("sealed", structural=True), ids=lambda part: part.name)
def test_every_flipped_bit_of_a_header_page_or_the_trailer_is_found(part: Part) -> None:
    """The same pages stand in the unsealed file, the seal's excepted."""
    assert undetected(bytearray(SEALED), part, all_bits(part)) == []


@pytest.mark.parametrize("part", read_parts("sealed", structural=False), ids=lambda part: part.name)
def test_a_flipped_bit_in_every_byte_of_the_stripes_and_the_table_is_found(part: Part, seed: int) -> None:
    assert undetected(bytearray(SEALED), part, one_bit_a_byte(part, seed)) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", read_parts("sealed", structural=False), ids=lambda part: part.name)
def test_every_flipped_bit_of_the_stripes_and_the_table_is_found(part: Part) -> None:
    assert undetected(bytearray(SEALED), part, all_bits(part)) == []


# --- one bit: what the whole file then says -----------------------------------------------------------------------------------


def described(data: bytes, name: str) -> dict[str, Any]:
    """Everything that is read from the file; of the unsealed one, with what was synced known."""
    if name == "sealed":
        return make_vectors.describe_segment(data)
    read = make_vectors.reader_of(data)
    scan = scan_unsealed(read, end=len(data), store_uuid=UUID, segment_id=SEGMENT_ID, durable_bytes=SYNCED)
    rows = [make_vectors._row_of_header(header) for header in scan.records]
    return {
        "header": make_vectors._segment_values(data),
        "end": {"kind": scan.end.kind.name.lower(), "offset": scan.end.offset, "damaged": [list(part) for part in scan.damaged]},
        "records": rows,
        "blocks": make_vectors._blocks(read, rows),
    }


WHOLE = {name: described(data, name) for name, data in FILES.items()}


def allowed(name: str, part: Part) -> Callable[[dict[str, Any]], bool]:
    """What SPEC.md part 10 lets a flip in this part cost: a rule for the description of the whole file."""
    whole = WHOLE[name]
    if part.name == "behind the log":
        return lambda found: _same_log(found, whole)
    if part.check is None:
        return lambda found: found == whole
    if part.name == "segment header":
        return lambda found: found == whole | {"header": None}
    if part.name.startswith("stripe"):
        return lambda found: _without_content(found, whole, part)
    if part.name.startswith("header of") and "seal" not in part.name:
        return lambda found: _without_record(found, whole, part, sealed=name == "sealed")
    if part.name == "header of the seal":  # the trailer points at the table
        return lambda found: found == whole
    return lambda found: _walked(found, whole)


def _record_start(part: Part) -> int:
    return int(part.name.rsplit(" ", 1)[1])


def _states(values: dict[str, Any], but: int | None = None) -> list[Any]:
    return [block for block in values["blocks"] if block["offset"] != but]


def _without_content(found: dict[str, Any], whole: dict[str, Any], part: Part) -> bool:
    """The block of the stripe is damaged (or was not wanted anyway); all else is as it was."""
    start = _record_start(part)
    own = [block["state"] for block in found["blocks"] if block["offset"] == start]
    same = all(found[key] == whole[key] for key in ("header", "end", "records"))
    return same and own in ([], ["damaged"], ["deleted"]) and _states(found, start) == _states(whole, start)


def _without_record(found: dict[str, Any], whole: dict[str, Any], part: Part, *, sealed: bool) -> bool:
    """Sealed: the table still lists the record. Unsealed: it is gone and its place is named; a lost delete gives its blocks back."""
    start = part.start
    if sealed:
        own = [block["state"] for block in found["blocks"] if block["offset"] == start]
        return (
            found["records"] == whole["records"]
            and own in ([], ["damaged"], ["deleted"])
            and _states(found, start) == _states(whole, start)
        )
    gone = [row for row in whole["records"] if row["offset"] == start]
    stop = start + PAGE_BYTES * gone[0]["record_pages"]
    rows_kept = found["records"] == [row for row in whole["records"] if row["offset"] != start]
    came_back = [row["key"] for row in gone if row["type"] == RecordType.TOMBSTONE]
    blocks = [block["state"] for block in _states(found, start) if block["key"] not in came_back]
    returned = [block["state"] for block in found["blocks"] if block["key"] in came_back]
    same = blocks == [block["state"] for block in _states(whole, start) if block["key"] not in came_back]
    return rows_kept and same and found["end"]["damaged"] == [[start, stop]] and set(returned) <= {"present"}


def _same_log(found: dict[str, Any], whole: dict[str, Any]) -> bool:
    """What follows the log is zeros or is not; either ends it at the same place."""
    end = found["end"] | {"kind": "zeros"}
    return found["end"]["kind"] in ("zeros", "break") and found | {"end": end} == whole


def _walked(found: dict[str, Any], whole: dict[str, Any]) -> bool:
    """Table or trailer lost: the walk finds the same records and blocks, and stops at the seal record."""
    return found["trailer"] is None and found["end"]["kind"] == "seal" and all(found[key] == whole[key] for key in ("records", "blocks"))


def wrong_after(name: str, places: Iterator[tuple[Part, int]]) -> list[tuple[str, int]]:
    """(part, bit) of every flip after which the whole file says something that part 10 does not allow."""
    data, wrong = bytearray(FILES[name]), []
    for part, bit in places:
        data[bit >> 3] ^= 1 << (bit & 7)
        try:
            if not allowed(name, part)(described(bytes(data), name)):
                wrong.append((part.name, bit))
        except FormatError as error:
            wrong.append((f"{part.name}: {error}", bit))
        data[bit >> 3] ^= 1 << (bit & 7)
    return wrong


@pytest.mark.parametrize("name", FILES)
def test_a_flip_costs_what_the_specification_says_and_no_more(name: str, seed: int) -> None:
    rng = np.random.default_rng((seed, len(name)))
    places = ((part, int(bit)) for part in PARTS[name] for bit in rng.integers(8 * part.start, 8 * part.stop, 12))
    assert wrong_after(name, places) == []


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", FILES)
def test_a_flip_in_every_byte_costs_what_the_specification_says_and_no_more(name: str, seed: int) -> None:
    places = ((part, bit) for part in PARTS[name] for bit in one_bit_a_byte(part, seed))
    assert wrong_after(name, places) == []


# --- truncation -----------------------------------------------------------------------------------------------------------------


def wrong_lengths(log: make_vectors.Log, lengths: range) -> list[int]:
    """Lengths at which the cut file is not read as: not sealed, the records that end before the cut, nothing else."""
    data, wrong = log.sealed(), []
    place = {"store_uuid": UUID, "segment_id": SEGMENT_ID}
    records = [RecordHeader.parse(data[offset : offset + PAGE_BYTES]) for offset in log.offsets]
    for length in lengths:
        cut = memoryview(data)[:length]

        def read(offset: int, size: int, cut: memoryview = cut) -> memoryview:
            return cut[offset : offset + size]

        seal_in = length >= len(log.data) + PAGE_BYTES
        expected = [header for header in records if header.offset + header.record_bytes <= length]
        scan = scan_unsealed(read, end=length, **place)
        if (
            find_seal(read, length, **place) is not None
            or scan.records != expected
            or (scan.end.seal is not None) != seal_in
            or scan.damaged
        ):
            wrong.append(length)
    return wrong


def test_a_file_cut_at_any_length_is_torn_and_keeps_the_records_before_the_cut() -> None:
    log = make_vectors.Log(pages=16)
    log.add(make_vectors.block, b"The quick brown fox", Codec.RAW, 1)
    assert wrong_lengths(log, range(len(log.sealed()))) == []


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_a_file_with_every_type_cut_at_any_length_is_torn_and_keeps_the_records_before_the_cut() -> None:
    assert wrong_lengths(LOG, range(len(SEALED))) == []


def test_a_header_page_cut_at_any_length_is_refused() -> None:
    """Every structure, alone: none is read from less than its page."""
    parsers = [(SEALED[:PAGE_BYTES], SegmentHeader.parse), (SEALED[-PAGE_BYTES:], Trailer.parse)]
    parsers += [(SEALED[offset : offset + PAGE_BYTES], RecordHeader.parse) for offset in (*LOG.offsets, len(LOG.data))]
    for page, parse in parsers:
        for length in range(PAGE_BYTES):
            with pytest.raises(CorruptRecord):
                parse(page[:length])


def test_the_sizes_of_the_test_files_are_what_the_lists_above_assume() -> None:
    assert len(SEALED) == len(LOG.data) + 2 * PAGE_BYTES + round_up_pages(Trailer.parse(SEALED[-PAGE_BYTES:]).toc_bytes)
    assert {row["type"] for row in WHOLE["sealed"]["records"]} == {1, 2, 3, 4, 200}
    assert [block["state"] for block in WHOLE["sealed"]["blocks"]] == ["present", "present", "present", "deleted"]
