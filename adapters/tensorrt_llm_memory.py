"""Host memory of the TensorRT-LLM connector: blocks read and checked before they go to the GPU, and blocks on their way to the drive.

Nothing here knows the engine: a block is a row of bytes, its places in the GPU's pool are a list of parts.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from ..engine.contract import Status
from .attached import QuietSpace
from .transfers import LOAD_TIMEOUT_S, Transfers

logger = logging.getLogger("kvlode")

LOOKUP_TIMEOUT_S = 1.0
POLL_S = 0.0005
DRAIN_S = 0.05
WISHES_MAX = 64
"""Prefixes to be read ahead; with more waiting than that the drive is too slow for them to be of use."""


class Pool:
    """The engine's KV blocks: block ``i`` is row ``i`` of each part (``uint8``, ``[blocks, bytes]``), one after the other."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self.is_cuda = bool(self.parts[0].is_cuda)
        self.block_bytes = sum(part.shape[1] for part in self.parts)
        self.blocks = min(part.shape[0] for part in self.parts)

    def host_rows(self, size_bytes: int) -> Any:
        """Host memory for as many blocks as that is (at least one), page-locked where it will be copied from or to a GPU."""
        import torch

        return torch.empty((max(1, size_bytes // self.block_bytes), self.block_bytes), dtype=torch.uint8, pin_memory=self.is_cuda)

    def fill(self, block_id: int, row: Any) -> None:
        """Copy a row into a block; returns when the row may be used again."""
        for part, piece in zip(self.parts, self._pieces(row), strict=True):
            part[block_id].copy_(piece)

    def read(self, block_id: int, row: Any) -> None:
        """Queue the copy of a block into a row on the current stream."""
        for part, piece in zip(self.parts, self._pieces(row), strict=True):
            piece.copy_(part[block_id], non_blocking=self.is_cuda)

    def _pieces(self, row: Any) -> Any:
        return row.split([part.shape[1] for part in self.parts])

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Copies inside are ordered on ``stream`` (a ``torch.cuda.Stream``); without a GPU they happen at once."""
        if not self.is_cuda:
            return contextlib.nullcontext()
        import torch

        return torch.cuda.stream(stream)


@dataclass(slots=True)
class _Staged:
    row: int
    ready: bool = False
    pins: int = 0


@dataclass(slots=True)
class _Wish:
    keys: Sequence[bytes]
    over: threading.Event = field(default_factory=threading.Event)


class Staging:
    """A small cache of blocks in host memory, each read and verified; what is pinned stays. Thread-safe.

    ``take`` answers from memory; what it has not got is read on a thread of its own, for whoever asks next.
    """

    def __init__(self, space: QuietSpace, pool: Pool, size_bytes: int, load_timeout_s: float = LOAD_TIMEOUT_S) -> None:
        self._space = space
        self._rows = pool.host_rows(size_bytes)
        self.rows = int(self._rows.shape[0])
        """As many blocks fit in."""
        self._load_timeout_s = load_timeout_s
        self._transfers = Transfers(load_timeout_s)
        self._jobs = itertools.count()
        self._lock = threading.Lock()
        self._staged: collections.OrderedDict[bytes, _Staged] = collections.OrderedDict()
        self._free = list(range(self._rows.shape[0]))
        self._wishes: queue.SimpleQueue[_Wish | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvlode-stage", daemon=True)
        self._thread.start()

    def row(self, index: int) -> Any:
        """The bytes of a row that ``take`` gave."""
        return self._rows[index]

    def take(self, keys: Sequence[bytes], wait_s: float) -> list[int]:
        """The rows of the leading keys that are in memory, each pinned once; waits up to ``wait_s`` for those that are being read."""
        rows = self._pinned(keys)
        if len(rows) < len(keys):
            wish = _Wish(keys)
            if self._wishes.qsize() < WISHES_MAX:
                self._wishes.put(wish)
            else:
                wish.over.set()
            if wait_s > 0:
                wish.over.wait(wait_s)
                rows += self._pinned(keys[len(rows) :])
        return rows

    def release(self, rows: Sequence[int]) -> None:
        """Take back one pin of each row."""
        with self._lock:
            staged = {entry.row: entry for entry in self._staged.values()}
            for row in rows:
                staged[row].pins -= 1

    def close(self, timeout_s: float) -> bool:
        self._wishes.put(None)
        self._thread.join(timeout_s)
        return self._transfers.drain(timeout_s)

    def _pinned(self, keys: Sequence[bytes]) -> list[int]:
        rows: list[int] = []
        with self._lock:
            for key in keys:
                entry = self._staged.get(key)
                if entry is None or not entry.ready:
                    break
                entry.pins += 1
                self._staged.move_to_end(key)
                rows.append(entry.row)
        return rows

    # --- the thread -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (wish := self._wishes.get()) is not None:
            try:
                self._collect()
                self._read(wish.keys)
            except Exception as error:  # the thread must live: without it nothing is ever restored
                logger.error("blocks could not be read ahead: %s", error)
            finally:
                wish.over.set()

    def _read(self, keys: Sequence[bytes]) -> None:
        """Read what is stored of the keys, from the front, as far as there is room, and wait for it with a deadline."""
        stored = self._stored(keys)
        wanted = set(stored)
        chosen: list[tuple[bytes, int]] = []
        with self._lock:
            for key in stored:
                if key in self._staged:
                    continue
                row = self._free.pop() if self._free else self._evict(wanted)
                if row is None:
                    break
                self._staged[key] = _Staged(row)
                chosen.append((key, row))
        if chosen:
            self._transfers.load(next(self._jobs), self._space, [key for key, _ in chosen], [self._rows[row] for _, row in chosen])
        deadline_s = time.monotonic() + self._load_timeout_s + DRAIN_S
        while self._is_reading(chosen) and time.monotonic() < deadline_s:
            self._transfers.drain(DRAIN_S)
            self._collect()

    def _is_reading(self, chosen: Sequence[tuple[bytes, int]]) -> bool:
        with self._lock:
            return any(key in self._staged and not self._staged[key].ready for key, _ in chosen)

    def _stored(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """The leading keys that are in memory or in the store; what the index has not said at the deadline is not."""
        deadline_s = time.monotonic() + LOOKUP_TIMEOUT_S
        pause = threading.Event()
        while True:
            statuses = self._space.lookup_nowait(keys)
            end = next((at for at, key in enumerate(keys) if statuses[at] is not Status.HIT and key not in self._staged), len(keys))
            if end == len(keys) or statuses[end] is not Status.PENDING or time.monotonic() >= deadline_s:
                return keys[:end]
            pause.wait(POLL_S)

    def _evict(self, wanted: set[bytes]) -> int | None:
        """The row that was not asked for longest."""
        for key, entry in self._staged.items():
            if entry.ready and not entry.pins and key not in wanted:
                del self._staged[key]
                return entry.row
        return None

    def _collect(self) -> None:
        """Reads that are over: good rows are ready, the others free."""
        for outcome in self._transfers.finished():
            with self._lock:
                for key, good in zip(outcome.keys, outcome.good, strict=True):
                    if good:
                        self._staged[key].ready = True
                    else:
                        self._free.append(self._staged.pop(key).row)


@dataclass(slots=True)
class _Copied:
    """Blocks of one request whose copies into host rows were queued."""

    request_id: int
    keys: Sequence[bytes]
    parent: bytes | None
    rows: list[int]
    event: Any | None


class Saver:
    """Takes blocks out of the pool at once and stores them from host memory: a slow drive never keeps the engine's blocks. Thread-safe."""

    def __init__(self, space: QuietSpace, pool: Pool, size_bytes: int) -> None:
        self._space = space
        self._pool = pool
        self._rows = pool.host_rows(size_bytes)
        self._free = list(range(self._rows.shape[0]))
        self._transfers = Transfers()
        self._jobs: dict[int, list[int]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._copying: collections.Counter[int] = collections.Counter()
        self.skipped_blocks = 0
        """Blocks that were not stored because the drive has not caught up."""
        self._queue: queue.SimpleQueue[_Copied | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvlode-save", daemon=True)
        self._thread.start()

    def save(self, request_id: int, keys: Sequence[bytes], parent: bytes | None, block_ids: Sequence[int], stream: Any) -> None:
        """Store blocks of the pool, as many as there are free rows for. Whatever ``stream`` is given later sees the copies done."""
        rows = self._take(len(keys))
        if not rows:
            return
        with self._pool.on(stream):
            for block_id, row in zip(block_ids, rows, strict=False):
                self._pool.read(block_id, self._rows[row])
        event = stream.record_event() if self._pool.is_cuda else None
        with self._lock:
            self._copying[request_id] += 1
        self._queue.put(_Copied(request_id, keys[: len(rows)], parent, rows, event))

    def is_copying(self, request_id: int) -> bool:
        """True while blocks of the request are still being read from the pool."""
        return self._copying[request_id] > 0

    def close(self, timeout_s: float) -> bool:
        self._queue.put(None)
        self._thread.join(timeout_s)
        return self._transfers.drain(timeout_s)

    def _take(self, count: int) -> list[int]:
        with self._lock:
            for outcome in self._transfers.finished():
                self._free += self._jobs.pop(outcome.job_id)  # type: ignore[call-overload]
            taken, self._free = self._free[:count], self._free[count:]
            self.skipped_blocks += count - len(taken)
        return taken

    def _run(self) -> None:
        while (copied := self._queue.get()) is not None:
            try:
                if copied.event is not None:
                    copied.event.synchronize()
                number = next(self._numbers)
                with self._lock:
                    self._jobs[number] = copied.rows
                blocks = [self._rows[row] for row in copied.rows]
                self._transfers.store(number, self._space, copied.keys, blocks, chained=True, parent=copied.parent)
            except Exception as error:  # the thread must live: requests wait for their copies
                logger.error("blocks could not be stored: %s", error)
            finally:
                with self._lock:
                    self._copying[copied.request_id] -= 1
                    if not self._copying[copied.request_id]:
                        del self._copying[copied.request_id]
