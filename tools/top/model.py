"""From two samples to what the screen says: plain values, no drawing. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..inspect.survey import USES
from .alerts import Alert, added, alerts_of, same_process
from .sample import Sample

DECISIONS_MAX = 12
_COUNTED = ("put_blocks", "put_bytes", "get_blocks", "buffer_hits", "disk_hits", "misses", "evicted_blocks", "reinserted_blocks")


@dataclass(frozen=True, slots=True)
class Tier:
    """One place where blocks are kept. ``hits_per_s``: reads that it served; ``None`` where no rate is known."""

    name: str
    used_bytes: int
    capacity_bytes: int | None
    hits_per_s: float | None
    detail: str


@dataclass(frozen=True, slots=True)
class Operation:
    """How long one kind of call took since opening, in milliseconds."""

    name: str
    count: int
    p50_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True, slots=True)
class NamespaceRow:
    """One namespace. Rates are ``None`` without two samples of one process; counts of its files are ``None`` without files."""

    digest: str
    model: str
    log_bytes: int
    blocks_live: int | None
    hits: int | None
    """Uses of its live blocks, by the heat table."""
    ratio: float | None
    put_bytes_per_s: float | None
    get_blocks_per_s: float | None
    hit_ratio: float | None
    """Of the reads since opening."""
    details: Mapping[str, Any]
    """Descriptor and figures for the view of this namespace alone."""


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """One segment of the map: bytes by use in each of some equal parts (``USES`` by parts)."""

    segment_id: str
    state: str
    size_bytes: int
    live_share: float
    blocks_live: int
    hits: int
    cells: Any


@dataclass(frozen=True, slots=True)
class TopView:
    """Everything that the screen shows."""

    path: str
    store_uuid: str
    source: str
    """Whose figures these are."""
    live: bool
    """Whether a process publishes; else the files alone speak."""
    role: str
    window_s: float | None
    """Seconds between the samples; ``None`` for one alone."""
    open_s: float | None
    capacity_bytes: int | None
    used_bytes: int
    alerts: list[Alert]
    rates: dict[str, float | None]
    """By second: ``_COUNTED``, ``hit_bytes``, ``drive_write_bytes``, ``drive_read_bytes``."""
    hit_ratio: float | None
    """Between the samples; since opening for one alone, or when nothing was read between them."""
    hit_ratio_open: float | None
    reused: float | None
    """Of the blocks that were needed since opening, those that were read instead of computed and put. Unlike the hit ratio it
    is the same for hosts that look before they read."""
    amplification: float | None
    tiers: list[Tier]
    operations: list[Operation]
    reclaim: dict[str, Any]
    decisions: list[dict[str, Any]]
    """The latest first."""
    use_bytes: dict[str, int]
    segments: list[SegmentRow]
    """The newest last."""
    segments_total: int
    namespaces: list[NamespaceRow]
    files_age_s: float | None = None
    notes: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """Plain values for ``--json``: everything but the map."""
        values = {
            name: getattr(self, name) for name in self.__slots__ if name not in ("segments", "alerts", "tiers", "operations", "namespaces")
        }
        lists = {name: [asdict(item) for item in getattr(self, name)] for name in ("alerts", "tiers", "operations", "namespaces")}
        rows = [{name: getattr(row, name) for name in row.__slots__ if name != "cells"} for row in self.segments]
        return values | lists | {"segments": rows}


def view_of(before: Sample | None, now: Sample, *, now_ns: int) -> TopView:
    """``before``: an earlier sample of the same store, for rates. ``now_ns``: UTC, for the age of the file facts."""
    stats, files = now.stats, now.files
    usable = before is not None and same_process(before, now) and now.taken_s > before.taken_s
    window_s = now.taken_s - before.taken_s if usable and before is not None else None
    rates = {name: None if window_s is None else added(before, now, name) / window_s for name in _COUNTED}
    rates |= {name: _grown(before, now, window_s, reader) for name, reader in _DEEPER.items()}
    store = {} if files is None else files.store
    on_drive = int(stats.get("used_bytes") or sum(store.get("allocated_bytes", {}).values()))
    return TopView(
        path=str(now.path),
        store_uuid=str(stats.get("store_uuid") or store.get("store_uuid", "")),
        source=_source(now),
        live=bool(stats),
        role=str(stats.get("role", "")),
        window_s=window_s,
        open_s=stats.get("open_s"),
        capacity_bytes=stats.get("capacity_bytes"),
        used_bytes=on_drive,
        alerts=alerts_of(before, now),
        rates=rates,
        hit_ratio=_hit_ratio(before if window_s else None, now),
        hit_ratio_open=(stats.get("gets") or {}).get("hit_ratio"),
        reused=_reused(stats),
        amplification=(stats.get("writes") or {}).get("amplification"),
        tiers=_tiers(stats, store, on_drive, rates),
        operations=_operations(stats),
        reclaim=dict(stats.get("reclaim") or {}),
        decisions=list(reversed(stats.get("decisions") or []))[:DECISIONS_MAX],
        use_bytes=dict(store.get("use_bytes") or dict.fromkeys(USES, 0)),
        segments=_segments(now),
        segments_total=int((stats.get("segments") or {}).get("count") or store.get("segments", 0)),
        namespaces=_namespaces(before if window_s else None, now, window_s),
        files_age_s=None if files is None else max(0.0, (now_ns - files.seen_ns) / 1e9),
    )


def _source(now: Sample) -> str:
    published = now.published
    if published is None or not published.running:
        return "files alone"
    others = f", {now.others} more reading" if now.others else ""
    return f"{published.role}, process {published.pid}, {published.age_s:.1f} s ago{others}"


_DEEPER = {
    "hit_bytes": lambda stats: (stats.get("gets") or {}).get("hit_bytes", 0),
    "drive_write_bytes": lambda stats: sum(path.get("write_bytes", 0) for path in (stats.get("io") or {}).values()),
    "drive_read_bytes": lambda stats: sum(path.get("read_bytes", 0) for path in (stats.get("io") or {}).values()),
}


def _grown(before: Sample | None, now: Sample, window_s: float | None, value_of: Any) -> float | None:
    if before is None or window_s is None:
        return None
    return max(0.0, (float(value_of(now.stats)) - float(value_of(before.stats))) / window_s)


def _hit_ratio(before: Sample | None, now: Sample) -> float | None:
    blocks = added(before, now, "get_blocks")
    hits = added(before, now, "buffer_hits") + added(before, now, "disk_hits")
    if before is not None and not blocks:
        return _hit_ratio(None, now)
    return min(1.0, hits / blocks) if blocks else None


def _reused(stats: Mapping[str, Any]) -> float | None:
    counters = stats.get("counters") or {}
    hits = counters.get("buffer_hits", 0) + counters.get("disk_hits", 0)
    uses = hits + counters.get("put_blocks", 0)
    return hits / uses if uses else None


def _tiers(stats: Mapping[str, Any], store: Mapping[str, Any], on_drive: int, rates: Mapping[str, float | None]) -> list[Tier]:
    buffer, tiers = stats.get("buffer") or {}, []
    if buffer:
        used = int(buffer.get("capacity_bytes", 0)) - int(buffer.get("free_bytes", 0))
        detail = f"{buffer.get('dirty_bytes', 0) / (1 << 20):,.0f} MiB to write, {buffer.get('clean_blocks', 0):,} blocks to serve"
        tiers.append(Tier("buffer", used, int(buffer.get("capacity_bytes", 0)), rates["buffer_hits"], detail))
    segments = stats.get("segments") or {}
    count, sealed = segments.get("count", store.get("segments", 0)), segments.get("sealed", (store.get("states") or {}).get("sealed", 0))
    paths = ", ".join(str(path) for path in (stats.get("io_paths") or {}).values())
    detail = f"{count:,} segments, {sealed:,} sealed" + (f", {paths}" if paths else "")
    tiers.append(Tier("drive", on_drive, stats.get("capacity_bytes"), rates["disk_hits"], detail))
    return tiers


def _operations(stats: Mapping[str, Any]) -> list[Operation]:
    def milliseconds(seconds: float | None) -> float | None:
        return None if seconds is None else 1000 * seconds

    found = (stats.get("latency") or {}).items()
    return [
        Operation(name, int(times["count"]), milliseconds(times["p50"]), milliseconds(times["p99"]))
        for name, times in found
        if times["count"]
    ]


def _segments(now: Sample) -> list[SegmentRow]:
    if now.files is None:
        return []
    return [
        SegmentRow(
            segment_id=f"{summary.segment_id:x}",
            state=summary.state,
            size_bytes=summary.size_bytes,
            live_share=summary.use_bytes["live"] / summary.size_bytes if summary.size_bytes else 0.0,
            blocks_live=summary.blocks_live,
            hits=summary.hits,
            cells=summary.cells,
        )
        for summary in now.files.view.shown
    ]


def _namespaces(before: Sample | None, now: Sample, window_s: float | None) -> list[NamespaceRow]:
    told: Mapping[str, Any] = now.stats.get("namespaces") or {}
    earlier: Mapping[str, Any] = {} if before is None else before.stats.get("namespaces") or {}
    read = {row["digest"]: row for row in now.files.namespaces} if now.files is not None else {}
    rows = [_namespace(digest, told.get(digest), earlier.get(digest) or {}, read.get(digest), window_s) for digest in {**told, **read}]
    return sorted(rows, key=lambda row: (-row.log_bytes, row.digest))


def _namespace(
    digest: str, told: Mapping[str, Any] | None, earlier: Mapping[str, Any], read: Mapping[str, Any] | None, window_s: float | None
) -> NamespaceRow:
    counts, file = told or {}, read or {}
    descriptor = file.get("descriptor") or {}
    blocks = counts.get("get_blocks", 0)
    hits = counts.get("buffer_hits", 0) + counts.get("disk_hits", 0)

    def rate(name: str) -> float | None:
        return None if window_s is None or told is None else max(0.0, (counts.get(name, 0) - earlier.get(name, 0)) / window_s)

    return NamespaceRow(
        digest=digest,
        model=str(counts.get("model") or descriptor.get("model") or "(descriptor unknown)"),
        log_bytes=int(counts.get("log_bytes") or file.get("stored_bytes", 0) + file.get("dead_bytes", 0)),
        blocks_live=file.get("blocks_live"),
        hits=file.get("hits"),
        ratio=file.get("ratio"),
        put_bytes_per_s=rate("put_bytes"),
        get_blocks_per_s=rate("get_blocks"),
        hit_ratio=min(1.0, hits / blocks) if blocks else None,
        details={
            "descriptor": descriptor,
            "counters": dict(counts),
            "files": {name: value for name, value in file.items() if name != "descriptor"},
        },
    )
