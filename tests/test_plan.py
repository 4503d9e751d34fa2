"""The formulas of `kvlode plan` against values worked out by hand, and how they must move when their inputs do."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlode.format.errors import InvalidConfig
from kvlode.tools.plan import catalog, formulas
from kvlode.tools.plan.formulas import LoadCost, LoadRates, PrefillCost
from kvlode.tools.plan.inputs import Inputs, gpus_for, parse_share, parse_tokens
from kvlode.tools.plan.plan import Plan, make_plan
from kvlode.tools.plan.verdict import verdict, warnings

GB = 10**9


def inputs(**changes: object) -> Inputs:
    """Llama-3-70B on four H100, one prompt of 32k tokens a second, four fifths of it found."""
    base = Inputs(
        model=catalog.MODELS["llama-3-70b"],
        gpu=catalog.GPUS["h100-sxm"],
        drive=catalog.DRIVES["gen4"],
        gpus=4,
        gpus_given=True,
        drives=1,
        cores=16,
        efficiency=0.5,
        prefill_tokens_per_s=None,
        context_tokens=32768,
        hit_rate=0.8,
        requests_per_s=1,
        new_tokens=6400,
        horizon_s=3600,
        block_tokens=256,
        codec="planes+zstd",
        ratio=1.45,
        encode_bytes_per_s=0.42 * GB,
        decode_bytes_per_s=0.79 * GB,
        write_amplification=1.15,
        notes=(),
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_bytes_of_a_token_by_hand() -> None:
    assert formulas.kv_bytes_per_token(80, 8, 128, 2) == 327_680  # 2 * 80 * 8 * 128 * 2: 320 KiB
    assert formulas.kv_bytes_per_token(32, 8, 128, 1) == 65_536
    assert formulas.latent_bytes_per_token(61, 512, 64, 2) == 70_272  # 61 * 576 * 2
    assert catalog.MODELS["deepseek-v3"].bytes_per_token == 70_272
    assert catalog.MODELS["smollm2-135m"].bytes_per_token == 23_040


def test_prefill_by_hand() -> None:
    assert formulas.flops_per_pair(80, 64, 128, 128) == 2_621_440  # 2 * 80 * 64 * 256
    cost = formulas.prefill_cost(formulas.flops_per_token(70e9), 2_000_000, 1e15)
    assert cost.seconds(1000) == pytest.approx(0.141)  # 1.4e11 * 1000 / 1e15 + 2e6 * 1e6 / 2 / 1e15
    assert cost.seconds(1000, 1000) == pytest.approx(0.143)  # 1e6 pairs more


def test_a_prefill_in_two_parts_costs_what_it_costs_at_once() -> None:
    cost = PrefillCost(1e-5, 3e-9)
    assert cost.seconds(700) + cost.seconds(300, 700) == pytest.approx(cost.seconds(1000))


def test_load_rate_by_hand() -> None:
    rates = formulas.load_rates(
        read_bytes_per_s=5 * GB, ratio=1.5, cores=4, decode_s_per_byte=1 / GB, check_s_per_byte=0.3 / GB, link_bytes_per_s=64 * GB
    )
    assert (rates.drives, rates.link) == (7.5 * GB, 64 * GB)
    assert rates.cores == pytest.approx(4 / 1.2 * GB)  # 1 to decode, 0.3 / 1.5 to check
    assert rates.bytes_per_s == rates.cores and rates.limit == "cores"


def test_break_even_by_hand() -> None:
    assert formulas.break_even_tokens(PrefillCost(3e-5, 0), LoadCost(0.004, 1e-5)) == pytest.approx(200)  # 0.004 / 2e-5
    assert formulas.break_even_tokens(PrefillCost(1e-5, 0), LoadCost(0.004, 3e-5)) is None
    # n^2 - 2 n - 8 = 0
    assert formulas.break_even_tokens(PrefillCost(1, 2), LoadCost(8, 3)) == pytest.approx(4)
    # n^2 + 2 n - 8 = 0
    assert formulas.break_even_tokens(PrefillCost(3, 2), LoadCost(8, 1)) == pytest.approx(2)


def test_drives_and_wear_by_hand() -> None:
    assert formulas.drive_writes_per_day(100e6, 2, 4.32e12) == pytest.approx(1.0)  # 8.64e12 bytes a day on 8.64e12
    assert formulas.life_years(1, 2) == 2.5 and formulas.life_years(1, 0) is None
    assert [formulas.drives_for(demand, 10) for demand in (0, 10, 10.1, 35)] == [1, 1, 2, 4]
    assert formulas.drives_to_beat(1.5, 0.5, 21 * GB, 10 * GB) == 3
    assert formulas.drives_to_beat(0.5, 0.5, GB, GB) is None
    assert formulas.record_bytes(1, 4096) == 8192 and formulas.record_bytes(8192, 4096) == 12_288
    assert formulas.held_bytes(10, 60, 1.5) == 900


def test_a_whole_plan_by_hand() -> None:
    plan = make_plan(inputs(codec="raw"))
    block = 256 * 327_680
    assert plan.sizes.record_bytes == block + 4096 and plan.sizes.blocks_written_per_s == 25
    written = 25 * (block + 4096) * 1.15
    assert plan.sizes.drive_write_bytes_per_s == pytest.approx(written)
    assert plan.sizes.store_bytes == pytest.approx(written * 3600 + plan.sizes.index_bytes + 2 * 32 * block)
    assert plan.drive_writes_per_day == pytest.approx(written * 86_400 / 3.84e12)
    assert plan.load.rates.bytes_per_s == pytest.approx(7 * GB * catalog.READ_SHARE)
    reached = 4 * 989e12 * 0.5
    assert plan.ttft_without_s == pytest.approx((2 * 70.6e9 * 32768 + 2_621_440 * 32768**2 / 2) / reached)
    assert plan.ttft_with_s == pytest.approx(plan.load_hit_s + plan.ttft_without_s - plan.compute_hit_s)


def test_auto_takes_the_codec_that_loads_faster_and_names_the_other() -> None:
    few = make_plan(inputs(codec="auto", drives=1))
    many = make_plan(inputs(codec="auto", drives=8))
    assert (few.load.codec, many.load.codec) == ("planes+zstd", "raw")
    for plan in (few, many):
        assert plan.other is not None and plan.other.load_hit_s >= plan.load_hit_s


def test_a_slow_drive_beside_a_fast_gpu_is_told_to_recompute() -> None:
    plan = make_plan(
        inputs(model=catalog.MODELS["qwen3-8b"], gpu=catalog.GPUS["b200"], drive=catalog.DRIVES["network"], context_tokens=8192, gpus=1)
    )
    assert not plan.loading_pays and plan.break_even_hit_rate is None
    assert verdict(plan).startswith("RECOMPUTE") and "Recomputing is faster" in verdict(plan)
    said = " ".join(warnings(plan))
    assert "recompute instead" in said and "no hit rate pays" in said
    enough = make_plan(dataclasses.replace(plan.inputs, drives=plan.needs.to_beat))
    assert enough.loading_pays, "as many drives as it named"


def test_what_is_too_much_is_said() -> None:
    said = " ".join(warnings(make_plan(inputs(requests_per_s=50, horizon_s=86_400, cores=2))))
    for words in ("wear", "reading asks for", "writing asks for", "cores on average", "instances", "drive(s) hold"):
        assert words in said
    assert not warnings(make_plan(inputs(requests_per_s=0.01, horizon_s=3600, new_tokens=256)))


def test_a_hit_rate_below_the_break_even_is_said() -> None:
    plan = make_plan(inputs(hit_rate=0.001, requests_per_s=0.01))
    assert plan.break_even_hit_rate is not None and plan.inputs.hit_rate < plan.break_even_hit_rate
    assert "does not pay" in " ".join(warnings(plan))


def test_nothing_found_is_no_division_by_zero() -> None:
    plan = make_plan(inputs(hit_rate=0.0))
    assert plan.load_hit_s == 0 and not plan.loading_pays and plan.needs.to_beat is None
    assert "nothing of the context is found" in verdict(plan)


def test_gpus_hold_the_weights() -> None:
    gpu = catalog.GPUS["h100-sxm"]
    assert [gpus_for(catalog.MODELS[name], gpu) for name in ("llama-3-8b", "llama-3-70b", "deepseek-v3")] == [1, 4, 16]


@pytest.mark.parametrize(("text", "tokens"), [("32768", 32768), ("32k", 32768), ("1M", 1_048_576), ("1.5k", 1536)])
def test_tokens_as_context_lengths_are_named(text: str, tokens: int) -> None:
    assert parse_tokens(text, "--context") == tokens


def test_shares_and_what_is_none() -> None:
    assert parse_share("80%") == parse_share("0.8") == 0.8
    for text in ("1.1", "-1", "nan", "", "101%", "x"):
        with pytest.raises(InvalidConfig):
            parse_share(text)
    for text in ("", "0", "-1", "k", "1e3", "\u0661"):
        with pytest.raises(InvalidConfig):
            parse_tokens(text, "--context")


positive = st.floats(1e-9, 1e3)


@given(token=positive, pair=st.just(0.0) | st.floats(1e-12, 1e-3), fixed=st.floats(1e-6, 10), load=positive)
def test_the_break_even_is_where_both_times_are_equal(token: float, pair: float, fixed: float, load: float) -> None:
    prefill, cost = PrefillCost(token, pair), LoadCost(fixed, load)
    tokens = formulas.break_even_tokens(prefill, cost)
    if tokens is None or not math.isfinite(tokens):
        assert pair == 0 and load >= token
        return
    assert prefill.seconds(tokens) == pytest.approx(cost.seconds(tokens), rel=1e-6)
    assert prefill.seconds(2 * tokens) >= cost.seconds(2 * tokens) * (1 - 1e-6), "from there on loading is no slower"


@given(drives=st.floats(1, 1e12), cores=st.floats(1, 1e12), link=st.floats(1, 1e12))
def test_the_slowest_part_decides(drives: float, cores: float, link: float) -> None:
    rates = LoadRates(drives, cores, link)
    assert rates.bytes_per_s == min(drives, cores, link) == getattr(rates, rates.limit)


def figures(plan: Plan) -> dict[str, float]:
    """What more work can only raise, and what better hardware can only lower."""
    return {
        "store": plan.sizes.store_bytes,
        "wear": plan.drive_writes_per_day,
        "drives": plan.needs.drives,
        "cores": plan.load.cores_reading + plan.load.cores_writing,
    }


@settings(max_examples=60)
@given(
    rate=st.floats(0.001, 100),
    new=st.integers(1, 100_000),
    horizon=st.floats(1, 1e7),
    factor=st.floats(1, 50),
    grown=st.sampled_from(["requests_per_s", "new_tokens", "horizon_s", "write_amplification"]),
)
def test_more_work_never_needs_less(rate: float, new: int, horizon: float, factor: float, grown: str) -> None:
    base = inputs(requests_per_s=rate, new_tokens=new, horizon_s=horizon)
    before, after = figures(make_plan(base)), figures(make_plan(dataclasses.replace(base, **{grown: getattr(base, grown) * factor})))
    assert all(after[name] >= before[name] * (1 - 1e-9) for name in before)


@settings(max_examples=60)
@given(
    hit=st.floats(0.01, 1),
    context=st.integers(256, 200_000),
    drives=st.integers(1, 64),
    cores=st.floats(0.5, 128),
    factor=st.integers(1, 9),
)
def test_better_hardware_never_loads_slower(hit: float, context: int, drives: int, cores: float, factor: int) -> None:
    base = inputs(hit_rate=hit, context_tokens=context, drives=drives, cores=cores, codec="auto")
    before = make_plan(base)
    for better in ({"drives": drives * factor}, {"cores": cores * factor}, {"gpus": 4 * factor}):
        after = make_plan(dataclasses.replace(base, **better))  # type: ignore[arg-type]
        assert after.load_hit_s <= before.load_hit_s * (1 + 1e-9)


@settings(max_examples=60)
@given(hits=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_finding_more_never_computes_more(hits: tuple[float, float]) -> None:
    less, more = (make_plan(inputs(hit_rate=hit)) for hit in sorted(hits))
    assert more.compute_rest_s <= less.compute_rest_s + 1e-12
    assert more.gpu_seconds_saved_per_day >= less.gpu_seconds_saved_per_day - 1e-6
