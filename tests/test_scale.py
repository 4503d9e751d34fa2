"""The bench's items on how cost grows: every point of a row is there, all calls are made, wrong answers void. No time is asserted."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from rich.console import Console

from kvlode.tools.bench import (
    ITEMS,
    run_bench,
    scale,
    scale_buffer,
    scale_capacity,
    scale_chart,
    scale_keys,
    scale_namespaces,
    scale_threads,
)
from kvlode.tools.bench.scale_calls import Calls, Figures, one_by_one, side_by_side
from kvlode.tools.bench.setting import Setting

MIB = 1 << 20
EXPECTED = {
    "scale_keys": (scale_keys.QUICK_COUNTS, ("open", "present", "absent", "lookup", "put", "get")),
    "scale_threads": (scale_threads.THREADS, ("put", "hit", "get", "lookup")),
    "scale_namespaces": (scale_namespaces.NAMESPACES, ("put", "lookup", "get")),
    "scale_capacity": (
        tuple(step.name for step in scale_capacity.STEPS),
        ("put", "put_by_bare", "put_p99", "write_amplification", "get"),
    ),
    "scale_buffer": (tuple(f"{mib}MiB" for mib in scale_buffer.QUICK_SIZES_MIB), ("open", "put", "burst", "flush", "hit")),
}


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(str(tmp_path), size_bytes=8 * MIB, rounds=1, quick=True, console=Console(quiet=True))


# --- calls ----------------------------------------------------------------------------------------------------------


def test_many_threads_do_each_call_once_and_at_the_same_time() -> None:
    done: list[int] = []
    all_here = threading.Barrier(4)

    def call(number: int) -> None:
        if number < 4:
            all_here.wait(10)  # passes only when four threads are at work
        done.append(number)

    calls = side_by_side(4, range(10), call)
    assert sorted(done) == list(range(10))
    assert len(calls.calls_ms) == 10 and calls.seconds > 0


def test_what_a_call_raises_reaches_the_one_who_asked() -> None:
    def call(number: int) -> None:
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"):
        side_by_side(2, range(1), call)


def test_what_runs_between_calls_is_not_counted_as_one() -> None:
    order: list[tuple[str, int]] = []
    calls = one_by_one([3, 1], lambda n: order.append(("call", n)), between=lambda n: order.append(("between", n)))
    assert order == [("call", 3), ("between", 3), ("call", 1), ("between", 1)]
    assert calls.seconds == pytest.approx(sum(calls.calls_ms) / 1e3)


def test_rounds_become_medians_and_a_wrong_answer_of_any_round_voids() -> None:
    figures = Figures()
    for value, count in ((1.0, 10), (3.0, 30), (2.0, 20)):
        figures.add("a.put", "GB/s", value, freed=count)
    figures.add_calls("a.get", "ms", 5.0, Calls(1.0, [1.0, 2.0, 3.0]))
    figures.check("a.put", 4, 4)
    figures.check("a.get", 3, 4)
    figures.check("a.get", 4, 4)
    figures.check_cold("a.put", 4096, 4096)
    put, get = figures.items(block_bytes=7)
    assert (put.name, put.figure, put.rounds, put.absolute) == ("a.put", 2.0, 3, {"block_bytes": 7, "freed": 20})
    assert put.state == "unresolved"
    assert (get.state, get.absolute["p50_ms"], get.absolute["worst_ms"]) == ("void", 2.0, 3.0)
    figures.check_cold("a.put", 4095, 4096)
    assert figures.items()[0].state == "void"


# --- the rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", scale.NAMES)
def test_every_point_of_a_row_has_its_figures(setting: Setting, name: str) -> None:
    points, whats = EXPECTED[name]
    items = {item.name: item for item in scale.measure(setting, {name})}
    assert set(items) == {f"{name}.{point}.{what}" for point in points for what in whats}
    for item in items.values():
        assert item.figure is not None and item.figure > 0
        assert item.state != "void" or (item.reason or "").startswith("not cold"), item  # a file system in memory reads from no drive
    assert list(Path(setting.root).iterdir()) == []


def test_a_full_store_frees_what_is_oldest_and_carries_forward_what_is_used(setting: Setting) -> None:
    items = {item.name: item for item in scale.measure(setting, {"scale_capacity"})}
    facts = {step.name: items[f"scale_capacity.{step.name}.put"].absolute for step in scale_capacity.STEPS}
    assert facts["10"]["segments_freed"] == facts["10"]["evicted_blocks"] == 0
    assert facts["turned"]["evicted_blocks"] > 0 and facts["turned"]["reinserted_blocks"] == 0
    assert facts["turned_in_use"]["reinserted_blocks"] > 0
    assert all(fact["used_bytes"] <= fact["capacity_bytes"] for fact in facts.values())


def test_a_buffer_that_memory_has_no_room_for_is_left_out(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_buffer, "available_memory_bytes", lambda: scale_buffer.SPARE_BYTES + 8 * MIB)
    items = {item.name: item for item in scale_buffer.measure(setting)}
    assert items["scale_buffer.16MiB"].state == "skipped" and "free memory" in (items["scale_buffer.16MiB"].reason or "")
    assert items["scale_buffer.4MiB.put"].state != "skipped"


# --- in the bench -------------------------------------------------------------------------------------------------------


def test_the_rows_are_measured_only_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not set(scale.NAMES) & set(ITEMS)
    run_bench(tmp_path, as_json=True, only=["scale_namespaces"], quick=True, console=Console(quiet=True))
    items = json.loads(capsys.readouterr().out.splitlines()[-1])["items"]
    assert {item["name"].split(".")[0] for item in items} == {"scale_namespaces"}
    assert all(item["bar"] is None and item["ok"] is None for item in items)


def test_free_space_is_asked_for_the_largest_row(setting: Setting) -> None:
    full = Setting(setting.root, size_bytes=8 * MIB, rounds=9, quick=False, console=setting.console)
    assert scale.needed_bytes(full) >= 2 * 10_000_000 * 200 > scale.needed_bytes(setting)


def test_the_picture_has_a_panel_for_every_row_and_knows_only_figures_that_are_measured() -> None:
    assert {panel.row for panel in scale_chart.PANELS} == set(scale.NAMES)
    for panel in scale_chart.PANELS:
        assert set(panel.lines) <= set(EXPECTED[panel.row][1])


def test_points_keep_the_order_in_which_they_were_measured() -> None:
    names = ["scale_x.10.put", "scale_x.10.get", "scale_x.turned.put", "scale_x.50.put", "scale_y.1.put"]
    assert scale_chart.points_of("scale_x", dict.fromkeys(names)) == ["10", "turned", "50"]
