"""Which blocks are deleted: the tombstones and namespace drops of a log, gathered while its segments are read."""

from __future__ import annotations

import numpy as np

from ...format.layout import RecordType
from ...format.seal import SealTable

_NEVER = (0, 0)


class Kills:
    """The latest deletion of each key and namespace. Memory grows with the deletes that a log still holds."""

    def __init__(self) -> None:
        self._tombstones: dict[bytes, tuple[int, int]] = {}
        """Key (with its namespace) to ``version_seq`` and ``record_seq``."""
        self._drops: dict[bytes, tuple[int, int]] = {}

    def add(self, table: SealTable) -> None:
        """Learn the deletes of one segment. Adding a segment twice changes nothing."""
        deletes = (table.type == RecordType.TOMBSTONE) | (table.type == RecordType.NAMESPACE_DROP)
        for row in np.flatnonzero(deletes).tolist():
            namespace, sequences = bytes(table.namespace[row]), (int(table.version_seq[row]), int(table.record_seq[row]))
            if table.type[row] == RecordType.TOMBSTONE:
                ident = namespace + table.key(row)
                self._tombstones[ident] = max(sequences, self._tombstones.get(ident, _NEVER))
            else:
                self._drops[namespace] = max(sequences, self._drops.get(namespace, _NEVER))

    def killed(self, ident: bytes, version_seq: int, until_seq: int | None = None) -> bool:
        """Whether a block of this key and version is deleted; with ``until_seq`` only by records of the log up to that ``record_seq``."""
        kills = (self._tombstones.get(ident, _NEVER), self._drops.get(ident[:16], _NEVER))
        return any(version_seq < seq and (until_seq is None or record_seq <= until_seq) for seq, record_seq in kills)
