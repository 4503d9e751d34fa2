"""``inspect index``: what the index says of itself and of blocks. Read-only; nothing in the store is made or changed."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from ...engine.catalog import META_PREFIX, Catalog
from ...engine.index import IndexDamaged
from ...engine.index_entry import IndexEntry
from ...engine.stats import Counters
from ...format.layout import INDEX_FOLDER
from ..index_access import open_to_look
from ..lock_state import has_writer
from ..output import bytes_text, count_text, key_text, make_table, print_facts, print_left_out, print_problems, print_table, time_text
from ..segment_view import codec_name
from ..store_files import StoreFiles

_CACHE_BYTES = 16 << 20


@contextmanager
def opened_index(store: Path) -> Iterator[Catalog | None]:
    """The store's index to read from; ``None`` when there is none. Raises ``IndexDamaged`` or ``DeviceError``."""
    index = open_to_look(store / INDEX_FOLDER, live=bool(has_writer(store)), cache_bytes=_CACHE_BYTES)
    if index is None:
        yield None
        return
    try:
        yield Catalog(index, Counters())
    finally:
        index.close()


def own_facts(catalog: Catalog, store_uuid: bytes) -> dict[str, Any]:
    """Identity, checkpoint and drop floors. Raises ``IndexDamaged``."""
    try:
        identity, checkpoint = catalog.identity(), catalog.checkpoint()
        catalog.load_floors()
    except struct.error as error:
        raise IndexDamaged("the index's own entries cannot be read", expected="values of their layout", actual=str(error)) from error
    place = None
    if checkpoint is not None:
        place = {"segment": f"{checkpoint.segment_id:016x}", "offset": checkpoint.offset, "sequence": checkpoint.sequence}
    return {
        "identity": None if identity is None else identity.hex(),
        "identity_matches": identity == store_uuid,
        "checkpoint": place,
        "floors": {digest.hex(): floor for digest, floor in catalog.floors.items()},
        "size_bytes": catalog.index.size_bytes(),
    }


def index_facts(files: StoreFiles, prefix: bytes, limit: int) -> dict[str, Any]:
    """The index, and its first ``limit`` entries whose ident (namespace digest, then key) begins with ``prefix``."""
    facts: dict[str, Any] = {"path": str(files.path / INDEX_FOLDER), "present": False, "prefix": prefix.hex()}
    rows: list[dict[str, Any]] = []
    by_namespace: Counter[str] = Counter()
    problems: list[str] = list(files.problems)
    entries, unreadable = 0, 0
    try:
        with opened_index(files.path) as catalog:
            if catalog is not None:
                facts |= {"present": True} | own_facts(catalog, files.store_uuid)
                if not facts["identity_matches"]:
                    problems.append(
                        f"the index is of store {facts['identity']}, this is {files.store_uuid.hex()}; the next open derives it again"
                    )
                for ident, value in catalog.index.scan(prefix):
                    if ident.startswith(META_PREFIX):
                        continue
                    entries += 1
                    by_namespace[ident[:16].hex()] += 1
                    if len(rows) < limit:
                        rows.append(_row(ident, value))
                        unreadable += "problem" in rows[-1]
    except IndexDamaged as error:
        problems.append(str(error))
    if unreadable:
        problems.append(f"{count_text(unreadable, 'entry', 'entries')} of an unknown layout; the next open derives the index again")
    namespaces = dict(by_namespace.most_common(limit))
    counts = {"entries": entries, "namespaces": namespaces, "rows": rows, "rows_left_out": entries - len(rows)}
    return facts | counts | {"problems": problems}


def _row(ident: bytes, value: bytes) -> dict[str, Any]:
    names = {"namespace": ident[:16].hex(), "key": ident[16:].hex()}
    try:
        entry = IndexEntry.unpack(value)
    except IndexDamaged as error:
        return names | {"problem": str(error)}
    values = entry._asdict()
    return names | values | {"segment": f"{entry.segment_id:016x}", "codec": codec_name(entry.codec)}


def print_index(console: Console, facts: dict[str, Any]) -> None:
    """For people."""
    if not facts["present"]:
        text = "cannot be read" if facts["problems"] else "there is none; the next open derives it from the segments"
        print_facts(console, [("index", facts["path"]), ("state", text)])
        print_problems(console, facts["problems"])
        return
    checkpoint = facts.get("checkpoint")
    place = (
        "none"
        if checkpoint is None
        else f"segment {checkpoint['segment']} offset {checkpoint['offset']}, sequence {checkpoint['sequence']}"
    )
    floors = ", ".join(f"{digest[:12]} below {floor}" for digest, floor in facts["floors"].items())
    spaces = ", ".join(f"{digest[:12]} {count:,}" for digest, count in facts["namespaces"].items())
    print_facts(
        console,
        [
            ("index", facts["path"]),
            ("size", bytes_text(facts["size_bytes"])),
            ("identity", f"{facts['identity']} ({'this store' if facts['identity_matches'] else 'ANOTHER store'})"),
            ("checkpoint", place),
            ("drop floors", floors or "none"),
            ("entries", f"{facts['entries']:,}" + (f" that begin with {facts['prefix']}" if facts["prefix"] else "")),
            ("by namespace", spaces or "none"),
        ],
    )
    columns = ["namespace", "key", "segment", "offset", "raw", "depth"]
    if console.width >= 120:
        columns += ["stored", "codec", "version", "written", "expires"]
    table = make_table(*columns, right=("segment", "offset", "raw", "stored", "depth", "version"))
    for row in facts["rows"]:
        if "problem" in row:
            table.add_row(row["namespace"][:12], key_text(bytes.fromhex(row["key"]), 16), "unreadable")
            continue
        cells = {
            "namespace": row["namespace"][:12],
            "key": key_text(bytes.fromhex(row["key"]), 24 if console.width >= 120 else 16),
            "segment": row["segment"].lstrip("0").rjust(1, "0"),
            "offset": str(row["offset"]),
            "raw": bytes_text(row["raw_length"]),
            "stored": bytes_text(row["stored_length"]),
            "version": f"{row['version_seq'] >> 40}:{row['version_seq'] & (1 << 40) - 1}",
            "written": time_text(row["written_at_ns"]),
            "expires": time_text(row["expires_at_ns"]),
        }
        table.add_row(*(cells.get(name, str(row.get(name))) for name in columns))
    print_table(console, table)
    print_left_out(console, facts["rows_left_out"], "entries")
    print_problems(console, facts["problems"])
