"""What the options of ``kvlode replay`` mean: policies by name, sizes, shares."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from ...engine.policies.interface import AdmissionPolicy, ReclaimPolicy
from ...engine.policies.registry import admission_policy, reclaim_policy
from ...engine.policy_choice import DAY_BUDGET_BYTES_MIN
from ...engine.sizes import parse_bytes
from ...format.errors import InvalidConfig

DEFAULT_SHARE = "10%"
SWEEP_SHARES = ("1%", "2%", "5%", "10%", "20%", "40%", "80%")
OptionValue: TypeAlias = int | float | bool | str
_SHARE = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*%\s*\Z", re.ASCII)
_SIZE = re.compile(r"\d+(?:\.\d+)?\s*[a-zA-Z]+\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class PolicyChoice:
    """``NAME[:option=value,...]``: a policy that can be made as often as it is needed."""

    text: str
    name: str
    options: Mapping[str, OptionValue]

    def reclaim(self) -> ReclaimPolicy:
        """A new policy. Raises ``InvalidConfig``."""
        return reclaim_policy(self.name, **self.options)

    def admission(self, capacity_bytes: int) -> AdmissionPolicy:
        """A new policy; a budget without a limit has that of a store of this size. Raises ``InvalidConfig``."""
        options = dict(self.options)
        if self.name == "budget":
            options.setdefault("bytes_per_day", max(capacity_bytes, DAY_BUDGET_BYTES_MIN))
        return admission_policy(self.name, **options)


@dataclass(frozen=True, slots=True)
class Settings:
    """One replay, as it was asked for."""

    policies: tuple[PolicyChoice, ...]
    admission: PolicyChoice
    capacity: str = DEFAULT_SHARE
    """A size, or a share of the trace's unique blocks."""
    segments: int = 64
    block_bytes: int = 1 << 20
    hbm: str | None = None
    dram: str | None = None
    restart_at_s: float | None = None
    prefill: str = ""
    """``MODEL@GPU`` of ``prefill_rates``."""
    folder: Path | None = None
    """Where a real replay makes its store."""
    flush_each: bool = True
    """A real replay waits until the blocks of a request are on the drive before it goes on."""
    sweep_shares: tuple[str, ...] = field(default=SWEEP_SHARES)


def policy_choice(text: str) -> PolicyChoice:
    """The policy that a text names. Raises ``InvalidConfig`` for text of another form; the name is checked when the policy is made."""
    name, _, rest = text.partition(":")
    options: dict[str, OptionValue] = {}
    for part in rest.split(",") if rest else ():
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise InvalidConfig("a policy's option cannot be read", expected="NAME or NAME:option=value,option=value", actual=repr(text))
        options[key.strip()] = _option_value(value.strip())
    return PolicyChoice(text, name.strip(), options)


def _option_value(text: str) -> OptionValue:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return parse_bytes(text) if _SIZE.match(text) else text


def blocks_of(text: str, block_bytes: int, unique_blocks: int, name: str) -> int:
    """Blocks that a size (``200GiB``) or a share of the trace's unique blocks (``10%``) holds. Raises ``InvalidConfig``."""
    share = _SHARE.match(text)
    if share is not None:
        return int(float(share.group(1)) / 100 * unique_blocks)
    if "%" in text:
        raise InvalidConfig(f"{name} is not a share", expected="a share such as 10%", actual=repr(text[:80]))
    return parse_bytes(text, name) // block_bytes
