"""The statistics that a running store publishes in its folder, so that other processes can look into it.

The writer keeps ``stats/writer.json``, each follower ``stats/follower-<pid>.json``: one JSON object, replaced as a whole every
second (temporary file and rename, no sync) and removed at a clean close. It is derived data: anybody may delete it at any time,
and what cannot be written is counted and left alone.

A reader is told how old each file is and whether its process is still there. A process is known by its id and the time it
was started, for ids are given again (``/proc/<pid>/stat``, field 22: proc(5)). Processes of another machine or of another
container cannot be asked for: then only the age tells.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..format.layout import PAGE_BYTES, STATS_FOLDER
from .stats import Counters

logger = logging.getLogger("kvlode")

STATS_VERSION = 1
PUBLISH_INTERVAL_S = 1.0
FRESH_S = 5.0
"""Statistics older than this are not what a living process says: it hangs, or its file system does."""
WRITER_FILE = "writer.json"
FOLLOWER_PREFIX, FILE_SUFFIX, UNFINISHED_SUFFIX = "follower-", ".json", ".new"
STATS_BYTES_MAX = 1 << 20
"""What the whole folder may take; a small store gives it less (``folder_bytes_max``)."""
FILES_MAX = 16
"""Files of the folder, unfinished ones included: a follower that would be one more does not publish."""


@dataclass(frozen=True, slots=True)
class PublishedStats:
    """What one process said of a store."""

    path: Path
    """The file it was read from."""
    role: Literal["writer", "follower"]
    pid: int
    age_s: float
    """Since it was written, by the clock of this machine; never negative."""
    alive: bool | None
    """Whether that very process is there; ``None`` where it cannot be asked for (another machine, another container)."""
    stats: Mapping[str, Any]
    """``Store.stats()`` of that process: plain values."""

    @property
    def running(self) -> bool:
        """Whether somebody is behind these figures: the process is there, or (where that cannot be told) has just written them."""
        return self.age_s <= FRESH_S if self.alive is None else self.alive


def read_stats(path: str | os.PathLike[str]) -> list[PublishedStats]:
    """What the processes that have the store in folder ``path`` open say of it: the writer first, then followers by process id.

    Empty when nobody publishes anything (no process, one with statistics switched off by a read-only file system, or no store
    at all: ask ``tools.store_files`` for that). Files of processes that are gone are included, with ``alive`` False; a file
    that is damaged or no statistics is left out. Reads only. Raises ``OSError`` when the folder cannot be read.
    """
    folder = Path(path) / STATS_FOLDER
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [stats for name in names if role_of(name) is not None and (stats := _read_one(folder / name)) is not None]
    return sorted(found, key=lambda stats: (stats.role != "writer", stats.pid))


def role_of(name: str) -> Literal["writer", "follower"] | None:
    """Whose file a name of the folder is; ``None`` for anything else (unfinished files included)."""
    if name == WRITER_FILE:
        return "writer"
    return "follower" if name.startswith(FOLLOWER_PREFIX) and name.endswith(FILE_SUFFIX) else None


def _read_one(path: Path) -> PublishedStats | None:
    role = role_of(path.name)
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(STATS_BYTES_MAX))
        origin, stats = document["process"], document["stats"]
        pid, written_at_s = int(origin["pid"]), float(document["written_at_s"])
        if document["version"] != STATS_VERSION or not isinstance(stats, dict) or role is None:
            return None
        alive = is_alive(origin)
    except FileNotFoundError:  # its process was closing
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.info("%s holds no statistics: %s", path, error)
        return None
    return PublishedStats(path, role, pid, max(0.0, time.time() - written_at_s), alive, stats)


# --- which process ------------------------------------------------------------------------------------------------------


def own_process() -> dict[str, Any]:
    """What tells this process from all others, those of other machines included, as far as the system says."""
    pid = os.getpid()
    return {"pid": pid, "started_ticks": _started_ticks(pid), "boot": _line("/proc/sys/kernel/random/boot_id"), "space": _process_space()}


def is_alive(origin: Mapping[str, Any]) -> bool | None:
    """Whether the process that ``own_process`` described is there; ``None`` when this one cannot know."""
    if origin["boot"] is None or origin["space"] is None or origin["space"] != _process_space():
        return None
    if origin["boot"] != _line("/proc/sys/kernel/random/boot_id"):
        return None
    return origin["started_ticks"] is not None and _started_ticks(int(origin["pid"])) == origin["started_ticks"]


def _started_ticks(pid: int) -> int | None:
    """Clock ticks between the boot and the start of a process; ``None`` when there is no such process, or only what is left of it."""
    line = _line(f"/proc/{pid}/stat")
    if line is None:
        return None
    fields = line.rpartition(")")[2].split()  # the name of the program, in parentheses, may hold anything
    return None if fields[0] in "ZX" else int(fields[19])


def _line(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline().strip()
    except OSError:
        return None


def _process_space() -> str | None:
    """The name of the set of process ids that this process sees (a container has its own)."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


_followers = itertools.count(1)


def _follower_file() -> str:
    """``follower-<pid>.json``; a process that follows more than once numbers the others."""
    number = next(_followers)
    return f"{FOLLOWER_PREFIX}{os.getpid()}{f'-{number}' if number > 1 else ''}{FILE_SUFFIX}"


# --- publishing -----------------------------------------------------------------------------------------------------------


def folder_bytes_max(capacity_bytes: int) -> int:
    """What the folder of a store may take of its capacity, in whole pages; small stores give it a 64th."""
    return min(STATS_BYTES_MAX, capacity_bytes // 64) // PAGE_BYTES * PAGE_BYTES


def file_bytes_max(capacity_bytes: int) -> int:
    """What one of its files may take, in whole pages; below one page nothing is published."""
    return folder_bytes_max(capacity_bytes) // FILES_MAX // PAGE_BYTES * PAGE_BYTES


class StatsFile:
    """Publishes the statistics of one open store. ``publish`` and ``remove`` are called by one thread at a time."""

    def __init__(
        self, store_path: str, stats: Callable[[], dict[str, Any]], counters: Counters, *, follower: bool, capacity_bytes: int
    ) -> None:
        self._folder = os.path.join(store_path, STATS_FOLDER)
        self._stats = stats
        self._counters = counters
        self._follower = follower
        self._bytes_max = file_bytes_max(capacity_bytes)
        self._process = own_process()
        self.path = os.path.join(self._folder, _follower_file() if follower else WRITER_FILE)
        self._began = False

    def publish(self) -> None:
        """Write the statistics of now. Never raises: what stands in the way is counted (``stats_file_errors``)."""
        if self._bytes_max < PAGE_BYTES:
            return
        try:
            if not self._began:
                self._began = self._begin()
            if self._began:
                self._replace(self._document())
        except Exception as error:  # a store must not suffer from who looks at it
            self._counters.add("stats_file_errors")
            logger.info("statistics were not published: %s", error)

    def remove(self) -> None:
        """At a clean close: nobody shall take these figures for those of a running store. Never raises."""
        for path in (self.path, self.path + UNFINISHED_SUFFIX):
            try:
                os.unlink(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._counters.add("stats_file_errors")
                logger.info("statistics were not removed: %s", error)

    def _begin(self) -> bool:
        """Make the folder and take away what processes that are gone left there. False for a follower that finds it full."""
        os.makedirs(self._folder, exist_ok=True)
        for published in read_stats(os.path.dirname(self._folder)):
            if published.alive is False:
                self._forget(published.path)
        files = set(os.listdir(self._folder))
        for name in files:
            whole = name.removesuffix(UNFINISHED_SUFFIX)
            if whole != name and whole not in files:
                self._forget(Path(self._folder, name))
        return not self._follower or len(os.listdir(self._folder)) + 2 <= FILES_MAX - 2

    @staticmethod
    def _forget(path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()

    def _document(self) -> bytes:
        """The object as text, within its size: old decisions go first, then all of them, then what namespaces are counted by."""
        stats = self._stats()
        document = {"version": STATS_VERSION, "written_at_s": time.time(), "process": self._process, "stats": stats}
        text = json.dumps(document, separators=(",", ":")).encode()
        decisions = list(stats.get("decisions", ()))
        while len(text) > self._bytes_max and decisions:
            decisions = decisions[len(decisions) // 2 + 1 :]
            stats["decisions"] = decisions
            text = json.dumps(document, separators=(",", ":")).encode()
        for name in ("namespaces", "latency"):
            if len(text) > self._bytes_max and stats.get(name):
                stats[name], stats["cut_short"] = {}, True
                text = json.dumps(document, separators=(",", ":")).encode()
        if len(text) > self._bytes_max:
            raise ValueError(f"{len(text)} bytes of statistics, {self._bytes_max} allowed in a store of this capacity")
        return text

    def _replace(self, text: bytes) -> None:
        temporary = self.path + UNFINISHED_SUFFIX
        with open(temporary, "wb") as file:
            file.write(text)
        os.rename(temporary, self.path)
