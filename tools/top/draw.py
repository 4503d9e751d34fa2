"""From a view to what a terminal shows. Pure; texts from the store lose what a terminal would obey."""

from __future__ import annotations

from itertools import groupby

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..inspect.map import resample, use_of_cells
from ..inspect.survey import USES
from ..output import bytes_text, printable, share_text
from .model import NamespaceRow, Tier, TopView

STYLES = {"live": "green", "dead": "bright_black", "notes": "cyan", "torn": "yellow", "damaged": "bold red", "free": "bright_black"}
SIGNS = {"live": "█", "dead": "▒", "notes": "=", "torn": "~", "damaged": "X", "free": "·"}
_LEVELS = {"bad": "bold red", "warning": "yellow", "note": "dim"}
_SHORT_IDENT = 12
_NARROW_OPERATIONS = ("put", "get_buffer", "get_drive", "commit")
_LEFT_OUT = ("at_s", "event", "reason", "policy")
"""What the line of a decision says elsewhere, or not at all."""


def draw(view: TopView, *, width: int, height: int, selected: int = 0, inside: str | None = None) -> RenderableType:
    """One frame. ``selected``: the namespace under the cursor, by position; ``inside``: the digest of the one that is looked into."""
    parts: list[RenderableType] = [_head(view)]
    if view.alerts:
        parts.append(_alerts(view))
    row = next((space for space in view.namespaces if space.digest == inside), None)
    if row is not None:
        return Group(*parts, _inside(row), Text("esc: back   q: quit", style="dim"))
    beside: list[RenderableType] = [_throughput(view), _tiers(view)] if view.live else [_tiers(view)]
    parts += [_columns(beside)] if width >= 120 else beside
    if view.operations and height >= 36:
        parts.append(_operations(view, width))
    left = max(6, height - 24 - len(view.alerts) - (7 if view.operations and height >= 36 else 0))
    spaces = min(len(view.namespaces), max(3, left // 3))
    parts.append(_segments(view, width, max(3, left - spaces)))
    parts.append(_namespaces(view, selected, spaces, width))
    if view.live:
        parts.append(_decisions(view, 5))
    parts.append(Text("up, down: choose a namespace   enter: look into it   q: quit", style="dim"))
    return Group(*parts)


def rate_text(value: float | None, unit: str = "") -> str:
    """``12.3/s``; bytes with their unit; ``-`` where no rate is known."""
    if value is None:
        return "-"
    return f"{bytes_text(value)}/s" if unit == "B" else f"{value:,.1f}/s" if value < 100 else f"{value:,.0f}/s"


def _ratio_text(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _head(view: TopView) -> Text:
    head = Text(no_wrap=True, overflow="ellipsis")
    head.append("kvlode top  ", style="bold")
    head.append(printable(view.path), style="bold cyan")
    head.append(f"  {view.store_uuid[:8]}  ", style="dim")
    head.append(view.source, style="green" if view.live else "yellow")
    if view.open_s is not None:
        head.append(f"  open for {_span(view.open_s)}", style="dim")
    return head


def _span(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _alerts(view: TopView) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for alert in view.alerts:
        table.add_row(Text(alert.level, style=_LEVELS[alert.level]), Text(printable(alert.text), style=_LEVELS[alert.level]))
    return table


def _columns(parts: list[RenderableType]) -> Table:
    grid = Table.grid(expand=True, padding=(0, 1))
    for _ in parts:
        grid.add_column(ratio=1)
    grid.add_row(*parts)
    return grid


def _panel(body: RenderableType, title: str) -> Panel:
    return Panel(body, title=Text(title, style="bold"), title_align="left", border_style="bright_black", padding=(0, 1))


def _throughput(view: TopView) -> Panel:
    rates = view.rates
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_row("put", rate_text(rates["put_bytes"], "B"), f"{rate_text(rates['put_blocks'])} blocks")
    table.add_row("get, hits", rate_text(rates["hit_bytes"], "B"), f"{rate_text(rates['get_blocks'])} asked")
    table.add_row("drive", f"w {rate_text(rates['drive_write_bytes'], 'B')}", f"r {rate_text(rates['drive_read_bytes'], 'B')}")
    hit = Text(_ratio_text(view.hit_ratio), style="bold green" if (view.hit_ratio or 0) >= 0.5 else "bold")
    table.add_row("hit ratio", hit, f"{_ratio_text(view.hit_ratio_open)} since opening")
    table.add_row("reused", _ratio_text(view.reused), "read, not computed again")
    amplification = "-" if view.amplification is None else f"{view.amplification:.3f}"
    reclaimed = f"{rate_text(rates['evicted_blocks'])} left, {rate_text(rates['reinserted_blocks'])} carried on"
    table.add_row("write amp.", amplification, reclaimed)
    return _panel(table, "throughput" if view.window_s is None else f"throughput, last {view.window_s:.1f} s")


def _tiers(view: TopView) -> Panel:
    parts: list[RenderableType] = []
    for tier in view.tiers:
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(style="dim", no_wrap=True, min_width=6)
        table.add_column(ratio=1)
        table.add_column(no_wrap=True, justify="right")
        whole = tier.capacity_bytes or max(1, tier.used_bytes)
        of = "" if tier.capacity_bytes is None else f" of {bytes_text(tier.capacity_bytes)}"
        table.add_row(tier.name, Bar(whole, 0, min(whole, tier.used_bytes), color="green"), f"{bytes_text(tier.used_bytes)}{of}")
        parts += [table, Text(f"       {_tier_text(tier)}", style="dim", no_wrap=True, overflow="ellipsis")]
    return _panel(Group(*parts), "tiers")


def _tier_text(tier: Tier) -> str:
    served = "" if tier.hits_per_s is None else f"served {rate_text(tier.hits_per_s)}; "
    return served + printable(tier.detail)


def _operations(view: TopView, width: int) -> Panel:
    shown = [operation for operation in view.operations if width >= 110 or operation.name in _NARROW_OPERATIONS]
    table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
    table.add_column("since opening", no_wrap=True)
    for operation in shown:
        table.add_column(printable(operation.name), justify="right", no_wrap=True)
    for name, values in (
        ("calls", [f"{operation.count:,}" for operation in shown]),
        ("p50 ms", [_ms(operation.p50_ms) for operation in shown]),
        ("p99 ms", [_ms(operation.p99_ms) for operation in shown]),
    ):
        table.add_row(name, *values)
    return _panel(table, "how long calls took")


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _segments(view: TopView, width: int, rows: int) -> Panel:
    if not view.segments:
        body: RenderableType = Text("the files are being read" if view.files_age_s is None else "there are no segments", style="dim")
        return _panel(body, "segments")
    shown = view.segments[-rows:]
    cells = max(8, width - 4 - 30)
    largest = max(1, *(segment.size_bytes for segment in shown if segment.blocks_live or len(shown) == 1), 1)
    lines = []
    for segment in shown:
        line = Text(f"{segment.segment_id:>5} ", style="dim", no_wrap=True, overflow="crop")
        length = min(cells, segment.cells.shape[1], max(1, round(cells * segment.size_bytes / largest)))
        for use, run in groupby(use_of_cells(resample(segment.cells, length))):
            line.append(SIGNS[use] * len(list(run)), style=STYLES[use])
        line.append(" " * (min(cells, segment.cells.shape[1]) - length))
        line.append(f" {share_text(segment.live_share, 1):>4} {segment.hits:>6,} hits {segment.state}", style="default")
        lines.append(line)
    legend = Text(no_wrap=True, overflow="ellipsis")
    for use in USES:
        legend.append(SIGNS[use], style=STYLES[use])
        legend.append(f" {use} {bytes_text(view.use_bytes[use])}  ", style="dim")
    older = "" if len(shown) >= view.segments_total else f", the newest {len(shown)} of {view.segments_total:,}"
    return _panel(Group(*lines, legend), f"segments{older}, seen {view.files_age_s or 0:.0f} s ago")


def _namespaces(view: TopView, selected: int, rows: int, width: int) -> Panel:
    table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
    table.add_column("namespace", no_wrap=True)
    table.add_column("model", no_wrap=True, overflow="ellipsis", ratio=1)
    names = ["in log", "share", "put", "get", "hit"] + (["blocks", "hits", "ratio"] if width >= 110 else [])
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    whole = sum(space.log_bytes for space in view.namespaces)
    first = min(max(0, selected - rows + 1), max(0, len(view.namespaces) - rows))
    for position, space in enumerate(view.namespaces[first : first + rows], first):
        cells = [
            bytes_text(space.log_bytes),
            share_text(space.log_bytes, whole),
            rate_text(space.put_bytes_per_s, "B"),
            rate_text(space.get_blocks_per_s),
            _ratio_text(space.hit_ratio),
            "-" if space.blocks_live is None else f"{space.blocks_live:,}",
            "-" if space.hits is None else f"{space.hits:,}",
            "-" if space.ratio is None else f"{space.ratio:.2f}x",
        ][: len(names)]
        chosen = "reverse" if position == selected else ""
        table.add_row(space.digest[:_SHORT_IDENT], Text(one_line(space.model)), *cells, style=chosen)
    left_out = len(view.namespaces) - rows
    return _panel(table, "namespaces" + (f", {rows} of {len(view.namespaces):,}" if left_out > 0 else ""))


def one_line(text: str) -> str:
    """A text of the store for one line of the screen."""
    return printable(text).replace("\n", "\\n")


def _decisions(view: TopView, rows: int) -> Panel:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim", justify="right", min_width=8)
    table.add_column(no_wrap=True, min_width=17)
    table.add_column(no_wrap=True, overflow="ellipsis")
    newest = max((float(decision.get("at_s", 0)) for decision in view.decisions), default=0.0)
    for decision in view.decisions[:rows]:
        facts = ", ".join(f"{_name(name)} {_fact(name, value)}" for name, value in decision.items() if name not in _LEFT_OUT)
        ago = "latest" if decision.get("at_s") == newest else f"-{newest - float(decision.get('at_s', 0)):.1f} s"
        table.add_row(ago, str(decision.get("event", "")).replace("_", " "), Text(one_line(f"{decision.get('reason', '')}: {facts}")))
    reclaim = view.reclaim
    if not view.decisions:
        return _panel(Text("nothing was freed, dropped or deleted since opening", style="dim"), "reclaims and decisions")
    totals = f"{reclaim.get('segments_freed', 0):,} segments freed, {reclaim.get('evicted_blocks', 0):,} blocks left"
    threshold = reclaim.get("threshold_hits")
    policy = f"{reclaim.get('policy')}" + ("" if threshold is None else f" from {threshold} hits")
    carried = f"{reclaim.get('reinserted_blocks', 0):,} carried forward ({policy})"
    return _panel(Group(Text(f"{totals}, {carried}", style="dim", no_wrap=True, overflow="ellipsis"), table), "reclaims and decisions")


def _name(name: str) -> str:
    return name.removesuffix("_bytes").removesuffix("_s").replace("_", " ")


def _fact(name: str, value: object) -> str:
    if name.endswith("_bytes") and isinstance(value, int | float):
        return bytes_text(value)
    if name.endswith("_s") and isinstance(value, int | float):
        return f"{value:.1f} s"
    return str(value).lstrip("0").removesuffix(".seg") if name == "segment" else str(value)


def _inside(space: NamespaceRow) -> Panel:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("digest", space.digest)
    for name, value in dict(space.details["descriptor"]).items():
        table.add_row(name, Text(one_line(str(value))))
    table.add_row("", "")
    table.add_row("in the log", bytes_text(space.log_bytes))
    table.add_row("put, get", f"{rate_text(space.put_bytes_per_s, 'B')}, {rate_text(space.get_blocks_per_s)} blocks")
    table.add_row("hit ratio since opening", _ratio_text(space.hit_ratio))
    for part, values in (("counter", space.details["counters"]), ("files", space.details["files"])):
        for name, value in dict(values).items():
            if name not in ("model", "digest", "log_bytes"):
                table.add_row(f"{part}: {name.replace('_', ' ')}", Text(one_line(_fact(name, value))))
    return _panel(table, one_line(space.model))
