"""How fast a scrub reads and how it waits: a budget of bytes a second on an injected clock, and waits that an interrupt ends."""

from __future__ import annotations

import contextlib
import queue
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from ...format.errors import InvalidConfig
from ...gds.device import Device, DeviceFile, IoBuffer, OpenMode
from ...gds.wrapping import WrappingDevice, WrappingFile
from ..fsck.options import Stop
from ..sizes import parse_size

BURST_S = 1.0
"""What was not read in this time is not read later."""
WAIT_S_MAX = 3600.0
_UNLIMITED = ("0", "none")
_INTERVAL = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(s|min|h|d)", re.ASCII)
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def parse_rate(text: str) -> int | None:
    """Bytes a second of ``100MiB/s`` or ``100MiB``; ``None``, unlimited, for ``0`` and ``none``. Raises ``InvalidConfig``."""
    plain = text.strip().lower().removesuffix("/s").strip()
    if plain in _UNLIMITED:
        return None
    rate_bytes_s = parse_size(plain)
    if rate_bytes_s is None:
        raise InvalidConfig("a rate that cannot be understood", expected="a rate as 100MiB/s, or none", actual=repr(text))
    return rate_bytes_s


def parse_interval(text: str) -> float:
    """Seconds of ``7d``, ``12h``, ``30min`` or ``90s``. Raises ``InvalidConfig``."""
    match = _INTERVAL.fullmatch(text.strip().lower())
    seconds = float(match.group(1)) * _SECONDS[match.group(2)] if match else 0.0
    if seconds < 1:
        raise InvalidConfig("an interval that cannot be understood", expected="a time as 7d, 12h, 30min or 90s", actual=repr(text))
    return seconds


class WaitingStop(Stop):
    """A ``Stop`` that can be waited on. A signal handler may interrupt it: unlike an event's, the queue's put may come in its own get."""

    def __init__(self) -> None:
        super().__init__()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()

    def interrupt(self) -> None:
        """Ask for the end, also of a wait."""
        super().interrupt()
        self._bell.put(None)

    def pause(self, seconds: float) -> bool:
        """Wait; False when the end was asked for, at once then."""
        if not self.interrupted:
            with contextlib.suppress(queue.Empty):
                self._bell.get(timeout=min(seconds, WAIT_S_MAX))
                self._bell.put(None)  # for the next one who waits
        return not self.interrupted


class Pace:
    """At most ``rate_bytes_s`` bytes in a second, over any longer time; ``None`` is unlimited. Thread-safe.

    A token bucket that may be overdrawn: whoever overdraws it waits until the debt up to its own bytes is paid.
    """

    def __init__(self, rate_bytes_s: float | None, clock_s: Callable[[], float], pause: Callable[[float], bool]) -> None:
        self._rate_bytes_s = rate_bytes_s
        self._clock_s = clock_s
        self._pause = pause
        self._budget_bytes = 0.0
        self._filled_s = clock_s()
        self._lock = threading.Lock()

    def take(self, size_bytes: int) -> None:
        """To be called before bytes are read. Returns at once when the end was asked for: the reader sees that at its next safe place."""
        if self._rate_bytes_s is None:
            return
        with self._lock:
            self._fill(self._rate_bytes_s)
            self._budget_bytes -= size_bytes
            paid_s = self._filled_s - self._budget_bytes / self._rate_bytes_s
        while (wait_s := paid_s - self._clock_s()) > 0 and self._pause(wait_s):
            continue

    def _fill(self, rate_bytes_s: float) -> None:
        """Caller holds the lock."""
        now_s = self._clock_s()
        self._budget_bytes = min(self._budget_bytes + (now_s - self._filled_s) * rate_bytes_s, rate_bytes_s * BURST_S)
        self._filled_s = now_s


class PacedDevice(WrappingDevice):
    """A device whose reads keep to a pace."""

    def __init__(self, inner: Device, pace: Pace) -> None:
        super().__init__(inner)
        self._pace = pace

    def _wrap(self, file: DeviceFile, path: str, mode: OpenMode) -> DeviceFile:
        return _PacedFile(file, self._pace)


class _PacedFile(WrappingFile):
    def __init__(self, inner: DeviceFile, pace: Pace) -> None:
        super().__init__(inner)
        self._pace = pace
        if hasattr(inner, "fileno"):  # files without one have none here either
            self.fileno: Callable[[], int] = inner.fileno

    def read(self, offset: int, buffers: Sequence[IoBuffer]) -> Future[int]:
        self._pace.take(sum(memoryview(buffer).nbytes for buffer in buffers))
        return super().read(offset, buffers)
