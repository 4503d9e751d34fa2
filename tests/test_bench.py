"""The bench: what may be claimed of a figure, that both arms do the same, and the shape of its answer. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from kvlode import InvalidConfig, NoSpace
from kvlode.engine.config import StoreConfig
from kvlode.tools.bench import ITEMS, run_bench
from kvlode.tools.bench.bare import replay_reads, replay_writes, touched_memory
from kvlode.tools.bench.codecs import synthetic_kv
from kvlode.tools.bench.drive import warm
from kvlode.tools.bench.figures import Bar, Item, abba, quartiles_of, ratio_item, skipped_item, value_item
from kvlode.tools.bench.machine import check_free_space, machine_facts
from kvlode.tools.bench.workload import Blocks, bench_key, bench_namespace, check_blocks, opened, tracing_device

MIB = 1 << 20
FIGURES = {
    *("write_raw", "write_raw.fresh", "read_raw.aligned", "read_raw.tensors", "dram_get"),
    *("compression.ratio", "codec.encode", "codec.decode"),
    *(
        "match_1m.present",
        "match_1m.absent",
        "lookup_nowait_1m.p50",
        "lookup_nowait_1m.p99",
        "reopen_1m.clean",
        "reopen_1m.killed",
        "memory_beyond_buffer",
    ),
}


# --- figures -----------------------------------------------------------------------------------------------------


def test_quartiles_are_interpolated_between_sorted_values() -> None:
    spread = quartiles_of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (spread.first, spread.median, spread.third) == (2.0, 3.0, 4.0)
    assert quartiles_of([7.0]).first == quartiles_of([7.0]).third == 7.0
    with pytest.raises(ValueError, match="no values"):
        quartiles_of([])


def test_the_figure_is_the_median_of_paired_ratios_and_not_the_ratio_of_medians() -> None:
    """The drive slows down over the run: both arms with it, so every pair says 0.9."""
    bare = [2.0, 1.0, 0.5, 0.25, 0.125]
    item = ratio_item("x", [0.9 * rate for rate in bare], bare, bar=Bar(0.8, "at least"), facts={})
    assert item.figure == pytest.approx(0.9)
    assert (item.state, item.reached, item.rounds) == ("ok", True, 5)


def test_a_wide_spread_is_unresolved_but_keeps_its_figure() -> None:
    item = ratio_item("x", [0.5, 0.7, 0.9, 1.1, 1.3], [1.0] * 5, bar=Bar(0.8, "at least"), facts={})
    assert (item.state, item.figure, item.reached) == ("unresolved", pytest.approx(0.9), True)
    assert item.reason is not None and "44%" in item.reason
    at_the_limit = value_item("x", [0.95, 1.0, 1.05], unit="s", bar=None, facts={})
    assert at_the_limit.state == "ok"


def test_a_void_figure_has_no_verdict_whatever_its_value() -> None:
    item = ratio_item("x", [1.0] * 3, [1.0] * 3, bar=Bar(0.8, "at least"), facts={}, void="3 of 4 blocks came back as they were put")
    assert (item.state, item.reached, item.reason) == ("void", None, "3 of 4 blocks came back as they were put")


@pytest.mark.parametrize(
    ("bar", "figure", "reached"),
    [
        (Bar(6, "at most"), 6.0, True),
        (Bar(6, "at most"), 6.1, False),
        (Bar(0.8, "at least"), 0.8, True),
        (Bar(0.8, "at least"), 0.79, False),
    ],
)
def test_bars_have_a_direction(bar: Bar, figure: float, reached: bool) -> None:
    assert value_item("x", [figure], unit="s", bar=bar, facts={}).reached is reached


def test_a_skipped_item_says_why_and_claims_nothing() -> None:
    item = skipped_item("dram_get", "too little memory")
    assert item.to_dict()["state"] == "skipped" and item.to_dict()["reason"] == "too little memory"
    assert item.reached is None and item.figure is None


def test_rounds_alternate_which_arm_goes_first() -> None:
    order: list[str] = []

    def arm(name: str, number: int) -> float:
        order.append(f"{name}{number}")
        return float(number)

    store, bare = abba(4, lambda number: arm("A", number), lambda number: arm("B", number))
    assert order == ["A0", "B0", "B1", "A1", "A2", "B2", "B3", "A3"]
    assert store == bare == [0.0, 1.0, 2.0, 3.0]


# --- verification --------------------------------------------------------------------------------------------------


def test_a_block_with_one_wrong_bit_or_of_another_number_voids_a_round() -> None:
    blocks = Blocks(3, 4096)
    outs = [blocks[number].copy() for number in range(3)]
    assert check_blocks(blocks, range(3), [0, 0, 0], outs).void is None
    assert check_blocks(blocks, range(3), [0, 1, 0], outs).void == "2 of 3 blocks came back as they were put"
    assert check_blocks(blocks, [0, 2, 1], [0, 0, 0], outs).void == "1 of 3 blocks came back as they were put"
    outs[2][4000] ^= 1
    assert check_blocks(blocks, range(3), [0, 0, 0], outs).void == "2 of 3 blocks came back as they were put"


def test_a_read_that_the_kernel_did_not_fetch_from_a_drive_is_not_cold() -> None:
    assert warm(4096, 4096) is None
    assert warm(4095, 4096) == "not cold: 4095 bytes came from the drive for 4096 bytes of blocks"


# --- the bare loop -------------------------------------------------------------------------------------------------


def test_the_bare_loop_repeats_the_writes_and_reads_of_a_store(tmp_path: Path) -> None:
    blocks = Blocks(24, MIB // 4)
    options = {"capacity": 64 * MIB, "buffer": 8 * MIB, "codec": "raw", "segment_bytes": 2 * MIB, "gds": "off"}
    path = str(tmp_path / "store")
    with tracing_device(path, StoreConfig.build(**options)) as device, opened(path, device=device, **options) as store:
        store.namespace(bench_namespace(blocks.block_bytes))
        device.begin()
        blocks.put_all(store)
        written = device.trace.cut()
    assert written.total_bytes("write") >= 24 * blocks.block_bytes
    assert written.of_kind("sync") and written.of_kind("preallocate")
    assert 0 < written.in_flight_bytes_max <= 4 * 18 * MIB
    memory = touched_memory(8 * MIB)
    assert replay_writes(written, str(tmp_path / "bare"), memory, threads=4) > 0
    assert not (tmp_path / "bare").exists()

    with tracing_device(path, StoreConfig.build(**options)) as device, opened(path, device=device, **options) as store:
        space = store.namespace(bench_namespace(blocks.block_bytes))
        outs = list(np.zeros((24, blocks.block_bytes), dtype=np.uint8))
        device.begin()
        statuses = space.get_many_into(blocks.keys, outs)
        read = device.trace.cut()
    assert check_blocks(blocks, range(24), statuses, outs).void is None
    assert read.total_bytes("read") >= 24 * blocks.block_bytes
    assert replay_reads(read, memory, threads=4) > 0


def test_synthetic_blocks_are_the_same_in_every_run() -> None:
    assert np.array_equal(synthetic_kv(1 << 16), synthetic_kv(1 << 16))
    assert bench_key(1) != bench_key(2) != bench_key(1, salt="absent")


# --- the whole -----------------------------------------------------------------------------------------------------


def _quiet() -> Console:
    return Console(quiet=True)


def test_a_quick_run_answers_with_one_object_and_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bench"
    code = run_bench(folder, as_json=True, quick=True, console=_quiet())
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(answer) == {"machine", "settings", "items", "elapsed_s"}
    items = {item["name"]: item for item in answer["items"]}
    assert set(items) == FIGURES
    assert set(answer["machine"]) == set(machine_facts(str(tmp_path)))
    for name, item in items.items():
        assert item["state"] in ("ok", "unresolved", "skipped") or "not cold" in item["reason"], (name, item)
        if item["state"] != "skipped":
            assert item["value"] > 0 and item["rounds"] >= 1, (name, item)
            assert (item["ok"] is None) == (item["bar"] is None), (name, item)
    paths = items["read_raw.aligned"]["facts"]["io_bytes"]
    assert sum(paths.values()) >= answer["settings"]["size_bytes"] and set(paths) <= {"o_direct", "buffered", "gds", "cufile-compat"}
    assert code == int(any(item["state"] == "void" for item in items.values()))
    assert not folder.exists()


def test_chosen_items_are_measured_and_shown_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench(tmp_path, only=["compression"], quick=True, console=_quiet()) == 0
    shown = capsys.readouterr().out
    assert "codec.encode" in shown and "write_raw" not in shown
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_item_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="write_row"):
        run_bench(tmp_path / "bench", only=["write_row"], quick=True, console=_quiet())
    assert "write_raw" in ITEMS and not (tmp_path / "bench").exists()


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(NoSpace, match="GiB free"):
        check_free_space(str(tmp_path), 1 << 60)
    with pytest.raises(NoSpace):
        run_bench(tmp_path, only=["write_raw"], size_bytes=1 << 58, console=_quiet())
    assert list(tmp_path.iterdir()) == []


def test_an_item_is_plain_values_in_json() -> None:
    item = Item("x", "ratio", "ok", 0.912345678, (0.9, 0.95), 9, Bar(0.8, "at least"), None, {"store_GB_s": 1.23456789})
    assert json.loads(json.dumps(item.to_dict())) == {
        "name": "x",
        "value": 0.91235,
        "unit": "ratio",
        "bar": 0.8,
        "direction": "at least",
        "ok": True,
        "spread": [0.9, 0.95],
        "rounds": 9,
        "state": "ok",
        "reason": None,
        "facts": {"store_GB_s": 1.2346},
    }
