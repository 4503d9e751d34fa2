"""The policies that a store's options name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .policies.interface import AdmissionPolicy, ReclaimPolicy
from .policies.registry import admission_policy, reclaim_policy

if TYPE_CHECKING:
    from .config import StoreConfig

DAY_BUDGET_BYTES_MIN = 1 << 40
"""What a drive of a terabyte can take a day for years: a small store on it need not be told to write less."""


_OPTIONS = {
    "reinsertion": ("hits_min", "write_amplification_max"),
    "s3-fifo": ("write_amplification_max",),
    "prefix-aware": ("write_amplification_max",),
}
"""Which of the store's options a policy takes."""


def reclaim_policy_of(config: StoreConfig) -> ReclaimPolicy:
    """A new policy object. Raises ``InvalidConfig`` for an unknown name or options that contradict each other."""
    if config.reinsert_hits_min == 0 and config.reclaim_policy == "reinsertion":
        return reclaim_policy("fifo")
    given = {"hits_min": config.reinsert_hits_min, "write_amplification_max": config.write_amplification_max}
    return reclaim_policy(config.reclaim_policy, **{name: given[name] for name in _OPTIONS.get(config.reclaim_policy, ())})


def admission_policy_of(config: StoreConfig) -> AdmissionPolicy:
    """A new policy object; that of the default holds the write budget."""
    if config.admission_policy != "budget":
        return admission_policy(config.admission_policy)
    day_bytes = config.write_budget_bytes_per_day or max(config.capacity_bytes, DAY_BUDGET_BYTES_MIN)
    return admission_policy("budget", bytes_per_day=day_bytes)
