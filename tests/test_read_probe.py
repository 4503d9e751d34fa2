"""A store that was only written to finds out how fast its drive reads, once, and nobody notices."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest

from kvlode import DeviceError, Status
from kvlode.engine.drive_rate import WINDOW_BYTES_MIN
from kvlode.engine.read_probe import PIECE_BYTES, PROBE_BYTES
from kvlode.engine.testing import ManualClock
from kvlode.gds.memory import MemoryFile
from model import descriptor
from rig import MIB, Rig, eventually

OPTIONS: dict[str, Any] = {
    "capacity": 512 * MIB,
    "buffer": 8 * MIB,
    "segment_bytes": 32 * MIB,
    "put_timeout_s": 30.0,
    "serve_clean": False,
}
BLOCK = (np.random.default_rng(1).standard_normal(MIB // 2, dtype=np.float32).view("<u4") >> 16).astype("<u2")
"""Numbers of bfloat16, which compress."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Offset and length of every read of several pages."""
    seen: list[tuple[int, int]] = []
    read = MemoryFile.read

    def count(self: MemoryFile, offset: int, buffers: list[Any]) -> Any:
        length = sum(memoryview(buffer).nbytes for buffer in buffers)
        if length == PIECE_BYTES:
            seen.append((offset, length))
        return read(self, offset, buffers)

    monkeypatch.setattr(MemoryFile, "read", count)
    return seen


def fill(rig: Rig, blocks: int) -> None:
    space = rig.store.namespace(descriptor("probed"))
    for number in range(blocks):
        assert space.put(b"%d" % number, BLOCK)
    assert rig.store.flush(60.0)


def test_a_store_that_was_only_written_to_learns_how_fast_its_drive_reads(reads: list[tuple[int, int]]) -> None:
    rig = Rig(ManualClock(), **OPTIONS)
    fill(rig, 160)
    reader = rig.store._core.reader
    assert eventually(lambda: reader.drive_rate.bytes_per_s is not None), "nobody has read, and nobody has measured"
    assert WINDOW_BYTES_MIN <= sum(length for _, length in reads) <= PROBE_BYTES
    probed = len(reads)
    fill(rig, 320)
    assert len(reads) == probed, "once is enough"
    rig.close()


@pytest.mark.parametrize(("options", "blocks"), [({"codec": "raw"}, 160), ({}, 40)])
def test_where_it_is_not_needed_or_too_little_is_stored_nothing_is_read(
    options: dict[str, Any], blocks: int, reads: list[tuple[int, int]]
) -> None:
    rig = Rig(ManualClock(), **(OPTIONS | options))
    fill(rig, blocks)
    assert not reads
    rig.close()


def test_a_drive_that_cannot_be_measured_costs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(ManualClock(), **OPTIONS)
    read, failed = MemoryFile.read, []

    def fail(self: MemoryFile, offset: int, buffers: list[Any]) -> Any:
        if sum(memoryview(buffer).nbytes for buffer in buffers) == PIECE_BYTES:
            failed.append(offset)
            raise DeviceError("read", self.path, errno=errno.EIO)
        return read(self, offset, buffers)

    monkeypatch.setattr(MemoryFile, "read", fail)
    fill(rig, 160)
    assert eventually(lambda: bool(failed))
    out = np.empty_like(BLOCK)
    assert rig.store.namespace(descriptor("probed")).get_into(b"0", out) is Status.HIT and np.array_equal(out, BLOCK)
    assert eventually(lambda: not rig.store._core._bounce.lent_slots), "memory was lent for ever"
    rig.close()
