"""The store on disk keeps the host contract, on a device in memory."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from conformance import StoreConformance
from kvlode import BlockSpace, Status, Store
from kvlode.engine.testing import ManualClock
from model import descriptor
from rig import KIB, MIB, Rig


class DiskConformance(StoreConformance):
    can_reopen = True
    can_damage = True
    options: ClassVar[dict[str, object]] = {}

    @pytest.fixture(autouse=True)
    def _rigs(self) -> None:
        self.rigs: list[Rig] = []

    def make_store(self, *, capacity_bytes: int | None = None) -> Store:
        small = {} if capacity_bytes is None else {"capacity": capacity_bytes, "buffer": 2 * MIB, "segment_bytes": 256 * KIB}
        options = {"capacity": 256 * MIB, "segment_bytes": 8 * MIB, "buffer": 32 * MIB}
        self.rigs.append(Rig(self.clock, **(options | small | self.options)))
        return self.rigs[-1].store

    def rig_of(self, store: Store) -> Rig:
        return next(rig for rig in self.rigs if rig.store is store)

    def reopen(self, store: Store) -> Store:
        return self.rig_of(store).reopen()

    def damage(self, store: Store, space: BlockSpace, key: bytes) -> Store:
        rig = self.rig_of(store)
        reopened = rig.reopen()
        core = reopened._core
        entry = core.find([descriptor().digest + key])[0]
        assert entry is not None
        page = np.zeros(4096, np.uint8)
        file = rig.device.open(core.segments.path(entry.segment_id), "write")
        offset = entry.offset + 4096
        file.read(offset, [page]).result()
        page[1234] ^= 1
        file.write(offset, [page]).result()
        file.close()
        return reopened


class TestDiskStore(DiskConformance):
    pass


class TestDiskStoreWithoutCleanBlocks(DiskConformance):
    """Everything that was flushed is read from the device."""

    options: ClassVar[dict[str, object]] = {"serve_clean": False, "flush_after_s": 0.0}


def test_a_part_costs_the_drive_the_stripes_that_cover_it() -> None:
    rig = Rig(ManualClock(), capacity=64 * MIB, segment_bytes=8 * MIB, buffer=8 * MIB, serve_clean=False, codec="raw")
    space = rig.store.namespace(descriptor())
    assert space.put(b"k", np.zeros(4 * MIB, np.uint8)) and rig.store.flush()
    before = rig.store.stats()["io"]["memory"]["read_bytes"]
    job = space.submit_get_range([b"k"], [np.empty(300 * KIB, np.uint8)], MIB)
    assert job.wait(30.0) and job.statuses[0] is Status.HIT
    assert rig.store.stats()["io"]["memory"]["read_bytes"] - before == 512 * KIB + 4 * KIB  # two stripes and the header page
    assert rig.store.close()
