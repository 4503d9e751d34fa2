"""Opening a store whose segments are damaged: what is kept, and what must not be taken for the torn tail of a crash."""

from __future__ import annotations

import numpy as np
import pytest

from kvlode import Status
from kvlode.engine.reinsertion import file_reader
from kvlode.engine.testing import ManualClock
from kvlode.format.layout import PAGE_BYTES
from kvlode.format.walk import find_seal
from model import block_bytes, descriptor
from rig import KIB, MIB, Rig, put_blocks, read

SIZE = 6_000
RECORD_BYTES = 3 * PAGE_BYTES


@pytest.mark.parametrize("lose_index", [False, True])
def test_a_sealed_segment_that_lost_its_seal_is_damaged_and_not_cut_at_the_damage(lose_index: bool) -> None:
    rig = Rig(ManualClock(), capacity=16 * MIB, segment_bytes=256 * KIB, serve_clean=False, codec="raw", batch_bytes=128 * KIB)
    space = rig.store.namespace(descriptor(block_bytes_max=64 * KIB))
    put_blocks(space, 0, 60, SIZE)
    assert rig.store.flush(30.0)
    segment_id = rig.segment_of(space, b"filler 0")
    assert segment_id is not None
    inside = [n for n in range(60) if rig.segment_of(space, b"filler %d" % n) == segment_id]
    assert len(inside) < 60, "the segment is not sealed"
    path = rig.store._core.segments.path(segment_id)
    entries = rig.store._core.catalog.find([space.digest + b"filler %d" % n for n in inside])
    victim = len(inside) - 3  # of the last batch, with intact records behind it
    offset = entries[victim].offset  # type: ignore[union-attr]
    rig.close()
    size_bytes = rig.memory.status(path).size_bytes  # type: ignore[union-attr]
    for damaged in (offset, size_bytes - PAGE_BYTES):
        file = rig.memory.open(path, "write")
        file.write(damaged, [np.full(PAGE_BYTES, 0x5A, np.uint8)]).result()
        file.sync()
        file.close()
    assert find_seal(file_reader(rig.memory.open(path, "read")), size_bytes, store_uuid=bytes(16), segment_id=segment_id) is None
    rig.index = type(rig.index)() if lose_index else rig.index.reopen()
    space = rig.open().namespace(descriptor(block_bytes_max=64 * KIB))
    for place, number in enumerate(inside):
        key = b"filler %d" % number
        status, out = read(space, key, SIZE)
        if place == victim:
            assert status in (Status.CORRUPT, Status.MISS)
        else:
            assert status is Status.HIT, f"block {number} was flushed, intact, and is gone"
            assert np.array_equal(out, block_bytes(key, 4 * number, SIZE))
    assert rig.memory.status(path).size_bytes == size_bytes  # type: ignore[union-attr]
    rig.close()
