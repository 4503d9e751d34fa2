"""The buffer's memory is touched in the background: all of it, without changing it, and not for longer than it is wanted."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from kvlode.gds import prefault
from kvlode.gds.buffers import address_of, aligned_array
from kvlode.gds.prefault import Prefault

MIB = 1 << 20


def resident_bytes(address: int) -> int:
    """Memory that is there, of the mapping that holds ``address``."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds.group(1), 16) <= address < int(bounds.group(2), 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no mapping holds {address:#x}")


def test_all_of_a_memory_is_there_afterwards_and_keeps_its_bytes() -> None:
    array = aligned_array(24 * MIB + 4096)
    array[5 * MIB :: MIB] = 7
    before = array[5 * MIB :: MIB].copy()
    work = Prefault(array, step_bytes=3 * MIB)
    assert work.wait(30.0)
    if work.populated_bytes == 0:
        pytest.skip("this kernel does not know MADV_POPULATE_WRITE")
    assert work.populated_bytes == array.size
    assert resident_bytes(address_of(array)) >= array.size
    assert np.array_equal(array[5 * MIB :: MIB], before) and int(array[:4096].sum()) == 0
    assert work.stop(30.0)


def test_a_kernel_that_refuses_ends_the_work_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefault, "MADV_POPULATE_WRITE", 9999)
    work = Prefault(aligned_array(8 * MIB))
    assert work.wait(30.0) and work.populated_bytes == 0
    assert work.stop(30.0)


def test_stopping_ends_the_work_after_the_step_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    work: list[Prefault] = []

    def populate_once(address: int, length: int) -> bool:
        started.wait()
        work[0]._stopping = True
        return True

    started = prefault.threading.Event()
    monkeypatch.setattr(prefault, "_populate", populate_once)
    work.append(Prefault(aligned_array(8 * MIB), step_bytes=MIB))
    started.set()
    assert work[0].stop(30.0)
    assert work[0].populated_bytes == MIB
