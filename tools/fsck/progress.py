"""How far a check is: bars on a terminal, JSON lines for programs, nothing otherwise. All at most a few times a second."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

SCHEMA = 1


class TimedProgress:
    """Counts every advance and passes few of them on. Subclasses define ``_show``."""

    def __init__(self, interval_s: float, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = interval_s
        self._clock_s = clock_s
        self._name: str | None = None
        self._total_bytes = 0
        self._done_bytes = 0
        self._started_s = self._shown_s = 0.0

    def begin(self, name: str, total_bytes: int) -> None:
        """See ``options.Progress``."""
        self.end()
        self._name, self._total_bytes, self._done_bytes = name, total_bytes, 0
        self._started_s = self._shown_s = self._clock_s()
        self._show("")

    def advance(self, size_bytes: int, place: str = "") -> None:
        """See ``options.Progress``."""
        self._done_bytes += size_bytes
        now_s = self._clock_s()
        if self._name is not None and now_s - self._shown_s >= self._interval_s:
            self._shown_s = now_s
            self._show(place)

    def end(self) -> None:
        """See ``options.Progress``."""
        if self._name is not None:
            self._show("")
            self._name = None

    def _rate_bytes_s(self) -> float:
        passed_s = self._clock_s() - self._started_s
        return self._done_bytes / passed_s if passed_s > 0 else 0.0

    def _show(self, place: str) -> None:
        raise NotImplementedError


class JsonProgress(TimedProgress):
    """One JSON object a line, at most one a second and two a pass besides."""

    def __init__(self, write: Callable[[str], None], interval_s: float = 1.0, clock_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__(interval_s, clock_s)
        self._write = write

    def _show(self, place: str) -> None:
        rate_bytes_s = self._rate_bytes_s()
        left_bytes = max(0, self._total_bytes - self._done_bytes)
        line = {
            "type": "progress",
            "schema": SCHEMA,
            "pass": self._name,
            "place": place,
            "bytes": self._done_bytes,
            "total_bytes": self._total_bytes or None,
            "rate_bytes_s": round(rate_bytes_s),
            "left_s": round(left_bytes / rate_bytes_s, 1) if self._total_bytes and rate_bytes_s else None,
        }
        self._write(json.dumps(line))


class BarProgress(TimedProgress):
    """A bar with bytes, rate and time left for the pass that runs; gone when the check is over. ``close`` it."""

    def __init__(self, stream: TextIO, interval_s: float = 0.2) -> None:
        super().__init__(interval_s)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
        self._bars = Bars(*columns, TimeRemainingColumn(), TextColumn("{task.fields[place]}"), console=Console(file=stream), transient=True)
        self._task: TaskID | None = None
        self._bars.start()

    def begin(self, name: str, total_bytes: int) -> None:
        """See ``options.Progress``."""
        self.end()
        self._task = self._bars.add_task(name, total=total_bytes or None, place="")
        super().begin(name, total_bytes)

    def end(self) -> None:
        """See ``options.Progress``."""
        super().end()
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None

    def _show(self, place: str) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=self._done_bytes, place=place)

    def close(self) -> None:
        """Give the terminal back."""
        self.end()
        self._bars.stop()
