"""Real KV to the drive and back, in raw bytes, against what the drive and the cores together could do.

The limit of a round is the smaller one of two rates that are measured in it: the drive's, times what compression saves, and that at
which all cores together encode (decode) the same blocks and do nothing else.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from typing import Any

from . import real_kv
from .codec_rates import CodecRates, core_count
from .figures import Bar, Item, abba, ratio_item, skipped_item
from .read_arms import Destinations, ReadArms, StoredBlocks
from .real_kv import BFLOAT16, FLOAT8, RealKv
from .setting import Setting
from .workload import Blocks
from .write_arms import WriteArms
from .write_arms import needed_bytes as bytes_for_store

NAMES = ("write_kv", "read_kv")
LIMIT_BAR = Bar(0.85, "at least")
DEVICE_BAR = Bar(1.25, "at least")
BLOCK_BYTES_ASSUMED = 8 << 20
"""No block of the demo's model is larger."""


def measure(setting: Setting, wanted: set[str]) -> list[Item]:
    """``write_kv`` over the limit; ``read_kv.device`` over the drive's rate, ``read_kv.limit`` over the limit: blocks in bfloat16.

    The same of float8, without bars: ``write_kv.fp8``, ``read_kv.fp8_device``, ``read_kv.fp8_limit``.
    """
    kv = real_kv.real_kv(setting)
    if isinstance(kv, str):
        return [skipped_item(name, kv) for name in NAMES if name in wanted]
    few = setting.few(setting.size_bytes)
    return _items(setting, kv, BFLOAT16, wanted, "", barred=True) + _items(few, kv, FLOAT8, wanted, "fp8", barred=False)


def _items(setting: Setting, kv: RealKv, dtype: str, wanted: set[str], label: str, *, barred: bool) -> list[Item]:
    blocks = kv.blocks(dtype, setting.size_bytes)
    codec = CodecRates(blocks, threads=core_count())
    items = []
    if "write_kv" in wanted:
        items.append(_write_item(setting, kv, blocks, codec, ".".join(filter(None, ("write_kv", label))), LIMIT_BAR if barred else None))
    if "read_kv" in wanted:
        bars = (DEVICE_BAR, LIMIT_BAR) if barred else (None, None)
        items += _read_items(setting, kv, blocks, codec, f"read_kv.{label}_" if label else "read_kv.", bars)
    return items


class _Limit:
    """The arm beside the store: the drive's part, then the cores'."""

    def __init__(self, bare: Callable[[int], float], codec_rate: Callable[[], float], ratio: float) -> None:
        self._bare = bare
        self._codec_rate = codec_rate
        self._ratio = ratio
        self.device_rates: list[float] = []
        self.codec_rates: list[float] = []

    def __call__(self, number: int) -> float:
        """GB/s of raw bytes that neither the drive nor the cores can exceed."""
        self.device_rates.append(self._bare(number))
        self.codec_rates.append(self._codec_rate())
        return min(self.device_rates[-1] * self._ratio, self.codec_rates[-1])

    def facts(self) -> dict[str, Any]:
        by_device = sum(device * self._ratio < codec for device, codec in zip(self.device_rates, self.codec_rates, strict=True))
        return {
            "device_GB_s": statistics.median(self.device_rates),
            "cores_GB_s": statistics.median(self.codec_rates),
            "codec_ratio": self._ratio,
            "rounds_bound_by_device": by_device,
        }


def _write_item(setting: Setting, kv: RealKv, blocks: Blocks, codec: CodecRates, name: str, bar: Bar | None) -> Item:
    arms = WriteArms(setting, blocks, codec="auto")
    limit = _Limit(arms.bare, codec.encode_rate, codec.ratio)
    arms.prepare()
    rates = abba(setting.rounds, setting.step(name, arms.store), limit)
    facts = arms.facts() | kv.facts(blocks) | limit.facts() | {"stored_ratio": arms.stored_ratio}
    return ratio_item(name, *rates, bar=bar, facts=facts)


def _read_items(
    setting: Setting, kv: RealKv, blocks: Blocks, codec: CodecRates, prefix: str, bars: tuple[Bar | None, Bar | None]
) -> list[Item]:
    stored = StoredBlocks.write(setting, blocks, "read", codec="auto")
    arms = ReadArms(setting, stored, Destinations.aligned(blocks), "prefix")
    limit = _Limit(arms.bare, codec.decode_rate, codec.ratio)
    arms.prepare()
    store_rates, limit_rates = abba(setting.rounds, setting.step(prefix.rstrip("._"), arms.store), limit)
    shutil.rmtree(stored.path)
    facts = arms.facts() | kv.facts(blocks) | limit.facts() | {"stored_ratio": stored.ratio}
    void = arms.void or codec.differs()
    return [
        ratio_item(f"{prefix}device", store_rates, limit.device_rates, bar=bars[0], facts=facts, void=void),
        ratio_item(f"{prefix}limit", store_rates, limit_rates, bar=bars[1], facts=facts, void=void),
    ]


def needed_bytes(setting: Setting) -> int:
    """Free space that these items need at any time."""
    return real_kv.needed_bytes(setting) + bytes_for_store(setting, BLOCK_BYTES_ASSUMED)
