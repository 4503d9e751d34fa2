"""The passes over one segment: what it is, its records, every byte of them. A check of a store and a scrub both go through here."""

from __future__ import annotations

import contextlib
import os

from ...format.seal import COLUMN_TABLE, SealTable
from ...gds.threads import WorkerPool
from .check_records import RecordPass
from .check_runs import SegmentReading
from .check_segments import Looked, SegmentLook, Surroundings, load_table, look_at
from .check_superblock import FirstPage
from .findings import Report
from .kills import Kills
from .options import Progress, Stop
from .segment_records import SegmentRecords, undescribed_namespaces
from .source import SegmentReader
from .stream import Windows

CHECK_THREADS_MIN = 8
"""More than there are cores on a small machine: most of them wait for the drive."""
POOL_CLOSE_S = 30.0
ROW_BYTES = COLUMN_TABLE.size_bytes + 64
"""What a row of a table of contents takes in memory, its key included."""


class Workers:
    """The memory that payloads are read into and the threads that check them; made when they are first used. ``close`` them."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or max(CHECK_THREADS_MIN, os.cpu_count() or 1)
        self._made: tuple[Windows, WorkerPool] | None = None

    def get(self) -> tuple[Windows, WorkerPool]:
        """Both, for all segments that are under way."""
        if self._made is None:
            self._made = (Windows(self._threads), WorkerPool("kvlode-fsck", self._threads))
        return self._made

    def close(self) -> None:
        """Bounded by ``POOL_CLOSE_S``."""
        if self._made is not None:
            windows, pool = self._made
            pool.shutdown(POOL_CLOSE_S)
            windows.close()


class Tables:
    """Tables of contents that a check has read, for its later passes: the first ones, up to ``bytes_max``.

    The passes go over the segments in the same order again and again, so those that came last would be of no use.
    """

    def __init__(self, bytes_max: int = 0) -> None:
        self._bytes_left = bytes_max
        self._tables: dict[int, SealTable] = {}

    def keep(self, segment_id: int, table: SealTable) -> None:
        size_bytes = len(table) * ROW_BYTES
        if size_bytes <= self._bytes_left and segment_id not in self._tables:
            self._bytes_left -= size_bytes
            self._tables[segment_id] = table

    def get(self, segment_id: int) -> SealTable | None:
        return self._tables.get(segment_id)


class SegmentPasses:
    """Passes over segments, counted and reported in ``report``. Methods may raise ``DeviceError`` and ``Stopped``. For one thread."""

    def __init__(
        self, report: Report, progress: Progress, stop: Stop, workers: Workers, kills: Kills | None = None, tables: Tables | None = None
    ) -> None:
        self._tables = tables or Tables()
        self.records = RecordPass(report.coverage, report.add, report.errors.append, progress, stop, kills)
        self._report = report
        self._stop = stop
        self._workers = workers

    def look(self, reader: SegmentReader, first: FirstPage, around: Surroundings) -> Looked:
        """Header and seal of a segment."""
        looked = look_at(reader, first, around)
        coverage, look = self._report.coverage, looked.look
        for finding in looked.findings:
            self._report.add(finding)
        if looked.unsealed:
            coverage.bytes_present += reader.ref.size_bytes
        else:
            coverage.segments_checked += 1
        if looked.table is not None:
            self._tables.keep(reader.ref.segment_id, looked.table)
        if look is not None:
            coverage.bytes_present += look.bytes_present + look.log_bytes
            coverage.bytes_checked += look.bytes_checked + look.damaged_bytes
            coverage.records_present += look.record_count
        return looked

    def load(self, reader: SegmentReader, look: SegmentLook, store_uuid: bytes) -> SegmentRecords:
        """Its records, from its table of contents where that is good."""
        table = self._tables.get(look.ref.segment_id)
        if table is None:
            table = load_table(reader, look, store_uuid)
            self._tables.keep(look.ref.segment_id, table)
        return SegmentRecords(look, table, store_uuid)

    def begin(self, records: SegmentRecords) -> None:
        """To be called once, before the records of a segment are walked or read."""
        look = records.look  # what is neither a record nor damage is dead space that a seal leaves out
        self.records.kills.add(records.table)
        self._report.coverage.bytes_present += sum(records.lengths) + look.damaged_bytes - look.log_bytes
        for finding in undescribed_namespaces(records):
            self._report.add(finding)

    def read(self, reader: SegmentReader, records: SegmentRecords) -> None:
        """Every byte of every record, decoded."""
        with contextlib.closing(self.prepare(reader, records)) as reading:
            self.finish(reading)

    def prepare(self, reader: SegmentReader, records: SegmentRecords) -> SegmentReading:
        """Begin to read and check what ``finish`` judges. Close it in any case."""
        return SegmentReading(reader, records, *self._workers.get(), self._stop)

    def finish(self, reading: SegmentReading) -> None:
        """Take in what ``prepare`` has begun."""
        self.records.read(reading)
