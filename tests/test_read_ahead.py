"""The index's tables are read once at opening, newest first, and only as many as fit."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

import kvlode
from kvlode.engine import index_open
from kvlode.engine.index_open import read_ahead


class Reading:
    """A file that counts what was read of it."""

    def __init__(self, file: Any, read_bytes: dict[str, int]) -> None:
        self._file, self._read_bytes = file, read_bytes

    def readinto(self, memory: bytearray) -> int:
        count = self._file.readinto(memory)
        name = Path(self._file.name).name
        self._read_bytes[name] = self._read_bytes.get(name, 0) + count
        return int(count)

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes read by file name, in the order of the first read."""
    counts: dict[str, int] = {}

    def opened(path: Path, mode: str, *, buffering: int) -> Reading:
        return Reading(builtins.open(path, mode, buffering=buffering), counts)

    monkeypatch.setattr(index_open, "open", opened, raising=False)
    return counts


def tables(folder: Path, *sizes: int) -> None:
    index = folder / "index"
    index.mkdir()
    for number, size in enumerate(sizes):
        (index / f"{number:06}.sst").write_bytes(bytes(size))
    (index / "000009.log").write_bytes(b"log")


def test_all_tables_are_read_to_their_ends_newest_first(tmp_path: Path, read_bytes: dict[str, int]) -> None:
    tables(tmp_path, 10, (2 << 20) + 5, 30)
    read_ahead(str(tmp_path))
    assert list(read_bytes.items()) == [("000002.sst", 30), ("000001.sst", (2 << 20) + 5), ("000000.sst", 10)]


def test_what_does_not_fit_is_left_to_the_lookups(tmp_path: Path, read_bytes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_open, "READ_AHEAD_BYTES_MAX", 55)
    tables(tmp_path, 10, 20, 30)
    read_ahead(str(tmp_path))
    assert list(read_bytes) == ["000002.sst", "000001.sst"]


def test_a_table_that_cannot_be_read_is_passed_over(tmp_path: Path, read_bytes: dict[str, int]) -> None:
    tables(tmp_path, 10, 20)
    (tmp_path / "index" / "000002.sst").mkdir()
    (tmp_path / "index" / "000003.sst").symlink_to("vanished")
    read_ahead(str(tmp_path))
    assert list(read_bytes) == ["000001.sst", "000000.sst"]


def test_a_store_without_tables_opens(tmp_path: Path, read_bytes: dict[str, int]) -> None:
    read_ahead(str(tmp_path / "missing"))
    with kvlode.open(tmp_path / "store", capacity="256MiB", buffer="8MiB"):
        pass
    assert read_bytes == {}
