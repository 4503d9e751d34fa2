"""What somebody who runs a store should know at once, from one sample (and the one before). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...engine.stats_file import FRESH_S
from ..output import bytes_text, count_text, share_text
from .sample import Sample

WRITE_AMPLIFICATION_GUARD = 1.15
"""The default of ``write_amplification_max``."""
GUARDED_FROM_BYTES = 256 << 20
"""Below so many new bytes, headers and the first seals make up the figure."""
FREE_SHARE_MIN = 0.01
"""Of the store's capacity, left free by the file system, from which a full disk is near."""
_REFUSALS = {
    "refused_buffer_full": "the buffer was full (a larger buffer, put_timeout_s, or a faster drive)",
    "refused_no_space": "there was no room on the disk",
    "refused_store_failed": "the writer had stopped",
    "refused_read_only": "the store is open as a follower",
    "refused_quota": "a namespace had used up its quota",
    "refused_write_share": "a namespace had used up its share of writes",
}


@dataclass(frozen=True, slots=True)
class Alert:
    """``bad``: data is lost or puts are lost now. ``warning``: look at it soon. ``note``: how the figures came about."""

    level: Literal["bad", "warning", "note"]
    text: str
    """One sentence; may quote what is in the store, which nobody has checked."""


def alerts_of(before: Sample | None, now: Sample) -> list[Alert]:
    """The worst first. What counts up is told for the time between the samples, or since opening when there is one alone."""
    found = [*_process_alerts(now), *_failures(before, now), *_room(before, now), *_files(now)]
    return sorted(found, key=lambda alert: ("bad", "warning", "note").index(alert.level))


def _process_alerts(now: Sample) -> list[Alert]:
    published = now.published
    if published is None:
        if now.locked:
            return [Alert("warning", "a process has the store open and publishes no statistics; this is what the files tell")]
        return [Alert("note", "no process has the store open; this is what the files tell")]
    who = f"the {published.role} (process {published.pid})"
    if not published.running:
        left = "another process has the store open and publishes nothing; " if now.locked else ""
        return [Alert("warning", f"{who} ended without closing the store; {left}this is what the files tell")]
    if published.age_s > FRESH_S:
        return [Alert("bad", f"stale statistics: {who} is there and has said nothing for {published.age_s:.0f} s; it or its drive hangs")]
    return []


def added(before: Sample | None, now: Sample, name: str) -> int:
    """By how much a counter grew between two samples of one process, else its value."""
    value = int(_counters(now).get(name, 0))
    earlier = int(_counters(before).get(name, 0)) if before is not None and same_process(before, now) else 0
    return value - earlier if value >= earlier else value


def same_process(before: Sample, now: Sample) -> bool:
    """Whether the counters of two samples may be subtracted: the same process, with the same opening of the store."""
    first, second = before.published, now.published
    if first is None or second is None or (first.pid, first.role, first.path) != (second.pid, second.role, second.path):
        return False
    return float(second.stats.get("open_s", 0)) >= float(first.stats.get("open_s", 0))


def _counters(sample: Sample) -> Mapping[str, Any]:
    counters = sample.stats.get("counters", {})
    return counters if isinstance(counters, Mapping) else {}


def _failures(before: Sample | None, now: Sample) -> list[Alert]:
    stats, found = now.stats, []
    if stats.get("failure"):
        found.append(Alert("bad", f"the writer has stopped: {stats['failure']}. Blocks stay readable; close the store and open it again"))
    corrupt = int(_counters(now).get("corrupt_blocks", 0))
    if corrupt:
        found.append(Alert("bad", f"{count_text(corrupt, 'corrupt block')} found and dropped since opening; run kvlode fsck"))
    read_errors = int(_counters(now).get("read_errors", 0))
    if read_errors:
        found.append(Alert("bad", f"{count_text(read_errors, 'read')} failed since opening; look at the drive"))
    refused = added(before, now, "refused_puts") - added(before, now, "refused_not_admitted")  # that one is a decision, no trouble
    if refused > 0:
        reasons = [text for name, text in _REFUSALS.items() if added(before, now, name)]
        found.append(Alert("warning", f"{count_text(refused, 'put')} refused: {'; '.join(reasons) or 'for a reason not counted'}"))
    return found


def _room(before: Sample | None, now: Sample) -> list[Alert]:
    stats, found = now.stats, []
    capacity = int(stats.get("capacity_bytes") or 0)
    errors = added(before, now, "no_space_errors")
    if errors:
        found.append(
            Alert("bad", f"the disk is full: it refused {count_text(errors, 'write')}; the store frees segments instead of growing")
        )
    elif now.free_bytes is not None and now.free_bytes < FREE_SHARE_MIN * capacity and stats.get("used_bytes", 0) < capacity:
        found.append(Alert("warning", f"the disk is nearly full: {bytes_text(now.free_bytes)} left, and the store may still grow"))
    writes = stats.get("writes") or {}
    amplification, fresh = writes.get("amplification"), writes.get("fresh_stored_bytes") or 0
    if amplification is not None and fresh >= GUARDED_FROM_BYTES and amplification > WRITE_AMPLIFICATION_GUARD:
        text = f"write amplification {amplification:.2f}, above {WRITE_AMPLIFICATION_GUARD}: too much is copied forward for this capacity"
        found.append(Alert("warning", text))
    return found


def _files(now: Sample) -> list[Alert]:
    if now.files is None:
        return []
    problems = now.files.store["problems"]
    found = [Alert("bad", f"damaged: {problem}") for problem in problems[:3]]
    if len(problems) > 3:
        found.append(Alert("bad", f"damaged: {len(problems) - 3:,} more problems; run kvlode fsck"))
    use = now.files.store["use_bytes"]
    if use["dead"] > use["live"] > 0:
        whole = now.files.store["size_bytes"]
        found.append(Alert("note", f"{share_text(use['dead'], whole)} of the log is dead: superseded, deleted or expired blocks"))
    return found
