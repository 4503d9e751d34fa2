"""What ``kvlode plan`` computes from: the options as given, read, checked and completed from the catalogue."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from ...format.errors import InvalidConfig
from ..scrub.pace import parse_interval
from ..sizes import parse_size
from . import catalog
from .catalog import Drive, Gpu, Model

_T = TypeVar("_T")
_COUNT = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([kKmMbB]?)", re.ASCII)
_TOKENS = {"": 1, "k": 1024, "m": 1024**2}
_PARAMS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
_BYTES_MIN = 10**6
"""A size or rate below this is a number without its unit."""
MEMORY_SHARE = 0.85
"""Of a GPU's memory that weights may fill where ``--gpus`` is not given: the rest is for the KV cache and activations."""


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, as it was given. Texts have units; ``None`` is not given."""

    model: str | None
    layers: int | None
    kv_heads: int | None
    head_dim: int | None
    heads: int | None
    params: str | None
    dtype_bytes: float | None
    gpu: str
    gpus: int | None
    efficiency: float
    prefill_tokens_per_s: float | None
    drive: str
    drives: int | None
    drive_read: str | None
    drive_write: str | None
    drive_size: str | None
    dwpd: float | None
    context: str
    hit_rate: str
    requests_per_s: float | None
    tokens_per_s: float | None
    new_tokens: str | None
    horizon: str
    block_tokens: int
    codec: str
    ratio: float | None
    encode_rate: str | None
    decode_rate: str | None
    cores: float
    write_amplification: float


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that the formulas need, in base units."""

    model: Model
    gpu: Gpu
    drive: Drive
    gpus: int
    gpus_given: bool
    drives: int | None
    """``None``: as many as the work needs."""
    cores: float
    efficiency: float
    prefill_tokens_per_s: float | None
    context_tokens: int
    hit_rate: float
    requests_per_s: float
    new_tokens: float
    horizon_s: float
    block_tokens: int
    codec: str
    ratio: float
    """Raw by stored bytes with planes+zstd."""
    encode_bytes_per_s: float
    decode_bytes_per_s: float
    write_amplification: float
    notes: tuple[str, ...]
    """What was assumed because it was not given."""


def read_options(options: Options) -> Inputs:
    """Raises ``InvalidConfig`` for the first option that cannot work."""
    notes: list[str] = []
    model = _model(options, notes)
    gpu = _choose(catalog.GPUS, options.gpu, "GPU", "--gpu")
    context_tokens = parse_tokens(options.context, "--context")
    hit_rate = parse_share(options.hit_rate)
    new_tokens = _new_tokens(options, context_tokens, hit_rate, notes)
    return Inputs(
        model=model,
        gpu=gpu,
        drive=_drive(options),
        gpus=_gpus(options, model, gpu, notes),
        gpus_given=options.gpus is not None,
        drives=None if options.drives is None else int(_positive(options.drives, "--drives")),
        cores=_positive(options.cores, "--cores"),
        efficiency=_efficiency(options.efficiency),
        prefill_tokens_per_s=_if_given(options.prefill_tokens_per_s, "--prefill-tokens-per-s"),
        context_tokens=context_tokens,
        hit_rate=hit_rate,
        requests_per_s=_requests_per_s(options, context_tokens),
        new_tokens=new_tokens,
        horizon_s=parse_interval(options.horizon),
        block_tokens=int(_positive(options.block_tokens, "--block-tokens")),
        codec=options.codec,
        ratio=_ratio(options, model, notes),
        encode_bytes_per_s=_rate(options.encode_rate, catalog.ENCODE_BYTES_PER_S, "--encode-rate"),
        decode_bytes_per_s=_rate(options.decode_rate, catalog.DECODE_BYTES_PER_S, "--decode-rate"),
        write_amplification=_at_least_one(options.write_amplification, "--write-amplification"),
        notes=tuple(notes),
    )


def parse_tokens(text: str, option: str) -> int:
    """``32768`` or ``32k``: a k is 1,024 tokens, an M 1,024 k, as context lengths are named."""
    tokens = int(_scaled(text, _TOKENS))
    if tokens < 1:
        raise InvalidConfig(f"{option} is no number of tokens", expected="32768, or 32k (1,024 each)", actual=repr(text))
    return tokens


def parse_share(text: str) -> float:
    """``0.8`` or ``80%``."""
    plain = text.strip()
    try:
        share = float(plain.removesuffix("%")) / (100 if plain.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise InvalidConfig("--hit-rate is no share", expected="0 to 1, or 0% to 100%", actual=repr(text))
    return share


def _scaled(text: str, units: Mapping[str, float]) -> float:
    match = _COUNT.fullmatch(text.strip())
    unit = units.get(match.group(2).lower()) if match else None
    return float(match.group(1)) * unit if match and unit else 0.0


def _model(options: Options, notes: list[str]) -> Model:
    if options.model is not None:
        model = _choose(catalog.MODELS, options.model, "model", "--model")
    else:
        missing = [name for name in ("layers", "kv_heads", "head_dim") if getattr(options, name) is None]
        if missing:
            raise InvalidConfig(
                "no model is given",
                expected="--model NAME, or --layers, --kv-heads and --head-dim",
                actual="without " + ", ".join("--" + name.replace("_", "-") for name in missing),
                action="kvlode plan --list shows the models that it knows; a model's config.json has the numbers.",
            )
        model = Model("from options", 0, 0, 0, None, 0, 0)
    shape = {name: getattr(options, name) for name in ("layers", "kv_heads", "head_dim", "heads", "dtype_bytes")}
    given = {name: value for name, value in shape.items() if value is not None}
    for name, value in given.items():
        _positive(value, "--" + name.replace("_", "-"))
    if model.latent_dim and {"kv_heads", "head_dim", "heads"} & set(given):
        raise InvalidConfig(
            f"{model.name} keeps one latent for all heads",
            expected="none of --kv-heads, --head-dim, --heads",
            actual=", ".join(sorted(given)),
        )
    if options.params is not None:
        params = _scaled(options.params, _PARAMS)
        if params < 1:
            raise InvalidConfig("--params is no number of weights", expected="a count such as 70.6B", actual=repr(options.params))
        given |= {"params": max(params, model.params), "params_active": params}
    model = dataclasses.replace(model, **given)
    _check_compute(options, model, notes)
    return model


def _check_compute(options: Options, model: Model, notes: list[str]) -> None:
    """The time to compute a prefix must come from somewhere."""
    if options.prefill_tokens_per_s is not None:
        notes.append("prefill runs at --prefill-tokens-per-s whatever the length; measure it at about this context")
    elif not model.params_active:
        raise InvalidConfig(
            "the time to compute a prefix is unknown",
            expected="--params (active weights, such as 70.6B) or --prefill-tokens-per-s",
            actual="a model from options with neither",
        )
    else:
        notes.append(f"prefill reaches {options.efficiency:.0%} of the GPUs' peak: an assumption; --prefill-tokens-per-s replaces it")
        if model.heads is None:
            notes.append("attention is left out of the time to compute: --heads (query heads) is not given")


def _drive(options: Options) -> Drive:
    drive = _choose(catalog.DRIVES, options.drive, "drive", "--drive")
    own = (options.drive_read, options.drive_write, options.drive_size, options.dwpd)
    if all(value is None for value in own):
        return drive
    return Drive(
        drive.name + ", changed by options",
        _rate(options.drive_read, drive.read_bytes_per_s, "--drive-read"),
        _rate(options.drive_write, drive.write_bytes_per_s, "--drive-write"),
        _rate(options.drive_size, drive.size_bytes, "--drive-size"),
        drive.writes_per_day if options.dwpd is None else _positive(options.dwpd, "--dwpd"),
        "options, and " + drive.source,
    )


def _gpus(options: Options, model: Model, gpu: Gpu, notes: list[str]) -> int:
    if options.gpus is not None:
        return int(_positive(options.gpus, "--gpus"))
    gpus = gpus_for(model, gpu)
    notes.append(f"{gpus} GPU(s) for one instance: the power of two whose memory has the weights in {MEMORY_SHARE:.0%}; --gpus replaces it")
    return gpus


def gpus_for(model: Model, gpu: Gpu) -> int:
    """GPUs of one instance of the model: the power of two whose memory has the weights in ``MEMORY_SHARE``."""
    needed = model.params * model.weight_bytes / (gpu.memory_bytes * MEMORY_SHARE)
    return 1 << math.ceil(math.log2(needed)) if needed > 1 else 1


def _requests_per_s(options: Options, context_tokens: int) -> float:
    if options.requests_per_s is not None and options.tokens_per_s is not None:
        raise InvalidConfig("the load is given twice", expected="one of --requests-per-s and --tokens-per-s", actual="both")
    if options.tokens_per_s is not None:
        return _positive(options.tokens_per_s, "--tokens-per-s") / context_tokens
    return 1.0 if options.requests_per_s is None else _positive(options.requests_per_s, "--requests-per-s")


def _new_tokens(options: Options, context_tokens: int, hit_rate: float, notes: list[str]) -> float:
    if options.new_tokens is not None:
        return parse_tokens(options.new_tokens, "--new-tokens")
    notes.append("a request leaves as many new tokens to store as it missed; --new-tokens replaces it (answers that are stored count)")
    return context_tokens * (1 - hit_rate)


def _ratio(options: Options, model: Model, notes: list[str]) -> float:
    if options.ratio is not None:
        return _at_least_one(options.ratio, "--ratio")
    if model.dtype_bytes == 2:
        return catalog.RATIO_BF16
    if model.dtype_bytes == 1:
        return catalog.RATIO_FP8
    notes.append("compression of this type is not measured and taken as none; --ratio replaces it")
    return 1.0


def _choose(known: Mapping[str, _T], name: str, what: str, option: str) -> _T:
    found = known.get(name.strip().lower())
    if found is None:
        raise InvalidConfig(f"{option} names an unknown {what}", expected=", ".join(known), actual=repr(name), action="See --list.")
    return found


def _rate(text: str | None, otherwise: float, option: str) -> float:
    if text is None:
        return otherwise
    value = parse_size(text.strip().removesuffix("/s"))
    if value is None or value < _BYTES_MIN:
        raise InvalidConfig(f"{option} cannot be used", expected="a number with its unit, such as 7GB/s or 3.84TB", actual=repr(text))
    return float(value)


def _positive(value: float, option: str) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise InvalidConfig(f"{option} is out of its range", expected="a positive number", actual=value)
    return value


def _if_given(value: float | None, option: str) -> float | None:
    return None if value is None else _positive(value, option)


def _at_least_one(value: float, option: str) -> float:
    if not (value >= 1 and math.isfinite(value)):
        raise InvalidConfig(f"{option} is out of its range", expected=">= 1", actual=value)
    return value


def _efficiency(value: float) -> float:
    if not 0 < value <= 1:
        raise InvalidConfig("--efficiency is out of its range", expected="above 0, at most 1 (a share of the GPUs' peak)", actual=value)
    return value
