"""Purging a store that lives in memory (``memory_store``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .contract import PurgeReport, Refusal
from .jobs import refused
from .purge import checked_tag as checked_tag

if TYPE_CHECKING:
    from .memory_store import MemoryStore


def purge_memory(store: MemoryStore, tag: bytes, *, physical: bool) -> PurgeReport:
    """See ``contract.Store.purge``. ``tag`` is a digest."""
    with store.lock:
        found = {ident: block for ident, block in store.blocks.items() if block.tag == tag}
        for ident in found:
            store.remove(ident, refused(Refusal.DELETED))
        store.counters.add_many({"purges": 1, "purged_blocks": len(found)})
    size_bytes = 0
    for block in found.values() if physical else ():
        block.wipe()
        size_bytes += block.data.nbytes
    return PurgeReport(tag, physical, len(found), len(found) if physical else 0, size_bytes, 0, True)
