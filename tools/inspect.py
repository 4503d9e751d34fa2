"""``kvlode inspect``: the segments of a store, one segment, one record with its bytes. Reads as SPEC.md says, changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..format.dump import annotated, hexdump
from ..format.errors import FormatError, InvalidConfig, PathUnavailable
from ..format.layout import PAGE_BYTES, Codec, parse_segment_name, segment_name
from ..format.record import RECORD_TABLE, RecordHeader
from ..format.superblock import SUPERBLOCK_TABLE
from ..format.walk import check_payload
from .output import bytes_text, print_json, time_text
from .store_files import RecordRow, SegmentView, StoreFiles, type_name

PAYLOAD_SHOWN_BYTES = 256


def inspect(path: Path, *, segment: str | None, record: int | None, limit: int, as_json: bool) -> int:
    """Print the store, a segment (its id in hex) or a record (its offset in that segment). Exit code 1 when something is damaged.

    ``path`` is the store's folder, or one of its segment files.
    """
    root, named = _place(path)
    segment_id = _segment_id(segment) if segment is not None else named
    if record is not None and segment_id is None:
        raise InvalidConfig("a record is in a segment", expected="--segment with --record", actual="--record alone")
    with StoreFiles(root) as files:
        if segment_id is None:
            return _store(files, limit, as_json)
        if not files.segment_path(segment_id).is_file():
            present = [segment_name(found) for found in files.segment_ids()]
            raise PathUnavailable(
                "there is no such segment",
                where=root,
                expected=f"one of {len(present)}: {', '.join(present[:3])} ..." if present else "a store with segments",
                actual=segment_name(segment_id),
            )
        if record is None:
            return _segment(files.segment(segment_id), limit, as_json)
        return _record(files, segment_id, record, as_json)


def _place(path: Path) -> tuple[Path, int | None]:
    """The store's folder, and the segment when ``path`` is a segment file."""
    if path.is_file() and (segment_id := parse_segment_name(path.name)) is not None:
        return path.resolve().parent.parent, segment_id
    return path, None


def _segment_id(text: str) -> int:
    found = parse_segment_name(text)
    if found is not None:
        return found
    try:
        return int(text, 16)
    except ValueError:
        raise InvalidConfig("the segment's id cannot be read", expected="a number in hex, as in its file name", actual=text) from None


# --- store ------------------------------------------------------------------------------------------------------------


def _store(files: StoreFiles, limit: int, as_json: bool) -> int:
    views = list(files.segments())
    problems = [problem for view in views for problem in view.problems]
    if as_json:
        print_json(
            {
                "path": str(files.path),
                "store_uuid": files.superblock.store_uuid,
                "segments": [_segment_facts(view) for view in views[:limit]],
                "segments_left_out": max(0, len(views) - limit),
                "problems": problems,
            }
        )
        return 1 if problems else 0
    console = Console()
    console.print(f"store {files.path}", highlight=False)
    for line in annotated(SUPERBLOCK_TABLE, files.superblock.pack()):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    table = Table()
    for name in ("segment", "state", "size", "records", "epoch"):
        table.add_column(name, no_wrap=True)
    table.add_column("written from")
    table.add_column("to")
    for view in views[:limit]:
        table.add_row(*_segment_row(view))
    console.print(table)
    _left_out(console, len(views) - limit, "segments")
    _show_problems(console, problems)
    return 1 if problems else 0


def _segment_facts(view: SegmentView) -> dict[str, Any]:
    written = [row.written_at_ns for row in view.rows if row.written_at_ns]
    return {
        "segment": f"{view.segment_id:016x}",
        "sealed": view.sealed,
        "size_bytes": view.size_bytes,
        "allocated_bytes": view.allocated_bytes,
        "epoch": None if view.header is None else view.header.epoch,
        "first_live_segment": None if view.header is None else view.header.first_live_segment,
        "records": len(view.rows),
        "oldest_written_at_ns": min(written, default=None),
        "newest_written_at_ns": max(written, default=None),
        "problems": view.problems,
    }


def _segment_row(view: SegmentView) -> list[str]:
    facts = _segment_facts(view)
    state = "damaged" if view.problems else "sealed" if view.sealed else "open"
    return [
        facts["segment"],
        state,
        bytes_text(view.size_bytes),
        f"{len(view.rows):,}",
        "-" if facts["epoch"] is None else str(facts["epoch"]),
        time_text(facts["oldest_written_at_ns"]),
        time_text(facts["newest_written_at_ns"]),
    ]


# --- one segment --------------------------------------------------------------------------------------------------------


def _segment(view: SegmentView, limit: int, as_json: bool) -> int:
    if as_json:
        facts = _segment_facts(view)
        facts["rows"] = [_row_facts(row) for row in view.rows[:limit]]
        print_json(facts)
        return 1 if view.problems else 0
    console = Console()
    for name, value in _segment_facts(view).items():
        if name != "problems":
            console.print(f"{name:<22} {value}", highlight=False)
    table = Table("offset", "type", "key", "namespace", "raw", "stored", "codec", "version")
    for row in view.rows[:limit]:
        table.add_row(
            str(row.offset),
            type_name(row.record_type),
            _key_text(row.key),
            row.namespace.hex()[:12],
            bytes_text(row.raw_length),
            bytes_text(row.stored_length),
            _codec_name(row.codec),
            str(row.version_seq),
        )
    console.print(table)
    _left_out(console, len(view.rows) - limit, "records")
    _show_problems(console, view.problems)
    return 1 if view.problems else 0


def _row_facts(row: RecordRow) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in RecordRow.__slots__}
    return values | {"record_type": type_name(row.record_type), "codec": _codec_name(row.codec)}


def _key_text(key: bytes) -> str:
    return key.hex()[:24] + (".." if len(key) > 12 else "") if key else "-"


def _codec_name(codec: int) -> str:
    return Codec(codec).name.lower().replace("_", "+")


# --- one record ---------------------------------------------------------------------------------------------------------


def _record(files: StoreFiles, segment_id: int, offset: int, as_json: bool) -> int:
    if offset < PAGE_BYTES or offset % PAGE_BYTES:
        raise InvalidConfig("no record starts there", expected=f"a multiple of {PAGE_BYTES} from {PAGE_BYTES} on", actual=offset)
    with files.reading(segment_id) as read:
        page = bytes(read(offset, PAGE_BYTES))
        problem, header = None, None
        try:
            header = RecordHeader.parse(page, where=f"{segment_name(segment_id)} offset {offset}")
            check_payload(read, header)
        except FormatError as error:
            problem = str(error)
        payload = bytes(read(offset + PAGE_BYTES, min(PAYLOAD_SHOWN_BYTES, header.stored_length))) if header is not None else b""
    if as_json:
        facts = None if header is None else {name: getattr(header, name) for name in RecordHeader.__slots__ if name != "stripes"}
        names = () if header is None else header.stripes.dtype.names or ()
        stripes = [] if header is None else [dict(zip(names, stripe.tolist(), strict=True)) for stripe in header.stripes]
        print_json({"record": facts, "stripes": stripes, "page_hex": page, "payload_head_hex": payload, "problem": problem})
    else:
        _print_record(page, header, payload, offset, problem)
    return 1 if problem else 0


def _print_record(page: bytes, header: RecordHeader | None, payload: bytes, offset: int, problem: str | None) -> None:
    console = Console()
    for line in annotated(RECORD_TABLE, page, base=offset):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if header is not None and len(header.stripes):
        names = header.stripes.dtype.names or ()
        table = Table("stripe", *names)
        for index, stripe in enumerate(header.stripes):
            table.add_row(str(index), *(str(stripe[name]) for name in names))
        console.print(table)
    console.print("header page", style="bold")
    for line in hexdump(page, base=offset):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if payload:
        console.print(f"first {len(payload)} bytes of the payload as stored", style="bold")
        for line in hexdump(payload, base=offset + PAGE_BYTES):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if problem is None:
        console.print("header and all stripes match their checksums", style="green")
    else:
        _show_problems(console, [problem])


def _left_out(console: Console, count: int, what: str) -> None:
    if count > 0:
        console.print(f"... and {count:,} more {what} (--limit)", highlight=False)


def _show_problems(console: Console, problems: list[str]) -> None:
    for problem in problems:
        console.print(f"damaged: {problem}", style="red", highlight=False, markup=False, soft_wrap=True)
