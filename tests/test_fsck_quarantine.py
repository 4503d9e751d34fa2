"""Quarantine: what is moved or copied there, its notes, and what the engine makes of the folder."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from kvlode.engine.recovery import quarantined_ids
from kvlode.engine.testing import ManualClock
from kvlode.format.layout import segment_name
from kvlode.gds.memory import MemoryDevice
from kvlode.tools.fsck.quarantine import Quarantine, Reason
from model import block_bytes, descriptor
from rig import KIB, MIB, Rig

STORE = "/store"
REASON = Reason(("SEG-ALIEN",), "nothing in it can be read", [(4096, 100)], [(4096, b"\x89page" + bytes(100))])
NOW_NS = 1_767_225_600_000_000_000


def device_with(content: dict[str, bytes]) -> MemoryDevice:
    device = MemoryDevice()
    for folder in ("segments", "quarantine"):
        device.make_folder(f"{STORE}/{folder}")
    for name, data in content.items():
        write(device, f"{STORE}/{name}", data)
    return device


def write(device: MemoryDevice, path: str, data: bytes) -> None:
    file = device.open(path, "create")
    if data:
        file.write(0, [bytearray(data)]).result()
    file.sync()
    file.close()
    device.sync_folder(path.rpartition("/")[0])


def read(device: MemoryDevice, path: str) -> bytes:
    file = device.open(path, "read")
    data = np.zeros(file.status().size_bytes, np.uint8)
    file.read(0, [data]).result()
    file.close()
    return data.tobytes()


def test_a_file_that_is_set_aside_keeps_its_bytes_and_has_a_note() -> None:
    name = segment_name(7)
    device = device_with({f"segments/{name}": b"damaged" * 1000})
    moved = Quarantine(device, STORE, NOW_NS).set_aside(f"segments/{name}", REASON)
    assert moved == f"quarantine/{name}"
    after = device.crash(keep="none")
    assert after.list_folder(f"{STORE}/segments") == []
    assert read(after, f"{STORE}/{moved}") == b"damaged" * 1000
    note = json.loads(read(after, f"{STORE}/{moved}.json"))
    assert note["from"] == f"segments/{name}" and note["problems"] == ["SEG-ALIEN"] and note["ranges"] == [[4096, 100]]
    assert note["headers"] == [{"offset": 4096, "hex": b"\x89page".hex()}]
    assert note["first_page"] == (b"damaged" * 1000)[:4096].hex() and note["time"] == "2026-01-01T00:00:00+00:00"


def test_saved_bytes_are_those_of_the_range_and_the_file_is_untouched() -> None:
    name = f"segments/{segment_name(3)}"
    content = bytes(range(256)) * 64
    device = device_with({name: content})
    file = device.open(f"{STORE}/{name}", "read")
    saved = Quarantine(device, STORE, NOW_NS).save(file, name, 4096, 8192, REASON)
    file.close()
    after = device.crash(keep="none")
    assert read(after, f"{STORE}/{saved}") == content[4096 : 4096 + 8192]
    assert read(after, f"{STORE}/{name}") == content
    note = json.loads(read(after, f"{STORE}/{saved}.json"))
    assert (note["offset"], note["length"], note["saved_bytes"]) == (4096, 8192, 8192)


def test_nothing_in_quarantine_is_written_over() -> None:
    name = segment_name(7)
    device = device_with({f"segments/{name}": b"second", f"quarantine/{name}": b"first", f"quarantine/{name}.2.json": b"{}"})
    moved = Quarantine(device, STORE, NOW_NS).set_aside(f"segments/{name}", REASON)
    assert moved == f"quarantine/{name}.3"
    assert read(device, f"{STORE}/quarantine/{name}") == b"first"
    assert read(device, f"{STORE}/{moved}") == b"second"


@pytest.mark.parametrize("name", [segment_name(0x50), segment_name(0x50) + ".2", f"{segment_name(0x50)}.{4096:016x}.bytes"])
def test_ids_of_quarantined_segments_are_never_given_again(name: str, rig: Rig) -> None:
    rig.close()
    device = rig.device
    write(device, f"{STORE}/quarantine/{name}", b"damaged")
    write(device, f"{STORE}/quarantine/{name}.json", b"{}")
    assert set(quarantined_ids(device, f"{STORE}/quarantine")) == {0x50}
    rig.index = rig.index.reopen()
    store = rig.open()
    assert store.namespace(descriptor(block_bytes_max=64 * KIB)).put(b"key", block_bytes(b"key", 1, 4 * KIB))
    assert store.flush()
    assert max(segment.segment_id for segment in store._core.segments.all()) == 0x51


def test_the_bytes_in_quarantine_count_against_the_capacity(rig: Rig) -> None:
    write(rig.device, f"{STORE}/quarantine/{segment_name(9)}", b"x" * MIB)
    core = rig.store._core
    assert core._quarantine_bytes() == MIB
    assert core.budget.for_segments(0, MIB) == core.budget.for_segments(0, 0) - MIB


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(ManualClock())
    yield made
    made.close()
