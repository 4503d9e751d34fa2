"""The sizes of blocks that are measured beside the main one, from what a small model has to what a large one has."""

from __future__ import annotations

from .setting import Setting
from .workload import MIB, Blocks

KIB = 1 << 10
SIZES = (64 * KIB, 256 * KIB, MIB, 16 * MIB, 128 * MIB)
QUICK_SIZES = (64 * KIB, MIB)


def block_sizes(setting: Setting) -> tuple[int, ...]:
    """In bytes, ascending."""
    return QUICK_SIZES if setting.quick else SIZES


def blocks_of_size(setting: Setting, block_bytes: int) -> Blocks:
    """Incompressible blocks for one round."""
    return Blocks(max(2, setting.size_bytes // block_bytes), block_bytes)


def size_bytes_max(block_bytes: int) -> int:
    """What a round of such blocks takes at most: small ones cost more time a byte."""
    return 256 * MIB if block_bytes < MIB else 1024 * MIB


def name_of_size(block_bytes: int) -> str:
    """``64KiB``, ``16MiB``: the last part of an item's name."""
    return f"{block_bytes // MIB}MiB" if block_bytes >= MIB else f"{block_bytes // KIB}KiB"
