"""The command line of ``kvlode plan``; formulas and catalogue are in ``tools.plan`` and imported when they are used."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer


class PlanCodec(StrEnum):
    """How blocks are stored in a plan."""

    auto = "auto"
    raw = "raw"
    planes = "planes+zstd"


def _option(text: str, metavar: str | None = None) -> Any:
    return typer.Option(help=text, metavar=metavar, show_default=False)


def plan(
    model: Annotated[str | None, _option("A model of --list; the options below replace its figures.", "NAME")] = None,
    layers: Annotated[int | None, _option("Layers that keep the KV of every token.")] = None,
    kv_heads: Annotated[int | None, _option("KV heads of a layer.")] = None,
    head_dim: Annotated[int | None, _option("Elements of a head.")] = None,
    heads: Annotated[int | None, _option("Query heads of a layer, for the cost of attention.")] = None,
    params: Annotated[str | None, _option("Active weights, such as 70.6B.", "COUNT")] = None,
    dtype_bytes: Annotated[float | None, _option("Bytes of an element of the KV cache: 2 for bf16, 1 for fp8.")] = None,
    context: Annotated[str, typer.Option(help="Tokens of a prompt; a k is 1,024.", metavar="TOKENS")] = "32k",
    hit_rate: Annotated[str, typer.Option(help="Share of a prompt that the store has.", metavar="SHARE")] = "80%",
    requests_per_s: Annotated[float | None, _option("Requests to one model instance (default: 1).")] = None,
    tokens_per_s: Annotated[float | None, _option("The same as prompt tokens a second.")] = None,
    new_tokens: Annotated[str | None, _option("Tokens a request adds that no earlier one had (default: what it missed).", "TOKENS")] = None,
    horizon: Annotated[str, typer.Option(help="How long a prefix shall live: 30min, 12h, 7d.", metavar="TIME")] = "1d",
    block_tokens: Annotated[int, typer.Option(help="Tokens of a block.")] = 256,
    gpu: Annotated[str, typer.Option(help="A GPU of --list.", metavar="NAME")] = "h100-sxm",
    gpus: Annotated[int | None, _option("GPUs of one model instance (default: what its weights need).")] = None,
    efficiency: Annotated[float, typer.Option(help="Share of the GPUs' peak that prefill reaches.")] = 0.5,
    prefill_tokens_per_s: Annotated[float | None, _option("Measured prefill of one instance, instead of GPU and efficiency.")] = None,
    drive: Annotated[str, typer.Option(help="A class of drives of --list.", metavar="NAME")] = "gen4",
    drives: Annotated[int | None, _option("Drives, striped as a store set (default: what the work needs).")] = None,
    drive_read: Annotated[str | None, _option("Reading rate of a drive, such as 7GB/s.", "RATE")] = None,
    drive_write: Annotated[str | None, _option("Writing rate of a drive.", "RATE")] = None,
    drive_size: Annotated[str | None, _option("Size of a drive, such as 3.84TB.", "SIZE")] = None,
    dwpd: Annotated[float | None, _option("Rated drive writes a day over five years.")] = None,
    codec: Annotated[PlanCodec, typer.Option(help="How blocks are stored; auto: what loads faster.")] = PlanCodec.auto,
    ratio: Annotated[float | None, _option("Raw by stored bytes with planes+zstd (default: 1.45 for 2 bytes, 1.19 for 1).")] = None,
    encode_rate: Annotated[str | None, _option("Raw bytes that a core encodes a second.", "RATE")] = None,
    decode_rate: Annotated[str | None, _option("Raw bytes that a core decodes a second.", "RATE")] = None,
    cores: Annotated[float, typer.Option(help="Cores that the store may use.")] = 16,
    write_amplification: Annotated[float, typer.Option(help="Bytes written by bytes of new blocks.")] = 1.15,
    compare: Annotated[bool, typer.Option("--compare", help="The break-even for every GPU and class of drives too.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Each formula with its numbers.")] = False,
    show_list: Annotated[bool, typer.Option("--list", help="The models, GPUs and drives that are known, with sources.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")] = False,
) -> None:
    """Plan a store: size, wear, drives, cores, time to first token, and from which length on loading beats computing.

    From stated formulas and the measured figures of docs/performance.md; docs/plan.md explains. Measures nothing.
    """
    given = {name: value for name, value in locals().items() if name not in ("compare", "explain", "show_list", "as_json")}
    from .plan.inputs import Options, read_options
    from .plan.show import list_catalog, show_plan

    if show_list:
        list_catalog(as_json=as_json)
        return
    given["codec"] = codec.value
    show_plan(read_options(Options(**given)), as_json=as_json, explained=explain, compare=compare)
