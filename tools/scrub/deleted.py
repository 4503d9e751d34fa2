"""Zeros in the place of a block are a purge when the block is deleted, else damage: asked only where zeros were met.

A check of a whole store reads its segments from the newest to the oldest, and so knows every deletion in time. A scrub takes them in
any order, beside a writer that goes on deleting. It notes which blocks lie in zeros, and reads the deletions behind them
once it has read the segment.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...format.errors import CorruptRecord, FormatError
from ...format.seal import SealTable
from ...gds.device import Device
from ..fsck.check_segments import SegmentLook, load_table
from ..fsck.findings import Finding
from ..fsck.kills import Kills
from ..fsck.segment_records import SegmentRecords
from ..fsck.source import SegmentReader, list_segments, opened


class OpenQuestions(Kills):
    """Answers no whenever it is asked, and remembers the question."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[tuple[bytes, int]] = set()
        """Index key and ``version_seq``."""

    def killed(self, ident: bytes, version_seq: int, until_seq: int | None = None) -> bool:
        """See ``Kills``: not as far as is known."""
        self.asked.add((ident, version_seq))
        return False


def purged_findings(
    findings: Sequence[Finding], records: SegmentRecords, questions: OpenQuestions, device: Device, path: str
) -> list[Finding]:
    """The findings about zeros whose block turns out to be deleted. Raises ``DeviceError``."""
    if not questions.asked:
        return []
    kills = _kills_from(device, path, records.ref.segment_id, records.store_uuid)
    versions = dict(zip(records.offsets, records.table.version_seq.tolist(), strict=True))

    def purged(finding: Finding) -> bool:
        if finding.ident is None or finding.offset is None:
            return False
        question = (finding.ident, int(versions.get(finding.offset, 0)))
        return question in questions.asked and kills.killed(*question)

    return [finding for finding in findings if purged(finding)]


def _kills_from(device: Device, path: str, segment_id: int, store_uuid: bytes) -> Kills:
    """The deletions of this segment and the later ones, the unsealed included. What cannot be understood deletes nothing."""
    kills = Kills()
    for ref in list_segments(device, path)[0]:
        if ref.segment_id < segment_id:
            continue
        with opened(device, ref) as reader:
            table = None if reader is None else _table(reader, store_uuid)
        if table is not None:
            kills.add(table)
    return kills


def _table(reader: SegmentReader, store_uuid: bytes) -> SealTable | None:
    end = reader.data_end()
    for listed in (True, False):
        try:
            return load_table(reader, SegmentLook(reader.ref, listed, listed, data_end=end, durable_bytes=0), store_uuid)
        except CorruptRecord:
            continue
        except FormatError:
            break
    return None
