"""The seal of a segment: a record that closes it, a table of contents in columns, and the trailer page that ends the file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .bytetable import ByteTable, Field, PageTable, magic
from .checksum import Buffer, xxh3_64
from .errors import CorruptRecord, UnsupportedFormat
from .layout import (
    FORMAT_VERSION,
    PAGE_BYTES,
    SEGMENT_BYTES_MAX,
    SEGMENT_RECORDS_MAX,
    ZERO_DIGEST,
    RecordType,
    round_up,
    round_up_pages,
)
from .record import RecordHeader

TOC_MAGIC = magic("C")
COLUMN_ALIGNMENT_BYTES = 8

TOC_TABLE = ByteTable(
    title="table of contents header",
    size_bytes=64,
    fields=(
        Field(0, "u8[8]", "magic", "`89 4B 56 43 0D 0A 1A 0A`", "fixed"),
        Field(8, "u16", "version", "format version of this structure", "1"),
        Field(10, "u16", "header_bytes", "length of this header; the first column follows", "64"),
        Field(12, "u16", "column_count", "number of columns", "17"),
        Field(14, "zero[2]", "reserved_0", "reserved", "0"),
        Field(16, "u64", "record_count", "rows of every column", "0 to 2^28"),
        Field(24, "u64", "heap_bytes", "length of the key heap", "sum of key_length"),
        Field(32, "zero[32]", "reserved_1", "reserved", "0"),
    ),
)

COLUMN_TABLE = ByteTable(
    title="table of contents columns",
    size_bytes=120,
    fields=(
        Field(0, "u8", "type", "record type", "not 0"),
        Field(1, "u8", "codec", "codec of the record", "0 to 2"),
        Field(2, "u8", "element_size", "element size of the record", "1, 2, 4, 8"),
        Field(3, "u8", "key_length", "bytes of the key in the heap", "any"),
        Field(4, "u32", "page", "offset of the record divided by 4096", ">= 1, growing; records do not overlap"),
        Field(8, "u32", "record_pages", "pages of the whole record", ">= 1"),
        Field(12, "u32", "depth", "as in the record", "any"),
        Field(16, "u64", "raw_length", "as in the record", "<= 2^40"),
        Field(24, "u64", "stored_length", "as in the record", "record_pages - 1 pages"),
        Field(32, "u64", "version_seq", "as in the record", "any"),
        Field(40, "u64", "record_seq", "as in the record", "any"),
        Field(48, "u64", "written_at_ns", "as in the record", "any"),
        Field(56, "u64", "expires_at_ns", "as in the record", "any"),
        Field(64, "u64", "payload_checksum", "as in the record", "any"),
        Field(72, "u8[16]", "namespace", "as in the record", "any"),
        Field(88, "u8[16]", "tag", "as in the record", "any"),
        Field(104, "u8[16]", "parent", "as in the record", "any"),
    ),
)
"""Columns in the order in which they lie; the offsets are those inside a row of 120 bytes, if there were rows."""

_NUMPY_KINDS = {"u8": "u1", "u16": "<u2", "u32": "<u4", "u64": "<u8", "u8[16]": "V16"}
COLUMNS = tuple((field.name, np.dtype(_NUMPY_KINDS[field.kind])) for field in COLUMN_TABLE)
_ROW_DTYPE = np.dtype(list(COLUMNS))

TRAILER_TABLE = PageTable(
    title="trailer",
    size_bytes=PAGE_BYTES,
    magic=magic("T"),
    fields=(
        Field(0, "u8[8]", "magic", "`89 4B 56 54 0D 0A 1A 0A`", "fixed"),
        Field(8, "u16", "version", "format version of this structure", "1"),
        Field(10, "u16", "header_bytes", "length of this structure", "4096"),
        Field(12, "zero[4]", "reserved_0", "reserved", "0"),
        Field(16, "u8[16]", "store_uuid", "the store", "as in the superblock"),
        Field(32, "u64", "segment_id", "the segment", "as in the segment header"),
        Field(40, "u64", "epoch", "epoch of the writer that sealed the segment", "any"),
        Field(48, "u64", "data_end", "offset of the seal record", "multiple of 4096, >= 4096"),
        Field(56, "u64", "toc_offset", "offset of the table of contents", "data_end + 4096"),
        Field(64, "u64", "toc_bytes", "length of the table of contents", "64 to 2^40"),
        Field(72, "u64", "record_count", "records in the table of contents", "as in its header"),
        Field(80, "u64", "toc_checksum", "XXH3-64 over the table of contents", "any"),
        Field(88, "u64", "synced_bytes", "as in the seal record", "<= data_end"),
        Field(96, "zero[3992]", "reserved_1", "reserved", "0"),
        Field(4088, "u64", "checksum", "XXH3-64 over bytes 0 to 4087", "any"),
    ),
)


def column_offsets(record_count: int) -> tuple[int, ...]:
    """Start of each column in the table of contents and, last, the start of the key heap."""
    starts, position = [], TOC_TABLE.size_bytes
    for _, dtype in COLUMNS:
        starts.append(position)
        position = round_up(position + record_count * dtype.itemsize, COLUMN_ALIGNMENT_BYTES)
    return (*starts, position)


def toc_bytes(record_count: int, heap_bytes: int) -> int:
    """Length of a table of contents."""
    return column_offsets(record_count)[-1] + heap_bytes


class SealBuilder:
    """Collects the records of the open segment for its seal (about 120 bytes and the key each). For one thread at a time."""

    def __init__(self) -> None:
        self._rows = bytearray()
        self._heap = bytearray()

    @property
    def count(self) -> int:
        """Records added so far."""
        return len(self._rows) // COLUMN_TABLE.size_bytes

    def add(self, header: RecordHeader) -> None:
        """Append a record; call in the order of the log."""
        self._rows += COLUMN_TABLE.struct.pack(
            header.record_type,
            header.codec,
            header.element_size,
            len(header.key),
            header.offset // PAGE_BYTES,
            header.record_pages,
            header.depth,
            header.raw_length,
            header.stored_length,
            header.version_seq,
            header.record_seq,
            header.written_at_ns,
            header.expires_at_ns,
            header.payload_checksum,
            header.namespace,
            header.tag,
            header.parent,
        )
        self._heap += header.key

    def holds(self, record_type: RecordType, tag: bytes, below_seq: int) -> bool:
        """Whether a record of this type with this tag and a ``version_seq`` below ``below_seq`` was added."""
        return bool(len(self._rows_of(record_type, tag, below_seq)))

    def keys_of(self, record_type: RecordType, tag: bytes) -> list[tuple[bytes, int]]:
        """Namespace digest and key, and ``version_seq``, of the records of this type with this tag."""
        numbers = self._rows_of(record_type, tag, 1 << 64)
        if not len(numbers):
            return []
        rows = np.frombuffer(bytes(self._rows), dtype=_ROW_DTYPE)
        ends = np.cumsum(rows["key_length"], dtype=np.int64)
        found = []
        for number in numbers.tolist():
            key = bytes(self._heap[ends[number] - int(rows["key_length"][number]) : ends[number]])
            found.append((bytes(rows["namespace"][number]) + key, int(rows["version_seq"][number])))
        return found

    def _rows_of(self, record_type: RecordType, tag: bytes, below_seq: int) -> np.ndarray[Any, np.dtype[np.intp]]:
        rows = np.frombuffer(bytes(self._rows), dtype=_ROW_DTYPE)
        here = (rows["type"] == record_type) & (rows["tag"] == np.void(tag))
        return np.flatnonzero(here if below_seq >= 1 << 64 else here & (rows["version_seq"] < np.uint64(below_seq)))

    def size_bytes(self, extra_key_bytes: int = 0) -> int:
        """Bytes of the whole seal (record page, table of contents, trailer) if one more record with that key length were added."""
        return 2 * PAGE_BYTES + round_up_pages(toc_bytes(self.count + 1, len(self._heap) + extra_key_bytes))

    def pack(
        self,
        *,
        store_uuid: bytes,
        segment_id: int,
        epoch: int,
        offset: int,
        record_seq: int,
        synced_bytes: int,
        written_at_ns: int,
    ) -> bytes:
        """Seal record page, table of contents and trailer page, to be written at ``offset``; the file ends behind them."""
        toc = self._pack_toc()
        header = RecordHeader(
            record_type=RecordType.SEAL,
            store_uuid=store_uuid,
            segment_id=segment_id,
            offset=offset,
            epoch=epoch,
            version_seq=record_seq,
            record_seq=record_seq,
            synced_bytes=synced_bytes,
            namespace=ZERO_DIGEST,
            raw_length=len(toc),
            stored_length=len(toc),
            written_at_ns=written_at_ns,
            raw_checksum=xxh3_64(toc),
        )
        trailer = Trailer(
            store_uuid=store_uuid,
            segment_id=segment_id,
            epoch=epoch,
            data_end=offset,
            toc_bytes=len(toc),
            record_count=self.count,
            toc_checksum=header.raw_checksum,
            synced_bytes=synced_bytes,
        )
        seal = bytearray(header.record_bytes)
        view = memoryview(seal)
        header.pack_into(view[:PAGE_BYTES])
        view[PAGE_BYTES : PAGE_BYTES + len(toc)] = toc
        view[-PAGE_BYTES:] = trailer.pack()
        return bytes(seal)

    def _pack_toc(self) -> bytes:
        rows = np.frombuffer(bytes(self._rows), dtype=_ROW_DTYPE)
        starts = column_offsets(self.count)
        toc = bytearray(starts[-1])
        counts = {"record_count": self.count, "heap_bytes": len(self._heap), "column_count": len(COLUMNS)}
        TOC_TABLE.pack_into(toc, counts | {"magic": TOC_MAGIC, "version": FORMAT_VERSION, "header_bytes": TOC_TABLE.size_bytes})
        for start, (name, _) in zip(starts, COLUMNS, strict=False):
            column = rows[name].tobytes()
            toc[start : start + len(column)] = column
        return bytes(toc + self._heap)


@dataclass(frozen=True, slots=True)
class Trailer:
    """The last page of a sealed segment."""

    store_uuid: bytes
    segment_id: int
    epoch: int
    data_end: int
    toc_bytes: int
    record_count: int
    toc_checksum: int
    synced_bytes: int

    @property
    def toc_offset(self) -> int:
        return self.data_end + PAGE_BYTES

    @property
    def file_bytes(self) -> int:
        """Size of the file that this trailer ends."""
        return self.toc_offset + round_up_pages(self.toc_bytes) + PAGE_BYTES

    def pack(self) -> bytes:
        """The page."""
        page = bytearray(PAGE_BYTES)
        TRAILER_TABLE.pack_page(page, {name: getattr(self, name) for name in self.__slots__} | {"toc_offset": self.toc_offset})
        return bytes(page)

    @classmethod
    def parse(cls, page: Buffer, *, where: object = None) -> Trailer:
        """Raises ``CorruptRecord`` for anything but an intact trailer, ``UnsupportedFormat`` for a newer version."""
        row = TRAILER_TABLE.unpack_page(page, where=where)
        trailer = cls(**{name: getattr(row, name) for name in cls.__slots__})
        data_end = trailer.data_end
        if data_end % PAGE_BYTES or not PAGE_BYTES <= data_end < SEGMENT_BYTES_MAX:
            raise CorruptRecord("data-end", where=where, expected="a multiple of 4096, 4096 to 2^40", actual=data_end)
        if not TOC_TABLE.size_bytes <= trailer.toc_bytes <= SEGMENT_BYTES_MAX or trailer.file_bytes > SEGMENT_BYTES_MAX:
            raise CorruptRecord("toc-bytes", where=where, expected="64 to 2^40, inside the file", actual=trailer.toc_bytes)
        if row.toc_offset != trailer.toc_offset:
            raise CorruptRecord("toc-offset", where=where, expected=trailer.toc_offset, actual=row.toc_offset)
        if trailer.synced_bytes > data_end:
            raise CorruptRecord("synced-bytes", where=where, expected=f"at most {data_end}", actual=trailer.synced_bytes)
        return trailer


class SealTable:
    """A parsed table of contents: one NumPy array a column, in log order, without the seal itself.

    Columns (attributes): ``type``, ``codec``, ``element_size``, ``key_length`` (u8), ``page``, ``record_pages``, ``depth``
    (u32), ``raw_length``, ``stored_length``, ``version_seq``, ``record_seq``, ``written_at_ns``, ``expires_at_ns``,
    ``payload_checksum`` (u64), ``namespace``, ``tag``, ``parent`` (16 bytes each; ``.tolist()`` gives ``bytes``).
    """

    type: np.ndarray[Any, np.dtype[np.uint8]]
    codec: np.ndarray[Any, np.dtype[np.uint8]]
    element_size: np.ndarray[Any, np.dtype[np.uint8]]
    key_length: np.ndarray[Any, np.dtype[np.uint8]]
    page: np.ndarray[Any, np.dtype[np.uint32]]
    record_pages: np.ndarray[Any, np.dtype[np.uint32]]
    depth: np.ndarray[Any, np.dtype[np.uint32]]
    raw_length: np.ndarray[Any, np.dtype[np.uint64]]
    stored_length: np.ndarray[Any, np.dtype[np.uint64]]
    version_seq: np.ndarray[Any, np.dtype[np.uint64]]
    record_seq: np.ndarray[Any, np.dtype[np.uint64]]
    written_at_ns: np.ndarray[Any, np.dtype[np.uint64]]
    expires_at_ns: np.ndarray[Any, np.dtype[np.uint64]]
    payload_checksum: np.ndarray[Any, np.dtype[np.uint64]]
    namespace: np.ndarray[Any, np.dtype[np.void]]
    tag: np.ndarray[Any, np.dtype[np.void]]
    parent: np.ndarray[Any, np.dtype[np.void]]

    def __init__(self, columns: dict[str, np.ndarray[Any, Any]], heap: bytes) -> None:
        self.__dict__.update(columns)
        self._heap = heap
        self._key_ends = np.cumsum(columns["key_length"], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.type)

    def key(self, index: int) -> bytes:
        """Key of record ``index``."""
        end = int(self._key_ends[index])
        return self._heap[end - int(self.key_length[index]) : end]

    @cached_property
    def keys(self) -> list[bytes]:
        """Keys of all records."""
        ends = self._key_ends.tolist()
        return [self._heap[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)] if ends else []

    @property
    def data_end(self) -> int:
        """Byte offset behind the last record."""
        return PAGE_BYTES * (int(self.page[-1]) + int(self.record_pages[-1])) if len(self) else PAGE_BYTES

    @classmethod
    def parse(cls, toc: Buffer, *, where: object = None) -> SealTable:
        """The table in ``toc``, every length bounded by ``len(toc)``.

        The caller has compared the checksum in the trailer. Raises ``CorruptRecord`` or ``UnsupportedFormat``.
        """
        data = bytes(toc)
        count, heap_bytes = _parse_toc_header(data, where)
        *starts, heap_start = column_offsets(count)
        if heap_start + heap_bytes != len(data):
            raise CorruptRecord("toc-bytes", where=where, expected=heap_start + heap_bytes, actual=len(data))
        columns = {
            name: np.frombuffer(data, dtype=dtype, count=count, offset=start) for start, (name, dtype) in zip(starts, COLUMNS, strict=True)
        }
        _check_padding(data, starts, heap_start, count, where)
        _check_columns(columns, heap_bytes, where)
        return cls(columns, data[heap_start:])


def _parse_toc_header(data: bytes, where: object) -> tuple[int, int]:
    """Record count and heap length; both are at most what ``data`` can hold."""
    if len(data) < TOC_TABLE.size_bytes or data[:8] != TOC_MAGIC:
        raise CorruptRecord("magic", where=where, expected=TOC_MAGIC.hex(), actual=data[:8].hex())
    row = TOC_TABLE.unpack(data[: TOC_TABLE.size_bytes], where=where)
    if row.version > FORMAT_VERSION:
        raise UnsupportedFormat("a table of contents of a newer format", where=where, actual=row.version, action="Use a newer kvlode.")
    shape = (row.version, row.header_bytes, row.column_count)
    if shape != (FORMAT_VERSION, TOC_TABLE.size_bytes, len(COLUMNS)):
        raise CorruptRecord("toc-header", where=where, expected=(FORMAT_VERSION, TOC_TABLE.size_bytes, len(COLUMNS)), actual=shape)
    count, heap_bytes = row.record_count, row.heap_bytes
    if count > min(SEGMENT_RECORDS_MAX, len(data) // _ROW_DTYPE.itemsize) or heap_bytes > len(data):
        raise CorruptRecord("toc-counts", where=where, expected=f"what fits {len(data)} bytes", actual=(count, heap_bytes))
    return count, heap_bytes


def _check_padding(data: bytes, starts: list[int], heap_start: int, count: int, where: object) -> None:
    for start, end, (name, dtype) in zip(starts, [*starts[1:], heap_start], COLUMNS, strict=True):
        if any(data[start + count * dtype.itemsize : end]):
            raise CorruptRecord("reserved", where=where, expected=f"zeros behind column {name}", actual="other bytes")


_IS_ELEMENT_SIZE = np.isin(np.arange(256), (1, 2, 4, 8))


def _check_columns(columns: dict[str, np.ndarray[Any, Any]], heap_bytes: int, where: object) -> None:
    """Ranges of every column that a reader computes with; all vectorised."""
    ends = columns["page"].astype(np.int64) + columns["record_pages"]
    follows = columns["page"][1:] >= ends[:-1]
    seal_free = columns["type"] != RecordType.SEAL
    bounded = bool((columns["stored_length"] <= SEGMENT_BYTES_MAX).all())
    payload_pages = (columns["stored_length"].astype(np.int64) + PAGE_BYTES - 1) // PAGE_BYTES
    checks = {
        "key_length": int(columns["key_length"].sum(dtype=np.int64)) == heap_bytes,
        "type": bool(seal_free.all() and columns["type"].all()),
        "codec": bool((columns["codec"] <= 2).all()),
        "element_size": bool(_IS_ELEMENT_SIZE[columns["element_size"]].all()),
        "page": bool(follows.all() and columns["page"].all() and ends.max(initial=0) <= SEGMENT_RECORDS_MAX),
        "raw_length": bool((columns["raw_length"] <= SEGMENT_BYTES_MAX).all()),
        "stored_length": bounded and bool((payload_pages + 1 == columns["record_pages"]).all()),
    }
    for name, good in checks.items():
        if not good:
            raise CorruptRecord("toc-column", where=where, expected=f"values of column {name} within SPEC.md part 4", actual="others")
