"""The bench: what may be claimed of a figure, that both arms do the same, and the shape of its answer. No time is asserted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from kvlode import InvalidConfig, NoSpace
from kvlode.engine.config import StoreConfig
from kvlode.tools.bench import ITEMS, drive_read, drive_write, fio, run_bench
from kvlode.tools.bench.amplification import Written, drive_write_bytes
from kvlode.tools.bench.bare import replay_reads, replay_writes, touched_memory
from kvlode.tools.bench.figures import Bar, Item, abba, quartiles_of, ratio_item, skipped_item, value_item
from kvlode.tools.bench.machine import check_free_space, machine_facts
from kvlode.tools.bench.read_arms import Destinations, Order, ReadArms, StoredBlocks, warm
from kvlode.tools.bench.setting import Setting
from kvlode.tools.bench.sizes import SIZES, blocks_of_size, name_of_size
from kvlode.tools.bench.trace import Operation, Trace
from kvlode.tools.bench.workload import DISTINCT_BYTES, Blocks, bench_key, bench_namespace, check_blocks, opened, tracing_device
from kvlode.tools.bench.write_arms import WriteArms

MIB = 1 << 20
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


def test_the_bare_loop_reads_every_place_once_and_cuts_up_what_the_device_cuts_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "1.seg"
    path.write_bytes(bytes(40 * MIB))
    trace = Trace([Operation("read", 0, "t", offset, length) for offset, length in ((0, 20 * MIB), (20 * MIB, 4096))], [str(path)])
    trace.in_flight_max = 2
    seen: list[tuple[int, int]] = []
    preadv = os.preadv

    def noting(descriptor: int, views: list[memoryview], offset: int) -> int:
        seen.append((offset, sum(map(len, views))))
        return preadv(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", noting)
    replay_reads(trace, touched_memory(32 * MIB), threads=3)
    assert sorted(seen) == [(start * MIB, 4 * MIB) for start in range(0, 20, 4)] + [(20 * MIB, 4096)]


def test_the_depth_of_a_trace_is_that_of_the_measured_part(tmp_path: Path) -> None:
    with tracing_device(str(tmp_path), StoreConfig(gds="off")) as device:
        for _ in range(3):
            device.began(4096)
        for _ in range(2):
            device.ended(4096, write=True)
        trace = device.begin()
        assert (trace.in_flight_max, trace.in_flight_bytes_max) == (1, 4096)
        device.began(8192)
        device.ended(8192, write=False)
        assert (trace.in_flight_max, trace.in_flight_bytes_max) == (2, 12288)


def test_keys_with_another_salt_are_other_keys() -> None:
    assert bench_key(1) != bench_key(2) != bench_key(1, salt="absent")


# --- the arms ------------------------------------------------------------------------------------------------------


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(str(tmp_path), size_bytes=4 * MIB, rounds=2, quick=True, console=_quiet())


def test_a_write_round_counts_its_bytes_and_its_processor_time_and_leaves_no_store(setting: Setting, tmp_path: Path) -> None:
    blocks = Blocks(16, MIB // 4)
    arms = WriteArms(setting, blocks)
    arms.prepare()
    assert arms.rounds == [] and arms.trace.total_bytes("write") >= blocks.total_bytes
    assert arms.store(0) > 0 and arms.bare(0) > 0
    (done,) = arms.rounds
    assert done.seconds > 0 and done.cpu_s > 0 and arms.stored_ratio == 1
    assert done.written.process_bytes == 0 or done.written.process_bytes >= blocks.total_bytes  # 0: a file system in memory
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("order", ["prefix", "random"])
def test_a_read_round_delivers_every_block_to_a_new_place(setting: Setting, order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Blocks(40, 16 << 10)
    stored = StoredBlocks.write(setting, blocks, "read")
    arms = ReadArms(setting, stored, Destinations.aligned(blocks), order)
    monkeypatch.setattr("kvlode.tools.bench.read_arms.warm", lambda read_bytes, stored_bytes: None)
    offsets = []
    for number in range(2):
        assert arms.store(number) > 0 and arms.bare(number) > 0
        offsets.append([(operation.file, operation.offset) for operation in arms.trace.of_kind("read")])
    assert arms.void is None and len(arms.cpu_s) == 2
    assert stored.ratio == 1 and arms.trace.total_bytes("read") >= blocks.total_bytes
    if order == "random":
        assert len(offsets[0]) > 3 and offsets[0] != offsets[1]


def test_a_block_that_is_missing_voids_the_reads(setting: Setting) -> None:
    blocks = Blocks(8, 16 << 10)
    stored = StoredBlocks.write(setting, blocks, "read")
    with opened(stored.path, **stored.options) as store:
        store.namespace(blocks.namespace).delete([blocks.keys[3]])
    arms = ReadArms(setting, stored, Destinations.aligned(blocks), "prefix")
    arms.prepare()
    assert arms.void == "7 of 8 blocks came back as they were put"


def test_every_size_has_a_name_and_blocks_that_fit_into_memory(setting: Setting) -> None:
    assert [name_of_size(size) for size in SIZES] == ["64KiB", "256KiB", "1MiB", "16MiB", "128MiB"]
    assert blocks_of_size(setting, MIB).count == 4 and blocks_of_size(setting, 16 * MIB).count == 2
    assert Blocks(3, DISTINCT_BYTES // 2).distinct == 2


def test_a_name_of_several_groups_gives_only_its_part(setting: Setting) -> None:
    assert [item.name for item in drive_write.measure(setting, {"cpu_per_gb"})] == ["cpu_per_gb.write"]
    assert [item.name for item in drive_read.measure(setting, {"cpu_per_gb"})] == ["cpu_per_gb.read"]


def test_amplification_is_void_when_the_kernel_counted_too_little(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Written, "now", classmethod(lambda cls, folder: Written(0, None)))
    (item,) = drive_write.measure(setting, {"write_amplification"})
    assert (item.name, item.state) == ("write_amplification", "void") and item.reason is not None and "did not count" in item.reason


def test_a_drive_is_found_by_its_numbers_and_not_by_its_place_in_the_list() -> None:
    lines = " 259 0 nvme0n1 1 2 3 4 5 6 100 8 9\n 259 1 nvme0n1p1 1 2 3 4 5 6 40 8 9\n 7 0 loop0 1\n"
    assert drive_write_bytes(lines, os.makedev(259, 1)) == 40 * 512
    assert drive_write_bytes(lines, os.makedev(7, 0)) is None
    assert drive_write_bytes(lines, os.makedev(0, 45)) is None
    assert Written(10, 7).since(Written(4, 2)) == Written(6, 5)
    assert Written(10, None).since(Written(4, 2)) == Written(6, None)


# --- fio -----------------------------------------------------------------------------------------------------------

FAKE_FIO = """#!/bin/sh
printf '%s\\n' "$@" > "{log}"
echo 'note: something before the object'
echo '{{"jobs": [{{"read": {{"bw_bytes": 3000000000}}, "write": {{"bw_bytes": 0}}}}]}}'
"""


def _read_trace() -> Trace:
    return Trace([Operation("read", 0, "t", 0, 69632), Operation("read", 1, "t", 0, 69632)], ["/s/1.seg", "/s/2.seg"], in_flight_max=10)


def test_fio_is_asked_for_the_same_requests(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, log = tmp_path / "fio", tmp_path / "log"
    program.write_text(FAKE_FIO.format(log=log))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert fio.read_rate(_read_trace(), setting, "randread") == 3.0
    words = log.read_text().split()
    assert {"--bs=69632", "--iodepth=10", "--rw=randread", "--direct=1", "--readonly", "--filename=/s/1.seg:/s/2.seg"} <= set(words)
    program.write_text("#!/bin/sh\nexit 1\n")
    assert fio.read_rate(_read_trace(), setting, "read") is None


def test_without_fio_there_is_no_figure_of_it(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert fio.read_rate(_read_trace(), setting, "read") is None
    assert fio.write_rate(Trace(), setting) is None


# --- the whole -----------------------------------------------------------------------------------------------------


def _quiet() -> Console:
    return Console(quiet=True)


DRIVE_ITEMS = ("write_raw", "read_raw", "read_prefix", "read_small", "write_amplification", "cpu_per_gb", "dram_get")
DRIVE_FIGURES = {
    *("write_raw", "write_raw.fresh", "write_raw.64KiB", "write_raw.1MiB", "write_amplification", "cpu_per_gb.write", "cpu_per_gb.read"),
    *("read_raw.aligned", "read_raw.tensors", "read_raw.1MiB", "read_prefix", "read_prefix.64KiB", "read_small.64KiB", "dram_get"),
}


def test_a_quick_run_answers_with_one_object_and_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bench"
    code = run_bench(folder, as_json=True, only=DRIVE_ITEMS, quick=True, console=_quiet())
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(answer) == {"machine", "settings", "items", "elapsed_s"}
    items = {item["name"]: item for item in answer["items"]}
    assert set(items) == DRIVE_FIGURES
    assert set(answer["machine"]) == set(machine_facts(str(tmp_path)))
    for name, item in items.items():
        _check_item(name, item)
    paths = items["read_raw.aligned"]["facts"]["io_bytes"]
    assert sum(paths.values()) >= answer["settings"]["size_bytes"] and set(paths) <= {"o_direct", "buffered", "gds", "cufile-compat"}
    assert code == int(any(item["state"] == "void" for item in items.values()))
    assert not folder.exists()


def _check_item(name: str, item: dict[str, Any]) -> None:
    """Measured, or with a reason; a file system in memory has no drive whose counters could prove anything."""
    assert item["state"] in ("ok", "unresolved", "skipped") or "not cold" in item["reason"] or "did not count" in item["reason"], (
        name,
        item,
    )
    if item["state"] != "skipped":
        assert item["value"] > 0 and item["rounds"] >= 1, (name, item)
        assert (item["ok"] is None) == (item["bar"] is None or item["state"] == "void"), (name, item)


@pytest.mark.slow
def test_every_item_gives_a_figure_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_bench(tmp_path, as_json=True, quick=True, console=_quiet())
    items = {item["name"]: item for item in json.loads(capsys.readouterr().out.splitlines()[-1])["items"]}
    assert {name.split(".")[0] for name in items} == set(ITEMS)
    for name, item in items.items():
        _check_item(name, item)
    assert list(tmp_path.iterdir()) == []


def test_chosen_items_are_measured_and_shown_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench(tmp_path, only=["dram_get"], quick=True, console=_quiet()) == 0
    shown = capsys.readouterr().out
    assert "dram_get" in shown and "write_raw" not in shown
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
