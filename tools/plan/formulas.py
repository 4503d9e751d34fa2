"""The formulas of ``kvlode plan``: numbers in, numbers out, no catalogue, no files. docs/plan.md states each with its source.

Units: bytes, seconds, tokens, FLOP; rates per second. A *pair* is one query token that attends to one earlier token (or itself).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DAY_S = 86_400
WARRANTY_YEARS = 5
"""Vendors rate writes per day over the warranty, five years for drives of data centres."""


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """Time to compute KV: linear in tokens (weights) and quadratic (attention)."""

    token_s: float
    pair_s: float

    def seconds(self, new_tokens: float, before_tokens: float = 0) -> float:
        """Time for ``new_tokens`` behind ``before_tokens`` whose KV is there. Causal: each token attends to those before it."""
        return self.token_s * new_tokens + self.pair_s * (new_tokens * before_tokens + new_tokens**2 / 2)


@dataclass(frozen=True, slots=True)
class LoadCost:
    """Time to load KV: what a load takes whatever its size, and what each token adds."""

    fixed_s: float
    token_s: float

    def seconds(self, tokens: float) -> float:
        """Time for so many tokens of one request that has the drives for itself; nothing for none."""
        return self.fixed_s + self.token_s * tokens if tokens else 0.0


@dataclass(frozen=True, slots=True)
class LoadRates:
    """Raw KV bytes a second that each part of a load allows. The parts overlap, so the slowest one decides."""

    drives: float
    cores: float
    link: float

    @property
    def bytes_per_s(self) -> float:
        return min(self.drives, self.cores, self.link)

    @property
    def limit(self) -> str:
        """The part that decides."""
        return min(("drives", "cores", "link"), key=lambda name: float(getattr(self, name)))


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, dtype_bytes: float) -> float:
    """Grouped-query attention (arXiv:2305.13245): a key and a value for each layer and KV head."""
    return 2 * layers * kv_heads * head_dim * dtype_bytes


def latent_bytes_per_token(layers: int, latent_dim: int, rope_dim: int, dtype_bytes: float) -> float:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): one latent and one rotary key for each layer."""
    return layers * (latent_dim + rope_dim) * dtype_bytes


def flops_per_token(params_active: float) -> float:
    """One multiplication and one addition for each active weight (Kaplan et al., arXiv:2001.08361, section 2.1)."""
    return 2 * params_active


def flops_per_pair(layers: int, heads: int, query_dim: int, value_dim: int) -> float:
    """A dot product of query and key, and the weighted value, in each layer and query head."""
    return 2 * layers * heads * (query_dim + value_dim)


def prefill_cost(token_flops: float, pair_flops: float, flops_per_s: float) -> PrefillCost:
    """``flops_per_s``: what the GPUs of one model instance reach together."""
    return PrefillCost(token_flops / flops_per_s, pair_flops / flops_per_s)


def load_rates(
    *, read_bytes_per_s: float, ratio: float, cores: float, decode_s_per_byte: float, check_s_per_byte: float, link_bytes_per_s: float
) -> LoadRates:
    """``read_bytes_per_s``: stored bytes that the drives deliver; ``ratio``: raw by stored bytes; decoding counts raw bytes, checking
    and copying counts stored ones."""
    per_raw_byte_s = decode_s_per_byte + check_s_per_byte / ratio
    return LoadRates(read_bytes_per_s * ratio, cores / per_raw_byte_s, link_bytes_per_s)


def break_even_tokens(prefill: PrefillCost, load: LoadCost) -> float | None:
    """Tokens of a prefix from which on loading it takes no longer than computing it; ``None`` when there is no such length.

    The positive root of ``pair_s / 2 * n**2 + (token_s - load.token_s) * n - fixed_s = 0``.
    """
    gain_s = prefill.token_s - load.token_s
    root = math.sqrt(gain_s**2 + 2 * prefill.pair_s * load.fixed_s)
    if gain_s > 0:
        return 2 * load.fixed_s / (gain_s + root)  # the same root, without the difference of two numbers that are nearly equal
    return (root - gain_s) / prefill.pair_s if prefill.pair_s > 0 else None


def record_bytes(block_stored_bytes: float, page_bytes: int) -> int:
    """What a block takes in the log: its payload up to whole pages, and one page of header."""
    return (math.ceil(block_stored_bytes / page_bytes) + 1) * page_bytes


def held_bytes(bytes_per_s: float, horizon_s: float, amplification: float) -> float:
    """The log is a queue: a record lives for its size by the rate of writing, copies included. So much lets it live for the horizon."""
    return bytes_per_s * amplification * horizon_s


def drive_writes_per_day(written_bytes_per_s: float, drives: int, drive_bytes: float) -> float:
    """Bytes written in a day, by the bytes of the drives."""
    return written_bytes_per_s * DAY_S / (drives * drive_bytes)


def life_years(rated_writes_per_day: float, writes_per_day: float) -> float | None:
    """Until the rated writes are used up, at this rate of writing; ``None`` when nothing is written."""
    return WARRANTY_YEARS * rated_writes_per_day / writes_per_day if writes_per_day else None


def drives_for(demand: float, of_one: float) -> int:
    """Whole drives for a demand, of which one drive meets ``of_one``; at least one."""
    return max(1, math.ceil(demand / of_one * (1 - 1e-12)))  # a demand that one drive meets exactly needs one, whatever the rounding


def drives_to_beat(prefill_s: float, fixed_s: float, stored_bytes: float, read_bytes_per_s: float) -> int | None:
    """Drives that read a prefix in the time that computing it takes; ``None`` when no number does."""
    left_s = prefill_s - fixed_s
    return drives_for(stored_bytes, read_bytes_per_s * left_s) if left_s > 0 else None
