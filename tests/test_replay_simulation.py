"""The simulated store: by hand on small traces, against a slow model, tiers, restarts, references."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlode import InvalidConfig
from kvlode.engine.policies.registry import RECLAIM_POLICIES, admission_policy, reclaim_policy
from kvlode.tools.replay.references import belady, object_lru, object_s3_fifo
from kvlode.tools.replay.request import Request
from kvlode.tools.replay.simulation import Outcome, simulate
from kvlode.tools.replay.tiers import Tiers, TierSize


def requests_of(*prompts: list[int], step_s: float = 1.0) -> list[Request]:
    return [Request(number * step_s, blocks, 10 * len(blocks), 1) for number, blocks in enumerate(prompts)]


def run(
    requests: list[Request], capacity: int, segments: int = 2, reclaim: str = "fifo", admission: str = "always", **options: object
) -> Outcome:
    return simulate(
        requests,
        capacity_blocks=capacity,
        segments=segments,
        reclaim=reclaim_policy(reclaim),
        admission=admission_policy(admission),
        **options,  # type: ignore[arg-type]
    )


def run_reinsertion(requests: list[Request]) -> Outcome:
    """Two segments of two blocks, and as many copies as the policy likes."""
    policy = reclaim_policy("reinsertion", write_amplification_max=9)
    return simulate(requests, capacity_blocks=4, segments=2, reclaim=policy, admission=admission_policy("always"))


def random_trace(seed: int, count: int = 400) -> list[Request]:
    """Sessions that go on, new ones, and a common head."""
    rng = random.Random(seed)
    sessions: list[list[int]] = [[0]]
    next_block, requests = 1, []
    for number in range(count):
        base = rng.choice(sessions[-12:]) if rng.random() < 0.6 else [0]
        blocks = base + list(range(next_block, next_block + rng.randint(0, 5)))
        next_block += len(blocks) - len(base)
        sessions.append(blocks)
        requests.append(Request(float(number), blocks, 10 * len(blocks), 1))
    return requests


def test_a_hit_behind_a_gap_is_no_prefix_hit() -> None:
    # capacity of two segments of one block: block 0 is gone when the chain is asked for again, block 1 is not
    outcome = run(requests_of([0], [1], [2], [0, 1, 2]), 2)
    assert outcome.block_hit_ratio == 2 / 6 and outcome.prefix_hit_ratio == 0
    assert (outcome.fresh_blocks, outcome.unique_blocks, outcome.reinserted_blocks) == (4, 3, 0)


def test_used_blocks_go_forward_and_are_written_again() -> None:
    trace = requests_of([0, 1], [0], [0], [2, 3], [4, 5], [0])
    assert run(trace, 4).prefix_hit_ratio == 2 / 9
    kept = run_reinsertion(trace)
    assert kept.prefix_hit_ratio == 3 / 9
    assert kept.reinserted_blocks == 1 and kept.write_amplification == 1 + 1 / 6 and kept.threshold == 2


def test_hits_are_halved_when_a_block_is_copied_so_it_leaves_in_the_end() -> None:
    fill = [[n, n + 1] for n in range(10, 40, 2)]
    outcome = run_reinsertion(requests_of([0, 1], [0], [0], [0], [0], *fill, [0]))
    assert outcome.reinserted_blocks == 2, "with 4 hits and with 2"
    assert outcome.fresh_blocks == 2 + 2 * len(fill) + 1


def test_blocks_that_are_not_admitted_are_not_written() -> None:
    outcome = run(requests_of([0], [1], [2], [3], [3], [3]), 2, admission="second-sighting")
    assert (outcome.fresh_blocks, outcome.rejected_blocks) == (4, 1)
    assert outcome.write_amplification == 1 and outcome.writes_per_offer == 4 / 5


def test_tokens_follow_the_prefix() -> None:
    trace = [Request(0.0, [0, 1, 2], 25, 1), Request(1.0, [0, 1, 2], 25, 1)]
    assert run(trace, 8).prefix_hit_tokens == 25 and run(trace, 8, block_tokens=10).prefix_hit_tokens == 25
    assert run([*trace, Request(2.0, [0, 1, 3], 25, 1)], 8, block_tokens=10).prefix_hit_tokens == 45


def test_what_a_tier_serves_does_not_reach_the_store() -> None:
    trace = requests_of([0], [0], [1], [2], [0])
    outcome = run(trace, 8, tiers=[TierSize("HBM", 1), TierSize("DRAM", 1)])
    assert outcome.tier_hit_ratios == {"HBM": 1 / 5, "DRAM": 0}
    assert outcome.prefix_hit_ratio == 2 / 5, "the last use comes from the store"


def test_tiers_pass_blocks_on_and_keep_heads_longest() -> None:
    tiers = Tiers([TierSize("HBM", 2), TierSize("DRAM", 2)])
    tiers.use([0, 1, 2, 3, 4])
    assert [tiers.find(block) for block in range(5)] == [0, 0, 1, 1, -1]
    tiers.use([2])
    assert [tiers.find(block) for block in range(5)] == [0, 1, 0, 1, -1]


def test_a_warm_store_serves_after_a_restart_and_lost_memory_does_not() -> None:
    trace = requests_of(*[[0, 1, 2]] * 6)
    tiers = [TierSize("DRAM", 8)]
    warm, lost = run(trace, 8, tiers=tiers, restart_at=3.0), run(trace, 8, tiers=tiers, restart_at=3.0, store_survives=False)
    none = run(trace, 0, tiers=tiers, restart_at=3.0)
    assert warm.after_restart is not None and lost.after_restart is not None and none.after_restart is not None
    assert (warm.after_restart.prefix_hit_blocks, warm.after_restart.store_hit_blocks) == (9, 3)
    assert lost.after_restart.prefix_hit_blocks == none.after_restart.prefix_hit_blocks == 6
    assert run(trace, 8, restart_at=99.0).after_restart is None


def test_the_timeline_adds_up() -> None:
    outcome = run(requests_of(*[[0, 1]] * 10, step_s=30.0), 8)
    assert [step.start_s for step in outcome.timeline] == [0.0, 60.0, 120.0, 180.0, 240.0]
    assert sum(step.asked_blocks for step in outcome.timeline) == outcome.events == 20
    assert sum(step.prefix_hit_blocks for step in outcome.timeline) == 18


def test_ages_of_what_was_given_up() -> None:
    outcome = run(requests_of(*[[n] for n in range(50)]), 10, segments=5)
    assert outcome.eviction_age_s[0.5] == pytest.approx(9.5, rel=0.2)
    assert run(requests_of([0]), 10).eviction_age_s == {}


@pytest.mark.parametrize("policy", RECLAIM_POLICIES)
def test_the_same_trace_gives_the_same_outcome(policy: str) -> None:
    first, second = (dataclasses.replace(run(random_trace(7), 60, 8, policy), events_per_s=0) for _ in range(2))
    assert first == second


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 9), st.sampled_from(sorted(RECLAIM_POLICIES)))
def test_no_policy_hits_more_than_the_optimum(seed: int, segments: int, segment_blocks: int, policy: str) -> None:
    trace, capacity = random_trace(seed, 120), segments * segment_blocks
    outcome, best = run(trace, capacity, segments, policy), belady(trace, capacity)
    unlimited = run(trace, 10_000, 2)
    assert outcome.prefix_hit_ratio <= outcome.block_hit_ratio <= best.block_hit_ratio <= unlimited.block_hit_ratio
    assert best.prefix_hit_ratio == best.block_hit_ratio
    assert outcome.fresh_blocks + round(outcome.block_hit_ratio * outcome.events) == outcome.events


def test_with_room_for_all_everything_hits_after_its_first_use() -> None:
    trace = random_trace(3)
    unique = len({block for request in trace for block in request.blocks})
    events = sum(len(request.blocks) for request in trace)
    expected = pytest.approx(1 - unique / events)
    assert run(trace, 4 * unique, 4).prefix_hit_ratio == expected
    assert object_lru(trace, unique).prefix_hit_ratio == object_s3_fifo(trace, 2 * unique).prefix_hit_ratio == expected


def test_the_references_by_hand() -> None:
    trace = requests_of([0], [1], [0], [2], [0], [1])
    assert object_lru(trace, 2).block_hit_ratio == 2 / 6
    assert belady(trace, 2).block_hit_ratio == 3 / 6
    assert object_lru(trace, 0).block_hit_ratio == belady(trace, 0).block_hit_ratio == 0


def test_a_policy_that_keeps_everything_does_not_stop_the_log() -> None:
    class Keeper:
        name = "keeper"

        def victim(self, segments: object) -> int:
            return 0

        def choose(self, candidates: list[object], segment_bytes: int) -> list[object]:
            return candidates

        def facts(self) -> dict[str, float]:
            return {}

    outcome = simulate(
        requests_of(*[[n] for n in range(30)]), capacity_blocks=6, segments=3, reclaim=Keeper(), admission=admission_policy("always")  # type: ignore[arg-type]
    )
    assert outcome.fresh_blocks == 30


def test_progress_is_told() -> None:
    told: list[int] = []
    run(random_trace(1, 600), 60, progress=told.append)
    assert told == [256, 512]


@pytest.mark.parametrize(("capacity", "segments"), [(-1, 2), (3, 4), (8, 1)])
def test_sizes_that_cannot_be_used_are_refused(capacity: int, segments: int) -> None:
    with pytest.raises(InvalidConfig, match="no room for its segments"):
        run(requests_of([0]), capacity, segments)
