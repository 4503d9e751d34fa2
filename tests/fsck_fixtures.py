"""Every problem that ``kvlode fsck`` knows, made on purpose: one way (or several) to damage a healthy store for each id.

A fixture damages exactly one thing behind the engine's back and says which blocks are lost by it. Damage below the checksums
(a wrong table with a right checksum, an index that points elsewhere) is made with the engine's own packing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fsck_stores import ONE, SEGMENT_BYTES, StoreUnderTest, fill, in_memory
from kvlode import Namespace
from kvlode.engine.catalog import META_PREFIX, Catalog, Checkpoint
from kvlode.engine.index import Index
from kvlode.engine.index_entry import IndexEntry
from kvlode.engine.segment_writer import index_entry
from kvlode.engine.stats import Counters
from kvlode.format.checksum import xxh3_64
from kvlode.format.layout import PAGE_BYTES, QUARANTINE_FOLDER, SEGMENTS_FOLDER, Codec, RecordType, round_up_pages, segment_name
from kvlode.format.record import RECORD_TABLE, RecordHeader
from kvlode.format.seal import SealBuilder, SealTable, Trailer
from kvlode.format.segment import SegmentHeader
from kvlode.format.superblock import Superblock
from kvlode.format.walk import find_seal, scan_unsealed
from kvlode.tools.fsck.check_space import QUARANTINE_FREE_BYTES
from kvlode.tools.index_access import GivenSource

Lost = set[tuple[Namespace, bytes]]
Damage = Callable[[StoreUnderTest], Lost]


@dataclass(frozen=True)
class Fixture:
    """One way to bring a problem about."""

    id: str
    name: str
    damage: Damage
    """Damages the store in place; returns the blocks that are lost by it."""
    path: str = ""
    """How the path of the finding begins; empty: not compared."""
    also: frozenset[str] = frozenset()
    """Ids that cannot but come with it."""
    after: frozenset[str] = frozenset()
    """Notes that the second run may have."""

    def __str__(self) -> str:
        return f"{self.id}-{self.name}" if self.name else self.id


FIXTURES: list[Fixture] = []


def fixture(problem_id: str, name: str = "", *, path: str = "", also: str = "", after: str = "") -> Callable[[Damage], Damage]:
    """Enter a damage into the list."""

    def enter(damage: Damage) -> Damage:
        FIXTURES.append(Fixture(problem_id, name, damage, path, frozenset(also.split()), frozenset(after.split())))
        return damage

    return enter


def healthy(blocks: int = 30) -> StoreUnderTest:
    """The store that the fixtures damage: several sealed segments in memory, see ``fsck_stores.fill``; 18 blocks are enough for all."""
    return fill(in_memory(), blocks)


def source_of(case: Fixture, target: StoreUnderTest) -> GivenSource:
    """The index as a check or a repair of the damaged store gets it."""
    return GivenSource(target.device, target.path, None if case.id == "IDX-MISSING" else target.index)


# --- looking into a store -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a block lies."""

    segment_id: int
    header: RecordHeader

    @property
    def offset(self) -> int:
        return self.header.offset


def uuid_of(target: StoreUnderTest) -> bytes:
    """The store's uuid, from its superblock."""
    return Superblock.parse(target.read(target.superblock_path)).store_uuid


def seal_of(target: StoreUnderTest, segment_id: int) -> tuple[Trailer, SealTable]:
    """Trailer and table of a sealed segment."""
    content = target.read(target.segment_path(segment_id))
    store_uuid = SegmentHeader.parse(content[:PAGE_BYTES]).store_uuid
    found = find_seal(lambda at, length: content[at : at + length], len(content), store_uuid=store_uuid, segment_id=segment_id)
    assert found is not None, f"segment {segment_id} is not sealed"
    return found


def headers_of(target: StoreUnderTest, segment_id: int) -> list[RecordHeader]:
    """The records of a segment without damage, sealed or not, in log order."""
    content = target.read(target.segment_path(segment_id))
    store_uuid = SegmentHeader.parse(content[:PAGE_BYTES]).store_uuid
    return scan_unsealed(
        lambda offset, length: content[offset : offset + length], end=len(content), store_uuid=store_uuid, segment_id=segment_id
    ).records


def places(target: StoreUnderTest) -> dict[tuple[bytes, bytes], Place]:
    """The newest record of every block, by namespace digest and key."""
    found: dict[tuple[bytes, bytes], Place] = {}
    for segment_id in target.segment_ids():
        for header in headers_of(target, segment_id):
            if header.record_type is RecordType.BLOCK:
                found[header.namespace, header.key] = Place(segment_id, header)
    return found


def place_of(target: StoreUnderTest, block: tuple[Namespace, bytes]) -> Place:
    """Where a block lies."""
    return places(target)[block[0].digest, block[1]]


def blocks_in(target: StoreUnderTest, segment_id: int) -> Lost:
    """The blocks that are served from a segment."""
    known = places(target)
    return {block for block in target.blocks if known[block[0].digest, block[1]].segment_id == segment_id}


def a_block(target: StoreUnderTest, wanted: Callable[[RecordHeader], bool] = lambda header: True) -> tuple[tuple[Namespace, bytes], Place]:
    """A live block whose record is like this, not in the first or the last segment where there are others."""
    known = places(target)
    ids = target.segment_ids()
    found = [(block, known[block[0].digest, block[1]]) for block in sorted(target.blocks, key=lambda b: (b[0].digest, b[1]))]
    matching = [pair for pair in found if wanted(pair[1].header)]
    assert matching, "the store has no such block"
    return next((pair for pair in matching if pair[1].segment_id not in (ids[0], ids[-1])), matching[0])


def quiet_segment(target: StoreUnderTest) -> int:
    """A segment between others that holds live blocks alone."""
    for segment_id in target.segment_ids()[1:-1]:
        headers = [header for header in headers_of(target, segment_id) if header.record_type is not RecordType.NAMESPACE]
        if len(headers) == len(blocks_in(target, segment_id)) > 1:
            return segment_id
    raise AssertionError("no segment between others holds live blocks alone")


# --- changing a store ---------------------------------------------------------------------------------------------


def changing_index(target: StoreUnderTest, puts: dict[bytes, bytes] | None = None, deletes: list[bytes] | None = None) -> None:
    """Change entries of the index behind the engine's back."""
    index = index_of(target)
    index.apply(list((puts or {}).items()), deletes or [])
    index.sync()


def index_of(target: StoreUnderTest) -> Index:
    assert target.index is not None, "only for stores in memory"
    return target.index


def entries_of(target: StoreUnderTest, segment_id: int) -> list[bytes]:
    """Keys of the index entries that point into a segment."""
    rows = ((ident, value) for ident, value in index_of(target).scan() if not ident.startswith(META_PREFIX))
    return [ident for ident, value in rows if IndexEntry.unpack(value).segment_id == segment_id]


def write_header(target: StoreUnderTest, header: RecordHeader) -> None:
    """Write a record's header page; its checksum is right."""
    page = bytearray(PAGE_BYTES)
    header.pack_into(page)
    target.write(target.segment_path(header.segment_id), header.offset, bytes(page))


def write_seal(target: StoreUnderTest, segment_id: int, headers: list[RecordHeader], *, at: int | None = None) -> None:
    """Seal a segment anew with these rows, whatever its records say."""
    trailer, _ = seal_of(target, segment_id)
    builder = SealBuilder()
    for header in headers:
        builder.add(header)
    offset = trailer.data_end if at is None else at
    sequence = max(header.record_seq for header in headers) + 1
    packed = builder.pack(
        store_uuid=trailer.store_uuid,
        segment_id=segment_id,
        epoch=trailer.epoch,
        offset=offset,
        record_seq=sequence,
        synced_bytes=offset,
        written_at_ns=headers[-1].written_at_ns,
    )
    path = target.segment_path(segment_id)
    target.write(path, offset, packed)
    target.truncate(path, offset + len(packed))


def unseal(target: StoreUnderTest, segment_id: int) -> int:
    """Take a segment's seal away, as if it had never been written; returns where the log ends."""
    path = target.segment_path(segment_id)
    segment_bytes = SegmentHeader.parse(target.read(path, 0, PAGE_BYTES)).segment_bytes
    end = seal_of(target, segment_id)[0].data_end
    target.truncate(path, end)
    target.truncate(path, segment_bytes)
    return end


def crashed(target: StoreUnderTest, blocks: int = 3) -> int:
    """Put and flush some blocks into a new segment, and cut the power; returns the id of the segment that is left open."""
    store = target.open()
    for number in range(blocks):
        target.put(store, ONE, b"late %d" % number, 100 + number, 6000)
        assert store.flush()
    assert target.index is not None
    device, index = target.device.crash(keep="none"), target.index.crash(target.index.unsynced_batches)  # type: ignore[attr-defined]
    target.device.power_off()  # type: ignore[attr-defined]
    store.close(30.0)
    target.device, target.index = device, index
    spares = [name for name in device.list_folder(f"{target.path}/{SEGMENTS_FOLDER}") if name.endswith(".new")]
    for name in spares:  # it may have been made by then or not
        device.remove(f"{target.path}/{SEGMENTS_FOLDER}/{name}")
    device.sync_folder(f"{target.path}/{SEGMENTS_FOLDER}")
    return target.segment_ids()[-1]


def new_segment_path(target: StoreUnderTest) -> str:
    return target.segment_path(target.segment_ids()[-1] + 1)


def noise(size: int, seed: int = 1) -> bytes:
    return np.random.default_rng(seed).bytes(size)


# --- superblock ---------------------------------------------------------------------------------------------------


@fixture("SB-MISSING", path="STORE")
def _superblock_missing(target: StoreUnderTest) -> Lost:
    target.device.remove(target.superblock_path)
    target.device.sync_folder(target.path)
    return set()


@fixture("SB-CRC", path="STORE")
def _superblock_damaged(target: StoreUnderTest) -> Lost:
    target.flip(target.superblock_path, 45)
    return set()


@fixture("SB-CRC", "zeros", path="STORE")
def _superblock_zeros(target: StoreUnderTest) -> Lost:
    target.replace(target.superblock_path, bytes(PAGE_BYTES))
    return set()


@fixture("SB-CRC", "cut", path="STORE")
def _superblock_cut(target: StoreUnderTest) -> Lost:
    target.truncate(target.superblock_path, 100)
    return set()


@fixture("SB-VERSION", path="STORE")
def _superblock_newer(target: StoreUnderTest) -> Lost:
    page = Superblock.parse(target.read(target.superblock_path))
    target.replace(target.superblock_path, dataclasses.replace(page, read_version=2).pack())
    return set(target.blocks)


@fixture("SB-LEFTOVER", path="STORE.tmp")
def _superblock_leftover(target: StoreUnderTest) -> Lost:
    target.replace(f"{target.superblock_path}.tmp", bytes(PAGE_BYTES))
    return set()


# --- segments -----------------------------------------------------------------------------------------------------


@fixture("SEG-NAME", path=SEGMENTS_FOLDER)
def _strange_name(target: StoreUnderTest) -> Lost:
    target.replace(f"{target.path}/{SEGMENTS_FOLDER}/notes.txt", b"not a segment")
    return set()


@fixture("SEG-SPARE", path=SEGMENTS_FOLDER)
def _spare(target: StoreUnderTest) -> Lost:
    target.replace(f"{target.path}/{SEGMENTS_FOLDER}/spare.new", bytes(PAGE_BYTES))
    return set()


@fixture("SEG-FREED", path=SEGMENTS_FOLDER)
def _freed(target: StoreUnderTest) -> Lost:
    first, second, *_, last = target.segment_ids()
    lost = blocks_in(target, first)
    changing_index(target, deletes=entries_of(target, first))
    page = SegmentHeader.parse(target.read(target.segment_path(last), 0, PAGE_BYTES))
    target.write(target.segment_path(last), 0, dataclasses.replace(page, first_live_segment=second).pack())
    return lost


@fixture("SEG-EMPTY", "zeros", path=SEGMENTS_FOLDER)
def _empty_zeros(target: StoreUnderTest) -> Lost:
    target.replace(new_segment_path(target), bytes(SEGMENT_BYTES))
    return set()


@fixture("SEG-EMPTY", "no bytes", path=SEGMENTS_FOLDER)
def _empty(target: StoreUnderTest) -> Lost:
    target.replace(new_segment_path(target), b"")
    return set()


@fixture("SEG-BLANK", path=SEGMENTS_FOLDER)
def _blank(target: StoreUnderTest) -> Lost:
    segment_id = quiet_segment(target)
    lost = blocks_in(target, segment_id)
    changing_index(target, deletes=entries_of(target, segment_id))
    path = target.segment_path(segment_id)
    target.replace(path, bytes(len(target.read(path))))
    return lost


@fixture("SEG-HDR-CRC", path=SEGMENTS_FOLDER)
def _header_damaged(target: StoreUnderTest) -> Lost:
    target.flip(target.segment_path(target.segment_ids()[1]), 50)
    return set()


@fixture("SEG-HDR-PLACE", path=SEGMENTS_FOLDER)
def _other_place(target: StoreUnderTest) -> Lost:
    target.replace(new_segment_path(target), target.read(target.segment_path(target.segment_ids()[0])))
    return set()


@fixture("SEG-ALIEN", path=SEGMENTS_FOLDER)
def _alien(target: StoreUnderTest) -> Lost:
    target.replace(new_segment_path(target), noise(5 * PAGE_BYTES))
    return set()


@fixture("SEG-UNSEALED", path=SEGMENTS_FOLDER)
def _unsealed(target: StoreUnderTest) -> Lost:
    crashed(target)
    return set()


@fixture("SEG-SEAL-MISSING", path=SEGMENTS_FOLDER)
def _seal_missing(target: StoreUnderTest) -> Lost:
    unseal(target, target.segment_ids()[1])
    return set()


@fixture("SEG-TAIL-TORN", path=SEGMENTS_FOLDER, also="SEG-UNSEALED")
def _torn_tail(target: StoreUnderTest) -> Lost:
    segment_id = crashed(target)
    last = headers_of(target, segment_id)[-1]
    target.write(target.segment_path(segment_id), last.offset + last.record_bytes, noise(3 * PAGE_BYTES))
    return set()


@fixture("SEG-SEAL-CRC", "record page", path=SEGMENTS_FOLDER)
def _seal_page_damaged(target: StoreUnderTest) -> Lost:
    segment_id = target.segment_ids()[1]
    target.flip(target.segment_path(segment_id), seal_of(target, segment_id)[0].data_end + 60)
    return set()


@fixture("SEG-SEAL-CRC", "table", path=SEGMENTS_FOLDER)
def _table_damaged(target: StoreUnderTest) -> Lost:
    segment_id = target.segment_ids()[1]
    target.flip(target.segment_path(segment_id), seal_of(target, segment_id)[0].toc_offset + 70)
    return set()


@fixture("SEG-SEAL-CRC", "trailer", path=SEGMENTS_FOLDER)
def _trailer_damaged(target: StoreUnderTest) -> Lost:
    segment_id = target.segment_ids()[1]
    target.flip(target.segment_path(segment_id), seal_of(target, segment_id)[0].file_bytes - PAGE_BYTES + 50)
    return set()


@fixture("SEG-SEAL-MISMATCH", path=SEGMENTS_FOLDER)
def _table_wrong(target: StoreUnderTest) -> Lost:
    segment_id = quiet_segment(target)
    headers = headers_of(target, segment_id)
    headers[-1] = dataclasses.replace(headers[-1], depth=headers[-1].depth + 9)
    write_seal(target, segment_id, headers)
    return set()


@fixture("SEG-CUT", path=SEGMENTS_FOLDER)
def _cut(target: StoreUnderTest) -> Lost:
    segment_id = quiet_segment(target)
    last = [header for header in headers_of(target, segment_id) if header.record_type is RecordType.BLOCK][-1]
    target.truncate(target.segment_path(segment_id), last.offset)
    changing_index(target, deletes=[last.namespace + last.key])
    return {block for block in target.blocks if (block[0].digest, block[1]) == (last.namespace, last.key)}


# --- records ------------------------------------------------------------------------------------------------------


@fixture("REC-HDR-CRC", "block", path=SEGMENTS_FOLDER)
def _block_header_damaged(target: StoreUnderTest) -> Lost:
    block, place = a_block(target)
    target.flip(target.segment_path(place.segment_id), place.offset + 130)
    return {block}


@fixture("REC-HDR-CRC", "last block of a segment", path=SEGMENTS_FOLDER)
def _last_header_damaged(target: StoreUnderTest) -> Lost:
    segment_id = quiet_segment(target)
    last = headers_of(target, segment_id)[-1]
    target.flip(target.segment_path(segment_id), last.offset + 130)
    return {block for block in target.blocks if (block[0].digest, block[1]) == (last.namespace, last.key)}


def _damaged_delete(target: StoreUnderTest, kind: RecordType) -> Lost:
    headers = [header for segment_id in target.segment_ids() for header in headers_of(target, segment_id)]
    header = next(header for header in headers if header.record_type is kind)
    target.flip(target.segment_path(header.segment_id), header.offset + 66)
    return set()


@fixture("REC-HDR-CRC", "tombstone", path=SEGMENTS_FOLDER)
def _tombstone_damaged(target: StoreUnderTest) -> Lost:
    return _damaged_delete(target, RecordType.TOMBSTONE)


@fixture("REC-HDR-CRC", "namespace drop", path=SEGMENTS_FOLDER)
def _drop_damaged(target: StoreUnderTest) -> Lost:
    return _damaged_delete(target, RecordType.NAMESPACE_DROP)


@fixture("REC-GAP", "in an open segment", path=SEGMENTS_FOLDER, also="SEG-UNSEALED")
def _gap(target: StoreUnderTest) -> Lost:
    segment_id = crashed(target)
    header = next(header for header in headers_of(target, segment_id) if header.key == b"late 1")
    target.flip(target.segment_path(segment_id), header.offset + 66)
    changing_index(target, deletes=[header.namespace + header.key])
    return {(ONE, b"late 1")}


@fixture("REC-GAP", "without a table", path=SEGMENTS_FOLDER, also="SEG-SEAL-CRC")
def _gap_without_table(target: StoreUnderTest) -> Lost:
    block, place = a_block(target)
    target.flip(target.segment_path(place.segment_id), seal_of(target, place.segment_id)[0].toc_offset + 70)
    target.flip(target.segment_path(place.segment_id), place.offset + 66)
    changing_index(target, deletes=[block[0].digest + block[1]])
    return {block}


@fixture("REC-UNKNOWN", path=SEGMENTS_FOLDER)
def _unknown(target: StoreUnderTest) -> Lost:
    block, place = a_block(target)
    page = bytearray(target.read(target.segment_path(place.segment_id), place.offset, PAGE_BYTES))
    page[RECORD_TABLE.offsets["version"]] = 2
    RECORD_TABLE.seal(page)
    target.write(target.segment_path(place.segment_id), place.offset, bytes(page))
    return {block}


@fixture("REC-NS-MISSING", path=SEGMENTS_FOLDER)
def _namespace_missing(target: StoreUnderTest) -> Lost:
    segment_id = quiet_segment(target)
    headers = headers_of(target, segment_id)
    first = next(header for header in headers if header.record_type is RecordType.NAMESPACE)
    write_seal(target, segment_id, [header for header in headers if header is not first])
    return set()


@fixture("REC-NS-DAMAGED", path=SEGMENTS_FOLDER, after="REC-NS-MISSING")
def _namespace_damaged(target: StoreUnderTest) -> Lost:
    segment_id = quiet_segment(target)
    first = next(header for header in headers_of(target, segment_id) if header.record_type is RecordType.NAMESPACE)
    target.flip(target.segment_path(segment_id), first.offset + PAGE_BYTES + 20)
    return set()


# --- payloads -----------------------------------------------------------------------------------------------------


@fixture("PAY-CRC", path=SEGMENTS_FOLDER)
def _payload_damaged(target: StoreUnderTest) -> Lost:
    block, place = a_block(target)
    target.flip(target.segment_path(place.segment_id), place.offset + PAGE_BYTES + 17)
    return {block}


@fixture("PAY-DECODE", path=SEGMENTS_FOLDER)
def _payload_undecodable(target: StoreUnderTest) -> Lost:
    """The payload of a compressed block is replaced, and everything above it made to agree: stripe, table, index."""
    block, place = a_block(target, lambda header: len(header.stripes) == 1 and header.stripes["codec"][0] != Codec.RAW)
    payload = noise(place.header.stored_length)
    stripes = place.header.stripes.copy()
    stripes["checksum"][0] = xxh3_64(payload)
    header = dataclasses.replace(place.header, stripes=stripes)
    target.write(target.segment_path(place.segment_id), place.offset + PAGE_BYTES, payload)
    write_header(target, header)
    write_seal(target, place.segment_id, headers_of(target, place.segment_id))
    entry = index_entry(header)
    assert entry is not None
    changing_index(target, {header.namespace + header.key: entry.pack()})
    return {block}


@fixture("PAY-RAW", path=SEGMENTS_FOLDER)
def _payload_other(target: StoreUnderTest) -> Lost:
    """The block is served all the same: readers check stripes, not the checksum of the raw bytes."""
    block, place = a_block(target)
    write_header(target, dataclasses.replace(place.header, raw_checksum=place.header.raw_checksum ^ 1))
    return {block}


@fixture("PAY-PAD", path=SEGMENTS_FOLDER)
def _padding(target: StoreUnderTest) -> Lost:
    _, place = a_block(target, lambda header: header.stored_length % PAGE_BYTES > 0)
    target.flip(target.segment_path(place.segment_id), place.offset + PAGE_BYTES + round_up_pages(place.header.stored_length) - 1)
    return set()


# --- index --------------------------------------------------------------------------------------------------------


@fixture("IDX-MISSING", path="index")
def _index_missing(target: StoreUnderTest) -> Lost:
    """The store in memory keeps its index in a variable: whoever checks it hands in none, see ``source_of``."""
    return set()


@fixture("IDX-UNREADABLE", path="index")
def _index_unreadable(target: StoreUnderTest) -> Lost:
    block, _ = a_block(target)
    assert target.index is not None
    target.index.damage([block[0].digest + block[1]])
    return set()


@fixture("IDX-FOREIGN", path="index")
def _index_foreign(target: StoreUnderTest) -> Lost:
    changing_index(target, dict([Catalog.identity_change(b"another store's!")]))
    return set()


@fixture("IDX-CHECKPOINT", path="index")
def _checkpoint(target: StoreUnderTest) -> Lost:
    at = Catalog(index_of(target), Counters()).checkpoint()
    assert at is not None
    changing_index(target, dict([Catalog.checkpoint_change(Checkpoint(at.segment_id + 5, 2 * PAGE_BYTES, at.sequence))]))
    return set()


@fixture("IDX-VALUE", path="index", also="IDX-ORPHAN")
def _index_value(target: StoreUnderTest) -> Lost:
    block, _ = a_block(target)
    changing_index(target, {block[0].digest + block[1]: b"\x09 an entry of another version"})
    return set()


@fixture("IDX-DANGLING", "no segment", path="index")
def _dangling(target: StoreUnderTest) -> Lost:
    _, place = a_block(target)
    entry = index_entry(place.header)
    assert entry is not None
    changing_index(target, {ONE.digest + b"nowhere": entry._replace(segment_id=target.segment_ids()[0] + (1 << 32)).pack()})
    return set()


@fixture("IDX-DANGLING", "no record", path="index")
def _dangling_record(target: StoreUnderTest) -> Lost:
    _, place = a_block(target, lambda header: header.stored_length > PAGE_BYTES)
    entry = index_entry(place.header)
    assert entry is not None
    changing_index(target, {ONE.digest + b"nowhere": entry._replace(offset=place.offset + PAGE_BYTES).pack()})
    return set()


@fixture("IDX-DELETED", path="index")
def _deleted(target: StoreUnderTest) -> Lost:
    place = places(target)[ONE.digest, b"key 004"]
    entry = index_entry(place.header)
    assert entry is not None
    changing_index(target, {ONE.digest + b"key 004": entry.pack()})
    return set()


@fixture("IDX-STALE", path="index")
def _stale(target: StoreUnderTest) -> Lost:
    block, place = a_block(target)
    entry = index_entry(place.header)
    assert entry is not None
    changing_index(target, {block[0].digest + block[1]: entry._replace(payload_checksum=entry.payload_checksum ^ 1).pack()})
    return set()


@fixture("IDX-ORPHAN", path="index")
def _orphan(target: StoreUnderTest) -> Lost:
    block, _ = a_block(target)
    changing_index(target, deletes=[block[0].digest + block[1]])
    return set()


@fixture("IDX-FREEING", path="index")
def _freeing(target: StoreUnderTest) -> Lost:
    first = target.segment_ids()[0]
    lost = blocks_in(target, first)
    changing_index(target, deletes=entries_of(target, first))
    return lost


@fixture("IDX-BEHIND", path="index")
def _behind(target: StoreUnderTest) -> Lost:
    """The index as it was before the last segment."""
    catalog = Catalog(index_of(target), Counters())
    at, last = catalog.checkpoint(), target.segment_ids()[-1]
    assert at is not None
    changing_index(target, dict([Catalog.checkpoint_change(Checkpoint(last, PAGE_BYTES, at.sequence))]), entries_of(target, last))
    return set()


# --- space --------------------------------------------------------------------------------------------------------


@fixture("SPC-STRANGE", path="notes.txt")
def _strange(target: StoreUnderTest) -> Lost:
    target.replace(f"{target.path}/notes.txt", b"to do")
    return set()


@fixture("QUA-NOTE", path=QUARANTINE_FOLDER)
def _without_note(target: StoreUnderTest) -> Lost:
    target.replace(f"{target.path}/{QUARANTINE_FOLDER}/{segment_name(1 << 20)}", b"moved by hand")
    return set()


@fixture("QUA-SIZE", path=QUARANTINE_FOLDER)
def _large_quarantine(target: StoreUnderTest) -> Lost:
    place = f"{target.path}/{QUARANTINE_FOLDER}/large"
    target.replace(place, b"x" * (QUARANTINE_FREE_BYTES + PAGE_BYTES))
    target.replace(f"{place}.json", b"{}")
    return set()
