"""Figures and what may be claimed of them: medians of paired ratios, their spread, and when a figure is void.

Pure functions over numbers, so that the rules are tested without measuring anything.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

State: TypeAlias = Literal["ok", "unresolved", "void", "skipped"]

SPREAD_MAX = 0.10
"""An interquartile range of more than this fraction of the median leaves a figure unresolved."""


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure must reach."""

    value: float
    direction: Literal["at least", "at most"]

    def reached_by(self, figure: float) -> bool:
        return figure >= self.value if self.direction == "at least" else figure <= self.value

    def __str__(self) -> str:
        return f"{'>=' if self.direction == 'at least' else '<='} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Quartiles:
    """First quartile, median and third quartile of some rounds."""

    first: float
    median: float
    third: float

    @property
    def resolved(self) -> bool:
        return self.third - self.first <= SPREAD_MAX * abs(self.median)


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the report. ``figure`` is a ratio or a value in ``unit``; it is absent only when nothing was measured."""

    name: str
    unit: str
    state: State
    figure: float | None = None
    quartiles: tuple[float, float] | None = None
    rounds: int = 0
    bar: Bar | None = None
    reason: str | None = None
    absolute: dict[str, Any] = field(default_factory=dict)
    """Medians of both arms and other facts, as information: they say more of the machine than of the store."""

    @property
    def reached(self) -> bool | None:
        """Whether the bar is reached; ``None`` without a bar, and for a figure that is void or was not measured."""
        if self.bar is None or self.figure is None or self.state in ("void", "skipped"):
            return None
        return self.bar.reached_by(self.figure)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. ``ok`` is whether the bar is reached: ``None`` without one, and where nothing may be claimed."""
        return {
            "name": self.name,
            "value": _rounded(self.figure),
            "unit": self.unit,
            "bar": None if self.bar is None else self.bar.value,
            "direction": None if self.bar is None else self.bar.direction,
            "ok": self.reached,
            "spread": None if self.quartiles is None else [_rounded(value) for value in self.quartiles],
            "rounds": self.rounds,
            "state": self.state,
            "reason": self.reason,
            "facts": {name: _rounded(value) for name, value in self.absolute.items()},
        }


def quartiles_of(values: Sequence[float]) -> Quartiles:
    """Quartiles by linear interpolation between the sorted values; a single value is all three. Raises ``ValueError`` for none."""
    if not values:
        raise ValueError("no values")
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(first, median, third)


def ratio_item(
    name: str,
    store_rates: Sequence[float],
    bare_rates: Sequence[float],
    *,
    bar: Bar | None,
    facts: Mapping[str, Any],
    void: str | None = None,
) -> Item:
    """The median of paired ratios ``store / bare``: rates in GB/s of the same round, taken one after the other.

    ``void`` is why the figure must not be used (it is then reported without a verdict).
    """
    pairs = list(zip(store_rates, bare_rates, strict=True))
    spread = quartiles_of([store / bare for store, bare in pairs])
    absolute = {"store_GB_s": statistics.median(store_rates), "bare_GB_s": statistics.median(bare_rates), **facts}
    return _judged(Item(name, "ratio", "ok", spread.median, (spread.first, spread.third), len(pairs), bar, None, absolute), spread, void)


def value_item(
    name: str, values: Sequence[float], *, unit: str, bar: Bar | None, facts: Mapping[str, Any], void: str | None = None
) -> Item:
    """The median of absolute values, for what has no bare counterpart."""
    spread = quartiles_of(values)
    return _judged(Item(name, unit, "ok", spread.median, (spread.first, spread.third), len(values), bar, None, dict(facts)), spread, void)


def skipped_item(name: str, reason: str) -> Item:
    """An item that could not be measured here."""
    return Item(name, "", "skipped", reason=reason)


def _judged(item: Item, spread: Quartiles, void: str | None) -> Item:
    state: State = "void" if void else "ok" if spread.resolved else "unresolved"
    reason = void
    if state == "unresolved":
        share = (spread.third - spread.first) / abs(spread.median) if spread.median else float("inf")
        reason = f"the middle half of the rounds spreads over {share:.0%} of the median"
    return Item(item.name, item.unit, state, item.figure, item.quartiles, item.rounds, item.bar, reason, item.absolute)


def abba(rounds: int, store: Callable[[int], float], bare: Callable[[int], float]) -> tuple[list[float], list[float]]:
    """Measure both arms ``rounds`` times, in the order A B, B A, A B, ...: drift of the machine hits both alike."""
    store_results: list[float] = []
    bare_results: list[float] = []
    for number in range(rounds):
        arms = [(store, store_results), (bare, bare_results)]
        for arm, results in arms if number % 2 == 0 else reversed(arms):
            results.append(arm(number))
    return store_results, bare_results


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
