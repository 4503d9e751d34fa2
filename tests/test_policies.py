"""What reclaim and admission policies choose: order, closed chains, the bound on writes, sightings, budgets, names and options."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlode import InvalidConfig
from kvlode.engine.policies.admission import DAY_S, GhostSet, SecondSighting, WriteBudget
from kvlode.engine.policies.interface import Candidate, SegmentFacts
from kvlode.engine.policies.registry import (
    ADMISSION_POLICIES,
    RECLAIM_POLICIES,
    admission_policy,
    daily_budget,
    default_reclaim_policy,
    reclaim_policy,
)

SEGMENT_BYTES = 1000
COPYING = ("reinsertion", "prefix-aware", "s3-fifo")


def block(position: int, hits: int = 0, *, idle_s: float = 0.0, age_s: float = 100.0, pinned: bool = False) -> Candidate:
    return Candidate(position, bytes([position]) * 20, 10, hits, pinned, age_s=age_s, idle_s=idle_s)


def positions(chosen: list[Candidate]) -> list[int]:
    return [candidate.position for candidate in chosen]


def facts(*rows: tuple[int, float]) -> list[SegmentFacts]:
    """Segments from (fresh bytes, last use)."""
    return [SegmentFacts(number, SEGMENT_BYTES, fresh, used) for number, (fresh, used) in enumerate(rows)]


@pytest.mark.parametrize("name", ["fifo", "reinsertion", "prefix-aware"])
def test_the_oldest_segment_goes_first(name: str) -> None:
    assert reclaim_policy(name).victim(facts((1000, 9.0), (1000, 1.0))) == 0


def test_segment_lru_gives_up_what_was_not_used_for_the_longest_time_and_the_older_of_two() -> None:
    assert reclaim_policy("segment-lru").victim(facts((1000, 9.0), (1000, 1.0), (1000, 1.0), (1000, 5.0))) == 1


def test_s3_fifo_gives_up_small_segments_while_they_take_more_than_their_share() -> None:
    policy = reclaim_policy("s3-fifo", small_share=0.3)
    assert policy.victim(facts((100, 0.0), (1000, 0.0), (1000, 0.0), (200, 0.0))) == 1
    assert policy.victim(facts((100, 0.0), (200, 0.0), (300, 0.0), (1000, 0.0))) == 0
    assert policy.victim(facts((1000, 0.0), (1000, 0.0))) == 0


@pytest.mark.parametrize("name", RECLAIM_POLICIES)
def test_pinned_blocks_always_go_forward_and_the_order_of_the_log_stays(name: str) -> None:
    chosen = reclaim_policy(name).choose([block(0, pinned=True), block(1, 9), block(2), block(3, pinned=True)], SEGMENT_BYTES)
    assert {0, 3} <= set(positions(chosen)) and 2 not in positions(chosen)
    assert positions(chosen) == sorted(positions(chosen))


def test_reinsertion_takes_what_was_used_often_enough() -> None:
    assert positions(reclaim_policy("reinsertion", hits_min=3).choose([block(0, 4), block(1, 3), block(2, 2)], SEGMENT_BYTES)) == [0, 1]


def test_prefix_aware_takes_what_was_used_in_the_later_part_of_its_life() -> None:
    candidates = [block(0, 1, idle_s=40), block(1, 9, idle_s=60), block(2, 0, idle_s=10), block(3, 1, idle_s=60, age_s=200)]
    assert positions(reclaim_policy("prefix-aware").choose(candidates, SEGMENT_BYTES)) == [0, 3]


def test_the_threshold_rises_by_whole_levels_where_the_copies_are_too_many() -> None:
    policy = reclaim_policy("reinsertion", hits_min=2, write_amplification_max=1.25)  # a fifth of the victim: 20 blocks of 10 bytes
    candidates = [block(n, 5) for n in range(15)] + [block(n, 3) for n in range(15, 40)]
    assert positions(policy.choose(candidates, SEGMENT_BYTES)) == list(range(15))
    assert policy.facts()["threshold"] == 4


def test_what_a_victim_leaves_of_the_allowance_the_next_ones_may_use() -> None:
    policy = reclaim_policy("reinsertion", hits_min=2, write_amplification_max=1.25)
    many = [block(n, 3) for n in range(50)]
    assert policy.choose(many, SEGMENT_BYTES) == []
    assert policy.choose([], SEGMENT_BYTES) == []
    assert len(policy.choose(many, SEGMENT_BYTES)) == 50


@given(
    st.sampled_from(COPYING),
    st.sampled_from([1.05, 1.15, 1.5]),
    st.lists(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 100)), max_size=100), min_size=1, max_size=60),
)
def test_write_amplification_stays_below_its_maximum(name: str, maximum: float, victims: list[list[tuple[int, float]]]) -> None:
    policy = reclaim_policy(name, write_amplification_max=maximum)
    copied = 0
    for victim in victims:
        copied += sum(c.stored_bytes for c in policy.choose([block(n, h, idle_s=i) for n, (h, i) in enumerate(victim)], SEGMENT_BYTES))
    assert copied <= (1 - 1 / maximum) * len(victims) * SEGMENT_BYTES + 1e-6


@given(st.sampled_from(COPYING), st.lists(st.tuples(st.integers(0, 3), st.floats(0, 50), st.floats(0, 50)), min_size=1, max_size=60))
def test_a_chain_is_never_cut_short(name: str, steps: list[tuple[int, float, float]]) -> None:
    """Heads are used as often as their descendants and later, and are as old: where one block of the chain stays, so do its ancestors."""
    hits, idle_s, age_s, chain = 0, 0.0, 0.0, []
    for more_hits, more_idle_s, more_age_s in steps:  # from the tail to the head
        hits, age_s = hits + more_hits, age_s + more_age_s
        idle_s = min(more_idle_s if not chain else min(idle_s, more_idle_s), age_s)
        chain.append((hits, idle_s, age_s))
    candidates = [block(n, h, idle_s=i, age_s=a) for n, (h, i, a) in enumerate(reversed(chain))]
    chosen = positions(reclaim_policy(name).choose(candidates, SEGMENT_BYTES))
    assert chosen == list(range(len(chosen)))


# --- admission -------------------------------------------------------------------------------------------------------------


def test_second_sighting_begins_when_the_store_was_full_once() -> None:
    policy = SecondSighting()
    assert policy.admit(1, 10, 0.0, filled=False)
    assert not policy.admit(2, 10, 0.0, filled=True)
    assert policy.admit(2, 10, 1.0, filled=True)
    assert not policy.admit(2, 10, 2.0, filled=True), "written and given up again: it has to be seen twice again"


@given(st.lists(st.integers(0, 60), max_size=400), st.integers(2, 40))
def test_ghosts_are_bounded_and_remember_the_latest(hashes: list[int], most: int) -> None:
    ghosts = GhostSet(most)
    latest: dict[int, None] = {}
    for number in hashes:
        remembered = ghosts.seen(number)
        if number in list(latest)[-(most // 2) :]:
            assert remembered
        if number not in latest:
            assert not remembered
        latest.pop(number, None)
        latest[number] = None
        assert len(ghosts) <= most


def test_within_its_budget_everything_is_written_beyond_it_second_sightings() -> None:
    policy = WriteBudget(bytes_per_day=24_000)  # an hour's worth is 1000 bytes
    assert all(policy.admit(number, 100, 0.0, filled=False) for number in range(100)), "the first filling is free"
    assert sum(policy.admit(1000 + number, 100, 0.0, filled=True) for number in range(20)) == 10
    assert policy.admit(1015, 100, 1.0, filled=True), "it was offered, and refused, before"
    assert not policy.admit(5000, 100, 2.0, filled=True)
    assert policy.admit(5001, 100, 3600.0, filled=True), "an hour later there is budget again"


@given(st.lists(st.tuples(st.integers(0, 30), st.floats(0, 3600)), max_size=300))
def test_a_budget_is_overdrawn_by_an_hour_at_most(offers: list[tuple[int, float]]) -> None:
    policy, now_s, written = WriteBudget(bytes_per_day=2_400), 0.0, 0
    for key_hash, pause_s in offers:
        now_s += pause_s
        written += 10 * policy.admit(key_hash, 10, now_s, filled=True)
        assert written <= 2_400 * now_s / DAY_S + 200 + 10


def test_the_clock_may_stand_still_or_go_back() -> None:
    policy = WriteBudget(bytes_per_day=2_400)
    assert [policy.admit(number, 100, time_s, filled=True) for number, time_s in enumerate((50.0, 10.0, 50.0))] == [True, False, False]


# --- names and options -----------------------------------------------------------------------------------------------------


def test_every_policy_has_its_name_and_says_what_it_goes_by() -> None:
    for name in RECLAIM_POLICIES:
        policy = reclaim_policy(name)
        assert policy.name == name and all(isinstance(value, float) for value in policy.facts().values())
    options: dict[str, dict[str, Any]] = {"budget": {"bytes_per_day": 10}}
    assert all(admission_policy(name, **options.get(name, {})).name == name for name in ADMISSION_POLICIES)


def test_defaults() -> None:
    assert default_reclaim_policy(2).name == "reinsertion" and default_reclaim_policy(0).name == "fifo"
    assert daily_budget(1 << 30).name == "budget"


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("lifo", {}, "fifo or prefix-aware or reinsertion"),
        ("fifo", {"hits_min": 2}, "hits_min is no option"),
        ("segment-lru", {"write_amplification_max": 1.2}, "no options"),
        ("prefix-aware", {"hits_min": 2}, "recent_share, write_amplification_max"),
        ("reinsertion", {"hits_min": 0}, "Take the policy 'fifo'"),
        ("reinsertion", {"write_amplification_max": 0.9}, "from 1 on"),
        ("reinsertion", {"write_amplification_max": float("nan")}, "from 1 on"),
        ("prefix-aware", {"recent_share": 0}, "above 0"),
        ("s3-fifo", {"small_share": 1.0}, "below 1"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(name: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidConfig, match=told):
        reclaim_policy(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("sometimes", {}, "always or budget or second-sighting"),
        ("budget", {}, "bytes_per_day"),
        ("budget", {"bytes_per_day": 0}, "> 0"),
        ("always", {"bytes_per_day": 5}, "bytes_per_day is no option"),
        ("second-sighting", {"sightings_max": 1}, ">= 2"),
    ],
)
def test_admission_that_cannot_be_is_refused_with_a_reason(name: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidConfig, match=told):
        admission_policy(name, **options)
