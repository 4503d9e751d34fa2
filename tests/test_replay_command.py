"""``kvlode replay``: its figures, its JSON object, its curves, what it refuses, and that a real store agrees with the simulation."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from command import run_here
from kvlode import InvalidConfig
from kvlode.tools.cli import app
from kvlode.tools.replay.bounds import bounds_of
from kvlode.tools.replay.options import Settings, blocks_of, policy_choice
from kvlode.tools.replay.prefill_rates import DEFAULT_RATE, PREFILL_RATES, prefill_rate
from kvlode.tools.replay.real import BlockBytes, segment_bytes_for_blocks
from kvlode.tools.replay.report import duration_text
from kvlode.tools.replay.runs import token_facts, written_facts
from kvlode.tools.replay.traces import Trace, read_trace

SEED = 4
KEYS = {
    "prefix_hit_ratio", "block_hit_ratio", "write_amplification", "policy", "admission", "capacity_blocks", "capacity_bytes",
    "unique_blocks", "events", "events_per_s", "requests", "written_bytes", "written_bytes_per_day", "drive_writes_per_day",
    "tokens_not_recomputed", "gpu_seconds_saved", "prefill_source", "bounds", "runs", "trace", "format", "skipped_lines", "mode",
}  # fmt: skip
AGREEMENT = 0.02
"""Hit ratios of a real store and of the simulation differ at most by this much: a store frees a segment when it prepares the next one,
which its threads do while requests run; one request more or less still finds the blocks of the freed segment."""


@pytest.fixture
def trace_path(tmp_path: Path) -> Path:
    """Conversations that go on, mostly soon: 220 requests of up to 12 blocks, one each second."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    chats: list[list[int]] = []
    fresh, lines = 1, []
    for second in range(220):
        if not chats or rng.random() < 0.35:
            chats.append([0])
        chat = chats[max(0, len(chats) - 1 - int(rng.expovariate(0.2)))]
        for _ in range(rng.randint(1, 3)):
            chat.append(fresh)
            fresh += 1
        blocks = chat[:12]
        lines.append(json.dumps({"timestamp": 1000 * second, "input_length": 512 * len(blocks), "output_length": 1, "hash_ids": blocks}))
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def facts(*arguments: object) -> dict[str, Any]:
    done = run_here("replay", *arguments, "--json")
    assert done.code == 0, done.err
    return done.json


def test_the_last_line_is_one_object_with_the_figures_of_the_first_policy(trace_path: Path) -> None:
    answer = facts(trace_path, "--segments", 8, "--capacity-share", "30%")
    assert set(answer) >= KEYS
    assert [run["policy"] for run in answer["runs"]] == ["fifo", "reinsertion"]
    assert answer["policy"] == "fifo" and answer["write_amplification"] == 1.0 and answer["mode"] == "simulation"
    assert answer["capacity_blocks"] == int(0.3 * answer["unique_blocks"]) // 8 * 8
    assert 0 < answer["prefix_hit_ratio"] <= answer["block_hit_ratio"] <= answer["bounds"]["belady"]["block_hit_ratio"] < 1
    trace = read_trace(trace_path)
    assert answer["tokens_not_recomputed"] == round(answer["prefix_hit_ratio"] * trace.block_uses) * 512
    assert answer["gpu_seconds_saved"] == pytest.approx(answer["tokens_not_recomputed"] / prefill_rate(DEFAULT_RATE).tokens_per_s)


def test_the_table_names_policies_and_bounds(trace_path: Path) -> None:
    done = CliRunner().invoke(app, ["replay", str(trace_path), "--segments", "8", "--policy", "reinsertion:hits_min=1"])
    assert done.exit_code == 0, done.output
    rows = ("prefix hits", "drive writes a day", "age at eviction", "GPU seconds")
    for text in ("reinsertion:hits_min=1", "Belady's bound", "object LRU", *rows):
        assert text in done.stdout


def test_memories_in_front_and_a_restart_are_told_apart(trace_path: Path) -> None:
    answer = facts(
        trace_path, "--segments", 8, "--capacity-share", "60", "--hbm", "5%", "--dram", "10%", "--restart-at", 110, "--policy", "fifo"
    )
    assert set(answer["tier_hit_ratios"]) == {"hbm", "dram"}
    assert answer["store_hit_ratio"] == pytest.approx(answer["prefix_hit_ratio"] - sum(answer["tier_hit_ratios"].values()))
    assert answer["after_restart"]["restart_at_s"] == 110 and answer["after_restart"]["prefix_hit_ratio"] > 0


def test_a_sweep_gives_a_curve_for_each_policy_and_bound(trace_path: Path, tmp_path: Path) -> None:
    answer = facts(trace_path, "--sweep", "--segments", 4, "--sweep-shares", "5%,20%,80%", "--policy", "fifo", "--policy", "reinsertion")
    assert set(answer["curves"]) == {"fifo", "reinsertion", "lru", "belady"}
    for points in answer["curves"].values():
        assert [point["capacity_blocks"] for point in points] == sorted(point["capacity_blocks"] for point in points)
        assert len(points) == 3 and all(0 <= point["miss_ratio"] <= 1 for point in points)
    belady = [point["block_hit_ratio"] for point in answer["curves"]["belady"]]
    assert belady == sorted(belady)
    done = run_here("replay", trace_path, "--sweep", "--segments", 4, "--sweep-shares", "5%,80%")
    assert done.code == 0 and "Belady's bound" in done.out


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_a_sweep_is_drawn_and_written_as_a_page_of_its_own(trace_path: Path, tmp_path: Path) -> None:
    picture, page = tmp_path / "curves.svg", tmp_path / "curves.html"
    facts(trace_path, "--sweep", "--segments", 4, "--sweep-shares", "10%,50%", "--plot", picture, "--html", page)
    assert "<svg" in picture.read_text()
    text = page.read_text()
    assert text.count("<svg") == 1 and "<table>" in text and "reinsertion" in text
    assert 'src="' not in text and "<script" not in text and "<link" not in text, "the page loads nothing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "clairvoyant"], "unknown reclaim policy"),
        (["--policy", "fifo:speed=1"], "no option"),
        (["--policy", "fifo:speed"], "option cannot be read"),
        (["--admission", "never"], "unknown admission policy"),
        (["--capacity", "1GiB", "--capacity-share", "5%"], "two capacities"),
        (["--capacity", "1KiB"], "too small for its segments"),
        (["--capacity-share", "x%"], "not a share"),
        (["--prefill", "gpt-9@H100"], "no prefill rate"),
        (["--plot", "x.svg"], "no curve"),
        (["--sweep", "--plot", "curves.gif"], "cannot be drawn"),
        (["--sweep", "--real"], "a sweep is simulated"),
        (["--real", "--hbm", "5%"], "no memories in front"),
        (["--format", "csv"], "no such format"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(trace_path: Path, arguments: list[str], message: str) -> None:
    done = run_here("replay", trace_path, "--segments", 4, *arguments)
    assert done.code == 16 and message in done.err, done.err
    assert len(done.err.strip().splitlines()) == 1


def test_bad_lines_are_told_and_strict_refuses_them(trace_path: Path) -> None:
    trace_path.write_text(trace_path.read_text() + "broken\n")
    done = run_here("replay", trace_path, "--segments", 4)
    assert done.code == 0 and "1 line passed over: line 221" in done.out
    assert facts(trace_path, "--segments", 4)["skipped_lines"] == 1
    refused = run_here("replay", trace_path, "--segments", 4, "--strict")
    assert refused.code == 16 and "line 221" in refused.err


@pytest.mark.parametrize("policy", ["fifo", "reinsertion"])
def test_a_real_store_agrees_with_the_simulation(trace_path: Path, tmp_path: Path, policy: str) -> None:
    size = ("--segments", 8, "--capacity-share", "30%", "--block-bytes", "32KiB", "--policy", policy)
    simulated = facts(trace_path, *size)
    real = facts(trace_path, *size, "--real", "--folder", tmp_path / "drive")
    assert real["mode"] == "real" and real["capacity_blocks"] == simulated["capacity_blocks"] and real["segments"] == simulated["segments"]
    for name in ("prefix_hit_ratio", "block_hit_ratio"):
        assert real[name] == pytest.approx(simulated[name], abs=AGREEMENT), name
    assert real["write_amplification"] == pytest.approx(simulated["write_amplification"], abs=0.1)
    assert real["blocks_verified"] == round(real["prefix_hit_ratio"] * real["events"]) > 0
    assert real["refused_blocks"] == 0 and real["read_bytes_per_s"] > 0 and real["write_bytes_per_s"] > 0
    assert list((tmp_path / "drive").iterdir()) == [], "the store is removed at the end"


def test_a_real_replay_goes_on_behind_a_restart(trace_path: Path, tmp_path: Path) -> None:
    size = ("--segments", 8, "--capacity-share", "60%", "--block-bytes", "32KiB", "--policy", "fifo")
    real = (*size, "--real", "--folder", tmp_path / "drive")
    whole, restarted = facts(trace_path, *real), facts(trace_path, *real, "--restart-at", 110)
    assert restarted["prefix_hit_ratio"] == pytest.approx(whole["prefix_hit_ratio"], abs=0.1)


def test_block_bytes_differ_by_id_and_place() -> None:
    made = BlockBytes(100)
    first, second = made.make(1), made.make(2)
    assert first.size == 100 and (first == made.make(1)).all()
    assert (first != second).mean() > 0.9 and len(set(first[:64].view("u8").tolist())) == 8


@pytest.mark.parametrize("blocks", [1, 20, 300])
def test_a_segment_has_room_for_its_blocks_and_not_for_one_more(blocks: int) -> None:
    record_bytes = 4096 + 8192
    assert segment_bytes_for_blocks(blocks + 1, 8000) >= segment_bytes_for_blocks(blocks, 8000) + record_bytes
    assert segment_bytes_for_blocks(blocks, 8000) < 4096 * 10 + (blocks + 1) * record_bytes + 512 * blocks


def test_sizes_shares_and_policies_are_read() -> None:
    assert blocks_of("10%", 1 << 20, 999, "capacity") == 99
    assert blocks_of("1GiB", 1 << 20, 999, "capacity") == 1024
    choice = policy_choice("reinsertion:hits_min=3,write_amplification_max=1.5")
    assert (choice.name, choice.options) == ("reinsertion", {"hits_min": 3, "write_amplification_max": 1.5})
    assert policy_choice("budget:bytes_per_day=2GiB").options == {"bytes_per_day": 2 << 30}
    assert policy_choice("budget").admission(1).name == "budget", "a budget without a limit has that of a store"


def test_every_prefill_rate_has_a_source_and_computed_ones_say_so() -> None:
    for rate in PREFILL_RATES:
        assert rate.tokens_per_s > 100 and rate.source
        assert rate.computed == rate.source.startswith("computed, not measured")
        assert prefill_rate(f"{rate.model}@{rate.gpu}".upper()) is rate
    with pytest.raises(InvalidConfig):
        prefill_rate("none@none")


def test_rates_a_day_follow_from_the_length_of_the_trace() -> None:
    trace = Trace(Path("x"), "mooncake", 512, [])
    assert written_facts(trace, 100, 10)["written_bytes_per_day"] is None, "no time has passed"
    saved = token_facts(Settings((), policy_choice("always"), prefill="deepseek-v3@H100"), 100, 6537)
    assert saved["gpu_seconds_saved"] == pytest.approx(1.0, rel=0.001)
    assert [duration_text(seconds) for seconds in (None, 3.21, 300, 9000, 200000)] == ["-", "3.2 s", "5.0 min", "2.5 h", "2.3 d"]


def test_the_bounds_of_a_trace_that_can_be_followed_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    uses = [1, 2, 3, 1, 2, 3]
    path.write_text(
        "".join(json.dumps({"timestamp": t, "input_length": 1, "output_length": 1, "hash_ids": [u]}) + "\n" for t, u in enumerate(uses))
    )
    bounds = bounds_of(read_trace(path), 2)
    assert bounds["lru"]["block_hit_ratio"] == 0, "a loop over three blocks defeats LRU with two"
    assert bounds["belady"]["block_hit_ratio"] == pytest.approx(2 / 6), "keeping 1 and 2 hits both"
