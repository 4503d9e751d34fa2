"""The files of a RocksDB index in use, as a process sees them that follows its writer: what has changed, and links to read them by."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

_IDENTITY_NAME = "IDENTITY"
_OWN_NAMES = ("LOCK", "LOG", "rocksdict-config.json")
"""Files of the primary that a follower must have for itself (``LOG`` with any suffix)."""


@dataclass(frozen=True)
class SourceState:
    """What tells whether the writer's index has changed, and how."""

    identity: bytes = b""
    """The unique id of the database."""
    manifests: tuple[tuple[str, int], ...] = ()
    """Names and sizes: a flush or a compaction makes one grow."""
    logs: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, source: str) -> SourceState:
        sizes = {}
        try:
            with open(os.path.join(source, _IDENTITY_NAME), "rb") as file:
                identity = file.read(256)
            with os.scandir(source) as found:
                for item in found:
                    if item.name.startswith("MANIFEST-") or item.name.endswith(".log"):
                        sizes[item.name] = item.stat().st_size
        except FileNotFoundError:  # there is no index, or the writer removed a file between the two calls
            return cls()
        logs = tuple(sorted((name, size) for name, size in sizes.items() if name.endswith(".log")))
        return cls(identity, tuple(sorted(sizes.items() - set(logs))), logs)

    def names(self) -> set[str]:
        return {name for name, _ in self.manifests + self.logs}

    def grown_from(self, earlier: SourceState) -> bool:
        """Whether the same files are there and nothing but logs has grown."""
        return self.identity == earlier.identity != b"" and self.manifests == earlier.manifests and self.names() == earlier.names()

    def keeps(self, earlier: SourceState) -> bool:
        """Whether the files of an earlier moment are still there."""
        return self.identity == earlier.identity and self.names() >= earlier.names()


def link_files(source: str, links: str) -> None:
    """Fill ``links`` with a symbolic link for each file of ``source`` that RocksDB reads."""
    try:
        names = os.listdir(source)
    except FileNotFoundError:
        return  # opening says what is missing
    for name in names:
        if not name.startswith(_OWN_NAMES):
            os.symlink(os.path.join(os.path.abspath(source), name), os.path.join(links, name))


def tables_are_there(links: str) -> bool:
    """Whether the writer still has every table that it had when the links were made; it deletes those that it has merged."""
    return all(os.path.exists(os.path.join(links, name)) for name in os.listdir(links) if name.endswith(".sst"))


def remove_folder(folder: str, owner_pid: int) -> None:
    """Delete a temporary folder, but not the parent's from a forked child."""
    if os.getpid() == owner_pid:
        shutil.rmtree(folder, ignore_errors=True)
