"""One look at a store from outside: what its process publishes, and what its files tell. Reads only, takes no lock."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.stats_file import PublishedStats, read_stats
from ..inspect.namespaces import namespaces_facts
from ..inspect.store import StoreView
from ..inspect.survey import Survey
from ..lock_state import has_writer
from ..store_files import StoreFiles

NAMESPACES_MAX = 200


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What the files say: ``store`` as of ``inspect store --json``, ``namespaces`` as of ``inspect namespaces --json``."""

    view: StoreView
    store: dict[str, Any]
    namespaces: list[dict[str, Any]]
    seen_ns: int
    """UTC."""
    read_s: float
    """How long reading took."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One look. ``taken_s`` is of a clock that never runs backwards; two samples give rates."""

    path: Path
    taken_s: float
    published: PublishedStats | None
    """Of the writer; of a follower when no writer publishes; ``None`` when nobody does."""
    others: int
    """Other processes that publish."""
    locked: bool | None
    """Whether a process has the store open for writing; ``None`` when that cannot be told."""
    free_bytes: int | None
    """Room that the file system has left; ``None`` when it does not say."""
    files: FileFacts | None
    """``None`` while they are being read for the first time."""

    @property
    def stats(self) -> dict[str, Any]:
        """``Store.stats()`` of the process that is looked at; empty when there is none."""
        return {} if self.published is None or not self.published.running else dict(self.published.stats)


def read_files(path: Path, *, cells: int, segments_max: int, now_ns: int | None = None) -> FileFacts:
    """Read superblock, seals and unsealed segments. Some 10 us a block. Raises ``KvlodeError`` or ``OSError`` when this is no store."""
    began_s = time.monotonic()
    with StoreFiles(path) as files:
        return file_facts(Survey(files, now_ns), cells=cells, segments_max=segments_max, began_s=began_s)


def file_facts(survey: Survey, *, cells: int, segments_max: int, began_s: float) -> FileFacts:
    """The facts of a survey whose files are open."""
    view = StoreView(survey, segments_max, cells)
    spaces = namespaces_facts(survey, NAMESPACES_MAX)
    store = view.facts()
    store["problems"] += [problem for problem in spaces["problems"] if problem not in store["problems"]]
    rows = [row | {"codecs": dict(row["codecs"])} for row in spaces["rows"]]
    return FileFacts(view, store, rows, survey.now_ns, time.monotonic() - began_s)


def take_sample(path: Path, files: FileFacts | None, taken_s: float) -> Sample:
    """What is published now, beside file facts that were read before. Raises ``OSError``."""
    running = [found for found in read_stats(path) if found.running]
    published = running or [found for found in read_stats(path) if found.role == "writer"]
    return Sample(
        path=path,
        taken_s=taken_s,
        published=published[0] if published else None,
        others=max(0, len(running) - 1),
        locked=has_writer(path),
        free_bytes=_free_bytes(path),
        files=files,
    )


def _free_bytes(path: Path) -> int | None:
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize
