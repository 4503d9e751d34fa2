"""Many keys looked up in RocksDB: in the order in which they lie in its files, in parts, and on more than one core.

RocksDB gives the interpreter up while it works, and takes several microseconds for a present key in another place each: its own work
and a read of one small block. So the caller is helped by threads that would otherwise be idle, and never waits for one that has not begun.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from ..format.layout import DIGEST_BYTES
from ..gds.monitor import Monitor
from ..gds.threads import WorkerPool

ORDERED_KEYS_MIN = 64
"""Fewer keys cost less as they come."""
PART_KEYS = 512
"""Of one call. RocksDB and its binding keep some 400 bytes for each key of a call, and a core's own cache has a megabyte or less. Each
call gives the interpreter up and has to get it back, so that still smaller ones would cost more than they save beside busy threads."""
HELPERS_MAX = 3
_LEAD_BYTES = 8

Values = list[bytes | None]


class LookupTeam:
    """Looks keys up by ``get``, which gives the values of a list of keys and may be called by several threads at once.

    Any thread may call any method. A forked child has no helpers: many keys raise ``StoreClosed`` there, as after ``close``.
    """

    def __init__(self, get: Callable[[list[bytes]], Values]) -> None:
        self._get = get
        self._helpers = max(0, min(HELPERS_MAX, (os.cpu_count() or 1) - 1))
        self._pool = WorkerPool("kvlode-index", self._helpers) if self._helpers else None

    def look_up(self, keys: list[bytes]) -> Values:
        """Values in the order of the keys. More than ``PART_KEYS`` are not read at one moment. Raises what ``get`` raises."""
        if len(keys) < ORDERED_KEYS_MIN:
            return self._get(keys)
        lookup = _Lookup(self._get, keys)
        if self._pool is not None:
            for _ in range(min(self._helpers, lookup.parts - 1)):
                self._pool.run(lookup.work)
        lookup.work()
        return lookup.result()

    def close(self, timeout_s: float) -> None:
        """End the threads; one that ``get`` does not let go in time is left behind."""
        if self._pool is not None:
            self._pool.shutdown(timeout_s)


class _Lookup:
    """One lookup of many keys, whose parts are taken by whoever works on it."""

    def __init__(self, get: Callable[[list[bytes]], Values], keys: list[bytes]) -> None:
        self._get, self._keys = get, keys
        self._values: Values = [None] * len(keys)
        order = key_order(keys)
        self._waiting = [order[start : start + PART_KEYS] for start in range(0, len(order), PART_KEYS)]
        self.parts = self._unfinished = len(self._waiting)
        self._error: BaseException | None = None
        self._changed = Monitor()

    def work(self) -> None:
        """Look parts up until none is left."""
        while self._waiting:
            try:
                positions = self._waiting.pop()
            except IndexError:  # another thread was faster
                return
            error: BaseException | None = None
            try:
                self._look_up(positions)
            except BaseException as raised:  # for the thread that asked
                error = raised
            with self._changed.lock:
                self._error = self._error or error
                self._unfinished -= 1
                self._changed.notify_all()

    def _look_up(self, positions: list[int]) -> None:
        keys, values = self._keys, self._values
        for position, value in zip(positions, self._get([keys[position] for position in positions]), strict=True):
            values[position] = value

    def result(self) -> Values:
        """The values, once every part is finished; raises the error of one that failed."""
        self._changed.wait_for(lambda: not self._unfinished)
        if self._error is not None:
            raise self._error
        return self._values


def key_order(keys: list[bytes]) -> list[int]:
    """Positions of the keys, in about the order of the keys.

    Keys of one length are compared by the eight bytes behind the namespace's digest alone, which takes a third of the time: block
    keys are digests or begin with one. An order that is not exact costs a lookup time and nothing else.
    """
    length = len(keys[0])
    joined = b"".join(keys)
    if length < DIGEST_BYTES + _LEAD_BYTES or len(joined) != length * len(keys):
        return sorted(range(len(keys)), key=keys.__getitem__)
    leads = np.ndarray(len(keys), ">u8", joined, offset=DIGEST_BYTES, strides=(length,))
    order: list[int] = leads.astype(np.uint64).argsort().tolist()
    return order
