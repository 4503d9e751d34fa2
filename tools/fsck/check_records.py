"""Passes "record walk" and "payloads": every record of a segment where its table of contents says it is, and as it says.

Segments are read from the newest to the oldest: a tombstone never lies in an earlier segment than what it kills, so whether zeros are
a purge or damage is known when they are met.
"""

from __future__ import annotations

from collections.abc import Callable

from ...format.errors import DeviceError
from ...format.layout import PAGE_BYTES
from .check_runs import SegmentReading, Suspicion, purged_as
from .findings import Coverage, Finding
from .kills import Kills
from .options import Progress, Stop
from .segment_records import SegmentRecords
from .source import SegmentReader


class RecordPass:
    """Checks the records of segments one after the other, newest first. For one thread."""

    def __init__(
        self,
        coverage: Coverage,
        add: Callable[[Finding], None],
        error: Callable[[str], None],
        progress: Progress,
        stop: Stop,
        kills: Kills | None = None,
    ) -> None:
        self.kills = kills if kills is not None else Kills()
        self._coverage = coverage
        self._add = add
        self._error = error
        self._progress = progress
        self._stop = stop

    # --- headers only -------------------------------------------------------------------------------------------------

    def walk(self, reader: SegmentReader, records: SegmentRecords) -> None:
        """Header page of every record."""
        for row, (_, page) in enumerate(reader.gather(records.offsets)):
            self._stop.check()
            if isinstance(page, DeviceError):
                self._error(str(page))
                continue
            header, finding = records.check_header(row, page)
            if finding is not None:
                self._judge(Suspicion(finding, purged_as(records, row, header, page)))
            self._coverage.records_checked += 1
            self._coverage.bytes_checked += PAGE_BYTES
            self._progress.advance(PAGE_BYTES, records.ref.name)

    # --- every byte ---------------------------------------------------------------------------------------------------

    def read(self, reading: SegmentReading) -> None:
        """Every byte of every record, in the order in which they lie."""
        for result in reading:
            self._stop.check()
            for error in result.errors:
                self._error(str(error))
            for suspicion in result.suspicions:
                self._judge(suspicion)
            self._coverage.records_checked += result.records_checked
            self._coverage.bytes_checked += result.bytes_checked
            self._progress.advance(result.length_bytes, reading.records.ref.name)

    def _judge(self, suspicion: Suspicion) -> None:
        if suspicion.purged_as is None or not self.kills.killed(*suspicion.purged_as):
            self._add(suspicion.finding)
