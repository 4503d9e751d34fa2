"""Changing the options of an open store: what can change while it runs, and how each part learns of it."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from ..format.errors import InvalidConfig, StoreFailed
from .capacity import Budget, budget_for
from .config import TEXT_SIZES, StoreConfig
from .policy_choice import admission_policy_of, reclaim_policy_of
from .sizes import parse_bytes, parse_sizes

if TYPE_CHECKING:
    from .core import Core

logger = logging.getLogger("kvlode")

CHANGEABLE = frozenset(
    {
        *("capacity_bytes", "codec", "cpu_budget", "flush_after_s", "put_timeout_s", "reclaim_grace_s", "segment_bytes"),
        *("reclaim_policy", "reinsert_hits_min", "write_amplification_max", "admission_policy", "write_budget_bytes_per_day"),
        *("min_free_disk_bytes", "limits"),
    }
)
"""The rest (memory, threads, the kind of index and of device) is what the store was built with."""


def reconfigure(core: Core, options: dict[str, Any]) -> StoreConfig:
    """Put options in force, all or none; returns the configuration from now on.

    A smaller capacity is reached in the background, by freeing segments. Policies start anew where their options change. Raises
    ``InvalidConfig`` for what cannot be, or cannot be changed, and ``StoreFailed`` on a follower.
    """
    if core.follower:
        raise StoreFailed("a follower has no options to change", where=core.path, action="Call reconfigure in the writing process.")
    config = _checked(core.config, options)
    with core.reconfiguring:
        before, core.config = core.config, config
        budget = _budget(core, config)
        core.budget = budget
        core.namespaces.force_codec(config.forced_codec)
        core.writer.reconfigure(config)
        if _differ(before, config, _RECLAIM):
            core.evictor.policy = reclaim_policy_of(config)
        admission = admission_policy_of(config) if _differ(before, config, _ADMISSION) else None
        core.admission.reconfigure(admission, config.limits, config.capacity_bytes)
        core.pins.resize(budget.for_segments(0, 0))
        core.keeper.reconfigure(config, budget)
    changed = {name: getattr(config, name) for name in sorted(CHANGEABLE) if getattr(config, name) != getattr(before, name)}
    logger.info("store %s goes on with %s", core.path, changed or "the options it had")
    return config


_RECLAIM = ("reclaim_policy", "reinsert_hits_min", "write_amplification_max")
_ADMISSION = ("admission_policy", "write_budget_bytes_per_day", "capacity_bytes")


def _differ(before: StoreConfig, config: StoreConfig, names: tuple[str, ...]) -> bool:
    return any(getattr(before, name) != getattr(config, name) for name in names)


def _checked(config: StoreConfig, options: dict[str, Any]) -> StoreConfig:
    wanted = dict(options)
    if "capacity" in wanted:
        wanted["capacity_bytes"] = parse_bytes(wanted.pop("capacity"), "capacity")
    parse_sizes(wanted, TEXT_SIZES)
    fixed = sorted(set(wanted) - CHANGEABLE)
    if fixed:
        raise InvalidConfig(
            f"{fixed[0]} cannot be changed while the store is open",
            expected=f"one of capacity, {', '.join(sorted(CHANGEABLE))}",
            actual=fixed[0],
            action="Close the store and open it with the other value.",
        )
    changed = dataclasses.replace(config, **wanted)
    budget_for(changed)  # raises when hardly anything would be left for segments
    return changed


def _budget(core: Core, config: StoreConfig) -> Budget:
    """The formula with the new capacity; the files that opening has made stay as large as they are."""
    return dataclasses.replace(budget_for(config), fixed_bytes=max(core.budget.fixed_bytes, budget_for(config).fixed_bytes))
