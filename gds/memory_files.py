"""What a drive holds and what of it would survive a power cut: file contents and folder entries, now and durable.

The model is as strict as POSIX lets a file system be, with the atomicity of a journal: a page that was not synced
may be old, new, a mix of both in sectors, or any version in between; a size that was not synced may be any size since
the last sync; entries of a folder that was not synced may be missing, in the order in which they were made.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Keep: TypeAlias = Literal["none", "all", "random"]
"""What of the unsynced changes survives a crash."""

PAGE_BYTES = 4096
SECTOR_BYTES = 512
"""The unit that a drive writes whole: a page in flight at the power cut may be torn between sectors."""
TORN_PAGE_RATE = 0.25

_ZERO_PAGE = bytes(PAGE_BYTES)


@dataclass(slots=True)
class FileContent:
    """Content of one file. Pages are immutable ``bytes``; an absent page is a hole and reads as zeros. Not thread-safe."""

    size_bytes: int = 0
    pages: dict[int, bytes] = field(default_factory=dict)
    allocated: set[int] = field(default_factory=set)
    """Pages that take space: written or reserved."""
    durable_size_bytes: int = 0
    durable_pages: dict[int, bytes] = field(default_factory=dict)
    durable_allocated: set[int] = field(default_factory=set)
    versions: dict[int, list[bytes | None]] = field(default_factory=dict)
    """Versions of each page since the last sync, oldest first; ``None`` is a hole."""
    sizes: list[int] = field(default_factory=list)
    """Sizes since the last sync."""

    def read_into(self, offset: int, target: memoryview[int]) -> int:
        """Copy from ``offset``; the number of bytes, short at the end of the file."""
        length = max(0, min(target.nbytes, self.size_bytes - offset))
        done = 0
        while done < length:
            page, start = divmod(offset + done, PAGE_BYTES)
            taken = min(PAGE_BYTES - start, length - done)
            target[done : done + taken] = self.pages.get(page, _ZERO_PAGE)[start : start + taken]
            done += taken
        return length

    def write(self, offset: int, source: memoryview[int]) -> None:
        """Put bytes at ``offset``, extending the file where needed."""
        done = 0
        while done < source.nbytes:
            page, start = divmod(offset + done, PAGE_BYTES)
            taken = min(PAGE_BYTES - start, source.nbytes - done)
            part = bytes(source[done : done + taken])
            if taken < PAGE_BYTES:
                old = self.pages.get(page, _ZERO_PAGE)
                part = old[:start] + part + old[start + taken :]
            self._put(page, part)
            done += taken
        self._set_size(max(self.size_bytes, offset + source.nbytes))

    def pages_of(self, offset: int, length: int) -> range:
        """The pages that a range touches."""
        return range(offset // PAGE_BYTES, -(-(offset + length) // PAGE_BYTES))

    def preallocate(self, size_bytes: int) -> None:
        self.allocated.update(self.pages_of(0, size_bytes))
        self._set_size(max(self.size_bytes, size_bytes))

    def truncate(self, size_bytes: int) -> None:
        if size_bytes < self.size_bytes:
            self.zero(size_bytes, self.size_bytes - size_bytes)
        self.allocated = {page for page in self.allocated if page * PAGE_BYTES < size_bytes}
        self._set_size(size_bytes)

    def zero(self, offset: int, length: int) -> None:
        """Free the whole pages of a range, and clear the parts of pages at its ends."""
        end = min(offset + length, -(-self.size_bytes // PAGE_BYTES) * PAGE_BYTES)
        while offset < end:
            page, start = divmod(offset, PAGE_BYTES)
            stop = min(PAGE_BYTES, start + end - offset)
            if start == 0 and stop == PAGE_BYTES:
                self._put(page, None)
            elif page in self.pages:
                old = self.pages[page]
                self._put(page, old[:start] + bytes(stop - start) + old[stop:])
            offset += stop - start

    def sync(self) -> None:
        """Everything as it is now survives from here on."""
        for page in self.versions:
            content = self.pages.get(page)
            if content is None:
                self.durable_pages.pop(page, None)
            else:
                self.durable_pages[page] = content
        self.versions.clear()
        self.sizes.clear()
        self.durable_size_bytes = self.size_bytes
        self.durable_allocated = set(self.allocated)

    def after_crash(self, keep: Keep, rng: random.Random) -> FileContent:
        """The content that a machine finds when it comes back."""
        if keep == "all":
            pages, size_bytes, allocated = dict(self.pages), self.size_bytes, set(self.allocated)
        else:
            pages, size_bytes, allocated = dict(self.durable_pages), self.durable_size_bytes, set(self.durable_allocated)
        if keep == "random":
            size_bytes = rng.choice([self.durable_size_bytes, *self.sizes])
            for page in sorted(self.versions):
                survivor = self._survivor(page, rng)
                if survivor is None:
                    pages.pop(page, None)
                else:
                    pages[page] = survivor
                    allocated.add(page)
        survivor_file = FileContent(size_bytes, pages, allocated)
        survivor_file._cut_behind_size()
        survivor_file.durable_pages = dict(survivor_file.pages)
        survivor_file.durable_size_bytes = size_bytes
        survivor_file.durable_allocated = set(survivor_file.allocated)
        return survivor_file

    def _survivor(self, page: int, rng: random.Random) -> bytes | None:
        versions = [self.durable_pages.get(page), *self.versions[page]]
        chosen = rng.randrange(len(versions))
        if chosen == 0 or rng.random() >= TORN_PAGE_RATE:
            return versions[chosen]
        older, newer = versions[chosen - 1] or _ZERO_PAGE, versions[chosen] or _ZERO_PAGE
        sectors = range(0, PAGE_BYTES, SECTOR_BYTES)
        return b"".join((newer if rng.random() < 0.5 else older)[start : start + SECTOR_BYTES] for start in sectors)

    def _cut_behind_size(self) -> None:
        last, used_bytes = divmod(self.size_bytes, PAGE_BYTES)
        for page in [page for page in self.pages if page > last or (page == last and used_bytes == 0)]:
            del self.pages[page]
        self.allocated = {page for page in self.allocated if page * PAGE_BYTES < self.size_bytes}
        if last in self.pages:
            self.pages[last] = self.pages[last][:used_bytes] + bytes(PAGE_BYTES - used_bytes)

    def _put(self, page: int, content: bytes | None) -> None:
        if content is None:
            self.pages.pop(page, None)
            self.allocated.discard(page)
        else:
            self.pages[page] = content
            self.allocated.add(page)
        self.versions.setdefault(page, []).append(content)

    def _set_size(self, size_bytes: int) -> None:
        if size_bytes != self.size_bytes:
            self.size_bytes = size_bytes
            self.sizes.append(size_bytes)


@dataclass(frozen=True, slots=True)
class _Change:
    """One atomic change of names: (folder, name, content now under that name or ``None``)."""

    entries: tuple[tuple[str, str, FileContent | None], ...]

    @property
    def folders(self) -> set[str]:
        return {folder for folder, _, _ in self.entries}


class NameTree:
    """Folders and the files in them, now and durable. Folders are durable when made. Not thread-safe."""

    def __init__(self) -> None:
        self._now: dict[str, dict[str, FileContent]] = {"/": {}}
        self._durable: dict[str, dict[str, FileContent]] = {"/": {}}
        self._unsynced: list[_Change] = []

    def find(self, path: str) -> FileContent | None:
        """The file of that name; ``None`` when there is none. Raises ``OSError`` for a folder."""
        folder, name = _split(path)
        if normal_path(path) in self._now:
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        return self._now.get(folder, {}).get(name)

    def list_folder(self, path: str) -> list[str]:
        path = normal_path(path)
        prefix = path.rstrip("/") + "/"
        folders = {other[len(prefix) :] for other in self._now if other.startswith(prefix) and "/" not in other[len(prefix) :]}
        return sorted(set(self._folder(path)) | (folders - {""}))

    def make_folder(self, path: str) -> None:
        made = ""
        for part in normal_path(path).strip("/").split("/"):
            parent = made or "/"
            if part in self._now[parent]:
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            made = f"{made}/{part}" if part else "/"
            self._now.setdefault(made, {})
            self._durable.setdefault(made, {})

    def set_entry(self, path: str, content: FileContent | None) -> FileContent | None:
        """Give a file a name, or take the name away; returns what had it before."""
        folder, name = _split(path)
        before = self._folder(folder).get(name)
        self._apply(_Change(((folder, name, content),)))
        return before

    def rename(self, source: str, target: str) -> FileContent | None:
        """Atomically move a name; returns what the target was before."""
        source_folder, source_name = _split(source)
        target_folder, target_name = _split(target)
        content = self._folder(source_folder).get(source_name)
        if content is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        before = self._folder(target_folder).get(target_name)
        if before is content:
            return None
        self._apply(_Change(((source_folder, source_name, None), (target_folder, target_name, content))))
        return before

    def sync_folder(self, path: str) -> None:
        """Make the changes in a folder durable, with those that they build on (a rename is durable in both its folders)."""
        self._folder(path)
        folders = {normal_path(path)}
        left: list[_Change] = []
        durable: list[_Change] = []
        for change in reversed(self._unsynced):
            if change.folders & folders:
                folders |= change.folders
                durable.append(change)
            else:
                left.append(change)
        for change in reversed(durable):
            _apply(change, self._durable)
        self._unsynced = left[::-1]

    def files(self) -> Iterator[tuple[str, FileContent]]:
        """Every file with its path, in order."""
        for folder in sorted(self._now):
            for name in sorted(self._now[folder]):
                yield f"{folder.rstrip('/')}/{name}", self._now[folder][name]

    def after_crash(self, keep: Keep, rng: random.Random) -> NameTree:
        """The names that a machine finds when it comes back, each with the content that survived."""
        kept = {"none": 0, "all": len(self._unsynced), "random": rng.randint(0, len(self._unsynced))}[keep]
        names = {folder: dict(entries) for folder, entries in self._durable.items()}
        for change in self._unsynced[:kept]:
            _apply(change, names)
        survivors = NameTree()
        for folder in sorted(names):
            files = {name: names[folder][name].after_crash(keep, rng) for name in sorted(names[folder])}
            survivors._now[folder] = files
            survivors._durable[folder] = dict(files)
        return survivors

    def _folder(self, path: str) -> dict[str, FileContent]:
        folder = self._now.get(normal_path(path))
        if folder is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return folder

    def _apply(self, change: _Change) -> None:
        _apply(change, self._now)
        self._unsynced.append(change)


def normal_path(path: str) -> str:
    """One spelling for each path; everything lies below ``/``."""
    return os.path.normpath("/" + path.lstrip("/"))


def _split(path: str) -> tuple[str, str]:
    folder, name = os.path.split(normal_path(path))
    return folder, name


def _apply(change: _Change, names: dict[str, dict[str, FileContent]]) -> None:
    for folder, name, content in change.entries:
        if content is None:
            names[folder].pop(name, None)
        else:
            names[folder][name] = content


def count_allocated(files: Iterable[FileContent]) -> int:
    """Pages that the files take together."""
    return sum(len(file.allocated) for file in files)
