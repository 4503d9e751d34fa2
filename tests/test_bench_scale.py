"""The bench's items about very many keys and stalls: what the stores are, what a stall is, whose memory is counted. No time is asserted."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from kvlode import KvlodeError
from kvlode.engine.index_entry import IndexEntry
from kvlode.gds.buffers import aligned_array
from kvlode.tools.bench import keys_store, million, rebuild, stalls
from kvlode.tools.bench.keys_store import KeysStore, make_up, put_small
from kvlode.tools.bench.memory_use import parts_of, resident_bytes
from kvlode.tools.bench.million import measure_match, measure_match_many, measure_nowait
from kvlode.tools.bench.page_cache import fetch_pages, forget_pages
from kvlode.tools.bench.processes import child_process, events_of, wait_for
from kvlode.tools.bench.setting import Setting
from kvlode.tools.bench.stalls import TICK_S, Phase, StallWatch, lengths_s
from kvlode.tools.bench.workload import SMALL_BLOCK_BYTES, bench_key, bench_namespace

MIB = 1 << 20


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(str(tmp_path), size_bytes=8 * MIB, rounds=2, quick=True, console=Console(quiet=True))


@pytest.fixture
def small(setting: Setting) -> KeysStore:
    """A store of 300 real small blocks, closed."""
    keys = KeysStore(setting, "keys", 1000)
    with keys.opened() as store:
        put_small(store.namespace(bench_namespace(SMALL_BLOCK_BYTES)), range(300))
    keys.count = 300
    return keys


def made_up(setting: Setting, count: int) -> KeysStore:
    keys = KeysStore(setting, "made-up", count)
    make_up(lambda **_: None, keys.path, count, keys.options)
    keys.count = count
    return keys


# --- stores -----------------------------------------------------------------------------------------------------------


def test_made_up_entries_are_valid_and_point_to_places_of_their_own() -> None:
    entries = [IndexEntry.unpack(value) for value in keys_store._made_up_entries(range(8192, 8192 + 4096))]
    assert len({(entry.segment_id, entry.offset) for entry in entries}) == 4096
    assert {entry.segment_id for entry in entries} == {keys_store.MADE_UP_SEGMENT_ID + 2}
    assert all(entry.offset >= 4096 and entry.raw_length == SMALL_BLOCK_BYTES and entry.expires_at_ns == 0 for entry in entries)


def test_a_store_with_a_made_up_index_opens_and_knows_its_keys_and_no_others(setting: Setting) -> None:
    keys = made_up(setting, 5000)
    with keys.opened() as store:
        space = store.namespace(bench_namespace(SMALL_BLOCK_BYTES))
        assert space.match_prefix([bench_key(number) for number in range(5000)]) == 5000
        assert not any(space.contains([bench_key(number) for number in range(5000, 6000)]))
        assert space.put(bench_key(6000), bytes(SMALL_BLOCK_BYTES))  # it can be written to beside them
    keys.remove()
    assert list(Path(setting.root).iterdir()) == []


def test_a_process_fills_a_store_and_is_killed_while_it_goes_on(setting: Setting) -> None:
    keys = KeysStore(setting, "keys", 1000)
    keys.fill_and_kill(400)
    keys.fill_and_kill(100)
    with keys.opened() as store:
        space = store.namespace(bench_namespace(SMALL_BLOCK_BYTES))
        assert space.match_prefix([bench_key(number) for number in range(500)]) == 500


def test_what_a_step_fails_with_reaches_the_parent(tmp_path: Path) -> None:
    (tmp_path / "stranger").write_text("not a store")
    options = {"capacity": 64 * MIB, "buffer": MIB}
    with (
        child_process("make_up", path=str(tmp_path), count=10, options=options) as process,
        pytest.raises(KvlodeError, match="not a kvlode"),
    ):
        wait_for(process, "made_up")


def test_a_step_that_ends_without_an_answer_is_an_error() -> None:
    with child_process("fill", nonsense=1) as process:
        with pytest.raises(KvlodeError, match="ended early"):
            wait_for(process, "durable")
        assert list(events_of(process)) == []


def test_files_can_be_forgotten_and_fetched_and_keep_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "table").write_bytes(b"x" * 5000)
    forget_pages(tmp_path)
    fetch_pages(tmp_path)
    assert (tmp_path / "below" / "table").read_bytes() == b"x" * 5000


# --- looking up, opening ------------------------------------------------------------------------------------------------


def test_lookups_among_many_keys_are_compared_in_pairs(setting: Setting, small: KeysStore) -> None:
    many = made_up(setting, 3000)
    items = {item.name: item for item in measure_match_many(many, small, setting)}
    assert set(items) == {"match_10m.present", "match_10m.absent"}
    for item in items.values():
        assert item.state != "void" and item.rounds == 2 and item.figure is not None and item.figure > 0
        assert (item.absolute["keys"], item.absolute["compared_keys"]) == (3000, 300)


@pytest.mark.parametrize("measure", [measure_match, measure_match_many, measure_nowait])
def test_a_key_that_is_not_found_voids_a_lookup(setting: Setting, small: KeysStore, measure: Any) -> None:
    small.count = 400  # a hundred more than there are
    items = measure(small, small, setting) if measure is measure_match_many else measure(small, setting)
    assert all(item.state == "void" and item.reached is None for item in items)


def test_an_index_is_rebuilt_in_each_round_and_asked_for_what_it_must_know(setting: Setting, small: KeysStore) -> None:
    item = rebuild.measure_rebuild(small, setting)
    assert (item.name, item.unit, item.rounds) == ("rebuild", "records/s", 2)
    assert item.state != "void" and item.absolute["records"] >= 300
    small.count = 400
    assert rebuild.measure_rebuild(small, setting).state == "void"


def test_reopening_is_measured_after_a_kill_and_after_a_clean_close(setting: Setting, small: KeysStore) -> None:
    names = [item.name for item in rebuild.measure_reopening(small, Setting(setting.root, 1, 1, True, setting.console))]
    assert names == ["reopen_1m.clean", "reopen_1m.killed"]


def test_free_space_is_asked_for_both_stores_at_once(setting: Setting) -> None:
    full = Setting(setting.root, size_bytes=8 * MIB, rounds=9, quick=False, console=setting.console)
    assert million.needed_bytes(full) > 1_000_000 * 8192 + 10_000_000 * 200 > million.needed_bytes(setting)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_only_memory_that_was_touched_is_resident() -> None:
    memory = aligned_array(8 * MIB)
    memory[: 4 * MIB] = 1
    assert resident_bytes([memory]) in (4 * MIB, 8 * MIB)  # all of it where the kernel's page map cannot be read
    assert resident_bytes([]) == 0


def test_every_part_of_a_store_has_a_place_in_its_budget(small: KeysStore) -> None:
    with small.opened() as store:
        out = np.zeros(SMALL_BLOCK_BYTES, np.uint8)
        store.namespace(bench_namespace(SMALL_BLOCK_BYTES)).get_into(bench_key(1), out)
        parts = parts_of(store)
    rocksdb = {"rocksdb_cache", "rocksdb_memtables", "rocksdb_filters_and_table_indexes"}
    assert set(parts) == {"bounce", "staging", "heat"} | rocksdb
    assert parts["rocksdb_memtables"] > 0 and parts["heat"] > 0


# --- stalls ---------------------------------------------------------------------------------------------------------


def test_what_overlaps_with_a_phase_belongs_to_it_and_an_open_end_does_not() -> None:
    moments = [0.0, 0.5, 1.0, 4.0, 5.0, 5.25, 6.0]
    assert lengths_s(moments, Phase("first", 0.0, 1.5)) == [0.5, 3.0]
    assert lengths_s(moments, Phase("within", 2.0, 3.0)) == [3.0]
    assert lengths_s(moments, Phase("last", 4.5, 9.0)) == [0.25]
    assert lengths_s(moments, Phase("between", 4.25, 4.75)) == []


def test_a_stall_is_what_a_tick_took_beyond_its_length() -> None:
    watch = StallWatch()
    watch._ticks.extend([0.0, TICK_S, TICK_S, 2 * TICK_S + 0.010])
    assert watch.stalls_ms(Phase("all", 0.0, 1.0)) == pytest.approx([0.0, 10.0], abs=1e-9)


def test_a_watch_sees_ticks_and_collections_of_garbage_until_it_ends() -> None:
    with StallWatch() as watch:
        gc.collect()
        while len(watch._ticks) < 2:
            pass
    everything = Phase("all", 0.0, float("inf"))
    assert len(watch.stalls_ms(everything)) == len(watch._ticks) // 2 >= 1
    assert watch.collection_ms_max(everything) > 0.0
    assert watch._note_collection not in gc.callbacks


def test_a_witness_in_another_process_answers_for_phases_of_this_one() -> None:
    with child_process("witness") as process:
        wait_for(process, "ready")
        assert process.stdin is not None
        process.stdin.write(json.dumps([("all", 0.0, 1e12), ("none", 0.0, 0.0)]) + "\n")
        process.stdin.flush()
        everything, nothing = wait_for(process, "stalls")["stalls_ms"]
    assert set(everything) == {"p50_ms", "p99_ms", "max_ms"} and everything["max_ms"] >= everything["p99_ms"] >= everything["p50_ms"]
    assert nothing == {"p50_ms": 0.0, "p99_ms": 0.0, "max_ms": 0.0}


def test_stalls_are_told_by_phase_beside_those_of_the_machine(setting: Setting, small: KeysStore) -> None:
    items = {item.name: item for item in stalls.Stalls(small, setting).measure()}
    assert set(items) == {"gil_stall_p99.p99", "gil_stall_p99.max"}
    facts = items["gil_stall_p99.max"].absolute
    busy = ("flush_raw", "flush_encoded", "commit", "reopen", "rebuild")
    for phase in ("idle", *busy):
        assert set(facts[phase]) == {"ticks", "p50_ms", "p99_ms", "max_ms", "machine_p99_ms", "machine_max_ms", "garbage_collection_max_ms"}
    worst = max(facts[phase]["max_ms"] for phase in busy)
    assert items["gil_stall_p99.max"].figure == pytest.approx(worst, abs=1e-3)
