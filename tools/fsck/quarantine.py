"""Quarantine: where a repair puts what it replaces. Files are renamed into it, bytes are copied; each has a JSON note.

Nothing is ever unlinked or written over there. The note is durable before the file is, so a file without a note was not
put there by a repair; a note without a file is what an interrupted repair leaves. The engine counts the folder in the
capacity of the store and never gives out a segment id that a name in it begins with.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ...format.errors import DeviceError
from ...format.layout import PAGE_BYTES, QUARANTINE_FOLDER
from ...gds.buffers import aligned_array
from ...gds.device import Device, DeviceFile

decisions = logging.getLogger("kvlode.decisions")
"""The engine's log of what is destroyed (``engine.decisions``), which this package does not import."""

SAVED_BYTES_MAX = 64 << 20
"""Of one range that is replaced; the note says when a range was longer."""
STEP_BYTES = 4 << 20
NOTE_SCHEMA = 1
HEADERS_MAX = 64
"""Header pages that a note repeats in full."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something goes into quarantine; what a note says besides its place and time."""

    problem_ids: tuple[str, ...]
    text: str
    ranges: Sequence[tuple[int, int]] = ()
    """Offset and length of the damaged parts in the file."""
    headers: Sequence[tuple[int, bytes]] = ()
    """Offset and bytes of header pages, good or bad."""


class Quarantine:
    """The folder of one store. For one thread; the caller holds the writer's lock. Every method may raise ``DeviceError``."""

    def __init__(self, device: Device, store_path: str, now_ns: int) -> None:
        self._device = device
        self._store_path = store_path
        self._folder = f"{store_path}/{QUARANTINE_FOLDER}"
        self._now_ns = now_ns

    def set_aside(self, relative_path: str, reason: Reason) -> str:
        """Rename a file of the store into quarantine, durably; returns its new path, relative to the store."""
        source_folder, _, name = f"{self._store_path}/{relative_path}".rpartition("/")
        target = self._free_name(name)
        header = self._first_page(f"{source_folder}/{name}")
        self._write_note(target, "moved file", relative_path, reason, {"first_page": header.rstrip(b"\0").hex()})
        self._device.rename(f"{source_folder}/{name}", f"{self._folder}/{target}")
        self._device.sync_folder(self._folder)
        self._device.sync_folder(source_folder)
        return f"{QUARANTINE_FOLDER}/{target}"

    def save(self, file: DeviceFile, relative_path: str, offset: int, length: int, reason: Reason) -> str:
        """Copy bytes of a file of the store that are about to be replaced, durably; returns the copy's path, relative to the store."""
        target = self._free_name(f"{relative_path.rpartition('/')[2]}.{offset:016x}.bytes")
        saved_bytes = min(length, SAVED_BYTES_MAX)
        self._write_note(target, "saved bytes", relative_path, reason, {"offset": offset, "length": length, "saved_bytes": saved_bytes})
        copy = self._device.open(f"{self._folder}/{target}", "create")
        try:
            for start in range(0, saved_bytes, STEP_BYTES):
                area = aligned_array(min(STEP_BYTES, saved_bytes - start))
                count = file.read(offset + start, [area]).result()
                copy.write(start, [area[:count]]).result()
            copy.sync()
        finally:
            copy.close()
        self._device.sync_folder(self._folder)
        return f"{QUARANTINE_FOLDER}/{target}"

    def _free_name(self, name: str) -> str:
        """``name``, or with the first number that is free; a name that only has a note is taken too."""
        self._device.make_folder(self._folder)
        taken = set(self._device.list_folder(self._folder))
        target, number = name, 1
        while target in taken or f"{target}.json" in taken:
            number += 1
            target = f"{name}.{number}"
        return target

    def _first_page(self, path: str) -> bytes:
        """Nothing for a folder."""
        page = aligned_array(PAGE_BYTES)
        try:
            file = self._device.open(path, "read")
            try:
                count = file.read(0, [page]).result()
            finally:
                file.close()
        except DeviceError as error:
            if error.errno != errno.EISDIR:
                raise
            count = 0
        return page[:count].tobytes()

    def _write_note(self, target: str, what: str, relative_path: str, reason: Reason, facts: dict[str, Any]) -> None:
        note = {
            "schema": NOTE_SCHEMA,
            "what": what,
            "from": relative_path,
            "problems": list(reason.problem_ids),
            "reason": reason.text,
            "ranges": [list(pair) for pair in reason.ranges],
            "headers": [{"offset": offset, "hex": page.rstrip(b"\0").hex()} for offset, page in reason.headers[:HEADERS_MAX]],
            "time": datetime.fromtimestamp(self._now_ns / 1e9, UTC).isoformat(timespec="seconds"),
            "time_ns": self._now_ns,
            **facts,
        }
        write_new_file(self._device, f"{self._folder}/{target}.json", json.dumps(note, indent=1).encode() + b"\n")
        place = {"from": relative_path, "to": f"{QUARANTINE_FOLDER}/{target}"}
        decision = {"event": "quarantined", "reason": reason.text, "what": what, **place}
        decisions.info("quarantined: %s (%s)", reason.text, relative_path, extra={"decision": decision, "store": self._folder})
        self._device.sync_folder(self._folder)


def write_new_file(device: Device, path: str, content: bytes) -> None:
    """Make a file with this content and sync it; its name is durable after a sync of the folder."""
    data = aligned_array(len(content))
    data[:] = np.frombuffer(content, np.uint8)
    file = device.open(path, "create")
    try:
        file.write(0, [data]).result()
        file.sync()
    finally:
        file.close()
