"""Flipped bytes in every file of a store: whatever is damaged, no read ever gives a wrong byte, and the rest is served."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvlode
from fsck_stores import StoreUnderTest, fill, in_folder, in_memory, tiny
from kvlode import KvlodeError, Status
from kvlode.engine.index_memory import MemoryIndex

FLIPS = 250
"""Of the small store, in a default run; the slow run flips every byte that was ever written."""
INDEX_FLIPS = 18
DAMAGED_STORES = 30


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of stores log what they find; a failing test says what it saw itself."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def places(target: StoreUnderTest) -> list[tuple[str, int]]:
    """Every byte of the superblock and of the segments."""
    paths = [target.superblock_path, *(target.segment_path(number) for number in target.segment_ids())]
    return [(path, offset) for path in paths for offset in range(len(target.read(path)))]


def read_damaged(target: StoreUnderTest, *, lose_index: bool) -> dict[str, int]:
    """Open a damaged store and read all of it; ``statuses`` raises for a wrong byte. Counts of what came back."""
    if lose_index:
        target.index = MemoryIndex()
    try:
        store = target.open()
    except KvlodeError:
        return {"refused": 1}
    try:
        counts: dict[str, int] = {}
        for status in target.statuses(store).values():
            counts[status.name] = counts.get(status.name, 0) + 1
        return counts
    finally:
        target.close(store)


def flip_and_read(healthy: StoreUnderTest, chosen: list[tuple[str, int]], seed: int) -> dict[str, int]:
    total: dict[str, int] = {}
    chance = random.Random(seed)
    for path, offset in chosen:
        damaged = healthy.copy()
        damaged.flip(path, offset, 1 << chance.randrange(8))
        lost = chance.random() < 0.4
        try:
            counts = read_damaged(damaged, lose_index=lost)
        except AssertionError as error:
            raise AssertionError(f"byte {offset} of {path} flipped, index {'lost' if lost else 'kept'}: {error}") from error
        hits, expected = counts.get("HIT", 0), len(healthy.blocks)
        assert "refused" in counts or hits >= expected - 1 or lost, f"byte {offset} of {path}: only {counts} of {expected} blocks"
        for name, count in counts.items():
            total[name] = total.get(name, 0) + count
    return total


def test_no_flipped_byte_of_a_small_store_gives_a_wrong_byte(seed: int) -> None:
    healthy = tiny()
    chosen = random.Random(seed).sample(places(healthy), FLIPS)
    print(f"seed {seed}: {FLIPS} flips: {flip_and_read(healthy, chosen, seed)}")


@pytest.mark.exhaustive
@pytest.mark.timeout(3000)
def test_no_flipped_byte_at_all_gives_a_wrong_byte(seed: int) -> None:
    healthy = tiny()
    chosen = [(path, offset) for path, offset in places(healthy) if offset % 8 == seed % 8 or healthy.read(path, offset, 1) != b"\0"]
    print(f"seed {seed}: {len(chosen)} flips: {flip_and_read(healthy, chosen, seed)}")


def test_damage_in_many_places_gives_no_wrong_byte(seed: int) -> None:
    healthy = fill(in_memory())
    everywhere = places(healthy)
    for number in range(DAMAGED_STORES):
        chance = random.Random(seed + number)
        damaged = healthy.copy()
        for _ in range(chance.randint(2, 30)):
            path, offset = chance.choice(everywhere)
            length = min(chance.choice((1, 4, 64, 512, 4096)), len(damaged.read(path)) - offset)
            damaged.write(path, offset, chance.randbytes(length))
        try:
            read_damaged(damaged, lose_index=chance.random() < 0.5)
        except AssertionError as error:
            raise AssertionError(f"store {number}, seed {seed}: {error}") from error


# --- RocksDB's files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> StoreUnderTest:
    """A closed store on disk, its index in tables and in the log."""
    return fill(in_folder(tmp_path_factory.mktemp("flips") / "store"))


def flip_index(folder: StoreUnderTest, scratch: Path, seed: int, flips: int) -> dict[str, int]:
    """Copies of the store with one byte of an index file flipped each."""
    chance = random.Random(seed)
    files = [path for path in (Path(folder.path) / "index").iterdir() if path.is_file() and path.stat().st_size]
    names = sorted(path.name for path in files if not path.name.startswith("LOG"))  # what RocksDB tells people, and never reads
    outcomes: dict[str, int] = {}
    for number in range(flips):
        copy = scratch / f"copy-{number}"
        shutil.copytree(folder.path, copy)
        path = copy / "index" / names[number % len(names)]
        data = bytearray(path.read_bytes())
        place = chance.randrange(len(data))
        data[place] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        try:
            served = read_folder(folder, copy)
        except AssertionError as error:
            raise AssertionError(f"byte {place} of index/{path.name} flipped: {error}") from error
        expected = len(folder.blocks)
        assert served == expected, f"byte {place} of index/{path.name}: {served} of {expected} blocks after two openings"
        kind = path.suffix or path.name.split("-")[0]
        outcomes[kind] = outcomes.get(kind, 0) + 1
        shutil.rmtree(copy)
    return outcomes


def read_folder(folder: StoreUnderTest, copy: Path) -> int:
    """Open twice: what the first opening finds damaged is derived anew by the second. How many blocks the second serves."""
    hits = 0
    for _ in range(2):
        hits = 0
        with kvlode.open(copy, **folder.options) as store:
            for (namespace, key), data in folder.blocks.items():
                out = np.full(data.nbytes, 0xA5, np.uint8)
                status = store.namespace(namespace).get_into(key, out)
                assert status is not Status.HIT or np.array_equal(out, data), f"{key!r}: wrong bytes"
                hits += status is Status.HIT
            for namespace, key in folder.gone:
                assert store.namespace(namespace).contains([key]) == [False], f"{key!r} is back"
    return hits


def test_no_flipped_byte_of_the_index_gives_a_wrong_byte_or_loses_a_block(folder: StoreUnderTest, tmp_path: Path, seed: int) -> None:
    print(f"seed {seed}: {flip_index(folder, tmp_path, seed, INDEX_FLIPS)}")


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_no_flipped_byte_of_the_index_gives_a_wrong_byte_in_many_tries(folder: StoreUnderTest, tmp_path: Path, seed: int) -> None:
    print(f"seed {seed}: {flip_index(folder, tmp_path, seed + 1, 600)}")
