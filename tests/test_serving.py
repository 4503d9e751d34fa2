"""What ``make bench-engines`` makes of its rounds, and how its clients hear of tokens; without an engine."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from kvlode import KvlodeError
from kvlode.tools.bench.figures import Bar
from kvlode.tools.bench.page_cache import forget_pages
from kvlode.tools.serving import processes, report
from kvlode.tools.serving.clients import Texts, each_client, stream, tokens_in
from kvlode.tools.serving.figures import comparison, percentile
from kvlode.tools.serving.processes import Usage, compute_cpus, usage_of, wait_idle
from kvlode.tools.serving.rounds import QUICK, Sizes, asked_by, shorter
from kvlode.tools.serving.server import ServerOptions, VllmServer, transfer_settings


def test_percentiles_lie_between_the_sorted_values() -> None:
    assert percentile([3.0], 99) == 3.0
    assert percentile([4.0, 1.0, 3.0, 2.0, 5.0], 50) == 3.0
    assert percentile([0.0, 10.0], 99) == pytest.approx(9.9)
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_a_comparison_pairs_the_rounds() -> None:
    item = comparison("x", [98.0, 50.0, 101.0], [100.0, 50.0, 100.0], unit="tokens/s", bar=Bar(0.97, "at least"))
    assert (item.figure, item.reached, item.state) == (1.0, True, "ok")
    assert item.absolute == {"with_store": 98.0, "without_store": 100.0, "unit": "tokens/s"}
    with pytest.raises(ValueError):
        comparison("x", [1.0], [1.0, 2.0], unit="s")


def test_items_become_plain_json() -> None:
    void = comparison("gap", [2.0], [1.0], unit="ms", bar=Bar(1.1, "at most"), facts={"samples": 3}, void="nothing was loaded")
    plain = json.loads(json.dumps(void.to_dict()))
    assert (plain["name"], plain["value"], plain["bar"], plain["direction"]) == ("gap", 2.0, 1.1, "at most")
    assert plain["ok"] is None and plain["state"] == "void" and plain["reason"] == "nothing was loaded"
    assert plain["facts"]["samples"] == 3
    missed = comparison("gap", [2.0], [1.0], unit="ms", bar=Bar(1.1, "at most")).to_dict()
    assert missed["ok"] is False and missed["spread"] == [2.0, 2.0]


def test_the_table_shows_both_arms_and_reasons() -> None:
    items = [comparison("ttft_p50.4_clients", [0.5], [4.0], unit="s"), comparison("x", [2.0], [1.0], unit="ms", void="no hits")]
    machine = {"vllm": "0.32.0", "model": "a model", "cpu": "a processor", "cpu_count": 2, "load_average": 1.0}
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    report.show(items, machine, Sizes(), console)
    text = console.export_text()
    assert "ttft_p50.4_clients" in text and "0.125" in text and "x: void: no hits" in text


def test_prompts_of_different_names_share_no_prefix() -> None:
    texts = Texts(list(range(50_000, 50_500)), 200)
    prompts = [texts.fresh(f"prompt {number}", 128) for number in range(50)]
    assert {len(prompt) for prompt in prompts} == {128}
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 50
    assert texts.fresh("prompt 7", 128) == prompts[7]
    with pytest.raises(KvlodeError, match="too short"):
        Texts([1, 2, 3], 3)


def test_documents_are_whole_blocks_and_a_single_client_asks_several_times() -> None:
    for sizes in (Sizes(), QUICK, shorter(Sizes())):
        assert sizes.document_tokens % 128 == 0
        assert sizes.decoded_tokens // (sizes.others + 1) >= 1
    assert shorter(Sizes(rounds=7)).rounds == 7
    assert [asked_by(count) for count in (1, 4, 8)] == [4, 4, 8]


def test_the_connector_is_told_to_recompute_what_cannot_be_loaded() -> None:
    assert transfer_settings("a folder", "1GiB")["kv_load_failure_policy"] == "recompute"


def test_tokens_of_a_streamed_line() -> None:
    assert tokens_in(b'data: {"choices": [{"text": "", "token_ids": [5, 6]}]}\n') == 2
    assert tokens_in(b'data: {"choices": [{"text": "a", "token_ids": null}]}\n') == 0
    assert tokens_in(b"data: [DONE]\n") == tokens_in(b"\n") == tokens_in(b'data: {"usage": {}}\n') == 0


class Streaming(BaseHTTPRequestHandler):
    """Answers a completion with one token an event, and one less than asked for when the prompt is empty."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        for token in range(body["max_tokens"] - (not body["prompt"])):
            event = {"choices": [{"text": "", "token_ids": [token]}]}
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def server(tmp_path: Path) -> Iterator[VllmServer]:
    """A server's client side on a stand-in of vLLM."""
    stand_in = ThreadingHTTPServer(("127.0.0.1", 0), Streaming)
    serving = threading.Thread(target=stand_in.serve_forever, daemon=True)
    serving.start()
    found = cast(VllmServer, VllmServer.__new__(VllmServer))
    found.port, found.options, found.log = stand_in.server_address[1], ServerOptions(None), tmp_path / "log"
    found.log.write_text("the end")
    yield found
    stand_in.shutdown()
    stand_in.server_close()
    serving.join(10)


def test_a_client_notes_when_each_token_arrives(server: VllmServer) -> None:
    heard: list[int] = []
    timing = stream(server, [1, 2], 5, heard.append)
    assert heard == [1, 2, 3, 4, 5] and timing.token_count == 5
    assert len(timing.gaps_s) == 4 and min(timing.gaps_s) >= 0 and timing.ttft_s > 0


def test_clients_ask_their_prompts_in_turn(server: VllmServer) -> None:
    timings = each_client(server, [[[1], [2]], [[3], [4]], [[5], [6]]], 3)
    assert [timing.token_count for timing in timings] == [3] * 6
    assert timings[1].started_s >= timings[0].arrivals_s[-1]


def test_a_short_answer_is_an_error_with_the_servers_log(server: VllmServer) -> None:
    with pytest.raises(KvlodeError, match=r"3 tokens came instead of 4(?s:.*)the end"):
        stream(server, [], 4)


def process(folder: Path, number: int, session: int, ticks: int, read_bytes: int) -> None:
    (folder / str(number)).mkdir()
    fields = ["S", "1", "1", str(session), *["0"] * 7, str(ticks), str(ticks), "0"]
    (folder / str(number) / "stat").write_text(f"{number} (a (strange) name) " + " ".join(fields))
    (folder / str(number) / "io").write_text(f"rchar: 1\nread_bytes: {read_bytes}\nwrite_bytes: 3\n")


def test_usage_is_that_of_all_processes_of_a_session(tmp_path: Path) -> None:
    process(tmp_path, 10, 10, 50, 4096)
    process(tmp_path, 11, 10, 25, 8192)
    process(tmp_path, 12, 99, 999, 999)
    (tmp_path / "13").mkdir()  # a process that has ended meanwhile
    hertz = os.sysconf("SC_CLK_TCK")
    assert usage_of(10, tmp_path) == Usage(150 / hertz, 12288)
    assert usage_of(10, tmp_path) - Usage(1 / hertz, 288) == Usage(149 / hertz, 12000)


def test_one_processor_is_left_to_what_does_not_compute() -> None:
    assert (compute_cpus({1, 0}), compute_cpus({2, 3, 7}), compute_cpus({5})) == ("0", "2,3", "5")


def test_waiting_for_rest_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "IDLE_INTERVAL_S", 0.01)
    counted = iter(range(1000))
    monkeypatch.setattr(processes, "usage_of", lambda session: Usage(float(next(counted)), 0))
    assert not wait_idle(1, timeout_s=0.05)
    monkeypatch.setattr(processes, "usage_of", lambda session: Usage(1.0, 0))
    assert wait_idle(1, timeout_s=5)


def test_forgotten_files_are_still_there(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_bytes(b"x" * 10_000)
    forget_pages(tmp_path)
    assert (tmp_path / "below" / "file").read_bytes() == b"x" * 10_000
