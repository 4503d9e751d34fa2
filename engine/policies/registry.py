"""The policies by name, with their options checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ...format.errors import InvalidConfig
from .admission import AlwaysAdmit, SecondSighting, WriteBudget
from .fifo import SegmentFifo, SegmentLru
from .interface import AdmissionPolicy, ReclaimPolicy
from .prefix_aware import PrefixAware
from .reinsertion import HITS_MIN, Reinsertion
from .s3_fifo import SegmentS3Fifo

_Policy = TypeVar("_Policy")

RECLAIM_POLICIES: Mapping[str, Callable[..., ReclaimPolicy]] = {
    policy.name: policy for policy in (SegmentFifo, Reinsertion, PrefixAware, SegmentLru, SegmentS3Fifo)
}
ADMISSION_POLICIES: Mapping[str, Callable[..., AdmissionPolicy]] = {
    policy.name: policy for policy in (AlwaysAdmit, SecondSighting, WriteBudget)
}


def reclaim_policy(name: str, **options: Any) -> ReclaimPolicy:
    """A new policy. Raises ``InvalidConfig`` for a name that is unknown, and for options that it does not have or cannot use."""
    return _made("reclaim policy", RECLAIM_POLICIES, name, options)


def admission_policy(name: str, **options: Any) -> AdmissionPolicy:
    """A new policy. Raises as ``reclaim_policy`` does; ``budget`` needs ``bytes_per_day``."""
    return _made("admission policy", ADMISSION_POLICIES, name, options)


def default_reclaim_policy(hits_min: int = HITS_MIN) -> ReclaimPolicy:
    """Reinsertion from so many uses on; FIFO where it is 0."""
    return Reinsertion(hits_min) if hits_min else SegmentFifo()


def daily_budget(capacity_bytes: int) -> AdmissionPolicy:
    """The capacity, once a day."""
    return WriteBudget(capacity_bytes)


def _made(kind: str, policies: Mapping[str, Callable[..., _Policy]], name: str, options: Mapping[str, Any]) -> _Policy:
    make = policies.get(name)
    if make is None:
        raise InvalidConfig(f"unknown {kind}", expected=" or ".join(sorted(policies)), actual=repr(name))
    known = inspect.signature(make).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InvalidConfig(
            f"{unknown[0]} is no option of the {kind} {name!r}",
            expected=", ".join(known) or "no options",
            actual=f"{unknown[0]}={options[unknown[0]]!r}",
            action="Leave it out, or choose the policy that it belongs to.",
        )
    missing = [option for option, parameter in known.items() if parameter.default is inspect.Parameter.empty and option not in options]
    if missing:
        raise InvalidConfig(f"the {kind} {name!r} needs an option", expected=f"{missing[0]}=...", actual=dict(options) or "no options")
    return make(**options)
