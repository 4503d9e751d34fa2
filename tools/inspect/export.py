"""``inspect export``: blocks out of a store into a safetensors file, every stripe checked and decoded with ``format`` alone."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ...format.errors import FormatError, InvalidConfig
from ...format.keys import key_digest
from ...format.layout import RecordType, segment_name
from ...format.namespace import Namespace
from ...format.record import RecordHeader
from ...format.walk import parse_placed
from ..liveness import Place
from ..output import bytes_text, count_text, print_problems
from ..paths import naming, require_new_place
from ..store_files import StoreFiles
from .namespaces import collect_namespaces, live_rows
from .payload import decode_block
from .safetensors_file import TensorWriter, tensor_type
from .survey import Survey

FORMAT_NAME = "kvlode-blocks-1"
_BLOCK_HEADER_BYTES_MAX = 3000
"""More than the JSON of one block takes: key, parent key and metadata in hex, numbers, and the tensor's own entry."""


def export_facts(survey: Survey, namespace: bytes, keys: list[bytes], target: Path) -> dict[str, Any]:
    """Write the blocks to the new file ``target``, which ``check_target`` has found good.

    What is missing or damaged is left out and named; without any block there is no file.
    """
    descriptor = _descriptor(survey, namespace)
    wanted = list(dict.fromkeys(keys))
    places = {key: survey.log.find(namespace + key) for key in wanted}
    facts: dict[str, Any] = {"file": str(target), "namespace": namespace.hex(), "bytes": 0}
    blocks: dict[str, dict[str, Any]] = {}
    damaged: list[str] = []
    metadata_bytes = 2 * len(json.dumps(descriptor.canonical_json().decode())) + 1000
    with naming("create", target):
        writer = TensorWriter(target, metadata_bytes + _BLOCK_HEADER_BYTES_MAX * len(wanted))
    with naming("write", target), contextlib.ExitStack() as undo:
        undo.callback(writer.abandon)
        for key, place in places.items():
            if place is None:
                continue
            try:
                header, raw = read_block(survey.files, place, namespace + key)
            except (FormatError, OSError) as error:
                damaged.append(f"{key.hex()}: {error}")
                continue
            dtype, shape = tensor_type(descriptor.dtype, header.raw_length)
            writer.add(key.hex(), dtype, shape, raw)
            blocks[key.hex()] = _block_facts(header, dtype)
            facts["bytes"] += header.raw_length
        if blocks:
            _add_parent_keys(survey, namespace, blocks)
            writer.finish(
                {
                    "format": FORMAT_NAME,
                    "namespace": descriptor.canonical_json().decode(),
                    "blocks": json.dumps(blocks, separators=(",", ":")),
                }
            )
    missing = [key.hex() for key, place in places.items() if place is None]
    return facts | {"exported": list(blocks), "missing": missing, "problems": survey.problems + damaged}


def check_target(files: StoreFiles, target: Path) -> None:
    """Raise ``InvalidConfig`` for a place where no file can be written, for a file that exists, or that would lie inside the store."""
    require_new_place(target, "the export")
    if target.exists():
        raise InvalidConfig("the file exists already", where=target, expected="a new name", action="Remove it, or choose another name.")
    folder = files.path.resolve()
    if folder in target.resolve().parents:
        raise InvalidConfig("the file would lie inside the store", where=target, expected=f"a place outside of {folder}")


def _descriptor(survey: Survey, namespace: bytes) -> Namespace:
    for space in collect_namespaces(survey):
        if space.digest == namespace and space.descriptor is not None:
            return space.descriptor
    raise InvalidConfig(
        "the namespace's descriptor is lost, so the dtype of its blocks is not known",
        where=survey.files.path,
        expected="a namespace record in one of the segments that use it",
        actual=namespace.hex(),
    )


def read_block(files: StoreFiles, place: Place, ident: bytes) -> tuple[RecordHeader, memoryview]:
    """Header and raw bytes of a block, all checks made. Raises ``FormatError`` or ``OSError``."""
    with files.reading(place.segment_id) as read:
        page = bytes(read(place.offset, 4096))
        header = parse_placed(page, files.store_uuid, place.segment_id, place.offset)
        if header.record_type != RecordType.BLOCK or header.namespace + header.key != ident:
            raise InvalidRecord(place)
        return header, memoryview(decode_block(read, header).data)


class InvalidRecord(FormatError):
    """A record that is intact and not the one that the segment's table of contents lists."""

    def __init__(self, place: Place) -> None:
        super().__init__("another record stands here", where=f"{segment_name(place.segment_id)} offset {place.offset}")


def _block_facts(header: RecordHeader, dtype: str) -> dict[str, Any]:
    return {
        "key": header.key.hex(),
        "parent": header.parent.hex() if any(header.parent) else None,
        "parent_key": None,
        "depth": header.depth,
        "meta": header.meta.hex(),
        "tag": header.tag.hex() if any(header.tag) else None,
        "raw_length": header.raw_length,
        "raw_checksum": f"{header.raw_checksum:016x}",
        "written_at_ns": header.written_at_ns,
        "expires_at_ns": header.expires_at_ns,
        "dtype": dtype,
    }


def _add_parent_keys(survey: Survey, namespace: bytes, blocks: dict[str, dict[str, Any]]) -> None:
    """A record names its parent by a digest, a put by its key: find the keys of the parents that are present."""
    waiting: dict[bytes, list[dict[str, Any]]] = {}
    for block in blocks.values():
        if block["parent"] is not None:
            waiting.setdefault(bytes.fromhex(block["parent"]), []).append(block)
    if not waiting:
        return
    for view, rows in live_rows(survey, namespace):
        keys = view.table.keys
        for row in rows.tolist():
            key = keys[row]
            for block in waiting.get(key_digest(key), ()):
                block["parent_key"] = key.hex()


def print_export(console: Console, facts: dict[str, Any]) -> None:
    """For people."""
    if facts["exported"]:
        console.print(
            f"{count_text(len(facts['exported']), 'block')}, {bytes_text(facts['bytes'])}, checked and written to {facts['file']}",
            soft_wrap=True,
        )
    else:
        console.print("nothing was written: no block could be exported")
    for key in facts["missing"]:
        console.print(f"missing: {key}", style="yellow", soft_wrap=True)
    print_problems(console, facts["problems"])
