"""The bench's items about real KV: what the blocks are, what the codec's rates are of, and what limits a figure. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from kvlode.format.layout import Codec
from kvlode.tools.bench import codecs, drive_kv, real_kv
from kvlode.tools.bench.codec_rates import CodecRates
from kvlode.tools.bench.kv_model import DTYPES, FLOAT8_MAX, blocks_of
from kvlode.tools.bench.real_kv import BFLOAT16, FLOAT8, QUICK_BLOCK_TOKENS, RealKv
from kvlode.tools.bench.setting import Setting

MIB = 1 << 20
SHAPES = [6, 2, 64, 2, 64]
DISTINCT = 3


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(str(tmp_path), size_bytes=2 * MIB, rounds=2, quick=True, console=Console(quiet=True))


@pytest.fixture
def kv(setting: Setting) -> RealKv:
    """A run whose blocks were computed already: normal numbers, each channel with a scale of its own, which compress like KV."""
    generator = np.random.default_rng(7)
    layers, heads, dim = SHAPES[0], SHAPES[1], SHAPES[2]
    scales = np.exp(generator.normal(0.0, 0.8, dim)).astype(np.float32)
    values = generator.standard_normal((DISTINCT, layers * 2 * heads * QUICK_BLOCK_TOKENS, dim), dtype=np.float32) * scales
    folder = Path(setting.folder("real-kv"))
    folder.mkdir()
    upper = (values.view(np.uint32) >> 16).astype("<u2")
    (folder / "bfloat16.kv").write_bytes(upper.tobytes())
    (folder / "float8_e4m3fn.kv").write_bytes((upper >> 8).astype(np.uint8).tobytes())
    facts = {"model": "made-up", "revision": "1", "shapes": SHAPES, "block_tokens": QUICK_BLOCK_TOKENS}
    (folder / real_kv.FACTS_FILE).write_text(json.dumps(facts))
    found = real_kv.real_kv(setting)
    assert isinstance(found, RealKv)
    return found


# --- blocks ----------------------------------------------------------------------------------------------------------


def _cache(tokens: int) -> tuple[Any, Any]:
    """A tiny model with random weights, and what it computes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=0)).eval()
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.arange(tokens)[None] % 32, past_key_values=cache)
    return model, cache


def test_blocks_are_those_that_the_transformers_adapter_stores() -> None:
    from kvlode.adapters.transformers_layout import LAYOUT, Geometry

    model, cache = _cache(19)
    geometry = Geometry.of(model.bfloat16(), 8)
    pairs = [(layer.keys.bfloat16(), layer.values.bfloat16()) for layer in cache.layers]
    found = [block.tobytes() for block in blocks_of(cache, 8, "bfloat16")]
    import torch

    expected = [geometry.parts(iter(pairs), 0, start) for start in (0, 8)]
    assert found == [b"".join(part.view(torch.uint8).numpy().tobytes() for part in parts) for parts in expected]
    assert len(found[0]) == geometry.block_bytes and real_kv.LAYOUT == LAYOUT


def test_numbers_beyond_the_range_of_float8_become_its_largest() -> None:
    import torch

    _, cache = _cache(8)
    cache.layers[0].keys.fill_(1e4)
    (block,) = blocks_of(cache, 8, "float8_e4m3fn")
    numbers = torch.from_numpy(block.copy()).view(torch.float8_e4m3fn).float()
    assert numbers.max().item() == FLOAT8_MAX and not numbers.isnan().any()


def test_a_namespace_of_real_kv_has_a_stripe_for_each_layer(kv: RealKv) -> None:
    for dtype, element_bytes in zip(DTYPES, (2, 1), strict=True):
        namespace = kv.namespace(dtype)
        assert namespace.layer_bytes == element_bytes * QUICK_BLOCK_TOKENS * 2 * 2 * 64
        assert namespace.block_bytes_max == SHAPES[0] * namespace.layer_bytes and namespace.dtype == dtype


def test_few_distinct_blocks_are_repeated_under_other_keys(kv: RealKv) -> None:
    blocks = kv.blocks(BFLOAT16, 2 * MIB)
    assert (blocks.distinct, blocks.count) == (DISTINCT, 2 * MIB // blocks.block_bytes)
    assert not np.array_equal(blocks[0].copy(), blocks[DISTINCT].copy()) and blocks.is_block(DISTINCT, blocks[DISTINCT])
    assert kv.facts(blocks)["distinct_bytes"] == DISTINCT * blocks.block_bytes
    assert kv.blocks(FLOAT8, 0).count == DISTINCT


@pytest.mark.parametrize("absent", ["transformers", "weights"])
def test_what_real_kv_needs_is_named_where_it_is_missing(setting: Setting, monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    if absent == "transformers":
        monkeypatch.setattr(real_kv, "PACKAGES", ("torch", "no_such_package"))
    else:
        monkeypatch.setattr("kvlode.tools.demo_model.PACKAGE", "no_such_package")
    items = codecs.measure(setting, {"codec_core", "compression_ratio"}) + drive_kv.measure(setting, {"read_kv"})
    assert [(item.name, item.state) for item in items] == [(name, "skipped") for name in ("compression_ratio", "codec_core", "read_kv")]
    assert all(item.reason is not None and "pip install" in item.reason for item in items)


def test_a_model_that_cannot_be_loaded_skips_the_items_and_says_so(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step fails in its own process, as when the folder of converted models cannot be written."""
    monkeypatch.setattr(real_kv, "_missing", lambda: None)
    monkeypatch.setattr(real_kv, "events_of", lambda process: iter([]))
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr("sys.executable", "/bin/false")
    (item,) = drive_kv.measure(setting, {"write_kv"})
    assert item.state == "skipped" and item.reason == "the process that computes real KV ended early with exit code 1"


@pytest.mark.slow
def test_real_kv_is_computed_once_and_compresses(setting: Setting) -> None:
    kv = real_kv.real_kv(setting)
    if isinstance(kv, str):
        pytest.skip(kv)
    blocks = kv.blocks(BFLOAT16, 0)
    assert blocks.count == 8 and kv.shapes == (30, 3, 64, 3, 64)
    assert CodecRates(blocks, threads=1).ratio > 1.4
    written = (kv.folder / "bfloat16.kv").stat().st_mtime_ns
    assert real_kv.real_kv(setting) == kv and (kv.folder / "bfloat16.kv").stat().st_mtime_ns == written


# --- the codec -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_codec_rates_are_of_every_block_and_check_what_was_decoded(kv: RealKv, threads: int) -> None:
    rates = CodecRates(kv.blocks(BFLOAT16, 0), threads=threads)
    assert rates.codec is Codec.PLANES_ZSTD and rates.ratio > 1.2
    assert rates.differs() is not None  # nothing was decoded yet
    assert rates.encode_rate() > 0 and rates.decode_rate() > 0
    assert rates.differs() is None
    rates._decoded[DISTINCT - 1, -1] ^= 1
    assert rates.differs() == "decoded bytes differ from what was encoded"


def test_the_codec_is_measured_as_a_ratio_and_as_rates_of_one_core(setting: Setting, kv: RealKv) -> None:
    items = {item.name: item for item in codecs.measure(setting, {"compression_ratio", "codec_core"})}
    core = ("codec_core.encode", "codec_core.encode_memcpy", "codec_core.decode", "codec_core.decode_memcpy")
    assert set(items) == {"compression_ratio", "compression_ratio.fp8", *core}
    assert {name for name, item in items.items() if item.bar is not None} == {"compression_ratio", "codec_core.encode", "codec_core.decode"}
    assert all(item.state in ("ok", "unresolved") and item.figure is not None and item.figure > 0 for item in items.values())
    assert [item.name for item in codecs.measure(setting, {"compression_ratio"})] == ["compression_ratio", "compression_ratio.fp8"]


# --- the drive -------------------------------------------------------------------------------------------------------


def test_the_limit_is_the_smaller_one_of_drive_and_cores_in_each_round() -> None:
    device, cores = iter([1.0, 2.0]), iter([2.0, 2.0])
    limit = drive_kv._Limit(lambda _: next(device), lambda: next(cores), 1.5)
    assert [limit(0), limit(1)] == [1.5, 2.0]
    facts = {"device_GB_s": 1.5, "cores_GB_s": 2.0, "codec_ratio": 1.5, "rounds_bound_by_device": 1}
    assert limit.facts() == facts and limit.device_rates == [1.0, 2.0]


def test_real_kv_is_written_and_read_in_raw_bytes_against_drive_and_cores(setting: Setting, kv: RealKv) -> None:
    items = {item.name: item for item in drive_kv.measure(setting, {"write_kv", "read_kv"})}
    bars = {name: item.bar.value for name, item in items.items() if item.bar is not None}
    assert set(items) == {"write_kv", "write_kv.fp8", "read_kv.device", "read_kv.limit", "read_kv.fp8_device", "read_kv.fp8_limit"}
    assert bars == {"write_kv": 0.85, "read_kv.device": 1.25, "read_kv.limit": 0.85}
    for item in items.values():
        assert item.state in ("ok", "unresolved") or "not cold" in str(item.reason), item
        assert item.absolute["distinct_bytes"] == DISTINCT * item.absolute["block_bytes"]
    written = items["write_kv"].absolute
    assert written["stored_ratio"] > 1.2 and written["bytes"] == kv.blocks(BFLOAT16, 2 * MIB).total_bytes
    assert sum(written["io_bytes"].values()) < written["bytes"]
    assert not Path(setting.folder("read")).exists() and not Path(setting.folder("write")).exists()
