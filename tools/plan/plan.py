"""A plan: every figure that follows from the inputs, the drives it needs, and what speaks against it."""

from __future__ import annotations

from dataclasses import dataclass

from ...engine.capacity import BLOCKS_PER_SEGMENT, SEGMENT_DEFAULT_MAX, SEGMENT_DEFAULT_MIN, SEGMENTS_AHEAD
from ...engine.index_entry import ENTRY_BYTES
from ...format.layout import DIGEST_BYTES, PAGE_BYTES
from . import catalog, formulas
from .formulas import LoadCost, LoadRates, PrefillCost
from .inputs import Inputs

KEY_BYTES = 32
"""Of a key in the index: a digest, as engines make them."""
INDEX_FACTOR = 2.2
"""The index may double during compaction (``engine.capacity.Budget``)."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a token and a block take, what is written, and what the store must hold. Bytes; rates a second."""

    kv_bytes_per_token: float
    stored_bytes_per_token: float
    block_raw_bytes: float
    record_bytes: int
    blocks_written_per_s: float
    raw_write_bytes_per_s: float
    drive_write_bytes_per_s: float
    """Records, with what reclaim copies forward."""
    log_bytes: float
    """Unique records of the horizon, with the room that copies take."""
    blocks: float
    index_bytes: float
    segment_bytes: float
    store_bytes: float


@dataclass(frozen=True, slots=True)
class Needs:
    """Drives that each part of the work needs; the largest number decides. ``to_beat``: to load a hit faster than to compute it."""

    capacity: int
    reading: int
    writing: int
    wear: int
    to_beat: int | None

    @property
    def drives(self) -> int:
        """What the work needs; being faster than computing is another matter."""
        return max(self.capacity, self.reading, self.writing, self.wear)


@dataclass(frozen=True, slots=True)
class Load:
    """How fast a hit is loaded with one codec, and the cores that reads and writes keep busy on average."""

    codec: str
    ratio: float
    rates: LoadRates
    cost: LoadCost
    cores_reading: float
    cores_writing: float


@dataclass(frozen=True, slots=True)
class OtherCodec:
    """A codec that loads slower, and may need fewer drives."""

    codec: str
    drives: int
    load_hit_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """All figures; times in seconds. *Hit* is the part of the context that the store has, *rest* what is computed behind it."""

    inputs: Inputs
    sizes: Sizes
    needs: Needs
    drives: int
    load: Load
    other: OtherCodec | None
    """What the codec that ``auto`` did not choose would come to."""
    prefill: PrefillCost
    prefill_tokens_per_s: float
    hit_tokens: float
    rest_tokens: float
    load_hit_s: float
    compute_hit_s: float
    compute_rest_s: float
    ttft_without_s: float
    ttft_with_s: float
    break_even_tokens: float | None
    break_even_hit_rate: float | None
    """Of this context; ``None`` when no share of it pays."""
    read_bytes_per_s: float
    read_utilisation: float
    write_utilisation: float
    gpu_utilisation_without: float
    gpu_utilisation_with: float
    gpu_seconds_saved_per_day: float
    drive_writes_per_day: float
    life_years: float | None

    @property
    def loading_pays(self) -> bool:
        """A hit of this size is loaded no slower than it is computed."""
        return self.hit_tokens > 0 and self.load_hit_s <= self.compute_hit_s


def make_plan(inputs: Inputs) -> Plan:
    """Compute it. Pure: the same inputs, the same plan."""
    prefill = _prefill(inputs)
    hit_tokens = inputs.context_tokens * inputs.hit_rate
    choices = []
    for codec in ("planes+zstd", "raw") if inputs.codec == "auto" else (inputs.codec,):
        ratio = 1.0 if codec == "raw" else inputs.ratio
        sizes = _sizes(inputs, ratio)
        needs = _needs(inputs, sizes, prefill, hit_tokens)
        drives = inputs.drives or needs.drives
        choices.append((sizes, needs, drives, _load(inputs, codec, ratio, drives)))
    # Of two that load a whole context equally fast the first one: it writes less.
    choices.sort(key=lambda parts: parts[3].cost.seconds(inputs.context_tokens))
    other = OtherCodec(choices[1][3].codec, choices[1][2], choices[1][3].cost.seconds(hit_tokens)) if choices[1:] else None
    sizes, needs, drives, load = choices[0]
    return _figures(inputs, sizes, needs, drives, load, other, prefill, hit_tokens)


def _prefill(inputs: Inputs) -> PrefillCost:
    if inputs.prefill_tokens_per_s is not None:
        return PrefillCost(1 / inputs.prefill_tokens_per_s, 0.0)
    reached = inputs.gpus * inputs.gpu.flops_per_s * inputs.efficiency
    return formulas.prefill_cost(formulas.flops_per_token(inputs.model.params_active), inputs.model.flops_per_pair, reached)


def _sizes(inputs: Inputs, ratio: float) -> Sizes:
    per_token = inputs.model.bytes_per_token
    block_raw = per_token * inputs.block_tokens
    record = formulas.record_bytes(block_raw / ratio, PAGE_BYTES)
    blocks_per_s = inputs.requests_per_s * inputs.new_tokens / inputs.block_tokens
    log = formulas.held_bytes(blocks_per_s * record, inputs.horizon_s, inputs.write_amplification)
    blocks = log / record
    index = INDEX_FACTOR * blocks * (DIGEST_BYTES + KEY_BYTES + ENTRY_BYTES)
    segment = min(max(BLOCKS_PER_SEGMENT * block_raw, SEGMENT_DEFAULT_MIN), SEGMENT_DEFAULT_MAX)
    return Sizes(
        kv_bytes_per_token=per_token,
        stored_bytes_per_token=per_token / ratio,
        block_raw_bytes=block_raw,
        record_bytes=record,
        blocks_written_per_s=blocks_per_s,
        raw_write_bytes_per_s=blocks_per_s * block_raw,
        drive_write_bytes_per_s=blocks_per_s * record * inputs.write_amplification,
        log_bytes=log,
        blocks=blocks,
        index_bytes=index,
        segment_bytes=segment,
        store_bytes=log + index + SEGMENTS_AHEAD * segment,
    )


def _needs(inputs: Inputs, sizes: Sizes, prefill: PrefillCost, hit_tokens: float) -> Needs:
    drive = inputs.drive
    read_of_one = drive.read_bytes_per_s * catalog.READ_SHARE
    stored = hit_tokens * sizes.stored_bytes_per_token
    lookup_s = catalog.LOAD_FIXED_S + hit_tokens / inputs.block_tokens * catalog.LOOKUP_S_PER_BLOCK
    return Needs(
        capacity=formulas.drives_for(sizes.store_bytes, drive.size_bytes),
        reading=formulas.drives_for(inputs.requests_per_s * stored, read_of_one),
        writing=formulas.drives_for(sizes.drive_write_bytes_per_s, drive.write_bytes_per_s * catalog.WRITE_SHARE),
        wear=formulas.drives_for(sizes.drive_write_bytes_per_s * formulas.DAY_S, drive.size_bytes * drive.writes_per_day),
        to_beat=formulas.drives_to_beat(prefill.seconds(hit_tokens), lookup_s, stored, read_of_one) if hit_tokens else None,
    )


def _load(inputs: Inputs, codec: str, ratio: float, drives: int) -> Load:
    decode_s = 0.0 if codec == "raw" else 1 / inputs.decode_bytes_per_s
    encode_s = 0.0 if codec == "raw" else 1 / inputs.encode_bytes_per_s
    rates = formulas.load_rates(
        read_bytes_per_s=drives * inputs.drive.read_bytes_per_s * catalog.READ_SHARE,
        ratio=ratio,
        cores=inputs.cores,
        decode_s_per_byte=decode_s,
        check_s_per_byte=catalog.READ_CORE_S_PER_BYTE,
        link_bytes_per_s=inputs.gpus * inputs.gpu.link_bytes_per_s,
    )
    per_token = inputs.model.bytes_per_token
    token_s = per_token / rates.bytes_per_s + catalog.LOOKUP_S_PER_BLOCK / inputs.block_tokens
    raw_read = inputs.requests_per_s * inputs.context_tokens * inputs.hit_rate * per_token
    raw_written = inputs.requests_per_s * inputs.new_tokens * per_token
    return Load(
        codec,
        ratio,
        rates,
        LoadCost(catalog.LOAD_FIXED_S, token_s),
        cores_reading=raw_read * (decode_s + catalog.READ_CORE_S_PER_BYTE / ratio),
        cores_writing=raw_written * (encode_s + catalog.WRITE_CORE_S_PER_BYTE / ratio),
    )


def _figures(
    inputs: Inputs,
    sizes: Sizes,
    needs: Needs,
    drives: int,
    load: Load,
    other: OtherCodec | None,
    prefill: PrefillCost,
    hit_tokens: float,
) -> Plan:
    context, drive = inputs.context_tokens, inputs.drive
    rest_tokens = context - hit_tokens
    without_s, rest_s, load_s = prefill.seconds(context), prefill.seconds(rest_tokens, hit_tokens), load.cost.seconds(hit_tokens)
    even = formulas.break_even_tokens(prefill, load.cost)
    read_bytes_per_s = inputs.requests_per_s * hit_tokens * sizes.stored_bytes_per_token
    per_day = formulas.drive_writes_per_day(sizes.drive_write_bytes_per_s, drives, drive.size_bytes)
    return Plan(
        inputs=inputs,
        sizes=sizes,
        needs=needs,
        drives=drives,
        load=load,
        other=other,
        prefill=prefill,
        prefill_tokens_per_s=context / without_s,
        hit_tokens=hit_tokens,
        rest_tokens=rest_tokens,
        load_hit_s=load_s,
        compute_hit_s=prefill.seconds(hit_tokens),
        compute_rest_s=rest_s,
        ttft_without_s=without_s,
        ttft_with_s=load_s + rest_s,
        break_even_tokens=even,
        break_even_hit_rate=None if even is None or even > context else even / context,
        read_bytes_per_s=read_bytes_per_s,
        read_utilisation=read_bytes_per_s / (drives * drive.read_bytes_per_s * catalog.READ_SHARE),
        write_utilisation=sizes.drive_write_bytes_per_s / (drives * drive.write_bytes_per_s * catalog.WRITE_SHARE),
        gpu_utilisation_without=inputs.requests_per_s * without_s,
        gpu_utilisation_with=inputs.requests_per_s * rest_s,
        gpu_seconds_saved_per_day=inputs.requests_per_s * (without_s - rest_s) * inputs.gpus * formulas.DAY_S,
        drive_writes_per_day=per_day,
        life_years=formulas.life_years(drive.writes_per_day, per_day),
    )
