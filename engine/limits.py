"""What one namespace may take of a store: bytes, a share of the writes, and how long its blocks live."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..format.errors import InvalidConfig
from ..format.layout import DIGEST_BYTES
from ..format.namespace import Namespace
from .sizes import parse_bytes

EVERY_NAMESPACE = "*"
"""The key of the limits that hold for each namespace that has none of its own."""

_DIGEST = re.compile(rf"[0-9a-f]{{{2 * DIGEST_BYTES}}}\Z")


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one namespace; ``None`` is no limit. Sizes may be given as text where a store takes options (``Limits.build``)."""

    quota_bytes: int | None = None
    """Bytes of its records in the log. Beyond it the namespace loses its own oldest blocks, never those of others."""
    write_share_max: float | None = None
    """Share of the bytes that are taken in lately, once the store has been full; above 0, at most 1. Others must be writing too."""
    ttl_s: float | None = None
    """How long its blocks live where a put does not say."""

    def __post_init__(self) -> None:
        if self.quota_bytes is not None and self.quota_bytes < 1:
            raise InvalidConfig("a quota cannot be used", expected="a positive number of bytes, or None", actual=self.quota_bytes)
        if self.write_share_max is not None and not 0 < self.write_share_max <= 1:
            raise InvalidConfig("a share of writes cannot be used", expected="above 0, at most 1, or None", actual=self.write_share_max)
        if self.ttl_s is not None and not (self.ttl_s > 0 and math.isfinite(self.ttl_s)):
            raise InvalidConfig("ttl_s cannot be used", expected="a positive number of seconds, or None", actual=self.ttl_s)

    @classmethod
    def build(cls, *, quota: int | str | None = None, write_share: float | None = None, ttl: float | None = None) -> Limits:
        """Limits from ``quota="10GiB"``, ``write_share=0.5``, ``ttl=3600``."""
        return cls(None if quota is None else parse_bytes(quota, "quota"), write_share, ttl)


LimitsByNamespace: TypeAlias = Mapping[str, Limits]
"""Limits by a namespace's digest in hex (as ``kvlode inspect`` shows it), or by ``"*"``."""


def checked_limits(given: Any) -> LimitsByNamespace:
    """Limits with their keys in one form. Keys may be ``Namespace``, digests, digests in hex, and ``"*"``. Raises ``InvalidConfig``."""
    if not isinstance(given, Mapping):
        raise InvalidConfig("limits are no mapping", expected="namespace -> kvlode.Limits", actual=type(given).__name__)
    limits: dict[str, Limits] = {}
    for key, value in given.items():
        name = key.digest.hex() if isinstance(key, Namespace) else key.hex() if isinstance(key, bytes) else key
        if not isinstance(name, str) or not (name == EVERY_NAMESPACE or _DIGEST.match(name)):
            raise InvalidConfig(
                "limits for something that is no namespace",
                expected=f"a kvlode.Namespace, its digest ({2 * DIGEST_BYTES} hexadecimal digits), or '{EVERY_NAMESPACE}'",
                actual=repr(key)[:80],
            )
        if not isinstance(value, Limits):
            raise InvalidConfig("limits of a namespace", expected="kvlode.Limits", actual=type(value).__name__)
        limits[name] = value
    return limits


def check_quotas(limits: LimitsByNamespace, capacity_bytes: int) -> None:
    """Raises ``InvalidConfig`` for a quota that the store could never hold."""
    for name, limit in limits.items():
        if limit.quota_bytes is not None and limit.quota_bytes > capacity_bytes:
            raise InvalidConfig(
                "a quota is larger than the store",
                where=f"limits of namespace {name}",
                expected=f"at most the capacity, {capacity_bytes} bytes",
                actual=f"{limit.quota_bytes} bytes",
                action="Lower the quota, or raise capacity.",
            )


def limits_of(limits: LimitsByNamespace, namespace: bytes) -> Limits:
    """The limits that hold for a namespace, by its digest."""
    return limits.get(namespace.hex()) or limits.get(EVERY_NAMESPACE) or _NONE


_NONE = Limits()
