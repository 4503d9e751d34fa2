"""What a miss-ratio curve says about the capacity, in words. Pure.

All of it is about a cache that gives up what was used least recently. kvlode frees segments and carries forward what is used, which
comes close to that; the difference at the present capacity is told beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...engine.miss_ratio import REPEATED_USES_MIN, SAMPLED_USES_MIN, USES_MIN, MissRatioCurve
from ..output import bytes_text

KNEE_GAIN = 0.02
"""A doubling that saves less than this share of all uses is past the knee."""
WORTH_GAIN = 0.05
"""A doubling that saves so much is worth thinking of."""
SPARE_LOSS = 0.01
"""Half the capacity that costs no more than this is capacity to spare."""


@dataclass(frozen=True, slots=True)
class Advice:
    """``lines``: sentences, the conclusion first. ``knee_bytes``: where the curve flattens, ``None`` where it does not."""

    lines: list[str]
    knee_bytes: int | None = None


def miss_ratio_at(curve: MissRatioCurve, capacity_bytes: float) -> float | None:
    """Between the points by straight lines over the logarithm; ``None`` beyond the ends of what the curve tells."""
    points: Sequence[int] = curve.capacity_bytes
    if not points or not points[0] <= capacity_bytes <= points[-1]:
        return None
    for low, high in zip(range(len(points)), range(1, len(points)), strict=False):
        if capacity_bytes <= points[high]:
            part = math.log(capacity_bytes / points[low]) / math.log(points[high] / points[low])
            return curve.miss_ratios[low] + part * (curve.miss_ratios[high] - curve.miss_ratios[low])
    return curve.miss_ratios[-1]


def advise(curve: MissRatioCurve | None, capacity_bytes: int | None, reused: float | None) -> Advice:
    """``capacity_bytes``: the store's; ``reused``: the share of uses that it really served since opening."""
    if curve is None:
        return Advice(["There is no curve: it is made while a process has the store open, and none publishes one."])
    if not curve.tells or not curve.capacity_bytes:
        seen = f"{curve.uses:,} uses since opening, {curve.sampled_uses:,} in the sample, {curve.repeated_uses:,} of blocks used before"
        return Advice([f"Too little data for advice: {seen} (from {USES_MIN:,}, {SAMPLED_USES_MIN:,} and {REPEATED_USES_MIN:,} on)."])
    if not capacity_bytes:
        return Advice(["The capacity of the store is not known; the curve stands for itself."], _knee(curve))
    return _advise(curve, capacity_bytes, reused)


def _advise(curve: MissRatioCurve, capacity_bytes: int, reused: float | None) -> Advice:
    # beyond its last point the curve is level: larger capacities change nothing that was seen
    def at(size_bytes: float) -> float | None:
        return miss_ratio_at(curve, min(size_bytes, curve.capacity_bytes[-1]))

    now, twice, half = at(capacity_bytes), at(2 * capacity_bytes), at(capacity_bytes / 2)
    knee_bytes = _knee(curve)
    lines = []
    if now is None or twice is None:
        return Advice([f"The curve begins at {bytes_text(curve.capacity_bytes[0])}, above the capacity; it cannot tell of it."], knee_bytes)
    gain = now - twice
    if gain >= WORTH_GAIN:
        lines.append(f"More capacity would help: twice as much ({bytes_text(2 * capacity_bytes)}) reads {_of_100(gain)} blocks more.")
    elif half is not None and half - now <= SPARE_LOSS:
        lines.append(f"There is capacity to spare: half of it ({bytes_text(capacity_bytes / 2)}) loses {_of_100(half - now)} blocks.")
    elif gain < KNEE_GAIN:
        lines.append(f"The capacity fits: twice as much ({bytes_text(2 * capacity_bytes)}) reads only {_of_100(gain)} blocks more.")
    else:
        lines.append(f"More capacity helps a little: twice as much ({bytes_text(2 * capacity_bytes)}) reads {_of_100(gain)} blocks more.")
    really = "" if reused is None else f" (this store, since opening: {100 * reused:.1f})"
    lines.append(f"With {bytes_text(capacity_bytes)}, {_of_100(1 - now)} needed blocks are read and the others are computed{really}.")
    if half is not None:
        lines.append(f"Half the capacity ({bytes_text(capacity_bytes / 2)}) reads {_of_100(1 - half)}, {_of_100(half - now)} fewer.")
    lines.append(_knee_text(curve, knee_bytes, capacity_bytes))
    last = curve.miss_ratios[-1]
    lines.append(f"{_of_100(last)} blocks would be computed with any capacity: they were needed for the first time, or after very long.")
    return Advice(lines, knee_bytes)


def _of_100(share: float) -> str:
    return f"{100 * share:.1f} of 100"


def _knee(curve: MissRatioCurve) -> int | None:
    """The smallest capacity from which no doubling saves ``KNEE_GAIN`` any more; ``None`` when the curve ends before."""
    points = curve.capacity_bytes
    found = None
    for capacity_bytes in reversed(points):
        if 2 * capacity_bytes > points[-1]:
            continue
        now, twice = miss_ratio_at(curve, capacity_bytes), miss_ratio_at(curve, 2 * capacity_bytes)
        if now is None or twice is None or now - twice >= KNEE_GAIN:
            break
        found = capacity_bytes
    return found


def _knee_text(curve: MissRatioCurve, knee_bytes: int | None, capacity_bytes: int) -> str:
    if knee_bytes is None:
        return f"The curve has no knee: it falls up to its end at {bytes_text(curve.capacity_bytes[-1])}."
    place = "below" if knee_bytes < capacity_bytes else "above"
    gain = f"from there a doubling reads less than {_of_100(KNEE_GAIN)} blocks more"
    return f"The knee is at {bytes_text(knee_bytes)}, {place} the capacity: {gain}."
