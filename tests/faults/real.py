"""File systems for tests: small ones, full ones, ones whose drive fails or loses its power. Root on Linux.

``Mounts`` undoes everything that it did, the last thing first, also when a test fails. ``Unavailable`` says what a
machine lacks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

BALLAST_STEP_BYTES = 1 << 16
COMMAND_TIMEOUT_S = 60.0


class Unavailable(Exception):
    """This machine cannot mount what a test needs."""


def run(*command: object) -> str:
    """A command's output. Raises ``Unavailable`` when it is missing or fails."""
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except FileNotFoundError as error:
        raise Unavailable(f"{command[0]} is not installed") from error
    if done.returncode:
        raise Unavailable(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip()


class Mounts:
    """File systems below one folder; see the module."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._undo: list[tuple[str, Callable[[], object]]] = []

    def tmpfs(self, name: str, size_bytes: int) -> Path:
        """A file system in memory of this size."""
        place = self._folder / name
        place.mkdir(exist_ok=True)
        self.cover(place, size_bytes)
        return place

    def cover(self, place: Path, size_bytes: int) -> None:
        """A small file system in memory over an existing folder."""
        run("mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "kvlode-test", place)
        self._undo.append((f"umount {place}", lambda: unmount(place)))

    def ext4(self, name: str, image: Path, *, size_bytes: int | None = None, options: str = "") -> Path:
        """The ext4 file system in a file, made anew (sparse) when a size is given."""
        if size_bytes is not None:
            with open(image, "wb") as file:
                file.truncate(size_bytes)
            run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
        place = self._folder / name
        place.mkdir(exist_ok=True)
        device = run("losetup", "--find", "--show", image)
        self._undo.append((f"losetup -d {device}", lambda: run("losetup", "-d", device)))
        run("mount", "-t", "ext4", *(["-o", options] if options else []), device, place)
        self._undo.append((f"umount {place}", lambda: unmount(place)))
        return place

    def remount(self, place: Path, options: str) -> None:
        run("mount", "-o", f"remount,{options}", place)

    def undo_last(self, count: int) -> None:
        """Undo the last ``count`` steps now (an ``ext4`` is two: the mount and its device)."""
        for _ in range(count):
            self._undo.pop()[1]()

    def close(self) -> None:
        """Undo everything; raises when something is left behind."""
        failed = []
        while self._undo:
            what, undo = self._undo.pop()
            try:
                undo()
            except Unavailable as error:
                failed.append(f"{what}: {error}")
        if failed:
            raise AssertionError("left behind: " + "; ".join(failed))


def unmount(place: Path) -> None:
    """Unmount; what is still in use is detached, so that nothing stays when a test fails with files open."""
    try:
        run("umount", place)
    except Unavailable:
        run("umount", "--lazy", place)
        raise


def fill(folder: Path, *, leave_bytes: int = 0) -> Path:
    """Use up the room of a file system but for ``leave_bytes``, with a file that is returned: remove it to give room back."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        wanted = max(0, shutil.disk_usage(folder).free - leave_bytes)
        step = bytes(BALLAST_STEP_BYTES)
        try:
            while wanted > 0:
                wanted -= file.write(step[:wanted])
            if leave_bytes == 0:
                while file.write(step[:4096]):
                    pass
            os.fsync(file.fileno())
        except OSError:  # full is what was wanted
            return ballast
    return ballast


def copy_image(image: Path, target: Path) -> None:
    """A copy of a file with its holes: what a drive holds at this moment."""
    run("cp", "--sparse=always", image, target)
