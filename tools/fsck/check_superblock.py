"""Pass "superblock and lock": is this a store, whose is it, and can it be opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ...format.errors import CorruptRecord, DeviceError, FormatError, UnsupportedFormat
from ...format.layout import PAGE_BYTES, SUPERBLOCK_NAME
from ...format.segment import SEGMENT_TABLE, SegmentHeader
from ...format.superblock import SUPERBLOCK_TABLE, Superblock
from ...gds.device import Device
from ..segment_view import first_record
from .findings import Finding
from .source import SegmentReader, SegmentRef, opened, read_page


@dataclass(frozen=True, slots=True)
class FirstPage:
    """The first page of a segment: its header, or why there is none."""

    ref: SegmentRef
    header: SegmentHeader | None
    error: FormatError | None
    blank: bool
    """Nothing but zeros, or no page at all."""
    foreign: bool
    """Starts with neither zeros nor the magic of a segment: no crash leaves that."""
    record_uuid: bytes | None
    """Store that the first record names, where the header does not say."""


def read_first_pages(device: Device, refs: Sequence[SegmentRef], errors: list[str]) -> list[FirstPage]:
    """Headers of all segments. Files that are gone are left out; those that cannot be read become ``errors``."""
    found: list[FirstPage] = []
    for ref in refs:
        try:
            with opened(device, ref) as reader:
                if reader is not None:
                    found.append(read_first_page(reader))
        except DeviceError as error:
            errors.append(str(error))
    return found


def read_first_page(reader: SegmentReader) -> FirstPage:
    """Header of one segment. Raises ``DeviceError``."""
    page = bytes(reader.read(0, PAGE_BYTES))
    try:
        header = SegmentHeader.parse(page, where=reader.ref.name)
        return FirstPage(reader.ref, header, None, blank=False, foreign=False, record_uuid=None)
    except FormatError as error:
        foreign = page[:8] not in (SEGMENT_TABLE.magic, bytes(8), b"")
        record = first_record(reader.read)
        return FirstPage(reader.ref, None, error, not any(page), foreign, None if record is None else record.store_uuid)


def majority_uuid(pages: Sequence[FirstPage]) -> bytes | None:
    """The store that most segments name; ``None`` when none does."""
    votes = Counter(page.header.store_uuid if page.header is not None else page.record_uuid for page in pages)
    votes.pop(None, None)
    return votes.most_common(1)[0][0] if votes else None


@dataclass(frozen=True, slots=True)
class StoreIdentity:
    """What the pass found. ``uuid`` is ``None`` when nothing says whose store this is."""

    uuid: bytes | None
    findings: list[Finding]
    readable: bool
    """False when the format is newer, or foreign: the rest must not be interpreted."""


def check_superblock(device: Device, path: str, names: Sequence[str], pages: Sequence[FirstPage]) -> StoreIdentity:
    """Check the file ``STORE`` of a folder that has these ``names``. Raises ``DeviceError`` when it cannot be read."""
    findings: list[Finding] = []
    if f"{SUPERBLOCK_NAME}.tmp" in names:
        findings.append(Finding("SB-LEFTOVER", f"{SUPERBLOCK_NAME}.tmp"))
    elected = majority_uuid(pages)
    uuid_text = elected.hex() if elected is not None else ""
    if SUPERBLOCK_NAME not in names:
        findings.append(Finding("SB-MISSING", SUPERBLOCK_NAME, facts={"segments": len(pages), "store_uuid": uuid_text}))
        return StoreIdentity(elected, findings, readable=True)
    page = read_page(device, f"{path}/{SUPERBLOCK_NAME}")
    try:
        superblock = Superblock.parse(page, where=SUPERBLOCK_NAME)
    except UnsupportedFormat as error:
        # Another magic is a foreign file, unless the segments beside it say that a store was here.
        if page[:8] != SUPERBLOCK_TABLE.magic and elected is not None:
            findings.append(_damaged(error, uuid_text))
            return StoreIdentity(elected, findings, readable=True)
        findings.append(Finding("SB-VERSION", SUPERBLOCK_NAME, offset=0, facts={"error": str(error)}))
        return StoreIdentity(None, findings, readable=False)
    except CorruptRecord as error:
        findings.append(_damaged(error, uuid_text))
        return StoreIdentity(elected, findings, readable=True)
    status = device.status(f"{path}/{SUPERBLOCK_NAME}")
    if status is not None and status.size_bytes != PAGE_BYTES:
        length = CorruptRecord("length", where=SUPERBLOCK_NAME, expected=f"{PAGE_BYTES} bytes", actual=status.size_bytes)
        findings.append(_damaged(length, superblock.store_uuid.hex()))
    return StoreIdentity(superblock.store_uuid, findings, readable=True)


def _damaged(error: FormatError, uuid_text: str) -> Finding:
    return Finding("SB-CRC", SUPERBLOCK_NAME, offset=0, length=PAGE_BYTES, facts={"error": str(error), "store_uuid": uuid_text})
