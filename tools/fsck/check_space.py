"""Passes "space" and "quarantine": what the bytes under a store's folder are, and what lies there that should not."""

from __future__ import annotations

from collections.abc import Sequence

from ...format.errors import DeviceError
from ...format.layout import (
    FOLLOWERS_NAME,
    HEAT_NAME,
    INDEX_FOLDER,
    LOCK_NAME,
    QUARANTINE_FOLDER,
    SCRUB_NAME,
    SEGMENTS_FOLDER,
    STATS_FOLDER,
    SUPERBLOCK_NAME,
)
from ...gds.device import Device
from .findings import Finding
from .source import SegmentRef

QUARANTINE_SHARE = 20
"""Quarantine should take at most this fraction of the store: 5 %."""
QUARANTINE_FREE_BYTES = 16 << 20
"""Less than this is never too much, however small the store."""
NOTE_SUFFIX = ".json"
_OWN_NAMES = {
    SUPERBLOCK_NAME,
    f"{SUPERBLOCK_NAME}.tmp",
    LOCK_NAME,
    FOLLOWERS_NAME,
    HEAT_NAME,
    SCRUB_NAME,
    f"{SCRUB_NAME}.tmp",
    SEGMENTS_FOLDER,
    INDEX_FOLDER,
    STATS_FOLDER,
    QUARANTINE_FOLDER,
}
_OWN_PREFIXES = (f"{INDEX_FOLDER}.damaged-", f"{INDEX_FOLDER}.rebuild")


def check_names(names: Sequence[str], segment_names: Sequence[str]) -> list[Finding]:
    """Strange names in the store's folder, and names in ``segments/`` that are no segments."""
    strange = [name for name in names if name not in _OWN_NAMES and not name.startswith(_OWN_PREFIXES)]
    found = [Finding("SPC-STRANGE", name) for name in strange]
    for name in segment_names:
        found.append(Finding("SEG-SPARE" if name.endswith(".new") else "SEG-NAME", f"{SEGMENTS_FOLDER}/{name}"))
    return found


def folder_bytes(device: Device, folder: str) -> int:
    """Allocated bytes of the files in a folder; 0 when there is none. Files that vanish meanwhile, and folders, do not count."""
    return sum(size_bytes for _, size_bytes in _files(device, folder))


def _files(device: Device, folder: str) -> list[tuple[str, int]]:
    try:
        names = device.list_folder(folder)
    except DeviceError:
        return []
    found: list[tuple[str, int]] = []
    for name in names:
        try:
            status = device.status(f"{folder}/{name}")
        except DeviceError:  # a folder, on devices that tell
            continue
        if status is not None:
            found.append((name, status.allocated_bytes))
    return found


def account(device: Device, path: str, names: Sequence[str], refs: Sequence[SegmentRef], others: Sequence[str]) -> dict[str, int]:
    """Allocated bytes by use: ``segments``, ``spare``, ``index``, ``quarantine``, ``other``."""
    space = {"segments": sum(ref.allocated_bytes for ref in refs)}
    listed = {name: size_bytes for name, size_bytes in _files(device, f"{path}/{SEGMENTS_FOLDER}") if name in set(others)}
    space["spare"] = sum(listed.values())
    indexes = [name for name in names if name == INDEX_FOLDER or name.startswith(_OWN_PREFIXES)]
    space["index"] = sum(folder_bytes(device, f"{path}/{name}") for name in indexes)
    space["quarantine"] = folder_bytes(device, f"{path}/{QUARANTINE_FOLDER}") if QUARANTINE_FOLDER in names else 0
    folders = {SEGMENTS_FOLDER, QUARANTINE_FOLDER, STATS_FOLDER, *indexes}
    space["other"] = sum(size_bytes for name, size_bytes in _files(device, path) if name not in folders)
    space["other"] += folder_bytes(device, f"{path}/{STATS_FOLDER}") if STATS_FOLDER in names else 0
    return space


def check_quarantine(device: Device, path: str, names: Sequence[str], space: dict[str, int]) -> list[Finding]:
    """Files without a note, and too much of it."""
    if QUARANTINE_FOLDER not in names:
        return []
    kept = {name for name, _ in _files(device, f"{path}/{QUARANTINE_FOLDER}")}
    files = sorted(name for name in kept if not name.endswith(NOTE_SUFFIX))
    found = [Finding("QUA-NOTE", f"{QUARANTINE_FOLDER}/{name}") for name in files if name + NOTE_SUFFIX not in kept]
    used_bytes = space["quarantine"]
    allowed_bytes = max(sum(space.values()) // QUARANTINE_SHARE, QUARANTINE_FREE_BYTES)
    if used_bytes > allowed_bytes:
        facts = {"actual": used_bytes, "expected": allowed_bytes}
        found.append(Finding("QUA-SIZE", QUARANTINE_FOLDER, length=used_bytes, facts=facts))
    return found
