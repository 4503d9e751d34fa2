"""Reading traces: each format, what spans lines, and lines that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvlode import DeviceError, InvalidConfig
from kvlode.tools.replay.formats import PARSERS, LineError, detect
from kvlode.tools.replay.kv_events import JOIN_S
from kvlode.tools.replay.traces import Trace, read_trace

MOONCAKE = {"timestamp": 27482, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 2366]}
BAILIAN = {
    "chat_id": 159, "parent_chat_id": 55, "timestamp": 61.114, "input_length": 521, "output_length": 132,
    "type": "text", "turn": 2, "hash_ids": [1089, 1090, 1091],
}  # fmt: skip


def stored(hashes: list[Any], parent: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": [], "block_size": 16, **more}


def read(folder: Path, *lines: Any, **options: Any) -> Trace:
    path = folder / "trace.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return read_trace(path, options.pop("format_name", None), **options)


def test_mooncake_times_are_milliseconds_and_begin_at_zero(tmp_path: Path) -> None:
    later = MOONCAKE | {"timestamp": 30482, "hash_ids": [46, 47, 5]}
    trace = read(tmp_path, MOONCAKE, later)
    assert (trace.format_name, trace.block_tokens) == ("mooncake", 512)
    assert [request.time_s for request in trace.requests] == [0.0, 3.0]
    assert [tuple(request.blocks) for request in trace.requests] == [(0, 1, 2), (0, 1, 3)]
    assert (trace.unique_blocks, trace.block_uses, trace.duration_s) == (4, 6, 3.0)
    assert (trace.requests[0].input_tokens, trace.requests[0].output_tokens) == (1100, 52)


def test_bailian_times_are_seconds_and_blocks_have_16_tokens(tmp_path: Path) -> None:
    trace = read(tmp_path, BAILIAN, BAILIAN | {"timestamp": 62.5})
    assert (trace.format_name, trace.block_tokens) == ("bailian", 16)
    assert trace.requests[1].time_s == pytest.approx(1.386)


def test_the_same_id_behind_another_prefix_is_another_block(tmp_path: Path) -> None:
    trace = read(tmp_path, BAILIAN | {"hash_ids": [1, 2]}, BAILIAN | {"hash_ids": [3, 2]})
    assert [tuple(request.blocks) for request in trace.requests] == [(0, 1), (2, 3)]


@pytest.mark.parametrize("as_array", [False, True])
def test_kv_events_as_objects_and_as_arrays_of_either_engine(tmp_path: Path, as_array: bool) -> None:
    def batch(time_s: float, *events: dict[str, Any]) -> Any:
        return [time_s, [list(event.values()) for event in events]] if as_array else {"ts": time_s, "events": list(events)}

    removed = {"type": "BlockRemoved", "block_hashes": [7]}
    trace = read(
        tmp_path,
        batch(100.0, stored([7, -8], lora_id=None)),
        batch(100.5, removed, {"type": "AllBlocksCleared"}),
        batch(200.0, stored(["ab"], -8, lora_id=None)),
    )
    assert trace.format_name == "kv-events" and trace.block_tokens == 16
    assert [tuple(request.blocks) for request in trace.requests] == [(0, 1), (0, 1, 2)], "a request has its whole prefix"
    assert [request.input_tokens for request in trace.requests] == [32, 48]
    assert [request.time_s for request in trace.requests] == [0.0, 100.0]
    assert any("2 events" in note for note in trace.notes)


def test_kv_events_that_continue_a_chain_soon_are_one_request(tmp_path: Path) -> None:
    trace = read(
        tmp_path,
        {"ts": 0.0, "events": [stored([1, 2]), stored([9])]},
        {"ts": 1.0, "events": [stored([3], 2)]},
        {"ts": 1.0 + JOIN_S + 1, "events": [stored([4], 3)]},
    )
    assert [tuple(request.blocks) for request in trace.requests] == [(0, 1, 3), (2,), (0, 1, 3, 4)]


def test_kv_events_of_other_media_and_groups_are_left_out(tmp_path: Path) -> None:
    events = [stored([1], medium="GPU", group_idx=0), stored([1], medium="CPU"), stored([1], medium=None, group_idx=1)]
    trace = read(tmp_path, {"ts": 0.0, "events": events})
    assert [tuple(request.blocks) for request in trace.requests] == [(0,)]
    assert any("2 stored events" in note for note in trace.notes)


def test_bad_lines_are_passed_over_with_their_numbers(tmp_path: Path) -> None:
    trace = read(tmp_path, MOONCAKE, "{", "", MOONCAKE | {"hash_ids": [1.5]}, MOONCAKE | {"timestamp": -1}, MOONCAKE)
    assert len(trace.requests) == 2 and trace.skipped == 3
    assert [line.split(":")[0] for line in trace.skipped_lines] == ["line 2", "line 4", "line 5"]


def test_strict_refuses_the_first_bad_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="line 2 "):
        read(tmp_path, MOONCAKE, "no json", MOONCAKE, strict=True)


@pytest.mark.parametrize("lines", [(), ({"a": 1},), ("hello", "world"), (["BlockStored"],), ({"a": 1},) * 150])
def test_no_known_format_is_a_clear_error(tmp_path: Path, lines: tuple[Any, ...]) -> None:
    with pytest.raises(InvalidConfig, match=r"not known|empty"):
        read(tmp_path, *lines)


def test_a_format_that_no_line_is_of_and_one_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="no line of the trace can be used"):
        read(tmp_path, MOONCAKE, format_name="vllm")
    with pytest.raises(InvalidConfig, match="no such format"):
        read(tmp_path, MOONCAKE, format_name="csv")
    with pytest.raises(DeviceError):
        read_trace(tmp_path / "absent.jsonl")


def test_requests_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    trace = read(tmp_path, MOONCAKE, MOONCAKE | {"timestamp": 5, "hash_ids": [1]})
    assert [len(request.blocks) for request in trace.requests] == [1, 3]
    assert trace.requests[0].time_s == 0.0 and "in order" in trace.notes[0]


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["BlockStored", "GPU"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from([*MOONCAKE, *stored([]), "ts", "events"]), inner),
    max_leaves=12,
)


@given(name=st.sampled_from(sorted(PARSERS)), values=st.lists(_json, max_size=4))
def test_no_json_value_breaks_a_parser(name: str, values: list[Any]) -> None:
    parser = PARSERS[name]()
    requests = []
    for value in values:
        assert detect(value) in (*PARSERS, None)
        try:
            requests += list(parser.requests(value))
        except LineError as error:
            assert str(error)
    requests += list(parser.rest())
    assert all(request.time_s >= 0 and request.input_tokens >= 0 and min(request.blocks, default=0) >= 0 for request in requests)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.lists(st.binary(max_size=40), max_size=6))
def test_garbage_between_good_lines_costs_only_itself(tmp_path: Path, garbage: list[bytes]) -> None:
    good = json.dumps(MOONCAKE).encode()
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"\n".join([good, *garbage, good]) + b"\n")
    trace = read_trace(path)
    assert len(trace.requests) == 2
    assert trace.requests[0].blocks == trace.requests[1].blocks == (0, 1, 2)
    lines = [line for line in b"\n".join(garbage).split(b"\n") if line.strip()]
    assert trace.skipped == len(lines)
