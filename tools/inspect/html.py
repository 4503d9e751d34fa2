"""The store view as one page: no script, nothing loaded from elsewhere, light and dark, tooltips with each segment's facts."""

from __future__ import annotations

from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from ...format.errors import InvalidConfig
from ..output import age_text, bytes_text, share_text, time_text
from ..paths import naming, require_new_place
from ..store_files import StoreFiles
from .map import PINS_NOTE, full_width_bytes, use_of_cells
from .store import StoreView
from .survey import USES, SegmentSummary

_BAR_HEIGHT = 14
_EXPLAINED = {
    "live": "blocks that count",
    "dead": "superseded, deleted, dropped or expired blocks",
    "notes": "headers, seals, namespaces, tombstones",
    "torn": "never acknowledged: the end of an interrupted write",
    "damaged": "durable once, holds no record now",
    "free": "preallocated or padding",
}
_STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --text: #1d2126; --muted: #667; --line: #dcdcd6;
  --live: #2f8f5b; --dead: #b9bec6; --notes: #4a7fb5; --torn: #d9a21b; --damaged: #cf3b32; --free: #ecece7; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1d2125; --text: #e6e8ea; --muted: #98a0a9; --line: #33393f;
  --live: #3fae74; --dead: #59616b; --notes: #5b93cb; --torn: #e0b040; --damaged: #ef5a50; --free: #272c31; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.45 system-ui, sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px }
h1 { font-size: 22px; margin: 0 0 2px; overflow-wrap: anywhere } h2 { font-size: 16px; margin: 30px 0 10px }
.sub { color: var(--muted); margin: 0 0 20px; overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 10px }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px }
.tile b { display: block; font-size: 20px; font-weight: 600 } .tile span { color: var(--muted); font-size: 13px }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; overflow-x: auto }
.legend { display: flex; flex-wrap: wrap; gap: 6px 22px; margin: 12px 0 0; font-size: 13px }
.legend svg { vertical-align: -2px; margin-right: 6px } .legend i { color: var(--muted); font-style: normal }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums }
th { text-align: left; color: var(--muted); font-weight: 500; border-bottom: 1px solid var(--line) }
th, td { padding: 4px 12px 4px 0; white-space: nowrap } td.n, th.n { text-align: right } td.bar { width: 60%; padding-right: 18px }
tr:hover td { background: color-mix(in srgb, var(--notes) 9%, transparent) }
code { font: 12.5px ui-monospace, monospace } svg { display: block } .legend svg { display: inline-block }
.live { fill: var(--live) } .dead { fill: var(--dead) } .notes { fill: var(--notes) } .free { fill: var(--free) }
.torn { fill: url(#torn) } .damaged { fill: url(#damaged) }
.bad { color: var(--damaged) } .remarks { margin: 0; padding-left: 18px; font-size: 13.5px; overflow-wrap: anywhere }
rect:hover { opacity: .72 }
"""
_PATTERNS = (
    '<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>'
    '<pattern id="torn" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="5" height="5" style="fill:var(--torn)"/><rect width="1.6" height="5" style="fill:var(--card)"/></pattern>'
    '<pattern id="damaged" width="4" height="4" patternUnits="userSpaceOnUse">'
    '<rect width="4" height="4" style="fill:var(--damaged)"/>'
    '<path d="M0 0L4 4M4 0L0 4" style="stroke:var(--card);stroke-width:.8"/></pattern>'
    "</defs></svg>"
)


def check_page_place(files: StoreFiles, target: Path) -> None:
    """Raise ``InvalidConfig`` for a place where no page can be written, or that is inside the store."""
    require_new_place(target, "the page")
    folder = files.path.resolve()
    if folder in target.resolve().parents:
        raise InvalidConfig("the page would lie inside the store", where=target, expected=f"a place outside of {folder}")


def write_page(target: Path, view: StoreView, namespaces: dict[str, Any]) -> None:
    """Write the page; an older one of this name is replaced. ``check_page_place`` comes first."""
    with naming("write", target):
        target.write_text(page(view, namespaces), encoding="utf-8")


def page(view: StoreView, namespaces: dict[str, Any]) -> str:
    """The page as text."""
    facts, now_ns = view.facts(), view.survey.now_ns
    parts = [
        f"<h1>{_text(facts['path'])}</h1>",
        f'<p class="sub">store {_text(facts["store_uuid"])}, created {time_text(facts["created_at_ns"])}, seen {time_text(now_ns)}</p>',
        _tiles(facts, namespaces, now_ns),
        '<h2>What the segments\' bytes are used for</h2><div class="card">' + _total_bar(view) + _legend(view) + "</div>",
        f"<h2>Map of the segments</h2>{_map(view, now_ns)}",
        f"<h2>Namespaces</h2>{_namespaces(namespaces, now_ns)}",
        _remarks(facts),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>kvlode: {_text(facts['path'])}</title><style>{_STYLE}</style></head>\n<body>{_PATTERNS}<main>"
        + "\n".join(parts)
        + "</main></body></html>\n"
    )


def _text(value: object) -> str:
    return escape(str(value))


def _tiles(facts: dict[str, Any], namespaces: dict[str, Any], now_ns: int) -> str:
    raw = sum(row["raw_bytes"] for row in namespaces["rows"])
    stored = sum(row["stored_bytes"] for row in namespaces["rows"])
    writer = {True: "open for writing", False: "not open", None: "unknown"}[facts["writer"]]
    tiles = [
        (bytes_text(facts["size_bytes"]), f"in {facts['segments']:,} segments"),
        (share_text(facts["use_bytes"]["live"], facts["size_bytes"]), "of that is live"),
        (f"{facts['blocks_live']:,}", f"live blocks of {facts['blocks']:,} in the log"),
        (f"{raw / stored:.2f}x" if stored else "-", f"{bytes_text(raw)} in {bytes_text(stored)}"),
        (age_text(facts["oldest_written_at_ns"], now_ns), "since the oldest record was written"),
        (f"{facts['hits']:,}" if facts["heat_known"] else "-", f"hits, {facts['hot_blocks']:,} blocks hot"),
        (bytes_text(sum(facts["allocated_bytes"].values())), "allocated below the folder"),
        (writer, "by a process now"),
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{_text(big)}</b><span>{_text(small)}</span></div>' for big, small in tiles)
        + "</div>"
    )


def _total_bar(view: StoreView) -> str:
    whole, position, rects = sum(view.use_bytes.values()) or 1, 0.0, []
    for use in USES:
        width = 1000 * view.use_bytes[use] / whole
        if width:
            tip = f"{use}: {bytes_text(view.use_bytes[use])}, {share_text(view.use_bytes[use], whole)}"
            rects.append(_rect(use, position, width, 22, tip))
        position += width
    return _svg(1000, 22, "use of bytes", rects)


def _legend(view: StoreView) -> str:
    items = [
        f'<span><svg width="13" height="13"><rect class="{use}" width="13" height="13" rx="2"/></svg>'
        f"{use} {bytes_text(view.use_bytes[use])} <i>{_text(_EXPLAINED[use])}</i></span>"
        for use in USES
    ]
    return f'<div class="legend">{"".join(items)}</div>'


def _map(view: StoreView, now_ns: int) -> str:
    if not view.shown:
        return '<div class="card">There are no segments.</div>'
    largest = full_width_bytes(list(view.shown))
    names = "".join(f'<th class="n">{name}</th>' for name in ("size", "live", "blocks", "age", "hits"))
    head = f"<tr><th>segment</th><th>state</th><th></th>{names}</tr>"
    rows = []
    for summary in view.shown:
        state = f'<span class="bad">{_text(summary.state)}</span>' if summary.problems else _text(summary.state)
        hits = f"{summary.hits:,}" if view.survey.heat is not None else "-"
        numbers = [
            bytes_text(summary.size_bytes),
            share_text(summary.use_bytes["live"], summary.size_bytes),
            f"{summary.blocks_live:,} / {summary.blocks:,}",
            age_text(summary.newest_written_at_ns, now_ns),
            hits,
        ]
        cells = "".join(f'<td class="n">{_text(number)}</td>' for number in numbers)
        name = f"<td><code>{summary.segment_id:x}</code></td><td>{state}</td>"
        rows.append(f'<tr title="{_text(_tip(summary))}">{name}<td class="bar">{_bar(summary, largest)}</td>{cells}</tr>')
    left_out = view.totals["segments"] - len(view.shown)
    more = f'<p class="sub">{left_out:,} older segments are left out (--limit).</p>' if left_out else ""
    return f'<div class="card"><table>{head}{"".join(rows)}</table></div>{more}'


def _bar(summary: SegmentSummary, largest: int) -> str:
    """One segment as a bar; equal neighbouring cells are one rectangle with a tooltip of its own."""
    count = summary.cells.shape[1]
    scale = min(1.0, summary.size_bytes / largest)
    cell_bytes = summary.size_bytes / count
    position, rects = 0, []
    for use, run in groupby(use_of_cells(summary.cells)):
        length = len(list(run))
        place = f"{bytes_text(position * cell_bytes)} to {bytes_text((position + length) * cell_bytes)}"
        tip = f"segment {summary.segment_id:x}, {place}: mostly {use}\n\n{_tip(summary)}"
        if use in ("torn", "damaged"):
            tip = tip.replace("mostly", "some", 1)
        rects.append(_rect(use, position * scale, length * scale, _BAR_HEIGHT, tip))
        position += length
    return _svg(count, _BAR_HEIGHT, f"segment {summary.segment_id:x}", rects)


def _rect(use: str, x: float, width: float, height: int, tip: str) -> str:
    return f'<rect class="{use}" x="{x:.2f}" width="{width:.2f}" height="{height}"><title>{_text(tip)}</title></rect>'


def _svg(width: int, height: int, label: str, rects: list[str]) -> str:
    box = f'viewBox="0 0 {width} {height}" width="100%" height="{height}" preserveAspectRatio="none"'
    return f'<svg {box} role="img" aria-label="{_text(label)}">{"".join(rects)}</svg>'


def _tip(summary: SegmentSummary) -> str:
    use = ", ".join(f"{name} {bytes_text(size)}" for name, size in summary.use_bytes.items() if size)
    lines = [
        f"segment {summary.segment_id:016x}, {summary.state}, {bytes_text(summary.size_bytes)}",
        use,
        f"{summary.records:,} records, {summary.blocks:,} blocks, {summary.blocks_live:,} live, {summary.hot_blocks:,} hot",
        f"epoch {summary.epoch if summary.epoch is not None else 'unknown'}, created {time_text(summary.created_at_ns)}",
        f"written {time_text(summary.oldest_written_at_ns)} to {time_text(summary.newest_written_at_ns)}",
    ]
    return "\n".join(line for line in [*lines, *summary.problems] if line)


def _namespaces(namespaces: dict[str, Any], now_ns: int) -> str:
    rows = []
    for row in namespaces["rows"]:
        descriptor = row["descriptor"] or {"model": "(descriptor lost)", "dtype": "-", "layout": "-"}
        ratio = f"{row['ratio']:.2f}x" if row["ratio"] else "-"
        numbers = [
            f"{row['blocks_live']:,}",
            bytes_text(row["raw_bytes"]),
            bytes_text(row["stored_bytes"]),
            ratio,
            bytes_text(row["dead_bytes"]),
            age_text(row["newest_written_at_ns"], now_ns),
        ]
        cells = "".join(f'<td class="n">{_text(number)}</td>' for number in numbers)
        tip = _text("\n".join(f"{name}: {value}" for name, value in descriptor.items()))
        names = f"<td>{_text(descriptor['model'])}</td><td>{_text(descriptor['dtype'])}</td>"
        rows.append(f'<tr title="{tip}"><td><code>{row["digest"][:12]}</code></td>{names}{cells}</tr>')
    heads = "".join(f'<th class="n">{name}</th>' for name in ("blocks", "raw", "stored", "ratio", "dead", "age"))
    return f'<div class="card"><table><tr><th>digest</th><th>model</th><th>dtype</th>{heads}</tr>{"".join(rows)}</table></div>'


def _remarks(facts: dict[str, Any]) -> str:
    items = [f'<li class="bad">damaged: {_text(problem)}</li>' for problem in facts["problems"]]
    items += [f"<li>{_text(note)}</li>" for note in [*facts["notes"], PINS_NOTE]]
    return f'<h2>Remarks</h2><div class="card"><ul class="remarks">{"".join(items)}</ul></div>'
