"""``kvlode stat``: what a store holds, from its files alone."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..format.errors import KvlodeError
from ..format.layout import FORMAT_VERSION, RecordType, segment_name
from .output import bytes_text, print_json, time_text
from .store_files import SegmentView, StoreFiles, type_name


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
    read_version: int
    created_at_ns: int
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
        stat = StoreStat(str(path), block.store_uuid.hex(), FORMAT_VERSION, block.read_version, block.created_at_ns)
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
    for row in segment.rows:
        types[type_name(row.record_type)] += 1
        if row.record_type == RecordType.SEAL:
            continue
        namespace = namespaces.setdefault(row.namespace, NamespaceStat(row.namespace.hex()))
        if row.record_type == RecordType.NAMESPACE and not namespace.model:
            try:
                descriptor = files.namespace(segment.segment_id, row)
            except (KvlodeError, OSError) as error:
                stat.problems.append(f"{segment_name(segment.segment_id)}: {error}")
                continue
            namespace.model, namespace.dtype = descriptor.model, descriptor.dtype
        elif row.record_type == RecordType.BLOCK:
            namespace.records += 1
            namespace.raw_bytes += row.raw_length
            namespace.stored_bytes += row.stored_length
            times = [time for time in (stat.oldest_written_at_ns, row.written_at_ns) if time is not None]
            stat.oldest_written_at_ns = min(times)
            stat.newest_written_at_ns = max(stat.newest_written_at_ns or 0, row.written_at_ns)


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
    """Print it; the exit code is 1 when something is damaged."""
    stat = stat_store(path)
    if as_json:
        print_json(asdict(stat))
    else:
        _print(stat)
    return 1 if stat.problems else 0


def _print(stat: StoreStat) -> None:
    console = Console()
    facts = Table(show_header=False, title=f"store {stat.path}", title_justify="left")
    for name, value in (
        ("uuid", stat.store_uuid),
        ("format version", f"{stat.read_version} (this kvlode reads up to {stat.format_version})"),
        ("created", time_text(stat.created_at_ns)),
        ("segments", f"{stat.segments}, {stat.segments_sealed} sealed, {bytes_text(stat.segment_bytes)}"),
        ("index", bytes_text(stat.index_bytes)),
        ("everything below the folder", bytes_text(stat.allocated_bytes)),
        ("records", ", ".join(f"{count:,} {name}" for name, count in stat.records.items()) or "none"),
        ("blocks, raw and stored", f"{bytes_text(stat.raw_bytes)} in {bytes_text(stat.stored_bytes)}"),
        ("compression ratio", f"{stat.compression_ratio:.3f}" if stat.compression_ratio else "-"),
        ("written from", time_text(stat.oldest_written_at_ns)),
        ("written to", time_text(stat.newest_written_at_ns)),
    ):
        facts.add_row(name, value)
    console.print(facts)
    table = Table("namespace", "model", "dtype", "blocks", "raw", "stored")
    for space in stat.namespaces:
        table.add_row(
            space.digest[:12], space.model, space.dtype, f"{space.records:,}", bytes_text(space.raw_bytes), bytes_text(space.stored_bytes)
        )
    console.print(table)
    for problem in stat.problems:
        console.print(f"[red]damaged:[/] {problem}", highlight=False)
