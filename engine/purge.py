"""Purging: every block of a tag goes, durably, and where it is asked for its bytes with it.

First what the buffer holds is deleted, so that nothing of it can reach the log any more, and the open segment is sealed when it holds
blocks of the tag: then everything lies in sealed segments, whose tables of contents say the tag. They are worked off in rounds of
bounded size: gather, tombstones, flush, and for a physical purge holes under what is now durably deleted. Copies that reclaim makes
meanwhile keep their version and lie in later segments, so they are met later in the same pass.

A tombstone of a purge carries the tag. So a second purge of it knows what the first one has deleted, and writes nothing for it again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..format.errors import DeviceError, InvalidKey, KvlodeError, StoreFailed
from ..format.keys import tag_digest
from ..format.layout import QUARANTINE_FOLDER, ZERO_DIGEST, RecordType
from ..gds.monitor import Monitor, Outcome
from .contract import PurgeReport, PutStatus, Refusal
from .entry import Entry, Kind
from .purge_erase import erase_quarantine, erase_records, stored_bytes
from .purge_scan import Found, TagScan

if TYPE_CHECKING:
    from .core import Core

REMOVAL_WAIT_S = 30.0
REASONS_MAX = 16
"""Reasons that a report repeats."""


def checked_tag(tag: str | bytes) -> bytes:
    """The digest of a tag that can be purged. Raises ``InvalidKey``: blocks without a tag are not a tenant's."""
    digest = tag_digest(tag)
    if digest == ZERO_DIGEST:
        raise InvalidKey("there is no tag to purge", expected="the str or bytes that blocks were put with", actual=repr(tag))
    return digest


def purge_store(core: Core, tag: str | bytes, *, physical: bool, timeout_s: float | None) -> PurgeReport:
    """See ``contract.Store.purge``. The work runs on a thread of its own; an interrupt of the caller ends it after the round at hand."""
    digest = checked_tag(tag)
    if core.refusal() in (Refusal.READ_ONLY, Refusal.STORE_FAILED):
        raise StoreFailed(
            "purge needs a store that can write",
            where=core.path,
            expected="an open writer",
            actual=str(core.refusal()),
            action="Open the store for writing, or close and reopen it after a failure.",
        )
    purge = Purge(core, digest, physical=physical, timeout_s=timeout_s)
    outcome: Outcome[PurgeReport] = Outcome()
    threading.Thread(target=outcome.run, args=(purge.run,), name="kvlode-purge", daemon=True).start()
    try:
        return outcome.result()
    except BaseException:
        purge.stop()
        raise


def find_tagged(core: Core, tag: str | bytes) -> tuple[int, int]:
    """Blocks that a purge of this tag would delete now, and bytes that a physical one would erase, deleted blocks included."""
    return Purge(core, checked_tag(tag), physical=False, timeout_s=None).survey()


def sum_of_reports(reports: Sequence[PurgeReport]) -> PurgeReport:
    """What purges of one tag in several stores did together. A block that lay in two of them counts twice."""
    return PurgeReport(
        tag=reports[0].tag,
        physical=reports[0].physical,
        blocks=sum(report.blocks for report in reports),
        records_erased=sum(report.records_erased for report in reports),
        bytes_erased=sum(report.bytes_erased for report in reports),
        quarantine_files_erased=sum(report.quarantine_files_erased for report in reports),
        complete=all(report.complete for report in reports),
        reasons=tuple(reason for report in reports for reason in report.reasons),
    )


class _TimeOver(KvlodeError):
    """The deadline passed, or the caller has gone."""


class _Settlements:
    """Counts tombstones down, and remembers which were refused."""

    def __init__(self) -> None:
        self._changed = Monitor()
        self._pending = 0
        self.refused: set[bytes] = set()
        self.reason: Refusal | None = None

    def expect(self, ident: bytes) -> Callable[[PutStatus], None]:
        """One more; returns what to call when it is settled."""
        with self._changed.lock:
            self._pending += 1

        def settled(status: PutStatus) -> None:
            with self._changed.lock:
                self._pending -= 1
                if not status:
                    self.refused.add(ident)
                    self.reason = status.reason
                self._changed.notify_all()

        return settled

    def wait(self, timeout_s: float | None) -> bool:
        return self._changed.wait_for(lambda: not self._pending, timeout_s)


class Purge:
    """One purge of one store. ``run`` is called once; ``stop`` by any thread."""

    def __init__(self, core: Core, tag: bytes, *, physical: bool, timeout_s: float | None) -> None:
        self._core = core
        self._tag = tag
        self._physical = physical
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._stopped = False
        with core.buffer.lock:  # what is put from here on is later than the purge
            self._buffered = self._buffered_idents()
            self._below_seq = core.sequence()
        self._scan = TagScan(core.segments, core.namespaces, core.superblock.store_uuid, tag, self._below_seq, self._check)
        self._deleted: set[bytes] = set()
        self._leaving: set[int] = set()
        self._records_erased = self._bytes_erased = self._files_erased = 0
        self._reasons: list[str] = []

    def stop(self) -> None:
        """End at the next step; what is done stays done."""
        self._stopped = True

    def run(self) -> PurgeReport:
        """Do it. Raises ``StoreFailed`` or ``StoreClosed`` when the store stops meanwhile."""
        self._core.counters.add("purges")
        try:
            self._delete(list(self._buffered))
            self._work_off()
            if self._physical:
                self._erase_elsewhere()
        except (_TimeOver, TimeoutError, DeviceError) as error:
            self._note(str(error))
        facts = {"tag": self._tag.hex(), "physical": self._physical, "blocks": len(self._deleted), "bytes_erased": self._bytes_erased}
        self._core.counters.decisions.note("tag_purged", "; ".join(self._reasons) or "asked by the host", **facts)
        counts = (len(self._deleted), self._records_erased, self._bytes_erased, self._files_erased)
        return PurgeReport(self._tag, self._physical, *counts, not self._reasons, tuple(self._reasons))

    def survey(self) -> tuple[int, int]:
        """Blocks that a purge would delete, and bytes of the tag in sealed segments. Nothing is changed."""
        idents, size_bytes, after = set(self._buffered), 0, -1
        deleted = self._look_at_open_segment(seal=False)
        while (found := self._scan.gather(after, deleted)).records:
            idents |= set(found.undeleted())
            size_bytes += stored_bytes(self._core.segments, found.records)
            after = found.last_gathered
        return len(idents), size_bytes

    # --- steps ------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        core = self._core
        core.check_usable()
        if core.health.failure is not None:
            action = "Close and reopen the store, then purge again."
            raise StoreFailed("the store stopped writing during a purge", where=core.path, actual=core.health.failure, action=action)
        if self._stopped or (self._deadline_s is not None and time.monotonic() >= self._deadline_s):
            raise _TimeOver("the time for the purge was over", action="Purge again: it goes on where this one ended.")

    def _remaining_s(self) -> float | None:
        return None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())

    def _note(self, reason: str) -> None:
        if reason not in self._reasons and len(self._reasons) < REASONS_MAX:
            self._reasons.append(reason)

    def _buffered_idents(self) -> set[bytes]:
        """Blocks of the tag that the buffer serves. Those that are being put count as later."""
        buffer = self._core.buffer
        return {e.ident for e in buffer.entries.values() if e.kind is Kind.BLOCK and e.tag == self._tag and buffer.readable(e)}

    def _work_off(self) -> None:
        """All rounds. The end is reached when nothing was found, and no segment has been sealed since."""
        after = -1
        deleted = self._look_at_open_segment()
        while True:
            self._check()
            found = self._scan.gather(after, deleted)
            for segment_id, reason in found.unreadable.items():
                self._note(f"segment {segment_id:016x}: {reason}")
            self._leaving.update(found.leaving)
            if found.records:
                self._work_off_round(found)
            after = max(after, found.last_gathered)
            deleted = self._look_at_open_segment()
            if not found.records and not any(s.sealed and s.segment_id > after for s in self._core.segments.all()):
                return

    def _work_off_round(self, found: Found) -> None:
        refused = self._delete(found.undeleted())
        if self._physical:
            count, size_bytes = erase_records(self._core.segments, [r for r in found.records if r.ident not in refused])
            self._records_erased += count
            self._bytes_erased += size_bytes
            self._core.counters.add_many({"purged_records": count, "purged_bytes": size_bytes})

    def _look_at_open_segment(self, *, seal: bool = True) -> list[tuple[bytes, int]]:
        """Seal the open segment if it holds blocks of the tag; else ident and ``version_seq`` of what purges have deleted in it.

        Afterwards every segment that had its last record then is sealed durably.
        """
        core = self._core

        def look() -> list[tuple[bytes, int]]:
            segment = core.writer.open_segment
            if segment is None:
                return []
            deleted = segment.seal.keys_of(RecordType.TOMBSTONE, self._tag)
            if seal and segment.seal.holds(RecordType.BLOCK, self._tag, self._below_seq):
                core.writer.seal_open()
            return deleted

        deleted = core.writer.turns.ask(look).result(self._remaining_s())
        core.commit.call(lambda: None).result(self._remaining_s())
        return deleted

    # --- deleting ---------------------------------------------------------------------------------------------------

    def _delete(self, idents: list[bytes]) -> set[bytes]:
        """Tombstones, durable when this returns. Returns the idents whose delete was refused; the report tells of them."""
        core, waiting = self._core, _Settlements()
        for ident in idents:
            namespace = core.namespaces.get(ident[:16])
            if namespace is None:
                waiting.refused.add(ident)
                self._note(f"no intact record describes namespace {ident[:16].hex()}: its blocks cannot be deleted; run kvlode fsck")
                continue
            entry = Entry(Kind.TOMBSTONE, namespace, ident[16:], written_at_ns=core.clock.now_ns())
            entry.tag = self._tag
            entry.on_settled = waiting.expect(ident)
            core.lookups.invalidate(ident)
            core.buffer.enqueue_tombstone(entry, beneath=True)
        if not idents:
            return set()
        in_time = core.buffer.wait_settled(core.buffer.tickets_queued, self._remaining_s()) and waiting.wait(self._remaining_s())
        if not in_time:
            raise _TimeOver("the time for the purge was over before its deletes were durable", action="Purge again.")
        core.commit.call(core.commit.sync_index).result(self._remaining_s())
        if waiting.reason is not None:
            self._note(f"{len(waiting.refused)} deletes were refused: {waiting.reason}")
        self._deleted |= set(idents) - waiting.refused
        core.counters.add("purged_blocks", len(idents) - len(waiting.refused))
        return waiting.refused

    def _erase_elsewhere(self) -> None:
        """Memory, quarantine, and files of segments that were being removed."""
        core = self._core
        core.wipe_memory()
        self._files_erased = erase_quarantine(core.device, f"{core.path}/{QUARANTINE_FOLDER}")
        for segment_id in sorted(self._leaving):
            remaining_s = self._remaining_s()
            if not core.segments.wait_gone(segment_id, REMOVAL_WAIT_S if remaining_s is None else min(remaining_s, REMOVAL_WAIT_S)):
                self._note(f"segment {segment_id:016x} is being removed, and its file is still there")
