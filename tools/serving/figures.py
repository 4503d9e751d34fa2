"""What the rounds of both servers amount to: medians of paired ratios, percentiles, and the JSON of the report. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..bench.figures import Bar, Item, value_item

RATIO = "ratio"


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the sorted values. Raises ``ValueError`` for none."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def comparison(
    name: str,
    with_store: Sequence[float],
    without_store: Sequence[float],
    *,
    unit: str,
    bar: Bar | None = None,
    facts: Mapping[str, Any] | None = None,
    void: str | None = None,
) -> Item:
    """The median of paired ratios with / without the store; the medians of both arms, in ``unit``, are among its facts."""
    ratios = [ours / bare for ours, bare in zip(with_store, without_store, strict=True)]
    arms = {"with_store": statistics.median(with_store), "without_store": statistics.median(without_store), "unit": unit}
    return value_item(name, ratios, unit=RATIO, bar=bar, facts={**arms, **(facts or {})}, void=void)
