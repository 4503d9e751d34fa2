"""A store whose flusher has always work: somebody puts new blocks as fast as the buffer takes them."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from ...engine.store import DiskStore
from ...format.errors import KvlodeError
from ...format.layout import round_up_pages
from .workload import bench_key, bench_namespace, check_accepted

FULL_WAIT_S = 60.0
_runs = itertools.count()


class FullRate:
    """A context manager: inside it a thread puts ``blocks`` in turn, each under a new key, ``blocks_per_call`` at a time.

    Entering waits until the buffer was full once, so that from then on the flusher sets the pace. The thread ends after
    ``bytes_max`` (``over`` tells). Raises ``KvlodeError`` on leaving when a put was refused.
    """

    def __init__(self, store: DiskStore, blocks: Sequence[Any], *, blocks_per_call: int = 1, bytes_max: int) -> None:
        self._store = store
        self._blocks = blocks
        self._block_bytes = len(blocks[0])
        self._blocks_per_call = blocks_per_call
        self._bytes_max = bytes_max
        self._salt = f"full-{next(_runs)}"
        self._stopping = threading.Event()
        self._full = threading.Event()
        self._error: KvlodeError | None = None
        self._written_bytes = 0
        self._started_s = 0.0
        self._thread = threading.Thread(target=self._run, name="bench-full-rate", daemon=True)
        self.rate_GB_s = 0.0
        """What became durable inside the ``with``, in raw bytes. Set on leaving."""

    @property
    def over(self) -> bool:
        """Whether the thread has put all that it may: the flusher is no longer at its full rate."""
        return not self._thread.is_alive()

    def __enter__(self) -> FullRate:
        self._thread.start()
        if not self._full.wait(FULL_WAIT_S):
            self._stopping.set()
            raise KvlodeError("the buffer did not fill", where=self._store.path, expected=f"{self._store.config.buffer_bytes} bytes put")
        self._written_bytes, self._started_s = self._written(), time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.rate_GB_s = (self._written() - self._written_bytes) / (time.perf_counter() - self._started_s) / 1e9
        self._stopping.set()
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def _written(self) -> int:
        return int(self._store.stats()["counters"].get("written_raw_bytes", 0))

    def _run(self) -> None:
        space = self._store.namespace(bench_namespace(self._block_bytes))
        put_bytes = 0
        for number in range(0, self._bytes_max // self._block_bytes, self._blocks_per_call):
            if self._stopping.is_set():
                break
            numbers = range(number, number + self._blocks_per_call)
            keys = [bench_key(each, salt=self._salt) for each in numbers]
            job = space.submit_put(keys, [self._blocks[each % len(self._blocks)] for each in numbers], chained=False)
            try:
                check_accepted(job.statuses)
            except KvlodeError as error:
                self._error = error
                break
            put_bytes += len(numbers) * round_up_pages(self._block_bytes)
            if put_bytes >= self._store.config.buffer_bytes:
                self._full.set()
        self._full.set()
