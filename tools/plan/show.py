"""How a plan is shown: facts and tables for people, one JSON object for scripts, and the catalogue."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console

from ..output import bytes_text, make_console, make_table, print_facts, print_json, print_table
from . import catalog
from .explain import explain
from .inputs import Inputs, gpus_for
from .plan import Plan, make_plan
from .verdict import seconds_text, verdict, warnings

GB = catalog.GB


def show_plan(inputs: Inputs, *, as_json: bool, explained: bool, compare: bool) -> None:
    """Print the plan of these inputs; with ``compare`` also the break-even for each GPU and class of drives."""
    plan = make_plan(inputs)
    others = [make_plan(other) for other in _others(inputs)] if compare else []
    if as_json:
        print_json(as_object(plan) | ({"compare": [_compared(other) for other in others]} if compare else {}))
        return
    console = make_console()
    _print_plan(console, plan)
    if compare:
        _print_compared(console, others)
    if explained:
        _print_explained(console, plan)


def as_object(plan: Plan) -> dict[str, Any]:
    """Inputs and every figure, in base units; rates and times say so in their names."""
    figures = dataclasses.asdict(plan)
    figures["inputs"]["model"]["bytes_per_token"] = plan.inputs.model.bytes_per_token
    figures["load"]["rates"] |= {"bytes_per_s": plan.load.rates.bytes_per_s, "limit": plan.load.rates.limit}
    figures["needs"]["drives"] = plan.needs.drives
    answer = {"loading_pays": plan.loading_pays, "verdict": verdict(plan), "warnings": warnings(plan), "measured_on": catalog.MEASURED_ON}
    formulas = [dataclasses.asdict(line) for line in explain(plan)]
    return answer | figures | {"formulas": formulas}


def list_catalog(*, as_json: bool) -> None:
    """Print the models, GPUs and drives with their sources."""
    if as_json:
        models = [dataclasses.asdict(model) | {"bytes_per_token": model.bytes_per_token} for model in catalog.MODELS.values()]
        gpus, drives = ([dataclasses.asdict(thing) for thing in things.values()] for things in (catalog.GPUS, catalog.DRIVES))
        print_json({"models": models, "gpus": gpus, "drives": drives})
        return
    console = make_console()
    numbers = ("layers", "KV heads", "head dim", "params", "active", "KV a token")
    table = make_table("model", *numbers, "source", right=numbers)
    for model in catalog.MODELS.values():
        heads = ("latent", str(model.latent_dim + model.rope_dim)) if model.latent_dim else (str(model.kv_heads), str(model.head_dim))
        sizes = (f"{model.params / 1e9:.4g} B", f"{model.params_active / 1e9:.4g} B", bytes_text(model.bytes_per_token))
        table.add_row(model.name, str(model.layers), *heads, *sizes, model.source)
    print_table(console, table)
    console.print()
    table = make_table("GPU", "bf16, dense", "memory", "link", "source", right=("bf16, dense", "memory", "link"))
    for gpu in catalog.GPUS.values():
        figures = (f"{gpu.flops_per_s / 1e12:g} TFLOP/s", f"{gpu.memory_bytes / GB:g} GB", f"{gpu.link_bytes_per_s / GB:g} GB/s")
        table.add_row(gpu.name, *figures, gpu.source)
    print_table(console, table)
    console.print()
    table = make_table("drive", "read", "write", "size", "DWPD", "source", right=("read", "write", "size", "DWPD"))
    for drive in catalog.DRIVES.values():
        rates = (f"{drive.read_bytes_per_s / GB:g} GB/s", f"{drive.write_bytes_per_s / GB:g} GB/s", f"{drive.size_bytes / 1e12:g} TB")
        table.add_row(drive.name, *rates, f"{drive.writes_per_day:g}", drive.source)
    print_table(console, table)


def _print_plan(console: Console, plan: Plan) -> None:
    inputs, sizes, load = plan.inputs, plan.sizes, plan.load
    console.print(verdict(plan), style="bold", soft_wrap=True)
    console.print()
    facts = [
        ("model", f"{inputs.model.name}: {_sized(sizes.kv_bytes_per_token)} of KV a token, {_sized(sizes.stored_bytes_per_token)} stored"),
        ("GPUs", f"{inputs.gpus} x {inputs.gpu.name}, prefill {plan.prefill_tokens_per_s:,.0f} tokens/s at this context"),
        ("drives", f"{plan.drives} x {inputs.drive.name}{'' if inputs.drives else ' (what the work needs)'}"),
        ("requests", f"{inputs.requests_per_s:.4g} a second of {inputs.context_tokens:,} tokens, {inputs.hit_rate:.2%} found"),
        ("codec", f"{load.codec}, ratio {load.ratio:g}{_other_text(plan)}"),
        ("time to first token", f"{seconds_text(plan.ttft_with_s)} with the store, {seconds_text(plan.ttft_without_s)} without"),
        (
            "load of a hit",
            f"{seconds_text(plan.load_hit_s)}, {load.rates.bytes_per_s / GB:.2f} GB/s of raw KV, limited by {load.rates.limit}",
        ),
        ("computing it", seconds_text(plan.compute_hit_s)),
        ("break-even", _break_even_text(plan)),
        ("GPU time saved", f"{plan.gpu_seconds_saved_per_day / 3600:,.1f} GPU hours a day"),
        ("store", f"{_sized(sizes.store_bytes)} for {inputs.horizon_s / 3600:g} h"),
        ("blocks", f"{sizes.blocks:,.0f} of {_sized(sizes.block_raw_bytes)}"),
        ("writes", f"{sizes.drive_write_bytes_per_s / GB:.3f} GB/s, {plan.write_utilisation:.0%} of the drives"),
        ("reads", f"{plan.read_bytes_per_s / GB:.3f} GB/s, {plan.read_utilisation:.0%} of the drives"),
        ("wear", f"{plan.drive_writes_per_day:.2f} DWPD of {inputs.drive.writes_per_day:g} rated" + _life_text(plan)),
        ("cores, on average", f"{load.cores_reading:.2f} for reads, {load.cores_writing:.2f} for writes, of {inputs.cores:g}"),
    ]
    print_facts(console, facts)
    console.print()
    _print_needs(console, plan)
    for warning in warnings(plan):
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    for note in inputs.notes:
        console.print(f"assumed: {note}", soft_wrap=True)


def _print_needs(console: Console, plan: Plan) -> None:
    names = ("capacity", "reading", "writing", "wear", "to beat computing")
    table = make_table("drives needed for", *names, right=names)
    needs = plan.needs
    to_beat = "-" if needs.to_beat is None else str(needs.to_beat)
    table.add_row(plan.inputs.drive.name, str(needs.capacity), str(needs.reading), str(needs.writing), str(needs.wear), to_beat)
    print_table(console, table)


def _print_compared(console: Console, plans: list[Plan]) -> None:
    console.print()
    numbers = ("drives", "break-even", "load of a hit", "computing it")
    table = make_table("GPUs", "drive", *numbers, "limit", "faster", right=numbers)
    for plan in plans:
        even = "never" if plan.break_even_tokens is None else f"{plan.break_even_tokens:,.0f} tokens"
        times = (seconds_text(plan.load_hit_s), seconds_text(plan.compute_hit_s))
        answer = "load" if plan.loading_pays else "recompute"
        gpus = f"{plan.inputs.gpus} x {plan.inputs.gpu.name}"
        table.add_row(gpus, plan.inputs.drive.name, str(plan.drives), even, *times, plan.load.rates.limit, answer)
    print_table(console, table)


def _print_explained(console: Console, plan: Plan) -> None:
    console.print()
    for line in explain(plan):
        console.print(line.name, style="bold")
        console.print(f"  {line.formula}", soft_wrap=True)
        console.print(f"  {line.numbers}", soft_wrap=True)
    console.print(f"Measured figures: {catalog.MEASURED_ON}.", soft_wrap=True)
    console.print(f"Model: {plan.inputs.model.source}. GPU: {plan.inputs.gpu.source}. Drive: {plan.inputs.drive.source}.", soft_wrap=True)


def _others(inputs: Inputs) -> list[Inputs]:
    """The same work with every GPU and class of drives: as many GPUs as the weights need, and one drive, where options do not say."""
    return [
        dataclasses.replace(
            inputs, gpu=gpu, drive=drive, gpus=inputs.gpus if inputs.gpus_given else gpus_for(inputs.model, gpu), drives=inputs.drives or 1
        )
        for gpu in catalog.GPUS.values()
        for drive in catalog.DRIVES.values()
    ]


def _compared(plan: Plan) -> dict[str, Any]:
    return {
        "gpu": plan.inputs.gpu.name,
        "gpus": plan.inputs.gpus,
        "drive": plan.inputs.drive.name,
        "drives": plan.drives,
        "break_even_tokens": plan.break_even_tokens,
        "load_hit_s": plan.load_hit_s,
        "compute_hit_s": plan.compute_hit_s,
        "limit": plan.load.rates.limit,
        "loading_pays": plan.loading_pays,
    }


def _break_even_text(plan: Plan) -> str:
    if plan.break_even_tokens is None:
        return "none: computing is faster at every length"
    tokens = plan.break_even_tokens
    both = f"{seconds_text(plan.load.cost.seconds(tokens))} to load, {seconds_text(plan.prefill.seconds(tokens))} to compute"
    if plan.break_even_hit_rate is None:
        return f"{tokens:,.0f} tokens ({both}): more than this context"
    return f"{tokens:,.0f} tokens ({both}), {plan.break_even_hit_rate:.2%} of this context"


def _other_text(plan: Plan) -> str:
    other = plan.other
    return "" if other is None else f" ({other.codec}: {other.drives} drive(s), a hit in {seconds_text(other.load_hit_s)})"


def _life_text(plan: Plan) -> str:
    return "" if plan.life_years is None else f", {plan.life_years:.3g} years at this rate"


def _sized(size_bytes: float) -> str:
    """Binary units, as the store counts; above a GB also decimal ones, as drives are sold."""
    binary = bytes_text(size_bytes)
    return f"{binary} ({size_bytes / GB:,.1f} GB)" if size_bytes >= GB else binary
