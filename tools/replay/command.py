"""``kvlode replay``."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ...engine.sizes import parse_bytes
from ...format.errors import InvalidConfig
from ..exit_codes import EXIT_FINE
from ..output import make_console, print_json
from ..paths import require_file, require_folder, require_new_place
from .bounds import bounds_of
from .chart import check_matplotlib, check_picture, draw, write_page
from .options import DEFAULT_SHARE, SWEEP_SHARES, Settings, policy_choice
from .prefill_rates import DEFAULT_RATE, prefill_rate
from .real import run_real
from .report import print_runs, print_trace, trace_facts
from .runs import capacity_blocks_of, run_simulation
from .sweep import print_curves, sweep, sweep_requests
from .traces import Trace, read_trace

DEFAULT_POLICIES = ("fifo", "reinsertion")


def replay(
    trace: Annotated[Path, typer.Argument(help="A trace as JSON lines.", show_default=False, readable=False)],
    format_name: Annotated[
        str | None,
        typer.Option("--format", help="mooncake, bailian, kv-events (or vllm, sglang); else as the first line shows.", show_default=False),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse a trace with a line that cannot be used.")] = False,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Reclaim policy, NAME[:option=value,...]; may be repeated (default: fifo, reinsertion).", show_default=False),
    ] = None,
    admission: Annotated[str, typer.Option(help="Admission policy, NAME or NAME:option=value,...")] = "always",
    capacity: Annotated[
        str | None, typer.Option(help="What the store holds, such as 200GiB, by --block-bytes.", show_default=False)
    ] = None,
    capacity_share: Annotated[
        str | None, typer.Option(help=f"The same as a share of the trace's unique blocks (default: {DEFAULT_SHARE}).", show_default=False)
    ] = None,
    segments: Annotated[int, typer.Option(help="Segments of the log.", min=2)] = 64,
    block_bytes: Annotated[str, typer.Option(help="Size of a block: for sizes, rates, and the blocks of --real.")] = "1MiB",
    hbm: Annotated[str | None, typer.Option(help="GPU memory in front of the store: a size or a share.", show_default=False)] = None,
    dram: Annotated[str | None, typer.Option(help="Host memory behind that: a size or a share.", show_default=False)] = None,
    restart_at: Annotated[
        float | None, typer.Option(help="Second of the trace at which the host restarts: memory is lost, the store is not.", min=0)
    ] = None,
    prefill: Annotated[str, typer.Option(help="MODEL@GPU whose prefill rate turns tokens into GPU seconds.")] = DEFAULT_RATE,
    as_sweep: Annotated[bool, typer.Option("--sweep", help="Miss-ratio curves over capacities and policies.")] = False,
    sweep_shares: Annotated[str, typer.Option(help="Capacities of a sweep: shares or sizes, with commas.")] = ",".join(SWEEP_SHARES),
    plot: Annotated[Path | None, typer.Option(help="Draw the sweep into this .svg or .png.", show_default=False, readable=False)] = None,
    html: Annotated[Path | None, typer.Option(help="Write the sweep as one HTML page.", show_default=False, readable=False)] = None,
    real: Annotated[bool, typer.Option("--real", help="Play through a store on a drive instead of in simulation.")] = False,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where --real makes its store (default: here); it is removed at the end.", show_default=False, readable=False),
    ] = None,
    flush_each: Annotated[bool, typer.Option(help="--real: wait for the drive after each request.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")] = False,
) -> None:
    """Play a trace of requests against the policies of a store, in simulation or on a drive: hits, writes, what is saved."""
    require_file(trace, "the trace")
    settings = Settings(
        policies=tuple(policy_choice(text) for text in policy or DEFAULT_POLICIES),
        admission=policy_choice(admission),
        capacity=_capacity(capacity, capacity_share),
        segments=segments,
        block_bytes=parse_bytes(block_bytes, "block-bytes"),
        hbm=hbm,
        dram=dram,
        restart_at_s=restart_at,
        prefill=prefill,
        folder=folder,
        flush_each=flush_each,
        sweep_shares=tuple(share.strip() for share in sweep_shares.split(",")),
    )
    _check(settings, as_sweep, plot, html, real)
    facts = _replay(trace, format_name, strict, settings, as_sweep=as_sweep, real=real, quiet=as_json)
    if plot is not None:
        draw(facts["curves"], _title(facts), plot, plot.suffix[1:].lower())
    if html is not None:
        write_page(facts["curves"], facts["runs"], _title(facts), html)
    if as_json:
        print_json(facts)
    raise typer.Exit(EXIT_FINE)


def _replay(
    path: Path, format_name: str | None, strict: bool, settings: Settings, *, as_sweep: bool, real: bool, quiet: bool
) -> dict[str, Any]:
    with _Bars() as bars:
        bars.begin("reading the trace", path.stat().st_size)
        trace = read_trace(path, format_name, strict=strict, advance=bars.advance)
        facts = _sweep(trace, settings, bars) if as_sweep else _runs(trace, settings, bars, real=real)
    if not quiet:
        console = make_console()
        print_trace(console, trace)
        console.print()
        if as_sweep:
            print_curves(console, facts["curves"], settings.block_bytes)
        else:
            print_runs(console, facts["runs"], facts["bounds"])
    return facts


def _capacity(size: str | None, share: str | None) -> str:
    if size is not None and share is not None:
        raise InvalidConfig("two capacities", expected="--capacity or --capacity-share", actual=f"{size} and {share}")
    if share is not None and "%" not in share:
        share = f"{share}%"
    return size or share or DEFAULT_SHARE


def _check(settings: Settings, as_sweep: bool, plot: Path | None, html: Path | None, real: bool) -> None:
    """What can be known to be wrong before the trace is read."""
    for choice in settings.policies:
        choice.reclaim()
    settings.admission.admission(1)
    prefill_rate(settings.prefill)
    if (plot is not None or html is not None) and not as_sweep:
        raise InvalidConfig("there is no curve to draw", expected="--sweep with --plot and --html", action="Add --sweep.")
    if real and as_sweep:
        raise InvalidConfig("a sweep is simulated", expected="--sweep or --real", actual="both", action="Leave --sweep out.")
    if settings.folder is not None:
        require_folder(settings.folder, "a real replay")
    for path, what in ((plot, "the picture"), (html, "the page")):
        if path is not None:
            require_new_place(path, what)
            check_matplotlib()
    if plot is not None:
        check_picture(plot)


def _runs(trace: Trace, settings: Settings, bars: _Bars, *, real: bool) -> dict[str, Any]:
    blocks = capacity_blocks_of(trace, settings, settings.capacity)
    run = run_real if real else run_simulation
    runs = []
    for choice in settings.policies:
        bars.begin(choice.text, len(trace.requests))
        runs.append(run(trace, settings, choice, blocks, bars.advance))
    bars.begin("bounds", 2 * len(trace.requests))
    bounds = bounds_of(trace, blocks, bars.advance)
    mode = {"mode": "real" if real else "simulation"}
    return runs[0] | mode | trace_facts(trace) | {"bounds": bounds, "runs": runs}


def _sweep(trace: Trace, settings: Settings, bars: _Bars) -> dict[str, Any]:
    for share in settings.sweep_shares:
        capacity_blocks_of(trace, settings, share)
    bars.begin("sweep", sweep_requests(trace, settings))
    return {"mode": "sweep"} | trace_facts(trace) | {"unique_blocks": trace.unique_blocks} | sweep(trace, settings, bars.advance)


def _title(facts: dict[str, Any]) -> str:
    return f"{Path(facts['trace']).name}: {facts['trace_block_uses']:,} blocks asked for, {facts['unique_blocks']:,} unique"


class _Bars(AbstractContextManager["_Bars"]):
    """A bar on standard error for what is being done; nothing where that is no terminal."""

    def __init__(self) -> None:
        texts = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn()
        self._bars = Progress(*texts, console=Console(file=sys.stderr), transient=True, disable=not sys.stderr.isatty())

    def __enter__(self) -> _Bars:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def begin(self, name: str, total: int) -> None:
        """What comes now; ``total`` in the units of ``advance``."""
        for task in self._bars.task_ids:
            self._bars.remove_task(task)
        self._bars.add_task(name, total=total)

    def advance(self, count: int) -> None:
        for task in self._bars.task_ids:
            self._bars.advance(task, count)
