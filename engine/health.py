"""The store's one-way switch: after a failed write or sync nothing more is written, because nothing unsynced can be trusted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger("kvlode")


class Health:
    """Latched failure of the writer. Reads go on; puts are refused with ``STORE_FAILED``; close and reopen to recover.

    A failed fsync is never retried: the kernel marks the pages clean, so a second one would report success over lost data.
    """

    def __init__(self, on_failure: Callable[[BaseException], None] = lambda _: None) -> None:
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self.failure: BaseException | None = None

    def latch(self, error: BaseException) -> None:
        with self._lock:
            if self.failure is not None:
                return
            self.failure = error
        logger.error(
            "the store stopped writing: %s. Blocks that were flushed stay readable; close and reopen to write again.",
            error,
            exc_info=None if isinstance(error, OSError) else error,
        )
        self._on_failure(error)
