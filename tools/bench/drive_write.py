"""Writing incompressible blocks: the rate against the drive's, what it costs in CPU time, and how many bytes it takes."""

from __future__ import annotations

import statistics

from . import fio
from .figures import Bar, Item, abba, ratio_item, value_item
from .setting import Setting
from .sizes import block_sizes, blocks_of_size, name_of_size, size_bytes_max
from .workload import MIB, Blocks
from .write_arms import WriteArms
from .write_arms import needed_bytes as bytes_for_store

NAMES = ("write_raw", "write_amplification", "cpu_per_gb")
WRITE_BAR = Bar(0.92, "at least")
BARRED_BLOCK_BYTES_MIN = MIB
AMPLIFICATION_BAR = Bar(1.01, "at most")
CPU_BAR = Bar(0.35, "at most")


def measure(setting: Setting, wanted: set[str]) -> list[Item]:
    """The items of ``NAMES`` that are wanted. All three of blocks of ``Setting.block_bytes`` come from the same rounds.

    ``write_raw.fresh``: at once after opening, while the buffer's memory is still being touched. ``write_raw.<size>``: other blocks.
    """
    blocks = Blocks(setting.block_count, setting.block_bytes)
    items = _main_items(setting, blocks, wanted)
    if "write_raw" not in wanted:
        return items
    items.append(_pair_item("write_raw.fresh", setting.few(setting.size_bytes), blocks, None, settled=False))
    for block_bytes in block_sizes(setting):
        few = setting.few(size_bytes_max(block_bytes))
        bar = WRITE_BAR if block_bytes >= BARRED_BLOCK_BYTES_MIN else None
        items.append(_pair_item(f"write_raw.{name_of_size(block_bytes)}", few, blocks_of_size(few, block_bytes), bar))
    return items


def _main_items(setting: Setting, blocks: Blocks, wanted: set[str]) -> list[Item]:
    arms = WriteArms(setting, blocks)
    items = []
    if "write_raw" in wanted:
        items.append(_pair("write_raw", setting, arms, WRITE_BAR, with_fio=True))
    else:
        for number in range(setting.rounds):
            setting.step(" and ".join(sorted(wanted)), arms.store)(number)
    if "write_amplification" in wanted:
        items.append(_amplification_item(arms, blocks))
    if "cpu_per_gb" in wanted:
        per_gb = [done.cpu_s / (blocks.total_bytes / 1e9) for done in arms.rounds]
        items.append(value_item("cpu_per_gb.write", per_gb, unit="s/GB", bar=CPU_BAR, facts=arms.facts()))
    return items


def _pair_item(name: str, setting: Setting, blocks: Blocks, bar: Bar | None, *, settled: bool = True) -> Item:
    return _pair(name, setting, WriteArms(setting, blocks, settled=settled), bar)


def _pair(name: str, setting: Setting, arms: WriteArms, bar: Bar | None, *, with_fio: bool = False) -> Item:
    arms.prepare()
    rates = abba(setting.rounds, setting.step(name, arms.store), arms.bare)
    fio_rate = fio.write_rate(arms.trace, setting) if with_fio else None
    return ratio_item(name, *rates, bar=bar, facts=arms.facts() | ({} if fio_rate is None else {"fio_GB_s": fio_rate}))


def _amplification_item(arms: WriteArms, blocks: Blocks) -> Item:
    """Everything that this process wrote between creating the store and closing it; the whole drive's count stands beside it."""
    process = [done.written.process_bytes / blocks.total_bytes for done in arms.rounds]
    drive = [done.written.drive_bytes / blocks.total_bytes for done in arms.rounds if done.written.drive_bytes is not None]
    facts = arms.facts() | ({"whole_drive": statistics.median(drive)} if drive else {})
    void = "the kernel did not count all of the bytes that were written" if min(process) < 1 else None
    return value_item("write_amplification", process, unit="written/raw", bar=AMPLIFICATION_BAR, facts=facts, void=void)


def needed_bytes(setting: Setting) -> int:
    """Free space that these items need at any time."""
    return bytes_for_store(setting, max(setting.block_bytes, *block_sizes(setting)))
