"""Which new blocks a store takes in: the admission policy, shares of writes, and quotas that reclaim cannot keep up with."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable

import xxhash

from .contract import Refusal
from .limits import LimitsByNamespace, limits_of
from .policies.interface import AdmissionPolicy
from .usage import UsageTable

SHARE_WINDOW_DIVISOR = 16
"""A share of writes is judged over about the last sixteenth of the capacity that was taken in."""
QUOTA_SLACK_DIVISOR = 8
"""Reclaim gives up what is beyond a quota in the background. Puts are refused when a namespace is this part of it beyond."""


class WriteShares:
    """Bytes taken in lately by namespace: all counts are halved when their sum reaches the window. Not thread-safe."""

    def __init__(self, window_bytes: int) -> None:
        self.window_bytes = window_bytes
        self._bytes: defaultdict[bytes, int] = defaultdict(int)
        self._total = 0

    def add(self, namespace: bytes, size_bytes: int) -> None:
        self._bytes[namespace] += size_bytes
        self._total += size_bytes
        if self._total >= self.window_bytes:
            halves = {digest: count // 2 for digest, count in self._bytes.items() if count > 1}
            self._bytes = defaultdict(int, halves)
            self._total = sum(halves.values())

    def exceeded(self, namespace: bytes, share_max: float) -> bool:
        """Whether the namespace has had more than its share. A namespace that writes alone has nobody to leave room for."""
        own = self._bytes.get(namespace, 0)
        return own < self._total and own > share_max * self._total


class Admission:
    """Asked by puts for blocks that are not stored. Thread-safe, and short."""

    def __init__(
        self,
        policy: AdmissionPolicy,
        limits: LimitsByNamespace,
        usage: UsageTable,
        capacity_bytes: int,
        monotonic_s: Callable[[], float],
    ) -> None:
        self._usage = usage
        self._monotonic_s = monotonic_s
        self._lock = threading.Lock()
        self.filled = False
        """Whether the store has had to free a segment, or was full when it was opened."""
        self._policy = policy
        self.on_over_quota: Callable[[], None] = lambda: None
        """Called when a namespace is beyond its quota, so that reclaim gives up some of it."""
        self.reconfigure(None, limits, capacity_bytes)

    def reconfigure(self, policy: AdmissionPolicy | None, limits: LimitsByNamespace, capacity_bytes: int) -> None:
        """Go on with other limits, and another policy unless it is ``None``."""
        with self._lock:
            self._policy, self._limits = policy or self._policy, limits
            self._shares = WriteShares(max(1, capacity_bytes // SHARE_WINDOW_DIVISOR))

    def refusal(self, namespace: bytes, ident: bytes, size_bytes: int) -> Refusal | None:
        """Why a new block is not taken in; ``None`` when it is, and counts as written then."""
        limits = limits_of(self._limits, namespace)
        if limits.quota_bytes is not None:
            used_bytes = self._usage.bytes_of(namespace)
            if used_bytes > limits.quota_bytes:
                self.on_over_quota()
            if used_bytes > limits.quota_bytes + limits.quota_bytes // QUOTA_SLACK_DIVISOR:
                return Refusal.QUOTA
        with self._lock:
            if self.filled and limits.write_share_max is not None and self._shares.exceeded(namespace, limits.write_share_max):
                return Refusal.WRITE_SHARE
            key_hash = xxhash.xxh3_64_intdigest(ident)
            if not self._policy.admit(key_hash, size_bytes, self._monotonic_s(), filled=self.filled):
                return Refusal.NOT_ADMITTED
            self._shares.add(namespace, size_bytes)
        return None

    def beyond_quota(self, namespace: bytes) -> bool:
        """Whether the namespace takes more than its quota: then none of its blocks is worth a copy."""
        quota_bytes = limits_of(self._limits, namespace).quota_bytes
        return quota_bytes is not None and self._usage.bytes_of(namespace) > quota_bytes

    def ttl_s(self, namespace: bytes) -> float | None:
        """How long blocks of the namespace live where a put does not say."""
        return limits_of(self._limits, namespace).ttl_s
