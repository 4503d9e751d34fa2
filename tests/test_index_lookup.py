"""Lookups of many keys: asked in another order, in parts and by several threads, answered in the order of the keys."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlode.engine import index_lookup
from kvlode.engine.index_lookup import ORDERED_KEYS_MIN, PART_KEYS, LookupTeam, Values, key_order
from kvlode.format.errors import StoreClosed

WAIT_S = 30.0


class Table:
    """Answers with a key's value, and remembers how it was asked."""

    def __init__(self) -> None:
        self.calls: list[list[bytes]] = []

    def get(self, keys: list[bytes]) -> Values:
        self.calls.append(keys)
        return [None if key.endswith(b"absent") else b"value of " + key for key in keys]


def idents(count: int) -> list[bytes]:
    """Different ones in no order, all of one length."""
    return [b"namespace-digest" + (number * 2654435761 % (1 << 64)).to_bytes(8, "big") + b"rest of the key" for number in range(count)]


Team = Callable[[Callable[[list[bytes]], Values]], LookupTeam]


@pytest.fixture(params=[1, 4], ids=["1 core", "4 cores"])
def team(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Team]:
    """Makes a team on a machine with so many cores."""
    with contextlib.ExitStack() as stack:

        def made(get: Callable[[list[bytes]], Values]) -> LookupTeam:
            monkeypatch.setattr(index_lookup.os, "cpu_count", lambda: request.param)
            team = LookupTeam(get)
            stack.callback(team.close, WAIT_S)
            return team

        yield made


@given(st.lists(st.binary(max_size=40), max_size=40), st.binary(max_size=20))
def test_values_come_in_the_order_of_the_keys_whatever_their_lengths(chosen: list[bytes], namespace: bytes) -> None:
    keys = [namespace + key + ending for key in chosen for ending in (b"", b"absent")] * (ORDERED_KEYS_MIN // 8)
    team = LookupTeam(Table().get)
    assert team.look_up(keys) == Table().get(keys)
    team.close(WAIT_S)


@pytest.mark.parametrize("count", [1, ORDERED_KEYS_MIN, PART_KEYS, PART_KEYS + 1, 7 * PART_KEYS])
def test_every_key_is_asked_for_once_and_never_too_many_at_a_time(team: Team, count: int) -> None:
    table, keys = Table(), idents(count)
    assert team(table.get).look_up(keys) == Table().get(keys)
    assert max(map(len, table.calls)) <= PART_KEYS
    assert sorted(key for call in table.calls for key in call) == sorted(keys)


@pytest.mark.parametrize("others", [[], [b"n"]], ids=["keys of one length", "keys of different lengths"])
def test_many_keys_are_asked_for_in_the_order_of_the_files(team: Team, others: list[bytes]) -> None:
    keys = idents(300) + others
    assert [keys[position] for position in key_order(keys)] == sorted(keys)
    table = Table()
    team(table.get).look_up(keys)
    assert table.calls == [sorted(keys)]


def test_a_lookup_does_not_wait_for_helpers_that_are_busy(team: Team) -> None:
    """Every helper hangs in one lookup; another one is answered all the same."""
    may_go, caller = threading.Event(), threading.current_thread()
    hanging = idents(3 * PART_KEYS)

    def get(keys: list[bytes]) -> Values:
        if keys[0] in hanging and threading.current_thread() is not caller:
            may_go.wait(WAIT_S)
        return Table().get(keys)

    both = team(get)
    others = [threading.Thread(target=both.look_up, args=(hanging,)) for _ in range(2)]
    for other in others:
        other.start()
    keys = [b"another" + key for key in idents(5 * PART_KEYS)]
    assert both.look_up(keys) == Table().get(keys)
    may_go.set()
    for other in others:
        other.join()


def test_parts_are_looked_up_at_the_same_time() -> None:
    both_inside = threading.Barrier(2)

    def get(keys: list[bytes]) -> Values:
        both_inside.wait(WAIT_S)
        return Table().get(keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_lookup.os, "cpu_count", lambda: 2)
        team = LookupTeam(get)
    keys = idents(2 * PART_KEYS)
    assert team.look_up(keys) == Table().get(keys)
    team.close(WAIT_S)


def test_an_error_in_any_part_is_the_callers_and_the_next_lookup_works(team: Team) -> None:
    keys = idents(4 * PART_KEYS)
    worst = max(keys)

    def get(asked: list[bytes]) -> Values:
        if worst in asked:
            raise StoreClosed("closed meanwhile")
        return Table().get(asked)

    some = team(get)
    with pytest.raises(StoreClosed, match="meanwhile"):
        some.look_up(keys)
    keys.remove(worst)
    assert some.look_up(keys) == Table().get(keys)


def test_after_close_many_keys_are_refused_where_there_were_helpers(team: Team) -> None:
    closed = team(Table().get)
    closed.close(WAIT_S)
    if closed._pool is not None:
        with pytest.raises(StoreClosed):
            closed.look_up(idents(2 * PART_KEYS))
