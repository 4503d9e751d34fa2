"""Any damage at once: after a lossy repair the store is clean, serves no wrong byte, and has every block that was whole."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from fsck_fixtures import Lost, Place, changing_index, headers_of, healthy, places
from fsck_stores import StoreUnderTest
from kvlode import Status
from kvlode.engine.segment_writer import index_entry
from kvlode.format.layout import PAGE_BYTES, SEGMENTS_FOLDER, RecordType
from kvlode.tools.fsck.findings import ExitBit
from kvlode.tools.fsck.options import CheckOptions, Level
from kvlode.tools.fsck.plan import make_plan
from kvlode.tools.fsck.problems import Repair
from kvlode.tools.fsck.repair import repair_store
from kvlode.tools.index_access import GivenSource

BLOCKS = 18
KINDS = ("flip", "header", "zero page", "noise", "cut", "remove segment", "drop entry", "spoil entry", "superblock", "strange file")


@dataclasses.dataclass(frozen=True)
class Blow:
    """One piece of damage. ``where`` and ``how`` are taken modulo what there is."""

    kind: str
    where: int
    how: int


BLOWS = st.lists(st.builds(Blow, st.sampled_from(KINDS), st.integers(0, 1 << 20), st.integers(0, 1 << 20)), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def pristine() -> StoreUnderTest:
    return healthy(blocks=BLOCKS)


class Damaging:
    """Strikes a copy of a store, and knows afterwards which blocks may be gone."""

    def __init__(self, pristine: StoreUnderTest) -> None:
        self.target = pristine.copy()
        self._before = {segment_id: pristine.read(pristine.segment_path(segment_id)) for segment_id in pristine.segment_ids()}
        self._headers = {segment_id: headers_of(pristine, segment_id) for segment_id in self._before}
        self._places: dict[tuple[bytes, bytes], Place] = places(pristine)
        self._entries: set[tuple[bytes, bytes]] = set()

    def strike(self, blow: Blow) -> None:
        target = self.target
        ids = target.segment_ids()
        if blow.kind == "superblock":
            if target.device.status(target.superblock_path) is not None:
                target.flip(target.superblock_path, 40 + blow.where % 16)
            return
        if blow.kind == "strange file":
            target.replace(f"{target.path}/{SEGMENTS_FOLDER}/strange {blow.where}", b"what is this")
            return
        if blow.kind in ("drop entry", "spoil entry"):
            self._strike_entry(blow)
            return
        if not ids:
            return
        segment_id = ids[blow.where % len(ids)]
        self._strike_segment(blow, segment_id, target.segment_path(segment_id))

    def _strike_entry(self, blow: Blow) -> None:
        live = sorted((namespace.digest, key) for namespace, key in self.target.blocks)
        block = live[blow.where % len(live)]
        self._entries.add(block)
        if blow.kind == "drop entry":
            changing_index(self.target, deletes=[block[0] + block[1]])
            return
        entry = index_entry(self._places[block].header)
        assert entry is not None
        spoiled = entry._replace(payload_checksum=entry.payload_checksum ^ (1 + blow.how))
        changing_index(self.target, {block[0] + block[1]: spoiled.pack()})

    def _strike_segment(self, blow: Blow, segment_id: int, path: str) -> None:
        target = self.target
        size_bytes = len(target.read(path))
        if blow.kind == "remove segment":
            target.device.remove(path)
            target.device.sync_folder(path.rpartition("/")[0])
        elif blow.kind == "cut":
            target.truncate(path, blow.how % (size_bytes + 1))
        elif not size_bytes:
            return
        elif blow.kind == "flip":
            target.flip(path, blow.how % size_bytes, 1 << blow.where % 8)
        elif blow.kind == "header":
            headers = self._headers[segment_id]
            offset = headers[blow.how % len(headers)].offset + blow.how % PAGE_BYTES
            if offset < size_bytes:
                target.flip(path, offset, 0xFF)
        else:
            offset = blow.how % size_bytes // PAGE_BYTES * PAGE_BYTES
            length = min(PAGE_BYTES * (1 + blow.where % 4), size_bytes - offset)
            target.write(path, offset, bytes(length) if blow.kind == "zero page" else np.random.default_rng(blow.where).bytes(length))

    def damaged_blocks(self) -> Lost:
        """Blocks whose record is not as it was, or whose index entry is not."""
        lost: Lost = set()
        present = set(self.target.segment_ids())
        contents = {segment_id: self.target.read(self.target.segment_path(segment_id)) for segment_id in present}
        for namespace, key in self.target.blocks:
            place = self._places[namespace.digest, key]
            start, stop = place.offset, place.offset + place.header.record_bytes
            same = place.segment_id in present and contents[place.segment_id][start:stop] == self._before[place.segment_id][start:stop]
            if not same or (namespace.digest, key) in self._entries:
                lost.add((namespace, key))
        return lost

    def deletes_touched(self) -> bool:
        """Whether the record of a delete was hit: with the index lost as well, what it deleted may come back."""
        for segment_id, headers in self._headers.items():
            for header in headers:
                if header.record_type in (RecordType.TOMBSTONE, RecordType.NAMESPACE_DROP):
                    path = self.target.segment_path(segment_id)
                    if self.target.device.status(path) is None:
                        return True
                    page = self.target.read(path, header.offset, PAGE_BYTES)
                    if page != self._before[segment_id][header.offset : header.offset + PAGE_BYTES]:
                        return True
        return False


@settings(max_examples=60)
@given(BLOWS)
def test_any_damage_is_repaired_without_a_wrong_byte_or_a_lost_block(pristine: StoreUnderTest, blows: list[Blow]) -> None:
    damaging = Damaging(pristine)
    target = damaging.target
    for blow in blows:
        damaging.strike(blow)
    lost, deletes_touched = damaging.damaged_blocks(), damaging.deletes_touched()
    if not target.segment_ids():
        return  # a store without a segment says nothing that could be repaired
    source = GivenSource(target.device, target.path, target.index)
    options = CheckOptions(level=Level.FULL, now_ns=target.clock.now_ns())
    first = target.check(source=source)
    note(f"found: {[finding.text for finding in first.findings]}")
    note(make_plan(first, lossy=True).text)
    done = repair_store(target.device, target.path, first, options, source, lossy=True, now_ns=target.clock.now_ns())
    note(f"done: {done.actions}")
    target.index = source.index  # type: ignore[assignment]
    assert not done.errors and not done.undone
    second = target.check(source=source)
    assert second.exit_code == ExitBit.CLEAN, [finding.text for finding in second.findings]
    rebuilt = any(Repair.REBUILD_INDEX.value in action or "derived anew" in action for action in done.actions)
    if rebuilt and deletes_touched:
        target.gone.clear()
    store = target.open()
    try:
        unserved = {block for block, status in target.statuses(store).items() if status is not Status.HIT}
    finally:
        target.close(store)
    assert unserved <= lost, f"whole and not served: {sorted(key for _, key in unserved - lost)}"
