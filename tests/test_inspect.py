"""``kvlode inspect``: every view on clean and damaged stores, on single files, and on what is no store; nothing is ever changed."""

from __future__ import annotations

import contextlib
import hashlib
import html.parser
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvlode
from command import Done, command_line, run_apart, run_here
from kvlode.engine.catalog import Catalog
from kvlode.engine.heat import HeatTable
from kvlode.engine.index_rocksdb import RocksIndex
from kvlode.format.layout import PAGE_BYTES
from kvlode.tools.inspect.survey import USES, Survey
from kvlode.tools.store_files import StoreFiles
from model import block_bytes
from model import descriptor as any_descriptor

MIB = 1 << 20
BLOCK = 60_000
TRUNK = [b"trunk %d" % i for i in range(6)]
"""One chain; three branches grow from its fourth block, and the fifth is deleted: its own follower is an orphan."""
DELETED = TRUNK[4]
BRANCHES = [[b"branch %d %d" % (branch, i) for i in range(3)] for branch in range(3)]
LOOSE = [b"loose %d" % i for i in range(5)]
MODEL = "a model <b>&\x1b[31m"
"""A name that a page or a terminal would obey."""


def descriptor(name: str = "model", **fields: object) -> kvlode.Namespace:
    """A namespace of small blocks, so that small segments will do."""
    return any_descriptor(name, block_bytes_max=1 << 16, **fields)


def blocks_of(keys: list[bytes], version: int = 0) -> list[np.ndarray]:
    return [block_bytes(key, version, BLOCK) for key in keys]


def open_store(path: Path) -> kvlode.DiskStore:
    return kvlode.open(path, capacity="64MiB", buffer="16MiB", segment_bytes=MIB, gds="off", codec="auto")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed store of three sealed segments: two namespaces, a forked chain, a delete, and a torn tail in an open fourth one."""
    path = tmp_path_factory.mktemp("inspect") / "store"
    with open_store(path) as store:
        chains, loose = store.namespace(descriptor(MODEL)), store.namespace(descriptor("second", dtype="float16"))
        assert all(chains.submit_put(TRUNK, blocks_of(TRUNK), metas=[b"meta %d" % i for i in range(6)]).statuses)
        for number, keys in enumerate(BRANCHES):
            assert all(chains.submit_put(keys, blocks_of(keys, number), parent=TRUNK[3]).statuses)
        assert all(loose.submit_put(LOOSE, blocks_of(LOOSE, 3), chained=False, tag="tenant").statuses)
        assert store.flush()
        chains.touch([TRUNK[3]])
        assert chains.delete([DELETED]) == 1
        fill = [b"fill %d" % i for i in range(22)]
        assert all(loose.submit_put(fill, blocks_of(fill), chained=False).statuses)
        assert store.flush()
    leave_torn_tail(path)
    return path


def leave_torn_tail(path: Path) -> None:
    """The file of a segment as a killed writer leaves it: header and one record of the last segment, noise, nothing more."""
    with StoreFiles(path) as files:
        last = files.segment_ids()[-1]
        view = files.segment(last)
        assert view.sealed and len(view.table) > 3
        end = int(view.table.page[2]) * PAGE_BYTES
    file = files.segment_path(last)
    data = file.read_bytes()[:end] + bytes(range(1, 255)) * 100
    file.write_bytes(data)
    os.truncate(file, MIB)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the store to damage."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def segment_files(store: Path) -> list[Path]:
    return sorted((store / "segments").glob("*.seg"))


def answer(*arguments: object, code: int = 0) -> dict[str, Any]:
    done = run_here("inspect", *arguments, "--json")
    assert done.code == code, f"{arguments}: {done}"
    assert done.err == ""
    return done.json


def rows_of(store: Path, file: Path, code: int = 0) -> list[dict[str, Any]]:
    rows = answer("segment", store, "--segment", file.name, "--limit", 10_000, code=code)["rows"]
    assert isinstance(rows, list)
    return rows


def find_row(store: Path, key: bytes) -> tuple[Path, dict[str, Any]]:
    """The segment file and the row of a live block."""
    for file in segment_files(store):
        for row in rows_of(store, file):
            if row["key"] == key.hex() and row["type"] == "block" and row["state"] == "live":
                return file, row
    raise AssertionError(f"no live block {key!r}")


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


# --- nothing is ever changed --------------------------------------------------------------------------------------------


def fingerprint(path: Path) -> dict[str, tuple[int, int, str]]:
    """Everything below a folder: names, modes, times of change, and bytes."""
    found = {}
    for place in [path, *sorted(path.rglob("*"))]:
        status = place.lstat()
        content = hashlib.blake2b(place.read_bytes()).hexdigest() if place.is_file() else ""
        found[str(place.relative_to(path))] = (status.st_mode, status.st_mtime_ns, content)
    return found


def damage_superblock(store: Path) -> None:
    flip(store / "STORE", 50)


def damage_header(store: Path) -> None:
    flip(segment_files(store)[0], 100)


def damage_table(store: Path) -> None:
    file = segment_files(store)[0]
    data = file.read_bytes()
    flip(file, int.from_bytes(data[-PAGE_BYTES + 56 :][:8], "little") + 70)


def damage_records(store: Path) -> None:
    damage_table(store)
    file = segment_files(store)[0]
    data = bytearray(file.read_bytes())
    data[5 * PAGE_BYTES : 60 * PAGE_BYTES] = np.random.default_rng(5).bytes(55 * PAGE_BYTES)
    file.write_bytes(data)


def lose_index(store: Path) -> None:
    shutil.rmtree(store / "index")


def break_index(store: Path) -> None:
    (store / "index" / "CURRENT").write_bytes(b"nonsense\n")


def lose_superblock(store: Path) -> None:
    (store / "STORE").unlink()


def add_strangers(store: Path) -> None:
    """An empty segment, a sparse one, and one that belongs elsewhere."""
    (store / "segments" / f"{0x50:016x}.seg").write_bytes(b"")
    (store / "segments" / f"{0x51:016x}.seg").touch()
    os.truncate(store / "segments" / f"{0x51:016x}.seg", 5 << 30)
    shutil.copy(segment_files(store)[0], store / "segments" / f"{0x52:016x}.seg")


STATES = [None, damage_superblock, damage_header, damage_table, damage_records, lose_index, break_index, lose_superblock]


@pytest.mark.parametrize("damage", STATES, ids=lambda damage: getattr(damage, "__name__", "clean"))
def test_no_view_changes_a_byte_a_name_or_a_time(copy: Path, tmp_path: Path, damage: Any) -> None:
    namespace = descriptor(MODEL).digest.hex()
    if damage is not None:
        damage(copy)
    before = fingerprint(copy)
    first = ["--segment", segment_files(copy)[0].name]
    commands: list[list[object]] = [
        ["store", copy, "--html", tmp_path / "page.html"],
        ["segments", copy],
        ["segment", copy, *first],
        ["record", copy, *first, "--offset", PAGE_BYTES],
        ["record", copy, "--key", TRUNK[0].hex()],
        ["hexdump", copy, *first, "--length", 3 * PAGE_BYTES],
        ["hexdump", copy],
        ["namespaces", copy],
        ["tree", copy, "--namespace", namespace],
        ["index", copy],
        ["diff", copy],
        ["export", copy, TRUNK[0].hex(), "--namespace", namespace, "--to", tmp_path / "out.safetensors"],
    ]
    for command in commands:
        for extra in ([], ["--json"]):
            done = run_here("inspect", *command, *extra, columns=100)
            assert done.code in (0, 4, 8, 12, 16), f"{command}: {done}"
            assert len(done.err.splitlines()) == (1 if done.code in (8, 16) and not done.out else 0), f"{command}: {done.err}"
            assert fingerprint(copy) == before, f"{command} changed the store"
            (tmp_path / "out.safetensors").unlink(missing_ok=True)
    if damage is None:
        assert run_here("stat", copy).code == 0
        assert fingerprint(copy) == before


# --- what the views say -------------------------------------------------------------------------------------------------


def test_the_store_view_accounts_for_every_byte(folder: Path) -> None:
    facts = answer("store", folder)
    sizes = [file.stat().st_size for file in segment_files(folder)]
    assert facts["segments"] == len(sizes) == facts["states"]["sealed"] + facts["states"]["open"]
    assert facts["size_bytes"] == sum(sizes) == sum(facts["use_bytes"].values())
    for row, size in zip(facts["rows"], sizes, strict=True):
        assert row["size_bytes"] == size == sum(row["use_bytes"].values())
    assert facts["use_bytes"]["torn"] == 7 * PAGE_BYTES
    assert facts["use_bytes"]["damaged"] == 0
    assert facts["writer"] is False
    assert facts["pinned"] is None
    assert facts["hits"] >= 4, "a hit on a block credits its ancestors"
    assert facts["problems"] == []
    assert any("torn tail" in note for note in facts["notes"])


def test_cells_of_the_map_hold_the_same_bytes_as_the_totals(folder: Path) -> None:
    with StoreFiles(folder) as files:
        for cell_count in (1, 7, 240):
            for summary in Survey(files).summaries(cell_count):
                assert summary.cells.shape == (len(USES), cell_count)
                assert summary.cells.sum(axis=0) == pytest.approx(summary.size_bytes / cell_count)
                assert dict(zip(USES, summary.cells.sum(axis=1), strict=True)) == pytest.approx(summary.use_bytes)


def test_the_map_is_read_without_colour_and_in_plain_letters(folder: Path) -> None:
    shown = run_here("inspect", folder, columns=80)
    assert shown.code == 0
    assert "\x1b" not in shown.out
    assert "~ torn" in shown.out and "X damaged 0 B" in shown.out
    assert all(len(line) <= 80 for line in shown.out.splitlines() if not line.startswith(("note:", "damaged:")))
    plain = run_apart("inspect", folder, PYTHONIOENCODING="ascii", NO_COLOR="1", TERM="xterm")
    assert plain.code == 0
    assert plain.out.isascii() and "# live" in plain.out


def test_a_path_alone_is_the_store_view(folder: Path) -> None:
    assert answer(folder)["rows"] == answer("store", folder)["rows"]


def test_views_go_from_the_store_to_a_segment_to_a_record(folder: Path) -> None:
    segments = answer("segments", folder)
    assert [row["segment"] for row in segments["rows"]] == [file.stem for file in segment_files(folder)]
    file, row = find_row(folder, TRUNK[2])
    assert answer("segment", file)["rows"] == rows_of(folder, file)
    record = answer("record", folder, "--segment", file.stem, "--offset", row["offset"])
    assert record == answer("record", folder, "--key", TRUNK[2].hex()) == answer("record", file, "--offset", row["offset"])
    assert bytes.fromhex(record["record"]["key"]) == TRUNK[2]
    assert bytes.fromhex(record["record"]["meta"]) == b"meta 2"
    assert [stripe["check"] for stripe in record["stripes"]] == ["good"]
    assert len(bytes.fromhex(record["page_hex"])) == PAGE_BYTES
    shown = run_here("inspect", "record", folder, "--key", TRUNK[2].hex())
    assert "header and all stripes match their checksums" in shown.out
    assert f"{row['offset']:08x}  89 4b 56 52" in shown.out


def test_records_say_what_they_are_good_for(folder: Path) -> None:
    states = {(row["key"], row["type"]): row["state"] for file in segment_files(folder) for row in rows_of(folder, file)}
    assert states[DELETED.hex(), "block"] == "deleted"
    assert states[DELETED.hex(), "tombstone"] == "note"
    assert states[TRUNK[5].hex(), "block"] == "live"


def test_rows_are_limited_and_the_rest_is_counted(folder: Path) -> None:
    file = segment_files(folder)[0]
    facts = answer("segment", file, "--limit", 2)
    assert len(facts["rows"]) == 2 and facts["rows_left_out"] == facts["records"] - 2
    assert "more records (--limit)" in run_here("inspect", "segment", file, "--limit", 2).out
    for view in ("store", "segments", "namespaces", "index"):
        facts = answer(view, folder, "--limit", 1)
        assert len(facts["rows"]) == 1 and facts["rows_left_out"] > 0, view


def test_namespaces_are_described_from_the_segments(folder: Path) -> None:
    rows = {row["descriptor"]["model"]: row for row in answer("namespaces", folder)["rows"]}
    assert rows.keys() == {MODEL, "second"}
    first = rows[MODEL]
    assert first["digest"] == descriptor(MODEL).digest.hex()
    assert (first["blocks_live"], first["blocks_dead"]) == (len(TRUNK) - 1 + 9, 1)
    assert first["raw_bytes"] == first["blocks_live"] * BLOCK
    assert sum(first["codecs"].values()) == first["blocks_live"]
    shown = run_here("inspect", "namespaces", folder).out
    assert "\x1b" not in shown, "a name must not reach the terminal as a command"


def test_the_tree_shows_shared_prefixes_and_orphans(folder: Path) -> None:
    facts = answer("tree", folder, "--namespace", descriptor(MODEL).digest.hex()[:8])
    assert (facts["blocks"], facts["roots"], facts["shared_prefixes"], facts["fan_out_max"]) == (14, 1, 1, 3)
    assert (facts["orphaned_branches"], facts["orphaned_blocks"]) == (1, 1)
    trunk, *branches = [row for row in facts["rows"] if not row["orphan"]]
    assert (trunk["first_key"], trunk["last_key"], trunk["blocks"], trunk["fan_out"]) == (TRUNK[0].hex(), TRUNK[3].hex(), 4, 3)
    assert {(row["first_key"], row["blocks"], row["depth"]) for row in branches} == {(keys[0].hex(), 3, 4) for keys in BRANCHES}
    assert [row["first_key"] for row in facts["rows"] if row["orphan"]] == [TRUNK[5].hex()]
    below = answer("tree", folder, "--namespace", descriptor(MODEL).digest.hex(), "--root", BRANCHES[1][1].hex())
    assert [(row["first_key"], row["blocks"]) for row in below["rows"]] == [(BRANCHES[1][1].hex(), 2)]
    assert answer("tree", folder, "--namespace", descriptor(MODEL).digest.hex(), "--limit", 2)["blocks_left_out"] == 7
    shown = run_here("inspect", "tree", folder, "--namespace", descriptor(MODEL).digest.hex(), columns=80).out
    assert "ORPHAN" in shown and "├─" in shown and "3 branches, 9 blocks" in shown


def test_hexdump_names_the_fields_of_what_begins_there(folder: Path) -> None:
    assert [part["title"] for part in answer("hexdump", folder)["structures"]] == ["superblock"]
    file = segment_files(folder)[0]
    data = file.read_bytes()
    facts = answer("hexdump", file, "--length", 2 * PAGE_BYTES)
    assert [part["title"] for part in facts["structures"]] == ["segment header", "record header"]
    assert bytes.fromhex(facts["data_hex"]) == data[: 2 * PAGE_BYTES]
    names = {field["name"]: field["value"] for field in facts["structures"][0]["fields"]}
    assert names["segment_id"] == int(file.stem, 16)
    tail = answer("hexdump", file, "--offset", len(data) - PAGE_BYTES)
    assert [part["title"] for part in tail["structures"]] == ["trailer"]


def test_the_index_view_has_identity_checkpoint_and_entries(folder: Path) -> None:
    facts = answer("index", folder)
    assert facts["identity_matches"] and facts["checkpoint"]["offset"] > 0 and facts["floors"] == {}
    digest = descriptor(MODEL).digest.hex()
    assert facts["namespaces"][digest] == 14
    some = answer("index", folder, "--namespace", digest, "--prefix", b"branch 1".hex())
    assert [row["key"] for row in some["rows"]] == sorted(key.hex() for key in BRANCHES[1])


# --- differences --------------------------------------------------------------------------------------------------------


@pytest.fixture
def healed(folder: Path, tmp_path: Path) -> Path:
    """A store whose index and segments agree: opened once, which seals the torn tail."""
    shutil.copytree(folder, tmp_path / "healed")
    shutil.rmtree(tmp_path / "healed" / "index")  # derived anew: the torn tail took records that the old one had
    with open_store(tmp_path / "healed"):
        return tmp_path / "healed"


def test_no_difference_is_seen_where_there_is_none(healed: Path) -> None:
    facts = answer("diff", healed)
    assert facts["rows"] == [] and facts["agreeing"] == facts["entries"] == facts["blocks"] > 0


def test_every_kind_of_difference_is_told_apart(healed: Path) -> None:
    digest = descriptor(MODEL).digest
    index = RocksIndex(healed / "index")
    try:
        values = index.get_many([digest + key for key in TRUNK[:3]])
        assert all(values)
        gone, stale, moved = values
        assert gone is not None and stale is not None and moved is not None
        puts = [(digest + b"never was", gone), (digest + TRUNK[1], moved), (digest + DELETED, gone), (digest + TRUNK[3], b"odd")]
        index.apply(puts, [digest + TRUNK[0]])
        index.sync()
    finally:
        index.close()
    facts = answer("diff", healed, code=4)
    kinds = {row["key"]: row["kind"] for row in facts["rows"]}
    assert kinds == {
        b"never was".hex(): "index_only",
        TRUNK[1].hex(): "stale",
        DELETED.hex(): "dead",
        TRUNK[3].hex(): "unreadable",
        TRUNK[0].hex(): "segments_only",
    }
    assert "a tombstone" in run_here("inspect", "diff", healed).out
    with_one = answer("diff", healed, "--limit", 1, code=4)
    assert with_one["counts"] == facts["counts"]


def test_entries_of_a_lost_segment_are_in_the_index_only(healed: Path) -> None:
    lost = segment_files(healed)[0]
    live = sum(row["state"] == "live" for row in rows_of(healed, lost))
    lost.unlink()
    facts = answer("diff", healed, code=4)
    assert facts["counts"]["index_only"] == live > 0
    assert {row["remark"] for row in facts["rows"]} == {"its segment is gone"}


def test_records_behind_the_checkpoint_are_no_difference(healed: Path) -> None:
    index = RocksIndex(healed / "index")
    try:
        key, value = Catalog.checkpoint_change(kvlode_checkpoint(segment_id=1, offset=PAGE_BYTES))
        index.apply([(key, value)], [descriptor(MODEL).digest + TRUNK[0]])
        index.sync()
    finally:
        index.close()
    facts = answer("diff", healed)
    assert (facts["counts"]["not_yet"], facts["counts"]["segments_only"]) == (1, 0)


def kvlode_checkpoint(segment_id: int, offset: int) -> Any:
    from kvlode.engine.catalog import Checkpoint

    return Checkpoint(segment_id, offset, 0)


def test_an_index_that_is_missing_or_broken_is_said_to_be(copy: Path) -> None:
    break_index(copy)
    assert "index cannot be" in answer("index", copy, code=4)["problems"][0]
    assert answer("diff", copy, code=4)["entries"] == 0
    lose_index(copy)
    assert answer("index", copy)["present"] is False
    assert "derives it" in answer("diff", copy)["notes"][0]


# --- damage -------------------------------------------------------------------------------------------------------------


def test_a_damaged_record_is_shown_with_its_damage(copy: Path) -> None:
    file, row = find_row(copy, TRUNK[1])
    place = ["record", copy, "--segment", file.name, "--offset", row["offset"]]
    flip(file, row["offset"] + PAGE_BYTES + 10)
    facts = answer(*place, code=4)
    assert "stripe-checksum" in facts["problems"][0] and facts["stripes"][0]["check"] == "damaged"
    flip(file, row["offset"] + 20)
    facts = answer(*place, code=4)
    assert facts["record"] is None and "header-checksum" in facts["problems"][0]
    assert "type" in run_here("inspect", *place).out, "fields are shown all the same"


def test_a_key_is_looked_for_in_the_segment_that_was_named(copy: Path) -> None:
    key = TRUNK[1]
    places = [(file, row) for file in segment_files(copy) for row in rows_of(copy, file) if row["key"] == key.hex()]
    others = [file for file in segment_files(copy) if file not in [place[0] for place in places]]
    assert places and others
    for file in {place[0] for place in places}:
        for path, words in ((copy, ["--segment", file.name]), (file, [])):
            facts = answer("record", path, "--key", key.hex(), *words)
            assert (facts["segment"], facts["record"]["key"]) == (file.stem, key.hex())
        assert facts["offset"] == max(other["offset"] for place, other in places if place == file)
    done = run_here("inspect", "record", copy, "--key", key.hex(), "--segment", others[0].name)
    assert done.code == 16 and "no block has this key" in done.err and others[0].name in done.err
    assert run_here("inspect", "record", copy, "--key", key.hex(), "--segment", "77").code == 16


def test_a_lost_table_of_contents_costs_no_record(copy: Path) -> None:
    file = segment_files(copy)[0]
    before = rows_of(copy, file)
    damage_table(copy)
    assert rows_of(copy, file, code=4) == before


def test_records_behind_damage_are_found_and_the_damage_is_on_the_map(copy: Path) -> None:
    file = segment_files(copy)[0]
    before = rows_of(copy, file)
    damage_records(copy)
    facts = answer("segment", file, "--limit", 10_000, code=4)
    hit = [row for row in before if row["offset"] + row["record_pages"] * PAGE_BYTES > 5 * PAGE_BYTES and row["offset"] < 60 * PAGE_BYTES]
    left = [row["offset"] for row in before if row not in hit or row["offset"] < 5 * PAGE_BYTES]
    assert [row["offset"] for row in facts["rows"]] == left
    assert facts["use_bytes"]["damaged"] > 0
    drawn = next(line for line in run_here("inspect", copy).out.splitlines() if line.startswith("   1 "))
    assert "XX" in drawn and drawn.endswith("damaged")


def test_a_damaged_or_lost_superblock_hides_nothing(copy: Path) -> None:
    before = answer("store", copy)
    for damage in (damage_superblock, lose_superblock):
        damage(copy)
        facts = answer("store", copy, code=4)
        assert (facts["blocks_live"], facts["store_uuid"]) == (before["blocks_live"], before["store_uuid"])
        assert "STORE" in facts["problems"][0]
        assert run_here("stat", copy).code == 4


def test_empty_sparse_and_foreign_segments_are_told_apart(copy: Path) -> None:
    live = answer("store", copy)["blocks_live"]
    add_strangers(copy)
    facts = answer("store", copy, code=4)
    assert [row["state"] for row in facts["rows"]][-3:] == ["empty", "empty", "foreign"]
    assert facts["blocks_live"] == live, "what belongs to another place does not count"
    assert [problem for problem in facts["problems"] if "another store or place" in problem] == facts["problems"]
    stranger = copy / "segments" / f"{0x52:016x}.seg"
    assert len(answer("segment", stranger, code=4)["rows"]) == len(rows_of(copy, segment_files(copy)[0]))


@pytest.mark.parametrize("size_bytes", [0, 5 << 30])
def test_a_segment_that_was_emptied_is_damage_in_every_view(size_bytes: int, copy: Path) -> None:
    file = segment_files(copy)[0]
    name, live = file.name, answer("store", copy)["blocks_live"]
    file.write_bytes(b"")
    os.truncate(file, size_bytes)
    facts = answer("store", copy, code=4)
    assert facts["blocks_live"] < live and facts["rows"][0]["state"] == "damaged"
    assert facts["use_bytes"]["damaged"] == size_bytes
    for done in (run_here("stat", copy), run_here("inspect", "segments", copy), run_here("inspect", "segment", copy, "--segment", name)):
        assert done.code == 4 and f"{name} holds no record" in done.out and "the next open removes it" not in done.out


def test_a_file_in_the_place_of_the_segments_is_one_clear_line(copy: Path) -> None:
    shutil.rmtree(copy / "segments")
    (copy / "segments").write_text("no folder")
    for words in (["stat"], ["inspect"], ["inspect", "segments"], ["inspect", "tree"]):
        done = run_here(*words, copy)
        assert done.code == 8 and done.out == "" and len(done.err.splitlines()) == 1
        assert str(copy / "segments") in done.err and "folder" in done.err


def test_a_page_at_the_end_of_a_sparse_file_is_found_without_reading_the_hole(copy: Path) -> None:
    sparse = copy / "segments" / f"{0x60:016x}.seg"
    sparse.write_bytes(b"\1" * PAGE_BYTES)
    os.truncate(sparse, 5 << 30)
    with sparse.open("r+b") as file:
        file.seek((5 << 30) - PAGE_BYTES)
        file.write(b"\1" * PAGE_BYTES)
    assert answer("segment", sparse, code=4)["rows"] == []


def test_a_segment_file_alone_is_read_by_what_it_says(folder: Path, tmp_path: Path) -> None:
    file = segment_files(folder)[0]
    alone = tmp_path / "any name"
    shutil.copy(file, alone)
    assert [row["offset"] for row in answer("segment", alone)["rows"]] == [row["offset"] for row in rows_of(folder, file)]
    assert answer("store", alone)["segments"] == 1
    flip(alone, 100)
    assert len(answer("segment", alone, code=4)["rows"]) == len(rows_of(folder, file)), "a record tells the store as well"


def test_a_truncated_segment_shows_the_records_that_are_left(copy: Path) -> None:
    file = segment_files(copy)[0]
    before = rows_of(copy, file)
    os.truncate(file, before[4]["offset"])
    done = run_here("inspect", "segment", file, "--json")
    assert [row["offset"] for row in done.json["rows"]] == [row["offset"] for row in before[:4]]
    assert done.json["state"] in ("open", "damaged")


# --- export and import --------------------------------------------------------------------------------------------------


def export(store: Path, target: Path, keys: list[bytes], name: str = MODEL) -> Done:
    digest = descriptor(name, **({} if name == MODEL else {"dtype": "float16"})).digest.hex()
    return run_here("inspect", "export", store, *(key.hex() for key in keys), "--namespace", digest, "--to", target, "--json")


def test_an_export_is_read_by_others_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    safe_open = pytest.importorskip("safetensors").safe_open
    target = tmp_path / "out.safetensors"
    keys = [*TRUNK[:3], *BRANCHES[2]]
    done = export(folder, target, keys)
    assert done.code == 0, done
    with safe_open(target, framework="pt") as file:
        assert sorted(file.keys()) == sorted(key.hex() for key in keys)
        metadata = file.metadata()
        for key in keys:
            tensor = file.get_tensor(key.hex())
            version = 2 if key in BRANCHES[2] else 0
            assert str(tensor.dtype) == "torch.bfloat16"
            assert np.array_equal(tensor.view(dtype=__import__("torch").uint8).numpy(), block_bytes(key, version, BLOCK))
    assert json.loads(metadata["namespace"])["model"] == MODEL
    block = json.loads(metadata["blocks"])[TRUNK[2].hex()]
    assert (block["depth"], block["parent_key"], bytes.fromhex(block["meta"])) == (2, TRUNK[1].hex(), b"meta 2")


def test_blocks_come_back_with_their_parents_through_import(folder: Path, tmp_path: Path) -> None:
    target, other = tmp_path / "out.safetensors", tmp_path / "other"
    assert export(folder, target, [*TRUNK[:4], *BRANCHES[0]]).code == 0
    open_store(other).close()
    facts = answer("import", other, target, "--capacity", "64MiB")
    assert len(facts["imported"]) == 7 and facts["flushed"] and not facts["problems"]
    with open_store(other) as store:
        space = store.namespace(descriptor(MODEL))
        for depth, key in enumerate([*TRUNK[:4], *BRANCHES[0]]):
            out = np.zeros(BLOCK, np.uint8)
            assert space.get_into(key, out) is kvlode.Status.HIT
            assert np.array_equal(out, block_bytes(key, 0, BLOCK))
            info = space.info([key])[0]
            assert info is not None and info.depth == depth
    tree = answer("tree", other)
    assert [(row["first_key"], row["blocks"]) for row in tree["rows"]] == [(TRUNK[0].hex(), 7)]
    again = answer("import", other, target, "--capacity", "64MiB")
    assert len(again["present"]) == 7 and again["imported"] == []


def test_what_cannot_be_exported_is_named_and_the_rest_is_written(copy: Path, tmp_path: Path) -> None:
    file, row = find_row(copy, TRUNK[1])
    flip(file, row["offset"] + PAGE_BYTES + 10)
    done = export(copy, tmp_path / "out", [TRUNK[0], TRUNK[1], DELETED])
    assert done.code == 4 + 8
    assert (done.json["exported"], done.json["missing"]) == ([TRUNK[0].hex()], [DELETED.hex()])
    assert TRUNK[1].hex() in done.json["problems"][0]
    assert export(copy, tmp_path / "none", [DELETED]).code == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "out"]


def test_an_export_replaces_nothing_and_stays_out_of_the_store(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for target, word in ((tmp_path / "mine", "exists"), (folder / "out", "inside the store")):
        done = export(folder, target, [TRUNK[0]])
        assert done.code == 16 and word in done.err
    assert (tmp_path / "mine").read_text() == "mine"
    done = run_here("inspect", folder, "--html", folder / "page.html")
    assert done.code == 16 and not (folder / "page.html").exists()


def test_import_takes_only_bytes_that_match_their_checksum(folder: Path, tmp_path: Path) -> None:
    target, other = tmp_path / "out.safetensors", tmp_path / "other"
    assert export(folder, target, LOOSE[:2], "second").code == 0
    data = bytearray(target.read_bytes())
    data[-5] ^= 1
    target.write_bytes(data)
    open_store(other).close()
    facts = answer("import", other, target, "--capacity", "64MiB", code=4)
    assert len(facts["imported"]) == 1 and "raw checksum" in facts["problems"][0]
    assert "tags are not restored" in facts["notes"][0]


@pytest.mark.parametrize("damage", ["length", "json", "cut", "foreign"])
def test_import_refuses_files_that_are_no_export(folder: Path, tmp_path: Path, damage: str) -> None:
    target, other = tmp_path / "out.safetensors", tmp_path / "other"
    assert export(folder, target, TRUNK[:1]).code == 0
    data = bytearray(target.read_bytes())
    changed = {
        "length": b"\xff" * 8 + data[8:],
        "json": data[:8] + b"?" + data[9:],
        "cut": data[:-1000],
        "foreign": (2).to_bytes(8, "little") + b"{}",
    }
    target.write_bytes(changed[damage])
    open_store(other).close()
    done = run_here("inspect", "import", other, target, "--capacity", "64MiB")
    assert done.code == 16 and len(done.err.splitlines()) == 1 and str(target) in done.err


def test_import_needs_a_store_that_nobody_has_open(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    assert export(folder, target, TRUNK[:1]).code == 0
    done = run_here("inspect", "import", tmp_path / "absent", target, "--capacity", "64MiB")
    assert done.code == 16 and not (tmp_path / "absent").exists()
    with open_store(tmp_path / "other"):
        done = run_apart("inspect", "import", tmp_path / "other", target, "--capacity", "64MiB")
    assert done.code == 8 and "another process" in done.err and len(done.err.splitlines()) == 1


# --- the page -----------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Checks that elements close in order, and collects what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)


def test_the_page_is_whole_self_contained_and_needs_no_script(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    assert answer("store", folder, "--html", target)["html"] == str(target)
    text = target.read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == [] and page.references == []
    assert not {"script", "link", "img", "iframe"} & set(page.seen)
    assert page.seen.count("svg") >= 2 + len(segment_files(folder))
    assert "prefers-color-scheme: dark" in text and "<title>segment" in text
    assert "<b>&\x1b" not in text and "a model &lt;b&gt;" in text
    assert "http" not in text.replace("http-equiv", "")


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (["segment", "STORE", "--segment", "zz"], "hex"),
        (["segment", "STORE", "--segment", "77"], "no such segment"),
        (["segment", "STORE"], "--segment"),
        (["record", "STORE", "--segment", "1", "--offset", "5"], "4096"),
        (["record", "STORE", "--segment", "1", "--offset", "4096000000"], "ends before"),
        (["record", "STORE"], "--key"),
        (["record", "STORE", "--key", "xyz"], "hex"),
        (["record", "STORE", "--key", ""], "1 to 255 bytes"),
        (["record", "STORE", "--key", "00"], "no block has this key"),
        (["hexdump", "STORE", "--offset", "999999999"], "ends before"),
        (["tree", "STORE"], "--namespace"),
        (["tree", "STORE", "--namespace", "zz"], "hex"),
        (["index", "STORE", "--namespace", "0011", "--prefix", "00"], "32 hex digits"),
        (["index", "STORE", "--namespace", "0"], "hex"),
        (["export", "STORE", "nohex", "--to", "nowhere"], "hex"),
        (["store", "STORE", "--limit", "0"], "limit"),
        (["nonsense", "STORE"], "nonsense"),
        (["store"], "path"),
    ],
)
def test_questions_that_have_no_answer_say_in_one_line_what_would(folder: Path, command: list[str], word: str) -> None:
    done = run_here("inspect", *[str(folder) if part == "STORE" else part for part in command])
    assert done.code == 16
    assert word in done.err and len(done.err.splitlines()) == 1 and done.out == ""


def test_what_is_no_store_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "STORE").write_bytes(b"something else" * 400)
    (tmp_path / "text").write_text("something else" * 1000)
    for path in (tmp_path / "foreign", tmp_path / "absent", tmp_path, tmp_path / "text"):
        for view in ("store", "segments", "namespaces", "tree", "index", "diff", "hexdump"):
            done = run_here("inspect", view, path)
            assert done.code == 16, done
            assert len(done.err.splitlines()) == 1 and str(path) in done.err and done.out == ""


def test_an_empty_file_with_the_name_of_a_segment_is_an_empty_segment(tmp_path: Path) -> None:
    file = tmp_path / f"{7:016x}.seg"
    file.write_bytes(b"")
    assert answer("segment", file)["state"] == "empty"


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of root, for as long as this lasts; a user without them stays who they are."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("what", ["STORE", "segments", "."])
def test_no_permission_is_one_clear_line(copy: Path, what: str) -> None:
    assert run_here("inspect", copy).code == 0  # everything is imported while that is allowed
    mode = (copy / what).stat().st_mode
    (copy / what).chmod(0)
    try:
        with as_nobody():
            done = run_here("inspect", copy)
    finally:
        (copy / what).chmod(mode)
    assert done.code == 8 and "ermission denied" in done.err and len(done.err.splitlines()) == 1 and done.out == ""


def test_an_error_of_the_system_is_one_clear_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    done = run_here("inspect", folder)
    assert done.code == 8 and "Permission denied" in done.err and len(done.err.splitlines()) == 1


def test_a_segment_that_cannot_be_read_is_named_and_the_rest_is_shown(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unreadable = segment_files(copy)[1]
    original = StoreFiles.segment

    def segment(files: StoreFiles, segment_id: int) -> Any:
        if segment_id == int(unreadable.stem, 16):
            raise OSError(5, "Input/output error", str(unreadable))
        return original(files, segment_id)

    monkeypatch.setattr(StoreFiles, "segment", segment)
    facts = answer("store", copy, code=4)
    assert [row["state"] for row in facts["rows"]][:2] == ["sealed", "unreadable"]
    assert "Input/output error" in facts["problems"][0]


def test_a_segment_that_vanishes_meanwhile_is_left_out(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a running writer frees it between the listing and the reading."""
    gone = segment_files(copy)[0]
    original = StoreFiles.segment

    def segment(files: StoreFiles, segment_id: int) -> Any:
        if segment_id == int(gone.stem, 16):
            gone.unlink(missing_ok=True)
        return original(files, segment_id)

    monkeypatch.setattr(StoreFiles, "segment", segment)
    facts = answer("store", copy)
    assert gone.stem not in [row["segment"] for row in facts["rows"]]


def test_a_store_that_vanishes_meanwhile_is_one_clear_line(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = StoreFiles.segment

    def segment(files: StoreFiles, segment_id: int) -> Any:
        shutil.rmtree(copy, ignore_errors=True)
        return original(files, segment_id)

    monkeypatch.setattr(StoreFiles, "segment", segment)
    done = run_here("inspect", copy)
    assert done.code == 8 and str(copy) in done.err and len(done.err.splitlines()) == 1 and done.out == ""


def test_a_store_in_use_is_looked_at_and_stays_usable(tmp_path: Path) -> None:
    with open_store(tmp_path / "store") as store:
        space = store.namespace(descriptor())
        assert all(space.submit_put(TRUNK, blocks_of(TRUNK)).statuses) and store.flush()
        facts = run_apart("inspect", tmp_path / "store", "--json").json
        assert (facts["writer"], facts["blocks_live"], facts["states"]) == (True, 6, {"open": 1})
        assert run_apart("inspect", "diff", tmp_path / "store", "--json").json["agreeing"] == 6
        assert space.put(b"later", blocks_of([b"later"])[0]) and store.flush()
        assert space.match_prefix(TRUNK) == 6


def test_a_reader_that_goes_away_is_no_traceback(folder: Path) -> None:
    process = subprocess.Popen(
        command_line("inspect", "hexdump", segment_files(folder)[0], "--length", MIB // 2), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 8
    assert process.stderr.read() == b""
    process.stderr.close()


def test_an_interrupt_is_one_line_and_its_own_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> Iterator[Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(StoreFiles, "segments", interrupt)
    done = run_here("inspect", folder)
    assert (done.code, done.err) == (32, "kvlode: interrupted\n")


def test_looking_at_the_heat_table_changes_nothing(folder: Path, tmp_path: Path) -> None:
    with StoreFiles(folder) as files:
        uuid = files.store_uuid
    copy = tmp_path / "heat"
    shutil.copy(folder / "heat", copy)
    before = copy.read_bytes()
    table = HeatTable.view(copy, uuid)
    assert table is not None
    with pytest.raises((TypeError, ValueError)):
        table.link(table.slot(bytes(16), b"k" * 16), 0)
    assert copy.read_bytes() == before
    assert HeatTable.view(copy, bytes(16)) is None, "the table of another store"
    assert HeatTable.view(tmp_path / "absent", uuid) is None


# --- anything at all ----------------------------------------------------------------------------------------------------

VECTORS = sorted((Path(__file__).parent / "vectors").glob("segment-*"))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.name)
def test_every_segment_of_the_test_vectors_is_read_as_the_specification_says(vector: Path, tmp_path: Path) -> None:
    expected = json.loads((vector / "expected.json").read_text())
    file = tmp_path / f"{expected['place']['segment_id']:016x}.seg"
    shutil.copy(vector / "data.bin", file)
    done = run_here("inspect", "segment", file, "--json")
    assert done.code in (0, 4)
    assert [row["offset"] for row in done.json["rows"]] == [record["offset"] for record in expected["expected"]["records"]]
    for view in ("store", "segments", "namespaces", "hexdump"):
        assert run_here("inspect", view, file).code in (0, 4)


@pytest.mark.parametrize("seed", range(12))
def test_random_damage_never_stops_a_view(copy: Path, tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    print("seed", seed)
    places = [path for path in sorted(copy.rglob("*")) if path.is_file() and path.stat().st_size and path.name != "LOG"]
    for file in random.choice(np.array(places, dtype=object), size=4):
        data = bytearray(file.read_bytes())
        for _ in range(int(random.integers(1, 20))):
            start = int(random.integers(0, len(data)))
            if random.integers(0, 2):
                start -= start % PAGE_BYTES  # headers are where it hurts
                start += int(random.integers(0, 512))
            data[start : start + 8] = random.bytes(8)[: max(0, len(data) - start)]
        file.write_bytes(bytes(data[: int(random.integers(1, len(data) + 1))]) if random.integers(0, 4) == 0 else data)
    before = fingerprint(copy)
    digest = descriptor(MODEL).digest.hex()
    segment = ["--segment", segment_files(copy)[0].name]
    views: list[list[object]] = [
        ["store"],
        ["segments"],
        ["namespaces"],
        ["index"],
        ["diff"],
        ["tree", "--namespace", digest],
        ["segment", *segment],
    ]
    views += [["record", *segment, "--offset", page * PAGE_BYTES] for page in (1, 3, 4, 9)]
    views.append(["export", TRUNK[0].hex(), BRANCHES[0][0].hex(), "--namespace", digest, "--to", tmp_path / "out"])
    for view, *options in views:
        done = run_here("inspect", view, copy, *options)
        assert done.code in (0, 4, 8, 12, 16), done
        assert len(done.err.splitlines()) <= 1
    assert fingerprint(copy) == before
