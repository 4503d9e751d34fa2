"""Each formula of a plan in words, and with its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from . import catalog
from .formulas import DAY_S
from .plan import INDEX_FACTOR, Plan

GB = catalog.GB


@dataclass(frozen=True, slots=True)
class Formula:
    """One line of ``--explain``; ``value`` is in base units."""

    name: str
    formula: str
    numbers: str
    value: float | None


def explain(plan: Plan) -> list[Formula]:
    """The formulas in the order in which they build on each other."""
    return [*_sizes(plan), *_times(plan), *_loads(plan)]


def _sizes(plan: Plan) -> list[Formula]:
    inputs, sizes = plan.inputs, plan.sizes
    model = inputs.model
    if model.latent_dim:
        shape = "layers x (latent + rotary dimension) x bytes of an element"
        numbers = f"{model.layers} x ({model.latent_dim} + {model.rope_dim}) x {model.dtype_bytes:g}"
    else:
        shape = "2 x layers x KV heads x head dimension x bytes of an element"
        numbers = f"2 x {model.layers} x {model.kv_heads} x {model.head_dim} x {model.dtype_bytes:g}"
    return [
        Formula("KV of a token, bytes", shape, f"{numbers} = {sizes.kv_bytes_per_token:,.0f}", sizes.kv_bytes_per_token),
        Formula(
            "record of a block, bytes",
            "KV of a token x tokens of a block / ratio, up to whole pages of 4096, and one page of header",
            f"{sizes.kv_bytes_per_token:,.0f} x {inputs.block_tokens} / {plan.load.ratio:g} -> {sizes.record_bytes:,}",
            sizes.record_bytes,
        ),
        Formula(
            "writes, bytes a second",
            "requests a second x new tokens / tokens of a block x record x write amplification",
            f"{inputs.requests_per_s:.4g} x {inputs.new_tokens:,.0f} / {inputs.block_tokens} x {sizes.record_bytes:,}"
            f" x {inputs.write_amplification:g} = {sizes.drive_write_bytes_per_s:,.0f}",
            sizes.drive_write_bytes_per_s,
        ),
        Formula(
            "store, bytes",
            f"writes x horizon (the log is a queue) + {INDEX_FACTOR:g} x index + the open and the spare segment",
            f"{sizes.drive_write_bytes_per_s:,.0f} x {inputs.horizon_s:,.0f} + {sizes.index_bytes:,.0f} + 2 x {sizes.segment_bytes:,.0f}"
            f" = {sizes.store_bytes:,.0f}",
            sizes.store_bytes,
        ),
        Formula(
            "drive writes a day (DWPD)",
            "writes x 86,400 / (drives x size of a drive)",
            f"{sizes.drive_write_bytes_per_s:,.0f} x {DAY_S:,} / ({plan.drives} x {inputs.drive.size_bytes:,.0f})"
            f" = {plan.drive_writes_per_day:.4f}",
            plan.drive_writes_per_day,
        ),
    ]


def _times(plan: Plan) -> list[Formula]:
    inputs, model = plan.inputs, plan.inputs.model
    if inputs.prefill_tokens_per_s is not None:
        formula, numbers = "tokens / measured tokens a second", f"{inputs.context_tokens:,} / {inputs.prefill_tokens_per_s:,.0f}"
    else:
        formula = (
            "(2 x active weights x tokens + 2 x layers x query heads x (query + value dimension) x (tokens x tokens before + tokens^2 / 2))"
            " / (GPUs x peak x efficiency)"
        )
        numbers = (
            f"(2 x {model.params_active:.4g} x {inputs.context_tokens:,} + {model.flops_per_pair:,.0f} x {inputs.context_tokens:,}^2 / 2)"
            f" / ({inputs.gpus} x {inputs.gpu.flops_per_s:.4g} x {inputs.efficiency:g})"
        )
    rates = plan.load.rates
    limits = f"min({rates.drives / GB:.2f}, {rates.cores / GB:.2f}, {rates.link / GB:.2f}) GB/s"
    return [
        Formula("prefill of the context, seconds", formula, f"{numbers} = {plan.ttft_without_s:.4f}", plan.ttft_without_s),
        Formula(
            "load rate, raw bytes a second",
            f"min(drives x reading x {catalog.READ_SHARE:g} x ratio, cores / (decoding a byte + checking it / ratio), GPUs x link)",
            f"{limits} = {rates.bytes_per_s / GB:.2f} GB/s",
            rates.bytes_per_s,
        ),
        Formula(
            "load of a hit, seconds",
            "first read + tokens x (KV of a token / load rate + lookup of a block / tokens of a block)",
            f"{plan.load.cost.fixed_s:g} + {plan.hit_tokens:,.0f} x {plan.load.cost.token_s:.4g} = {plan.load_hit_s:.4f}",
            plan.load_hit_s,
        ),
        Formula(
            "time to first token, seconds",
            "load of the hit + prefill of the rest behind it; nothing queues",
            f"{plan.load_hit_s:.4f} + {plan.compute_rest_s:.4f} = {plan.ttft_with_s:.4f}",
            plan.ttft_with_s,
        ),
        Formula(
            "break-even, tokens",
            "the positive root of pair/2 x n^2 + (token - load of a token) x n - first read = 0",
            f"{plan.prefill.pair_s:.4g} / 2 x n^2 + ({plan.prefill.token_s:.4g} - {plan.load.cost.token_s:.4g}) x n"
            f" - {plan.load.cost.fixed_s:g} = 0: {'none' if plan.break_even_tokens is None else format(plan.break_even_tokens, ',.1f')}",
            plan.break_even_tokens,
        ),
    ]


def _loads(plan: Plan) -> list[Formula]:
    inputs, load, sizes = plan.inputs, plan.load, plan.sizes
    raw = load.codec == "raw"
    raw_read = inputs.requests_per_s * plan.hit_tokens * sizes.kv_bytes_per_token / GB
    raw_written = sizes.raw_write_bytes_per_s / GB
    decode, encode = (0.0 if raw else GB / rate for rate in (inputs.decode_bytes_per_s, inputs.encode_bytes_per_s))
    check, place = catalog.READ_CORE_S_PER_BYTE * GB, catalog.WRITE_CORE_S_PER_BYTE * GB
    return [
        Formula(
            "reads, stored bytes a second",
            "requests a second x tokens found x stored bytes of a token",
            f"{inputs.requests_per_s:.4g} x {plan.hit_tokens:,.0f} x {sizes.stored_bytes_per_token:,.0f} = {plan.read_bytes_per_s:,.0f}",
            plan.read_bytes_per_s,
        ),
        Formula(
            "cores for reads, on average",
            "raw GB/s read x (core seconds to decode a GB + to check and copy a GB / ratio)",
            f"{raw_read:.4g} x ({decode:.3g} + {check:.3g} / {load.ratio:g}) = {load.cores_reading:.3f}",
            load.cores_reading,
        ),
        Formula(
            "cores for writes, on average",
            "raw GB/s put x (core seconds to encode a GB + to write a GB / ratio)",
            f"{raw_written:.4g} x ({encode:.3g} + {place:.3g} / {load.ratio:g}) = {load.cores_writing:.3f}",
            load.cores_writing,
        ),
        Formula(
            "GPU seconds saved a day",
            "requests a second x (prefill of the context - prefill of the rest) x GPUs x 86,400",
            f"{inputs.requests_per_s:.4g} x ({plan.ttft_without_s:.4f} - {plan.compute_rest_s:.4f}) x {inputs.gpus} x {DAY_S:,}"
            f" = {plan.gpu_seconds_saved_per_day:,.0f}",
            plan.gpu_seconds_saved_per_day,
        ),
    ]
