"""Every byte of a segment: runs of neighbouring records, each read and checked by one thread, many at the same time.

A thread checks what it has read itself: handing every stripe to another would cost more than checking it. What a run finds is
judged in the order of the runs, by the thread that asks for the results.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from ...format.errors import DeviceError
from ...format.layout import PAGE_BYTES, Codec, RecordType
from ...format.record import RecordHeader
from ...gds.threads import WorkerPool
from .check_payloads import BlockCheck, check_descriptor
from .findings import Finding
from .options import Stop
from .segment_records import SegmentRecords
from .source import SegmentReader
from .stream import ByteStream, Windows

RUN_BYTES = 16 << 20
"""A run has at least one record, and no second one that would make it longer than this."""
GAP_BYTES_MAX = 64 << 10
RUNS_AHEAD_PER_THREAD = 2


@dataclass(frozen=True, slots=True)
class RunOfRecords:
    """Rows ``first`` to ``last - 1`` of a segment's table."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Suspicion:
    """A finding. With ``purged_as`` (index key, ``version_seq``) it is about zeros, and none if that block is a deleted one."""

    finding: Finding
    purged_as: tuple[bytes, int] | None = None


@dataclass(slots=True)
class RunResult:
    """What came out of one run."""

    length_bytes: int = 0
    records_checked: int = 0
    bytes_checked: int = 0
    suspicions: list[Suspicion] = field(default_factory=list)
    errors: list[DeviceError] = field(default_factory=list)


class SegmentReading:
    """The results of a segment's runs, which are read and checked from now on. Iterate once, and ``close`` in any case."""

    def __init__(self, reader: SegmentReader, records: SegmentRecords, windows: Windows, pool: WorkerPool, stop: Stop) -> None:
        self.records = records
        self._reader = reader
        self._windows = windows
        self._pool = pool
        self._stop = stop
        self._left = collections.deque(runs_of(records))
        self._begun: collections.deque[Future[RunResult]] = collections.deque()
        self._begin_more()

    def __iter__(self) -> Iterator[RunResult]:
        while self._begun:
            result = self._begun[0].result()
            self._begun.popleft()
            self._begin_more()
            yield result

    def _begin_more(self) -> None:
        while self._left and len(self._begun) < RUNS_AHEAD_PER_THREAD * self._pool.threads:
            run = self._left.popleft()
            self._begun.append(self._pool.submit(check_run, self._reader, self.records, run, self._windows, self._stop))

    def close(self) -> None:
        """Nothing reads the segment's file any more, and all memory is given back."""
        self._left.clear()
        for future in self._begun:
            future.cancel()
        wait(self._begun)


def runs_of(records: SegmentRecords) -> Iterator[RunOfRecords]:
    """The rows of a segment in runs. What lies in large gaps between records is not read."""
    first = 0
    for row in range(1, len(records)):
        stop = records.offsets[row] + records.lengths[row]
        gap_bytes = records.offsets[row] - records.offsets[row - 1] - records.lengths[row - 1]
        if stop - records.offsets[first] > RUN_BYTES + PAGE_BYTES * (row + 1 - first) or gap_bytes > GAP_BYTES_MAX:
            yield RunOfRecords(first, row)
            first = row
    if len(records):
        yield RunOfRecords(first, len(records))


def check_run(reader: SegmentReader, records: SegmentRecords, run: RunOfRecords, windows: Windows, stop: Stop) -> RunResult:
    """Read and check these records; on any thread. Raises ``Stopped``."""
    result = RunResult()
    end = records.offsets[run.last - 1] + records.lengths[run.last - 1]
    with contextlib.closing(ByteStream(reader.file, records.offsets[run.first], end, windows, result.errors.append)) as stream:
        for row in range(run.first, run.last):
            stop.check()
            stream.skip(records.offsets[row] - stream.position)
            _check_record(stream, records, row, windows, result)
            stream.skip(records.offsets[row] + records.lengths[row] - stream.position)
            result.length_bytes += records.lengths[row]
    return result


def _check_record(stream: ByteStream, records: SegmentRecords, row: int, windows: Windows, result: RunResult) -> None:
    piece = stream.take(PAGE_BYTES)
    if not piece.readable:
        return
    page = piece.data.tobytes()
    header, finding = records.check_header(row, page)
    if finding is not None:
        result.suspicions.append(Suspicion(finding, purged_as(records, row, header, page)))
    if header is None or header.record_bytes != records.lengths[row]:
        readable = True
    elif header.record_type is RecordType.BLOCK:
        with contextlib.nullcontext() if header.codec is Codec.RAW else windows.decoding:
            readable = _check_block(stream, header, records, result)
    elif header.record_type is RecordType.NAMESPACE:
        payload = stream.take(header.record_bytes - PAGE_BYTES)
        readable = payload.readable
        found = check_descriptor(header, payload.data, records.ref) if readable else []
        result.suspicions += [Suspicion(finding) for finding in found]
    else:
        readable = True
    if readable:
        result.records_checked += 1
        result.bytes_checked += records.lengths[row]


def _check_block(stream: ByteStream, header: RecordHeader, records: SegmentRecords, result: RunResult) -> bool:
    """Whether all of the block could be read."""
    check = BlockCheck(header, records.ref)
    check.run(stream)
    purged = (header.namespace + header.key, header.version_seq) if check.zeros else None
    result.suspicions += [Suspicion(finding, purged) for finding in check.findings]
    return check.readable


def purged_as(records: SegmentRecords, row: int, header: RecordHeader | None, page: memoryview | bytes) -> tuple[bytes, int] | None:
    """Zeros in the place of a block, which are what a purge leaves of a deleted one: its index key and ``version_seq``."""
    if header is not None or records.table.type[row] != RecordType.BLOCK or any(page):
        return None
    return records.ident(row), int(records.table.version_seq[row])
