"""``inspect import``: blocks of an export into a store, through the store's public API. The only view that writes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console

from ... import open as open_store
from ...engine.contract import BlockSpace, PutState
from ...format.checksum import xxh3_64
from ...format.errors import InvalidConfig
from ...format.namespace import Namespace
from ..output import bytes_text, count_text, print_problems
from ..paths import naming, require_file
from ..store_files import StoreFiles
from .export import FORMAT_NAME
from .safetensors_file import Tensor, read_header

_BUFFER_BYTES_MIN = 64 << 20
_PUT_TIMEOUT_S = 60.0


def import_facts(path: Path, source: Path, capacity: str) -> dict[str, Any]:
    """Put the blocks of ``source`` into the store at ``path``, parents first; each is compared with its raw checksum before.

    ``capacity`` must be what the engine opens the store with: a smaller one would free segments. Raises ``StoreLocked`` when
    somebody writes to the store, ``InvalidConfig`` for a file that is no export.
    """
    require_file(source, "the export")
    with StoreFiles(path) as files:
        if files.superblock is None:
            raise InvalidConfig(
                "the store's superblock is damaged", where=path, expected="a store that can be opened", actual=files.problems[0]
            )
    with naming("open for read", source):
        opened = source.open("rb")
    with opened as file:
        metadata, tensors, start = read_header(file, source)
        descriptor, blocks = _read_metadata(metadata, source)
        facts: dict[str, Any] = {"path": str(path), "namespace": descriptor.digest.hex(), "bytes": 0}
        facts |= {"imported": [], "present": [], "expired": [], "refused": [], "problems": [], "notes": []}
        largest = max((tensor.end - tensor.start for tensor in tensors), default=0)
        buffer_bytes = max(_BUFFER_BYTES_MIN, 2 * max(largest, descriptor.block_bytes_max))
        with open_store(path, capacity=capacity, buffer=buffer_bytes, gds="off", put_timeout_s=_PUT_TIMEOUT_S) as store:
            space = store.namespace(descriptor)
            for tensor in sorted(tensors, key=lambda tensor: (_depth(blocks, tensor), tensor.name)):
                _import_one(space, file, start, tensor, blocks.get(tensor.name), facts)
            facts["flushed"] = store.flush()
    if any(block.get("tag") for block in blocks.values()):
        facts["notes"].append("tags are not restored: an export has only their digests")
    return facts


def _read_metadata(metadata: dict[str, str], source: Path) -> tuple[Namespace, dict[str, dict[str, Any]]]:
    if metadata.get("format") != FORMAT_NAME:
        raise InvalidConfig(
            "this safetensors file is no export of blocks",
            where=source,
            expected=f"metadata with format {FORMAT_NAME}",
            actual=metadata.get("format"),
        )
    descriptor = Namespace.parse(metadata.get("namespace", "").encode(), where=source)
    try:
        blocks = json.loads(metadata.get("blocks", ""))
    except (ValueError, RecursionError) as error:
        raise InvalidConfig("the metadata of the blocks cannot be read", where=source, expected="JSON", actual=str(error)[:200]) from None
    if not isinstance(blocks, dict) or not all(isinstance(block, dict) for block in blocks.values()):
        raise InvalidConfig(
            "the metadata of the blocks cannot be read", where=source, expected="an object a block", actual="something else"
        )
    return descriptor, blocks


def _depth(blocks: dict[str, dict[str, Any]], tensor: Tensor) -> int:
    depth = blocks.get(tensor.name, {}).get("depth")
    return depth if isinstance(depth, int) else 0


def _import_one(space: BlockSpace, file: BinaryIO, start: int, tensor: Tensor, block: dict[str, Any] | None, facts: dict[str, Any]) -> None:
    try:
        if block is None:
            raise ValueError("the metadata does not know it")
        key, meta = bytes.fromhex(block["key"]), bytes.fromhex(block["meta"])
        parent = None if block["parent_key"] is None else bytes.fromhex(block["parent_key"])
        checksum, expires_at_ns = int(block["raw_checksum"], 16), int(block["expires_at_ns"])
    except (KeyError, TypeError, ValueError) as error:
        facts["problems"].append(f"{tensor.name}: its metadata cannot be read: {error}")
        return
    file.seek(start + tensor.start)
    data = file.read(tensor.end - tensor.start)
    if (actual := xxh3_64(data)) != checksum:
        facts["problems"].append(f"{tensor.name}: raw checksum {checksum:016x} expected, {actual:016x} found; not imported")
        return
    ttl = (expires_at_ns - time.time_ns()) / 1e9 if expires_at_ns else None
    if ttl is not None and ttl <= 0:
        facts["expired"].append(tensor.name)
        return
    status = space.put(key, data, parent=parent, ttl=ttl, meta=meta)
    if status.state is PutState.REFUSED:
        facts["refused"].append({"key": tensor.name, "reason": str(status.reason)})
    elif status.state is PutState.EXISTS:
        facts["present"].append(tensor.name)
    else:
        facts["imported"].append(tensor.name)
        facts["bytes"] += len(data)


def print_import(console: Console, facts: dict[str, Any]) -> None:
    """For people."""
    console.print(
        f"{count_text(len(facts['imported']), 'block')}, {bytes_text(facts['bytes'])}, checked and put into {facts['path']}", soft_wrap=True
    )
    for name, text in (("present", "were present already"), ("expired", "had expired and were left out")):
        if facts[name]:
            console.print(f"{len(facts[name]):,} {text}")
    for refused in facts["refused"]:
        console.print(f"refused: {refused['key']}: {refused['reason']}", style="yellow", soft_wrap=True)
    if not facts["flushed"]:
        console.print("not everything became durable; see the refused blocks, or the log", style="red")
    print_problems(console, facts["problems"], facts["notes"])
