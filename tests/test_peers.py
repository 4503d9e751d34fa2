"""The comparison with other stores: that all are treated alike, and what may be claimed of it. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from harness import chart, data, peers  # noqa: E402
from harness.children import child, children  # noqa: E402
from harness.report import show, to_json  # noqa: E402
from harness.rounds import Plan, append, load, measure, run_round  # noqa: E402
from harness.summary import EXPECTATIONS, ROWS, Results, kvlode_void, summarise  # noqa: E402
from stores import steps, system  # noqa: E402
from stores.base import Store  # noqa: E402

BLOCK_BYTES = 64 << 10
BLOCKS = 32
HERE = ("kvlode", "rocksdb_blob", "safetensors")
"""Stores that run in the environment of the tests."""
MACHINE = {"cpu": "a processor", "cpu_count": 2, "memory_bytes": 1 << 30, "file_system": "ext4", "kernel": "6"}


def plan_in(folder: Path) -> Plan:
    return Plan(folder, BLOCKS * BLOCK_BYTES, [data.incompressible(folder, BLOCK_BYTES)], "auto", Console(quiet=True))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two rounds of the stores that are here, and of one that is not."""
    folder = tmp_path_factory.mktemp("peers")
    absent = peers.Peer("diskcache", "diskcache", "diskcache_files", "DiskcacheFiles", "nowhere")
    wanted = [*(peer for peer in peers.PEERS if peer.name in HERE), absent]
    plan = plan_in(folder)
    with children(wanted, folder) as stores:
        missing = {store.peer.name: store.missing for store in stores if store.missing}
        return [{"missing": missing}, *(record for number in range(2) for record in run_round(plan, stores, number))]


# --- with real stores --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HERE)
def test_a_store_delivers_every_block_warm_cold_and_after_a_kill(measured: list[dict[str, Any]], name: str) -> None:
    records = [record for record in measured if record.get("peer") == name]
    assert [record["round"] for record in records] == [0, 1]
    for record in records:
        assert [record[part]["correct"] for part in ("warm", "cold")] == [BLOCKS, BLOCKS]
        assert record["lookups_right"]
        assert (record["served"], record["wrong"]) == (record["served_of"], 0)


def test_a_cold_read_comes_from_the_drive(measured: list[dict[str, Any]]) -> None:
    if not any(record["cold"]["read_bytes"] for record in measured if "cold" in record):
        pytest.skip("this file system is on no drive")
    voids = {item.name: item.reason for item in summarise(measured) if item.state == "void"}
    assert not voids


def test_the_order_of_the_stores_is_another_one_in_every_round(measured: list[dict[str, Any]]) -> None:
    orders = [[record["peer"] for record in measured if record.get("round") == number] for number in range(2)]
    assert orders == [list(HERE), [*HERE[1:], HERE[0]]]


def test_a_store_that_is_not_there_is_named_with_its_reason(measured: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    items = {item.name: item for item in summarise(measured)}
    absent = items["incompressible.write.diskcache"]
    assert (absent.state, absent.reason) == ("skipped", "there is no environment .engines/nowhere: make bench-setup")
    show(list(items.values()), measured, {"data": {"incompressible": "random bytes"}}, MACHINE, quick=True)
    assert "diskcache did not run: there is no environment" in capsys.readouterr().out


def test_every_store_appears_in_every_row_of_the_answer(measured: list[dict[str, Any]]) -> None:
    answer = to_json(summarise(measured), {}, MACHINE)
    names = {item["name"] for item in answer["items"]}
    others = [name for name in peers.NAMES if name != peers.KVLODE]
    assert names >= {f"incompressible.{row.name}.{name}" for row in ROWS for name in others}
    assert names >= {f"incompressible.served_after_kill.{name}" for name in peers.NAMES}
    assert {"name", "value", "unit", "bar", "ok", "spread"} <= set(answer["items"][0])
    json.dumps(answer)


def test_the_chart_is_one_file_that_needs_no_other(measured: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "chart.svg"
    chart.draw(measured, {"data": {"incompressible": "random bytes"}, "size_bytes": 1 << 20}, path)
    text = path.read_text()
    assert text.startswith("<?xml") and 'href="http' not in text.replace('xlink:href="#', "")


def test_a_store_whose_library_is_missing_says_so(tmp_path: Path) -> None:
    with child(peers.Peer("x", "x", "no_such_store", "X"), tmp_path) as store:
        store.begin()
    assert store.missing is not None and "no_such_store" in store.missing


def test_a_store_that_fails_is_a_result_and_leaves_nothing_behind(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    broken = data.Data("incompressible", tmp_path / "absent.kv", BLOCK_BYTES, {}, "")
    peer = next(peer for peer in peers.PEERS if peer.name == "safetensors")
    with child(peer, tmp_path) as store:
        store.begin()
        record = measure(plan, store, broken, 0)
        again = measure(plan, store, plan.data[0], 0)
    assert "FileNotFoundError" in record["error"] and again["warm"]["correct"] == BLOCKS
    assert not (tmp_path / peer.name).exists()


# --- with a store that lies --------------------------------------------------------------------------------------


class Liar(Store):
    """Says that it delivered every block, and delivers all but one."""

    def open(self) -> None: ...
    def close(self) -> None: ...
    def put(self, keys: Sequence[bytes], rows: Sequence[int]) -> None: ...
    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [True] * len(keys)

    def get(self, keys: Sequence[bytes], rows: Sequence[int]) -> list[bool]:
        for row in rows[1:]:
            block = (row - len(keys) - 1) % len(keys)
            self.task.arena[row] = self.task.arena[block]
        return [True] * len(rows)


def test_a_block_that_was_not_delivered_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    path = data.incompressible(tmp_path, BLOCK_BYTES).path
    order = steps.Order(str(folder), str(path), BLOCK_BYTES, BLOCKS, None, seed=1, codec="auto")
    space = steps.Workspace(order)
    got = steps.get_all(space, Liar(space.task()), order.keys())
    assert (got["hits"], got["correct"]) == (BLOCKS, BLOCKS - 1)


def test_rows_begin_on_pages_and_differ(tmp_path: Path) -> None:
    rows = system.aligned_rows(3, BLOCK_BYTES)
    assert all(row.ctypes.data % 4096 == 0 for row in rows)
    path = data.incompressible(tmp_path, BLOCK_BYTES).path
    space = steps.Workspace(steps.Order(str(tmp_path), str(path), BLOCK_BYTES, 2 * data.DISTINCT_BLOCKS, None, 0, "auto"))
    blocks = {row.tobytes() for row in space.arena[: space.order.count]}
    assert len(blocks) == 2 * data.DISTINCT_BLOCKS


# --- what may be claimed -----------------------------------------------------------------------------------------


def record(peer: str, number: int, seconds: float, **changes: Any) -> dict[str, Any]:
    got = {"seconds": seconds, "cpu_s": 0.1, "read_bytes": 1000, "read_bytes_with_open": 1000, "correct": 4, "expected": 4}
    base = {
        "round": number, "data": "incompressible", "peer": peer, "raw_bytes": 1000, "stored_bytes": 1000, "disk_bytes": 1000,
        "write_s": seconds, "write_cpu_s": 0.1, "warm": got, "cold": got, "lookup_present_us": 1.0, "lookup_absent_us": 1.0,
        "lookups_right": True, "open_s": 0.1, "served": 4, "served_of": 4, "wrong": 0,
    }  # fmt: skip
    return base | changes


def rounds_of(times_s: dict[str, Sequence[float]]) -> list[dict[str, Any]]:
    return [record(peer, number, seconds) for peer, each in times_s.items() for number, seconds in enumerate(each)]


def item_of(records: list[dict[str, Any]], name: str) -> Any:
    return next(item for item in summarise(records) if item.name == name)


def test_a_figure_is_the_median_of_ratios_of_the_same_round() -> None:
    """The drive slows down: both stores with it, so every round says 2."""
    item = item_of(rounds_of({"kvlode": [1, 2, 4], "vllm_fs": [2, 4, 8]}), "incompressible.write.vllm_fs")
    assert (item.figure, item.quartiles, item.state, item.rounds) == (2.0, (2.0, 2.0), "ok", 3)


def test_a_round_that_one_of_the_two_lacks_is_no_pair() -> None:
    item = item_of(rounds_of({"kvlode": [1, 1, 1], "vllm_fs": [2, 2]}), "incompressible.write.vllm_fs")
    assert item.rounds == 2


def test_a_wide_spread_is_unresolved() -> None:
    assert item_of(rounds_of({"kvlode": [1, 1, 1], "vllm_fs": [1, 2, 3]}), "incompressible.write.vllm_fs").state == "unresolved"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cold": record("x", 0, 1)["cold"] | {"correct": 3}}, "3 of 4 blocks came back as they were put"),
        ({"cold": record("x", 0, 1)["cold"] | {"read_bytes": 100}}, "not cold: 1000 bytes"),
        ({"cold": record("x", 0, 1)["cold"] | {"read_bytes_with_open": 990}}, "not cold: 990 bytes"),
        ({"read_error": "it fell over"}, None),
    ],
)  # fmt: skip
def test_a_get_that_is_not_whole_or_not_cold_voids_its_figure(changes: dict[str, Any], reason: str | None) -> None:
    records = [record("kvlode", 0, 1), record("vllm_fs", 0, 1, **changes)]
    item = item_of(records, "incompressible.cold_read.vllm_fs")
    if reason is None:
        assert item.state == "ok"  # the error was told by a step that this figure does not need
    else:
        assert item.state == "void" and item.reason.startswith(reason)
    assert not kvlode_void(summarise(records))


def test_a_wrong_block_of_kvlode_is_its_own_failure() -> None:
    assert kvlode_void(summarise([record("kvlode", 0, 1, wrong=1), record("vllm_fs", 0, 1)]))


def test_the_bar_is_against_the_strongest_of_those_that_are_not_void() -> None:
    records = rounds_of({"kvlode": [1, 1], "vllm_fs": [2, 2], "lmcache_raw_block": [1.5, 1.5], "safetensors": [6, 6]})
    records += [record("diskcache", 0, 0.1, lookups_right=False)]
    items = {item.name: item for item in summarise(records)}
    assert items["expected.write_raw"].absolute["peer"] == "diskcache"  # its write is not in doubt
    assert items["expected.read_raw"].absolute["peer"] == "diskcache"
    records[-1]["cold"] = records[-1]["cold"] | {"correct": 0}
    raw = item_of(records, "expected.read_raw")
    assert (raw.absolute["peer"], raw.figure, raw.reached) == ("lmcache_raw_block", 1.5, True)


def test_less_is_better_where_it_is() -> None:
    records = [record("kvlode", 0, 1, disk_bytes=680), record("vllm_fs", 0, 1)]
    item = item_of(records, "incompressible.disk.vllm_fs")
    assert item.figure == pytest.approx(0.68) and item.absolute["faster"]
    assert {expectation.row for expectation in EXPECTATIONS} <= {row.name for row in ROWS}


def test_a_store_that_served_nothing_after_the_kill_says_so() -> None:
    records = [record("kvlode", 0, 1), record("lmcache_raw_block", 0, 1, served=0)]
    item = item_of(records, "incompressible.served_after_kill.lmcache_raw_block")
    assert (item.figure, item.absolute["served"], item.absolute["of"]) == (0.0, 0, 4)


def test_rounds_are_kept_and_go_on(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    assert load(path) == []
    for each in rounds_of({"kvlode": [1, 2]}):
        append(path, each)
    assert Results(load(path)).of("incompressible", "kvlode").keys() == {0, 1}


def test_an_unknown_store_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), str(tmp_path), "--only", "floppy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "floppy" in done.stderr
