"""What the benchmark asks of every store: named blocks of one size, written from and read into rows of one piece of memory."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

REQUEST_BLOCKS = 16
"""Blocks that a store with batched calls gets in one of them; all calls of a measurement are made at once."""
SYNC_THREADS = 16
FILE_THREADS = 8
"""Threads that work on the stores that take one block a call: more than their users start."""


@dataclass(frozen=True)
class Task:
    """What a store is opened for. ``arena``: rows of one block each, on page boundaries; the lower half is written, the upper half read."""

    folder: Path
    arena: np.ndarray[Any, np.dtype[np.uint8]]
    namespace: dict[str, Any] | None = None
    """What kvlode is told of the blocks (``kvlode.Namespace``); the others are not told anything."""
    codec: str = "auto"
    """Of kvlode; the others do not compress."""

    @property
    def block_bytes(self) -> int:
        return int(self.arena.shape[1])

    @property
    def capacity_bytes(self) -> int:
        """Room for every row twice, for stores that are given a size."""
        return 2 * int(self.arena.size) + (64 << 20)


class Store(ABC):
    """One store in ``task.folder``. Raises whatever its library raises; a block that is missing is ``False``, not an error."""

    version: ClassVar[str]
    settings: ClassVar[str]
    """How it is configured, and what it could not do here."""

    def __init__(self, task: Task) -> None:
        self.task = task

    @abstractmethod
    def open(self) -> None:
        """Create it, or find what an earlier process left."""

    @abstractmethod
    def put(self, keys: Sequence[bytes], rows: Sequence[int]) -> None:
        """Write these rows; returns when the store says that they are stored. Raises ``RuntimeError`` when it says they are not."""

    @abstractmethod
    def get(self, keys: Sequence[bytes], rows: Sequence[int]) -> list[bool]:
        """Read blocks into these rows; whether the store says that it did."""

    @abstractmethod
    def contains(self, keys: Sequence[bytes]) -> list[bool]: ...

    @abstractmethod
    def close(self) -> None: ...

    def sync(self) -> None:
        """Make everything that was put durable. Here for stores that do not: every file is synced, several at once, then the folders."""
        sync_folder(self.task.folder)

    def settle(self) -> None:  # noqa: B027
        """Wait for what opening began in the background: nothing, in most stores."""

    def stored_bytes(self, raw_bytes: int) -> int:
        """What must come from the drive for a read of everything."""
        return raw_bytes


class BlockAtATime(Store):
    """A store whose calls take one block, called from ``FILE_THREADS`` threads."""

    def open(self) -> None:
        self.open_store()
        self.pool = ThreadPoolExecutor(FILE_THREADS)

    @abstractmethod
    def open_store(self) -> None: ...

    @abstractmethod
    def put_one(self, key: bytes, row: int) -> None: ...

    @abstractmethod
    def get_one(self, key: bytes, row: int) -> bool: ...

    def put(self, keys: Sequence[bytes], rows: Sequence[int]) -> None:
        list(self.pool.map(self.put_one, keys, rows))

    def get(self, keys: Sequence[bytes], rows: Sequence[int]) -> list[bool]:
        return list(self.pool.map(self.get_one, keys, rows))

    def close(self) -> None:
        self.pool.shutdown()


def requests(keys: Sequence[bytes], rows: Sequence[int]) -> list[tuple[Sequence[bytes], Sequence[int]]]:
    """Keys and rows in portions of ``REQUEST_BLOCKS``."""
    starts = range(0, len(keys), REQUEST_BLOCKS)
    return [(keys[start : start + REQUEST_BLOCKS], rows[start : start + REQUEST_BLOCKS]) for start in starts]


def sync_folder(folder: Path) -> None:
    """fsync every file below ``folder``, then every folder."""
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    folders = [folder, *(path for path in paths if path.is_dir())]
    with ThreadPoolExecutor(SYNC_THREADS) as pool:
        list(pool.map(with_descriptor(os.fsync), [path for path in paths if path.is_file()]))
        list(pool.map(with_descriptor(os.fsync), folders))


def with_descriptor(act: Callable[[int], Any]) -> Callable[[Path], None]:
    """``act`` on an open descriptor of a path; files that went away meanwhile are passed over."""

    def opened(path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            act(descriptor)
        finally:
            os.close(descriptor)

    return opened
