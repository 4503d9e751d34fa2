"""What every adapter must do, whatever its engine calls it: inherit ``AdapterConformance`` and say how the engine drives it.

An ``Engine`` is one running instance of an inference engine as far as its storage tier is concerned. Blocks are named by small
integers; a prefix is a list of them. The store is the real one, in a folder; where a drive has to be slow or to fail, it is on
a device in memory instead. Adapters open either by their settings, as in production.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from kvlode import DiskStore, InvalidConfig
from kvlode.adapters import attached
from kvlode.engine.testing import open_on_device
from kvlode.gds.device import Device
from kvlode.gds.late import LateDevice
from kvlode.gds.memory import MemoryDevice
from kvlode.gds.testing import Effect, Fault, FaultyDevice
from kvlode.tools.damage import damage_payloads

WAIT_S = 30.0
"""Longer than anything here takes; reached only by a defect."""
LOAD_TIMEOUT_S = 1.0
PREFIX = tuple(range(8))


class Engine(Protocol):
    """One instance of an engine with the adapter under test. Nothing may raise, or wait longer than a few seconds."""

    def store(self, prefix: Sequence[int]) -> None:
        """Offer the blocks of a prefix, ``content(block)`` each, and wait until the adapter has let go of their memory."""

    def flush(self) -> None:
        """Make durable what was stored."""

    def lookup(self, prefix: Sequence[int]) -> int:
        """Length of the run, from the front, that the engine would restore; asks again while the adapter says so."""

    def load(self, prefix: Sequence[int]) -> list[np.ndarray | None]:
        """Restore blocks: the bytes of each, or ``None`` where the adapter reported that it has not got it."""

    def stop(self) -> None:
        """End the instance, with whatever is under way."""


class AdapterConformance:
    """See the module."""

    takes_sets = False
    """Whether ``path`` may be a list of folders."""
    refusal: type[Exception] = InvalidConfig
    """What wrong settings end in."""

    def start(self, options: dict[str, Any], *, model: str = "model", dtype: str = "bfloat16", rank: int = 0, world: int = 1) -> Engine:
        """A new instance. ``options`` are the adapter's settings (``path`` and the store's); add ``load_timeout_s=LOAD_TIMEOUT_S``
        where the adapter has such a setting."""
        raise NotImplementedError

    def content(self, block: int) -> np.ndarray:
        """The bytes (``uint8``) of a block as an instance stores them."""
        raise NotImplementedError

    # --- helpers ------------------------------------------------------------------------------------------------------

    def on_device(self, monkeypatch: pytest.MonkeyPatch, device: Device) -> dict[str, Any]:
        """Options with which adapters open the real store on ``device``."""

        def open_there(path: str, config: Any) -> DiskStore:
            return open_on_device(device)

        monkeypatch.setattr(attached, "open_store", open_there)
        return {"path": "/store"}

    def stored_and_reopened(self, options: dict[str, Any]) -> Engine:
        """A new instance on what another one has stored: ``PREFIX``, on the drive and in no buffer."""
        engine = self.start(options)
        engine.store(PREFIX)
        engine.flush()
        engine.stop()
        return self.start(options)

    def assert_loads(self, engine: Engine, prefix: Sequence[int]) -> None:
        for block, found in zip(prefix, engine.load(prefix), strict=True):
            assert found is not None, f"block {block} is missing"
            assert np.array_equal(np.asarray(found).reshape(-1).view(np.uint8), self.content(block)), f"block {block}"

    def assert_right_or_absent(self, engine: Engine, prefix: Sequence[int]) -> int:
        """No wrong byte; how many blocks came."""
        found = engine.load(prefix)
        for block, data in zip(prefix, found, strict=True):
            assert data is None or np.array_equal(np.asarray(data).reshape(-1).view(np.uint8), self.content(block)), f"block {block}"
        return sum(data is not None for data in found)

    # --- tests --------------------------------------------------------------------------------------------------------

    def test_a_prefix_survives_a_restart(self, options: dict[str, Any]) -> None:
        first = self.start(options)
        assert first.lookup(PREFIX) == 0
        first.store(PREFIX)
        first.flush()
        first.stop()
        second = self.start(options)
        assert second.lookup(PREFIX) == len(PREFIX)
        self.assert_loads(second, PREFIX)
        second.stop()

    def test_a_part_of_a_prefix_is_restored(self, options: dict[str, Any]) -> None:
        engine = self.start(options)
        engine.store(PREFIX[:5])
        engine.flush()
        assert engine.lookup(PREFIX) == 5
        self.assert_loads(engine, PREFIX[:5])
        engine.stop()

    def test_a_miss_in_the_middle_ends_the_run(self, options: dict[str, Any]) -> None:
        engine = self.start(options)
        engine.store(PREFIX[:3])
        engine.store(PREFIX[4:])
        engine.flush()
        assert engine.lookup(PREFIX) == 3
        found = engine.load(PREFIX)
        assert [data is None for data in found[:4]] == [False, False, False, True]
        engine.stop()

    def test_a_damaged_block_is_a_miss_and_no_wrong_byte(self, options: dict[str, Any]) -> None:
        engine = self.start(options)
        engine.store(PREFIX)
        engine.flush()
        engine.stop()
        assert damage_payloads(Path(options["path"]))
        again = self.start(options)
        assert self.assert_right_or_absent(again, PREFIX) == 0
        assert again.lookup(PREFIX) == 0, "what was found damaged is offered again"
        again.store(PREFIX)  # computed again
        again.flush()
        self.assert_loads(again, PREFIX)
        again.stop()

    def test_a_store_that_is_full_takes_the_newest(self, options: dict[str, Any]) -> None:
        engine = self.start(options | {"capacity": "64MiB", "buffer": "8MiB"})
        size = self.content(0).nbytes
        blocks = list(range(max(16, 3 * (64 << 20) // size)))
        for start in range(0, len(blocks), 16):
            engine.store(blocks[start : start + 16])
        engine.flush()
        assert self.assert_right_or_absent(engine, blocks[start:]) > 0  # as it was stored: keys may depend on the blocks before
        self.assert_right_or_absent(engine, blocks[:16])
        engine.stop()

    def test_a_store_that_failed_is_misses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = FaultyDevice(MemoryDevice())
        engine = self.start(self.on_device(monkeypatch, device))
        engine.store(PREFIX[:4])
        engine.flush()
        device.inject(Fault("write", times=None))
        device.inject(Fault("sync", times=None))
        engine.store(PREFIX[4:])
        engine.flush()
        engine.store(PREFIX[4:])
        assert engine.lookup(PREFIX) >= 4
        assert self.assert_right_or_absent(engine, PREFIX) >= 4
        engine.stop()

    def test_a_drive_that_fails_to_read_is_misses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = FaultyDevice(MemoryDevice())
        options = self.on_device(monkeypatch, device)
        engine = self.stored_and_reopened(options)
        device.inject(Fault("read", times=None))
        assert self.assert_right_or_absent(engine, PREFIX) == 0
        device.clear()
        engine.stop()

    def test_a_bit_that_the_drive_flips_is_a_miss(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = FaultyDevice(MemoryDevice())
        options = self.on_device(monkeypatch, device)
        engine = self.stored_and_reopened(options)
        device.inject(Fault("read", Effect.BIT_FLIP, times=None))
        assert self.assert_right_or_absent(engine, PREFIX) < len(PREFIX)
        device.clear()
        engine.stop()

    def test_a_drive_that_hangs_costs_a_deadline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        late = LateDevice(MemoryDevice(), holding=())
        options = self.on_device(monkeypatch, late)
        engine = self.stored_and_reopened(options)
        late.hold("read")
        releasing = threading.Timer(3 * LOAD_TIMEOUT_S, late.release)  # an adapter over lent memory may wait for the drive itself
        releasing.start()
        started_s = time.monotonic()
        try:
            self.assert_right_or_absent(engine, PREFIX)
            assert time.monotonic() - started_s < WAIT_S
        finally:
            releasing.cancel()
            late.hold()
            late.release()
        engine.stop()

    def test_an_instance_may_end_with_jobs_under_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        late = LateDevice(MemoryDevice(), holding=())
        engine = self.start(self.on_device(monkeypatch, late))
        engine.store(PREFIX)
        engine.flush()
        late.hold("read", "write")
        loading = threading.Thread(target=engine.load, args=(PREFIX,))
        loading.start()
        stopping = threading.Thread(target=engine.stop)
        stopping.start()
        late.hold()
        late.release()
        for thread in (loading, stopping):
            thread.join(WAIT_S)
            assert not thread.is_alive(), "it hangs"

    def test_a_list_of_folders_is_a_store_set_or_is_refused(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"path": [str(tmp_path / "one"), str(tmp_path / "two")], "own": 2}
        if not self.takes_sets:
            with pytest.raises(self.refusal):
                self.start(options)
            return
        engine = self.stored_and_reopened(options)
        self.assert_loads(engine, PREFIX)
        assert all(list((tmp_path / name / "segments").iterdir()) for name in ("one", "two")), "both have blocks"
        engine.stop()
        shutil.rmtree(tmp_path / "two")
        engine = self.start(options)
        assert 0 < self.assert_right_or_absent(engine, PREFIX) < len(PREFIX)
        engine.stop()

    def test_two_instances_share_a_store(self, options: dict[str, Any]) -> None:
        first, second = self.start(options), self.start(options)
        first.store(PREFIX)
        first.flush()
        assert second.lookup(PREFIX) == len(PREFIX)
        self.assert_loads(second, PREFIX)
        first.stop()
        self.assert_loads(second, PREFIX)
        second.stop()

    @pytest.mark.parametrize("other", [{"model": "another"}, {"dtype": "float16"}, {"rank": 1, "world": 2}], ids=["model", "dtype", "rank"])
    def test_blocks_of_another_kind_are_never_found(self, options: dict[str, Any], other: dict[str, Any]) -> None:
        engine = self.start(options)
        engine.store(PREFIX)
        engine.flush()
        engine.stop()
        engine = self.start(options, **other)
        assert engine.lookup(PREFIX) == 0
        assert all(data is None for data in engine.load(PREFIX))
        engine.stop()

    def test_a_store_that_cannot_be_opened_is_misses(self, options: dict[str, Any], tmp_path: Path) -> None:
        Path(options["path"]).write_text("no folder")
        engine = self.start(options)
        engine.store(PREFIX)
        engine.flush()
        assert engine.lookup(PREFIX) == 0
        assert all(data is None for data in engine.load(PREFIX))
        engine.stop()
