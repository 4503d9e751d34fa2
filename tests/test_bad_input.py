"""Bad input: an error that names what, where, expected, actual and what to do; the store stays usable and loses nothing."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvlode
from kvlode import (
    BlockSpace,
    CorruptRecord,
    DiskStore,
    InvalidBlock,
    InvalidConfig,
    InvalidKey,
    KvlodeError,
    Status,
    StoreClosed,
    UnsupportedFormat,
)
from kvlode.format.superblock import Superblock
from model import block_bytes, descriptor

DATA = block_bytes(b"kept", 1, 100_000)


def open_store(path: Path, **options: Any) -> DiskStore:
    return kvlode.open(path, **({"capacity": "256MiB", "buffer": "8MiB"} | options))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A closed store with one block."""
    with open_store(tmp_path / "store") as store:
        assert store.namespace(descriptor()).put(b"kept", DATA) and store.flush()
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> Iterator[DiskStore]:
    with open_store(folder) as opened:
        yield opened
        assert_kept(opened)


@pytest.fixture
def space(store: DiskStore) -> BlockSpace:
    return store.namespace(descriptor())


def assert_kept(store: DiskStore) -> None:
    """The flushed block is there, and another can be put."""
    out = np.zeros(DATA.size, np.uint8)
    assert store.namespace(descriptor()).get_into(b"kept", out) is Status.HIT
    assert np.array_equal(out, DATA)
    assert store.namespace(descriptor()).put(b"another", b"1")
    assert store.flush()


def assert_says(error: KvlodeError, *words: str) -> None:
    for word in words:
        assert word in str(error), f"{word!r} is not in: {error}"


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UnsupportedFormat) as caught:
        open_store(tmp_path)
    assert_says(caught.value, str(tmp_path), "expected", "found")
    assert caught.value.action
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("change", [{"read_version": 99, "write_version": 99}, {"incompat": 1 << 40}])
def test_a_newer_store_is_refused_and_untouched(folder: Path, change: dict[str, int]) -> None:
    block = Superblock.parse((folder / "STORE").read_bytes())
    (folder / "STORE").write_bytes(dataclasses.replace(block, **change).pack())
    before = {path: path.stat().st_mtime_ns for path in (folder / "segments").iterdir()}
    with pytest.raises(UnsupportedFormat, match=r"newer|feature"):
        open_store(folder)
    assert {path: path.stat().st_mtime_ns for path in (folder / "segments").iterdir()} == before
    (folder / "STORE").write_bytes(block.pack())
    with open_store(folder) as store:
        assert_kept(store)


def test_a_damaged_superblock_is_named(folder: Path) -> None:
    data = bytearray((folder / "STORE").read_bytes())
    data[50] ^= 1
    (folder / "STORE").write_bytes(data)
    with pytest.raises(CorruptRecord, match="STORE"):
        open_store(folder)


def test_a_store_that_has_lost_its_superblock_is_refused_and_keeps_its_segments(folder: Path) -> None:
    superblock = (folder / "STORE").read_bytes()
    (folder / "STORE").unlink()
    with pytest.raises(UnsupportedFormat) as caught:
        open_store(folder)
    assert_says(caught.value, str(folder), "STORE", "fsck --repair")
    (folder / "STORE").write_bytes(superblock)
    with open_store(folder) as store:
        assert store.namespace(descriptor()).contains([b"kept"]) == [True]


def test_another_block_size_or_dtype_is_another_namespace(store: DiskStore) -> None:
    for other in (descriptor(dtype="float32"), descriptor(block_bytes_max=1 << 20), descriptor(revision="r2")):
        assert store.namespace(other).contains([b"kept"]) == [False]


BAD_BLOCKS: list[tuple[str, Callable[[], Any]]] = [
    ("too large", lambda: bytes((4 << 20) + 1)),
    ("not contiguous", lambda: np.zeros((8, 8), np.uint8)[:, ::2]),
    ("a transposed tensor", lambda: torch.zeros(4, 6).T),
    ("text", lambda: "text"),
    ("nothing", lambda: None),
]


@pytest.mark.parametrize(("name", "make"), BAD_BLOCKS, ids=[name for name, _ in BAD_BLOCKS])
def test_blocks_that_cannot_be_stored_are_refused(space: BlockSpace, name: str, make: Callable[[], Any]) -> None:
    with pytest.raises(InvalidBlock) as caught:
        space.put(b"bad", make())
    assert_says(caught.value, "expected", "found")
    assert space.contains([b"bad"]) == [False]


@pytest.mark.parametrize("size", [DATA.size - 1, DATA.size + 1])
def test_a_destination_of_another_size_is_refused_untouched(space: BlockSpace, size: int) -> None:
    out = np.full(size, 0xA5, np.uint8)
    try:
        status = space.get_into(b"kept", out)
    except InvalidBlock as error:
        assert_says(error, str(size))
        assert (out == 0xA5).all()
    else:
        assert status is not Status.HIT


@pytest.mark.parametrize("key", [b"", b"k" * 256, "text"])
def test_keys_out_of_bounds_are_refused(space: BlockSpace, key: Any) -> None:
    with pytest.raises(InvalidKey, match="expected") as caught:
        space.put(key, b"1")
    assert caught.value.action or "255" in str(caught.value)


def test_metadata_over_its_limit_is_refused(space: BlockSpace) -> None:
    with pytest.raises(KvlodeError) as caught:
        space.put(b"bad", b"1", meta=b"m" * 513)
    assert_says(caught.value, "512", "513")
    assert space.put(b"good", b"1", meta=b"m" * 512)


def test_a_closed_store_says_that_it_is_closed(folder: Path) -> None:
    store = open_store(folder)
    space = store.namespace(descriptor())
    assert store.close()
    for call in (lambda: space.put(b"a", b"1"), lambda: space.get_into(b"kept", bytearray(1)), store.flush, store.stats):
        with pytest.raises(StoreClosed, match="closed"):
            call()
    assert store.close()


@pytest.mark.parametrize("options", [{"capacity": "lots"}, {"capacity": -1}, {"buffer": "0"}, {"gds": "maybe"}, {"no_such_option": 1}])
def test_options_that_cannot_work_are_named(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises((InvalidConfig, TypeError)) as caught:
        open_store(folder, **options)
    assert next(iter(options)) in str(caught.value)
    with open_store(folder) as store:
        assert_kept(store)


def test_a_capacity_too_small_for_one_block_names_the_one_that_would_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig) as caught, open_store(tmp_path / "small", capacity="64MiB") as store:
        store.namespace(descriptor(block_bytes_max=256 << 20))
    assert_says(caught.value, "capacity", "expected", "found")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(folder: Path) -> None:
    folder.chmod(0o500)
    try:
        with pytest.raises(KvlodeError) as caught:
            open_store(folder)
        assert_says(caught.value, str(folder))
    finally:
        folder.chmod(0o700)


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises((KvlodeError, OSError)) as caught:
        open_store(tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_segments_removed_under_an_open_store_are_misses(folder: Path) -> None:
    with open_store(folder) as store:
        space = store.namespace(descriptor())
        assert store._core.usage.loaded.wait(30.0)
        store._core.segments.close_files()  # what is open already would still be served
        for path in (folder / "segments").glob("*.seg"):
            path.unlink()
        out = np.zeros(DATA.size, np.uint8)
        assert space.get_into(b"kept", out) in (Status.MISS, Status.IO_ERROR)
        assert space.put(b"new", b"1")
        assert store.flush()
    with open_store(folder) as store:
        assert store.namespace(descriptor()).contains([b"kept", b"new"]) == [False, True]


def remove_while_it_grows(folder: Path) -> None:
    """The store makes its next segment ahead of time: a file may appear between the look into a folder and its removal."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
    raise AssertionError(f"{folder} cannot be removed")


def test_a_folder_removed_under_an_open_store_ends_in_bounded_time(folder: Path) -> None:
    store = open_store(folder, put_timeout_s=2.0)
    space = store.namespace(descriptor())
    remove_while_it_grows(folder)
    for i in range(40):
        space.put(b"%d" % i, block_bytes(b"%d" % i, i, 1 << 20))
    store.flush(10.0)
    out = np.zeros(DATA.size, np.uint8)
    assert space.get_into(b"kept", out) in (Status.HIT, Status.MISS, Status.IO_ERROR)
    store.close(20.0)
    with open_store(folder) as fresh:
        assert fresh.namespace(descriptor()).put(b"new", b"1")
        assert fresh.flush()
