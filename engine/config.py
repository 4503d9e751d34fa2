"""What a store is opened with: validated once, immutable afterwards."""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass
from typing import Literal, Protocol

from ..format.errors import InvalidConfig
from ..format.layout import PAGE_BYTES, Codec
from .limits import LimitsByNamespace, check_quotas, checked_limits
from .policy_choice import admission_policy_of, reclaim_policy_of
from .sizes import GIB as GIB
from .sizes import KIB as KIB
from .sizes import MIB as MIB
from .sizes import parse_bytes as parse_bytes
from .sizes import parse_sizes

SEGMENT_BYTES_MIN = 64 * KIB
TEXT_SIZES = ("min_free_disk_bytes", "write_budget_bytes_per_day")
"""Options beside ``capacity`` and ``buffer`` that may be given as text."""

SEGMENTS_MIN = 16
"""A store holds at least this many segments, so that freeing one costs little of the cache."""


class Clock(Protocol):
    """Time as the store sees it; tests inject their own."""

    def now_ns(self) -> int:
        """UTC, nanoseconds since the epoch."""
        ...

    def monotonic_s(self) -> float:
        """Seconds that never run backwards."""
        ...


class SystemClock:
    """UTC read once, then advanced by the monotonic clock: a jump of the wall clock neither resurrects nor expires blocks."""

    def __init__(self) -> None:
        self._anchor_ns = time.time_ns() - time.monotonic_ns()

    def now_ns(self) -> int:
        return self._anchor_ns + time.monotonic_ns()

    def monotonic_s(self) -> float:
        return time.monotonic()


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Options of ``kvlode.open``; sizes in bytes, times in seconds. ``StoreConfig.build`` accepts sizes as text."""

    capacity_bytes: int = 64 * GIB
    """Hard cap on everything below the store's folder."""
    buffer_bytes: int = GIB
    """DRAM for blocks on their way to the drive and for recently used ones."""
    gds: Literal["auto", "require", "off"] = "auto"
    on_locked: Literal["fail", "wait", "follow"] = "fail"
    on_incompatible: Literal["refuse", "set_aside", "fresh"] = "refuse"
    """What becomes of a store that this version cannot write: an error, moved away whole, or removed; see ``engine.incompatible``."""
    lock_timeout_s: float = 30.0
    """How long ``on_locked="wait"`` waits for the other writer."""
    flush_after_s: float = 0.2
    """Age at which a dirty block is written even though no full batch has gathered."""
    put_timeout_s: float = 0.0
    """How long a put waits for room in the buffer before it is refused."""
    codec: Literal["auto", "raw", "zstd", "planes+zstd"] = "auto"
    serve_clean: bool = True
    """Keep written blocks in the buffer while there is room; off when the host has a DRAM cache of its own."""
    segment_bytes: int | None = None
    """Size of a segment; ``None`` chooses 32 times the largest block, between 64 MiB and 4 GiB."""
    batch_bytes: int = 16 * MIB
    """Raw bytes gathered into one write."""
    encode_threads: int = dataclasses.field(default_factory=lambda: max(1, os.cpu_count() or 1))
    cpu_budget: float = dataclasses.field(default_factory=lambda: float(len(os.sched_getaffinity(0))))
    """Cores that the store may keep busy. ``codec="auto"`` encodes as many blocks as they manage while the drive is busy anyway."""
    io_threads: int = 16
    bounce_bytes: int = 128 * MIB
    """Memory for reads in flight."""
    open_files_max: int = 64
    reinsert_hits_min: int = 2
    """Hits since it was written that carry a block forward when its segment is freed; 0 turns reinsertion off."""
    reclaim_grace_s: float = 5.0
    """How long a freed segment's file stays while other processes read the store."""
    reclaim_policy: str = "reinsertion"
    """Which segment is freed and what of it is copied forward; see ``engine.policies.registry``."""
    write_amplification_max: float = 1.15
    """Bytes written by bytes of new blocks that copying forward may come to; the policy's threshold rises to hold it."""
    admission_policy: str = "budget"
    """Which new blocks are taken in; see ``engine.policies.registry``."""
    write_budget_bytes_per_day: int | None = None
    """What ``admission_policy="budget"`` writes a day once the store has been full; ``None``: the capacity, at least 1 TiB."""
    min_free_disk_bytes: int = 0
    """Room that the file system keeps: the store frees segments, and then refuses blocks, rather than take the last of it."""
    limits: LimitsByNamespace = dataclasses.field(default_factory=dict)
    """Quotas, shares of writes and lifetimes by namespace (``kvlode.Limits``)."""
    index_kind: Literal["rocksdb", "memory"] = "rocksdb"
    index_cache_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("lock_timeout_s", "flush_after_s", "put_timeout_s", "reclaim_grace_s"):
            if getattr(self, name) < 0:
                raise InvalidConfig(f"{name} is negative", expected=">= 0 seconds", actual=getattr(self, name))
        for name in ("encode_threads", "io_threads", "open_files_max"):
            if getattr(self, name) < 1:
                raise InvalidConfig(f"{name} is too small", expected=">= 1", actual=getattr(self, name))
        if not 0 < self.cpu_budget < float("inf"):
            raise InvalidConfig("cpu_budget is no number of cores", expected="> 0, such as 2 or 0.5", actual=self.cpu_budget)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InvalidConfig(f"{name} is unknown", expected=" or ".join(choices), actual=repr(getattr(self, name)))
        if self.buffer_bytes < MIB:
            raise InvalidConfig("the buffer is too small", expected="at least 1 MiB", actual=f"{self.buffer_bytes} bytes")
        self._check_policies()
        if self.segment_bytes is not None and (self.segment_bytes < SEGMENT_BYTES_MIN or self.segment_bytes % PAGE_BYTES):
            raise InvalidConfig(
                "segment_bytes cannot be used",
                expected=f"a multiple of {PAGE_BYTES}, at least {SEGMENT_BYTES_MIN}",
                actual=self.segment_bytes,
            )

    def _check_policies(self) -> None:
        if self.write_budget_bytes_per_day is not None and self.write_budget_bytes_per_day < 1:
            raise InvalidConfig(
                "a write budget cannot be used",
                expected="a positive number of bytes a day, or None (the default)",
                actual=self.write_budget_bytes_per_day,
            )
        if self.write_budget_bytes_per_day is not None and self.admission_policy != "budget":
            raise InvalidConfig(
                "a write budget that nobody holds",
                expected="admission_policy='budget', or no write_budget_bytes_per_day",
                actual=f"admission_policy={self.admission_policy!r}, write_budget_bytes_per_day={self.write_budget_bytes_per_day}",
                action="Leave one of the two out.",
            )
        if self.min_free_disk_bytes < 0:
            raise InvalidConfig("min_free_disk_bytes is negative", expected=">= 0 bytes", actual=self.min_free_disk_bytes)
        if not 1 <= self.write_amplification_max < float("inf"):
            raise InvalidConfig(
                "write_amplification_max cannot be used", expected=">= 1, such as 1.15", actual=self.write_amplification_max
            )
        object.__setattr__(self, "limits", checked_limits(self.limits))
        check_quotas(self.limits, self.capacity_bytes)
        reclaim_policy_of(self)
        admission_policy_of(self)

    @classmethod
    def build(cls, *, capacity: int | str | None = None, buffer: int | str | None = None, **options: object) -> StoreConfig:
        """A configuration from the keyword arguments of ``kvlode.open``."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise InvalidConfig(f"unknown option {unknown[0]!r}", expected=f"one of {', '.join(sorted(known))}, capacity, buffer")
        if capacity is not None:
            options["capacity_bytes"] = parse_bytes(capacity, "capacity")
        if buffer is not None:
            options["buffer_bytes"] = parse_bytes(buffer, "buffer")
        parse_sizes(options, TEXT_SIZES)
        return cls(**options)  # type: ignore[arg-type]

    @property
    def forced_codec(self) -> Codec | None:
        """The codec that was asked for, or ``None`` when sampling decides."""
        return _CODECS[self.codec]


_CHOICES = {
    "gds": ("auto", "require", "off"),
    "on_locked": ("fail", "wait", "follow"),
    "on_incompatible": ("refuse", "set_aside", "fresh"),
    "codec": ("auto", "raw", "zstd", "planes+zstd"),
    "index_kind": ("rocksdb", "memory"),
}
_CODECS = {"auto": None, "raw": Codec.RAW, "zstd": Codec.ZSTD, "planes+zstd": Codec.PLANES_ZSTD}
