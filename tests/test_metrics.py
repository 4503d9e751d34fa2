"""What a store counts and times, and how Prometheus gets it: names, documents, dashboard and scrape agree."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvlode
from command import command_line, run_apart, run_here
from kvlode import Status
from kvlode.engine.histograms import LATENCIES, LATENCY_BOUNDS_S, Histogram, log_bounds, quantile
from kvlode.engine.stats_file import read_stats
from kvlode.engine.testing import ManualClock
from kvlode.tools.metrics.names import ALL_METRICS, STORE_LABELS
from rig import KIB, MIB, Rig, eventually, put_blocks, read

pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from kvlode.tools.metrics.collector import StoreCollector

ROOT = Path(kvlode.__file__).resolve().parent
BLOCK_BYTES = 64 * KIB
SPACE = kvlode.Namespace(model="a model", revision="1", dtype="uint8", layout="x", tokens_per_block=16, block_bytes_max=BLOCK_BYTES)
OTHER = kvlode.Namespace(model="another", revision="1", dtype="uint8", layout="x", tokens_per_block=16, block_bytes_max=BLOCK_BYTES)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[kvlode.DiskStore]:
    """A store that has put, served, missed, deleted and reclaimed."""
    with kvlode.open(tmp_path / "store", capacity="32MiB", buffer="4MiB", gds="off", serve_clean=False, put_timeout_s=60) as store:
        space, other = store.namespace(SPACE), store.namespace(OTHER)
        put_blocks(space, 0, 600, BLOCK_BYTES)
        put_blocks(other, 600, 610, BLOCK_BYTES)
        assert read(other, b"filler 609", BLOCK_BYTES)[0] is Status.HIT
        assert store.flush(60)
        assert read(other, b"filler 609", BLOCK_BYTES)[0] is Status.HIT
        assert read(space, b"absent", BLOCK_BYTES)[0] is Status.MISS
        other.delete([b"filler 600"])
        yield store


def scrape_of(collector: Any) -> dict[str, Metric]:
    registry = CollectorRegistry()
    registry.register(collector)
    return {family.name: family for family in text_string_to_metric_families(generate_latest(registry).decode())}


def total(family: Metric, **labels: str) -> float:
    return sum(sample.value for sample in family.samples if labels.items() <= sample.labels.items())


def sample_names(text: str) -> set[str]:
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


def documented_name(name: str, kind: str) -> str:
    """The name that the parser gives a family: a counter's without its suffix."""
    return name.removesuffix("_total") if kind == "counter" else name


# --- statistics -------------------------------------------------------------------------------------------------------


def test_gets_are_told_apart_by_what_became_of_them() -> None:
    rig = Rig(ManualClock(), capacity=16 * MIB, buffer=4 * MIB, segment_bytes=MIB, serve_clean=False)
    space = rig.store.namespace(SPACE)
    put_blocks(space, 0, 3, BLOCK_BYTES)
    assert space.put(b"short-lived", np.ones(BLOCK_BYTES, np.uint8), ttl=5)
    assert rig.store.flush(30)
    assert read(space, b"filler 0", BLOCK_BYTES)[0] is Status.HIT
    assert read(space, b"filler 1", BLOCK_BYTES - 8)[0] is Status.WRONG_SIZE
    assert read(space, b"absent", BLOCK_BYTES)[0] is Status.MISS
    rig.clock.advance(10)
    assert read(space, b"short-lived", BLOCK_BYTES)[0] is Status.EXPIRED
    gets = rig.store.stats()["gets"]
    told = {name: gets[name] for name in ("blocks", "hits", "misses", "expired", "wrong_size", "corrupt", "hit_bytes", "hit_ratio")}
    assert told == {
        "blocks": 4, "hits": 1, "misses": 1, "expired": 1, "wrong_size": 1, "corrupt": 0, "hit_bytes": BLOCK_BYTES, "hit_ratio": 0.25,
    }  # fmt: skip
    rig.close()


def test_hits_of_the_buffer_and_of_the_drive_are_counted_apart_for_each_namespace(store: kvlode.DiskStore) -> None:
    stats = store.stats()
    other = stats["namespaces"][OTHER.digest.hex()]
    assert (other["model"], other["put_blocks"], other["put_bytes"]) == ("another", 10, 10 * BLOCK_BYTES)
    assert other["buffer_hits"] + other["disk_hits"] == other["get_blocks"] == 2
    assert stats["namespaces"][SPACE.digest.hex()]["misses"] == 1
    assert sum(space["put_blocks"] for space in stats["namespaces"].values()) == stats["counters"]["put_blocks"] == 610
    assert 10 * BLOCK_BYTES <= other["log_bytes"] <= 10 * BLOCK_BYTES * 2


def test_what_takes_time_is_timed(store: kvlode.DiskStore) -> None:
    def settled() -> bool:  # commits and reclaim go on in the background, each timed and counted one after the other
        stats = store.stats()
        pairs = (("commit", "syncs"), ("reclaim_segment", "segments_retired"))
        return all(stats["latency"][timed]["count"] == stats["counters"][counted] > 0 for timed, counted in pairs)

    assert eventually(settled)
    latency, counters = store.stats()["latency"], store.stats()["counters"]
    assert set(latency) == set(LATENCIES)
    assert latency["put"]["count"] == counters["put_blocks"]
    assert latency["get_drive"]["count"] == latency["get_drive_block"]["count"] == counters["disk_hits"]
    assert latency["get_buffer"]["count"] + latency["get_drive"]["count"] == 3
    assert latency["flush"]["count"] == 1
    assert latency["segment_write"]["count"] > 0
    for name, told in latency.items():
        assert 0 < told["p50"] <= told["p90"] <= told["p99"], name
        assert sum(count for _, count in told["buckets"]) == told["count"]


def test_write_amplification_is_what_was_written_by_what_was_new(store: kvlode.DiskStore) -> None:
    stats = store.stats()
    writes = stats["writes"]
    assert writes["segment_bytes"] == sum(path["write_bytes"] for path in stats["io"].values())
    assert writes["fresh_raw_bytes"] == 610 * BLOCK_BYTES
    assert writes["amplification"] == writes["segment_bytes"] / writes["fresh_stored_bytes"] >= 1
    assert writes["bytes_per_day"] > 0 and writes["capacities_per_day"] == writes["bytes_per_day"] / stats["capacity_bytes"]


def test_counting_loses_nothing_among_threads() -> None:
    histogram = Histogram()
    threads = [threading.Thread(target=lambda: [histogram.observe(2e-6) for _ in range(5000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert histogram.snapshot()["count"] == 20_000


@given(st.lists(st.floats(min_value=0, max_value=500, allow_nan=False), min_size=1, max_size=200))
def test_a_histogram_puts_each_value_below_its_bound_and_quantiles_into_the_right_bucket(values: list[float]) -> None:
    histogram = Histogram()
    histogram.observe_many(values)
    told = histogram.snapshot()
    assert told["count"] == len(values) and told["sum"] == pytest.approx(sum(values))
    ends = [*LATENCY_BOUNDS_S, float("inf")]
    below = 0
    for end, count in told["buckets"]:
        bound = float("inf") if end is None else end
        start = ends[ends.index(bound) - 1] if bound != ends[0] else -1.0
        assert count == sum(start < value <= bound for value in values)
        below += count
    assert below == len(values)
    middle = sorted(values)[(len(values) - 1) // 2]
    bucket = next(end for end in ends if middle <= end)
    estimate = quantile(told["buckets"], 0.5, LATENCY_BOUNDS_S)
    assert estimate is not None
    assert estimate <= min(bucket, LATENCY_BOUNDS_S[-1]) and (bucket == ends[0] or estimate >= ends[ends.index(bucket) - 1])


def test_buckets_are_evenly_spaced_on_a_logarithmic_scale() -> None:
    assert log_bounds(1.0, 100.0, 2) == (1.0, 3.2, 10.0, 32.0, 100.0)
    assert LATENCY_BOUNDS_S[0] == 1e-6 and LATENCY_BOUNDS_S[-1] == 100.0
    ratios = [after / before for before, after in itertools.pairwise(LATENCY_BOUNDS_S)]
    assert min(ratios) > 1.7 and max(ratios) < 1.86
    assert Histogram().snapshot() == {"count": 0, "sum": 0.0, "p50": None, "p90": None, "p99": None, "buckets": []}


# --- scrapes ----------------------------------------------------------------------------------------------------------


def test_a_scrape_says_what_the_statistics_say(store: kvlode.DiskStore) -> None:
    stats = store.stats()  # of one moment: reclaim goes on behind it
    families = scrape_of(StoreCollector(lambda: stats))
    counters = stats["counters"]
    other = {"namespace": OTHER.digest.hex()}
    assert total(families["kvlode_up"], store=store.path, role="writer") == 1
    assert total(families["kvlode_puts"]) == counters["put_blocks"]
    assert total(families["kvlode_puts"], **other) == 10
    assert total(families["kvlode_hits"], **other) == 2
    assert total(families["kvlode_misses"]) == 1
    assert total(families["kvlode_segments_freed"]) == counters["segments_retired"]
    assert total(families["kvlode_deleted"], **other) == 1
    assert total(families["kvlode_namespace_log_bytes"], model="another") > 0
    assert total(families["kvlode_io_bytes"], direction="write") == sum(io["write_bytes"] for io in stats["io"].values())


def test_histograms_are_real_ones(store: kvlode.DiskStore) -> None:
    family = scrape_of(StoreCollector(store))["kvlode_put_seconds"]
    assert family.type == "histogram"
    buckets = [(float(s.labels["le"]), s.value) for s in family.samples if s.name == "kvlode_put_seconds_bucket"]
    assert [bound for bound, _ in buckets] == [*LATENCY_BOUNDS_S, float("inf")]
    counts = [count for _, count in buckets]
    assert counts == sorted(counts) and counts[-1] == 610
    assert next(s.value for s in family.samples if s.name == "kvlode_put_seconds_count") == 610
    assert next(s.value for s in family.samples if s.name == "kvlode_put_seconds_sum") > 0


def test_names_follow_the_conventions_of_prometheus() -> None:
    names = [metric.name for metric in ALL_METRICS]
    assert len(set(names)) == len(names)
    for metric in ALL_METRICS:
        assert re.fullmatch(r"kvlode_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert bool(metric.bounds) == (metric.kind == "histogram")
        assert not {"milliseconds", "ms", "kilobytes", "mib"} & set(metric.name.split("_")), "base units only"
        assert metric.help.endswith(".") and not set(metric.labels) & set(STORE_LABELS)


def test_every_metric_is_in_a_scrape_and_in_the_document_and_no_other(store: kvlode.DiskStore) -> None:
    families = scrape_of(StoreCollector(store))
    described = {documented_name(metric.name, metric.kind): metric for metric in ALL_METRICS}
    assert set(families) == set(described)
    assert {name: family.type for name, family in families.items()} == {name: metric.kind for name, metric in described.items()}
    table = (ROOT / "docs/metrics.md").read_text().partition("<!-- metrics -->")[2].partition("<!-- end: metrics -->")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    labels = {metric.name: ", ".join(f"`{label}`" for label in metric.labels) or "-" for metric in ALL_METRICS}
    assert rows == [f"| `{m.name}` | {m.kind} | {labels[m.name]} | {m.help} |" for m in ALL_METRICS]
    for name, family in families.items():
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == {*STORE_LABELS, *described[name].labels}


def test_two_stores_of_one_process_share_a_registry(store: kvlode.DiskStore, tmp_path: Path) -> None:
    registry = CollectorRegistry()
    registry.register(StoreCollector(store))
    with kvlode.open(tmp_path / "second", capacity="32MiB", buffer="4MiB", gds="off") as second:
        registry.register(StoreCollector(second.stats))
        text = generate_latest(registry).decode()
    assert {f'store="{store.path}"', f'store="{tmp_path / "second"}"'} <= set(re.findall(r'store="[^"]*"', text))


def test_a_store_set_is_told_store_by_store(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two", tmp_path / "not there"]
    with kvlode.open(folders, own=2, capacity="32MiB", buffer="4MiB", gds="off") as stores:
        families = scrape_of(StoreCollector(stores))
    assert [s.value for s in families["kvlode_up"].samples] == [1, 1, 0]
    assert {s.labels["store"] for s in families["kvlode_capacity_bytes"].samples} == {str(folder) for folder in folders[:2]}


def test_a_closed_store_is_down_and_spoils_no_other_metric(tmp_path: Path) -> None:
    store = kvlode.open(tmp_path / "store", capacity="32MiB", buffer="4MiB", gds="off")
    collector = StoreCollector(store)
    assert total(scrape_of(collector)["kvlode_up"]) == 1
    store.close()
    families = scrape_of(collector)
    assert [(s.labels["store"], s.value) for s in families["kvlode_up"].samples] == [(str(tmp_path / "store"), 0.0)]
    assert families["kvlode_puts"].samples == []


# --- the dashboard ------------------------------------------------------------------------------------------------------

_NAME = re.compile(r"\bkvlode_[a-z_]+")


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def test_every_metric_of_the_dashboard_is_in_a_scrape_of_a_live_store(store: kvlode.DiskStore) -> None:
    registry = CollectorRegistry()
    registry.register(StoreCollector(store))
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_address[1]}/metrics", timeout=30) as answer:
            scraped = sample_names(answer.read().decode())
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    dashboard = json.loads((ROOT / "docs/grafana-dashboard.json").read_text())
    used = set()
    for panel in panels(dashboard):
        expressions = [target["expr"] for target in panel["targets"]]
        assert expressions, panel["title"]
        for expression in expressions:
            names = set(_NAME.findall(expression))
            assert names and names <= scraped, f"{panel['title']}: {names - scraped}"
            assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}")
            used |= names
    assert {name.removesuffix("_bucket") for name in used} >= {f"kvlode_{name}_seconds" for name in LATENCIES}
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$(?!__)\{?(\w+)", json.dumps(dashboard))) == variables


def test_the_dashboard_has_its_rows_and_no_panel_lies_on_another() -> None:
    dashboard = json.loads((ROOT / "docs/grafana-dashboard.json").read_text())
    rows = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    assert len(rows) == 7 and {"Throughput", "Hit ratio", "Latency", "Drive wear", "Namespaces", "Errors"} <= set(rows)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    identities = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(identities)) == len(identities)


# --- serve-metrics ------------------------------------------------------------------------------------------------------


def test_a_store_of_another_process_is_served_over_http(store: kvlode.DiskStore) -> None:
    assert eventually(lambda: any(p.stats["counters"].get("deleted_blocks") for p in read_stats(store.path)))
    server = subprocess.Popen(command_line("serve-metrics", store.path, "--port", 0), stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        address = re.search(r"http://\S+", server.stderr.readline())
        assert address is not None
        with urllib.request.urlopen(address.group(), timeout=30) as answer:
            families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=60)
        if server.stderr is not None:
            server.stderr.close()
    assert code == 0
    assert total(families["kvlode_up"], role="writer") == 1
    assert total(families["kvlode_puts"]) == 610
    assert set(families) == {documented_name(metric.name, metric.kind) for metric in ALL_METRICS}


def test_once_prints_the_metrics_and_ends(store: kvlode.DiskStore) -> None:
    assert eventually(lambda: bool(read_stats(store.path)))
    done = run_here("serve-metrics", store.path, "--once")
    assert done.code == 0 and "kvlode_capacity_bytes" in sample_names(done.out)


def test_a_store_that_nobody_has_open_is_down(tmp_path: Path) -> None:
    kvlode.open(tmp_path / "store", capacity="32MiB", buffer="4MiB", gds="off").close()
    done = run_here("serve-metrics", tmp_path / "store", "--once")
    families = {family.name: family for family in text_string_to_metric_families(done.out)}
    assert [(s.labels["store"], s.value) for s in families["kvlode_up"].samples] == [(str(tmp_path / "store"), 0.0)]


def test_what_stands_in_the_way_is_one_clear_line(store: kvlode.DiskStore, tmp_path: Path) -> None:
    nothing = run_here("serve-metrics", tmp_path / "nothing")
    assert nothing.code == 16 and "not a kvlode store" in nothing.err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        busy = run_here("serve-metrics", store.path, "--port", port)
    assert busy.code == 8 and f"127.0.0.1:{port}" in busy.err and "another --port" in busy.err
    elsewhere = run_here("serve-metrics", store.path, "--port", 0, "--address", "192.0.2.1")
    assert elsewhere.code == 8 and "--address" in elsewhere.err
    for done in (nothing, busy, elsewhere):
        assert len(done.err.splitlines()) == 1


def test_without_the_client_library_the_command_says_what_to_install(tmp_path: Path) -> None:
    kvlode.open(tmp_path / "store", capacity="32MiB", buffer="4MiB", gds="off").close()
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "prometheus_client.py").write_text("raise ImportError('hidden by a test')\n")
    done = run_apart("serve-metrics", tmp_path / "store", "--once", PYTHONPATH=os.fspath(hidden))
    assert done.code == 16 and "kvlode[metrics]" in done.err and "Traceback" not in done.err


def test_a_store_needs_no_client_library(tmp_path: Path) -> None:
    script = "import sys, kvlode; kvlode.open(sys.argv[1], capacity='32MiB', buffer='4MiB', gds='off').close(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "store"], capture_output=True, text=True, timeout=100, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "kvlode" in loaded and not {"prometheus_client", "opentelemetry"} & loaded
