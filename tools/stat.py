"""``kvlode stat``: what a store holds, from its files alone."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ..format.errors import KvlodeError
from ..format.layout import FORMAT_VERSION, RecordType, segment_name
from .exit_codes import EXIT_DAMAGE, EXIT_FINE
from .output import bytes_text, make_console, make_table, print_facts, print_json, print_problems, print_table, printable, time_text
from .segment_view import SegmentView, type_name
from .store_files import StoreFiles


@dataclass(slots=True)
class NamespaceStat:
    """Blocks of one namespace that lie in the log, superseded and deleted ones included."""

    digest: str
    model: str = ""
    dtype: str = ""
    records: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0


@dataclass(slots=True)
class StoreStat:
    """The answer of ``kvlode stat --json``."""

    path: str
    store_uuid: str
    format_version: int
    read_version: int | None
    created_at_ns: int | None
    segments: int = 0
    segments_sealed: int = 0
    segment_bytes: int = 0
    index_bytes: int = 0
    allocated_bytes: int = 0
    records: dict[str, int] = field(default_factory=dict)
    raw_bytes: int = 0
    stored_bytes: int = 0
    compression_ratio: float | None = None
    oldest_written_at_ns: int | None = None
    newest_written_at_ns: int | None = None
    namespaces: list[NamespaceStat] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def stat_store(path: Path) -> StoreStat:
    """Read the superblock, the seals and the unsealed segments. Raises ``KvlodeError`` when this is no store."""
    with StoreFiles(path) as files:
        block = files.superblock
        version, created_at_ns = (None, None) if block is None else (block.read_version, block.created_at_ns)
        stat = StoreStat(str(path), files.store_uuid.hex(), FORMAT_VERSION, version, created_at_ns, problems=list(files.problems))
        namespaces: dict[bytes, NamespaceStat] = {}
        types: Counter[str] = Counter()
        for segment in files.segments():
            _add_segment(stat, types, namespaces, files, segment)
        stat.records = dict(types)
        stat.namespaces = sorted(namespaces.values(), key=lambda namespace: -namespace.stored_bytes)
    stat.raw_bytes = sum(namespace.raw_bytes for namespace in stat.namespaces)
    stat.stored_bytes = sum(namespace.stored_bytes for namespace in stat.namespaces)
    stat.compression_ratio = round(stat.raw_bytes / stat.stored_bytes, 4) if stat.stored_bytes else None
    stat.index_bytes = _allocated(path / "index")
    stat.allocated_bytes = _allocated(path)
    return stat


def _add_segment(
    stat: StoreStat, types: Counter[str], namespaces: dict[bytes, NamespaceStat], files: StoreFiles, segment: SegmentView
) -> None:
    stat.segments += 1
    stat.segments_sealed += segment.sealed
    stat.segment_bytes += segment.allocated_bytes
    stat.problems += segment.problems
    table = segment.table
    digests = table.namespace.tolist()
    for row, kind in enumerate(table.type.tolist()):
        types[type_name(kind)] += 1
        namespace = namespaces.setdefault(digests[row], NamespaceStat(digests[row].hex()))
        if kind == RecordType.NAMESPACE and not namespace.model:
            try:
                descriptor = files.namespace(segment.segment_id, table, row)
            except (KvlodeError, OSError) as error:
                stat.problems.append(f"{segment_name(segment.segment_id)}: {error}")
                continue
            namespace.model, namespace.dtype = descriptor.model, descriptor.dtype
        elif kind == RecordType.BLOCK:
            namespace.records += 1
            namespace.raw_bytes += int(table.raw_length[row])
            namespace.stored_bytes += int(table.stored_length[row])
    written = table.written_at_ns[np.flatnonzero(table.type == RecordType.BLOCK)].tolist()
    if written:
        stat.oldest_written_at_ns = min([*written, *([stat.oldest_written_at_ns] if stat.oldest_written_at_ns else [])])
        stat.newest_written_at_ns = max(*written, stat.newest_written_at_ns or 0)


def _allocated(folder: Path) -> int:
    """Blocks that the file system has given to everything below a folder, in bytes."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except FileNotFoundError:  # a running writer removed it meanwhile
                continue
    return total


def show_stat(path: Path, *, as_json: bool) -> int:
    """Print it; the exit code tells of damage."""
    stat = stat_store(path)
    if as_json:
        print_json(asdict(stat))
    else:
        _print(stat)
    return EXIT_DAMAGE if stat.problems else EXIT_FINE


def _print(stat: StoreStat) -> None:
    console = make_console()
    version = "unknown" if stat.read_version is None else f"{stat.read_version} (this kvlode reads up to {stat.format_version})"
    facts = [
        ("store", stat.path),
        ("uuid", stat.store_uuid),
        ("format version", version),
        ("created", time_text(stat.created_at_ns)),
        ("segments", f"{stat.segments}, {stat.segments_sealed} sealed, {bytes_text(stat.segment_bytes)}"),
        ("index", bytes_text(stat.index_bytes)),
        ("everything below the folder", bytes_text(stat.allocated_bytes)),
        ("records", ", ".join(f"{count:,} {name}" for name, count in stat.records.items()) or "none"),
        ("blocks, raw and stored", f"{bytes_text(stat.raw_bytes)} in {bytes_text(stat.stored_bytes)}"),
        ("compression ratio", f"{stat.compression_ratio:.3f}" if stat.compression_ratio else "-"),
        ("written from", time_text(stat.oldest_written_at_ns)),
        ("written to", time_text(stat.newest_written_at_ns)),
    ]
    print_facts(console, facts)
    console.print()
    table = make_table("namespace", "model", "dtype", "blocks", "raw", "stored", right=("blocks", "raw", "stored"))
    for space in stat.namespaces:
        sizes = (f"{space.records:,}", bytes_text(space.raw_bytes), bytes_text(space.stored_bytes))
        table.add_row(space.digest[:12], printable(space.model), space.dtype, *sizes)
    print_table(console, table)
    print_problems(console, stat.problems)
