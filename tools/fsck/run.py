"""One run of the check: the passes in their order, what stops them, and the report that comes out in any case."""

from __future__ import annotations

import collections
import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...format.errors import DeviceError, PathUnavailable, StoreLocked
from ...format.layout import LOCK_NAME, PAGE_BYTES, parse_segment_name
from ...gds.device import Device
from .check_runs import SegmentReading
from .check_segments import SegmentLook, Surroundings, was_cut_to_its_seal
from .check_space import account, check_names, check_quarantine
from .check_superblock import FirstPage, check_superblock, majority_uuid, read_first_pages
from .findings import Finding, Report
from .index_passes import IndexPasses
from .index_view import IndexSource
from .options import CheckOptions, Level, Progress, Silence, Stop, Stopped
from .segment_passes import SegmentPasses, Tables, Workers
from .segment_records import SegmentRecords
from .source import SegmentReader, SegmentRef, list_segments, opened, require_store


def check_store(
    device: Device,
    path: str,
    options: CheckOptions,
    index: IndexSource | None = None,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Report:
    """Check the store in folder ``path``, or one segment file. Only reads, and creates no file.

    Raises ``PathUnavailable`` when there is no store, ``StoreLocked`` when a writer has it open (and ``options.live`` is not
    set), ``DeviceError`` when not even its folder can be read. Everything else is in the report: damage as findings, what
    could not be read as errors, an end before the end as ``interrupted`` or as skipped passes.
    """
    started_s = time.monotonic()
    stop = stop or Stop()
    stop.limit(options.max_duration_s)
    run = _Run(device, path.rstrip("/") or "/", options, index, progress or Silence(), stop)
    try:
        if run.open():
            with _locked(device, run.path, options, run.report):
                run.passes()
        else:
            run.passes_of_one_file()
    finally:
        run.close()
    run.report.duration_s = time.monotonic() - started_s
    return run.report


@contextlib.contextmanager
def _locked(device: Device, path: str, options: CheckOptions, report: Report) -> Iterator[None]:
    """The writer's lock, where there is one to take: a store without the file has no writer, and a check makes no files."""
    place = f"{path}/{LOCK_NAME}"
    if options.live or options.locked or device.status(place) is None:
        yield
        return
    try:
        lock = device.lock(place)
    except DeviceError as error:  # read-only media, or somebody else's store
        report.errors.append(f"the writer's lock could not be taken, so a writer may have changed what was read: {error}")
        yield
        return
    if lock is None:
        raise StoreLocked(
            "a writer has this store open",
            where=path,
            expected="a store that nobody writes to",
            actual="its lock is held",
            action="Close it first, or check beside it with --live.",
        )
    try:
        yield
    finally:
        lock.release()


SEGMENTS_AHEAD = 2
"""Segments whose first bytes are read while the last ones of another are checked."""
TABLES_BYTES_MAX = 32 << 20


@dataclass(frozen=True, slots=True)
class _Begun:
    look: SegmentLook
    reading: SegmentReading
    resources: contextlib.ExitStack


class _Run:
    """State of one check; for one thread."""

    def __init__(
        self, device: Device, path: str, options: CheckOptions, source: IndexSource | None, progress: Progress, stop: Stop
    ) -> None:
        self.path = path
        self.report = Report(path, options.level)
        self._device = device
        self._options = options
        self._progress = progress
        self._stop = stop
        self._names: list[str] = []
        self._refs: list[SegmentRef] = []
        self._others: list[str] = []
        self._firsts: list[FirstPage] = []
        self._uuid: bytes | None = None
        self._looks: list[SegmentLook] = []
        """Usable segments, newest first."""
        self._stopped = ""
        self._workers = Workers()
        self._segments = SegmentPasses(self.report, progress, stop, self._workers, tables=Tables(TABLES_BYTES_MAX))
        self._records = self._segments.records
        now_ns = options.now_ns if options.now_ns is not None else time.time_ns()
        self._index = IndexPasses(device, source, self.report, self._records.kills, now_ns, stop, progress, live=options.live)

    def open(self) -> bool:
        """Whether ``path`` is a folder; raises when it is nothing that can be checked."""
        try:
            self._names = self._device.list_folder(self.path)
        except DeviceError as error:
            status = self._device.status(self.path)
            if status is None:
                raise PathUnavailable("there is nothing to check", where=self.path, actual=error.actual) from None
            if self.path.endswith(".seg"):
                return False
            if error.errno == errno.ENOTDIR:
                require_store(self.path, None)
            raise
        require_store(self.path, self._names)
        return True

    def close(self) -> None:
        self._index.close()
        self._workers.close()

    # --- the passes ---------------------------------------------------------------------------------------------------

    def passes(self) -> None:
        """All of them, over a store's folder."""
        if self._options.live:  # before the segments are listed: what it points to is there then, or was freed since
            self._index.open()
        self._pass("superblock and lock", self._check_superblock)
        if self._uuid is None:
            self._skip_rest("it is not known whose store this is")
        if not self._options.live:
            self._index.open()
        self._index.report_missing(self._refs)
        self._index.look(self._uuid or b"")
        self._segment_passes()
        self._pass("segments -> index", self._check_segments_against_index, needs=self._index.why_not(self._options.level))
        self._pass("index -> segments", self._check_index_against_segments, needs=self._index.why_not(Level.WALK))
        self._pass("space", self._account)
        self._pass("quarantine", self._check_quarantine)

    def passes_of_one_file(self) -> None:
        """Over one segment file: the store's uuid is the one that it names itself."""
        folder, _, name = self.path.rpartition("/")
        self._pass("superblock and lock", lambda: self._take_file(folder, name))
        if self._uuid is None:
            self._skip_rest("the file names no store")
        self._segment_passes()
        for skipped in ("segments -> index", "index -> segments", "space", "quarantine"):
            self.report.skipped[skipped] = "one segment file is checked, not its store"

    def _segment_passes(self) -> None:
        self._pass("segment headers and seals", self._check_segments)
        payload_ids = self._payload_ids()
        walks = self._options.level is not Level.QUICK
        self._pass("record walk", lambda: self._walk_records(payload_ids), needs="" if walks else "not at level quick")
        wanted = self._options.level in (Level.FULL, Level.SAMPLE)
        self._pass("payloads", lambda: self._read_payloads(payload_ids), needs="" if wanted else f"not at level {self._options.level}")

    def _pass(self, name: str, function: Callable[[], None], *, needs: str = "") -> None:
        """Run a pass, unless the run is over or something is missing for it."""
        reason = self._stopped or needs
        if reason:
            self.report.skipped[name] = reason
            return
        try:
            self._stop.check()
            function()
            self.report.passes.append(name)
        except Stopped as stopped:
            self.report.interrupted = self._stop.interrupted
            self.report.skipped[name] = self._stopped = str(stopped)
        except DeviceError as error:
            self.report.errors.append(f"{name}: {error}")
            self.report.skipped[name] = "an error ended it"
        finally:
            self._progress.end()

    def _skip_rest(self, reason: str) -> None:
        self._stopped = self._stopped or reason

    def _add_all(self, findings: list[Finding]) -> None:
        for finding in findings:
            self.report.add(finding)

    # --- superblock ---------------------------------------------------------------------------------------------------

    def _check_superblock(self) -> None:
        self._refs, self._others = list_segments(self._device, self.path)
        self.report.coverage.segments_present = len(self._refs)
        self._firsts = read_first_pages(self._device, self._refs, self.report.errors)
        identity = check_superblock(self._device, self.path, self._names, self._firsts)
        self._add_all(identity.findings)
        self._uuid = identity.uuid
        self._add_all(check_names(self._names, self._others if not self._options.live else []))

    def _take_file(self, folder: str, name: str) -> None:
        status = self._device.status(self.path)
        if status is None:
            raise DeviceError("stat", self.path, detail="the file is gone")
        segment_id = parse_segment_name(name)
        self._refs = [SegmentRef(segment_id or 0, self.path, name, status.size_bytes, status.allocated_bytes)]
        self._firsts = read_first_pages(self._device, self._refs, self.report.errors)
        self.report.coverage.segments_present = 1
        self._uuid = majority_uuid(self._firsts)
        header = self._firsts[0].header if self._firsts else None
        if segment_id is None and header is not None:
            self._refs = [SegmentRef(header.segment_id, self.path, name, status.size_bytes, status.allocated_bytes)]
            self._firsts = read_first_pages(self._device, self._refs, self.report.errors)
        if self._uuid is None and self._firsts:
            self._uuid = bytes(16)  # nothing of it can be a record of a store: the next pass says what it is

    # --- segments -----------------------------------------------------------------------------------------------------

    def _check_segments(self) -> None:
        assert self._uuid is not None
        mine = [f.header for f in self._firsts if f.header and (f.header.store_uuid, f.header.segment_id) == (self._uuid, f.ref.segment_id)]
        first_live = max((header.first_live_segment for header in mine), default=0)
        self._progress.begin("segment headers and seals", len(self._firsts), "segments")
        later_committed = False
        for first in reversed(self._firsts):
            self._stop.check()
            if first.ref.segment_id < first_live:
                place = (first.ref.name, first.ref.segment_id)
                self.report.add(Finding("SEG-FREED", *place, facts={"first_live": first_live}))
                continue
            around = Surroundings(self._uuid, later_committed, self._index.checkpoint, self._options.live)
            look = self._look(first, around)
            self._progress.advance(1, first.ref.name)
            if look is not None:
                self._looks.append(look)
                later_committed = later_committed or (look.sealed and was_cut_to_its_seal(first, around))

    def _look(self, first: FirstPage, around: Surroundings) -> SegmentLook | None:
        ref = first.ref
        try:
            with opened(self._device, ref) as reader:
                if reader is None:
                    return None
                looked = self._segments.look(reader, first, around)
        except DeviceError as error:
            self.report.errors.append(str(error))
            self._index.unjudged.add(ref.segment_id)
            self.report.coverage.bytes_present += ref.size_bytes
            return None
        if looked.unsealed:
            self.report.skipped[f"segment {ref.name}"] = "not sealed: a running writer may be filling it"
            self._index.unjudged.add(ref.segment_id)
        return looked.look

    # --- records ------------------------------------------------------------------------------------------------------

    def _payload_ids(self) -> set[int]:
        sizes = [(look.ref.segment_id, look.ref.size_bytes) for look in self._looks]
        if self._options.level is Level.FULL:
            return {segment_id for segment_id, _ in sizes}
        if self._options.level is Level.SAMPLE and self._options.sample is not None:
            return self._options.sample.choose(sizes, self._options.seed)
        return set()

    def _each(self, looks: list[SegmentLook], judge: Callable[[SegmentReader, SegmentRecords], None]) -> None:
        """Open every segment, load its records, and judge it; what cannot be read is an error, what is gone is left out."""
        assert self._uuid is not None
        for look in looks:
            self._stop.check()
            with self._noting(look), opened(self._device, look.ref) as reader:
                if reader is not None:
                    judge(reader, self._segments.load(reader, look, self._uuid))

    @contextlib.contextmanager
    def _noting(self, look: SegmentLook) -> Iterator[None]:
        """An error of the drive is noted, and that this segment was not judged."""
        try:
            yield
        except DeviceError as error:
            self.report.errors.append(str(error))
            self._index.unjudged.add(look.ref.segment_id)

    def _walk_records(self, payload_ids: set[int]) -> None:
        walked = [look for look in self._looks if look.ref.segment_id not in payload_ids]
        self._progress.begin("record walk", sum(look.record_count for look in walked) * PAGE_BYTES)

        def judge(reader: SegmentReader, records: SegmentRecords) -> None:
            self._segments.begin(records)
            if records.ref.segment_id not in payload_ids:
                self._records.walk(reader, records)

        self._each(self._looks, judge)

    def _read_payloads(self, payload_ids: set[int]) -> None:
        chosen = [look for look in self._looks if look.ref.segment_id in payload_ids]
        self._progress.begin("payloads", sum(look.data_end - PAGE_BYTES for look in chosen))
        begun: collections.deque[_Begun] = collections.deque()
        try:
            for look in chosen:
                self._stop.check()
                with self._noting(look):
                    begun.extend(self._begin_reading(look))
                if len(begun) > SEGMENTS_AHEAD:
                    self._finish_reading(begun.popleft())
            while begun:
                self._finish_reading(begun.popleft())
        finally:
            for left in begun:
                left.resources.close()

    def _begin_reading(self, look: SegmentLook) -> Iterator[_Begun]:
        """The segment with its first bytes on their way; nothing when it is gone."""
        assert self._uuid is not None
        with contextlib.ExitStack() as resources:
            reader = resources.enter_context(opened(self._device, look.ref))
            if reader is not None:
                reading = self._segments.prepare(reader, self._segments.load(reader, look, self._uuid))
                resources.enter_context(contextlib.closing(reading))
                yield _Begun(look, reading, resources.pop_all())

    def _finish_reading(self, begun: _Begun) -> None:
        with self._noting(begun.look), begun.resources:
            self._segments.finish(begun.reading)

    # --- index --------------------------------------------------------------------------------------------------------

    def _check_segments_against_index(self) -> None:
        self._progress.begin("segments -> index", sum(look.record_count for look in self._looks), "records")

        def match(reader: SegmentReader, records: SegmentRecords) -> None:
            self._index.match(reader, records)
            self._progress.advance(len(records), records.ref.name)

        with self._index.reading():
            self._each(self._looks, match)
            self._each(self._looks if self._index.has_orphans else [], lambda _, records: self._index.drop_superseded(records))
            self._index.report_orphans()

    def _check_index_against_segments(self) -> None:
        assert self._uuid is not None
        self._progress.begin("index -> segments", self._index.entries_matched, "entries")
        with self._index.reading():
            self._index.check_entries(self._uuid, self._refs, self.path, matched=self._options.level is not Level.QUICK)

    # --- the rest -----------------------------------------------------------------------------------------------------

    def _account(self) -> None:
        self.report.space = account(self._device, self.path, self._names, self._refs, self._others)
        self.report.space["live"] = self._index.live_bytes

    def _check_quarantine(self) -> None:
        self._add_all(check_quarantine(self._device, self.path, self._names, self.report.space))
