"""kvlode as it comes: codec ``auto``, a buffer of 1 GiB, everything checked."""

from __future__ import annotations

from collections.abc import Sequence

import kvlode

from .base import Store, requests

WAIT_S = 120.0


class KvlodeStore(Store):
    version = kvlode.__version__
    settings = "defaults, 1 GiB of buffer; its own O_DIRECT, fdatasync and checksums"

    def open(self) -> None:
        capacity_bytes = max(8 << 30, self.task.capacity_bytes)
        self.store = kvlode.open(self.task.folder / "store", capacity=capacity_bytes, codec=self.task.codec, put_timeout_s=WAIT_S)
        self.space = self.store.namespace(kvlode.Namespace(**(self.task.namespace or {})))

    def settle(self) -> None:
        self.store.warm_up(WAIT_S)

    def put(self, keys: Sequence[bytes], rows: Sequence[int]) -> None:
        parent = None
        for some, places in requests(keys, rows):
            job = self.space.submit_put(some, [self.task.arena[row] for row in places], parent=parent)
            if not all(job.statuses):
                raise RuntimeError(f"kvlode refused a put: {next(status.reason for status in job.statuses if not status)}")
            parent = some[-1]

    def sync(self) -> None:
        if not self.store.flush(WAIT_S):
            raise RuntimeError(f"kvlode could not flush: {self.store.stats()['counters']}")

    def get(self, keys: Sequence[bytes], rows: Sequence[int]) -> list[bool]:
        jobs = [self.space.submit_get(some, [self.task.arena[row] for row in places]) for some, places in requests(keys, rows)]
        for job in jobs:
            job.wait()
        return [status is kvlode.Status.HIT for job in jobs for status in job.statuses]

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return self.space.contains(keys)

    def close(self) -> None:
        if not self.store.close(WAIT_S):
            raise RuntimeError("kvlode did not close in time")

    def stored_bytes(self, raw_bytes: int) -> int:
        return int(self.store.stats()["counters"]["written_stored_bytes"])
