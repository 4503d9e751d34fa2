"""What is known of one block without reading its payload."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..format.errors import DeviceError, FormatError
from .contract import BlockInfo
from .reinsertion import load_header

if TYPE_CHECKING:
    from .core import Core

logger = logging.getLogger("kvlode")


def block_info(core: Core, ident: bytes) -> BlockInfo | None:
    """Facts about a block, from the buffer or its header page."""
    now_ns = core.clock.now_ns()
    held = core.buffer.acquire(ident)
    if held is not None:
        try:
            if held.expires_at_ns and now_ns >= held.expires_at_ns:
                return None
            durable = core.buffer.durable(held)
            expires = held.expires_at_ns or None
            size = held.size_bytes
            return BlockInfo(size, size, held.written_at_ns, expires, max(held.depth, 0), held.tag, held.meta, durable)
        finally:
            core.buffer.release()
    entry = None if core.buffer.hides(ident) else core.find([ident])[0]
    if entry is None or (entry.expires_at_ns and now_ns >= entry.expires_at_ns):
        return None
    try:
        with core.segments.reading(entry.segment_id) as file:
            if file is None:
                return None
            header = load_header(file, core.superblock.store_uuid, entry.segment_id, entry.offset)
    except (FormatError, DeviceError) as error:
        logger.warning("%s", error)
        return None
    expires = header.expires_at_ns or None
    lengths = header.raw_length, header.stored_length
    return BlockInfo(*lengths, header.written_at_ns, expires, header.depth, header.tag, header.meta, durable=True)
