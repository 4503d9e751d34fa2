"""Which blocks are deleted: the tombstones and namespace drops of a log, gathered while its segments are read."""

from __future__ import annotations

import numpy as np

from ...format.layout import RecordType
from ...format.seal import SealTable


class Kills:
    """Highest ``version_seq`` of the deletes of each key and namespace. Memory grows with the deletes that a log still holds."""

    def __init__(self) -> None:
        self._tombstones: dict[bytes, int] = {}
        self._drops: dict[bytes, int] = {}

    def add(self, table: SealTable) -> None:
        """Learn the deletes of one segment. Adding a segment twice changes nothing."""
        deletes = (table.type == RecordType.TOMBSTONE) | (table.type == RecordType.NAMESPACE_DROP)
        for row in np.flatnonzero(deletes).tolist():
            namespace, version_seq = bytes(table.namespace[row]), int(table.version_seq[row])
            if table.type[row] == RecordType.TOMBSTONE:
                ident = namespace + table.key(row)
                self._tombstones[ident] = max(version_seq, self._tombstones.get(ident, 0))
            else:
                self._drops[namespace] = max(version_seq, self._drops.get(namespace, 0))

    def killed(self, ident: bytes, version_seq: int, until_seq: int | None = None) -> bool:
        """Whether a block of this key and version is deleted; with ``until_seq`` only by deletes up to that sequence number."""
        kills = (self._tombstones.get(ident, 0), self._drops.get(ident[:16], 0))
        return any(version_seq < seq and (until_seq is None or seq <= until_seq) for seq in kills)
