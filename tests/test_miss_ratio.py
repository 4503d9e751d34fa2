"""The miss-ratio curve against exact LRU stack distances, on traces of known shape; and what the sampler costs in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlode.engine.miss_ratio import MissRatioCurve, MissRatioSampler

MIB = 1 << 20
USES = 60_000
SAMPLED_MAX = 4096
TOLERANCE = 0.04
"""Of the miss ratio, between the capacities one step (9 %) to the left and to the right."""
STEP = 2**0.125 * 1.001


def ident(number: int) -> bytes:
    return b"n" * 16 + number.to_bytes(24, "little")


def size_of(number: int) -> int:
    return MIB << number % 3


def exact_distances(trace: list[int]) -> list[float]:
    """Bytes of different blocks since the last use of the same one, itself included; infinite for a first use."""
    stack: OrderedDict[int, int] = OrderedDict()
    tree = [0] * (len(trace) + 2)

    def add(at: int, amount: int) -> None:
        at += 1
        while at < len(tree):
            tree[at] += amount
            at += at & -at

    def upto(at: int) -> int:
        total, at = 0, at + 1
        while at:
            total += tree[at]
            at &= at - 1
        return total

    distances, total_bytes = [], 0
    for time, number in enumerate(trace):
        last = stack.pop(number, None)
        if last is None:
            distances.append(float("inf"))
        else:
            distances.append(float(total_bytes - upto(last) + size_of(number)))
            add(last, -size_of(number))
            total_bytes -= size_of(number)
        stack[number] = time
        add(time, size_of(number))
        total_bytes += size_of(number)
    return distances


def lru_misses(trace: list[int], capacity_bytes: int) -> int:
    """Misses of a real list of that capacity: what the distances stand for."""
    held: OrderedDict[int, None] = OrderedDict()
    held_bytes = misses = 0
    for number in trace:
        if number in held:
            held.move_to_end(number)
            continue
        misses += 1
        held[number] = None
        held_bytes += size_of(number)
        while held_bytes > capacity_bytes:
            held_bytes -= size_of(held.popitem(last=False)[0])
    return misses


def sampled(trace: list[int], sampled_max: int = SAMPLED_MAX, distance_bytes_max: int | None = None, call: int = 50) -> MissRatioSampler:
    sampler = MissRatioSampler(distance_bytes_max, sampled_max)
    for start in range(0, len(trace), call):
        numbers = trace[start : start + call]
        sampler.use([ident(number) for number in numbers], lambda at, numbers=numbers: size_of(numbers[at]))
    return sampler


def zipf(rng: np.random.Generator, exponent: float, blocks: int = 20_000) -> list[int]:
    shares = 1 / np.arange(1, blocks + 1) ** exponent
    numbers = rng.choice(blocks, USES, p=shares / shares.sum())
    return [int(number) for number in rng.permutation(blocks)[numbers]]


def check(curve: MissRatioCurve, trace: list[int], distance_bytes_max: float = float("inf"), tolerance: float = TOLERANCE) -> None:
    distances = np.array(exact_distances(trace))
    distances[distances > distance_bytes_max] = np.inf
    assert curve.capacity_bytes == sorted(curve.capacity_bytes)
    assert curve.miss_ratios == sorted(curve.miss_ratios, reverse=True)
    for capacity_bytes, ratio in zip(curve.capacity_bytes, curve.miss_ratios, strict=True):
        highest = float((distances > capacity_bytes / STEP).mean()) + tolerance
        lowest = float((distances > capacity_bytes * STEP).mean()) - tolerance
        assert lowest <= ratio <= highest, (capacity_bytes, ratio, lowest, highest)


@pytest.mark.parametrize("exponent", [0.6, 0.9, 1.2])
def test_the_curve_of_popular_blocks_is_that_of_exact_distances(rng: np.random.Generator, exponent: float) -> None:
    trace = zipf(rng, exponent)
    curve = sampled(trace).curve()
    assert curve.sampled_share < 0.8 and curve.tells
    assert len(curve.capacity_bytes) > 20
    check(curve, trace)


def test_a_loop_over_more_blocks_than_fit_misses_until_all_of_them_fit() -> None:
    trace = list(range(10_000)) * 6
    curve = sampled(trace).curve()
    check(curve, trace)
    whole_bytes = sum(size_of(number) for number in range(10_000))
    last = curve.capacity_bytes[-1]
    assert whole_bytes / 1.15 < last < whole_bytes * 1.15
    assert curve.miss_ratios[-1] == pytest.approx(1 / 6, abs=TOLERANCE)
    assert curve.miss_ratios[0] > 1 - TOLERANCE


def test_a_scan_has_no_curve_and_tells_nothing() -> None:
    curve = sampled(list(range(USES))).curve()
    assert (curve.capacity_bytes, curve.miss_ratios, curve.uses) == ([], [], USES)
    assert not curve.tells
    assert not MissRatioSampler().curve().tells


def test_popular_blocks_between_scans_of_new_ones(rng: np.random.Generator) -> None:
    popular = zipf(rng, 0.9, 2000)
    trace = [number for at in range(USES // 4) for number in (popular[at], 10**6 + 2 * at, 10**6 + 2 * at + 1)]
    check(sampled(trace).curve(), trace, tolerance=0.06)  # the number of different blocks is guessed too, and most are of the scan


def test_without_sampling_the_curve_is_exact_at_every_point(rng: np.random.Generator) -> None:
    trace = [int(number) for number in rng.zipf(1.3, 4000) % 500]
    curve = sampled(trace, sampled_max=1000).curve()
    assert curve.sampled_share == 1.0
    for capacity_bytes, ratio in zip(curve.capacity_bytes, curve.miss_ratios, strict=True):
        assert ratio == pytest.approx(np.mean(np.array(exact_distances(trace)) > capacity_bytes))
    uniform = [number * 3 for number in trace]  # of one size: there a list of whole blocks and distances agree
    for capacity_bytes, ratio in zip(*_points(sampled(uniform, sampled_max=1000).curve()), strict=True):
        assert ratio == pytest.approx(lru_misses(uniform, capacity_bytes) / len(uniform))


def _points(curve: MissRatioCurve) -> tuple[list[int], list[float]]:
    return curve.capacity_bytes, curve.miss_ratios


def test_sizes_scale_to_what_is_stored(rng: np.random.Generator) -> None:
    sampler = sampled(zipf(rng, 0.9))
    raw, stored = sampler.curve(), sampler.curve(scale=0.5)
    assert stored.miss_ratios == raw.miss_ratios
    assert stored.capacity_bytes == pytest.approx([size / 2 for size in raw.capacity_bytes], abs=1)


def test_blocks_that_nobody_uses_any_more_leave_the_sample_to_those_that_are_used(rng: np.random.Generator) -> None:
    """A store that lives long sees far more blocks than it holds; the sample stays as fine as what it holds deserves."""
    limit_bytes = 4000 * MIB
    trace = [number for at, number in enumerate(zipf(rng, 0.9, 500)) for number in (number, 10**6 + at)]
    bounded, unbounded = sampled(trace, distance_bytes_max=limit_bytes).curve(), sampled(trace).curve()
    assert bounded.sampled_share > 10 * unbounded.sampled_share
    assert bounded.capacity_bytes[-1] <= limit_bytes * STEP
    check(bounded, trace, limit_bytes)


def test_the_memory_of_the_sample_is_bounded() -> None:
    sampler = sampled(list(range(USES)), sampled_max=100)
    assert len(sampler._blocks) == len(sampler._hashes) == 100
    assert set(sampler._blocks) == set(sampler._hashes)
    assert max(sampler._hashes) < sampler._threshold


def test_the_same_uses_give_the_same_curve_however_they_are_grouped(rng: np.random.Generator) -> None:
    trace = zipf(rng, 0.9)[:20_000]
    assert sampled(trace, call=50).curve() == sampled(trace, call=50).curve() == sampled(trace, call=1).curve()


def test_a_touch_makes_blocks_recent_and_is_no_use() -> None:
    sampler = sampled([0, 1, 2] * 4, sampled_max=100)
    before = sampler.curve()
    sampler.use([ident(7), ident(0)], lambda at: MIB, counted=False)
    assert sampler.curve() == MissRatioCurve(*(getattr(before, name) for name in before.__slots__[:5]), before.sampled_blocks + 1, 1.0)
    sampler.use([ident(0)], lambda at: MIB)
    assert sampler.curve().capacity_bytes[0] <= MIB, "nothing was used between the touch and the use"


def test_a_part_of_a_block_counts_as_the_whole_of_it() -> None:
    sampler = MissRatioSampler()
    sampler.use([ident(0)], lambda at: 8 * MIB)
    for _ in range(3):
        sampler.use([ident(0)], lambda at: MIB)
    curve = sampler.curve()
    assert curve.capacity_bytes[-1] == 8 * MIB and curve.miss_ratios[-1] == 0.25


@given(
    trace=st.lists(st.integers(0, 40), max_size=300),
    sampled_max=st.integers(1, 60),
    limit_bytes=st.none() | st.integers(MIB, 100 * MIB),
    call=st.integers(1, 20),
)
def test_any_uses_leave_a_sound_sample_and_curve(trace: list[int], sampled_max: int, limit_bytes: int | None, call: int) -> None:
    sampler = sampled(trace, sampled_max, limit_bytes, call)
    curve = sampler.curve()
    assert curve.uses == len(trace) >= curve.sampled_uses >= curve.repeated_uses
    assert len(sampler._blocks) <= sampled_max and sorted(sampler._blocks) == sampler._hashes
    assert sampler._recent.total == sum(size_bytes for _, size_bytes in sampler._blocks.values())
    positions = [position for position, _ in sampler._blocks.values()]
    assert positions == sorted(set(positions)), "the order of the positions is that of the uses"
    assert all(0 <= ratio <= 1 for ratio in curve.miss_ratios)
    assert curve.miss_ratios == sorted(curve.miss_ratios, reverse=True)
    if curve.sampled_share == 1 and limit_bytes is None:
        distances = np.array(exact_distances(trace))
        for capacity_bytes, ratio in zip(curve.capacity_bytes, curve.miss_ratios, strict=True):
            assert ratio == pytest.approx(float((distances > capacity_bytes).mean()))


def test_threads_lose_no_use() -> None:
    sampler = MissRatioSampler(None, 200)
    start = threading.Barrier(4)

    def work(first: int) -> None:
        start.wait()
        for number in range(first, first + 1500):
            sampler.use([ident(number % 700), ident(number % 11)], lambda at: MIB)

    threads = [threading.Thread(target=work, args=(number * 100,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sampler.curve().uses == 4 * 1500 * 2
    assert sorted(sampler._blocks) == sampler._hashes and len(sampler._hashes) <= 200
