"""The layer that all adapters share, driven by the smallest engine there can be; and which weights a revision tells apart."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter_conformance import LOAD_TIMEOUT_S, PREFIX, WAIT_S, AdapterConformance
from kvlode import InvalidConfig, MemoryStore, Namespace, Refusal, Status
from kvlode.adapters.attached import AttachedStore, QuietSpace
from kvlode.adapters.identity import weights_revision
from kvlode.adapters.transfers import Transfers
from kvlode.engine.testing import open_on_device
from kvlode.gds.buffers import aligned_array
from kvlode.gds.late import LateDevice
from kvlode.gds.memory import MemoryDevice
from kvlode.gds.testing import Fault, FaultyDevice
from model import block_bytes

BLOCK_BYTES = 96 << 10


def descriptor(**changes: Any) -> Namespace:
    values = {"model": "m", "revision": "1", "dtype": "bfloat16", "layout": "l", "tokens_per_block": 16, "block_bytes_max": BLOCK_BYTES}
    return Namespace(**(values | changes))


class PlainEngine:
    """An engine whose keys are the numbers of its blocks."""

    def __init__(self, options: dict[str, Any], namespace: Namespace) -> None:
        self.attached = AttachedStore.open(options, where="the test", sets=True)
        self.space = self.attached.space(namespace)
        self.transfers = Transfers(LOAD_TIMEOUT_S)
        self._jobs = itertools.count()

    def _finish(self, job: int) -> Sequence[bool]:
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            for outcome in self.transfers.finished():
                assert outcome.job_id == job
                return outcome.good
            self.transfers.drain(0.01)
        raise AssertionError("a job does not end")

    def store(self, prefix: Sequence[int]) -> None:
        job = next(self._jobs)
        self.transfers.store(job, self.space, keys_of(prefix), [content(block) for block in prefix])
        self._finish(job)

    def flush(self) -> None:
        self.attached.flush(WAIT_S)

    def lookup(self, prefix: Sequence[int]) -> int:
        return self.space.match_prefix(keys_of(prefix))

    def load(self, prefix: Sequence[int]) -> list[np.ndarray | None]:
        outs = [np.full(BLOCK_BYTES, 0xA5, np.uint8) for _ in prefix]
        job = next(self._jobs)
        self.transfers.load(job, self.space, keys_of(prefix), outs)
        return [out if good else None for out, good in zip(outs, self._finish(job), strict=True)]

    def stop(self) -> None:
        self.transfers.drain(WAIT_S)
        self.attached.close(WAIT_S)


def keys_of(prefix: Sequence[int]) -> list[bytes]:
    return [block.to_bytes(8, "little") for block in prefix]


def content(block: int) -> np.ndarray:
    return block_bytes(b"%d" % block, block, BLOCK_BYTES)


class TestSharedLayer(AdapterConformance):
    takes_sets = True

    def start(
        self, options: dict[str, Any], *, model: str = "model", dtype: str = "bfloat16", rank: int = 0, world: int = 1
    ) -> PlainEngine:
        return PlainEngine(options, descriptor(model=model, dtype=dtype, tp_rank=rank, tp_size=world))

    def content(self, block: int) -> np.ndarray:
        return content(block)


# --- settings -----------------------------------------------------------------------------------------------------------------


def test_a_misspelt_setting_stops_the_engine_at_its_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="capacty"):
        AttachedStore.open({"path": os.fspath(tmp_path), "capacty": "1GiB"}, where="kv_connector_extra_config")
    with pytest.raises(InvalidConfig, match="folder"):
        AttachedStore.open({"capacity": "1GiB"}, where="kv_connector_extra_config")


def test_blocks_that_the_store_has_no_room_for_stop_the_engine_at_its_start(tmp_path: Path) -> None:
    attached = AttachedStore.open({"path": os.fspath(tmp_path / "s"), "capacity": "64MiB", "buffer": "8MiB"}, where="the test")
    with pytest.raises(InvalidConfig):
        attached.space(descriptor(block_bytes_max=1 << 30))
    assert attached.close()


# --- failures -----------------------------------------------------------------------------------------------------------------


def test_without_a_store_everything_is_a_miss() -> None:
    space = AttachedStore(None, "gone").space(descriptor())
    out = np.zeros(8, np.uint8)
    assert space.match_prefix([b"a"]) == 0
    assert space.contains([b"a"]) == [False]
    assert space.lookup_nowait([b"a"]) == [Status.MISS]
    assert space.submit_put([b"a"], [out]).statuses[0].reason is Refusal.STORE_FAILED
    assert space.submit_get([b"a"], [out]).statuses == [Status.IO_ERROR]
    assert space.get_many_into([b"a"], [out], timeout=1.0) == [Status.IO_ERROR]
    assert space.delete([b"a"]) == 0
    space.touch([b"a"])
    space.drop()
    assert AttachedStore(None, "gone").stats() == {"absent": "gone"}


def test_a_closed_store_is_misses_and_no_exception() -> None:
    store = MemoryStore()
    space = QuietSpace(store.namespace(descriptor()), descriptor())
    assert space.submit_put([b"a"], [content(1)]).wait(WAIT_S)
    assert space.match_prefix([b"a"]) == 1
    store.close()
    assert space.match_prefix([b"a"]) == 0
    assert space.submit_get([b"a"], [content(2)]).statuses == [Status.IO_ERROR]


@pytest.mark.parametrize("in_place", [False, True], ids=["by bounce memory", "straight into the destinations"])
def test_a_late_load_is_over_at_once_unless_the_drive_reads_into_its_destinations(in_place: bool) -> None:
    late = LateDevice(MemoryDevice(), holding=())
    store = open_on_device(late)
    space = QuietSpace(store.namespace(descriptor()), descriptor())
    keys = [b"a", b"b"]
    blocks = [block_bytes(key, 0, 1 << 16) for key in keys]
    assert all(space.submit_put(keys, blocks).statuses) and store.flush()
    store.close()
    store = open_on_device(late)
    space = QuietSpace(store.namespace(descriptor()), descriptor())
    late.hold("read")
    outs = [aligned_array(1 << 16) if in_place else np.zeros((1 << 16) + 1, np.uint8)[1:] for _ in keys]
    transfers = Transfers(load_timeout_s=0.0)
    transfers.load("job", space, keys, outs)
    assert late.wait_for_held(1)
    outcomes = transfers.finished()
    assert (outcomes == []) is in_place
    late.hold()
    late.release()
    assert transfers.drain(WAIT_S)
    outcomes = outcomes or transfers.finished()
    assert [outcome.job_id for outcome in outcomes] == ["job"] and set(outcomes[0].statuses) == {Status.CANCELLED}
    assert store.close()


# --- which weights ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"rope_theta": 10000}')
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "model-00001.safetensors").write_bytes(bytes(100))
    (tmp_path / "README.md").write_text("hello")
    return tmp_path


def test_a_revision_stays_while_the_files_do(weights: Path) -> None:
    first = weights_revision(weights)
    assert len(first) == 32 and weights_revision(os.fspath(weights)) == first
    (weights / "README.md").write_text("changed")
    assert weights_revision(weights) == first


@pytest.mark.parametrize("change", ["config", "index", "size", "time", "more"])
def test_a_revision_changes_with_the_weights_at_the_same_place(weights: Path, change: str) -> None:
    first = weights_revision(weights)
    shard = weights / "model-00001.safetensors"
    if change == "config":
        (weights / "config.json").write_text('{"rope_theta": 20000}')
    elif change == "index":
        (weights / "model.safetensors.index.json").write_text("{ }")
    elif change == "size":
        status = shard.stat()
        shard.write_bytes(bytes(101))
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "time":
        os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    else:
        (weights / "model-00002.safetensors").write_bytes(b"x")
    assert weights_revision(weights) != first


def test_a_revision_changes_with_the_settings_and_the_commit(weights: Path) -> None:
    plain = weights_revision(weights)
    assert weights_revision(weights, settings={"quantization": "fp8"}) != plain
    assert weights_revision("org/model", commit="a") != weights_revision("org/model", commit="b")
    assert weights_revision("org/model") != weights_revision("org/other")


def test_a_snapshot_of_a_hub_is_known_by_its_commit(tmp_path: Path) -> None:
    revisions = []
    for cache in ("one", "two"):
        folder = tmp_path / cache / "models--org--model" / "snapshots" / ("ab" * 20)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(cache)
        revisions.append(weights_revision(folder))
    assert revisions[0] == revisions[1]


def test_a_file_in_a_hubs_snapshot_is_known_by_commit_and_name(tmp_path: Path) -> None:
    revisions = set()
    blob = tmp_path / "blobs" / "0123"
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    for commit, name in (("ab" * 20, "Q4.gguf"), ("cd" * 20, "Q4.gguf"), ("cd" * 20, "Q8.gguf")):
        folder = tmp_path / "snapshots" / commit
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(blob)
        revisions.add(weights_revision(folder / name))
    assert len(revisions) == 3


@pytest.mark.parametrize("name", ["shards/model.safetensors", "adapter_config.json", "params.json", "model.tensors"])
def test_a_revision_sees_weights_wherever_they_are(weights: Path, name: str) -> None:
    place = weights / name
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(bytes(2 << 20))
    first = weights_revision(weights)
    place.write_bytes(bytes((2 << 20) + 1))
    assert weights_revision(weights) != first


# --- what must not be found any more -----------------------------------------------------------------------------------------


def test_after_a_drop_that_failed_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FaultyDevice(MemoryDevice())
    suite = TestSharedLayer()
    engine = suite.start(suite.on_device(monkeypatch, device))
    engine.store(PREFIX)
    engine.flush()
    device.inject(Fault("write", times=None))
    device.inject(Fault("sync", times=None))
    engine.store([100])
    engine.flush()
    assert engine.lookup(PREFIX) == len(PREFIX)
    engine.space.drop()
    assert engine.lookup(PREFIX) == 0
    assert all(found is None for found in engine.load(PREFIX))
    device.clear()
    engine.stop()
