"""The index as the engine uses it: entries of keys, drop floors, the checkpoint, and changes that wait out an index error.

What has changed since the last sync is remembered: after a failed one nothing is known of it, and it is applied again.

Lookups may come from any thread; changes come from the commit thread alone, which makes every "if it still points
there" a plain comparison.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..format.errors import KvlodeError
from .events import EventKind, EventLog
from .index import Index, IndexDamaged, IndexWriteError
from .index_entry import IndexEntry, expires_and_version, unexpired
from .stats import Counters

META_PREFIX = bytes(16)
_CHECKPOINT_KEY = META_PREFIX + b"checkpoint"
_IDENTITY_KEY = META_PREFIX + b"store"
_FLOOR_PREFIX = META_PREFIX + b"floor/"
_CHECKPOINT = struct.Struct("<QQQ")
_FLOOR = struct.Struct("<Q")
BATCH_ENTRIES_MAX = 500
HIDDEN_MAX = 4096
UNSYNCED_CHANGES_MAX = 100_000
"""Changes that are kept in memory in case the next sync of the index fails; about 30 MB."""

logger = logging.getLogger("kvlode")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything in the log before this place is in the index; ``sequence`` is the highest sequence number seen there."""

    segment_id: int
    offset: int
    sequence: int


class Catalog:
    """See the module."""

    def __init__(self, index: Index, counters: Counters) -> None:
        self.index = index
        self._counters = counters
        self._delta: dict[bytes, bytes | None] = {}
        self._unsynced: dict[bytes, bytes | None] = {}
        self._sync_failed = False
        self._openings = 0
        self._floors: dict[bytes, int] = {}
        self._hiding = threading.Lock()
        self._hidden: dict[bytes, tuple[int, int]] = {}
        """Blocks that were found useless, and where (segment id, offset): absent at once, and on their way out of the index.
        Replaced, never changed."""
        self.events = EventLog()

    # --- lookups ----------------------------------------------------------------------------------------------

    def values(self, idents: Sequence[bytes]) -> list[bytes | None]:
        """Packed entries, from the waiting changes first and else from the index; those that are hidden are absent."""
        hidden = self._hidden  # before the index is read: what leaves the one has left the other by then
        found = self._indexed(idents)
        if hidden:
            found = [None if self._lies_at(hidden.get(ident), value) else value for ident, value in zip(idents, found, strict=True)]
        return found

    def hide(self, ident: bytes, segment_id: int, offset: int) -> None:
        """A block is absent from now on if it still lies there, until ``drop_if_at`` has taken it out of the index. Any thread."""
        with self._hiding:
            hidden = {**self._hidden, ident: (segment_id, offset)}
            if len(hidden) > HIDDEN_MAX:  # a follower, whose writer takes them out: by now it has
                del hidden[next(iter(hidden))]
            self._hidden = hidden

    def _lies_at(self, place: tuple[int, int] | None, value: bytes | None) -> bool:
        entry = None if place is None else self._unpack(value)
        return entry is not None and (entry.segment_id, entry.offset) == place

    def _indexed(self, idents: Sequence[bytes]) -> list[bytes | None]:
        while True:
            openings, delta = self._openings, self._delta  # before the index is read: a change may move from one to the other meanwhile
            found = self.index.get_many(idents)
            if openings == self._openings:
                break
        if delta:
            found = [delta.get(ident, value) for ident, value in zip(idents, found, strict=True)]
        return found

    def find(self, idents: Sequence[bytes]) -> list[IndexEntry | None]:
        """Entries of keys; those of a dropped namespace (below its floor) are absent."""
        entries = [self._unpack(value) for value in self.values(idents)]
        if self._floors:
            pairs = zip(idents, entries, strict=True)
            entries = [e if e is not None and e.version_seq >= self._floors.get(ident[:16], 0) else None for ident, e in pairs]
        return entries

    def _unpack(self, value: bytes | None) -> IndexEntry | None:
        if value is None:
            return None
        try:
            return IndexEntry.unpack(value)
        except IndexDamaged:
            self._counters.add("index_entries_unreadable")
            return None

    def live(self, idents: Sequence[bytes], now_ns: int) -> list[bool]:
        """Whether each key is present and not expired."""
        values = self.values(idents)
        if not self._floors:
            return unexpired(values, now_ns)
        floors = self._floors
        return [
            live and expires_and_version(value or b"")[1] >= floors.get(ident[:16], 0)
            for ident, value, live in zip(idents, values, unexpired(values, now_ns), strict=True)
        ]

    def raise_floor(self, namespace: bytes, floor_seq: int) -> None:
        """From now on every entry of the namespace with a smaller ``version_seq`` counts as absent."""
        self._floors = {**self._floors, namespace: max(floor_seq, self._floors.get(namespace, 0))}

    def lower_floor(self, namespace: bytes, floor_seq: int) -> bool:
        """The entries below ``floor_seq`` are gone: forget the floor, unless a later drop has raised it. Commit thread."""
        if self._floors.get(namespace) != floor_seq:
            return False
        self.change(dict([self.floor_change(namespace, None)]))
        self._floors = {digest: seq for digest, seq in self._floors.items() if digest != namespace}
        return True

    def load_floors(self) -> None:
        """Put drops in force that an earlier process did not finish working off. Raises ``IndexDamaged``."""
        found: dict[bytes, bytes | None] = dict(self.index.scan(_FLOOR_PREFIX))
        found |= {key: value for key, value in self._delta.items() if key.startswith(_FLOOR_PREFIX)}  # what the index has refused so far
        drops = {key[len(_FLOOR_PREFIX) :]: value for key, value in found.items() if value is not None}
        self._floors = {namespace: _unpacked(_FLOOR, value, "drop floor")[0] for namespace, value in drops.items()}

    @property
    def floors(self) -> dict[bytes, int]:
        """Dropped namespaces whose entries are not all gone yet, and the sequence number below which they are dead."""
        return dict(self._floors)

    # --- changes (commit thread) --------------------------------------------------------------------------------

    @property
    def opening(self) -> int | None:
        """Counts the openings of the index; ``None`` while it tells nothing, as it could not be opened again."""
        return self._openings if self.index.readable() else None

    @property
    def waiting_changes(self) -> int:
        """Changes that the index has refused so far; they are served from memory."""
        return len(self._delta)

    def change(self, changes: dict[bytes, bytes | None]) -> bool:
        """Put (bytes) and delete (``None``) entries. False when the index refused: the changes wait in memory until ``retry``."""
        if self._delta or self._sync_failed:
            # later changes go behind earlier ones, keys changed again included: a checkpoint must not get ahead of what it covers
            self._delta = {**{key: value for key, value in self._delta.items() if key not in changes}, **changes}
            return self.retry()
        try:
            self._apply(changes)
        except IndexWriteError:
            self._counters.add("index_write_errors")
            self._delta = dict(changes)
            return False
        return len(self._unsynced) < UNSYNCED_CHANGES_MAX or self.sync()

    def retry(self) -> bool:
        """Try the waiting changes again; True when none is left."""
        try:
            if self._sync_failed:
                self._openings += 1
                self.index.open_anew()
                self._sync_failed = False
                self._counters.add("index_reopenings")
            self._apply(self._delta)
        except (
            KvlodeError,
            OSError,
        ) as error:  # damage too: the log has everything for the index that the next opening derives
            self._counters.add("index_write_errors")
            logger.warning("the index takes no changes: %s", error)
            return False
        self._delta = {}
        return True

    def sync(self) -> bool:
        """Make everything durable in the index. False when it refuses: this costs a longer recovery, not data.

        A sync that has failed is not tried again, as nothing is known of what was not durable before: the index is opened anew,
        and all that has changed since the last good sync waits in memory until it has been applied again.
        """
        if (self._delta or self._sync_failed) and not self.retry():
            return False
        try:
            self.index.sync()
        except (IndexWriteError, OSError) as error:
            self._counters.add("index_write_errors")
            logger.warning("the index could not be synced: %s. The next open scans more of the log.", error)
            self._delta, self._sync_failed = self._unsynced, True
            self._unsynced = {}
            return False
        self._unsynced = {}
        return True

    def _apply(self, changes: dict[bytes, bytes | None]) -> None:
        items = list(changes.items())
        for start in range(0, len(items), BATCH_ENTRIES_MAX):
            batch = items[start : start + BATCH_ENTRIES_MAX]
            self.index.apply([(k, v) for k, v in batch if v is not None], [k for k, v in batch if v is None])
            for key, value in batch:
                self._unsynced.pop(key, None)  # later changes go behind earlier ones here too
                self._unsynced[key] = value

    def drop_if_at(self, places: Iterable[tuple[bytes, int, int]]) -> list[bytes]:
        """Delete the entries that still point to (segment id, offset); returns which did."""
        wanted = list(places)
        dropped: list[bytes] = []
        for start in range(0, len(wanted), BATCH_ENTRIES_MAX):
            part = wanted[start : start + BATCH_ENTRIES_MAX]
            changes: dict[bytes, bytes | None] = {}
            for (ident, segment_id, offset), value in zip(part, self._indexed([p[0] for p in part]), strict=True):
                if self._lies_at((segment_id, offset), value):
                    changes[ident] = None
            if changes:
                self.change(changes)
            dropped += changes
            if self._hidden:
                places = set(part)
                with self._hiding:
                    self._hidden = {ident: place for ident, place in self._hidden.items() if (ident, *place) not in places}
        self.events.add(EventKind.REMOVED, dropped)
        return dropped

    def purge(self, namespace: bytes, floor_seq: int, start: bytes | None, limit: int) -> bytes | None:
        """Delete up to ``limit`` entries of a dropped namespace; returns where to go on, ``None`` at the end."""
        found: dict[bytes, bytes | None] = {}
        resume = None
        for count, (ident, value) in enumerate(self.index.scan(namespace, start)):
            if count == limit:
                resume = ident
                break
            found[ident] = value
        if resume is None:  # what waits in memory is not in the index yet, and newer than what is
            found |= {ident: value for ident, value in self._delta.items() if ident[:16] == namespace}
        changes: dict[bytes, bytes | None] = {}
        for ident, indexed in found.items():
            current = self._delta.get(ident, indexed)
            if current is not None and expires_and_version(current)[1] < floor_seq:
                changes[ident] = None
        if changes:
            self.change(changes)
        return resume

    # --- the store's own entries -----------------------------------------------------------------------------------

    def _read_meta(self, key: bytes) -> bytes | None:
        return self.values([key])[0]

    def identity(self) -> bytes | None:
        """UUID of the store that this index was built for."""
        return self._read_meta(_IDENTITY_KEY)

    def checkpoint(self) -> Checkpoint | None:
        """How far the log is in the index, ``None`` for a new one. Raises ``IndexDamaged``."""
        value = self._read_meta(_CHECKPOINT_KEY)
        return None if value is None else Checkpoint(*_unpacked(_CHECKPOINT, value, "checkpoint"))

    @staticmethod
    def checkpoint_change(checkpoint: Checkpoint) -> tuple[bytes, bytes]:
        return _CHECKPOINT_KEY, _CHECKPOINT.pack(checkpoint.segment_id, checkpoint.offset, checkpoint.sequence)

    @staticmethod
    def identity_change(store_uuid: bytes) -> tuple[bytes, bytes]:
        return _IDENTITY_KEY, store_uuid

    @staticmethod
    def floor_change(namespace: bytes, floor_seq: int | None) -> tuple[bytes, bytes | None]:
        return _FLOOR_PREFIX + namespace, None if floor_seq is None else _FLOOR.pack(floor_seq)


def _unpacked(layout: struct.Struct, value: bytes, what: str) -> tuple[int, ...]:
    """The integers of one of the store's own entries. Raises ``IndexDamaged`` for a value of another size."""
    if len(value) != layout.size:
        raise IndexDamaged(
            f"index {what} of an unknown layout",
            expected=f"{layout.size} bytes",
            actual=f"{len(value)} bytes",
            action="Rebuild the index from the segments.",
        )
    return layout.unpack(value)
