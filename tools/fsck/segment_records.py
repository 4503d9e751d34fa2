"""The records of one segment as its table of contents lists them, and what a header page must say to agree with it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...format.errors import CorruptRecord, UnsupportedFormat
from ...format.layout import PAGE_BYTES, RecordType
from ...format.record import RecordHeader
from ...format.seal import COLUMN_TABLE, COLUMNS, SealTable
from ...format.walk import parse_placed
from .check_segments import SegmentLook
from .findings import Finding
from .source import SegmentRef

_ZEROS = "a page of zeros"


class SegmentRecords:
    """The rows of one segment as the passes want them."""

    def __init__(self, look: SegmentLook, table: SealTable, store_uuid: bytes) -> None:
        self.look = look
        self.ref: SegmentRef = look.ref
        self.table = table
        self.store_uuid = store_uuid
        self.offsets: list[int] = (table.page.astype(np.int64) * PAGE_BYTES).tolist()
        self.lengths: list[int] = (table.record_pages.astype(np.int64) * PAGE_BYTES).tolist()
        rows = np.zeros(len(table), dtype=list(COLUMNS))
        for name, _ in COLUMNS:
            rows[name] = getattr(table, name)
        self._rows = rows.tobytes()

    def __len__(self) -> int:
        return len(self.offsets)

    def ident(self, row: int) -> bytes:
        return bytes(self.table.namespace[row]) + self.table.key(row)

    def finding(self, problem_id: str, row: int, **facts: Any) -> Finding:
        """A finding about the record of a row."""
        place = (self.ref.name, self.ref.segment_id, self.offsets[row], self.lengths[row])
        ident = self.ident(row) if self.table.type[row] == RecordType.BLOCK else None
        return Finding(problem_id, *place, ident=ident, facts=facts)

    def check_header(self, row: int, page: memoryview | bytes) -> tuple[RecordHeader | None, Finding | None]:
        """The header in a page that was read at a row's offset, and what is wrong with it."""
        offset = self.offsets[row]
        try:
            if len(page) < PAGE_BYTES:
                raise CorruptRecord("record-truncated", expected=f"{PAGE_BYTES} bytes", actual=len(page))
            header = parse_placed(page, self.store_uuid, self.ref.segment_id, offset)
        except UnsupportedFormat as error:
            return None, self.finding("REC-UNKNOWN", row, error=str(error))
        except CorruptRecord as error:
            return None, self.damaged_header(row, str(error) if any(page) else _ZEROS)
        return header, self._compare(row, header)

    def damaged_header(self, row: int, error: str) -> Finding:
        kind = int(self.table.type[row])
        name = RecordType(kind).name.lower().replace("_", " ") if kind in set(RecordType) else f"record of type {kind}"
        facts = {"type": name, "key": self.table.key(row).hex(), "namespace": bytes(self.table.namespace[row]).hex(), "error": error}
        return self.finding("REC-HDR-CRC", row, **facts)

    def _compare(self, row: int, header: RecordHeader) -> Finding | None:
        """Table against record: one comparison of packed rows, and the columns one by one only where they differ."""
        values = row_values(header)
        size = COLUMN_TABLE.size_bytes
        if self._rows[row * size : (row + 1) * size] == COLUMN_TABLE.struct.pack(*values) and self.table.key(row) == header.key:
            return None
        for (name, _), value in zip(COLUMNS, values, strict=True):
            listed = getattr(self.table, name)[row]
            plain = bytes(listed) if isinstance(value, bytes) else int(listed)
            if plain != value:
                return self.finding("SEG-SEAL-MISMATCH", row, what=name, expected=_text(plain), actual=_text(value))
        return self.finding("SEG-SEAL-MISMATCH", row, what="key", expected=self.table.key(row).hex(), actual=header.key.hex())


def row_values(header: RecordHeader) -> tuple[Any, ...]:
    """What the table of contents says of a record, in the order of its columns."""
    by_name = {"type": header.record_type, "key_length": len(header.key), "page": header.offset // PAGE_BYTES}
    return tuple(by_name[name] if name in by_name else getattr(header, name) for name, _ in COLUMNS)


def _text(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def undescribed_namespaces(records: SegmentRecords) -> list[Finding]:
    """Namespaces of blocks that no namespace record of the segment describes."""
    table = records.table
    blocks = table.namespace[table.type == RecordType.BLOCK]
    described = set(table.namespace[table.type == RecordType.NAMESPACE].tolist())
    found: list[Finding] = []
    for digest in sorted(set(blocks.tolist()) - described):
        rows = np.flatnonzero((table.type == RecordType.BLOCK) & (table.namespace == np.void(digest)))
        found.append(records.finding("REC-NS-MISSING", int(rows[0]), count=len(rows), namespace=digest.hex()))
    return found
