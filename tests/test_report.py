"""``kvlode report``: a page that loads nothing, escapes everything, and advises only what the figures say."""

from __future__ import annotations

import html.parser
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvlode
from command import run_here
from kvlode.engine.miss_ratio import MissRatioCurve, MissRatioSampler
from kvlode.tools.exit_codes import EXIT_DAMAGE, EXIT_USAGE
from kvlode.tools.report.advice import advise, miss_ratio_at
from kvlode.tools.report.charts import bars, curve_chart, latency_chart
from kvlode.tools.report.collect import collect
from kvlode.tools.report.page import page
from model import block_bytes, descriptor

MIB, GIB = 1 << 20, 1 << 30
HOSTILE = "</title><script>alert('x')</script>\x1b[2J\" onload=\"x"
VOID = {"meta", "br", "link"}


class Page(html.parser.HTMLParser):
    """Checks that elements are closed in order; collects elements, attributes, text and names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open
        names = [value for name, value in self.attributes if name == "id"]
        assert len(names) == len(set(names)), "a name comes twice on the page"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(text: str) -> Page:
    """The page parses, has no script and no handler, and names no address but those of the SVG vocabularies."""
    parsed = Page(text)
    assert not parsed.tags & {"script", "iframe", "img", "object", "embed", "link", "form", "foreignobject"}
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert set(re.findall(r"https?://[^\"'\s)]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "url(" not in text.replace("url(#", "") and "@import" not in text
    assert "\x1b" not in text
    return parsed


def open_store(path: Path) -> kvlode.DiskStore:
    return kvlode.open(path, capacity="64MiB", buffer="16MiB", segment_bytes=MIB, gds="off")


def use(store: kvlode.DiskStore, count: int) -> None:
    space = store.namespace(descriptor(HOSTILE, block_bytes_max=1 << 16))
    for number in range(count):
        assert space.put(b"%d" % number, block_bytes(b"%d" % number, 0, 40_000))
    assert store.flush()
    out = np.empty(40_000, np.uint8)
    for number in range(0, count, 3):
        space.get_into(b"%d" % number, out)
    assert space.delete([b"1"]) == 1 and store.flush()


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "store"
    with open_store(path) as store:
        use(store, 60)
    return path


def curve(points: dict[int, float], **changes: Any) -> MissRatioCurve:
    whole = MissRatioCurve(list(points), list(points.values()), 100_000, 50_000, 30_000, 8192, 0.1)
    return replace(whole, **changes)


# --- the page ----------------------------------------------------------------------------------------------------------------


def test_the_page_of_a_closed_store_stands_alone(closed: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    done = run_here("report", closed, "--html", target, "--json")
    assert done.code == 0 and done.json["html"] == str(target)
    assert sum(done.json["histograms"]["age_blocks"]) == 59 == sum(done.json["histograms"]["hit_blocks"])
    parsed = checked(target.read_text())
    assert "alert('x')" in parsed.text and "\\u001b[2J" in parsed.text
    for words in ("no process has the store open", "There is no curve", "Blocks by use", "No running process publishes"):
        assert words in parsed.text, words


def test_the_page_of_a_running_store_has_its_figures(tmp_path: Path) -> None:
    with open_store(tmp_path / "store") as store:
        use(store, 60)
        store._core._stats_file.publish()  # type: ignore[union-attr]  (instead of waiting for the next second)
        report = collect(tmp_path / "store")
    parsed = checked(page(report))
    assert report.view.live and report.curve is not None and report.curve.uses == 80
    assert "Too little data for advice: 80 uses" in parsed.text and "99 of 100 within" in parsed.text
    assert "25.0%of needed blocks were read" in parsed.text


def test_the_page_of_an_empty_store(tmp_path: Path) -> None:
    with open_store(tmp_path / "store"):
        pass
    target = tmp_path / "page.html"
    assert run_here("report", tmp_path / "store", "--html", target).code == 0
    assert "There are no live blocks." in checked(target.read_text()).text


def test_the_page_of_a_damaged_store_tells(closed: Path, tmp_path: Path) -> None:
    copy, target = tmp_path / "damaged", tmp_path / "page.html"
    (copy / "segments").mkdir(parents=True)
    for file in (closed / "segments").iterdir():
        (copy / "segments" / file.name).write_bytes(file.read_bytes())
    first = min((copy / "segments").iterdir())
    first.write_bytes(first.read_bytes()[:8192] + bytes(range(256)) * 64 + first.read_bytes()[24576:-4096])
    done = run_here("report", copy, "--html", target)
    assert done.code == EXIT_DAMAGE
    assert "damaged:" in checked(target.read_text()).text


def test_the_page_is_never_written_into_the_store(closed: Path, tmp_path: Path) -> None:
    done = run_here("report", closed, "--html", closed / "page.html")
    assert done.code == EXIT_USAGE and "inside the store" in done.err and not (closed / "page.html").exists()
    done = run_here("report", closed, "--html", tmp_path / "none" / "page.html")
    assert done.code == EXIT_USAGE and len(done.err.splitlines()) == 1
    assert run_here("report", tmp_path, "--html", tmp_path / "page.html").code == EXIT_USAGE


# --- charts --------------------------------------------------------------------------------------------------------------------


def test_charts_follow_the_colours_of_the_page() -> None:
    buckets = {"count": 3, "buckets": [[0.001, 1], [0.01, 1], [None, 1]]}
    points = {MIB << step: 1 / (step + 1) for step in range(8)}
    drawn = [
        bars("ages", "by age", ["a", "b"], [0, 5], "axis"),
        curve_chart("curve", curve(points), 64 * MIB, 32 * MIB),
        curve_chart("flat", curve({MIB: 1.0, 2 * MIB: 0.5}), None, None),
        latency_chart("latency", {"put": buckets}, ["put"]),
    ]
    for svg in drawn:
        assert svg.startswith("<svg") and "var(--" in svg and "#0102" not in svg and "metadata" not in svg
    checked("".join(drawn))
    assert "capacity" in drawn[1] and "knee" in drawn[1] and "knee" not in drawn[2]


def test_the_same_chart_is_the_same_text() -> None:
    assert bars("a", "b", ["x"], [1], "axis") == bars("a", "b", ["x"], [1], "axis")


# --- advice --------------------------------------------------------------------------------------------------------------------


def test_a_falling_curve_asks_for_capacity() -> None:
    advice = advise(curve({GIB // 2: 0.8, GIB: 0.6, 2 * GIB: 0.4, 4 * GIB: 0.2}), GIB, 0.38)
    assert advice.lines[0] == "More capacity would help: twice as much (2.0 GiB) reads 20.0 of 100 blocks more."
    assert "40.0 of 100 needed blocks are read" in advice.lines[1] and "since opening: 38.0" in advice.lines[1]
    assert "reads 20.0 of 100, 20.0 of 100 fewer" in advice.lines[2]
    assert advice.knee_bytes is None and "no knee" in advice.lines[3]


def test_a_level_curve_asks_for_none_and_names_the_knee() -> None:
    level = curve({GIB // 8: 0.9, GIB // 4: 0.5, GIB // 2: 0.3, GIB: 0.295, 2 * GIB: 0.29, 4 * GIB: 0.29})
    advice = advise(level, GIB, None)
    assert advice.lines[0].startswith("There is capacity to spare: half of it (512.0 MiB) loses 0.5 of 100")
    assert advice.knee_bytes == GIB // 2 and "The knee is at 512.0 MiB, below the capacity" in "\n".join(advice.lines)
    fits = advise(level, GIB // 2, None)
    assert fits.lines[0].startswith("The capacity fits")
    assert advise(level, 64 * GIB, None).lines[0].startswith("There is capacity to spare"), "beyond its end the curve is level"


def test_too_little_data_is_said_and_nothing_else() -> None:
    for few in (curve({GIB: 0.5, 2 * GIB: 0.1}, uses=10), curve({GIB: 0.5}, repeated_uses=3), curve({}), MissRatioSampler().curve()):
        advice = advise(few, GIB, 0.5)
        assert len(advice.lines) == 1 and advice.lines[0].startswith("Too little data")
    assert "There is no curve" in advise(None, GIB, None).lines[0]
    assert "above the capacity" in advise(curve({4 * GIB: 0.5, 8 * GIB: 0.4}), GIB, None).lines[0]


@given(
    steps=st.lists(st.floats(0, 1), min_size=1, max_size=40),
    capacity_bytes=st.integers(1, 1 << 50),
    first=st.integers(12, 40),
)
def test_any_curve_gets_advice_and_a_chart_of_words(steps: list[float], capacity_bytes: int, first: int) -> None:
    points = {round(2 ** (first + number / 8)): ratio for number, ratio in enumerate(sorted(steps, reverse=True))}
    any_curve = curve(points)
    advice = advise(any_curve, capacity_bytes, 0.5)
    assert advice.lines and all(line.endswith((".", ")")) for line in advice.lines)
    at = miss_ratio_at(any_curve, capacity_bytes)
    assert at is None or min(steps) - 1e-9 <= at <= max(steps) + 1e-9
