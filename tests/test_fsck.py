"""``kvlode fsck``: healthy stores are clean at every level, every flipped byte is found, and nothing stops it without a summary."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fsck_fixtures import seal_of
from fsck_stores import BLOCK_BYTES_MAX, DROPPED, ONE, SEGMENT_BYTES, TWO, StoreUnderTest, fill, in_folder, in_memory, tiny
from kvlode.engine.config import parse_bytes
from kvlode.engine.index_memory import MemoryIndex
from kvlode.format.errors import InvalidConfig, PathUnavailable, StoreLocked
from kvlode.format.layout import LOCK_NAME, PAGE_BYTES, RecordType, segment_name
from kvlode.format.record import RecordHeader
from kvlode.format.seal import SealTable
from kvlode.format.segment import SegmentHeader
from kvlode.format.walk import find_seal
from kvlode.gds.memory import MemoryDevice
from kvlode.gds.testing import Fault, FaultyDevice, Open, RecordingDevice, Sync, Truncate, Write
from kvlode.tools.fsck.findings import ExitBit, Report
from kvlode.tools.fsck.options import CheckOptions, Level, Sample, Stop
from kvlode.tools.fsck.problems import PROBLEMS, Repair, Severity
from kvlode.tools.fsck.progress import JsonProgress, amount_text
from kvlode.tools.fsck.run import check_store
from kvlode.tools.index_access import GivenSource
from model import block_bytes

LEVELS = (Level.QUICK, Level.WALK, Level.SAMPLE, Level.FULL)
HALF = Sample.parse("50%")


def ids(report: Report) -> set[str]:
    return set(report.counts)


def check_at(target: StoreUnderTest, level: Level) -> Report:
    return target.check(level, sample=HALF if level is Level.SAMPLE else None)


def assert_clean(target: StoreUnderTest, *, notes: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """No problem at any level, no note but those given, and --full reads every byte there is."""
    for level in LEVELS:
        report = check_at(target, level)
        assert ids(report) <= notes, [finding.text for finding in report.findings]
        assert report.exit_code == 0 and not report.errors
        assert report.coverage.segments_checked == report.coverage.segments_present
    assert report.coverage.complete
    assert report.coverage.bytes_checked > 0


def table_of(target: StoreUnderTest, segment_id: int) -> SealTable:
    data = target.read(target.segment_path(segment_id))
    uuid = target.read(target.superblock_path)[40:56]
    found = find_seal(lambda offset, length: data[offset : offset + length], len(data), store_uuid=uuid, segment_id=segment_id)
    assert found is not None
    return found[1]


def records_of(target: StoreUnderTest, segment_id: int) -> list[RecordHeader]:
    """Headers that the table of contents lists."""
    path = target.segment_path(segment_id)
    pages = (table_of(target, segment_id).page.astype(int) * PAGE_BYTES).tolist()
    return [RecordHeader.parse(target.read(path, offset, PAGE_BYTES)) for offset in pages]


# --- healthy stores ---------------------------------------------------------------------------------------------------------


def test_a_store_with_all_there_is_is_clean() -> None:
    target = fill(in_memory())
    assert len(target.segment_ids()) > 4
    assert_clean(target)


def test_a_store_in_a_folder_is_clean_and_the_check_leaves_no_trace(tmp_path: Path) -> None:
    target = fill(in_folder(tmp_path / "store"))
    (tmp_path / "store" / LOCK_NAME).unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    assert_clean(target)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before
    target.assert_serves_everything()


def test_an_empty_store_is_clean() -> None:
    report = in_memory().check()
    assert not report.counts and report.exit_code == 0 and report.coverage.complete


def test_a_store_that_has_reclaimed_and_reinserted_is_clean() -> None:
    target = in_memory(capacity=4 << 20, reinsert_hits_min=1)
    store = target.open()
    target.put(store, ONE, b"hot", 0, 5000)
    assert store.flush()
    for number in range(250):
        assert store.namespace(TWO).put(b"filler %d" % number, block_bytes(b"filler %d" % number, 4 * number, BLOCK_BYTES_MAX))
        store.namespace(ONE).touch([b"hot"])
        if number % 10 == 0:
            assert store.flush()
    assert store.flush()
    counters = store.stats()["counters"]
    target.close(store)
    assert counters["segments_freed"] > 0 and counters["reinserted_blocks"] > 0
    assert_clean(target, notes={"IDX-FREEING"})
    target.assert_serves_everything()


def test_blocks_of_a_segment_that_is_being_freed_are_a_note_and_others_are_orphans() -> None:
    target = fill(in_memory())
    assert target.index is not None
    oldest, newer = target.segment_ids()[0], target.segment_ids()[2]
    for segment_id in (oldest, newer):
        blocks = [h for h in records_of(target, segment_id) if h.record_type is RecordType.BLOCK and (ONE, h.key) in target.blocks]
        target.index.apply([], [blocks[0].namespace + blocks[0].key])
    report = target.check(Level.WALK)
    assert ids(report) == {"IDX-FREEING", "IDX-ORPHAN"}
    assert [f.segment_id for f in report.findings if f.id == "IDX-ORPHAN"] == [newer]


def test_holes_under_deleted_blocks_are_a_purge_and_under_others_damage() -> None:
    target = fill(in_memory())
    deleted = next(h for i in target.segment_ids() for h in records_of(target, i) if h.key == b"key 004" and h.namespace == ONE.digest)
    live = next(h for i in target.segment_ids() for h in records_of(target, i) if h.key == b"key 000")
    punch(target, deleted)
    assert_clean(target)
    punch(target, live)
    report = target.check(Level.WALK)
    assert [(f.id, f.segment_id, f.offset) for f in report.findings] == [("REC-HDR-CRC", live.segment_id, live.offset)]


def test_a_half_punched_deleted_block_is_no_damage() -> None:
    target = fill(in_memory())
    deleted = next(h for i in target.segment_ids() for h in records_of(target, i) if h.key == b"key 004" and h.namespace == ONE.digest)
    assert deleted.record_bytes > 3 * PAGE_BYTES
    punch(target, deleted, start=2 * PAGE_BYTES)
    assert_clean(target)


def punch(target: StoreUnderTest, header: RecordHeader, start: int = 0) -> None:
    file = target.device.open(target.segment_path(header.segment_id), "write")
    file.punch(header.offset + start, header.record_bytes - start)
    file.sync()
    file.close()


def test_expired_blocks_are_no_problem_whether_the_index_knows_them_or_not() -> None:
    target = fill(in_memory())
    store = target.open()
    out = np.zeros(9000, np.uint8)
    store.namespace(ONE).get_into(b"short-lived", out)
    target.close(store)
    assert_clean(target)


def crashed(seed: int) -> StoreUnderTest:
    """What a power cut leaves of a store in the middle of a random history."""
    rng = random.Random(seed)
    target = in_memory(capacity=rng.choice((4 << 20, 64 << 20)), reinsert_hits_min=1)
    store = target.open()
    for number in range(rng.randrange(5, 200)):
        space = store.namespace(rng.choice((ONE, TWO, DROPPED)))
        key = b"key %d" % rng.randrange(100)
        action = rng.random()
        if action < 0.8:
            space.put(key, block_bytes(key, number, rng.choice((100, 5000, 20_000, BLOCK_BYTES_MAX))), ttl=rng.choice((None, None, 5.0)))
        elif action < 0.88:
            space.delete([key])
        elif action < 0.9:
            store.namespace(DROPPED).drop()
        elif action < 0.95:
            store.flush()
        else:
            space.touch([key, key])
    assert isinstance(target.device, MemoryDevice) and target.index is not None
    target.device.power_off()
    index = target.index.crash(rng.randrange(target.index.unsynced_batches + 1))
    device = target.device.crash(seed, rng.choice(("none", "random", "random", "all")))
    store.close(30.0)
    return dataclasses.replace(target, device=device, index=index)


@pytest.mark.parametrize("number", range(8))
def test_what_a_power_cut_leaves_is_no_problem_and_recovery_leaves_not_even_a_note(number: int, seed: int) -> None:
    target = crashed(seed + number)
    report = target.check()
    assert report.problems == 0 and not report.errors, (seed + number, [finding.text for finding in report.findings])
    assert report.coverage.complete
    target.close(target.open())
    assert_clean(target, notes={"IDX-FREEING"})


def test_recovery_makes_a_seal_durable_before_it_cuts_the_file_to_it() -> None:
    target = in_memory()
    store = target.open()
    target.put(store, ONE, b"key", 0, 5000)
    assert store.flush()
    assert isinstance(target.device, MemoryDevice) and target.index is not None
    target.device.power_off()
    survivor, index = target.device.crash(), target.index.crash()
    store.close(30.0)
    recording = RecordingDevice(survivor)
    torn = dataclasses.replace(target, device=recording, index=index)
    torn.close(torn.open())
    path = torn.segment_path(1)
    log = recording.log.snapshot()
    handles = {step.file for step in log if isinstance(step, Open) and step.path == path}
    steps = [type(step) for step in log if isinstance(step, (Write, Sync, Truncate)) and step.file in handles]
    assert Truncate in steps
    assert steps[steps.index(Truncate) - 1] is Sync


def test_ranges_that_recovery_has_cut_out_are_dead_space() -> None:
    target = in_memory()
    store = target.open()
    for number in range(3):
        target.put(store, ONE, b"key %d" % number, 0, 5000)
        assert store.flush()  # the header of the next record says that this one is durable
    assert isinstance(target.device, MemoryDevice) and target.index is not None
    target.device.power_off()
    survivor, index = target.device.crash(), target.index.crash()
    store.close(30.0)
    torn = dataclasses.replace(target, device=survivor, index=index)
    second = 3 * PAGE_BYTES + 3 * PAGE_BYTES
    torn.flip(torn.segment_path(1), second + 300)
    report = torn.check()
    assert ids(report) - {"SEG-SPARE"} == {"SEG-UNSEALED", "REC-GAP", "IDX-DANGLING"}
    torn.index = type(index)()  # so that recovery walks
    torn.close(torn.open())
    torn.forget(ONE, b"key 1")
    assert_clean(torn)


# --- damage -----------------------------------------------------------------------------------------------------------------


FLIPS = 210
"""Of the default run; the slow test does all of them."""


def flipped(target: StoreUnderTest, path: str, offset: int, mask: int) -> Report:
    """Check with one byte changed, and put it back."""
    target.flip(path, offset, mask)
    try:
        return target.check()
    finally:
        target.flip(path, offset, mask)


def files_of(target: StoreUnderTest) -> list[str]:
    return [target.superblock_path, *(target.segment_path(segment_id) for segment_id in target.segment_ids())]


def assert_found(report: Report, path: str, offset: int, mask: int) -> None:
    name = path.removeprefix("/store/")
    hits = [f for f in report.findings if f.path == name and (f.offset or 0) <= offset < (f.offset or 0) + (f.length or 0)]
    assert hits, f"byte {offset} of {name} xor {mask:#x}: {[finding.text for finding in report.findings]}"
    assert report.coverage.complete and not report.errors
    assert all(finding.text for finding in report.findings)


def test_a_flipped_byte_is_found_where_it_is(seed: int) -> None:
    target, rng = tiny(), random.Random(seed)
    places = [(path, offset) for path in files_of(target) for offset in range(len(target.read(path)))]
    full = {path: target.read(path) for path in files_of(target)}
    meaningful = [place for place in places if full[place[0]][place[1]]]
    for path, offset in rng.sample(meaningful, 2 * FLIPS // 3) + rng.sample(places, FLIPS // 3):
        mask = 1 << rng.randrange(8)
        assert_found(flipped(target, path, offset, mask), path, offset, mask)
    assert not target.check().counts


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_every_flipped_byte_is_found_where_it_is(seed: int) -> None:
    """All bytes of a store. Pages that do not hide each other's damage are damaged at once: one page of each record, for example."""
    target, rng = tiny(), random.Random(seed)
    segment = target.segment_path(1)
    headers = records_of(target, 1)
    data_end = headers[-1].offset + headers[-1].record_bytes
    size = len(target.read(segment))
    payloads = [[h.offset + n * PAGE_BYTES for h in headers if n * PAGE_BYTES < h.record_bytes] for n in (1, 2, 3)]
    seal, table, trailer = [data_end], list(range(data_end + PAGE_BYTES, size - PAGE_BYTES, PAGE_BYTES)), [size - PAGE_BYTES]
    rounds = [[(segment, page) for page in pages] for pages in (payloads[1] + [0], payloads[2] + seal, table, trailer)]
    rounds.append([(segment, h.offset) for h in headers])
    rounds.append([(segment, page) for page in payloads[0]] + [(target.superblock_path, 0)])
    assert sum(map(len, rounds)) == size // PAGE_BYTES + 1
    for places in rounds:
        for offset in range(PAGE_BYTES):
            masks = [(path, page + offset, rng.randrange(1, 256)) for path, page in places]
            for flip in masks:
                target.flip(*flip)
            report = target.check()
            for flip in masks:
                target.flip(*flip)
                assert_found(report, *flip)


def test_a_flipped_byte_never_hides_the_other_blocks(seed: int) -> None:
    target, rng = fill(in_memory()), random.Random(seed)
    for segment_id in target.segment_ids():
        path = target.segment_path(segment_id)
        offset = rng.randrange(len(target.read(path)))
        report = flipped(target, path, offset, 1)
        assert report.counts and {f.path for f in report.findings} <= {f"segments/{segment_name(segment_id)}"}


def test_a_block_whose_bytes_were_wrong_before_they_were_encoded_is_found() -> None:
    target = tiny()
    header = next(h for h in records_of(target, 1) if h.key == b"key 0")
    wrong = dataclasses.replace(header, raw_checksum=header.raw_checksum ^ 1)
    page = bytearray(PAGE_BYTES)
    wrong.pack_into(page)
    target.write(target.segment_path(1), header.offset, bytes(page))
    assert [f.id for f in target.check().findings] == ["PAY-RAW"]
    assert not target.check(Level.WALK).counts


def test_a_stripe_with_the_right_checksum_that_cannot_be_decoded_is_found() -> None:
    from kvlode.format.checksum import xxh3_64

    target = tiny()
    path = target.segment_path(1)
    header = next(h for h in records_of(target, 1) if h.key == b"key 2")
    assert header.codec
    length = int(header.stripes["stored_length"][0])
    stored = bytearray(target.read(path, header.offset + PAGE_BYTES, length))
    stored[:4] = b"none"
    stripes = header.stripes.copy()
    stripes["checksum"][0] = xxh3_64(bytes(stored))
    page = bytearray(PAGE_BYTES)
    dataclasses.replace(header, stripes=stripes).pack_into(page)
    target.write(path, header.offset, bytes(page) + bytes(stored))
    found = target.check()
    assert {"PAY-DECODE", "SEG-SEAL-MISMATCH"} == ids(found)


def test_an_orphan_that_is_damaged_is_damage_and_not_an_orphan() -> None:
    target = tiny()
    assert target.index is not None
    header = next(h for h in records_of(target, 1) if h.key == b"key 1")
    target.index.apply([], [header.namespace + header.key])
    assert ids(target.check(Level.WALK)) == {"IDX-ORPHAN"}
    target.flip(target.segment_path(1), header.offset + PAGE_BYTES + 5)
    assert ids(target.check(Level.WALK)) == {"PAY-CRC"}


def test_random_damage_of_many_bytes_never_raises_and_is_always_found(seed: int) -> None:
    base, rng = fill(in_memory(), blocks=12), random.Random(seed)
    for _ in range(12):
        target = base.copy()
        path = rng.choice(files_of(target))
        size = len(target.read(path))
        offset = rng.randrange(size)
        target.write(path, offset, rng.randbytes(min(rng.choice((2, 100, 5000, 60_000)), size - offset)))
        for level in LEVELS:
            report = check_at(target, level)
            assert not report.errors
            [finding.text for finding in report.findings]
        assert report.counts, (path, offset)


def test_arbitrary_files_in_the_place_of_segments_are_one_finding_each(seed: int) -> None:
    rng = random.Random(seed)
    contents = [
        b"",
        bytes(10 * PAGE_BYTES),
        rng.randbytes(100),
        rng.randbytes(20 * PAGE_BYTES),
        rng.randbytes(PAGE_BYTES) + bytes(PAGE_BYTES),
    ]
    for content, expected in zip(contents, ("SEG-BLANK", "SEG-BLANK", "SEG-ALIEN", "SEG-ALIEN", "SEG-ALIEN"), strict=True):
        target = fill(in_memory(), blocks=8)
        target.replace(target.segment_path(target.segment_ids()[0]), content)
        report = target.check()
        assert expected in ids(report), report.findings
        assert ids(report) <= {expected, "IDX-DANGLING"}


@pytest.mark.parametrize(("torn", "proven"), [(False, "SEG-BLANK"), (True, "SEG-ALIEN")])
def test_records_of_a_later_segment_alone_do_not_say_that_this_one_was_written(torn: bool, proven: str) -> None:
    """Writes to both were in flight when the power failed; the index knows better where it has a checkpoint behind them."""
    target = fill(in_memory())
    before, last = target.segment_ids()[-2:]
    trailer, _ = seal_of(target, last)
    made_bytes = SegmentHeader.parse(target.read(target.segment_path(last))[:PAGE_BYTES]).segment_bytes
    unsealed = target.read(target.segment_path(last))[: trailer.data_end]
    target.replace(target.segment_path(last), unsealed + bytes(made_bytes - len(unsealed)))
    header_page = bytearray(target.read(target.segment_path(before))[:PAGE_BYTES])
    header_page[-1] ^= 1
    target.replace(target.segment_path(before), bytes(header_page) if torn else b"")
    assert proven in ids(target.check())
    report = target.check(source=GivenSource(target.device, target.path, MemoryIndex()))
    assert "SEG-EMPTY" in ids(report) and proven not in ids(report), report.findings


def test_a_segment_of_another_store_is_recognised() -> None:
    target, other = fill(in_memory(), blocks=8), fill(in_memory(), blocks=8)
    target.replace(target.segment_path(1), other.read(other.segment_path(1)))
    report = target.check()
    assert {"SEG-HDR-PLACE", "IDX-DANGLING"} == ids(report)
    assert next(f for f in report.findings if f.id == "SEG-HDR-PLACE").facts["store_uuid"] == other.read(other.superblock_path)[40:56].hex()


def test_a_segment_under_the_name_of_another_is_recognised() -> None:
    target = fill(in_memory(), blocks=8)
    target.replace(target.segment_path(900), target.read(target.segment_path(1)))
    assert ids(target.check()) == {"SEG-HDR-PLACE"}


@pytest.mark.parametrize("keep_pages", [1, 2, 5, 9])
def test_a_cut_segment_says_so_and_names_what_is_gone(keep_pages: int) -> None:
    target = fill(in_memory())
    segment_id = target.segment_ids()[1]
    lost = [h for h in records_of(target, segment_id) if h.offset + h.record_bytes > keep_pages * PAGE_BYTES]
    target.truncate(target.segment_path(segment_id), keep_pages * PAGE_BYTES)
    report = target.check()
    assert report.counts["SEG-CUT"] == 1 or report.counts["SEG-BLANK"] == 1
    dangling = {f.ident for f in report.findings if f.id == "IDX-DANGLING"}
    live = {h.namespace + h.key for h in lost if any(h.key == key for _, key in target.blocks)}
    assert dangling == live & dangling and dangling


# --- the index --------------------------------------------------------------------------------------------------------------


def test_entries_that_point_nowhere_are_named() -> None:
    target = fill(in_memory())
    assert target.index is not None
    known, value = next((ident, value) for ident, value in target.index.scan() if ident[:16] != bytes(16))
    target.index.apply([(known[:16] + b"invented", value)])
    report = target.check(Level.WALK)
    assert [(f.id, f.ident) for f in report.findings] == [("IDX-DANGLING", known[:16] + b"invented")]
    target.device.remove(target.segment_path(target.segment_ids()[0]))
    assert "IDX-DANGLING" in ids(target.check(Level.QUICK))


def test_deleted_blocks_that_would_still_be_served_are_named() -> None:
    target = fill(in_memory())
    assert target.index is not None
    from kvlode.engine.segment_writer import index_entry

    deleted = next(
        h for i in target.segment_ids() for h in records_of(target, i) if h.key == b"key 004" and h.record_type is RecordType.BLOCK
    )
    entry = index_entry(deleted)
    assert entry is not None
    target.index.apply([(deleted.namespace + deleted.key, entry.pack())])
    assert [(f.id, f.ident) for f in target.check(Level.WALK).findings] == [("IDX-DELETED", deleted.namespace + deleted.key)]


def test_a_store_without_its_index_is_checked_all_the_same(tmp_path: Path) -> None:
    target = fill(in_folder(tmp_path / "store"))
    (tmp_path / "store" / "index").rename(tmp_path / "gone")
    report = target.check()
    assert ids(report) == {"IDX-MISSING"} and report.coverage.complete
    report = check_store(target.device, target.path, CheckOptions(level=Level.FULL), None)
    assert not report.counts and "no index was given" in report.skipped["segments -> index"]


@pytest.mark.parametrize("name", ["CURRENT", "MANIFEST-*", "*.sst"])
def test_a_broken_index_is_one_finding(name: str, tmp_path: Path) -> None:
    target = fill(in_folder(tmp_path / "store"))
    for path in (tmp_path / "store" / "index").glob(name):
        path.write_bytes(b"\xff" * 100)
    if name == "*.sst" and not list((tmp_path / "store" / "index").glob(name)):
        pytest.skip("everything is in the log of this index")
    report = target.check()
    assert ids(report) == {"IDX-UNREADABLE"} and report.coverage.complete


def test_the_index_of_another_store_is_recognised() -> None:
    target, other = fill(in_memory(), blocks=8), fill(in_memory(), blocks=8)
    target.index = other.index
    assert ids(target.check()) == {"IDX-FOREIGN"}


def test_an_older_copy_in_the_index_is_stale() -> None:
    target = in_memory()
    store = target.open()
    target.put(store, ONE, b"key", 0, 5000)
    assert store.flush()
    assert target.index is not None
    old = target.index.get_many([ONE.digest + b"key"])[0]
    assert old is not None
    store.namespace(ONE).delete([b"key"])
    assert store.flush()
    target.put(store, ONE, b"key", 1, 6000)
    assert store.flush()
    target.close(store)
    assert_clean(target)
    assert target.index is not None
    target.index.apply([(ONE.digest + b"key", old)])
    assert ids(target.check(Level.WALK)) == {"IDX-STALE", "IDX-DELETED"}


# --- I/O errors, interrupts, time -------------------------------------------------------------------------------------------


def test_a_range_that_cannot_be_read_is_an_error_and_the_check_goes_on() -> None:
    target = fill(in_memory())
    header = next(h for i in target.segment_ids() for h in records_of(target, i) if h.key == b"key 000")
    path = target.segment_path(header.segment_id)
    broken = dataclasses.replace(target, device=FaultyDevice(target.device, [Fault("read", nth=3, times=None, where=lambda p: p == path)]))
    report = broken.check()
    assert report.errors and report.exit_code & ExitBit.OPERATIONAL
    assert not report.coverage.complete
    assert report.coverage.bytes_checked > report.coverage.bytes_present - 2 * SEGMENT_BYTES
    assert report.problems == 0


@pytest.mark.parametrize("nth", range(1, 80, 6))
def test_any_single_failed_read_is_survived_and_reported(nth: int) -> None:
    target = fill(in_memory(), blocks=12)
    fault = Fault("read", nth=nth)
    report = dataclasses.replace(target, device=FaultyDevice(target.device, [fault])).check()
    assert not report.problems, [finding.text for finding in report.findings]
    assert report.errors or report.coverage.complete  # a window that fails is read again in pieces
    assert "space" in report.passes


class StopAt:
    """Progress that asks for the end at its n-th step."""

    def __init__(self, stop: Stop, steps: int) -> None:
        self.stop, self.left = stop, steps

    def _step(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.stop.interrupt()

    def begin(self, name: str, total: int, unit: str = "bytes") -> None:
        self._step()

    def advance(self, count: int, place: str = "") -> None:
        self._step()

    def end(self) -> None:
        pass


def test_an_interrupt_at_any_step_ends_the_check_with_its_report() -> None:
    target = fill(in_memory(), blocks=12)
    steps = 0
    while True:
        steps += 1
        stop = Stop()
        options = CheckOptions(level=Level.FULL, now_ns=target.clock.now_ns())
        report = check_store(target.device, target.path, options, target.source(), StopAt(stop, steps), stop)
        if not stop.interrupted:
            break
        assert (report.interrupted and report.exit_code & ExitBit.INTERRUPTED) or "quarantine" in report.passes
        assert not report.problems
        assert set(report.passes) | set(report.skipped) >= {"record walk", "payloads", "space"}
    assert steps > 10 and report.coverage.complete


def test_the_end_of_the_time_is_said_and_is_no_interrupt() -> None:
    report = fill(in_memory(), blocks=8).check(max_duration_s=0.0)
    assert report.passes == [] and not report.interrupted
    assert set(report.skipped.values()) == {"the time was up"}
    assert report.exit_code == ExitBit.INTERRUPTED and not report.coverage.segments_checked


# --- samples ----------------------------------------------------------------------------------------------------------------


def test_shares_cover_everything_once() -> None:
    segments = [(number, 1000) for number in range(1, 30)]
    chosen = [Sample.parse(f"{n}/4").choose(segments, 0) for n in (1, 2, 3, 4)]
    assert sorted(i for part in chosen for i in part) == [number for number, _ in segments]


def test_a_sample_is_drawn_by_its_seed_and_its_size() -> None:
    segments = [(number, 1 << 20) for number in range(1, 101)]
    assert len(Sample.parse("7%").choose(segments, 3)) == 7
    assert len(Sample.parse("5MiB").choose(segments, 3)) == 5
    assert Sample.parse("7%").choose(segments, 3) == Sample.parse("7%").choose(segments, 3) != Sample.parse("7%").choose(segments, 4)
    assert len(Sample.parse("1").choose(segments, 3)) == 1
    assert Sample.parse("20GB").size_bytes == parse_bytes("20GB") and Sample.parse("20 GiB").size_bytes == 20 << 30


@pytest.mark.parametrize("text", ["", "0%", "101%", "0/3", "4/3", "1/0", "-5%", "10 apples", "0", "GiB", "1e3", "٣%"])
def test_samples_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(InvalidConfig):
        Sample.parse(text)


# --- the table --------------------------------------------------------------------------------------------------------------


def test_every_problem_has_what_the_command_shows() -> None:
    assert len(PROBLEMS) > 35
    for name, problem in PROBLEMS.items():
        assert name == problem.id and problem.explanation.endswith(".") and "{path}" in problem.template
        assert problem.lossless or problem.repair is not Repair.NONE
        assert problem.severity is not Severity.FATAL or problem.repair in (Repair.NONE, Repair.REWRITE_SUPERBLOCK)


def test_progress_is_json_with_rate_and_time_left() -> None:
    lines: list[str] = []
    clock = iter(float(number) for number in range(1000))
    progress = JsonProgress(lines.append, clock_s=lambda: next(clock))
    progress.begin("payloads", 1000)
    progress.advance(100, "segments/x.seg")
    progress.end()
    middle = json.loads(lines[1])
    assert middle["type"] == "progress" and middle["schema"] == 1
    assert middle["pass"] == "payloads" and middle["done"] == 100 and middle["rate_s"] > 0 and middle["left_s"] > 0


def test_every_pass_says_how_much_of_what_there_is_to_do() -> None:
    target = fill(in_memory(), blocks=12)
    lines: list[str] = []
    options = CheckOptions(level=Level.FULL, now_ns=target.clock.now_ns())
    report = check_store(target.device, target.path, options, target.source(), JsonProgress(lines.append))
    last = {line["pass"]: line for line in map(json.loads, lines)}
    units = {name: line["unit"] for name, line in last.items()}
    assert units == {
        "segment headers and seals": "segments", "record walk": "bytes", "payloads": "bytes",
        "segments -> index": "records", "index -> segments": "entries",
    }  # fmt: skip
    assert last["segment headers and seals"]["done"] == last["segment headers and seals"]["total"] == report.coverage.segments_present
    assert last["segments -> index"]["done"] == last["segments -> index"]["total"] == report.coverage.records_present
    assert last["index -> segments"]["done"] == last["index -> segments"]["total"] == report.coverage.index_entries


def test_amounts_are_read_by_people() -> None:
    assert amount_text(1 << 30, 2 << 30, "bytes", 1 << 20) == "1.0 GiB of 2.0 GiB, 1.0 MiB/s"
    assert amount_text(3, 2000, "segments", 1.4) == "3 of 2,000 segments, 1/s"
    assert amount_text(1500, 0, "entries", 100.0) == "1,500 entries, 100/s"


# --- what can be in the way -------------------------------------------------------------------------------------------------


def test_a_store_in_use_is_refused_and_live_reads_beside_it() -> None:
    target = fill(in_memory())
    store = target.open()
    target.put(store, ONE, b"new", 1, 5000)
    assert store.flush()
    with pytest.raises(StoreLocked, match="--live"):
        target.check()
    report = target.check(live=True)
    assert report.problems == 0 and not report.errors, [finding.text for finding in report.findings]
    assert any("not sealed" in reason for reason in report.skipped.values())
    target.close(store)


def test_a_folder_that_is_no_store_is_said_to_be_none() -> None:
    device = MemoryDevice()
    device.make_folder("/some/folder")
    for path in ("/some", "/some/folder", "/absent"):
        with pytest.raises(PathUnavailable):
            check_store(device, path, CheckOptions())


def test_one_segment_file_is_checked_by_itself() -> None:
    target = fill(in_memory())
    segment_id = target.segment_ids()[2]
    path = target.segment_path(segment_id)
    report = check_store(target.device, path, CheckOptions(level=Level.FULL))
    assert not report.counts and report.coverage.complete and "index -> segments" in report.skipped
    damaged = records_of(target, segment_id)[1]
    target.flip(path, damaged.offset + 20)
    report = check_store(target.device, path, CheckOptions(level=Level.FULL))
    assert [(f.id, f.offset) for f in report.findings] == [("REC-HDR-CRC", damaged.offset)]
    target.flip(path, 50)  # and without a header the records say whose it is
    assert ids(check_store(target.device, path, CheckOptions(level=Level.FULL))) == {"SEG-HDR-CRC", "REC-HDR-CRC"}


def test_a_segment_that_vanishes_beside_a_writer_is_no_problem() -> None:
    target = fill(in_memory())
    gone = target.segment_path(target.segment_ids()[0])

    class Vanishing(FaultyDevice):
        def open(self, path: str, mode: Any) -> Any:
            if path == gone and self.inner.status(gone) is not None:
                self.inner.remove(gone)
            return super().open(path, mode)

    report = dataclasses.replace(target, device=Vanishing(target.device)).check(live=True)
    assert report.problems == 0 and not report.errors, [finding.text for finding in report.findings]
