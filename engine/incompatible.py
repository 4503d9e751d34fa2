"""A store that this version cannot write is moved away, or removed, so that an upgrade or a downgrade never stops an engine.

A cache may be lost; an engine that does not start is worse. What counts as incompatible: a newer format version, unknown feature bits
or record types, a superblock that is damaged or gone. What does not count: a folder without any sign of a kvlode store, which is never
touched, and a store whose writer runs, whose lock is held.

``set_aside`` renames the folder, in one step, and nothing in it is changed: whoever can read it may use it again. What was set aside
counts in nobody's capacity; delete it when it is not needed. ``fresh`` removes the store's own files, the superblock last, so that
what a crash leaves is incompatible still and handled again; a folder with files of others in it is refused.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime

from ..format.errors import DeviceError, FormatError, UnsupportedFormat
from ..format.layout import (
    FOLLOWERS_NAME,
    HEAT_NAME,
    INDEX_FOLDER,
    LOCK_NAME,
    PAGE_BYTES,
    QUARANTINE_FOLDER,
    SCRUB_NAME,
    SEGMENTS_FOLDER,
    STATS_FOLDER,
    SUPERBLOCK_NAME,
    parse_segment_name,
)
from ..format.segment import SEGMENT_TABLE
from ..format.superblock import SUPERBLOCK_TABLE
from ..gds.buffers import aligned_array
from ..gds.device import Device

logger = logging.getLogger("kvlode")

SEGMENTS_LOOKED_AT = 16
"""Of a folder without a usable superblock, before it is called foreign."""
_FILES = (SUPERBLOCK_NAME + ".tmp", FOLLOWERS_NAME, HEAT_NAME, SCRUB_NAME, SCRUB_NAME + ".tmp", "index.rebuild")
_FOLDERS = (INDEX_FOLDER, QUARANTINE_FOLDER, STATS_FOLDER)


@dataclass(frozen=True, slots=True)
class Replaced:
    """What became of an incompatible store when its folder was opened; ``Store.stats()["replaced_store"]``."""

    how: str
    """``set_aside`` or ``fresh``."""
    reason: str
    at_ns: int
    moved_to: str | None
    """Where it is now; ``None`` when it was removed."""


def is_kvlode_store(device: Device, path: str) -> bool:
    """Whether a folder shows any sign of a kvlode store: the first bytes of its superblock or of a segment."""
    if _starts_with(device, f"{path}/{SUPERBLOCK_NAME}", SUPERBLOCK_TABLE.magic):
        return True
    folder = f"{path}/{SEGMENTS_FOLDER}"
    try:
        names = [name for name in device.list_folder(folder) if parse_segment_name(name) is not None]
    except DeviceError:
        return False
    return any(_starts_with(device, f"{folder}/{name}", SEGMENT_TABLE.magic) for name in names[:SEGMENTS_LOOKED_AT])


def _starts_with(device: Device, path: str, magic: bytes) -> bool:
    page = aligned_array(PAGE_BYTES)
    try:
        file = device.open(path, "read")
    except DeviceError:
        return False
    try:
        count = file.read_now(0, [page])
    except DeviceError:
        return False
    finally:
        file.close()
    return page[: min(count, len(magic))].tobytes() == magic


def replace_store(device: Device, path: str, how: str, error: FormatError, now_ns: int) -> Replaced:
    """Make room for an empty store. The caller holds the writer's lock. Raises ``UnsupportedFormat`` or ``DeviceError``."""
    if how == "set_aside":
        moved_to = _set_aside(device, os.path.realpath(path), now_ns)
        logger.warning("the store %s is incompatible and was set aside as %s; an empty one is made. Reason: %s", path, moved_to, error)
        return Replaced(how, str(error), now_ns, moved_to)
    _check_all_own(device, path, error)
    logger.warning("the store %s is incompatible and is removed; an empty one is made. Reason: %s", path, error)
    _remove(device, path)
    return Replaced(how, str(error), now_ns, None)


def _set_aside(device: Device, path: str, now_ns: int) -> str:
    stamp = datetime.fromtimestamp(now_ns / 1e9, UTC).strftime("%Y%m%dT%H%M%SZ")
    target, number = f"{path}.set-aside-{stamp}", 1
    while os.path.lexists(target):
        number += 1
        target = f"{path}.set-aside-{stamp}-{number}"
    try:
        device.rename(path, target)  # a crash behind this leaves no folder, which the next opening makes anew
    except DeviceError as error:
        action = "Its folder must be no mount point, and the folder above it writable; or move it away by hand, or use 'fresh'."
        raise DeviceError("set an incompatible store aside", path, errno=error.errno, detail=target, action=action) from error
    device.make_folder(path)
    device.sync_folder(os.path.dirname(path))
    return target


def _check_all_own(device: Device, path: str, error: FormatError) -> None:
    """Nothing is removed from a folder that holds anything but a store."""
    known = {SUPERBLOCK_NAME, LOCK_NAME, SEGMENTS_FOLDER, *_FILES, *_FOLDERS}
    foreign = [name for name in device.list_folder(path) if name not in known and not name.startswith(f"{INDEX_FOLDER}.damaged-")]
    folder = f"{path}/{SEGMENTS_FOLDER}"
    names = device.list_folder(folder) if os.path.isdir(folder) else []
    foreign += [f"{SEGMENTS_FOLDER}/{name}" for name in names if parse_segment_name(name) is None and not name.endswith(".new")]
    if foreign:
        raise UnsupportedFormat(
            "this incompatible store is not removed, for its folder holds other files",
            where=path,
            expected="nothing but the store's own files",
            actual=", ".join(foreign[:5]),
            action=f"Move them away, or open with on_incompatible='set_aside'. The store is incompatible because: {error}",
        ) from error


def _remove(device: Device, path: str) -> None:
    """Oldest segments first, as reclaim does, the superblock last."""
    folder = f"{path}/{SEGMENTS_FOLDER}"
    for name in device.list_folder(folder) if os.path.isdir(folder) else []:
        device.remove(f"{folder}/{name}")
        device.sync_folder(folder)
    damaged = [name for name in device.list_folder(path) if name.startswith(f"{INDEX_FOLDER}.damaged-")]
    for name in [*_FOLDERS, *damaged]:
        shutil.rmtree(f"{path}/{name}", ignore_errors=False) if os.path.isdir(f"{path}/{name}") else None
    for name in [*_FILES, SUPERBLOCK_NAME]:
        if device.status(f"{path}/{name}") is not None:
            device.remove(f"{path}/{name}")
    device.sync_folder(path)
