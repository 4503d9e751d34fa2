"""Scrubbing one store: which segment is next, what is found in it, and what is remembered. Takes no lock and changes no segment."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ...format.errors import DeviceError, PathUnavailable
from ...format.layout import SEGMENTS_FOLDER, parse_segment_name, segment_name
from ...format.walk import find_trailer
from ...gds.device import Device
from ..fsck.check_segments import Surroundings
from ..fsck.check_superblock import check_superblock, read_first_page, read_first_pages
from ..fsck.findings import ExitBit, Finding, Report
from ..fsck.options import Level, Progress, Stopped
from ..fsck.problems import Severity
from ..fsck.segment_passes import SegmentPasses, Workers
from ..fsck.source import SegmentRef, list_segments, opened, require_store
from .deleted import OpenQuestions, purged_findings
from .pace import WaitingStop
from .state import ScrubState, SegmentState

INTERVAL_S = 7 * 86400.0
SCRUB_THREADS = 2
"""It goes at a slow rate beside a running store, so it shall not take the memory of a check that goes as fast as the drive."""
POLL_S = 5.0


@dataclass(frozen=True, slots=True)
class ScrubOptions:
    """Of one run."""

    once: bool = False
    """End after one round over what was there at the start."""
    interval_s: float = INTERVAL_S
    """A segment that was checked this long ago is checked again."""
    poll_s: float = POLL_S
    """How often the folder is looked at while nothing is due."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What lies in ``segments/`` now."""

    sealed: list[int]
    """Ids that can be checked, oldest first."""
    unsealed: int
    """Segments behind the last sealed one: a writer may be filling them."""

    @property
    def last_sealed(self) -> int:
        return self.sealed[-1] if self.sealed else -1


@dataclass(slots=True)
class Totals:
    """Of one run."""

    segments: int = 0
    records: int = 0
    bytes_checked: int = 0
    vanished: int = 0
    errors: int = 0


class Output(Protocol):
    """Where a scrub reports to; called from the scrubbing thread alone."""

    def finding(self, finding: Finding) -> None:
        """Something is wrong."""
        ...

    def error(self, text: str) -> None:
        """Something could not be read."""
        ...

    def remark(self, text: str) -> None:
        """Something to know that is wrong with neither store nor drive."""
        ...

    def segment(self, ref: SegmentRef, report: Report, left: int) -> None:
        """A segment was checked; ``left`` are due now."""
        ...


class Scrubber:
    """One run over one store; for one thread. ``close`` it."""

    def __init__(
        self,
        device: Device,
        path: str,
        options: ScrubOptions,
        output: Output,
        progress: Progress,
        stop: WaitingStop,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.totals = Totals()
        self.survey = Survey([], 0)
        self.interrupted = False
        self.begun = False
        """The store could be looked at."""
        self._device = device
        self._path = path.rstrip("/") or "/"
        self._options = options
        self._output = output
        self._progress = progress
        self._stop = stop
        self._now_ns = now_ns
        self._workers = Workers(SCRUB_THREADS)
        self._uuid = bytes(16)
        self._state = ScrubState(self._uuid)
        self._store_damaged = False
        self._save_failed = False

    def close(self) -> None:
        """End the threads that check payloads."""
        self._workers.close()

    def run(self) -> None:
        """Check until the round is over (``once``), or until the end is asked for.

        Raises ``PathUnavailable`` when there is no store, ``DeviceError`` when its folder cannot be read.
        """
        known = self._identify()
        self.begun = True
        if not known:
            return
        self._state = ScrubState.load(self._device, self._path, self._uuid)
        try:
            if self._options.once:
                self._round()
            else:
                self._go_on()
        except Stopped:
            self.interrupted = True
        finally:
            self._progress.end()

    def damaged_segments(self) -> int:
        """Segments that something is wrong with, as far as is known: found now, or by an earlier run and still there."""
        return sum(state.damaged for state in self._state.segments.values())

    def exit_code(self) -> int:
        """A sum of ``ExitBit``."""
        code = ExitBit.LEFT if self._store_damaged or self.damaged_segments() else ExitBit.CLEAN
        if self.totals.errors or any(state.unreadable for state in self._state.segments.values()):
            code |= ExitBit.OPERATIONAL
        if self.interrupted:
            code |= ExitBit.INTERRUPTED
        return int(code)

    # --- what to check ------------------------------------------------------------------------------------------------

    def _identify(self) -> bool:
        """Check the superblock; whether it is known whose store this is."""
        try:
            names = self._device.list_folder(self._path)
        except DeviceError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
            raise PathUnavailable("there is no store to scrub", where=self._path, expected="its folder", actual=error.actual) from None
        require_store(self._path, names)
        errors: list[str] = []
        first_pages = read_first_pages(self._device, list_segments(self._device, self._path)[0], errors)
        identity = check_superblock(self._device, self._path, names, first_pages)
        for finding in identity.findings:
            self._store_damaged = self._store_damaged or finding.problem.severity is not Severity.NOTE
            self._output.finding(finding)
        if identity.uuid is None:
            self._error("nothing can be checked: it is not known whose store this is")
            return False
        self._uuid = identity.uuid
        return True

    def _look(self) -> Survey:
        """List the segments, and forget those that are gone. Files that are not sealed, and those that were freed, are left out."""
        names = self._device.list_folder(f"{self._path}/{SEGMENTS_FOLDER}")
        ids = sorted(found for name in names if (found := parse_segment_name(name)) is not None)
        unsealed, first_live = 0, 0
        for segment_id in reversed(ids):  # segments are sealed in their order: whatever lies before a sealed one had a seal
            sealed, named_live = self._probe(segment_id)
            first_live = max(first_live, named_live)
            if sealed:
                break
            unsealed += 1
        self.survey = Survey([segment_id for segment_id in ids[: len(ids) - unsealed] if segment_id >= first_live], unsealed)
        self._state.keep(set(ids))
        return self.survey

    def _probe(self, segment_id: int) -> tuple[bool, int]:
        """Whether a segment ends in its trailer, and the first segment that was not freed when it was made, 0 if it does not say."""
        ref = self._ref(segment_id)
        if ref is None:
            return False, 0
        try:
            with opened(self._device, ref) as reader:
                if reader is None:
                    return False, 0
                header = read_first_page(reader).header
                mine = header is not None and (header.store_uuid, header.segment_id) == (self._uuid, segment_id)
                trailer = find_trailer(reader.read, ref.size_bytes, store_uuid=self._uuid, segment_id=segment_id)
                return trailer is not None, header.first_live_segment if mine and header is not None else 0
        except DeviceError:  # it is told when the segment is checked, or is a matter of its writer
            return False, 0

    def _ref(self, segment_id: int) -> SegmentRef | None:
        """The file as it is now: it is cut to its size when it is sealed. ``None`` when it is gone."""
        name = f"{SEGMENTS_FOLDER}/{segment_name(segment_id)}"
        status = self._device.status(f"{self._path}/{name}")
        return None if status is None else SegmentRef(segment_id, f"{self._path}/{name}", name, status.size_bytes, status.allocated_bytes)

    # --- in which order -----------------------------------------------------------------------------------------------

    def _round(self) -> None:
        segment_ids = sorted(self._look().sealed, key=self._state.order)
        for number, segment_id in enumerate(segment_ids, 1):
            self._check(segment_id, len(segment_ids) - number)

    def _go_on(self) -> None:
        gone: set[int] = set()
        while True:
            now_ns = self._now_ns()
            due = [i for i in self._look().sealed if i not in gone and self._state.is_due(i, now_ns, self._options.interval_s)]
            if not due:
                self._stop.pause(self._options.poll_s)
                self._stop.check()
                continue
            first = min(due, key=self._state.order)
            if not self._check(first, len(due) - 1):
                gone.add(first)  # ids are not used again

    # --- one segment --------------------------------------------------------------------------------------------------

    def _check(self, segment_id: int, left: int) -> bool:
        """Check one segment and remember the result; False when it has vanished. Raises ``Stopped``."""
        self._stop.check()
        report = Report(self._path, Level.FULL)
        ref = self._ref(segment_id)
        if ref is not None:
            self._progress.begin(f"segment {segment_id:016x}, {left:,} to go", ref.size_bytes)
            try:
                self._passes(ref, report)
            except DeviceError as error:
                report.errors.append(str(error))
            finally:
                self._progress.end()
        if ref is None or self._ref(segment_id) is None:  # it was freed, and what was found in it no longer matters
            self.totals.vanished += 1
            return False
        self._tell(ref, report, left)
        self._state.segments[segment_id] = SegmentState(self._now_ns(), dict(report.counts), bool(report.errors))
        self._save()
        return True

    def _passes(self, ref: SegmentRef, report: Report) -> None:
        """The passes of a full check, over one segment."""
        questions = OpenQuestions()
        passes = SegmentPasses(report, self._progress, self._stop, self._workers, questions)
        later = ref.segment_id < self.survey.last_sealed
        around = Surroundings(self._uuid, later_committed=later, live=not later)
        with opened(self._device, ref) as reader:
            if reader is None:
                return
            looked = passes.look(reader, read_first_page(reader), around)
            if looked.look is None:
                return
            self._progress.advance(looked.look.bytes_checked, ref.name)
            records = passes.load(reader, looked.look, self._uuid)
            passes.begin(records)
            passes.read(reader, records)
            report.drop(purged_findings(report.findings, records, questions, self._device, self._path))

    def _tell(self, ref: SegmentRef, report: Report, left: int) -> None:
        coverage = report.coverage
        self.totals.segments += 1
        self.totals.records += coverage.records_checked
        self.totals.bytes_checked += coverage.bytes_checked
        for finding in report.findings:
            self._output.finding(finding)
        for error in report.errors:
            self._error(error)
        self._output.segment(ref, report, left)

    def _error(self, text: str) -> None:
        self.totals.errors += 1
        self._output.error(text)

    def _save(self) -> None:
        """A scrub that cannot be remembered goes on all the same."""
        try:
            self._state.save(self._device, self._path)
        except DeviceError as error:
            if not self._save_failed:
                self._output.remark(f"what was checked cannot be remembered, so the next scrub begins anew: {error}")
            self._save_failed = True
