"""The ``kvlode`` command. Each command lives in a module of its own, imported when it is used."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..format.errors import (
    CorruptRecord,
    InvalidBlock,
    InvalidConfig,
    InvalidKey,
    KvlodeError,
    PathUnavailable,
    UnsupportedFormat,
    device_error,
)
from .exit_codes import EXIT_DAMAGE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from .fsck_cli import FsckCommand, fsck
from .inspect.command import app as inspect_app
from .paths import require_folder, require_new_place
from .plan_cli import plan
from .purge_cli import purge
from .replay.command import replay
from .scrub_cli import scrub

_CommandLineError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""What the parser raises for a command line it cannot take. Its home differs between versions of typer."""

_PARSER_INTERRUPTED = 130
"""The exit code that the parser makes of an interrupt."""

app = typer.Typer(
    name="kvlode",
    help="A storage engine for the KV cache of LLM inference: look at stores, check the machine, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(inspect_app, name="inspect")
app.command(cls=FsckCommand)(fsck)
app.command()(scrub)
app.command()(plan)
app.command()(replay)
app.command()(purge)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")]
StorePath = Annotated[Path, typer.Argument(help="The store's folder.", show_default=False, readable=False)]


class Dtype(StrEnum):
    """Types that the demo's model can be computed in."""

    bfloat16 = "bfloat16"
    float32 = "float32"


def _progress() -> Console:
    return Console(stderr=True)


@app.command()
def demo(
    dtype: Annotated[Dtype, typer.Option(help="Type to compute in.")] = Dtype.bfloat16,
    store: Annotated[
        Path | None, typer.Option(help="Keep the store here (default: a temporary folder).", show_default=False, readable=False)
    ] = None,
    document_tokens: Annotated[int, typer.Option(help="Length of the document in the prompt.", min=256, max=6000)] = 3072,
    as_json: AsJson = False,
) -> None:
    """Store a real model's prefix in one process, restore it in another, compare tokens and times."""
    if store is not None:
        require_folder(store, "the demo's store")
    from .demo import run_demo

    raise typer.Exit(run_demo(dtype=dtype.value, store=store, as_json=as_json, document_tokens=document_tokens, console=_progress()))


@app.command()
def stat(path: StorePath, as_json: AsJson = False) -> None:
    """What a store holds: segments, namespaces, sizes, compression. Only reads; works beside a running engine."""
    from .stat import show_stat

    raise typer.Exit(show_stat(path, as_json=as_json))


@app.command()
def doctor(
    path: Annotated[Path, typer.Argument(help="Where a store is or shall be.", readable=False)] = Path("."), as_json: AsJson = False
) -> None:
    """What this machine can do for a store here: file system, O_DIRECT, GPU, GDS, limits; what it means and what to do."""
    require_folder(path, "a store")
    from .doctor import doctor as run

    raise typer.Exit(run(path, as_json=as_json))


@app.command()
def bench(
    path: Annotated[
        Path | None, typer.Argument(help="Measure below this folder (default: ./.bench).", show_default=False, readable=False)
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this item; may be repeated.", show_default=False)] = None,
    size: Annotated[str, typer.Option(help="What a round writes or reads.")] = "2GiB",
    rounds: Annotated[int, typer.Option(help="Rounds of each pair.", min=1)] = 9,
    quick: Annotated[bool, typer.Option("--quick", help="Only show that the bench works; the figures mean nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the store against a bare loop over the same drive and memory, in the same run."""
    if path is not None:
        require_folder(path, "a bench")
    from .bench import run_bench

    code = run_bench(path, as_json=as_json, only=only, size_bytes=size, rounds=rounds, quick=quick, console=_progress())
    raise typer.Exit(code)


@app.command("gpu-check")
def gpu_check(
    path: Annotated[Path | None, typer.Argument(help="Check in a new folder below this one.", show_default=False, readable=False)] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the report to this file.", show_default=False, readable=False)
    ] = None,
) -> None:
    """On a machine with a GPU: device conformance and bandwidth by path."""
    if path is not None:
        require_folder(path, "the check")
    if json_path is not None:
        require_new_place(json_path, "the report")
    from .gpu_check import run_gpu_check

    raise typer.Exit(run_gpu_check(path, json_path, _progress()))


@app.command("serve-metrics")
def serve_metrics(
    path: StorePath,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any free one.", min=0, max=65535)] = 9109,
    address: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    once: Annotated[bool, typer.Option("--once", help="Print the metrics once and end.")] = False,
) -> None:
    """Prometheus metrics of a store that another process has open, from what that process publishes in the store's folder."""
    from .metrics.serve import serve_metrics as run

    raise typer.Exit(run(path, address=address, port=port, once=once))


@app.command()
def top(
    path: StorePath,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.2, max=3600)] = 2.0,
    as_json: AsJson = False,
) -> None:
    """Live view of a store that another process has open: rates, hit ratio, tiers, segments, namespaces, decisions, alerts."""
    from .top.command import run_top

    raise typer.Exit(run_top(path, once=once, as_json=as_json, interval_s=interval))


@app.command()
def report(
    path: StorePath,
    html: Annotated[Path, typer.Option("--html", help="Write the page to this file.", show_default=False, readable=False)],
    as_json: AsJson = False,
) -> None:
    """One page about a store, with pictures: use, ages, heat, latency, what more capacity would bring, alerts."""
    from .report.command import run_report

    raise typer.Exit(run_report(path, html, as_json=as_json))


@app.command()
def version(as_json: AsJson = False) -> None:
    """Versions of kvlode and of its format."""
    from importlib.metadata import version as installed

    from ..format.layout import FORMAT_VERSION
    from .output import print_json

    facts = {"kvlode": installed("kvlode"), "format": FORMAT_VERSION, "python": sys.version.split()[0]}
    if as_json:
        print_json(facts)
    else:
        print(f"kvlode {facts['kvlode']}, format {facts['format']}, Python {facts['python']}")


def main() -> None:
    """Entry point: whatever goes wrong becomes one line on standard error and an exit code."""
    _fill_standard_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # what the terminal's encoding lacks is shown as a question mark
    try:
        code = _run()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output has gone (``| head``). Nobody wants to read of it, and the interpreter shall not try to flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ is not None else 1)
        code = EXIT_FAILED
    sys.exit(code)


def _fill_standard_descriptors() -> None:
    """A caller may have closed them (``>&-``): the next file opened, a segment even, would get the number that messages are written to."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, closefd=False) if stream is None else stream  # noqa: SIM115  (they live as long as the process)
        for number, mode, stream in ((0, "r", sys.stdin), (1, "w", sys.stdout), (2, "w", sys.stderr))
    )


def _run() -> int:
    try:
        code = int(app(standalone_mode=False) or 0)
        return _complain("interrupted", EXIT_INTERRUPTED) if code == _PARSER_INTERRUPTED else code
    except BrokenPipeError:
        raise
    except SystemExit as end:  # the parser's own answer to a broken pipe
        raise end.__context__ or end from None
    except _CommandLineError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error)
            return EXIT_USAGE
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        return _complain(f"{' '.join(message.split()).rstrip('.')}. See --help.", EXIT_USAGE)
    except (typer.Abort, KeyboardInterrupt):
        return _complain("interrupted", EXIT_INTERRUPTED)
    except CorruptRecord as error:
        return _complain(error, EXIT_DAMAGE)
    except (InvalidConfig, InvalidKey, InvalidBlock, PathUnavailable, UnsupportedFormat) as error:
        return _complain(error, EXIT_USAGE)
    except KvlodeError as error:
        return _complain(error, EXIT_FAILED)
    except OSError as error:
        named = error.errno is not None and error.filename is not None
        return _complain(device_error("access", error.filename, error) if named else error, EXIT_FAILED)


def _complain(error: object, code: int) -> int:
    print(f"kvlode: {error}", file=sys.stderr)
    return code
