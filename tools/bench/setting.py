"""How large and how often everything is measured, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from rich.console import Console

from ...engine.store import DiskStore
from .workload import BLOCK_BYTES, MIB

QUICK_BLOCK_BYTES = MIB // 4
WARM_UP_S = 60.0
ROUNDS_FEW = 5


@dataclass(frozen=True, slots=True)
class Setting:
    """One run of the bench. ``root`` is a folder of its own, removed at the end."""

    root: str
    size_bytes: int
    rounds: int
    quick: bool
    console: Console

    @property
    def block_bytes(self) -> int:
        return QUICK_BLOCK_BYTES if self.quick else BLOCK_BYTES

    @property
    def block_count(self) -> int:
        return max(4, self.size_bytes // self.block_bytes)

    @property
    def buffer_bytes(self) -> int:
        return 16 * MIB if self.quick else 1024 * MIB

    @property
    def key_count(self) -> int:
        """Keys of the items about a million keys."""
        return 2_000 if self.quick else 1_000_000

    def capped(self, size_bytes_max: int) -> Setting:
        """The same with rounds of at most so many bytes."""
        return replace(self, size_bytes=min(self.size_bytes, size_bytes_max))

    def few(self, size_bytes_max: int) -> Setting:
        """Fewer and smaller rounds, for what is measured in many variants."""
        return replace(self.capped(size_bytes_max), rounds=min(self.rounds, 1 if self.quick else ROUNDS_FEW))

    def folder(self, name: str) -> str:
        return f"{self.root}/{name}"

    def settle(self, store: DiskStore) -> None:
        """Wait until what an opened store does once in the background is over: a service is measured, not its first second."""
        store.warm_up(WARM_UP_S)

    def step(self, name: str, arm: Callable[[int], float]) -> Callable[[int], float]:
        """``arm`` with a line of progress for each round."""

        def told(number: int) -> float:
            self.console.print(f"{name}: round {number + 1} of {self.rounds}", highlight=False)
            return arm(number)

        return told
