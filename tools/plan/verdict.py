"""What a plan comes to in words: whether loading pays, and what speaks against the plan."""

from __future__ import annotations

from .plan import Plan

BUSY = 0.7
"""Above this share of what it can do, a device's queue adds waits that the plan does not have."""


def seconds_text(seconds: float) -> str:
    """Three digits, in seconds or milliseconds."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"


def verdict(plan: Plan) -> str:
    """One sentence: load or recompute, with both times."""
    context, hit = plan.inputs.context_tokens, plan.hit_tokens
    if not hit:
        return f"RECOMPUTE: nothing of the context is found; a store only costs its writes. Break-even {_even(plan)}."
    load, compute = seconds_text(plan.load_hit_s), seconds_text(plan.compute_hit_s)
    times = f"loading {hit:,.0f} of {context:,} tokens takes {load}, computing them {compute}"
    if plan.loading_pays:
        return f"LOAD: {times}: {plan.compute_hit_s / plan.load_hit_s:.2g} times as long. Break-even {_even(plan)}."
    return f"RECOMPUTE: {times}. Recomputing is faster here; the load is limited by {plan.load.rates.limit}. Break-even {_even(plan)}."


def _even(plan: Plan) -> str:
    tokens = plan.break_even_tokens
    return "at no length: computing is faster at every length" if tokens is None else f"at {tokens:,.0f} tokens"


def warnings(plan: Plan) -> list[str]:
    """What an operator should know before this plan is carried out, the gravest first."""
    return [*_against_loading(plan), *_overload(plan), *_wear(plan), *_drives(plan)]


def _against_loading(plan: Plan) -> list[str]:
    found = []
    if plan.hit_tokens and not plan.loading_pays:
        found.append(f"a hit makes a request slower by {seconds_text(plan.load_hit_s - plan.compute_hit_s)}: recompute instead")
        to_beat = plan.needs.to_beat
        if plan.load.rates.limit != "drives":
            rate = plan.load.rates.bytes_per_s / 1e9
            found.append(f"the load is limited by {plan.load.rates.limit} at {rate:.2f} GB/s: more drives do not help")
        elif to_beat is not None:
            found.append(f"{to_beat} drives read as fast as the GPUs compute; {plan.drives} do not")
    if plan.break_even_hit_rate is None:
        found.append(f"no hit rate pays at {plan.inputs.context_tokens:,} tokens")
    elif plan.inputs.hit_rate < plan.break_even_hit_rate:
        found.append(f"a hit rate below {plan.break_even_hit_rate:.2%} does not pay, and {plan.inputs.hit_rate:.2%} is expected")
    return found


def _overload(plan: Plan) -> list[str]:
    found = []
    for what, share in (("reading", plan.read_utilisation), ("writing", plan.write_utilisation)):
        if share > 1:
            found.append(f"{what} asks for {share:.0%} of what the {plan.drives} drive(s) can do: requests will queue without end")
        elif share > BUSY:
            found.append(f"{what} keeps the drives {share:.0%} busy: loads wait for each other, and TTFT will be above the figure here")
    cores = plan.load.cores_reading + plan.load.cores_writing
    if cores > plan.inputs.cores:
        found.append(f"the store needs {cores:.1f} cores on average and has {plan.inputs.cores:g}")
    if plan.gpu_utilisation_with > 1:
        gpus = plan.gpu_utilisation_with
        found.append(f"prefill alone asks for {gpus:.0%} of one model instance, even with the store: plan for {gpus:.1f} instances or more")
    return found


def _wear(plan: Plan) -> list[str]:
    rated = plan.inputs.drive.writes_per_day
    if plan.drive_writes_per_day <= rated:
        return []
    return [
        f"wear {plan.drive_writes_per_day:.2f} DWPD is above the rated {rated:g}: the drives last {plan.life_years or 0:.1f} years; "
        f"use {plan.needs.wear} drives, larger ones, or write_budget_bytes_per_day"
    ]


def _drives(plan: Plan) -> list[str]:
    if plan.drives >= plan.needs.capacity:
        return []
    return [
        f"{plan.drives} drive(s) hold {plan.drives * plan.inputs.drive.size_bytes / plan.sizes.store_bytes:.0%} of what the horizon needs: "
        f"prefixes will be given up earlier; {plan.needs.capacity} drives hold them"
    ]
