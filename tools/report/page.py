"""The page as text. Everything that comes from the store, paths and errors included, is escaped: models may be named anything."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from html import escape
from itertools import groupby
from typing import Any

from ..inspect.map import use_of_cells
from ..inspect.survey import USES
from ..output import age_text, bytes_text, printable, share_text, time_text
from ..top.model import NamespaceRow, SegmentRow, TopView
from .advice import advise
from .charts import bars, curve_chart, latency_chart
from .collect import AGE_NAMES, HIT_NAMES, Report
from .style import STYLE

_BAR_HEIGHT = 13
_LATENCIES = ("put", "get_buffer", "get_drive", "flush")
_EXPLAINED = {
    "live": "blocks that count",
    "dead": "superseded, deleted, dropped or expired blocks",
    "notes": "headers, seals, namespaces, tombstones",
    "torn": "the end of an interrupted write",
    "damaged": "was durable, cannot be read",
    "free": "preallocated or padding",
}


def page(report: Report) -> str:
    """One HTML document that loads nothing."""
    view = report.view
    source = "" if view.live else ", from its files alone"
    parts = [
        f"<h1>{_text(view.path)}</h1>",
        f'<p class="sub">store {_text(view.store_uuid)}, seen {time_text(report.seen_ns)}{source}{_process(view)}</p>',
        _alerts(report),
        _tiles(report),
        "<h2>Would more capacity help?</h2>" + _capacity(report),
        "<h2>Namespaces</h2>" + _namespaces(report),
        "<h2>Where the bytes are</h2>" + _segments(view),
        "<h2>How old and how used the blocks are</h2>" + _histograms(report),
        "<h2>How long calls took</h2>" + _latency(report),
        "<h2>What the store decided</h2>" + _decisions(view),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>kvlode: {_text(view.path)}</title><style>{STYLE}</style></head>\n<body><main>"
        + "\n".join(parts)
        + "</main></body></html>\n"
    )


def _text(value: object) -> str:
    return escape(printable(str(value)))


def _card(body: str) -> str:
    return f'<div class="card">{body}</div>'


def _plain(text: str) -> str:
    return _card(f'<p class="plain">{_text(text)}</p>')


def _table(heads: Iterable[tuple[str, bool]], rows: Iterable[str]) -> str:
    """``heads``: names, and whether the column holds numbers."""
    cells = "".join(f"<th{' class=n' if number else ''}>{name}</th>" for name, number in heads)
    return _card(f"<table><tr>{cells}</tr>{''.join(rows)}</table>")


def _process(view: TopView) -> str:
    return f" and from {_text(view.source)}" if view.live else ""


def _alerts(report: Report) -> str:
    items = [f'<li class="{alert.level}"><b>{alert.level}</b>{_text(alert.text)}</li>' for alert in report.view.alerts]
    return f'<ul class="alerts">{"".join(items)}</ul>' if items else ""


def _tiles(report: Report) -> str:
    view, store = report.view, report.sample.files.store if report.sample.files is not None else {}
    of = "below the store's folder" if view.capacity_bytes is None else f"of {bytes_text(view.capacity_bytes)} capacity"
    raw = sum(space.details["files"].get("raw_bytes", 0) for space in view.namespaces)
    stored = sum(space.details["files"].get("stored_bytes", 0) for space in view.namespaces)
    tiles = [
        (bytes_text(view.used_bytes), of),
        (f"{store.get('blocks_live', 0):,}", f"live blocks in {store.get('segments', 0):,} segments"),
        (share_text(view.use_bytes["live"], sum(view.use_bytes.values())), "of the log is live"),
        (f"{raw / stored:.2f}x" if stored else "-", f"{bytes_text(raw)} in {bytes_text(stored)}"),
        (age_text(store.get("oldest_written_at_ns"), report.seen_ns), "since the oldest record was written"),
    ]
    if view.live:
        reused = "-" if view.reused is None else f"{100 * view.reused:.1f}%"
        amplification = "-" if view.amplification is None else f"{view.amplification:.2f}"
        tiles += [
            (reused, "of needed blocks were read, not computed"),
            (amplification, "bytes written by bytes of new blocks"),
            (f"{view.reclaim.get('segments_freed', 0):,}", "segments freed since opening"),
        ]
    boxes = "".join(f'<div class="tile"><b>{_text(big)}</b><span>{_text(small)}</span></div>' for big, small in tiles)
    return f'<div class="tiles">{boxes}</div>'


def _capacity(report: Report) -> str:
    view, curve = report.view, report.curve
    advice = advise(curve, view.capacity_bytes, view.reused)
    lead, rest = advice.lines[0], advice.lines[1:]
    words = f'<p class="lead">{_text(lead)}</p>'
    if rest:
        words += f'<ul class="advice">{"".join(f"<li>{_text(line)}</li>" for line in rest)}</ul>'
    if curve is None or len(curve.capacity_bytes) < 2:
        return _card(words)
    chart = curve_chart("curve", curve, view.capacity_bytes, advice.knee_bytes)
    of = "all blocks" if curve.sampled_share == 1 else f"{100 * curve.sampled_share:.3g}% of the blocks"
    foot = f"From {curve.uses:,} uses since opening, of which {curve.sampled_uses:,} were followed ({of}); for a least recently used cache."
    return _card(f'{words}{chart}<p class="plain">{_text(foot)}</p>')


def _namespaces(report: Report) -> str:
    view = report.view
    if not view.namespaces:
        return _plain("There are none.")
    whole = sum(space.log_bytes for space in view.namespaces)
    largest = max(1, *(space.log_bytes for space in view.namespaces), 1)
    rows = [_namespace(space, whole, largest, report.seen_ns) for space in view.namespaces]
    numbers = ("in the log", "share", "blocks", "ratio", "dead", "newest", "hits", "found")
    return _table([("model", False), ("dtype", False), ("", False), *((name, True) for name in numbers)], rows)


def _namespace(space: NamespaceRow, whole: int, largest: int, now_ns: int) -> str:
    files, descriptor = space.details["files"], space.details["descriptor"]
    numbers = [
        bytes_text(space.log_bytes),
        share_text(space.log_bytes, whole),
        "-" if space.blocks_live is None else f"{space.blocks_live:,}",
        "-" if space.ratio is None else f"{space.ratio:.2f}x",
        bytes_text(files.get("dead_bytes", 0)),
        age_text(files.get("newest_written_at_ns"), now_ns),
        "-" if space.hits is None else f"{space.hits:,}",
        "-" if space.hit_ratio is None else f"{100 * space.hit_ratio:.1f}%",
    ]
    cells = "".join(f'<td class="n">{_text(number)}</td>' for number in numbers)
    tip = "\n".join([f"digest: {space.digest}", *(f"{name}: {value}" for name, value in dict(descriptor).items())])
    meter = f'<div class="meter"><i style="width:{100 * space.log_bytes / largest:.1f}%"></i></div>'
    names = f'<td class="name">{_text(space.model)}</td><td>{_text(descriptor.get("dtype", "-"))}</td>'
    return f'<tr title="{_text(tip)}">{names}<td>{meter}</td>{cells}</tr>'


def _segments(view: TopView) -> str:
    if not view.segments:
        return _plain("There are no segments.")
    largest = max(1, *(segment.size_bytes for segment in view.segments), 1)
    rows = [_segment(segment, largest) for segment in reversed(view.segments)]
    legend = "".join(
        f'<span><i class="{use}"></i>{use} {bytes_text(view.use_bytes[use])}, {_EXPLAINED[use]}</span>'
        for use in USES
        if view.use_bytes[use]
    )
    left_out = view.segments_total - len(view.segments)
    more = f'<p class="plain">{left_out:,} older segments are left out.</p>' if left_out > 0 else ""
    heads = [
        ("segment", False),
        ("state", False),
        ("newest first", False),
        ("size", True),
        ("live", True),
        ("blocks", True),
        ("hits", True),
    ]
    return _table(heads, rows) + f'<div class="legend">{legend}</div>{more}'


def _segment(segment: SegmentRow, largest: int) -> str:
    count, position, rects = segment.cells.shape[1], 0, []
    for use, run in groupby(use_of_cells(segment.cells)):
        length = len(list(run))
        rects.append(f'<rect class="{use}" x="{position}" width="{length}" height="{_BAR_HEIGHT}"><title>{use}</title></rect>')
        position += length
    width = max(1.0, 100 * segment.size_bytes / largest)
    box = f'viewBox="0 0 {count} {_BAR_HEIGHT}" style="width:{width:.1f}%" height="{_BAR_HEIGHT}" preserveAspectRatio="none"'
    numbers = [bytes_text(segment.size_bytes), share_text(segment.live_share, 1), f"{segment.blocks_live:,}", f"{segment.hits:,}"]
    cells = "".join(f'<td class="n">{number}</td>' for number in numbers)
    label = f"segment {_text(segment.segment_id)}"
    picture = f'<svg {box} role="img" aria-label="{label}">{"".join(rects)}</svg>'
    return (
        f'<tr><td><code>{_text(segment.segment_id)}</code></td><td>{_text(segment.state)}</td><td class="wide">{picture}</td>{cells}</tr>'
    )


def _histograms(report: Report) -> str:
    found = report.histograms
    if not sum(found.age_blocks):
        return _plain("There are no live blocks.")
    age = bars("ages", "bytes of live blocks by age", AGE_NAMES, found.age_bytes, "written at most so long ago", bytes_axis=True)
    if found.hit_blocks:
        hits = bars("hits", "live blocks by hits", HIT_NAMES, found.hit_blocks, "hits since it was written, halved at each copy")
    else:
        hits = '<p class="plain">The store has no heat table.</p>'
    return f'<div class="two">{_card(f"<h3>Bytes by age</h3>{age}")}{_card(f"<h3>Blocks by use</h3>{hits}")}</div>'


def _latency(report: Report) -> str:
    latency: dict[str, Any] = report.sample.stats.get("latency") or {}
    shown = [name for name in _LATENCIES if (latency.get(name) or {}).get("count")]
    if not shown:
        return _plain("No running process publishes how long its calls take.")
    rows = "".join(
        f'<tr><td>{_text(operation.name.replace("_", " "))}</td><td class="n">{operation.count:,}</td>'
        f'<td class="n">{_ms(operation.p50_ms)}</td><td class="n">{_ms(operation.p99_ms)}</td></tr>'
        for operation in report.view.operations
    )
    heads = [("since opening", False), ("calls", True), ("half within", True), ("99 of 100 within", True)]
    return _card(latency_chart("latency", latency, shown)) + "<p></p>" + _table(heads, [rows])


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f} ms"


def _decisions(view: TopView) -> str:
    if not view.decisions:
        return _plain("Nothing was freed, dropped or deleted since opening." if view.live else "No running process tells.")
    rows = [_decision(decision) for decision in view.decisions]
    return _table([("when", False), ("what", False), ("why, and the facts", False)], rows)


def _decision(decision: dict[str, Any]) -> str:
    at = datetime.fromtimestamp(float(decision.get("at_s", 0)), UTC).strftime("%H:%M:%S UTC")
    facts = [f"{name.replace('_', ' ')} {value}" for name, value in decision.items() if name not in ("at_s", "event", "reason")]
    what = str(decision.get("event", "")).replace("_", " ")
    why = f"{decision.get('reason', '')}: {', '.join(facts)}"
    return f'<tr><td>{at}</td><td>{_text(what)}</td><td class="why">{_text(why)}</td></tr>'
