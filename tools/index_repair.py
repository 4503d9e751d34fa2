"""Changing an index for ``kvlode fsck --repair``: entries dropped, entries added, or all of it derived anew from the segments.

Only for a store that nobody has open. Each function returns when its changes are durable. The index is derived data: whatever an
interrupt leaves of these changes, the next opening or the next repair goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from ..engine.catalog import Catalog
from ..engine.config import SystemClock
from ..engine.forward_clock import ForwardClock
from ..engine.index import BATCH_ENTRIES_MAX, Index, IndexWriteError
from ..engine.opening import load_superblock
from ..engine.recovery import look_at_segments, recover
from ..engine.segment_writer import index_entry
from ..engine.segments import SegmentTable
from ..engine.stats import Counters
from ..format.layout import SEGMENTS_FOLDER
from ..format.record import RecordHeader
from ..gds.device import Device

OPEN_FILES_MAX = 4
Item = TypeVar("Item")


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """What one ``apply`` takes, until there is no more."""
    rest = iter(items)
    while part := list(islice(rest, BATCH_ENTRIES_MAX)):
        yield part


def drop_entries(index: Index, idents: Iterable[bytes]) -> int:
    """Delete entries by key; returns how many. Raises ``IndexWriteError``."""
    count = 0
    for part in _batches(idents):
        index.apply((), part)
        count += len(part)
    index.sync()
    return count


def add_entries(index: Index, records: Iterable[RecordHeader]) -> int:
    """Put the entries of block records; other records have none. Returns how many. Raises ``IndexWriteError``."""
    entries = ((header.namespace + header.key, entry.pack()) for header in records if (entry := index_entry(header)) is not None)
    count = 0
    for part in _batches(entries):
        index.apply(part)
        count += len(part)
    index.sync()
    return count


def rebuild_index(device: Device, path: str, fresh: Callable[[], Index]) -> tuple[Index, int]:
    """Derive the index from the segments into the empty one that ``fresh`` makes; returns it and its number of entries.

    The segments are only read. What lies behind the first segment without a seal is left to the next opening for writing, as
    the checkpoint says. ``fresh`` is called when the segments have been found readable. Raises ``DeviceError``,
    ``UnsupportedFormat`` or ``IndexWriteError``; the new index has no checkpoint then, and is derived again.
    """
    superblock = load_superblock(device, path)
    segments = SegmentTable(device, path, open_files_max=OPEN_FILES_MAX)
    live, _ = look_at_segments(device, f"{path}/{SEGMENTS_FOLDER}", superblock.store_uuid)
    unsealed = next((number for number, found in enumerate(live) if not found.sealed), len(live))
    counters = Counters()
    index = fresh()
    try:
        catalog = Catalog(index, counters)
        recover(device, segments, catalog, superblock.store_uuid, live[:unsealed], ForwardClock(SystemClock()), counters, rebuild=True)
        if catalog.waiting_changes and not catalog.retry():
            raise IndexWriteError("the new index refused changes", where=path, actual=f"{catalog.waiting_changes} are not in it")
        index.sync()
        return index, sum(1 for _ in index.scan()) - sum(1 for _ in index.scan(bytes(16)))
    except BaseException:
        index.close()
        raise
    finally:
        segments.close_files()
