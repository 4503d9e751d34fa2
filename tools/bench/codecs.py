"""Compression of real KV: what it saves, and what one core does of it, also against a copy."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from ...gds.buffers import aligned_array
from . import real_kv
from .codec_rates import CodecRates
from .figures import Bar, Item, abba, ratio_item, skipped_item, value_item
from .real_kv import BFLOAT16, FLOAT8, RealKv
from .setting import Setting
from .workload import Blocks

NAMES = ("compression_ratio", "codec_core")
RATIO_BAR = Bar(1.45, "at least")
ENCODE_BAR = Bar(0.8, "at least")
DECODE_BAR = Bar(1.6, "at least")


def measure(setting: Setting, wanted: set[str]) -> list[Item]:
    """``compression_ratio`` of bfloat16 and ``compression_ratio.fp8``; ``codec_core.encode`` and ``.decode`` in GB/s of one core,
    and ``codec_core.encode_memcpy`` and ``.decode_memcpy`` as a part of what a copy of the same bytes reaches."""
    kv = real_kv.real_kv(setting)
    if isinstance(kv, str):
        return [skipped_item(name, kv) for name in NAMES if name in wanted]
    blocks = kv.blocks(BFLOAT16, 0)
    rates = CodecRates(blocks, threads=1)
    items: list[Item] = []
    if "compression_ratio" in wanted:
        items.append(_ratio_item("compression_ratio", kv, blocks, rates, RATIO_BAR))
        float8 = kv.blocks(FLOAT8, 0)
        items.append(_ratio_item("compression_ratio.fp8", kv, float8, CodecRates(float8, threads=1), None))
    if "codec_core" in wanted:
        items += _core_items(setting, kv, blocks, rates)
    return items


def _ratio_item(name: str, kv: RealKv, blocks: Blocks, rates: CodecRates, bar: Bar | None) -> Item:
    rates.decode_rate()
    facts = {**kv.facts(blocks), "codec": str(rates.codec.name).lower()}
    return value_item(name, [rates.ratio], unit="raw/stored", bar=bar, facts=facts, void=rates.differs())


def _core_items(setting: Setting, kv: RealKv, blocks: Blocks, rates: CodecRates) -> list[Item]:
    copied = aligned_array(blocks.memory.size).reshape(blocks.memory.shape)

    def copy_arm(_: int) -> float:
        started = time.perf_counter()
        np.copyto(copied, blocks.memory)
        return blocks.memory.size / (time.perf_counter() - started) / 1e9

    copy_arm(0)
    rates.decode_rate()
    facts, void = kv.facts(blocks), rates.differs()
    items = []
    for name, rate, bar in (("encode", rates.encode_rate, ENCODE_BAR), ("decode", rates.decode_rate, DECODE_BAR)):
        arms = setting.step(f"codec_core.{name}", _arm(rate)), copy_arm
        codec_rates, copy_rates = abba(setting.rounds, *arms)
        items.append(value_item(f"codec_core.{name}", codec_rates, unit="GB/s", bar=bar, facts=facts, void=void))
        items.append(ratio_item(f"codec_core.{name}_memcpy", codec_rates, copy_rates, bar=None, facts=facts, void=void))
    return items


def _arm(rate: Callable[[], float]) -> Callable[[int], float]:
    return lambda _: rate()


def needed_bytes(setting: Setting) -> int:
    """Free space that these items need."""
    return real_kv.needed_bytes(setting)
