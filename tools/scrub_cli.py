"""The command line of ``kvlode scrub``; the scrub itself is in ``tools.scrub`` and imported when it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def scrub(
    path: Annotated[Path, typer.Argument(help="The store's folder.", show_default=False, readable=False)],
    rate: Annotated[str, typer.Option(help="Bytes to read in a second; none for no limit.")] = "100MiB/s",
    once: Annotated[bool, typer.Option("--once", help="End after one round over what is there now.")] = False,
    interval: Annotated[str, typer.Option(help="Check a segment again after this time: 7d, 12h, 30min, 90s.")] = "7d",
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines: problems and segments, the summary last.")] = False,
) -> None:
    """Check every byte of a store's sealed segments in the background, also beside a running writer. Changes nothing.

    Goes on until it is interrupted (unless --once), and then where it ended. The exit code is a sum: 4 damage is known, 8 could not check
    everything, 16 usage, 32 interrupted.
    """
    from .scrub.command import Request, run_scrub
    from .scrub.pace import parse_interval, parse_rate
    from .scrub.scrubber import ScrubOptions

    options = ScrubOptions(once=once, interval_s=parse_interval(interval))
    raise typer.Exit(run_scrub(Request(str(path), options, parse_rate(rate), as_json)))
