"""The command line of ``kvlode fsck``; the check itself is in ``tools.fsck`` and imported when it is used."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ..format.errors import InvalidConfig

if TYPE_CHECKING:
    from ..gds.device import Device
    from .fsck.index_view import IndexSource


class RepairMode(StrEnum):
    """How far a repair may go."""

    lossless = "lossless"
    lossy = "lossy"


class FsckCommand(TyperCommand):
    """Takes ``--repair`` alone as ``--repair=lossless``: the parser would take the path behind it for its value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        options = [f"--repair={RepairMode.lossless}" if word == "--repair" else word for word in args[:end]]
        return super().parse_args(ctx, options + args[end:])


def fsck(
    path: Annotated[
        Path | None, typer.Argument(help="The store's folder, or one segment file.", show_default=False, readable=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Headers and seals only.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every byte: payload checksums, decoding, padding.")] = False,
    sample: Annotated[
        str | None, typer.Option(help="Payloads of a share of the segments: 5%, n/t, or 20GiB.", metavar="SHARE", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the sample.")] = 0,
    repair: Annotated[
        RepairMode | None,
        typer.Option(help="Repair what can be repaired without loss; =lossy gives up what is damaged.", show_default=False),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Carry the repair's plan out without asking.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Beside a running writer: no lock, sealed segments only.")] = False,
    max_duration: Annotated[
        float | None, typer.Option(help="Stop after this many seconds.", min=0, metavar="SECONDS", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines: problems and progress, the summary last.")] = False,
    progress_json: Annotated[bool, typer.Option("--progress-json", help="Progress as JSON lines on standard error.")] = False,
    explain: Annotated[str | None, typer.Option(help="Explain a problem by its id, or list all.", metavar="ID", show_default=False)] = None,
) -> None:
    """Check a store, or one segment file: structure, records, payloads, index, space. Only reads, unless told to repair.

    Without --quick, --sample or --full every record header is read and the index is compared with the segments in both directions. The exit
    code is a sum: 1 repaired, 4 problems left, 8 could not check everything, 16 usage, 32 interrupted.
    """
    from .fsck.command import Request, run_fsck
    from .fsck.command import explain as run_explain
    from .fsck.options import CheckOptions, Level, Sample

    if explain is not None:
        raise typer.Exit(run_explain(explain))
    if path is None:
        raise InvalidConfig("there is nothing to check", expected="the folder of a store, or a segment file", actual="no path")
    if sum((quick, full, sample is not None)) > 1:
        raise InvalidConfig("--quick, --sample and --full exclude each other", expected="one of them", actual="several")
    level = Level.QUICK if quick else Level.FULL if full else Level.SAMPLE if sample is not None else Level.WALK
    share = None if sample is None else Sample.parse(sample)
    options = CheckOptions(level=level, sample=share, live=live, max_duration_s=max_duration, seed=seed)
    request = Request(str(path), options, repair, yes, as_json, progress_json)
    raise typer.Exit(run_fsck(request, _source))


def _source(device: Device, path: str) -> IndexSource | None:
    """The store's index; ``None`` where RocksDB cannot be imported: the segments can be checked all the same."""
    try:
        from .index_access import RocksSource
    except ImportError:
        return None
    return RocksSource(device, path)
