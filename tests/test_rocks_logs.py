"""Damage in RocksDB's own logs that it never comes back from is found before it is asked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvlode
from kvlode.engine.index import Index, IndexDamaged
from kvlode.engine.index_rocksdb import RocksFollowerIndex, RocksIndex
from kvlode.engine.index_snapshot import RocksSnapshotIndex
from model import block_bytes, descriptor

WRITER = """
import os, sys
from kvlode.engine.index_rocksdb import RocksIndex
index = RocksIndex(sys.argv[1])
for number in range(3):
    index.apply([(b"key %d" % number, b"value" * 20)])
index.sync()
os._exit(0)
"""


@pytest.fixture
def index_folder(tmp_path: Path) -> Path:
    """An index whose writer was killed: changes are in its log, not yet in tables."""
    folder = tmp_path / "index"
    subprocess.run([sys.executable, "-c", WRITER, folder], check=True, timeout=60)
    return folder


def flip_type_of_record(file: Path, number: int) -> None:
    """One bit of the type byte of a record: "full" becomes "full, recyclable"."""
    data = bytearray(file.read_bytes())
    position = 0
    for _ in range(number):
        position += 7 + int.from_bytes(data[position + 4 : position + 6], "little")
    assert data[position + 6] == 1
    data[position + 6] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("open_index", [RocksIndex, RocksFollowerIndex, RocksSnapshotIndex])
@pytest.mark.parametrize("pattern", ["MANIFEST-*", "*.log"])
def test_a_flipped_bit_that_rocksdb_loops_on_is_damage(index_folder: Path, pattern: str, open_index: Callable[[Path], Index]) -> None:
    flip_type_of_record(next(index_folder.glob(pattern)), 1)
    with pytest.raises(IndexDamaged, match="a log of the index is damaged"):
        open_index(index_folder)


def test_whole_logs_are_no_damage(index_folder: Path) -> None:
    index = RocksSnapshotIndex(index_folder)
    try:
        assert index.get_many([b"key 2"]) == [b"value" * 20]
    finally:
        index.close()


def test_records_that_span_blocks_are_walked_as_rocksdb_lays_them(tmp_path: Path) -> None:
    """Fragments and the padding at the end of a block; the values are full of the bytes that would be damage in a header."""
    folder = tmp_path / "index"
    with_lengths = [bytes([5, 6, 7, 8, 11]) * (size // 5) for size in range(1000, 40_000, 777)]
    index = RocksIndex(folder)
    try:
        for number, value in enumerate(with_lengths):
            index.apply([(b"%d" % number, value)])
        index.sync()
        follower = RocksFollowerIndex(folder)
        try:
            assert follower.get_many([b"%d" % number for number in range(len(with_lengths))]) == with_lengths
        finally:
            follower.close()
    finally:
        index.close()


def test_a_store_with_such_damage_opens_and_serves_its_blocks(tmp_path: Path) -> None:
    data = block_bytes(b"kept", 1, 100_000)
    with kvlode.open(tmp_path / "store", capacity="256MiB", buffer="8MiB") as store:
        assert store.namespace(descriptor()).put(b"kept", data) and store.flush()
    flip_type_of_record(next((tmp_path / "store" / "index").glob("MANIFEST-*")), 1)
    with kvlode.open(tmp_path / "store", capacity="256MiB", buffer="8MiB") as store:
        out = np.zeros(data.size, np.uint8)
        assert store.namespace(descriptor()).get_into(b"kept", out) is kvlode.Status.HIT
        assert np.array_equal(out, data)
        assert store.stats()["counters"]["index_rebuilds"] == 1
