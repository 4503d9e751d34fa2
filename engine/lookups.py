"""Lookups for the scheduler's path: answers from memory at once, the index asked in the background."""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..gds.monitor import Monitor
from .contract import Status

ANSWERS_MAX = 1 << 16
ANSWER_AGE_S_MAX = 1.0
UNREAD_AGE_S_MAX = 60.0
"""An answer that nobody fetched yet lives longer: a scheduler may come back only after a step of several seconds, and would
otherwise be told to come back for ever."""
BATCH_KEYS = 128
"""The index holds the interpreter while it looks a batch up (2 to 4 us a key), and whoever asks here waits for that."""
MATCH_BATCHES = (64, 512, 4096)


def prefix_run(keys: Sequence[bytes], present: Callable[[Sequence[bytes]], Sequence[bool]]) -> int:
    """Number of leading keys that are present. Asks in growing batches: most prefixes end early, and long ones are cheaper in one piece."""
    matched = 0
    batch_sizes = iter(MATCH_BATCHES)
    while matched < len(keys):
        batch = keys[matched : matched + next(batch_sizes, MATCH_BATCHES[-1])]
        found = present(batch)
        if not all(found):
            return matched + found.index(False)
        matched += len(batch)
    return matched


@dataclass(slots=True)
class _Answer:
    status: Status
    since_s: float
    fetched: bool = False


class LookupCache:
    """Remembers what the index said of a key for a second; unknown keys are asked on a thread of its own.

    ``ask`` never waits for the index. A put invalidates its key, so that a remembered MISS does not hide it; a HIT may be
    outdated (the block was reclaimed), which the following get reports as a miss.
    """

    def __init__(self, resolve: Callable[[Sequence[bytes]], Sequence[bool]]) -> None:
        self._resolve = resolve
        self._changed = Monitor()
        self._lock = self._changed.lock
        self._answers: OrderedDict[bytes, _Answer] = OrderedDict()
        self._wanted: OrderedDict[bytes, None] = OrderedDict()
        self._running: set[bytes] = set()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kvlode-lookup", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float | None) -> bool:
        with self._lock:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def ask(self, idents: Sequence[bytes]) -> list[Status]:
        """HIT or MISS where it is remembered, PENDING (and asked in the background) elsewhere."""
        now_s = time.monotonic()
        answers: list[Status] = []
        with self._lock:
            for ident in idents:
                known = self._answers.get(ident)
                if known is not None and now_s - known.since_s <= (ANSWER_AGE_S_MAX if known.fetched else UNREAD_AGE_S_MAX):
                    known.fetched = True
                    answers.append(known.status)
                    continue
                answers.append(Status.PENDING)
                if ident not in self._running:
                    self._wanted[ident] = None
            if self._wanted:
                self._changed.notify_all()
        return answers

    def invalidate(self, ident: bytes) -> None:
        """The key changed: forget what was known of it, and what is being asked right now."""
        if not (self._answers or self._running or self._wanted):
            return
        with self._lock:
            self._answers.pop(ident, None)
            self._running.discard(ident)

    def clear(self) -> None:
        with self._lock:
            self._answers.clear()
            self._running.clear()

    def _run(self) -> None:
        while True:
            self._changed.wait_for(lambda: bool(self._wanted) or self._stopping)
            with self._lock:
                if self._stopping:
                    return
                batch = list(itertools.islice(self._wanted, BATCH_KEYS))
                for ident in batch:
                    del self._wanted[ident]
                self._running.update(batch)
            try:
                found: Sequence[bool] = self._resolve(batch)
            except Exception:  # unknown stays PENDING and is asked again
                found = []
            self._remember(batch, found)

    def _remember(self, batch: list[bytes], found: Sequence[bool]) -> None:
        now_s = time.monotonic()
        with self._lock:
            for ident, present in zip(batch, found, strict=False):
                if ident in self._running:  # not invalidated meanwhile
                    self._answers[ident] = _Answer(Status.HIT if present else Status.MISS, now_s)
                    self._answers.move_to_end(ident)
            self._running.difference_update(batch)
            while len(self._answers) > ANSWERS_MAX:
                self._answers.popitem(last=False)
