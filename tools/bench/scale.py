"""How cost grows: with keys, threads and namespaces, with how full the store is, and with the size of its buffer.

These items have no bars and no bare counterpart: what they show is whether a figure stays the same along its row. They are measured only
when they are asked for by name.
"""

from __future__ import annotations

from typing import Protocol

from . import scale_buffer, scale_capacity, scale_keys, scale_namespaces, scale_threads
from .figures import Item
from .setting import Setting


class _Part(Protocol):
    """One of the modules."""

    def measure(self, setting: Setting) -> list[Item]: ...

    def needed_bytes(self, setting: Setting) -> int: ...


PARTS: dict[str, _Part] = {
    "scale_keys": scale_keys,
    "scale_threads": scale_threads,
    "scale_namespaces": scale_namespaces,
    "scale_capacity": scale_capacity,
    "scale_buffer": scale_buffer,
}
NAMES = tuple(PARTS)


def measure(setting: Setting, wanted: set[str]) -> list[Item]:
    """The items of ``NAMES`` that are wanted, in few rounds: each is measured at many points."""
    few = setting.few(setting.size_bytes)
    return [item for name in NAMES if name in wanted for item in PARTS[name].measure(few)]


def needed_bytes(setting: Setting) -> int:
    """Free space that the largest of them needs at any time."""
    few = setting.few(setting.size_bytes)
    return max(part.needed_bytes(few) for part in PARTS.values())
