"""How far a check is: bars on a terminal, JSON lines for programs, nothing otherwise. All at most a few times a second."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from ..output import bytes_text

SCHEMA = 1


class TimedProgress:
    """Counts every advance and passes few of them on. Subclasses define ``_show``."""

    def __init__(self, interval_s: float, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = interval_s
        self._clock_s = clock_s
        self._name: str | None = None
        self._unit = "bytes"
        self._total = 0
        self._done = 0
        self._started_s = self._shown_s = 0.0

    def begin(self, name: str, total: int, unit: str = "bytes") -> None:
        """See ``options.Progress``."""
        self.end()
        self._name, self._total, self._unit, self._done = name, total, unit, 0
        self._started_s = self._shown_s = self._clock_s()
        self._show("")

    def advance(self, count: int, place: str = "") -> None:
        """See ``options.Progress``."""
        self._done += count
        now_s = self._clock_s()
        if self._name is not None and now_s - self._shown_s >= self._interval_s:
            self._shown_s = now_s
            self._show(place)

    def end(self) -> None:
        """See ``options.Progress``."""
        if self._name is not None:
            self._show("")
            self._name = None

    def _rate_s(self) -> float:
        """How much is gone through in a second."""
        passed_s = self._clock_s() - self._started_s
        return self._done / passed_s if passed_s > 0 else 0.0

    def _show(self, place: str) -> None:
        raise NotImplementedError


class JsonProgress(TimedProgress):
    """One JSON object a line, at most one a second and two a pass besides."""

    def __init__(self, write: Callable[[str], None], interval_s: float = 1.0, clock_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__(interval_s, clock_s)
        self._write = write

    def _show(self, place: str) -> None:
        rate_s = self._rate_s()
        left = max(0, self._total - self._done)
        line = {
            "type": "progress",
            "schema": SCHEMA,
            "pass": self._name,
            "place": place,
            "unit": self._unit,
            "done": self._done,
            "total": self._total or None,
            "rate_s": round(rate_s),
            "left_s": round(left / rate_s, 1) if self._total and rate_s else None,
        }
        self._write(json.dumps(line))


class BarProgress(TimedProgress):
    """A bar with amount, rate and time left for the pass that runs; gone when the check is over. ``close`` it."""

    def __init__(self, stream: TextIO, interval_s: float = 0.2) -> None:
        super().__init__(interval_s)
        texts = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}")
        self._bars = Bars(*texts, TimeRemainingColumn(), TextColumn("{task.fields[place]}"), console=Console(file=stream), transient=True)
        self._task: TaskID | None = None
        self._bars.start()

    def begin(self, name: str, total: int, unit: str = "bytes") -> None:
        """See ``options.Progress``."""
        self.end()
        self._task = self._bars.add_task(name, total=total or None, amount="", place="")
        super().begin(name, total, unit)

    def end(self) -> None:
        """See ``options.Progress``."""
        super().end()
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None

    def _show(self, place: str) -> None:
        if self._task is not None:
            amount = amount_text(self._done, self._total, self._unit, self._rate_s())
            self._bars.update(self._task, completed=self._done, amount=amount, place=place)

    def close(self) -> None:
        """Give the terminal back."""
        self.end()
        self._bars.stop()


def amount_text(done: int, total: int, unit: str, rate_s: float) -> str:
    """``1.0 GiB of 2.0 GiB, 500.0 MiB/s``, ``3 of 20 segments, 1/s``; without a total only what is done."""
    if unit == "bytes":
        amounts = [bytes_text(count) for count in ([done, total] if total else [done])]
        return f"{' of '.join(amounts)}, {bytes_text(rate_s)}/s"
    amounts = [f"{count:,}" for count in ([done, total] if total else [done])]
    return f"{' of '.join(amounts)} {unit}, {rate_s:,.0f}/s"
