"""``kvlode top``: samples become views, views become frames of any width; a live store in another process; none; damage; hostile names."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import kvlode
from command import command_line, run_here
from kvlode.engine.stats_file import PublishedStats
from kvlode.tools.exit_codes import EXIT_USAGE
from kvlode.tools.top.alerts import alerts_of
from kvlode.tools.top.command import Looks, Screen
from kvlode.tools.top.draw import draw, rate_text
from kvlode.tools.top.model import TopView, view_of
from kvlode.tools.top.sample import Sample, read_files, take_sample
from model import block_bytes, descriptor

MIB = 1 << 20
HOSTILE = "evil\x1b[2J<b>\n[red]model"
SPACES = {
    "aa" * 16: {"model": HOSTILE, "log_bytes": 30 * MIB, "put_bytes": 10 * MIB, "get_blocks": 50, "buffer_hits": 20, "disk_hits": 20},
    "bb" * 16: {"model": "second", "log_bytes": 10 * MIB},
}
WRITER = """
import sys, time, numpy as np, kvlode
from model import block_bytes, descriptor
with kvlode.open(sys.argv[1], capacity="64MiB", buffer="8MiB", segment_bytes=1 << 20, gds="off") as store:
    space = store.namespace(descriptor(sys.argv[2], block_bytes_max=1 << 16))
    number = 0
    print("open", flush=True)
    while True:
        space.put(b"%d" % number, block_bytes(b"%d" % number, 0, 60_000))
        space.get_into(b"%d" % number, np.empty(60_000, np.uint8))
        number += 1
        time.sleep(0.005)
"""
"""A process that uses a store until it is ended."""


def stats_of(**changes: Any) -> dict[str, Any]:
    """Statistics of the shape of ``Store.stats()``."""
    counters = {"put_blocks": 1000, "put_bytes": 1000 * MIB, "get_blocks": 400, "buffer_hits": 100, "disk_hits": 200, "misses": 100}
    return {
        "path": "/srv/store",
        "store_uuid": "ab" * 16,
        "role": "writer",
        "failure": None,
        "open_s": 100.0,
        "capacity_bytes": 1 << 30,
        "used_bytes": 900 * MIB,
        "segments": {"count": 14, "sealed": 13, "leaving": 0, "bytes": 880 * MIB},
        "buffer": {"capacity_bytes": 64 * MIB, "free_bytes": 16 * MIB, "dirty_bytes": 8 * MIB, "clean_blocks": 40},
        "io_paths": {"host": "o_direct"},
        "io": {"o_direct": {"reads": 1, "read_bytes": 300 * MIB, "writes": 1, "write_bytes": 1100 * MIB}},
        "gets": {"hit_bytes": 300 * MIB, "hit_ratio": 0.75},
        "writes": {"amplification": 1.1, "fresh_stored_bytes": 1000 * MIB},
        "reclaim": {"segments_freed": 3, "evicted_blocks": 90, "reinserted_blocks": 9, "policy": "reinsertion", "threshold_hits": 2},
        "latency": {"put": {"count": 1000, "p50": 0.0002, "p99": 0.003, "buckets": []}, "flush": {"count": 0, "p50": None, "p99": None}},
        "decisions": [{"at_s": 10.0 + n, "event": "segment_freed", "reason": "room", "segment": f"{n:016x}.seg"} for n in range(20)],
        "namespaces": SPACES,
        "counters": counters,
    } | changes


def counted(stats: dict[str, Any], **changes: int) -> dict[str, Any]:
    return stats | {"counters": stats["counters"] | changes}


def sample(taken_s: float, stats: dict[str, Any] | None, *, age_s: float = 0.3, alive: bool = True, pid: int = 7, **others: Any) -> Sample:
    said = None if stats is None else PublishedStats(Path("stats/writer.json"), "writer", pid, age_s, alive, stats)
    values: dict[str, Any] = {"others": 0, "locked": stats is not None, "free_bytes": 1 << 40, "files": None}
    return Sample(Path("/srv/store"), taken_s, said, **(values | others))


def later(stats: dict[str, Any]) -> dict[str, Any]:
    """The same store two seconds on."""
    grown = counted(stats, put_blocks=1200, put_bytes=1200 * MIB, get_blocks=500, buffer_hits=150, disk_hits=240, misses=110)
    spaces = SPACES | {"aa" * 16: SPACES["aa" * 16] | {"put_bytes": 12 * MIB, "get_blocks": 60}}
    io_ = {"o_direct": {"read_bytes": 320 * MIB, "write_bytes": 1300 * MIB}}
    return grown | {"open_s": 102.0, "io": io_, "namespaces": spaces}


def frame(view: TopView, width: int, height: int = 60, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, highlight=False, markup=False, emoji=False, force_terminal=False)
    console.print(draw(view, width=width, height=height, **options))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def texts(found: list[Any], level: str) -> str:
    return "\n".join(alert.text for alert in found if alert.level == level)


# --- from samples to a view ----------------------------------------------------------------------------------------------


def test_rates_are_what_was_counted_between_two_samples() -> None:
    view = view_of(sample(50.0, stats_of()), sample(52.0, later(stats_of())), now_ns=0)
    assert view.window_s == 2.0
    assert (view.rates["put_blocks"], view.rates["put_bytes"]) == (100.0, 100.0 * MIB)
    assert (view.rates["drive_write_bytes"], view.rates["drive_read_bytes"]) == (100.0 * MIB, 10.0 * MIB)
    assert view.hit_ratio == pytest.approx(0.9) and view.hit_ratio_open == 0.75
    assert view.reused == pytest.approx(390 / 1590)
    assert [tier.name for tier in view.tiers] == ["buffer", "drive"]
    assert (view.tiers[0].used_bytes, view.tiers[0].hits_per_s) == (48 * MIB, 25.0)
    first = view.namespaces[0]
    assert (first.digest, first.put_bytes_per_s, first.get_blocks_per_s, first.hit_ratio) == ("aa" * 16, MIB, 5.0, pytest.approx(40 / 60))
    assert view.decisions[0]["at_s"] == 29.0, "the latest decision comes first"
    assert [operation.name for operation in view.operations] == ["put"]


def test_one_sample_has_no_rates_and_the_hit_ratio_since_opening() -> None:
    view = view_of(None, sample(50.0, stats_of()), now_ns=0)
    assert view.window_s is None and set(view.rates.values()) == {None}
    assert view.hit_ratio == 0.75


@pytest.mark.parametrize("changes", [{"pid": 8}, {"stats": stats_of(open_s=3.0)}])
def test_a_store_that_was_opened_again_gives_no_rates(changes: dict[str, Any]) -> None:
    view = view_of(sample(50.0, stats_of()), sample(52.0, **({"stats": later(stats_of())} | changes)), now_ns=0)
    assert view.window_s is None


@given(first=st.integers(0, 1000), second=st.integers(0, 1000), seconds=st.floats(0.001, 1e6))
def test_rates_are_never_negative(first: int, second: int, seconds: float) -> None:
    before, now = sample(1.0, counted(stats_of(), put_blocks=first)), sample(1.0 + seconds, counted(stats_of(), put_blocks=second))
    rate = view_of(before, now, now_ns=0).rates["put_blocks"]
    assert rate is not None and rate >= 0


def test_alerts_name_what_is_wrong() -> None:
    quiet = sample(50.0, stats_of())
    assert alerts_of(None, quiet) == []
    bad = counted(
        stats_of(failure="write failed", writes={"amplification": 1.4, "fresh_stored_bytes": 1 << 30}),
        refused_puts=7,
        refused_buffer_full=5,
        refused_not_admitted=2,
        corrupt_blocks=1,
        read_errors=2,
        no_space_errors=3,
    )
    found = alerts_of(None, sample(52.0, bad, age_s=60.0))
    assert found == sorted(found, key=lambda alert: ("bad", "warning", "note").index(alert.level))
    for words in ("the writer has stopped: write failed", "1 corrupt block", "2 reads failed", "disk is full", "said nothing for 60 s"):
        assert words in texts(found, "bad")
    assert "5 puts refused: the buffer was full" in texts(found, "warning"), "what a policy leaves out is no trouble"
    assert "write amplification 1.40, above 1.15" in texts(found, "warning")
    assert alerts_of(sample(51.0, bad), sample(52.0, bad | {"open_s": 101.0}))[-1].text.startswith("write amplification"), "old refusals"


def test_alerts_tell_who_is_behind_the_figures() -> None:
    assert "no process has the store open" in texts(alerts_of(None, sample(1.0, None)), "note")
    assert "publishes no statistics" in texts(alerts_of(None, sample(1.0, None, locked=True)), "warning")
    gone = sample(1.0, stats_of(), alive=False, locked=False)
    assert "ended without closing" in texts(alerts_of(None, gone), "warning")
    assert not view_of(None, gone, now_ns=0).live, "figures of a process that is gone are not shown as figures of now"
    full = sample(1.0, stats_of(), free_bytes=MIB)
    assert "the disk is nearly full: 1.0 MiB left" in texts(alerts_of(None, full), "warning")


# --- from a view to a frame ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 80, 100, 160])
def test_a_frame_fits_its_width_and_obeys_no_name(width: int) -> None:
    view = view_of(sample(50.0, stats_of()), sample(52.0, later(stats_of())), now_ns=0)
    shown = frame(view, width)
    assert max(len(line) for line in shown.splitlines()) <= width
    assert "\x1b" not in shown and "[2J" in shown.replace("…", "[2J"), "the escape is shown, not obeyed"
    if width >= 80:
        for words in ("100.0 MiB/s", "90.0%", "75.0% since opening", "48.0 MiB of 64.0 MiB", "segment freed"):
            assert words in shown, words
        assert r"evil\u001b" in shown
    if width >= 100:
        assert "reinsertion from 2 hits" in shown


def test_the_view_of_one_namespace_shows_everything_of_it() -> None:
    view = view_of(sample(50.0, stats_of()), sample(52.0, later(stats_of())), now_ns=0)
    shown = frame(view, 100, inside="aa" * 16)
    assert "aa" * 16 in shown and "counter: disk hits" in shown and "second" not in shown
    assert "second" in frame(view, 100, inside="no such namespace")


def test_keys_move_and_drill_down_and_come_back() -> None:
    screen, digests = Screen(), ["a", "b", "c"]
    for key in ("down", "down", "down", "up", "enter"):
        assert screen.press(key, digests)
    assert (screen.selected, screen.inside) == (1, "b")
    assert screen.press("down", digests) and screen.selected == 1, "inside, the cursor stays"
    assert screen.press("back", digests) and screen.inside is None
    assert Screen().press("enter", []) and not screen.press("quit", digests)


def test_looks_compare_different_publications() -> None:
    looks = Looks()
    first, same, second = sample(1.0, stats_of()), sample(1.5, stats_of(), age_s=0.8), sample(2.0, later(stats_of()))
    assert looks.add(first) == (None, first)
    before, now = looks.add(same)
    assert before is None and now == replace(same, taken_s=1.0), "published before: it is of the time when it was first seen"
    before, now = looks.add(second)
    assert before is not None and (before.taken_s, now.taken_s) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("value", "unit", "text"), [(None, "", "-"), (0.0, "", "0.0/s"), (1234.5, "", "1,234/s"), (2048.0, "B", "2.0 KiB/s")]
)
def test_rates_as_text(value: float | None, unit: str, text: str) -> None:
    assert rate_text(value, unit) == text


# --- real stores -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Path]:
    """A store that another process uses."""
    path = tmp_path / "store"
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path), HOSTILE], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"open\n"
        yield path
        process.kill()


def test_a_live_store_in_another_process(writer: Path) -> None:
    done = run_here("top", writer, "--json", "--interval", "1.5")
    view = done.json
    assert done.code == 0 and view["live"] and view["role"] == "writer"
    assert view["rates"]["put_blocks"] > 0 and view["hit_ratio"] == 1.0
    assert view["namespaces"][0]["model"] == HOSTILE and view["namespaces"][0]["log_bytes"] > 0
    shown = run_here("top", writer, "--once", "--interval", "0.3", columns=120)
    assert shown.code == 0 and "writer, process" in shown.out and "\x1b[2J" not in shown.out


def test_keys_on_a_terminal(writer: Path) -> None:
    """The command as a person uses it: a frame, into a namespace, out, quit; the terminal is left as it was."""
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    with subprocess.Popen(command_line("top", writer), stdin=follower, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        wait_for(leader, b"throughput")
        os.write(leader, b"\r")
        wait_for(leader, b"block_bytes_max")
        os.write(leader, b"b")
        wait_for(leader, b"throughput")
        os.write(leader, b"q")
        wait_for(leader, b"\x1b[?1049l")
        assert process.wait(30) == 0
    os.close(leader)


def wait_for(descriptor_: int, words: bytes, seconds: float = 60.0) -> None:
    shown, until_s = b"", time.monotonic() + seconds
    while words not in shown:
        ready, _, _ = select.select([descriptor_], [], [], max(0.0, until_s - time.monotonic()))
        assert ready, f"{words!r} did not come: {shown[-2000:]!r}"
        shown += os.read(descriptor_, 1 << 16)


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("top") / "store"
    with kvlode.open(path, capacity="64MiB", buffer="8MiB", segment_bytes=MIB, gds="off") as store:
        space = store.namespace(descriptor("plain", block_bytes_max=1 << 16))
        for number in range(40):
            assert space.put(b"%d" % number, block_bytes(b"%d" % number, 0, 60_000))
        assert store.flush()
    return path


def test_a_store_that_nobody_has_open_is_shown_from_its_files(closed: Path) -> None:
    shown = run_here("top", closed, "--once", columns=100)
    assert shown.code == 0
    for words in ("files alone", "no process has the store open", "plain", "sealed", "█"):
        assert words in shown.out, words
    assert "throughput" not in shown.out
    view = run_here("top", closed, "--json").json
    assert not view["live"] and view["namespaces"][0]["blocks_live"] == 40 and view["segments"]


def test_damage_is_an_alert(closed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "damaged"
    (copy / "segments").mkdir(parents=True)
    for file in [closed / "STORE", *(closed / "segments").iterdir()]:
        (copy / file.relative_to(closed)).write_bytes(file.read_bytes())
    first = min((copy / "segments").iterdir())
    first.write_bytes(b"\xff" * 4096 + first.read_bytes()[4096:])
    now = take_sample(copy, read_files(copy, cells=40, segments_max=8), 1.0)
    assert "damaged:" in texts(alerts_of(None, now), "bad")
    assert "damaged" in frame(view_of(None, now, now_ns=time.time_ns()), 100)


def test_what_is_no_store_is_an_error_of_one_line(tmp_path: Path) -> None:
    done = run_here("top", tmp_path, "--once")
    assert done.code == EXIT_USAGE and "not a kvlode store" in done.err and len(done.err.splitlines()) == 1
