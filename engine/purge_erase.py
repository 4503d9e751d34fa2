"""Taking the bytes of deleted records off the drive and out of memory (SPEC.md part 7, rule 9)."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from ..format.errors import DeviceError
from ..format.layout import PAGE_BYTES
from ..gds.buffers import aligned_array
from ..gds.device import Device, DeviceFile, OpenMode
from .purge_scan import TaggedRecord
from .segments import SegmentTable

logger = logging.getLogger("kvlode")

READERS_WAIT_S = 1.0
"""How long holes wait for reads of the segment that are under way; one that takes longer may find zeros, and says ``CORRUPT``."""
NOTE_ENDING = ".json"
_NOTED_BYTES = ("first_page", "headers")
"""What a note of the quarantine repeats of a damaged file."""


def erase_records(segments: SegmentTable, records: Sequence[TaggedRecord]) -> tuple[int, int]:
    """Punch holes under deleted records of sealed segments, durably. Returns how many had bytes, and how many bytes.

    The tombstones must be durable. Raises ``DeviceError``; what is done stays done, and all of it can be asked for again.
    """
    count = size_bytes = 0
    for segment_id, group in groupby(records, key=lambda record: record.segment_id):
        with segments.reading(segment_id) as reading:
            if reading is not None:
                segments.wait_readers(segment_id, 1, READERS_WAIT_S)
                with _opened(segments.device, segments.path(segment_id), "write") as file:
                    erased = _punch(file, list(group))
                count, size_bytes = count + len(erased), size_bytes + sum(record.size_bytes for record in erased)
    return count, size_bytes


def _punch(file: DeviceFile, records: list[TaggedRecord]) -> list[TaggedRecord]:
    """The records that still had bytes."""
    erased = [record for record in records if _has_bytes(file, record)]
    start = end = -1
    for record in records:  # also where a header is gone already: an earlier purge may have ended behind it
        if record.offset != end:
            if end > start:
                file.punch(start, end - start)
            start = record.offset
        end = record.offset + record.size_bytes
    if end > start:
        file.punch(start, end - start)
    file.sync()
    return erased


def stored_bytes(segments: SegmentTable, records: Sequence[TaggedRecord]) -> int:
    """Bytes of those records that were not erased yet."""
    size_bytes = 0
    for segment_id, group in groupby(records, key=lambda record: record.segment_id):
        with segments.reading(segment_id) as file:
            if file is not None:
                size_bytes += sum(record.size_bytes for record in group if _has_bytes(file, record))
    return size_bytes


def _has_bytes(file: DeviceFile, record: TaggedRecord) -> bool:
    page = aligned_array(PAGE_BYTES)
    try:
        return bool(page[: file.read_now(record.offset, [page])].any())
    except DeviceError:
        return True


def erase_quarantine(device: Device, folder: str) -> int:
    """Empty every file that a repair has set aside: what damaged bytes belong to cannot be told. Returns how many had bytes.

    Names stay, for their segment ids must not be given again; notes lose the header pages that they repeat.
    """
    count = 0
    for name in device.list_folder(folder):
        path = f"{folder}/{name}"
        status = device.status(path)
        try:
            if status is None or not status.size_bytes:
                continue
            if name.endswith(NOTE_ENDING):
                _shorten_note(device, path)
                continue
            with _opened(device, path, "write") as file:
                file.truncate(0)
                file.sync()
            count += 1
        except DeviceError as error:
            if device.status(path) is not None and _is_folder(device, path):  # an index that was set aside: it holds no payload
                continue
            raise error
    return count


def _is_folder(device: Device, path: str) -> bool:
    try:
        device.list_folder(path)
    except DeviceError:
        return False
    return True


def _shorten_note(device: Device, path: str) -> None:
    status = device.status(path)
    area = aligned_array(status.size_bytes if status is not None else 0)
    with _opened(device, path, "read") as file:
        text = bytes(area[: file.read_now(0, [area])]) if area.size else b""
    try:
        note = json.loads(text)
    except ValueError:
        note = {}
    if not isinstance(note, dict) or (note and not any(note.get(name) for name in _NOTED_BYTES)):
        return
    note = {name: value for name, value in note.items() if name not in _NOTED_BYTES} | {"purged": True}
    data = json.dumps(note, indent=1).encode() + b"\n"
    out = aligned_array(len(data))
    out[:] = np.frombuffer(data, np.uint8)
    with _opened(device, path, "write") as file:
        file.truncate(0)
        file.write(0, [out]).result()
        file.sync()


@contextlib.contextmanager
def _opened(device: Device, path: str, mode: OpenMode) -> Iterator[DeviceFile]:
    file = device.open(path, mode)
    try:
        yield file
    finally:
        file.close()
