"""What the catalog and the commit thread make of an index that refuses, fails to be opened again, or is damaged in between."""

from __future__ import annotations

from collections.abc import Sequence

from kvlode.engine.catalog import Catalog
from kvlode.engine.index import IndexDamaged, IndexWriteError
from kvlode.engine.index_entry import IndexEntry
from kvlode.engine.index_memory import MemoryIndex
from kvlode.engine.stats import Counters

NAMESPACE = bytes(range(16))


class RefusingIndex(MemoryIndex):
    """Takes no batch while ``full``, syncs nothing, and cannot be opened again."""

    full = True

    def apply(self, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes] = ()) -> None:
        if self.full:
            raise IndexWriteError("no room")
        super().apply(puts, deletes)

    def sync(self) -> None:
        raise IndexWriteError("no sync")

    def open_anew(self) -> None:
        raise IndexDamaged("its head is gone")


def test_a_drop_that_the_index_has_refused_is_in_force_all_the_same() -> None:
    catalog = Catalog(RefusingIndex(), Counters())
    assert not catalog.change(dict([Catalog.floor_change(NAMESPACE, 7)]))
    catalog.load_floors()
    assert catalog.floors == {NAMESPACE: 7}


def test_an_index_that_is_found_damaged_when_it_is_opened_again_keeps_its_changes_waiting() -> None:
    index, counters = RefusingIndex(), Counters()
    index.full = False
    catalog = Catalog(index, counters)
    assert catalog.change({b"key": b"value"})
    for _ in range(2):
        assert not catalog.sync()
    assert catalog.waiting_changes == 1 and catalog.values([b"key"]) == [b"value"]
    assert counters.snapshot()["index_write_errors"] == 2


def test_a_block_that_is_hidden_is_absent_at_once_and_a_newer_one_is_not() -> None:
    catalog = Catalog(MemoryIndex(), Counters())
    ident = NAMESPACE + b"key"
    old = IndexEntry(1, 0, 5, 4096, 10, 10, 1, 1, 1, 2)
    catalog.change({ident: old.pack()})
    catalog.hide(ident, old.segment_id, old.offset)
    assert catalog.find([ident]) == [None] and catalog.live([ident], 1) == [False]
    catalog.change({ident: old._replace(offset=8192).pack()})
    assert catalog.live([ident], 1) == [True]
    catalog.change({ident: old.pack()})
    assert catalog.drop_if_at([(ident, old.segment_id, old.offset)]) == [ident]
    catalog.change({ident: old.pack()})
    assert catalog.live([ident], 1) == [True], "it stays hidden although it is put again"
