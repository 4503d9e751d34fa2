"""Which new blocks are written at all: all of them, those that were asked for before, or as many as a write budget allows."""

from __future__ import annotations

import threading

from ...format.errors import InvalidConfig

SIGHTINGS_MAX = 1 << 20
"""Blocks that are remembered without being stored: 100 to 200 bytes of memory each, taken as they come."""
DAY_S = 86_400.0
BURST_DAYS = 1 / 24
"""A write budget that was not used is kept for an hour."""


class AlwaysAdmit:
    """Every new block is written."""

    name = "always"

    def admit(self, key_hash: int, size_bytes: int, now_s: float, *, filled: bool) -> bool:
        return True


class GhostSet:
    """The hashes of blocks that were seen lately, in two generations: when the young one is full the old one is forgotten.

    It remembers at least the last ``hashes_max / 2`` different blocks, and at most ``hashes_max``. Two blocks with one 64-bit hash
    are taken for one. Not thread-safe.
    """

    def __init__(self, hashes_max: int = SIGHTINGS_MAX) -> None:
        if hashes_max < 2:
            raise InvalidConfig("a ghost set without room", expected="hashes_max >= 2", actual=hashes_max)
        self._generation_max = hashes_max // 2
        self._young: set[int] = set()
        self._old: set[int] = set()

    def __len__(self) -> int:
        return len(self._young | self._old)

    def seen(self, key_hash: int) -> bool:
        """Whether it was seen before. It is now, and moves to the young generation."""
        if key_hash in self._young:
            return True
        known = key_hash in self._old
        self._young.add(key_hash)
        if len(self._young) >= self._generation_max:
            self._young, self._old = set(), self._young
        return known

    def forget(self, key_hash: int) -> None:
        self._young.discard(key_hash)
        self._old.discard(key_hash)


class SecondSighting:
    """A block is written when it is offered for the second time. Thread-safe.

    Most blocks of chat are never asked for again, so this saves two thirds of the writes and more; but a block that comes back misses once
    more than it had to. Until the store was full once everything is admitted: room that nobody else wants costs nothing.
    """

    name = "second-sighting"

    def __init__(self, sightings_max: int = SIGHTINGS_MAX) -> None:
        self._lock = threading.Lock()
        self._ghosts = GhostSet(sightings_max)

    def admit(self, key_hash: int, size_bytes: int, now_s: float, *, filled: bool) -> bool:
        if not filled:
            return True
        with self._lock:
            known = self._ghosts.seen(key_hash)
            if known:
                self._ghosts.forget(key_hash)
            return known


class WriteBudget:
    """Everything is written while a budget of bytes a day lasts; beyond it, blocks that are offered for the second time. Thread-safe.

    A token bucket: the budget flows in evenly and an hour's worth of it is kept. It starts full, and counts once the store was full: the
    first filling has to be written in any case. Blocks that are admitted for their second sighting overdraw it by an hour's worth at most;
    then nothing is written until there is budget again. Everything is remembered as seen, so that the second sighting is known as such
    whenever the budget ends. Bytes copied forward are not charged: the reclaim policy bounds those by itself.
    """

    name = "budget"

    def __init__(self, bytes_per_day: int, sightings_max: int = SIGHTINGS_MAX) -> None:
        if not bytes_per_day > 0:
            raise InvalidConfig("a write budget of nothing", expected="bytes_per_day > 0", actual=bytes_per_day)
        self._lock = threading.Lock()
        self._ghosts = GhostSet(sightings_max)
        self._bytes_per_s = bytes_per_day / DAY_S
        self._burst_bytes = bytes_per_day * BURST_DAYS
        self._saved_bytes = self._burst_bytes
        self._filled_to_s: float | None = None

    def admit(self, key_hash: int, size_bytes: int, now_s: float, *, filled: bool) -> bool:
        with self._lock:
            known = self._ghosts.seen(key_hash)
            if not filled:
                return True
            if self._filled_to_s is not None:
                flowed = max(0.0, now_s - self._filled_to_s) * self._bytes_per_s
                self._saved_bytes = min(self._burst_bytes, self._saved_bytes + flowed)
            self._filled_to_s = now_s if self._filled_to_s is None else max(now_s, self._filled_to_s)
            if self._saved_bytes < size_bytes and not (known and self._saved_bytes > -self._burst_bytes):
                return False
            self._saved_bytes -= size_bytes
            return True
