"""The index as a check sees it. The check knows no database: whoever calls it hands in a view (``tools.index_access``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...format.errors import KvlodeError
from ...format.record import RecordHeader


class IndexUnreadable(KvlodeError):
    """The index exists and cannot be read (any more); it is derived data, and can be rebuilt."""


class Row(Protocol):
    """What an index entry says of a block; fields as in the record's header. ``engine.index_entry.IndexEntry`` has them."""

    @property
    def segment_id(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def version_seq(self) -> int: ...
    @property
    def record_seq(self) -> int: ...
    @property
    def expires_at_ns(self) -> int: ...
    @property
    def payload_checksum(self) -> int: ...
    @property
    def raw_length(self) -> int: ...
    @property
    def stored_length(self) -> int: ...


@dataclass(frozen=True, slots=True)
class IndexState:
    """What the index says of itself. ``None`` where it does not say."""

    store_uuid: bytes | None
    checkpoint: tuple[int, int, int] | None
    """Segment id, offset and highest sequence number: the log before this place is in the index."""
    floors: dict[bytes, int]
    """Dropped namespaces: entries with a smaller version_seq are dead."""


class IndexView(Protocol):
    """Read-only. Every method may raise ``IndexUnreadable``."""

    def state(self) -> IndexState: ...

    def get_many(self, idents: Sequence[bytes]) -> Sequence[Row | None]:
        """Entries of keys (namespace digest and block key), in their order."""
        ...

    def scan(self) -> Iterator[tuple[bytes, Row | None]]:
        """All entries of blocks in the order of their keys; ``None`` for a value of an unknown layout."""
        ...

    def close(self) -> None: ...


class IndexSource(Protocol):
    """Where a store's index is, for the check and for its repair."""

    def open_view(self, *, live: bool) -> IndexView | None:
        """``None`` when there is no index. ``live``: beside a running writer. Raises ``IndexUnreadable``."""
        ...

    def drop(self, idents: Iterable[bytes]) -> int:
        """Delete entries, durably; returns how many. Only for a store that nobody has open."""
        ...

    def add(self, records: Iterable[RecordHeader]) -> int:
        """Put entries for these records, durably; returns how many. Only for a store that nobody has open."""
        ...

    def rebuild(self) -> int:
        """Set the index aside and derive a new one from the segments; returns its number of entries. Nobody has the store open."""
        ...
