"""What a store set remembers of single blocks: in which store they were seen, and which store's copy turned out to be unusable."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable

PLACES_MAX = 1 << 16
DISTRUST_S = 60.0
"""How long a copy that was found damaged counts as absent: its own process drops it when it finds out itself."""


class Places:
    """Hints and nothing more: what is forgotten is looked up again. Stores are numbers. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: OrderedDict[bytes, int] = OrderedDict()
        self._useless: OrderedDict[tuple[int, bytes], float] = OrderedDict()

    def note(self, number: int, idents: Iterable[bytes]) -> None:
        """These blocks were seen in this store."""
        news = [ident for ident in idents if self._seen.get(ident) != number]
        if not news:
            return
        with self._lock:
            for ident in news:
                self._seen[ident] = number
                self._seen.move_to_end(ident)
            while len(self._seen) > PLACES_MAX:
                self._seen.popitem(last=False)

    def forget(self, ident: bytes) -> None:
        """It was not there."""
        if ident in self._seen:
            with self._lock:
                self._seen.pop(ident, None)

    def where(self, ident: bytes) -> int | None:
        """The store that a block was last seen in, where that is not the one it would be written to."""
        return self._seen.get(ident)

    def distrust(self, number: int, ident: bytes) -> None:
        """This store's copy of a block is damaged."""
        with self._lock:
            self._useless[number, ident] = time.monotonic() + DISTRUST_S
            while len(self._useless) > PLACES_MAX:
                self._useless.popitem(last=False)

    @property
    def distrusting(self) -> bool:
        """Whether any copy was found damaged lately."""
        return bool(self._useless)

    def distrusted(self, number: int, ident: bytes) -> bool:
        """Whether this store's copy was found damaged a short while ago."""
        until_s = self._useless.get((number, ident)) if self._useless else None
        if until_s is None:
            return False
        if time.monotonic() < until_s:
            return True
        with self._lock:
            self._useless.pop((number, ident), None)
        return False
