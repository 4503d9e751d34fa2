"""``inspect record``: one record, every field annotated, its stripes, and whether its bytes match their checksums and decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...format.dump import fields_of, hexdump
from ...format.errors import FormatError, InvalidConfig, PathUnavailable
from ...format.layout import PAGE_BYTES, RecordType, segment_name
from ...format.record import RECORD_TABLE, RecordHeader, check_place
from ...format.stripe import stripe_offsets, stripe_raw_bytes
from ..output import make_table, print_facts, print_problems, print_table, time_text
from ..segment_view import codec_name, type_name
from ..store_files import StoreFiles, check_segment
from .payload import decode_stripes
from .survey import Survey

PAYLOAD_SHOWN_BYTES = 128


def place_of_key(survey: Survey, key: bytes, namespace: bytes | None) -> tuple[int, int]:
    """Segment and offset of the block that counts. Without ``namespace`` the key must be in one alone. Raises ``PathUnavailable``."""
    spaces = [namespace] if namespace is not None else sorted(survey.log.namespaces())
    found = {space: place for space in spaces if (place := survey.log.find(space + key)) is not None}
    _require_one(list(found), key, survey.files.path)
    place = next(iter(found.values()))
    return place.segment_id, place.offset


def place_in_segment(files: StoreFiles, segment_id: int, key: bytes, namespace: bytes | None) -> tuple[int, int]:
    """Segment and offset of the last block with this key in one segment, whether it counts or not. Raises ``PathUnavailable``."""
    table = files.segment(segment_id).table
    rows = [row for row in np.flatnonzero(table.type == RecordType.BLOCK).tolist() if table.key(row) == key]
    found = {bytes(table.namespace[row]): row for row in rows}
    if namespace is not None:
        found = {space: row for space, row in found.items() if space == namespace}
    _require_one(list(found), key, files.segment_path(segment_id))
    return segment_id, int(table.page[next(iter(found.values()))]) * PAGE_BYTES


def _require_one(spaces: list[bytes], key: bytes, where: Path) -> None:
    if not spaces:
        raise PathUnavailable("no block has this key", where=where, expected="a key that is present", actual=key.hex())
    if len(spaces) > 1:
        expected = "--namespace with one of " + ", ".join(space.hex() for space in spaces)
        raise PathUnavailable("several namespaces have a block with this key", where=where, expected=expected, actual=key.hex())


def record_facts(files: StoreFiles, segment_id: int, offset: int) -> dict[str, Any]:
    """What stands at ``offset`` of a segment, damaged or not. Raises ``InvalidConfig`` for an offset where no record can begin."""
    check_segment(files, segment_id)
    if offset < PAGE_BYTES or offset % PAGE_BYTES:
        raise InvalidConfig("no record starts there", expected=f"a multiple of {PAGE_BYTES} from {PAGE_BYTES} on", actual=offset)
    where = f"{segment_name(segment_id)} offset {offset}"
    header, stripes, problems = None, [], []
    with files.reading(segment_id) as read:
        page = bytes(read(offset, PAGE_BYTES))
        if not page:
            raise InvalidConfig(
                "the segment ends before that", where=segment_name(segment_id), expected="an offset inside the file", actual=offset
            )
        try:
            header = RecordHeader.parse(page, where=where)
            owner = files.header(segment_id)
            if owner is not None:
                check_place(header, owner.store_uuid, owner.segment_id, offset, where=where)
        except FormatError as error:
            problems.append(str(error))
        payload = b""
        if header is not None:
            stripes = _stripe_rows(header)
            payload = bytes(read(offset + PAGE_BYTES, min(PAYLOAD_SHOWN_BYTES, header.stored_length)))
            try:
                for stripe, problem in decode_stripes(read, header):
                    stripes[stripe]["check"] = "good" if problem is None else "damaged"
                    problems += [problem] if problem is not None else []
            except FormatError as error:
                problems.append(str(error))
    return {
        "segment": f"{segment_id:016x}",
        "offset": offset,
        "record": None if header is None else _values(header),
        "stripes": stripes,
        "page_hex": page,
        "payload_head_hex": payload,
        "problems": problems,
    }


def _values(header: RecordHeader) -> dict[str, Any]:
    values = {name: getattr(header, name) for name in RecordHeader.__slots__ if name != "stripes"}
    return values | {"record_type": type_name(int(header.record_type)), "codec": codec_name(int(header.codec))}


def _stripe_rows(header: RecordHeader) -> list[dict[str, Any]]:
    starts = stripe_offsets(header.stripes).tolist()
    rows = []
    for number, (start, stripe) in enumerate(zip(starts, header.stripes, strict=True)):
        rows.append(
            {
                "stripe": number,
                "offset": header.offset + PAGE_BYTES + start,
                "raw_length": stripe_raw_bytes(header.raw_length, header.stripe_bytes, number),
                "stored_length": int(stripe["stored_length"]),
                "first_plane_length": int(stripe["first_plane_length"]),
                "codec": codec_name(int(stripe["codec"])),
                "plane_flags": int(stripe["plane_flags"]),
                "checksum": f"{int(stripe['checksum']):016x}",
                "check": "not read",
            }
        )
    return rows


def print_record(console: Console, facts: dict[str, Any]) -> None:
    """For people."""
    record = facts["record"]
    if record is not None:
        kind = record["record_type"]
        lines = [("record", f"{kind} in segment {facts['segment']} at {facts['offset']}")]
        if kind == type_name(RecordType.BLOCK):
            lines += [("key", record["key"].hex()), ("as text", repr(record["key"]))]
        lines += [("namespace", record["namespace"].hex()), ("written", time_text(record["written_at_ns"]))]
        lines += [("expires", time_text(record["expires_at_ns"]))] if record["expires_at_ns"] else []
        print_facts(console, lines)
    console.print("header", style="bold")
    print_fields(console, facts["page_hex"], facts["offset"])
    if facts["stripes"]:
        console.print("stripes", style="bold")
        names = ["stripe", "offset", "raw_length", "stored_length", "codec", "checksum", "check"]
        table = make_table(*names, right=names[:4])
        for row in facts["stripes"]:
            table.add_row(*(str(row[name]) for name in names))
        print_table(console, table)
    if facts["payload_head_hex"]:
        console.print(f"first {len(facts['payload_head_hex'])} bytes of the payload as stored", style="bold")
        for line in hexdump(facts["payload_head_hex"], base=facts["offset"] + PAGE_BYTES):
            console.print(line, soft_wrap=True)
    if facts["problems"]:
        print_problems(console, facts["problems"])
    else:
        console.print("header and all stripes match their checksums, and decode to the raw checksum", style="green")


def print_fields(console: Console, page: bytes, base: int) -> None:
    """Fields of a record header that are not zero, with what they mean where there is room."""
    for value in fields_of(RECORD_TABLE, page, base=base):
        if any(value.data):
            shown = str(value)
            meaning = value.meaning.replace("`", "")
            fits = console.width >= len(shown) + len(meaning) + 3
            console.print(f"{shown}   {meaning}" if fits else shown, soft_wrap=True)
