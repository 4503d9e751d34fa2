"""The sub-commands of ``kvlode inspect``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from ...format.errors import InvalidConfig
from ...format.layout import PAGE_BYTES, parse_segment_name
from ..exit_codes import EXIT_DAMAGE, EXIT_FAILED, EXIT_FINE
from ..output import make_console, print_json
from ..store_files import StoreFiles, check_segment, open_files
from .survey import Survey

HTML_CELLS = 240


class StoreByDefault(TyperGroup):
    """``kvlode inspect PATH`` is ``kvlode inspect store PATH``: a first word that is a path, and no command, names a store."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        first = args[0] if args else ""
        if first and first not in self.commands and (os.sep in first or os.path.exists(first)):
            args = ["store", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=StoreByDefault,
    help="Look into a store without changing it: segments, records, namespaces, prefix trees, the index. Works on damaged stores "
    "and single segment files, beside a running engine.",
    no_args_is_help=True,
)

AnyPath = Annotated[Path, typer.Argument(help="The store's folder, or one segment file.", show_default=False, readable=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")]
Limit = Annotated[int, typer.Option(help="Rows to show at most.", min=1)]
SegmentOption = Annotated[str | None, typer.Option("--segment", help="Id in hex, or file name.", show_default=False)]
NamespaceOption = Annotated[str | None, typer.Option("--namespace", help="Its digest in hex, or the beginning of it.", show_default=False)]


def parse_hex(text: str, what: str) -> bytes:
    """Bytes written in hex. Raises ``InvalidConfig``."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise InvalidConfig(f"the {what} cannot be read", expected="an even number of hex digits", actual=text) from None


def parse_key(text: str) -> bytes:
    """A block's key written in hex. Raises ``InvalidConfig``."""
    key = parse_hex(text, "key")
    if not 1 <= len(key) <= 255:
        raise InvalidConfig("no block has such a key", expected="1 to 255 bytes in hex", actual=f"{len(key)} bytes")
    return key


def parse_segment_id(text: str) -> int:
    """A segment's id in hex, or the name of its file. Raises ``InvalidConfig``."""
    found = parse_segment_name(text)
    try:
        return found if found is not None else int(text, 16)
    except ValueError:
        raise InvalidConfig("the segment's id cannot be read", expected="a number in hex, as in its file name", actual=text) from None


def _segment_of(files: StoreFiles, named: int | None, text: str | None) -> int:
    """The segment that was asked for: by ``--segment``, or because the path is its file. Raises ``InvalidConfig``."""
    if text is not None:
        segment_id = parse_segment_id(text)
        check_segment(files, segment_id)
        return segment_id
    if named is None:
        raise InvalidConfig(
            "no segment was named", where=files.path, expected="--segment ID, or the path of a segment file", actual="a store"
        )
    check_segment(files, named)
    return named


def _answer(facts: dict[str, Any], show: Callable[[Console], None], as_json: bool) -> typer.Exit:
    """Print the answer one way or the other; the exit code tells of damage."""
    if as_json:
        print_json(facts)
    else:
        show(make_console())
    return typer.Exit(EXIT_DAMAGE if facts.get("problems") else EXIT_FINE)


@app.command()
def store(
    path: AnyPath,
    limit: Limit = 64,
    html: Annotated[
        Path | None, typer.Option(help="Write the same as one self-contained page.", show_default=False, readable=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What is where, how full, how old, how hot; with a map of the newest segments."""
    from .html import check_page_place, write_page
    from .map import map_width
    from .namespaces import namespaces_facts
    from .store import StoreView, print_store

    files, _ = open_files(path)
    with files:
        if html is not None:
            check_page_place(files, html)
        width = map_width(make_console(), files.segment_ids())
        survey = Survey(files)
        view = StoreView(survey, limit, width if html is None else HTML_CELLS)
        if html is not None:
            write_page(html, view, namespaces_facts(survey, limit))
        facts = view.facts() | ({} if html is None else {"html": str(html)})
        raise _answer(facts, lambda console: print_store(console, view, width), as_json)


@app.command()
def segments(path: AnyPath, limit: Limit = 200, as_json: AsJson = False) -> None:
    """One row a segment: what its bytes are used for, ages, hits."""
    from .segments import print_segments, segments_facts

    files, _ = open_files(path)
    with files:
        survey = Survey(files)
        facts = segments_facts(survey, limit)
        raise _answer(facts, lambda console: print_segments(console, facts, survey.now_ns), as_json)


@app.command()
def segment(path: AnyPath, segment_id: SegmentOption = None, limit: Limit = 200, as_json: AsJson = False) -> None:
    """The header and the records of one segment."""
    from .segments import print_segment, segment_facts

    files, named = open_files(path)
    with files:
        wanted = _segment_of(files, named, segment_id)
        facts = segment_facts(Survey(files), wanted, limit)
        raise _answer(facts, lambda console: print_segment(console, facts), as_json)


@app.command()
def record(
    path: AnyPath,
    segment_id: SegmentOption = None,
    offset: Annotated[int | None, typer.Option(help="Byte offset of the record in its segment.", show_default=False)] = None,
    key: Annotated[str | None, typer.Option(help="The block with this key (hex) instead of an offset.", show_default=False)] = None,
    namespace: NamespaceOption = None,
    as_json: AsJson = False,
) -> None:
    """One record: every field annotated, its stripes, and whether they match their checksums and decode."""
    from .namespaces import choose_namespace
    from .record import place_in_segment, place_of_key, print_record, record_facts

    if (offset is None) == (key is None):
        raise InvalidConfig(
            "which record is not clear", expected="either --offset (with --segment) or --key", actual="both" if key else "none"
        )
    files, named = open_files(path)
    with files:
        if key is not None:
            wanted, one = parse_key(key), None if segment_id is None and named is None else _segment_of(files, named, segment_id)
            survey = Survey(files)
            space = None if namespace is None else choose_namespace(survey, namespace)
            place = place_of_key(survey, wanted, space) if one is None else place_in_segment(files, one, wanted, space)
        else:
            assert offset is not None
            place = _segment_of(files, named, segment_id), offset
        facts = record_facts(files, *place)
        raise _answer(facts, lambda console: print_record(console, facts), as_json)


@app.command()
def hexdump(
    path: AnyPath,
    segment_id: SegmentOption = None,
    offset: Annotated[int, typer.Option(help="First byte to show.", min=0)] = 0,
    length: Annotated[int, typer.Option(help="Bytes to show.", min=1)] = PAGE_BYTES,
    as_json: AsJson = False,
) -> None:
    """Raw bytes of a segment (of the superblock without one), with the fields of structures that begin there."""
    from .hexdump import hexdump_facts, print_hexdump

    files, named = open_files(path)
    with files:
        wanted = named if segment_id is None else _segment_of(files, named, segment_id)
        facts = hexdump_facts(files, wanted, offset, length)
        raise _answer(facts, lambda console: print_hexdump(console, facts), as_json)


@app.command()
def namespaces(path: AnyPath, limit: Limit = 50, as_json: AsJson = False) -> None:
    """Which namespaces take how much, their compression, ages, hits and descriptors."""
    from .namespaces import namespaces_facts, print_namespaces

    files, _ = open_files(path)
    with files:
        survey = Survey(files)
        facts = namespaces_facts(survey, limit)
        raise _answer(facts, lambda console: print_namespaces(console, facts, survey.now_ns), as_json)


@app.command()
def tree(
    path: AnyPath,
    namespace: NamespaceOption = None,
    root: Annotated[str | None, typer.Option(help="Begin at the block with this key (hex).", show_default=False)] = None,
    limit: Limit = 100,
    as_json: AsJson = False,
) -> None:
    """The prefix tree of a namespace: runs of blocks, where they fork, and branches whose parent is gone."""
    from .namespaces import choose_namespace
    from .tree import print_tree, tree_facts

    files, _ = open_files(path)
    with files:
        survey = Survey(files)
        digest = choose_namespace(survey, namespace)
        facts = tree_facts(survey, digest, None if root is None else parse_key(root), limit)
        raise _answer(facts, lambda console: print_tree(console, facts), as_json)


@app.command()
def index(
    path: AnyPath,
    namespace: Annotated[str, typer.Option(help="Only entries of this namespace (digest in hex).", show_default=False)] = "",
    prefix: Annotated[str, typer.Option(help="Only keys that begin with these bytes (hex; needs --namespace).", show_default=False)] = "",
    limit: Limit = 100,
    as_json: AsJson = False,
) -> None:
    """Entries of the index, its checkpoint, drop floors and identity."""
    from .index import index_facts, print_index

    digest = parse_hex(namespace, "namespace")
    if len(digest) > 16 or (prefix and len(digest) != 16):
        raise InvalidConfig("the namespace is not a digest", expected="32 hex digits", actual=namespace or "none")
    files, _ = open_files(path)
    with files:
        facts = index_facts(files, digest + parse_hex(prefix, "prefix"), limit)
        raise _answer(facts, lambda console: print_index(console, facts), as_json)


@app.command()
def diff(path: AnyPath, limit: Limit = 20, as_json: AsJson = False) -> None:
    """Where index and segments disagree. Rows are limited for each kind of difference."""
    from .diff import diff_facts, print_diff

    files, _ = open_files(path)
    with files:
        facts = diff_facts(Survey(files), limit)
        raise _answer(facts, lambda console: print_diff(console, facts), as_json)


@app.command("export")
def export_blocks(
    path: AnyPath,
    keys: Annotated[list[str], typer.Argument(help="Keys of the blocks, in hex.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", help="The new safetensors file.", show_default=False, readable=False)],
    namespace: NamespaceOption = None,
    as_json: AsJson = False,
) -> None:
    """Write blocks to a safetensors file, every stripe checked and decoded."""
    from .export import check_target, export_facts, print_export
    from .namespaces import choose_namespace

    wanted = [parse_key(key) for key in keys]
    files, _ = open_files(path)
    with files:
        check_target(files, to)
        survey = Survey(files)
        facts = export_facts(survey, choose_namespace(survey, namespace), wanted, to)
        code = _answer(facts, lambda console: print_export(console, facts), as_json).exit_code
    raise typer.Exit(code | (EXIT_FAILED if facts["missing"] else EXIT_FINE))


@app.command("import")
def import_file(
    path: Annotated[Path, typer.Argument(help="The store's folder.", show_default=False, readable=False)],
    source: Annotated[Path, typer.Argument(help="A file that inspect export wrote.", show_default=False, readable=False)],
    capacity: Annotated[str, typer.Option(help="The capacity that the engine opens this store with, as 200GiB.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Put exported blocks into a store that nobody has open. The only sub-command that writes."""
    from .import_blocks import import_facts, print_import

    facts = import_facts(path, source, capacity)
    code = _answer(facts, lambda console: print_import(console, facts), as_json).exit_code
    raise typer.Exit(code | (EXIT_FAILED if facts["refused"] or not facts["flushed"] else EXIT_FINE))
