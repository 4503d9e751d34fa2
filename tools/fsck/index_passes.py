"""The index in a run: opening it, what it says of itself, and the two passes that compare it with the segments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from ...format.errors import DeviceError, KvlodeError
from ...format.layout import QUARANTINE_FOLDER, parse_segment_name
from ...gds.device import Device
from .check_index import (
    INDEX_PATH,
    Lookups,
    SegmentMatch,
    count_entries,
    name_dangling,
    record_at,
    report_orphans,
    superseded,
)
from .findings import Finding, Report
from .index_view import IndexSource, IndexState, IndexUnreadable, IndexView, Row
from .kills import Kills
from .options import Level, Progress, Stop
from .segment_records import SegmentRecords
from .source import SegmentReader, SegmentRef, opened

OPEN_FILES_MAX = 32
_SEGMENT_NAME_LENGTH = len("0123456789abcdef.seg")


class IndexPasses:
    """State of the index's passes in one run; for one thread."""

    def __init__(
        self, device: Device, source: IndexSource | None, report: Report, kills: Kills, now_ns: int, stop: Stop, progress: Progress,
        *, live: bool,
    ) -> None:  # fmt: skip
        self.unjudged: set[int] = set()
        """Segments that could not be read, or that a writer is filling: nothing is said about entries that point there."""
        self._device = device
        self._source = source
        self._report = report
        self._kills = kills
        self._now_ns = now_ns
        self._stop = stop
        self._progress = progress
        self._live = live
        self._view: IndexView | None = None
        self._state: IndexState | None = None
        self._lookups: Lookups | None = None
        self._matches: list[SegmentMatch] = []
        self._reason = "no index was given"
        self._missing = False

    # --- opening ------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Open the view, if there is one to open. Never raises for a damaged index."""
        if self._source is None:
            return
        try:
            self._view = self._source.open_view(live=self._live)
            if self._view is None:
                self._missing = True
            else:
                self._state = self._view.state()
        except KvlodeError as error:
            self._unreadable(error)

    def look(self, store_uuid: bytes) -> None:
        """Is it this store's, and what does it know?"""
        state = self._state
        if state is None:
            return
        if state.store_uuid is not None and store_uuid and state.store_uuid != store_uuid:
            facts = {"expected": store_uuid.hex(), "actual": state.store_uuid.hex()}
            self._report.add(Finding("IDX-FOREIGN", INDEX_PATH, facts=facts))
            self._give_up("the index belongs to another store")
            return
        assert self._view is not None
        self._lookups = Lookups(self._view, state, self._kills, self._now_ns, self._report.add, self._stop, self._live)

    def close(self) -> None:
        """Close the view."""
        if self._view is not None:
            self._view.close()
            self._view = None

    def _unreadable(self, error: KvlodeError) -> None:
        self._report.add(Finding("IDX-UNREADABLE", INDEX_PATH, facts={"error": str(error)}))
        self._give_up("the index cannot be read")

    def _give_up(self, reason: str) -> None:
        self._reason = reason
        self._state = self._lookups = None

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """An index that turns out to be unreadable ends the pass, and is reported."""
        try:
            yield
        except IndexUnreadable as error:
            self._unreadable(error)

    # --- what other passes ask ----------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> tuple[int, int] | None:
        """Segment id and offset up to which the index says that the log was durable."""
        if self._lookups is None or self._lookups.state.checkpoint is None:
            return None
        return self._lookups.state.checkpoint[:2]

    @property
    def live_bytes(self) -> int:
        return 0 if self._lookups is None else self._lookups.live_bytes

    def why_not(self, level: Level) -> str:
        """Why a pass over the index cannot run at this level; empty when it can."""
        if self._missing:
            return "the store has no index"
        if self._lookups is None:
            return self._reason
        return "not at level quick" if level is Level.QUICK else ""

    def report_missing(self, refs: Sequence[SegmentRef]) -> None:
        """A store with segments should have an index."""
        if self._missing and refs:
            self._report.add(Finding("IDX-MISSING", INDEX_PATH))

    # --- segments -> index --------------------------------------------------------------------------------------------

    def match(self, reader: SegmentReader, records: SegmentRecords) -> None:
        """One segment."""
        assert self._lookups is not None
        self._matches.append(self._lookups.match(reader, records))

    @property
    def entries_matched(self) -> int:
        """Entries that point at a record: nearly all that there are. 0 where no segment was matched."""
        return sum(match.entries for match in self._matches)

    @property
    def has_orphans(self) -> bool:
        return any(match.orphans for match in self._matches)

    def drop_superseded(self, records: SegmentRecords) -> None:
        """Of the blocks without an entry, forget those that a later record of this segment has replaced."""
        sequences = {orphan.ident: orphan.record_seq for match in self._matches for orphan in match.orphans}
        replaced = superseded(sequences, records)
        if replaced:
            for match in self._matches:
                match.orphans = [orphan for orphan in match.orphans if orphan.ident not in replaced]

    def report_orphans(self) -> None:
        """Once every segment was matched."""
        assert self._lookups is not None
        if self._lookups.behind and not self._live:
            self._report.add(Finding("IDX-BEHIND", INDEX_PATH, facts={"count": self._lookups.behind}))
        if self._live:
            self._report.skipped["blocks without an entry"] = "a running writer may have deleted or evicted them"
        elif self.unjudged:
            self._report.skipped["blocks without an entry"] = "their deletes may be in a segment that could not be read"
        else:
            report_orphans(self._matches, self._report.add)

    # --- index -> segments --------------------------------------------------------------------------------------------

    def check_entries(self, store_uuid: bytes, refs: Sequence[SegmentRef], path: str, *, matched: bool) -> None:
        """Count the entries of every segment, and name those that dangle. Without ``matched`` only those whose segment is not there."""
        assert self._view is not None and self._state is not None
        self._check_checkpoint(refs, path)
        counts, unknown = count_entries(self._view, self._stop, self._progress)
        self._report.coverage.index_entries = sum(counts.values())
        if unknown:
            facts = {"count": counts.pop(-1), "key": unknown[0][16:].hex()}
            self._report.add(Finding("IDX-VALUE", INDEX_PATH, ident=unknown[0], facts=facts))
        sizes = {ref.segment_id: ref for ref in refs}
        absent = {segment_id for segment_id in counts if segment_id not in sizes and self._should_exist(segment_id, refs)}
        suspects = set(absent)
        if matched:
            entries = {match.segment_id: match.entries for match in self._matches}
            suspects |= {i for i in counts if i in sizes and i not in self.unjudged and counts[i] != entries.get(i, 0)}
        if not suspects:
            return
        with contextlib.ExitStack() as files:
            readers: dict[int, SegmentReader | None] = {}

            def missing(segment_id: int, ident: bytes, row: Row) -> str | None:
                if segment_id not in readers:
                    if len(readers) >= OPEN_FILES_MAX:
                        files.close()
                        readers.clear()
                    readers[segment_id] = self._opened(files, sizes[segment_id])
                reader = readers[segment_id]
                return None if reader is None else record_at(reader, store_uuid, ident, row)

            name_dangling(self._view, suspects, absent, missing, self._report.add, self._stop)

    def _opened(self, files: contextlib.ExitStack, ref: SegmentRef) -> SegmentReader | None:
        try:
            return files.enter_context(opened(self._device, ref))
        except DeviceError as error:
            self._report.errors.append(str(error))
            return None

    def _should_exist(self, segment_id: int, refs: Sequence[SegmentRef]) -> bool:
        """Beside a writer, segments come and go at both ends of the log."""
        if not self._live:
            return True
        return bool(refs) and refs[0].segment_id < segment_id < refs[-1].segment_id

    def _check_checkpoint(self, refs: Sequence[SegmentRef], path: str) -> None:
        assert self._state is not None
        checkpoint = self._state.checkpoint
        if checkpoint is None or self._live:
            return
        sizes = {ref.segment_id: ref.size_bytes for ref in refs}
        newest = max(sizes | dict.fromkeys(self._quarantined(path), 0), default=0)
        segment_id, offset, _ = checkpoint
        if segment_id > newest or offset > sizes.get(segment_id, offset):
            end = f"segment {newest:016x} offset {sizes.get(newest, 0)}"
            facts = {"expected": end, "actual": f"segment {segment_id:016x} offset {offset}"}
            self._report.add(Finding("IDX-CHECKPOINT", INDEX_PATH, segment_id, offset, facts=facts))

    def _quarantined(self, path: str) -> set[int]:
        try:
            names = self._device.list_folder(f"{path}/{QUARANTINE_FOLDER}")
        except DeviceError:
            return set()
        return {found for name in names if (found := parse_segment_name(name[:_SEGMENT_NAME_LENGTH])) is not None}
