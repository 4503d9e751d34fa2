"""Running ``kvlode top``: looks again and again, reads keys, draws."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from ...format.errors import KvlodeError
from ..exit_codes import EXIT_FINE
from ..output import make_console, print_json
from .draw import draw
from .model import TopView, view_of
from .sample import FileFacts, Sample, read_files, take_sample

CELLS = 240
SEGMENTS_MAX = 64
FILES_SHARE_MAX = 0.05
"""Share of the time that may be spent reading the store's files."""
FILES_INTERVAL_S = 5.0
_KEYS = {"\x1b[A": "up", "k": "up", "\x1b[B": "down", "j": "down", "\r": "enter", "\n": "enter", "\x1b[C": "enter"}
_KEYS |= {"\x1b": "back", "b": "back", "\x7f": "back", "\x1b[D": "back", "q": "quit", "Q": "quit", "\x03": "quit"}


class FilesWatch:
    """Reads the store's files in the background, seldom enough that it costs little. ``latest`` may be asked for by any thread."""

    def __init__(self, read: Callable[[], FileFacts]) -> None:
        self._read = read
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvlode-top-files", daemon=True)
        self.latest: FileFacts | None = None
        self.error: Exception | None = None

    def __enter__(self) -> FilesWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _run(self) -> None:
        pause_s = 0.0
        while not self._stop.wait(pause_s):
            try:
                self.latest, self.error = self._read(), None
                pause_s = max(FILES_INTERVAL_S, self.latest.read_s / FILES_SHARE_MAX)
            except (KvlodeError, OSError) as error:
                self.error, pause_s = error, FILES_INTERVAL_S


def run_top(path: Path, *, once: bool, as_json: bool, interval_s: float) -> int:
    """Show the store until somebody quits; with ``once`` or ``as_json`` one frame, of two looks ``interval_s`` apart while a process
    publishes. Raises ``KvlodeError`` or ``OSError`` when this is no store."""
    files = read_files(path, cells=CELLS, segments_max=SEGMENTS_MAX)
    if as_json or once or not sys.stdout.isatty():
        view = _one_view(path, files, interval_s)
        if as_json:
            print_json(view.facts())
        else:
            console = make_console()
            console.print(draw(view, width=console.width, height=60, selected=-1))
        return EXIT_FINE
    with FilesWatch(lambda: read_files(path, cells=CELLS, segments_max=SEGMENTS_MAX)) as watch:
        watch.latest = files
        _show(path, watch, interval_s)
    return EXIT_FINE


def _one_view(path: Path, files: FileFacts, interval_s: float) -> TopView:
    before = take_sample(path, files, time.monotonic())
    if not before.stats:
        return view_of(None, before, now_ns=time.time_ns())
    threading.Event().wait(interval_s)  # rates need two looks; there is nothing to wait for but the time itself
    return view_of(before, take_sample(path, files, time.monotonic()), now_ns=time.time_ns())


class Screen:
    """What is selected, and what keys do to it. No terminal in here."""

    def __init__(self) -> None:
        self.selected = 0
        self.inside: str | None = None

    def press(self, key: str, digests: list[str]) -> bool:
        """``key``: ``up``, ``down``, ``enter``, ``back`` or ``quit``; ``digests``: the namespaces as they are shown. False: end."""
        if key == "quit":
            return False
        if key == "back":
            self.inside = None
        elif key == "enter" and self.inside is None and digests:
            self.inside = digests[min(self.selected, len(digests) - 1)]
        elif key in ("up", "down") and self.inside is None:
            self.selected = min(max(0, self.selected + (1 if key == "down" else -1)), max(0, len(digests) - 1))
        return True


class Looks:
    """Samples, and which two of them to compare: figures are published once a second, so a pair is a fresh look and one that is older."""

    def __init__(self) -> None:
        self._samples: list[Sample] = []

    def add(self, sample: Sample) -> tuple[Sample | None, Sample]:
        """The pair to show now. A sample whose figures were published before takes the place of the one that showed them first."""
        if self._samples and _said_at(self._samples[-1]) == _said_at(sample):
            sample = Sample(**_fields(sample) | {"taken_s": self._samples[-1].taken_s})
            self._samples[-1] = sample
        else:
            self._samples = [*self._samples[-1:], sample]
        return (self._samples[0] if len(self._samples) > 1 else None), sample


def _said_at(sample: Sample) -> Any:
    return None if sample.published is None else (sample.published.pid, sample.published.stats.get("open_s"))


def _fields(sample: Sample) -> dict[str, Any]:
    return {name: getattr(sample, name) for name in sample.__slots__}


def _show(path: Path, watch: FilesWatch, interval_s: float) -> None:
    console, screen, looks = Console(highlight=False, markup=False, emoji=False), Screen(), Looks()
    with _keys() as next_key, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            before, now = looks.add(take_sample(path, watch.latest, time.monotonic()))
            view = view_of(before, now, now_ns=time.time_ns())
            until_s = time.monotonic() + (interval_s if before is not None else min(interval_s, 1.0))
            while True:
                frame = draw(view, width=console.width, height=console.height, selected=screen.selected, inside=screen.inside)
                live.update(frame, refresh=True)
                key = next_key(until_s - time.monotonic())
                if key is None:
                    break
                if not screen.press(key, [space.digest for space in view.namespaces]):
                    return


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str | None]]:
    """Single keys from the terminal. The function waits so many seconds for one, and gives ``None`` when none came."""
    if not sys.stdin.isatty():
        stop = threading.Event()

        def without_keys(seconds: float) -> str | None:
            stop.wait(max(0.0, seconds))
            return None

        yield without_keys
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def next_key(seconds: float) -> str | None:
        deadline_s = time.monotonic() + seconds
        while (left_s := deadline_s - time.monotonic()) > 0:
            ready, _, _ = select.select([descriptor], [], [], left_s)
            if not ready:
                return None
            text = os.read(descriptor, 16).decode(errors="replace")
            if not text:
                return "quit"  # the terminal is gone
            if (key := _KEYS.get(text)) is not None:
                return key
        return None

    try:
        tty.setcbreak(descriptor)
        yield next_key
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
