"""``kvlode purge``: delete what a tenant or a session has stored, and its bytes with it where that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .exit_codes import EXIT_FAILED, EXIT_FINE
from .output import bytes_text, make_console, print_json
from .paths import require_folder

if TYPE_CHECKING:
    from ..engine.config import StoreConfig

CAPACITY_BYTES_MIN = 4 << 30
BUFFER_BYTES = 64 << 20


def purge(
    path: Annotated[Path, typer.Argument(help="The store's folder.", show_default=False, readable=False)],
    tag: Annotated[str, typer.Option(help="The tag that the blocks were put with.", show_default=False)],
    physical: Annotated[bool, typer.Option("--physical", help="Erase the bytes on the drive and in quarantine too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do it. Without this, only say what would be done.")] = False,
    capacity: Annotated[
        str | None, typer.Option(help="Capacity that the engine opens the store with (default: twice what is there).", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")] = False,
) -> None:
    """Delete every block of a tag from a store that no engine has open; a running engine calls Store.purge itself.

    A dry run unless --yes is there. The exit code is a sum: 8 not everything could be purged (purge again), 16 usage.
    """
    require_folder(path, "a store")
    raise typer.Exit(_run(path, tag, physical=physical, yes=yes, capacity=capacity, as_json=as_json))


def _run(path: Path, tag: str, *, physical: bool, yes: bool, capacity: str | None, as_json: bool) -> int:
    from ..engine.opening import open_store
    from ..engine.purge import checked_tag

    _require_store(path)
    facts: dict[str, Any] = {"path": str(path), "tag": checked_tag(tag), "physical": physical, "dry_run": not yes}
    with open_store(path, _options(path, capacity)) as store:
        blocks, size_bytes = store.find_tagged(tag)
        facts |= {"blocks": blocks, "bytes": size_bytes, "complete": not yes, "reasons": []}
        if yes:
            report = store.purge(tag, physical=physical)
            facts |= {name: getattr(report, name) for name in report.__dataclass_fields__ if name != "tag"}
    if as_json:
        print_json(facts)
    else:
        _print(facts)
    return EXIT_FINE if facts["complete"] or not yes else EXIT_FAILED


def _require_store(path: Path) -> None:
    """A store is not made where there is none."""
    from ..format.errors import UnsupportedFormat
    from ..format.layout import SUPERBLOCK_NAME

    if not (path / SUPERBLOCK_NAME).is_file():
        raise UnsupportedFormat(
            "this folder is not a kvlode store", where=path, expected=f"a file {SUPERBLOCK_NAME}", actual="none", action="Check the path."
        )


def _options(path: Path, capacity: str | None) -> StoreConfig:
    """A capacity that is too small would have other blocks freed while the deletes are written."""
    from ..engine.config import StoreConfig, parse_bytes

    used_bytes = sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())
    capacity_bytes = max(CAPACITY_BYTES_MIN, 2 * used_bytes) if capacity is None else parse_bytes(capacity, "capacity")
    return StoreConfig.build(capacity=capacity_bytes, buffer=BUFFER_BYTES, gds="off")


def _print(facts: dict[str, Any]) -> None:
    console = make_console()
    what = f"{facts['blocks']:,} blocks"
    if facts["dry_run"]:
        erased = f" and {bytes_text(facts['bytes'])} erased" if facts["physical"] else f"; {bytes_text(facts['bytes'])} stay on the drive"
        console.print(f"{what} would be deleted{erased}. Nothing was changed: add --yes.", soft_wrap=True)
        return
    erased = f", {facts['records_erased']:,} records ({bytes_text(facts['bytes_erased'])}) erased" if facts["physical"] else ""
    files = f", {facts['quarantine_files_erased']} files in quarantine emptied" if facts["quarantine_files_erased"] else ""
    console.print(f"{what} deleted{erased}{files}", soft_wrap=True)
    for reason in facts["reasons"]:
        console.print(f"not done: {reason}", style="red", soft_wrap=True)
