"""Hit counters: what a drive that dies under them does to the process, and how the hits of several processes come together."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

import kvlode
from kvlode.engine.heat import COUNT_MAX, HeatTable
from kvlode.engine.heat_file import SharedHeat
from kvlode.engine.stats import Counters
from model import descriptor
from test_processes import run

UUID = b"u" * 16
SLOTS = 1 << 16


def open_heat(path: Path, *, writer: bool) -> SharedHeat:
    return SharedHeat.open(str(path), UUID, SLOTS, Counters(), writer=writer)


def slots_of(table: HeatTable, count: int) -> list[int]:
    return [table.slot(bytes([1]) * 16, number.to_bytes(16, "little")) for number in range(1, count + 1)]


@pytest.mark.parametrize("role", ["open", "follow"])
def test_a_heat_file_that_is_lost_under_an_open_store_costs_hits_alone(tmp_path: Path, role: str) -> None:
    """A mapped page that the file no longer has ends the process with SIGBUS, as one does that the drive cannot read."""
    with kvlode.open(tmp_path, capacity="256MiB", buffer="8MiB") as store:
        assert store.namespace(descriptor()).put(b"a", b"1")
    script = f"""
        store = kvlode.{role}(sys.argv[1], capacity="256MiB", buffer="8MiB")
        os.truncate(os.path.join(sys.argv[1], "heat"), 0)
        assert store.namespace(descriptor()).get_into(b"a", bytearray(1)) is Status.HIT
        assert store.close()
    """
    done = run(script, tmp_path)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"


def test_hits_of_followers_reach_the_writer_and_survive_its_next_opening(tmp_path: Path) -> None:
    writer = open_heat(tmp_path / "heat", writer=True)
    parent, child, other = slots_of(writer.table, 3)
    writer.table.link(child, parent)
    writer.table.link(other, 0)
    writer.exchange()
    followers = [open_heat(tmp_path / "heat", writer=False) for _ in range(2)]
    for follower in followers:
        follower.table.credit([child])
        follower.exchange()
        follower.exchange()  # nothing new: nothing is added again
    writer.table.credit([child, other])
    writer.exchange()
    writer.exchange()
    expected = [3, 3, 1]
    assert [writer.table.count(slot) for slot in (parent, child, other)] == expected
    followers[0].exchange()
    assert [followers[0].table.count(slot) for slot in (parent, child, other)] == expected
    for shared in (writer, *followers):
        shared.close()
    again = open_heat(tmp_path / "heat", writer=True)
    assert [again.table.count(slot) for slot in (parent, child, other)] == expected
    again.close()


def test_a_follower_does_not_bring_back_hits_that_the_writer_let_fade(tmp_path: Path) -> None:
    writer = open_heat(tmp_path / "heat", writer=True)
    (block,) = slots_of(writer.table, 1)
    writer.table.link(block, 0)
    for _ in range(8):
        writer.table.credit([block])
    writer.exchange()
    follower = open_heat(tmp_path / "heat", writer=False)
    follower.table.credit([block])
    writer.table.halve(block)
    writer.exchange()
    follower.exchange()
    writer.exchange()
    assert writer.table.count(block) == 5
    writer.close()
    follower.close()


def test_a_count_stays_at_its_limit(tmp_path: Path) -> None:
    writer, (block,) = open_heat(tmp_path / "heat", writer=True), slots_of(HeatTable(SLOTS), 1)
    writer.table.link(block, 0)
    for _ in range(COUNT_MAX - 1):
        writer.table.credit([block])
    writer.exchange()
    follower = open_heat(tmp_path / "heat", writer=False)
    for shared in (writer, follower):
        shared.table.credit([block])
        shared.exchange()
    writer.exchange()
    assert writer.table.count(block) == COUNT_MAX
    writer.close()
    follower.close()


def test_an_exchange_that_fails_is_counted_and_loses_no_hit_of_this_process(tmp_path: Path) -> None:
    counters = Counters()
    shared = SharedHeat.open(str(tmp_path / "heat"), UUID, SLOTS, counters, writer=True)
    (block,) = slots_of(shared.table, 1)
    shared.table.credit([block])
    os.truncate(tmp_path / "heat", 100)
    shared.exchange()
    assert counters.get("heat_file_errors") == 1
    assert shared.table.count(block) == 1
    shared.close()


def test_the_hits_of_a_store_are_in_its_file_once_it_is_closed(tmp_path: Path) -> None:
    for expected in (1, 3):  # putting a block that is there is a hit too
        with kvlode.open(tmp_path, capacity="256MiB", buffer="8MiB") as store:
            space = store.namespace(descriptor())
            assert space.put(b"a", b"1")
            space.touch([b"a"])
            table = store._core.heat
            assert table.count(store._core.slot(space.digest + b"a")) == expected


def test_hits_that_come_during_an_exchange_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = open_heat(tmp_path / "heat", writer=True)
    (slot,) = slots_of(writer.table, 1)
    write = os.pwrite

    def write_and_hit(descriptor: int, data: bytes, offset: int) -> int:
        writer.table.credit([slot])
        return write(descriptor, data, offset)

    writer.table.link(slot, 0)
    writer.table.credit([slot])
    monkeypatch.setattr(os, "pwrite", write_and_hit)
    writer.exchange()
    monkeypatch.undo()
    hits = writer.table.count(slot)
    assert hits > 1
    for _ in range(3):
        writer.exchange()
    assert writer.table.count(slot) == hits
    writer.close()


@pytest.mark.parametrize("length", [1, 3, 40])
def test_one_by_one_and_all_at_once_blocks_and_their_ancestors_are_counted_alike(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(length)
    tables = [HeatTable(SLOTS), HeatTable(SLOTS)]
    slots = slots_of(tables[0], 60)
    for table in tables:
        for slot, parent in zip(slots, [0, *slots[:20], *slots[:39]], strict=True):  # a chain that branches
            table.link(slot, parent)
    for _ in range(300):
        called = [chance.choice([0, *slots]) for _ in range(chance.randint(1, length))]
        for table, few in zip(tables, (0, 1000), strict=True):
            monkeypatch.setattr("kvlode.engine.heat.ONE_BY_ONE_MAX", few)
            table.credit(called)
    counts = [[table.count(slot) for slot in slots] for table in tables]
    assert counts[0] == counts[1]
    assert counts[0][0] == COUNT_MAX


@pytest.mark.parametrize("count", [1, 100])
def test_the_last_use_is_that_of_the_block_or_of_a_descendant(count: int) -> None:
    table = HeatTable(1 << 12)
    parents = [table.slot(b"n" * 16, b"parent %9d" % number) for number in range(count)]
    children = [table.slot(b"n" * 16, b"child  %9d" % number) for number in range(count)]
    for parent, child in zip(parents, children, strict=True):
        table.link(child, parent)
    assert table.used_at_s(children[0]) == 0
    table.credit(parents, 5)
    table.credit(children, 7)
    assert {table.used_at_s(slot) for slot in [*parents, *children]} == {7}
    table.link(children[0], parents[0])
    assert table.used_at_s(children[0]) == 0
    table.clear(parents[0])
    assert table.used_at_s(parents[0]) == 0
