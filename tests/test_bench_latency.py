"""The bench's items about single calls: the load is what it claims to be, and wrong answers void a figure. No time is asserted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from kvlode import KvlodeError
from kvlode.engine.store import DiskStore
from kvlode.tools.bench import latency
from kvlode.tools.bench.full_rate import FullRate
from kvlode.tools.bench.latency import Backlog, Ring
from kvlode.tools.bench.setting import Setting
from kvlode.tools.bench.workload import bench_key, bench_namespace, opened

MIB = 1 << 20
OPTIONS: dict[str, Any] = {"capacity": 96 * MIB, "buffer": 4 * MIB, "codec": "raw", "segment_bytes": 4 * MIB, "gds": "off"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    with opened(str(tmp_path / "store"), **OPTIONS) as made:
        yield made


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(str(tmp_path), size_bytes=8 * MIB, rounds=1, quick=True, console=Console(quiet=True))


def blocks(count: int, size_bytes: int) -> list[Any]:
    return list(np.arange(count * size_bytes, dtype=np.uint32).astype(np.uint8).reshape(count, size_bytes))


def test_a_ring_gives_every_part_once_before_any_comes_again() -> None:
    memory = np.zeros(10, np.uint8)
    ring = Ring(memory)
    for value in (1, 2, 3):
        ring.next(3)[:] = value
    assert memory.tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3, 0]
    ring.next(3)[:] = 4  # the single byte that is left is no part
    assert memory.tolist() == [4, 4, 4, 2, 2, 2, 3, 3, 3, 0]


# --- load -----------------------------------------------------------------------------------------------------------


def test_at_full_rate_the_buffer_was_full_before_anything_is_measured(store: DiskStore) -> None:
    with FullRate(store, blocks(4, MIB // 4), bytes_max=16 * MIB) as load:
        counters = store.stats()["counters"]
        assert counters["put_bytes"] >= store.config.buffer_bytes
        assert counters.get("refused_puts", 0) == 0
    assert load.rate_GB_s >= 0


def test_the_load_says_when_it_has_nothing_left_to_put(store: DiskStore) -> None:
    with FullRate(store, blocks(2, MIB // 4), bytes_max=5 * MIB) as load:
        load._thread.join()
        assert load.over
    assert store.stats()["counters"]["put_blocks"] == 20


def test_every_block_of_the_load_has_a_key_of_its_own(store: DiskStore) -> None:
    for _ in range(2):
        with FullRate(store, blocks(1, 512), blocks_per_call=100, bytes_max=200 * 512) as load:
            load._thread.join()
    assert store.stats()["counters"]["put_blocks"] == 400


def test_a_load_whose_puts_are_refused_is_an_error_and_not_a_figure(store: DiskStore) -> None:
    store._core.health.latch(OSError("the drive is gone"))
    with pytest.raises(KvlodeError, match="refused"), FullRate(store, blocks(1, MIB), bytes_max=64 * MIB) as load:
        load._thread.join()


def test_a_backlog_counts_what_is_not_durable_yet(store: DiskStore) -> None:
    space = store.namespace(bench_namespace(MIB // 4))
    backlog = Backlog(store)
    for number, block in enumerate(blocks(6, MIB // 4)):
        assert space.put(bench_key(number), block)
        backlog.add()
    assert backlog.blocks == 6
    store.flush()
    backlog.wait_below(1)
    assert backlog.blocks == 0


def test_a_backlog_is_not_waited_for_when_the_store_has_failed() -> None:
    class Failed:
        path = "store"

        def events(self, since: object = None) -> Any:
            return type("Batch", (), {"events": (), "next": 0})

        def stats(self) -> dict[str, Any]:
            return {"failure": "the drive is gone"}

    backlog = Backlog(Failed())  # type: ignore[arg-type]
    backlog.add()
    with pytest.raises(KvlodeError, match="drive is gone"):
        backlog.wait_below(1)


# --- figures --------------------------------------------------------------------------------------------------------


def test_the_items_are_measured_by_name_and_leave_nothing_behind(setting: Setting) -> None:
    items = {item.name: item for item in latency.measure(setting, set(latency.NAMES))}
    sizes = ("1MiB", "4MiB", "16MiB")
    assert set(items) == {*(f"put_latency.{size}" for size in sizes), "put_p99", "read_p99_under_write"}
    for item in items.values():
        assert item.unit == "ratio" or item.state == "skipped"
        assert item.state != "void" or "not cold" in str(item.reason), item
        assert item.figure is None or item.figure > 0
    assert list(Path(setting.root).iterdir()) == []


def test_only_what_is_wanted_is_measured(setting: Setting) -> None:
    assert [item.name for item in latency.measure(setting, {"put_p99"})] == ["put_p99"]


def test_a_block_that_does_not_come_back_as_it_was_put_voids_put_latency(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "PUT_SIZES_MIB", (1,))
    monkeypatch.setattr("kvlode.engine.space.Space.get_into", lambda self, key, out: 0)  # says HIT and delivers nothing
    (item,) = latency.measure(setting, {"put_latency"})
    assert item.state == "void" and item.reached is None


def test_reads_that_came_from_the_buffer_void_the_reads_under_write(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "device_read_bytes", lambda: 0)
    (item,) = latency.measure(setting, {"read_p99_under_write"})
    assert item.state == "void" and "not cold" in str(item.reason)


def test_free_space_is_asked_for_before_anything_is_written(setting: Setting) -> None:
    full = Setting(setting.root, size_bytes=8 * MIB, rounds=9, quick=False, console=setting.console)
    assert latency.needed_bytes(setting) < 2 << 30 < latency.needed_bytes(full)
