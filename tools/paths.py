"""Paths of the command line, looked at before any work: each error is one line that says what, where, and what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..format.errors import InvalidConfig, KvlodeError, device_error


def require_folder(path: Path, what: str) -> None:
    """Raise ``InvalidConfig`` unless ``path`` is a folder or can become one: neither it nor anything above it is a file."""
    with naming("stat", path):
        for place in (path, *path.parents):
            if place.is_dir():
                return
            if os.path.lexists(place):
                raise InvalidConfig(
                    f"{what} needs a folder",
                    where=path,
                    expected="a folder, or a place where one can be made",
                    actual="no folder" if place == path else f"no folder at {place}",
                    action="Name another path.",
                )


def require_new_place(target: Path, what: str) -> None:
    """Raise ``InvalidConfig`` unless a file can be written at ``target``: its folder is there, and it is no folder itself."""
    with naming("stat", target):
        if target.is_dir():
            raise InvalidConfig(f"{what} cannot be written", where=target, expected="the name of a file", actual="a folder")
        if not target.parent.is_dir():
            raise InvalidConfig(
                f"{what} cannot be written",
                where=target,
                expected="a name in a folder that exists",
                actual=f"no folder {target.parent}",
                action="Make the folder first, or choose another one.",
            )


def require_file(path: Path, what: str) -> None:
    """Raise ``InvalidConfig`` unless ``path`` is a file."""
    with naming("stat", path):
        if not path.is_file():
            actual = "a folder" if path.is_dir() else "no file"
            raise InvalidConfig(f"{what} cannot be read", where=path, expected="a file", actual=actual, action="Check the path.")


@contextmanager
def naming(operation: str, path: Path) -> Iterator[None]:
    """Errors of the operating system become a ``DeviceError`` that says what was being done, where, and what to do."""
    try:
        yield
    except KvlodeError:
        raise
    except OSError as error:
        raise device_error(operation, error.filename or path, error) from error
