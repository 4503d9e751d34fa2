"""The index's tables are read ahead at opening, newest first, and only as many as fit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import kvlode
from kvlode.engine import index_open
from kvlode.engine.index_open import read_ahead


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that the system was asked to read."""
    names: list[str] = []

    def note(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_WILLNEED)
        names.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(os, "posix_fadvise", note)
    return names


def tables(folder: Path, *sizes: int) -> None:
    index = folder / "index"
    index.mkdir()
    for number, size in enumerate(sizes):
        (index / f"{number:06}.sst").write_bytes(bytes(size))
    (index / "000009.log").write_bytes(b"log")


def test_all_tables_are_asked_for_newest_first(tmp_path: Path, advised: list[str]) -> None:
    tables(tmp_path, 10, 20, 30)
    read_ahead(str(tmp_path))
    assert advised == ["000002.sst", "000001.sst", "000000.sst"]


def test_what_does_not_fit_is_left_to_the_lookups(tmp_path: Path, advised: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_open, "READ_AHEAD_BYTES_MAX", 55)
    tables(tmp_path, 10, 20, 30)
    read_ahead(str(tmp_path))
    assert advised == ["000002.sst", "000001.sst"]


def test_a_store_without_tables_opens(tmp_path: Path, advised: list[str]) -> None:
    read_ahead(str(tmp_path / "missing"))
    with kvlode.open(tmp_path / "store", capacity="256MiB", buffer="8MiB"):
        pass
    assert advised == []


def test_a_file_system_without_the_advice_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*arguments: int) -> None:
        asked.append(arguments)
        raise OSError("not here")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    tables(tmp_path, 10, 20)
    read_ahead(str(tmp_path))
    assert len(asked) == 1
