"""One simulated run of a trace under one policy and capacity, and the facts that are reported of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...format.errors import InvalidConfig
from .options import PolicyChoice, Settings, blocks_of
from .prefill_rates import DEFAULT_RATE, prefill_rate
from .simulation import SEGMENTS_MIN, Outcome, simulate
from .tiers import TierSize
from .traces import Trace

DAY_S = 86400.0


def capacity_blocks_of(trace: Trace, settings: Settings, capacity: str) -> int:
    """Blocks of the log, in whole segments. Raises ``InvalidConfig`` when they do not make up the segments."""
    blocks = blocks_of(capacity, settings.block_bytes, trace.unique_blocks, "capacity")
    if settings.segments < SEGMENTS_MIN or blocks < settings.segments:
        raise InvalidConfig(
            "the capacity is too small for its segments",
            expected=f"at least {SEGMENTS_MIN} segments, and a block for each",
            actual=f"{blocks} blocks ({capacity}, {trace.unique_blocks} unique blocks) in {settings.segments} segments",
            action="Raise the capacity, ask for fewer --segments, or for smaller --block-bytes.",
        )
    return blocks // settings.segments * settings.segments


def tier_sizes(trace: Trace, settings: Settings) -> list[TierSize]:
    """The memories in front of the store."""
    asked = (("hbm", settings.hbm), ("dram", settings.dram))
    return [TierSize(name, blocks_of(text, settings.block_bytes, trace.unique_blocks, name)) for name, text in asked if text is not None]


def run_simulation(
    trace: Trace,
    settings: Settings,
    policy: PolicyChoice,
    capacity_blocks: int,
    advance: Callable[[int], None] = lambda requests: None,
) -> dict[str, Any]:
    """Play the trace once; the facts of ``facts_of``. ``advance`` is told how many more requests are done, now and then."""
    done = 0

    def progress(requests: int) -> None:
        nonlocal done
        advance(requests - done)
        done = requests

    outcome = simulate(
        trace.requests,
        capacity_blocks=capacity_blocks,
        reclaim=policy.reclaim(),
        admission=settings.admission.admission(capacity_blocks * settings.block_bytes),
        segments=settings.segments,
        tiers=tier_sizes(trace, settings),
        restart_at=settings.restart_at_s,
        progress=progress,
        block_tokens=trace.block_tokens,
        block_bytes=settings.block_bytes,
    )
    progress(len(trace.requests))
    return facts_of(trace, settings, policy, outcome)


def facts_of(trace: Trace, settings: Settings, policy: PolicyChoice, outcome: Outcome) -> dict[str, Any]:
    """What is reported of a simulated run. Sizes follow from ``block_bytes``, rates a day from the length of the trace."""
    served_by_tiers = sum(outcome.tier_hit_ratios.values())
    return {
        "policy": policy.text,
        "admission": settings.admission.text,
        "capacity_blocks": outcome.capacity_blocks,
        "capacity_bytes": outcome.capacity_blocks * settings.block_bytes,
        "capacity_share": outcome.capacity_blocks / max(1, trace.unique_blocks),
        "segments": settings.segments,
        "block_bytes": settings.block_bytes,
        "block_tokens": trace.block_tokens,
        "requests": outcome.requests,
        "events": outcome.events,
        "events_per_s": round(outcome.events_per_s),
        "unique_blocks": trace.unique_blocks,
        "prefix_hit_ratio": outcome.prefix_hit_ratio,
        "block_hit_ratio": outcome.block_hit_ratio,
        "store_hit_ratio": outcome.prefix_hit_ratio - served_by_tiers,
        "tier_hit_ratios": dict(outcome.tier_hit_ratios),
        "write_amplification": outcome.write_amplification,
        "fresh_blocks": outcome.fresh_blocks,
        "reinserted_blocks": outcome.reinserted_blocks,
        "rejected_blocks": outcome.rejected_blocks,
        **written_facts(trace, outcome.written_blocks * settings.block_bytes, outcome.capacity_blocks * settings.block_bytes),
        "eviction_age_s": {f"p{quantile * 100:g}": age_s for quantile, age_s in outcome.eviction_age_s.items()},
        **token_facts(settings, outcome.input_tokens, outcome.prefix_hit_tokens),
        "policy_facts": dict(outcome.policy_facts),
        "after_restart": None if outcome.after_restart is None else restart_facts(outcome),
    }


def restart_facts(outcome: Outcome) -> dict[str, Any]:
    """What was hit from the restart on."""
    after = outcome.after_restart
    assert after is not None
    return {
        "restart_at_s": after.restart_at_s,
        "asked_blocks": after.asked_blocks,
        "prefix_hit_ratio": after.prefix_hit_ratio,
        "store_hit_ratio": after.store_hit_blocks / max(1, after.asked_blocks),
        "tokens_not_recomputed": after.prefix_hit_tokens,
    }


def written_facts(trace: Trace, written_bytes: int, capacity_bytes: int) -> dict[str, Any]:
    """Bytes written, and what they come to in a day at the pace of the trace; ``None`` for a trace that takes no time."""
    per_day = written_bytes / trace.duration_s * DAY_S if trace.duration_s > 0 else None
    return {
        "duration_s": trace.duration_s,
        "written_bytes": written_bytes,
        "written_bytes_per_day": per_day,
        "drive_writes_per_day": per_day / capacity_bytes if per_day is not None and capacity_bytes else None,
    }


def token_facts(settings: Settings, input_tokens: int, hit_tokens: int) -> dict[str, Any]:
    """Tokens of prompts that need not be computed again, and the time of one GPU that they stand for."""
    rate = prefill_rate(settings.prefill or DEFAULT_RATE)
    return {
        "input_tokens": input_tokens,
        "tokens_not_recomputed": hit_tokens,
        "gpu_seconds_saved": hit_tokens / rate.tokens_per_s,
        "prefill_model": rate.model,
        "prefill_gpu": rate.gpu,
        "prefill_tokens_per_s": rate.tokens_per_s,
        "prefill_source": rate.source,
    }
