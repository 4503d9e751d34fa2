"""What a scrub remembers between its runs: of each segment when it was checked last, and what was found.

The file is one line of JSON and one with its checksum. It is derived: one that is missing, damaged, or of another store is
begun anew, and it may be deleted at any time.
"""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

from ...format.checksum import xxh3_64
from ...format.errors import DeviceError
from ...format.layout import SCRUB_NAME
from ...gds.buffers import aligned_array
from ...gds.device import Device
from ..fsck.problems import PROBLEMS, Severity
from ..fsck.quarantine import write_new_file

STATE_SCHEMA = 1
STATE_BYTES_MAX = 64 << 20
"""A longer file is not one of ours: this is room for a million segments."""


@dataclass(frozen=True, slots=True)
class SegmentState:
    """Of one segment."""

    checked_ns: int
    """UTC nanoseconds."""
    findings: dict[str, int] = field(default_factory=dict)
    """How many, by problem id."""
    unreadable: bool = False
    """The drive gave an error, so not every byte was seen."""

    @property
    def damaged(self) -> bool:
        """Something is wrong with it; notes do not count."""
        return any(PROBLEMS[name].severity is not Severity.NOTE for name in self.findings)


class ScrubState:
    """The segments of one store by id. For one thread."""

    def __init__(self, store_uuid: bytes) -> None:
        self._store_uuid = store_uuid
        self.segments: dict[int, SegmentState] = {}

    @classmethod
    def load(cls, device: Device, path: str, store_uuid: bytes) -> ScrubState:
        """From the store's folder; empty when there is none that can be used."""
        state = cls(store_uuid)
        try:
            content = _read_small(device, f"{path}/{SCRUB_NAME}")
        except DeviceError:  # a scrub can do without
            return state
        state.segments = _parse(content, store_uuid)
        return state

    def save(self, device: Device, path: str) -> None:
        """Replace the file, durably. Raises ``DeviceError``, also where the media can only be read."""
        temporary = f"{path}/{SCRUB_NAME}.tmp"
        if device.status(temporary) is not None:
            device.remove(temporary)
        write_new_file(device, temporary, self._pack())
        device.rename(temporary, f"{path}/{SCRUB_NAME}")
        device.sync_folder(path)

    def keep(self, segment_ids: Container[int]) -> None:
        """Forget every other segment."""
        self.segments = {segment_id: state for segment_id, state in self.segments.items() if segment_id in segment_ids}

    def order(self, segment_id: int) -> tuple[int, int, int]:
        """Sorts segments: those known to be damaged, those never checked, then the least recently checked."""
        state = self.segments.get(segment_id)
        if state is None:
            return (1, 0, segment_id)
        return (0 if state.damaged or state.unreadable else 2, state.checked_ns, segment_id)

    def is_due(self, segment_id: int, now_ns: int, interval_s: float) -> bool:
        """Never checked, or so long ago; a time in the future says nothing and counts as never."""
        state = self.segments.get(segment_id)
        return state is None or not 0 <= now_ns - state.checked_ns < interval_s * 1e9

    def _pack(self) -> bytes:
        segments = {
            f"{segment_id:016x}": {"checked_ns": state.checked_ns, "findings": state.findings, "unreadable": state.unreadable}
            for segment_id, state in sorted(self.segments.items())
        }
        line = json.dumps({"schema": STATE_SCHEMA, "store": self._store_uuid.hex(), "segments": segments}).encode()
        return line + b"\n%016x\n" % xxh3_64(line)


def _read_small(device: Device, place: str) -> bytes:
    status = device.status(place)
    if status is None or not 0 < status.size_bytes <= STATE_BYTES_MAX:
        return b""
    file = device.open(place, "read")
    try:
        area = aligned_array(status.size_bytes)
        return area[: file.read(0, [area]).result()].tobytes()
    finally:
        file.close()


def _parse(content: bytes, store_uuid: bytes) -> dict[int, SegmentState]:
    """Nothing where the content is not whole, or not of this store and schema."""
    line, _, checksum = content.partition(b"\n")
    if checksum != b"%016x\n" % xxh3_64(line):
        return {}
    try:
        value = json.loads(line)
        if value["schema"] != STATE_SCHEMA or value["store"] != store_uuid.hex():
            return {}
        return {int(name, 16): _segment(entry) for name, entry in value["segments"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # somebody else's file with a right checksum
        return {}


def _segment(entry: dict[str, Any]) -> SegmentState:
    findings = {str(name): int(count) for name, count in entry["findings"].items()}
    if not findings.keys() <= PROBLEMS.keys():
        raise ValueError("problems of another version")
    return SegmentState(int(entry["checked_ns"]), findings, bool(entry["unreadable"]))
