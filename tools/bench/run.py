"""One run of the bench: a folder of its own, the items that were asked for, the report."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ...engine.config import parse_bytes
from ...format.errors import InvalidConfig
from . import codecs, dram, drive_kv, drive_read, drive_write, latency, million, scale
from .figures import Item
from .machine import check_free_space, machine_facts
from .report import show, to_json
from .setting import Setting
from .workload import MIB

FOLDER_DEFAULT = ".bench"
SIZE_DEFAULT = 2048 * MIB
ROUNDS_DEFAULT = 9
QUICK_SIZE_BYTES = 8 * MIB
QUICK_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Group:
    """Items that one module measures together."""

    names: tuple[str, ...]
    measure: Callable[[Setting, set[str]], list[Item]]
    """Gets those of ``names`` that are wanted."""
    needed_bytes: Callable[[Setting], int]
    """Free space below the setting's root at any time."""


GROUPS = (
    Group(drive_write.NAMES, drive_write.measure, drive_write.needed_bytes),
    Group(drive_read.NAMES, drive_read.measure, drive_read.needed_bytes),
    Group(codecs.NAMES, codecs.measure, codecs.needed_bytes),
    Group(drive_kv.NAMES, drive_kv.measure, drive_kv.needed_bytes),
    Group(dram.NAMES, dram.measure, dram.needed_bytes),
    Group(latency.NAMES, latency.measure, latency.needed_bytes),
    Group(million.NAMES, million.measure, million.needed_bytes),
)
"""In the order in which they are measured. A name may be in several groups (parts of one row of the report)."""

ITEMS = tuple(dict.fromkeys(name for group in GROUPS for name in group.names))
"""Names for ``only``; some give several figures, named ``<item>.<what>``."""

ON_REQUEST = (Group(scale.NAMES, scale.measure, scale.needed_bytes),)
"""Measured only where ``only`` names their items: how cost grows says nothing that changes from one run to the next."""

NAMES = (*ITEMS, *(name for group in ON_REQUEST for name in group.names))


def run_bench(
    path: str | os.PathLike[str] | None = None,
    *,
    as_json: bool = False,
    only: Sequence[str] | None = None,
    size_bytes: int | str = SIZE_DEFAULT,
    rounds: int = ROUNDS_DEFAULT,
    quick: bool = False,
    console: Console | None = None,
) -> int:
    """Measure ``only`` these (of ``NAMES``; default ``ITEMS``) in a new folder below ``path`` (default ``./.bench``), which it removes.

    ``size_bytes`` (or text such as ``"2GiB"``) is what a round writes or reads. ``quick`` shrinks everything: it shows that
    the bench works and measures nothing. ``console`` shows progress (standard error by default); the table or, with
    ``as_json``, one JSON object on the last line goes to standard output. Returns 0, also when bars are missed; 1 when a
    figure is void. Raises ``InvalidConfig`` and ``NoSpace`` before anything is made.
    """
    started = time.perf_counter()
    chosen = _chosen(only)
    if rounds < 1:
        raise InvalidConfig("rounds is too small", expected=">= 1 (9 or more for a figure to be relied on)", actual=rounds)
    above = Path(path or FOLDER_DEFAULT)
    created = not above.exists()
    above.mkdir(parents=True, exist_ok=True)
    root = tempfile.mkdtemp(prefix="kvlode-bench-", dir=above)
    try:
        setting = Setting(
            root=root,
            size_bytes=QUICK_SIZE_BYTES if quick else parse_bytes(size_bytes, "size"),
            rounds=min(rounds, QUICK_ROUNDS) if quick else rounds,
            quick=quick,
            console=console or Console(stderr=True),
        )
        check_free_space(root, max(group.needed_bytes(setting) for group in (*GROUPS, *ON_REQUEST) if chosen & set(group.names)))
        machine = machine_facts(root)
        measured = _measure(setting, chosen)
    finally:
        shutil.rmtree(root, ignore_errors=True)
        if created:
            shutil.rmtree(above, ignore_errors=True)
    if as_json:
        print(json.dumps(to_json(measured, machine, setting, time.perf_counter() - started)))
    else:
        show(measured, machine, setting)
    return 1 if any(item.state == "void" for item in measured) else 0


def _chosen(only: Sequence[str] | None) -> set[str]:
    unknown = [item for item in only or () if item not in NAMES]
    if unknown:
        raise InvalidConfig("there is no such item", expected=" or ".join(NAMES), actual=", ".join(unknown))
    return set(only or ITEMS)


def _measure(setting: Setting, chosen: set[str]) -> list[Item]:
    measured: list[Item] = []
    for group in (*GROUPS, *ON_REQUEST):
        wanted = chosen & set(group.names)
        measured += group.measure(setting, wanted) if wanted else []
    return measured
