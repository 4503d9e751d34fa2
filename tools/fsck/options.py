"""What a check is asked to do: how deep, of which share, for how long; and how it is told to stop."""

from __future__ import annotations

import enum
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ...format.errors import InvalidConfig
from ..sizes import parse_size

OUT_OF_TIME = "the time was up"
"""Why a pass did not end: ``--max-duration`` was over."""
_SHARE = re.compile(r"(\d{1,20})/(\d{1,20})", re.ASCII)
_PERCENT = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*%", re.ASCII)


class Level(enum.StrEnum):
    """How much is read. Each level includes the one before it."""

    QUICK = "quick"
    """Superblock, segment headers, seals, the walk of unsealed segments, and what the index says of itself."""
    WALK = "walk"
    """Every record header, and the index in both directions."""
    SAMPLE = "sample"
    """The payloads of a share of the segments as well."""
    FULL = "full"
    """Every byte: payload checksums, decoding, raw checksums, padding."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Which segments have their payloads read; exactly one of the three is set."""

    percent: float | None = None
    share: tuple[int, int] | None = None
    """``(n, t)``: segments whose id modulo t is n - 1, so that t runs cover everything."""
    size_bytes: int | None = None
    """Segments drawn until this many bytes are chosen."""

    @classmethod
    def parse(cls, text: str) -> Sample:
        """``5%``, ``2/10`` or ``20GiB``. Raises ``InvalidConfig``."""
        text = text.strip()
        if match := _PERCENT.fullmatch(text):
            percent = float(match.group(1))
            if 0 < percent <= 100:
                return cls(percent=percent)
        if match := _SHARE.fullmatch(text):
            number, total = int(match.group(1)), int(match.group(2))
            if 1 <= number <= total:
                return cls(share=(number, total))
        if size_bytes := parse_size(text):
            return cls(size_bytes=size_bytes)
        raise InvalidConfig(
            "a sample that cannot be understood", expected="a share as 5%, n/t (1/10 to 10/10), or a size as 20GiB", actual=repr(text)
        )

    def choose(self, segments: Sequence[tuple[int, int]], seed: int) -> set[int]:
        """The ids chosen of ``(id, size in bytes)``; the same for the same seed. At least one when there is any."""
        if self.share is not None:
            number, total = self.share
            return {segment_id for segment_id, _ in segments if segment_id % total == number - 1}
        order = sorted(segments)
        random.Random(seed).shuffle(order)
        wanted_bytes = self.size_bytes if self.size_bytes is not None else sum(s for _, s in order) * (self.percent or 0.0) / 100
        chosen: set[int] = set()
        taken_bytes = 0
        for segment_id, size_bytes in order:
            if chosen and taken_bytes >= wanted_bytes:
                break
            chosen.add(segment_id)
            taken_bytes += size_bytes
        return chosen


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """Of one run."""

    level: Level = Level.WALK
    sample: Sample | None = None
    """For ``Level.SAMPLE``."""
    live: bool = False
    """Beside a running writer: no lock, sealed segments only."""
    locked: bool = False
    """The caller holds the writer's lock; the check takes none."""
    max_duration_s: float | None = None
    seed: int = 0
    """Draws the sample."""
    now_ns: int | None = None
    """The time that expiry is judged by, UTC nanoseconds; the system's clock by default."""


class Stop:
    """A request to end early, seen at safe boundaries: between reads, never inside one. Any thread (or a signal handler) may ask."""

    def __init__(self) -> None:
        self.interrupted = False
        self._deadline_s: float | None = None

    def interrupt(self) -> None:
        """Ask for the end. One plain assignment, so that a signal handler may call it at any moment."""
        self.interrupted = True

    def limit(self, duration_s: float | None) -> None:
        """Ask for the end this many seconds from now."""
        self._deadline_s = None if duration_s is None else time.monotonic() + duration_s

    def check(self) -> None:
        """Raises ``Stopped`` when the run is to end here."""
        if self.interrupted:
            raise Stopped("interrupted")
        if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
            raise Stopped(OUT_OF_TIME)


class Stopped(Exception):
    """Unwinds a pass to its caller; the argument says why."""


class Progress(Protocol):
    """Where a check reports how far it is. Called from the checking thread alone."""

    def begin(self, name: str, total: int, unit: str = "bytes") -> None:
        """A pass starts; ``total`` is how much of ``unit`` (a plural) it will go through, 0 when that is not known."""
        ...

    def advance(self, count: int, place: str = "") -> None:
        """So much more was gone through; ``place`` is the file."""
        ...

    def end(self) -> None:
        """The pass is over."""
        ...


class Silence:
    """``Progress`` for nobody."""

    def begin(self, name: str, total: int, unit: str = "bytes") -> None:
        """See ``Progress``."""

    def advance(self, count: int, place: str = "") -> None:
        """See ``Progress``."""

    def end(self) -> None:
        """See ``Progress``."""
