"""Cold reads of incompressible blocks: the rate against the drive's, and what it costs in CPU time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from . import fio
from .figures import Bar, Item, abba, ratio_item, value_item
from .read_arms import Destinations, ReadArms, StoredBlocks
from .setting import Setting
from .sizes import block_sizes, blocks_of_size, name_of_size, size_bytes_max
from .workload import MIB, Blocks
from .write_arms import needed_bytes as bytes_for_store

NAMES = ("read_raw", "read_prefix", "read_small", "cpu_per_gb")
RANDOM_BAR = Bar(0.93, "at least")
PREFIX_BAR = Bar(0.95, "at least")
SMALL_BAR = Bar(0.75, "at least")
SMALL_BELOW_BYTES = MIB
CPU_BAR = Bar(0.35, "at most")


def measure(setting: Setting, wanted: set[str]) -> list[Item]:
    """The items of ``NAMES`` that are wanted.

    ``read_raw.aligned`` and ``.tensors``: blocks of ``Setting.block_bytes`` in random order, into page-aligned arrays and into tensors
    as torch allocates them; ``read_raw.<size>``: other blocks, into arrays. ``read_prefix``: neighbouring blocks in their order.
    ``read_small.<size>``: small blocks in random order; ``read_prefix.<size>``: the same as a prefix.
    """
    items: list[Item] = []
    if wanted & {"read_raw", "read_prefix", "cpu_per_gb"}:
        with _stored(setting, Blocks(setting.block_count, setting.block_bytes)) as stored:
            items += _main_items(setting, stored, wanted)
    for block_bytes in block_sizes(setting):
        if block_bytes < SMALL_BELOW_BYTES:
            items += _small_items(setting.capped(size_bytes_max(block_bytes)), block_bytes, wanted)
        elif "read_raw" in wanted:
            items.append(_large_item(setting.few(size_bytes_max(block_bytes)), block_bytes))
    return items


def _main_items(setting: Setting, stored: StoredBlocks, wanted: set[str]) -> list[Item]:
    items: list[Item] = []
    aligned = Destinations.aligned(stored.blocks)
    arms = ReadArms(setting, stored, aligned, "random")
    if "read_raw" in wanted:
        items.append(_pair("read_raw.aligned", setting, arms, RANDOM_BAR, with_fio=True))
    elif "cpu_per_gb" in wanted:
        for number in range(setting.rounds):
            setting.step("cpu_per_gb.read", arms.store)(number)
    if "cpu_per_gb" in wanted:
        per_gb = [cpu_s / (stored.blocks.total_bytes / 1e9) for cpu_s in arms.cpu_s]
        items.append(value_item("cpu_per_gb.read", per_gb, unit="s/GB", bar=CPU_BAR, facts=arms.facts(), void=arms.void))
    if "read_prefix" in wanted:
        items.append(_pair("read_prefix", setting, ReadArms(setting, stored, aligned, "prefix"), PREFIX_BAR, with_fio=True))
    del aligned, arms
    if "read_raw" in wanted:
        tensors = Destinations.tensors(stored.blocks)
        items.append(_pair("read_raw.tensors", setting, ReadArms(setting, stored, tensors, "random"), RANDOM_BAR))
    return items


def _small_items(setting: Setting, block_bytes: int, wanted: set[str]) -> list[Item]:
    items: list[Item] = []
    if not wanted & {"read_small", "read_prefix"}:
        return items
    name = name_of_size(block_bytes)
    with _stored(setting, blocks_of_size(setting, block_bytes)) as stored:
        aligned = Destinations.aligned(stored.blocks)
        if "read_small" in wanted:
            items.append(_pair(f"read_small.{name}", setting, ReadArms(setting, stored, aligned, "random"), SMALL_BAR, with_fio=True))
        if "read_prefix" in wanted:
            few = setting.few(setting.size_bytes)
            items.append(_pair(f"read_prefix.{name}", few, ReadArms(few, stored, aligned, "prefix"), None))
    return items


def _large_item(setting: Setting, block_bytes: int) -> Item:
    with _stored(setting, blocks_of_size(setting, block_bytes)) as stored:
        arms = ReadArms(setting, stored, Destinations.aligned(stored.blocks), "random")
        return _pair(f"read_raw.{name_of_size(block_bytes)}", setting, arms, RANDOM_BAR)


@contextmanager
def _stored(setting: Setting, blocks: Blocks) -> Iterator[StoredBlocks]:
    stored = StoredBlocks.write(setting, blocks, "read")
    try:
        yield stored
    finally:
        shutil.rmtree(stored.path)


def _pair(name: str, setting: Setting, arms: ReadArms, bar: Bar | None, *, with_fio: bool = False) -> Item:
    arms.prepare()
    rates = abba(setting.rounds, setting.step(name, arms.store), arms.bare)
    fio_rate = fio.read_rate(arms.trace, setting, "read" if arms.order == "prefix" else "randread") if with_fio else None
    facts = arms.facts() | ({} if fio_rate is None else {"fio_GB_s": fio_rate})
    return ratio_item(name, *rates, bar=bar, facts=facts, void=arms.void)


def needed_bytes(setting: Setting) -> int:
    """Free space that these items need at any time."""
    return bytes_for_store(setting, max(setting.block_bytes, *block_sizes(setting)))
