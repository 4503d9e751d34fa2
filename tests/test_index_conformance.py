"""What every index promises, run against RocksDB and its in-memory twin."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kvlode.engine.index import BATCH_ENTRIES_MAX, Index
from kvlode.engine.index_memory import MemoryIndex
from kvlode.engine.index_rocksdb import RocksIndex
from kvlode.format.errors import StoreClosed

Reopen = Callable[[Any], Any]


class IndexConformance:
    """Inherit and provide the fixture ``index``, and ``reopen``, which closes an index and opens it again."""

    @staticmethod
    def reopen(index: Any) -> Any:
        raise NotImplementedError

    def test_values_come_in_the_order_of_the_keys_and_none_for_absent_ones(self, index: Index) -> None:
        index.apply([(b"b", b"2"), (b"a", b"1"), (b"empty", b"")])
        assert index.get_many([b"a", b"x", b"b", b"a", b"empty"]) == [b"1", None, b"2", b"1", b""]
        assert index.get_many((b"b",)) == [b"2"]
        assert index.get_many([]) == []

    def test_a_batch_applies_deletes_after_puts(self, index: Index) -> None:
        index.apply([(b"a", b"1"), (b"b", b"2")])
        index.apply([(b"a", b"3"), (b"a", b"4"), (b"c", b"5")], [b"c", b"b", b"never there"])
        assert list(index.scan()) == [(b"a", b"4")]

    def test_a_batch_above_the_limit_is_refused_whole(self, index: Index) -> None:
        puts = [(b"%04d" % n, b"v") for n in range(BATCH_ENTRIES_MAX)]
        with pytest.raises(ValueError, match="1000"):
            index.apply(puts, [b"x"])
        assert list(index.scan()) == []
        index.apply(puts)
        assert sum(1 for _ in index.scan()) == BATCH_ENTRIES_MAX

    def test_a_scan_keeps_to_its_prefix_and_start(self, index: Index) -> None:
        keys = [b"\x00", b"a", b"a\x00", b"ab", b"abc", b"b", b"\xff", b"\xff\xff"]
        index.apply([(key, key) for key in keys])
        assert [k for k, _ in index.scan()] == keys
        assert [k for k, _ in index.scan(b"a")] == [b"a", b"a\x00", b"ab", b"abc"]
        assert [k for k, _ in index.scan(b"a", b"ab")] == [b"ab", b"abc"]
        assert [k for k, _ in index.scan(b"a", b"\x00")] == [b"a", b"a\x00", b"ab", b"abc"]
        assert [k for k, _ in index.scan(b"a", b"b")] == []
        assert [k for k, _ in index.scan(b"\xff")] == [b"\xff", b"\xff\xff"]
        assert [k for k, _ in index.scan(b"zz")] == []

    def test_a_scan_shows_one_moment(self, index: Index) -> None:
        index.apply([(b"%04d" % n, b"old") for n in range(700)])
        scan = index.scan()
        seen = [next(scan)]
        index.apply([(b"%04d" % n, b"new") for n in range(700)], [b"0699"])
        seen += scan
        assert seen == [(b"%04d" % n, b"old") for n in range(700)]

    def test_keys_and_values_may_be_long_and_binary(self, index: Index) -> None:
        key, value = bytes(range(256)) + bytes(15), bytes(4096)
        index.apply([(key, value)])
        assert index.get_many([key]) == [value]
        assert list(index.scan(key)) == [(key, value)]

    def test_everything_is_there_after_a_clean_close(self, index: Index) -> None:
        index.apply([(b"synced", b"1"), (b"gone", b"1")])
        index.sync()
        index.apply([(b"not synced", b"2")], [b"gone"])
        index.close()
        again = self.reopen(index)
        assert list(again.scan()) == [(b"not synced", b"2"), (b"synced", b"1")]
        assert again.damaged() == 0
        again.close()

    def test_use_after_close_is_told_and_closing_twice_is_allowed(self, index: Index) -> None:
        index.apply([(b"%04d" % n, b"v") for n in range(1000)])
        scan = index.scan()
        index.close()
        index.close()
        calls: list[Callable[[], object]] = [
            lambda: index.get_many([b"a"]),
            lambda: index.apply([(b"a", b"b")]),
            index.sync,
            index.scan,
            index.size_bytes,
        ]
        for call in calls:
            with pytest.raises(StoreClosed):
                call()
        assert index.damaged() == 0
        if not isinstance(index, MemoryIndex):
            with pytest.raises(StoreClosed):
                list(scan)

    def test_its_size_is_known(self, index: Index) -> None:
        index.apply([(b"key%d" % n, bytes(100)) for n in range(100)])
        index.sync()
        assert index.size_bytes() >= 100 * 100


class TestMemoryIndex(IndexConformance):
    @pytest.fixture
    def index(self) -> MemoryIndex:
        return MemoryIndex()

    @staticmethod
    def reopen(index: MemoryIndex) -> MemoryIndex:
        return index.reopen()


class TestRocksIndex(IndexConformance):
    @pytest.fixture
    def index(self, tmp_path: Path) -> Iterator[RocksIndex]:
        index = RocksIndex(tmp_path / "index")
        yield index
        index.close()

    @staticmethod
    def reopen(index: RocksIndex) -> RocksIndex:
        return RocksIndex(index.path)


# --- the same operations against a dictionary --------------------------------------------------------------------------

SHORT = st.binary(max_size=3)
PREFIXES = st.sampled_from([b"", b"a", b"b", b"ab", b"\xff"])
SUFFIXES = st.sampled_from([b"", b"a", b"b", b"\xff", b"ab"])
KEYS = st.builds(lambda a, b: a + b + b"k", PREFIXES, SUFFIXES)


class IndexModel(RuleBasedStateMachine):
    """Applies, scans and reopens an index and a dictionary side by side."""

    opener: Callable[[str], Any]

    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="kvlode-test-")
        self.index = type(self).opener(self.folder.name)
        self.model: dict[bytes, bytes] = {}

    @rule(puts=st.lists(st.tuples(KEYS, SHORT), max_size=5), deletes=st.lists(KEYS, max_size=3))
    def apply(self, puts: list[tuple[bytes, bytes]], deletes: list[bytes]) -> None:
        self.index.apply(puts, deletes)
        self.model.update(puts)
        for key in deletes:
            self.model.pop(key, None)

    @rule(keys=st.lists(KEYS, max_size=6))
    def get(self, keys: list[bytes]) -> None:
        assert self.index.get_many(keys) == [self.model.get(key) for key in keys]

    @rule(prefix=PREFIXES, start=st.none() | KEYS)
    def scan(self, prefix: bytes, start: bytes | None) -> None:
        expected = [(k, v) for k, v in sorted(self.model.items()) if k.startswith(prefix) and (start is None or k >= start)]
        assert list(self.index.scan(prefix, start)) == expected

    @rule()
    def sync(self) -> None:
        self.index.sync()

    @rule()
    def reopen(self) -> None:
        self.index.close()
        self.index = self.index.reopen() if isinstance(self.index, MemoryIndex) else type(self).opener(self.folder.name)

    @invariant()
    def undamaged(self) -> None:
        if hasattr(self, "index"):
            assert self.index.damaged() == 0

    def teardown(self) -> None:
        if hasattr(self, "index"):
            self.index.close()
            self.folder.cleanup()


@pytest.mark.parametrize(("kind", "examples"), [("memory", 60), ("rocksdb", 12)])
def test_an_index_behaves_like_a_sorted_dictionary(kind: str, examples: int) -> None:
    machine = type("Machine", (IndexModel,), {})
    machine.opener = staticmethod((lambda folder: MemoryIndex()) if kind == "memory" else RocksIndex)
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=25))
