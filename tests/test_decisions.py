"""The log of decisions: whatever a store destroys is told, with its reason, where people and programs can read it."""

from __future__ import annotations

import ast
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvlode
from kvlode import DeviceError, Status
from kvlode.engine.decisions import DECISIONS, KEPT_DECISIONS, DecisionLog, JsonLines
from kvlode.engine.testing import ManualClock
from kvlode.gds.faulty import Fault, FaultyDevice
from rig import KIB, MIB, Rig, eventually, put_blocks, read

ROOT = Path(kvlode.__file__).resolve().parent
BLOCK_BYTES = 64 * KIB
SPACE = kvlode.Namespace(model="m", revision="1", dtype="uint8", layout="x", tokens_per_block=16, block_bytes_max=BLOCK_BYTES)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(ManualClock(), capacity=16 * MIB, buffer=4 * MIB, segment_bytes=MIB, serve_clean=False)
    yield rig
    rig.close()


def decisions_of(rig: Rig, event: str) -> list[dict[str, Any]]:
    return [decision for decision in rig.store.stats()["decisions"] if decision["event"] == event]


def test_a_freed_segment_is_told_with_what_became_of_its_blocks(rig: Rig) -> None:
    space = rig.store.namespace(SPACE)
    put_blocks(space, 0, 400, BLOCK_BYTES)
    assert rig.store.flush(30) and eventually(lambda: bool(decisions_of(rig, "segment_freed")))
    stats = rig.store.stats()
    freed = [decision for decision in stats["decisions"] if decision["event"] == "segment_freed"]
    assert eventually(lambda: rig.counter("evicted_blocks") >= sum(decision["evicted_blocks"] for decision in freed))
    assert {"policy", "segment", "size_bytes", "evicted_blocks", "carried_forward_blocks", "age_s", "reason"} <= set(freed[0])
    assert freed[0]["segment"].endswith(".seg") and freed[0]["evicted_blocks"] > 0 and freed[0]["age_s"] >= 0
    evicted = sum(decision["evicted_blocks"] for decision in freed)
    assert rig.store.stats()["reclaim"]["eviction_age_s"]["count"] >= evicted


def test_deletes_and_drops_of_the_host_are_told(rig: Rig) -> None:
    space = rig.store.namespace(SPACE)
    put_blocks(space, 0, 3, BLOCK_BYTES)
    space.delete([b"filler 0", b"filler 1", b"absent"])
    space.drop()
    (deleted,) = decisions_of(rig, "blocks_deleted")
    (dropped,) = decisions_of(rig, "namespace_dropped")
    assert (deleted["namespace"], deleted["blocks"]) == (space.digest.hex(), 2)
    assert dropped["namespace"] == space.digest.hex()


def test_an_expired_block_is_told_when_its_entry_goes(rig: Rig) -> None:
    space = rig.store.namespace(SPACE)
    assert space.put(b"key", np.ones(BLOCK_BYTES, np.uint8), ttl=5)
    assert rig.store.flush(30)
    rig.clock.advance(10)
    assert read(space, b"key", BLOCK_BYTES)[0] is Status.EXPIRED
    (decision,) = decisions_of(rig, "block_dropped")
    assert (decision["reason"], bytes.fromhex(decision["key"]), decision["namespace"]) == ("expired", b"key", space.digest.hex())
    assert rig.store.stats()["gets"]["expired"] == 1


def test_a_damaged_block_is_told_and_counted_for_its_namespace(tmp_path: Path) -> None:
    store = kvlode.open(tmp_path / "store", capacity="64MiB", buffer="8MiB", gds="off", codec="raw", serve_clean=False)
    with store:
        space = store.namespace(SPACE)
        assert space.put(b"key", np.full(BLOCK_BYTES, 7, np.uint8)) and store.flush(30)
        (segment,) = (tmp_path / "store" / "segments").glob("*.seg")
        content = segment.read_bytes()
        place = content.index(b"\x07" * BLOCK_BYTES)
        with segment.open("r+b") as file:
            file.seek(place + 100)
            file.write(b"\x08")
        assert read(space, b"key", BLOCK_BYTES)[0] is Status.CORRUPT
        stats = store.stats()
    (decision,) = [d for d in stats["decisions"] if d["event"] == "block_dropped"]
    assert (decision["reason"], decision["segment"]) == ("corrupt", segment.name)
    assert stats["gets"]["corrupt"] == 1 and stats["namespaces"][space.digest.hex()]["corrupt_reads"] == 1


def test_an_index_that_is_derived_again_is_told(rig: Rig) -> None:
    space = rig.store.namespace(SPACE)
    put_blocks(space, 0, 2, BLOCK_BYTES)
    store = rig.reopen(lose_index=True)
    assert store.namespace(SPACE).contains([b"filler 0", b"filler 1"]) == [True, True]
    told = [d for d in store.stats()["decisions"] if d["event"] == "index_rebuilt"]
    assert len(told) == store.stats()["counters"].get("index_rebuilds", 0)


def test_an_index_that_cannot_be_read_is_told_as_set_aside(tmp_path: Path) -> None:
    kvlode.open(tmp_path / "store", capacity="64MiB", buffer="8MiB", gds="off").close()
    (tmp_path / "store" / "index" / "CURRENT").write_bytes(b"nothing\n")
    with kvlode.open(tmp_path / "store", capacity="64MiB", buffer="8MiB", gds="off") as store:
        events = {decision["event"]: decision for decision in store.stats()["decisions"]}
    assert {"index_set_aside", "index_rebuilt"} <= set(events) and events["index_set_aside"]["reason"]


def test_a_store_that_stops_writing_says_so() -> None:
    rig = Rig(ManualClock(), wrap=FaultyDevice, capacity=16 * MIB, buffer=4 * MIB, segment_bytes=MIB)
    space = rig.store.namespace(SPACE)
    rig.device.inject(Fault("sync", times=None))
    put_blocks(space, 0, 1, BLOCK_BYTES)
    assert not rig.store.flush(30)
    stats = rig.store.stats()
    (decision,) = [d for d in stats["decisions"] if d["event"] == "writer_stopped"]
    assert decision["kind"] == DeviceError.__name__ and stats["failure"]
    rig.store.close(30)


# --- the log itself -----------------------------------------------------------------------------------------------------


def test_many_decisions_of_one_kind_do_not_push_out_those_of_another() -> None:
    log = DecisionLog("store")
    log.note("namespace_dropped", "asked", namespace="ab")
    for number in range(5 * KEPT_DECISIONS):
        log.note("segment_freed", "room", segment=str(number))
    latest = log.latest()
    assert len(latest) == KEPT_DECISIONS + 1
    assert latest[0]["event"] == "namespace_dropped" and latest[-1]["segment"] == str(5 * KEPT_DECISIONS - 1)


def test_each_decision_is_one_record_and_one_line_of_json(caplog: pytest.LogCaptureFixture) -> None:
    log = DecisionLog("a store")
    with caplog.at_level(logging.INFO, "kvlode.decisions"):
        log.note("segment_freed", "room\nfor more", segment="1.seg", age_s=None)
    (record,) = caplog.records
    line = JsonLines().format(record)
    assert "\n" not in line
    told = json.loads(line)
    assert (told["event"], told["reason"], told["store"], told["segment"], told["age_s"]) == (
        "segment_freed", "room\nfor more", "a store", "1.seg", None,
    )  # fmt: skip
    assert told["level"] == "INFO" and told["logger"] == "kvlode.decisions"
    other = logging.LogRecord("kvlode", logging.ERROR, __file__, 1, "plain %s", ("text",), None)
    assert json.loads(JsonLines().format(other))["message"] == "plain text"


def test_every_decision_that_the_engine_takes_is_described() -> None:
    noted: set[str] = {"quarantined", "block_dropped"}
    for path in (ROOT / "engine").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_note = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "note"
            if is_note and isinstance(node.args[0], ast.Constant):  # type: ignore[attr-defined]
                noted.add(node.args[0].value)  # type: ignore[attr-defined]
    assert noted == set(DECISIONS)
    documented = re.findall(r"^\| `(\w+)` \| ", (ROOT / "docs/metrics.md").read_text().partition("| event |")[2], re.MULTILINE)
    assert sorted(documented) == sorted(DECISIONS)
