"""Carrying out the actions of a plan, one at a time, so that the store can be opened after any operation of any of them.

Every action looks at what it is about to replace, keeps a copy in quarantine, and replaces it in an order in which a power
cut leaves the old state, the new one, or one that a further repair finishes. Nothing is unlinked. After an error or an
interrupt the action is simply begun again by the next repair.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from ...format.errors import CorruptRecord, DeviceError, FormatError
from ...format.layout import PAGE_BYTES, SUPERBLOCK_NAME, RecordType
from ...format.record import RecordHeader
from ...format.segment import SegmentHeader
from ...format.superblock import Superblock
from ...format.walk import parse_placed, resynchronise
from ...gds.buffers import aligned_array
from ...gds.device import Device, DeviceFile, OpenMode
from ..output import count_text
from .findings import Finding
from .index_view import IndexSource, IndexUnreadable
from .plan import Action
from .problems import Repair
from .quarantine import Quarantine, Reason, write_new_file
from .reseal import NewSeal, SegmentPlace, prepare_seal, reader, write_seal

LOOKUP_ENTRIES = 256
_SEALED_ONCE = ("SEG-SEAL-CRC", "SEG-SEAL-MISMATCH", "SEG-CUT")
"""Segments with one of these were sealed: all that they hold was durable."""
_TORN = ("SEG-UNSEALED", "SEG-TAIL-TORN")


class Repairer:
    """The actions on one store. The caller holds the writer's lock; for one thread.

    ``carry_out`` raises ``DeviceError`` for failed I/O and other ``KvlodeError`` where what is found is not what the
    plan was made for; the store is consistent then.
    """

    def __init__(self, device: Device, path: str, index: IndexSource | None, now_ns: int) -> None:
        self._device = device
        self._path = path
        self._index = index
        self._now_ns = now_ns
        self._quarantine = Quarantine(device, path, now_ns)
        self._carry: dict[Repair, Callable[[Action], str]] = {
            Repair.REWRITE_SUPERBLOCK: self._rewrite_superblock,
            Repair.REWRITE_HEADER: self._rewrite_header,
            Repair.SET_ASIDE: self._set_aside,
            Repair.RESEAL: self._reseal,
            Repair.DROP_ENTRIES: self._drop_entries,
            Repair.ADD_ENTRIES: self._add_entries,
            Repair.REBUILD_INDEX: self._rebuild_index,
        }

    def carry_out(self, action: Action) -> str:
        """Do it; returns what was done as one line."""
        return f"{action.path}: {self._carry[action.repair](action)} ({', '.join(action.problem_ids)})"

    # --- superblock and segment headers ------------------------------------------------------------------------------

    def _rewrite_superblock(self, action: Action) -> str:
        store_uuid = _uuid_of(action)
        place = f"{self._path}/{SUPERBLOCK_NAME}"
        kept = ""
        if self._device.status(place) is not None:
            with self._opened(place, "read") as file:
                size_bytes = file.status().size_bytes
                if size_bytes:
                    kept = self._quarantine.save(file, SUPERBLOCK_NAME, 0, size_bytes, _reason(action, [(0, size_bytes)]))
        temporary = f"{SUPERBLOCK_NAME}.tmp"
        if self._device.status(f"{self._path}/{temporary}") is not None:
            self._quarantine.set_aside(temporary, _reason(action))
        write_new_file(self._device, f"{self._path}/{temporary}", Superblock(store_uuid, self._now_ns).pack())
        self._device.rename(f"{self._path}/{temporary}", place)
        self._device.sync_folder(self._path)
        return f"written anew with uuid {store_uuid.hex()}{_kept_in(kept)}"

    def _rewrite_header(self, action: Action) -> str:
        store_uuid, segment_id = self._store_uuid(), _segment_of(action)
        with self._opened(f"{self._path}/{action.path}", "write") as file:
            size_bytes = file.status().size_bytes
            first = _first_record(file, size_bytes, store_uuid, segment_id)
            header = SegmentHeader.derived(
                store_uuid=store_uuid,
                segment_id=segment_id,
                epoch=first.epoch,
                size_bytes=size_bytes,
                created_at_ns=first.written_at_ns,
            )
            kept = self._quarantine.save(file, action.path, 0, PAGE_BYTES, _reason(action, [(0, PAGE_BYTES)]))
            page = aligned_array(PAGE_BYTES)
            page[:] = np.frombuffer(header.pack(), np.uint8)
            file.write(0, [page]).result()
            file.sync()
        return f"header written anew from the record at {first.offset}{_kept_in(kept)}"

    # --- whole segments ------------------------------------------------------------------------------------------------

    def _set_aside(self, action: Action) -> str:
        return f"moved to {self._quarantine.set_aside(action.path, _reason(action, _ranges(action)))}"

    def _reseal(self, action: Action) -> str:
        segment_id = _segment_of(action)
        with self._opened(f"{self._path}/{action.path}", "write") as file:
            size_bytes = file.status().size_bytes
            new = prepare_seal(reader(file), size_bytes, self._place(action, segment_id, size_bytes), action.cut, self._now_ns)
            kept = self._save_replaced(file, action, new)
            write_seal(file, new)
        parts = [f"sealed anew at {new.offset} with {count_text(new.listed, 'record')}"]
        if new.left_out:
            parts.append(f", {count_text(len(new.left_out), 'range')} of {sum(length for _, length in new.left_out)} bytes left out")
        if new.pages:
            parts.append(f", {count_text(len(new.pages), 'delete')} written anew")
        return "".join(parts) + _kept_in(kept)

    def _place(self, action: Action, segment_id: int, size_bytes: int) -> SegmentPlace:
        """What was durable: all of a segment that was sealed, of another one what the index knows."""
        if any(name in _SEALED_ONCE for name in action.problem_ids):
            return SegmentPlace(self._store_uuid(), segment_id, size_bytes)
        checkpoint = self._checkpoint()
        durable_bytes = 0
        if checkpoint is not None and segment_id <= checkpoint[0]:
            durable_bytes = size_bytes if segment_id < checkpoint[0] else checkpoint[1]
        return SegmentPlace(self._store_uuid(), segment_id, durable_bytes, torn=any(name in _TORN for name in action.problem_ids))

    def _save_replaced(self, file: DeviceFile, action: Action, new: NewSeal) -> str:
        """Copy what is written over or cut off, unless it is zeros: a torn tail of a preallocated file."""
        read = reader(file)
        headers = [(offset, bytes(read(offset, PAGE_BYTES))) for offset, _ in [*new.left_out, *new.pages]]
        length = new.old_bytes - new.offset
        if length <= 0 or not _any_written(file, new.offset, length):
            if not headers:
                return ""
            length = PAGE_BYTES
        reason = _reason(action, [*new.left_out, *((offset, PAGE_BYTES) for offset, _ in new.pages)], headers)
        return self._quarantine.save(file, action.path, new.offset, length, reason)

    # --- the index --------------------------------------------------------------------------------------------------------

    def _drop_entries(self, action: Action) -> str:
        """Only what still points where the finding says."""
        index = self._source()
        idents = [finding.ident for finding in self._pointing(action.findings, there=True)]
        dropped = index.drop(ident for ident in idents if ident is not None)
        return f"{count_text(dropped, 'entry', 'entries')} dropped"

    def _add_entries(self, action: Action) -> str:
        """Only for keys that still have no entry, and records that are still there."""
        index = self._source()
        records = [self._record(finding) for finding in self._pointing(action.findings, there=False)]
        added = index.add([header for header in records if header is not None])
        return f"{count_text(added, 'entry', 'entries')} added"

    def _rebuild_index(self, action: Action) -> str:
        return f"derived anew from the segments, {count_text(self._source().rebuild(), 'entry', 'entries')}"

    def _pointing(self, findings: tuple[Finding, ...], *, there: bool) -> list[Finding]:
        """Findings whose entry points to their place (``there``), or that have no entry."""
        view = self._source().open_view(live=False)
        if view is None:
            return []
        chosen: list[Finding] = []
        try:
            for start in range(0, len(findings), LOOKUP_ENTRIES):
                part = [finding for finding in findings[start : start + LOOKUP_ENTRIES] if finding.ident is not None]
                for finding, row in zip(part, view.get_many([f.ident for f in part if f.ident is not None]), strict=True):
                    place = None if row is None else (row.segment_id, row.offset)
                    if place == ((finding.segment_id, finding.offset) if there else None):
                        chosen.append(finding)
        finally:
            view.close()
        return chosen

    def _record(self, finding: Finding) -> RecordHeader | None:
        """The block record that a finding names; ``None`` when it is not there any more."""
        if finding.segment_id is None or finding.offset is None:
            return None
        with self._opened(f"{self._path}/segments/{finding.segment_id:016x}.seg", "read") as file:
            try:
                header = parse_placed(reader(file)(finding.offset, PAGE_BYTES), self._store_uuid(), finding.segment_id, finding.offset)
            except FormatError:
                return None
        return header if header.record_type is RecordType.BLOCK else None

    def _checkpoint(self) -> tuple[int, int, int] | None:
        """Of the index, where it can be read and is this store's."""
        try:
            view = None if self._index is None else self._index.open_view(live=False)
            if view is None:
                return None
            try:
                state = view.state()
            finally:
                view.close()
        except IndexUnreadable:
            return None
        return state.checkpoint if state.store_uuid == self._store_uuid() else None

    def _source(self) -> IndexSource:
        if self._index is None:
            raise DeviceError("repair of the index", f"{self._path}/index", errno=errno.ENOENT, detail="there is no access to it")
        return self._index

    def _store_uuid(self) -> bytes:
        page = aligned_array(PAGE_BYTES)
        with self._opened(f"{self._path}/{SUPERBLOCK_NAME}", "read") as file:
            count = file.read(0, [page]).result()
        return Superblock.parse(page[:count], where=f"{self._path}/{SUPERBLOCK_NAME}").store_uuid

    @contextmanager
    def _opened(self, path: str, mode: OpenMode) -> Iterator[DeviceFile]:
        file = self._device.open(path, mode)
        try:
            yield file
        finally:
            file.close()


def _reason(action: Action, ranges: list[tuple[int, int]] | None = None, headers: list[tuple[int, bytes]] | None = None) -> Reason:
    texts = [finding.text for finding in action.findings[:20]]
    more = len(action.findings) - len(texts)
    return Reason(action.problem_ids, "\n".join([*texts, *([f"and {more} more"] if more else [])]), ranges or (), headers or ())


def _ranges(action: Action) -> list[tuple[int, int]]:
    return [(f.offset, f.length) for f in action.findings if f.offset is not None and f.length is not None]


def _kept_in(path: str) -> str:
    return f"; what was there is kept in {path}" if path else ""


def _segment_of(action: Action) -> int:
    if action.segment_id is None:
        raise CorruptRecord("segment-id", where=action.path, expected="the id of a segment", actual="none")
    return action.segment_id


def _uuid_of(action: Action) -> bytes:
    """The uuid that the check found in the segments."""
    text = next((str(f.facts["store_uuid"]) for f in action.findings if f.facts.get("store_uuid")), "")
    if len(text) != 32:
        raise CorruptRecord(
            "store-uuid",
            where=action.path,
            expected="segments that say which store they belong to",
            actual="none",
            action="Nothing in this folder says which store it was; move it away and start empty.",
        )
    return bytes.fromhex(text)


def _first_record(file: DeviceFile, size_bytes: int, store_uuid: bytes, segment_id: int) -> RecordHeader:
    read = reader(file)
    end = size_bytes - size_bytes % PAGE_BYTES
    offset = resynchronise(read, start=PAGE_BYTES, end=end, store_uuid=store_uuid, segment_id=segment_id)
    if offset is None:
        raise CorruptRecord("segment-records", where=file.path, expected="a record of this store", actual="none")
    return parse_placed(read(offset, PAGE_BYTES), store_uuid, segment_id, offset)


def _any_written(file: DeviceFile, offset: int, length: int, step_bytes: int = 4 << 20) -> bool:
    read = reader(file)
    return any(
        np.frombuffer(read(start, min(step_bytes, offset + length - start)), np.uint8).any()
        for start in range(offset, offset + length, step_bytes)
    )
