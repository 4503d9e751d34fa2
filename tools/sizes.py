"""Sizes on the command line, read as ``kvlode.open`` reads them; for ``fsck`` and ``scrub`` too, which use nothing else of the engine."""

from __future__ import annotations

from ..engine.config import parse_bytes
from ..format.errors import InvalidConfig


def parse_size(text: str) -> int | None:
    """Bytes of ``4096``, ``20GiB`` or ``20 GB``; ``None`` for what is no size, or no bytes."""
    try:
        return parse_bytes(text)
    except InvalidConfig:
        return None
