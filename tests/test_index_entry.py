"""The packed index entry: one fixed size, exact in both directions, and whole seal tables at once."""

from __future__ import annotations

import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlode.engine.catalog import Catalog
from kvlode.engine.index import IndexDamaged
from kvlode.engine.index_entry import ENTRY_BYTES, ENTRY_DTYPE, IndexEntry, expires_and_version, pack_table
from kvlode.engine.index_memory import MemoryIndex
from kvlode.engine.stats import Counters

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)
ENTRIES = st.builds(
    IndexEntry,
    version_seq=U64,
    expires_at_ns=U64,
    segment_id=U64,
    offset=U64,
    raw_length=U64,
    stored_length=U64,
    record_seq=U64,
    written_at_ns=U64,
    payload_checksum=U64,
    record_pages=U32,
    depth=U32,
    parent=st.binary(min_size=16, max_size=16),
    codec=st.integers(0, 255),
)


@given(ENTRIES)
def test_an_entry_survives_packing_and_shows_its_sequence_and_expiry_without_unpacking(entry: IndexEntry) -> None:
    value = entry.pack()
    assert len(value) == ENTRY_BYTES == ENTRY_DTYPE.itemsize
    assert IndexEntry.unpack(value) == entry
    assert expires_and_version(value) == (entry.expires_at_ns, entry.version_seq)


@given(ENTRIES)
def test_the_array_type_reads_what_pack_writes(entry: IndexEntry) -> None:
    row = np.frombuffer(entry.pack(), ENTRY_DTYPE)[0]
    for name, value in entry._asdict().items():
        assert (row[name].tobytes() if name == "parent" else int(row[name])) == value


@given(st.binary(max_size=2 * ENTRY_BYTES))
def test_bytes_of_another_size_or_version_are_damage_and_nothing_else(value: bytes) -> None:
    if len(value) == ENTRY_BYTES and value[0] == 1:
        IndexEntry.unpack(value)
        return
    with pytest.raises(IndexDamaged, match="layout"):
        IndexEntry.unpack(value)


def _table(entries: list[IndexEntry], parents: np.ndarray) -> types.SimpleNamespace:
    names = [name for name in IndexEntry._fields if name not in ("segment_id", "offset", "parent")]
    columns = {name: np.array([getattr(e, name) for e in entries], dtype=np.uint64) for name in names}
    return types.SimpleNamespace(**columns, page=np.array([e.offset // 4096 for e in entries], dtype=np.uint32), parent=parents)


@given(st.lists(ENTRIES, max_size=8), st.integers(0, 2**64 - 1), st.booleans())
def test_a_table_packs_to_the_same_bytes_as_its_rows_one_by_one(entries: list[IndexEntry], segment_id: int, as_void: bool) -> None:
    entries = [e._replace(segment_id=segment_id, offset=e.offset % 2**32 * 4096) for e in entries]
    parents = np.frombuffer(b"".join(e.parent for e in entries), np.uint8).reshape(-1, 16)
    table = _table(entries, parents.view("V16").reshape(-1) if as_void else parents)
    assert pack_table(table, segment_id) == [e.pack() for e in entries]
    rows = list(range(0, len(entries), 2))
    assert pack_table(table, segment_id, rows) == [entries[row].pack() for row in rows]
    mask = np.arange(len(entries)) % 2 == 1
    assert pack_table(table, segment_id, mask) == [e.pack() for e in entries[1::2]]


@pytest.mark.parametrize("length", [0, 1, 16])
def test_a_value_too_short_to_say_anything_is_of_an_absent_key(length: int) -> None:
    index = MemoryIndex({b"n" * 16 + b"key": bytes(length)})
    assert Catalog(index, Counters()).live([b"n" * 16 + b"key"], now_ns=5) == [False]
