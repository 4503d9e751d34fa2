"""Stores that this version cannot write: refused, moved away whole, or removed, as ``on_incompatible`` says; and what is never touched."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvlode
from kvlode import DiskStore, InvalidConfig, KvlodeError, Status, StoreLocked, UnsupportedFormat
from kvlode.engine import incompatible
from kvlode.format.checksum import xxh3_64
from kvlode.format.layout import PAGE_BYTES
from kvlode.gds.device import Device
from kvlode.gds.posix import PosixDevice
from kvlode.gds.wrapping import WrappingDevice
from model import descriptor

SPACE = descriptor(block_bytes_max=64 << 10)
BLOCK = np.arange(20_000, dtype=np.uint32).view(np.uint8)[:50_000].copy()


def open_here(folder: Path, **options: Any) -> DiskStore:
    small: dict[str, Any] = {"capacity": "64MiB", "buffer": "4MiB", "segment_bytes": 1 << 20, "gds": "off"}
    return kvlode.open(folder, **(small | options))  # type: ignore[return-value]


def change_superblock(folder: Path, offset: int, value: bytes, *, valid: bool = True) -> None:
    """Write into the superblock; ``valid`` keeps its checksum right, as a newer version would write it."""
    page = bytearray((folder / "STORE").read_bytes())
    page[offset : offset + len(value)] = value
    if valid:
        page[PAGE_BYTES - 8 :] = xxh3_64(bytes(page[: PAGE_BYTES - 8])).to_bytes(8, "little")
    (folder / "STORE").write_bytes(page)


BREAKS: dict[str, Callable[[Path], None]] = {
    "a newer format": lambda folder: change_superblock(folder, 8, b"\x02\x00"),
    "a newer format to write": lambda folder: change_superblock(folder, 12, b"\x02\x00"),
    "an unknown incompat bit": lambda folder: change_superblock(folder, 32, b"\x01"),
    "an unknown ro_compat bit": lambda folder: change_superblock(folder, 24, b"\x01"),
    "a damaged superblock": lambda folder: change_superblock(folder, 41, b"\xff\xfe", valid=False),
    "a superblock of zeros": lambda folder: (folder / "STORE").write_bytes(bytes(PAGE_BYTES)) and None,
    "no superblock": lambda folder: (folder / "STORE").unlink(),
}


@pytest.fixture(params=BREAKS)
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A store with one block that this version cannot write."""
    folder = tmp_path / "store"
    fill(folder)
    BREAKS[request.param](folder)
    return folder


def fill(folder: Path) -> None:
    with open_here(folder) as store:
        assert store.namespace(SPACE).put(b"old", BLOCK) and store.flush()


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "LOCK"}


def set_aside(folder: Path) -> list[Path]:
    return sorted(folder.parent.glob(folder.name + ".set-aside-*"))


def assert_empty_and_works(store: DiskStore) -> None:
    space = store.namespace(SPACE)
    assert space.contains([b"old"]) == [False]
    out = np.zeros(BLOCK.nbytes, np.uint8)
    assert space.put(b"new", BLOCK) and store.flush() and space.get_into(b"new", out) is Status.HIT


def test_by_default_an_incompatible_store_is_an_error_and_stays_as_it_is(broken: Path) -> None:
    before = content(broken)
    with pytest.raises(KvlodeError):
        open_here(broken)
    assert content(broken) == before and not set_aside(broken)


def test_set_aside_moves_everything_and_starts_empty(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = content(broken)
    with caplog.at_level(logging.WARNING, logger="kvlode"), open_here(broken, on_incompatible="set_aside") as store:
        assert_empty_and_works(store)
        (moved,) = set_aside(broken)
        assert content(moved) == before
        assert str(moved) in caplog.text and "incompatible" in caplog.text
        (note,) = [d for d in store.stats()["decisions"] if d["event"] == "store_replaced"]
        assert (note["how"], note["moved_to"]) == ("set_aside", str(moved)) and note["reason"]
        assert store.stats()["used_bytes"] <= store.stats()["capacity_bytes"]
    with open_here(broken) as store:  # a compatible store now, whatever is asked for
        assert store.namespace(SPACE).contains([b"new"]) == [True]
    with open_here(broken, on_incompatible="set_aside") as store:
        assert store.namespace(SPACE).contains([b"new"]) == [True]
        assert not [d for d in store.stats()["decisions"] if d["event"] == "store_replaced"]
    assert set_aside(broken) == [moved]


def test_fresh_removes_the_store_and_starts_empty(broken: Path) -> None:
    uuid = (broken / "STORE").read_bytes()[40:56] if (broken / "STORE").exists() else b""
    segments = set(os.listdir(broken / "segments"))
    with open_here(broken, on_incompatible="fresh") as store:
        assert_empty_and_works(store)
        assert bytes.fromhex(store.stats()["store_uuid"]) != uuid
        assert [d["how"] for d in store.stats()["decisions"] if d["event"] == "store_replaced"] == ["fresh"]
    assert not set_aside(broken)
    for name in segments & set(os.listdir(broken / "segments")):
        assert (broken / "segments" / name).read_bytes()[16:32] != uuid


def test_fresh_touches_nothing_in_a_folder_that_holds_other_files(tmp_path: Path) -> None:
    for number, name in enumerate(("notes.txt", "segments/notes.txt")):
        folder = tmp_path / f"store {number}"
        fill(folder)
        (folder / name).write_text("mine")
        BREAKS["an unknown incompat bit"](folder)
        before = content(folder)
        with pytest.raises(UnsupportedFormat, match=r"notes\.txt"):
            open_here(folder, on_incompatible="fresh")
        assert content(folder) == before
        with open_here(folder, on_incompatible="set_aside") as store:
            assert_empty_and_works(store)
        assert content(set_aside(folder)[0]) == before


@pytest.mark.parametrize("how", ["set_aside", "fresh"])
def test_a_folder_without_a_sign_of_a_store_is_an_error_and_stays_as_it_is(tmp_path: Path, how: str) -> None:
    folders = {"photos": {"a.jpg": b"jpg"}, "other": {"STORE": b"something else" * 400}, "zeros": {"STORE": bytes(PAGE_BYTES)}}
    for name, files in folders.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        with pytest.raises(KvlodeError):
            open_here(folder, on_incompatible=how)
        assert content(folder) == files and not set_aside(folder)


@pytest.mark.parametrize("how", ["set_aside", "fresh"])
def test_a_store_whose_writer_runs_is_locked_and_stays_as_it_is(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "store"
    fill(folder)
    BREAKS["a newer format"](folder)
    before = content(folder)
    device = PosixDevice(threads=1)
    lock = device.lock(str(folder / "LOCK"))
    assert lock is not None
    try:
        with pytest.raises(StoreLocked):
            open_here(folder, on_incompatible=how)
        with pytest.raises(UnsupportedFormat):  # followers always refuse
            open_here(folder, on_incompatible=how, on_locked="follow")
    finally:
        lock.release()
        device.close()
    assert content(folder) == before and not set_aside(folder)
    with pytest.raises(UnsupportedFormat):
        kvlode.follow(folder, gds="off", on_incompatible=how)
    assert content(folder) == before


class _Killed(BaseException):
    pass


class _Mortal(WrappingDevice):
    """Ends the process, as it were, at the call with this number."""

    def __init__(self, inner: Device, calls: int) -> None:
        super().__init__(inner)
        self.calls = calls

    def count(self) -> None:
        if not self.calls:
            raise _Killed
        self.calls -= 1

    def remove(self, path: str) -> None:
        self.count()
        self.inner.remove(path)

    def sync_folder(self, path: str) -> None:
        self.count()
        self.inner.sync_folder(path)


def test_fresh_that_was_interrupted_anywhere_is_finished_by_the_next_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = incompatible._remove
    for calls in range(40):
        folder = tmp_path / f"store {calls}"
        fill(folder)
        BREAKS["an unknown incompat bit"](folder)
        killed = False
        with monkeypatch.context() as patch:
            patch.setattr(incompatible, "_remove", lambda device, path, calls=calls: remove(_Mortal(device, calls), path))
            try:
                open_here(folder, on_incompatible="fresh").close()
            except _Killed:
                killed = True
        with open_here(folder, on_incompatible="fresh") as store:
            assert_empty_and_works(store)
        if not killed:
            assert calls > 5
            return
    raise AssertionError("it never finished")


def test_set_aside_that_was_interrupted_behind_the_rename_is_finished_by_the_next_opening(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    fill(folder)
    BREAKS["a newer format"](folder)
    folder.rename(tmp_path / "store.set-aside-20260101T000000Z")  # all that a crash leaves
    with open_here(folder, on_incompatible="set_aside") as store:
        assert_empty_and_works(store)
    assert len(set_aside(folder)) == 1


def test_a_link_to_the_folder_goes_on_leading_to_the_store(tmp_path: Path) -> None:
    folder, link = tmp_path / "drive" / "store", tmp_path / "link"
    folder.parent.mkdir()
    fill(folder)
    BREAKS["a newer format"](folder)
    link.symlink_to(folder)
    with open_here(link, on_incompatible="set_aside") as store:
        assert_empty_and_works(store)
    assert link.is_symlink() and len(set_aside(folder)) == 1 and not set_aside(link)


def test_a_second_store_of_the_same_second_gets_a_name_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    device = PosixDevice(threads=1)
    moved = []
    for _ in range(3):
        fill(folder)
        replaced = incompatible.replace_store(device, str(folder), "set_aside", UnsupportedFormat("newer"), 10**18)
        assert replaced.moved_to is not None
        moved.append(replaced.moved_to)
    device.close()
    assert len(set(moved)) == 3 and all(os.path.exists(path + "/STORE") for path in moved)


def test_the_choice_is_checked() -> None:
    with pytest.raises(InvalidConfig, match="on_incompatible"):
        kvlode.StoreConfig.build(on_incompatible="ignore")
