"""Options that change while the store runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvlode
from kvlode import InvalidConfig, Limits, Status, StoreFailed
from kvlode.engine.testing import ManualClock
from model import descriptor
from rig import KIB, MIB, Rig, eventually, put_blocks, read

OPTIONS: dict[str, Any] = {"capacity": 4 * MIB, "segment_bytes": 128 * KIB, "codec": "raw", "buffer": 2 * MIB}
WAIT_S = 60.0


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(ManualClock(), **OPTIONS)
    yield made
    made.close()


def test_a_smaller_capacity_is_reached_and_a_larger_one_used(rig: Rig) -> None:
    space = rig.store.namespace(descriptor(block_bytes_max=64 * KIB))
    put_blocks(space, 0, 150, 30_000)
    assert rig.store.flush(WAIT_S)
    rig.store.reconfigure(capacity=2 * MIB)
    assert eventually(lambda: int(rig.store.stats()["used_bytes"]) <= 2 * MIB)
    assert rig.store.config.capacity_bytes == rig.store.stats()["capacity_bytes"] == 2 * MIB
    held = sum(space.contains([b"filler %d" % n for n in range(150)]))
    rig.store.reconfigure(capacity="8 MiB")
    put_blocks(space, 150, 350, 30_000)
    assert rig.store.flush(WAIT_S)
    assert sum(space.contains([b"filler %d" % n for n in range(350)])) > 3 * held


def test_blocks_are_never_wrong_while_options_change(rig: Rig) -> None:
    space = rig.store.namespace(descriptor(block_bytes_max=64 * KIB))
    done = threading.Event()
    problems: list[str] = []

    def use() -> None:
        for number in range(400):
            data = bytes([number % 251]) * 20_000
            space.put(b"k%d" % number, data)
            out = np.zeros(20_000, np.uint8)
            if space.get_into(b"k%d" % number, out) is Status.HIT and out.tobytes() != data:
                problems.append(f"k{number}")
        done.set()

    thread = threading.Thread(target=use)
    thread.start()
    turn = 0
    while not done.is_set():
        turn += 1
        rig.store.reconfigure(
            capacity=(2 + turn % 4) * MIB,
            codec=("raw", "zstd", "auto")[turn % 3],
            reinsert_hits_min=turn % 3,
            limits={"*": Limits(quota_bytes=MIB)} if turn % 2 else {},
        )
    thread.join()
    assert not problems and rig.store.stats()["failure"] is None
    assert rig.store.flush(WAIT_S) or rig.counter("refused_puts")


@pytest.mark.parametrize(
    "options",
    [{"buffer_bytes": MIB}, {"io_threads": 3}, {"capacity": 100}, {"codec": "lzma"}, {"no_such": 1}, {"reclaim_policy": "best"}],
)
def test_what_cannot_change_is_refused_and_changes_nothing(rig: Rig, options: dict[str, Any]) -> None:
    before = rig.store.config
    with pytest.raises(InvalidConfig):
        rig.store.reconfigure(**options, put_timeout_s=7.0)
    assert rig.store.config == before


def test_a_codec_holds_for_what_is_put_from_then_on(rig: Rig) -> None:
    space = rig.store.namespace(descriptor(block_bytes_max=64 * KIB))
    space.put(b"raw", b"a" * 40_000)
    assert rig.store.flush(WAIT_S)
    rig.store.reconfigure(codec="zstd")
    space.put(b"encoded", b"a" * 40_000)
    assert rig.store.flush(WAIT_S)
    rig.reopen(codec="raw")
    space = rig.store.namespace(descriptor(block_bytes_max=64 * KIB))
    raw, encoded = space.info([b"raw", b"encoded"])
    assert raw is not None and encoded is not None
    assert raw.stored_bytes == 40_000 and encoded.stored_bytes < 4000
    status, out = read(space, b"encoded", 40_000)
    assert status is Status.HIT and out.tobytes() == b"a" * 40_000


def test_a_folder_opens_again_with_its_former_and_its_present_options(tmp_path: Path) -> None:
    options: dict[str, Any] = {"capacity": "64MiB", "buffer": "2MiB"}
    with kvlode.open(tmp_path / "s", **options) as store:
        store.reconfigure(capacity="48MiB")
        with kvlode.open(tmp_path / "s", **options) as again, kvlode.open(tmp_path / "s", capacity="48MiB", buffer="2MiB") as third:
            assert again.config == third.config == store.config
        with kvlode.follow(tmp_path / "s") as same:
            assert same.config == store.config


def test_a_follower_has_nothing_to_reconfigure(tmp_path: Path) -> None:
    with kvlode.open(tmp_path / "s", capacity="64MiB", buffer="2MiB"):
        pass
    with kvlode.follow(tmp_path / "s") as follower, pytest.raises(StoreFailed):
        follower.reconfigure(capacity="48MiB")
