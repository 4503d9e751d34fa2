"""Compression of blocks like a KV cache: what it saves, and what a core does of it against a copy."""

from __future__ import annotations

import time

import numpy as np

from ...format.codec import EncodedStripe, decode_stripe, encode_stripe
from ...format.layout import STRIPE_BYTES_DEFAULT, Codec
from ...gds.buffers import ByteArray
from .figures import Item, abba, ratio_item, value_item
from .setting import Setting
from .workload import MIB

SEED = 7
CHANNELS = 128
ELEMENT_BYTES = 2
DATA_NOTE = "synthetic: bf16, normal with a scale per channel"


def synthetic_kv(size_bytes: int, seed: int = SEED) -> ByteArray:
    """Bytes of bf16 numbers that compress like a KV cache: normal, each of 128 channels with a scale of its own."""
    generator = np.random.default_rng(seed)
    scales = np.exp(generator.normal(0.0, 0.8, CHANNELS)).astype(np.float32)
    rows = size_bytes // (CHANNELS * ELEMENT_BYTES)
    values = generator.standard_normal((rows, CHANNELS), dtype=np.float32) * scales
    upper = (values.view(np.uint32) >> 16).astype("<u2")
    return np.ascontiguousarray(upper).reshape(-1).view(np.uint8)


def measure_codecs(setting: Setting) -> list[Item]:
    """``compression.ratio`` in stored bytes, ``codec.encode`` and ``codec.decode`` on one thread against ``numpy.copyto``."""
    data = synthetic_kv(2 * MIB if setting.quick else 64 * MIB)
    stripes = [data[start : start + STRIPE_BYTES_DEFAULT] for start in range(0, data.size, STRIPE_BYTES_DEFAULT)]
    encoded = [_encode(stripe) for stripe in stripes]
    stored = [np.concatenate([np.frombuffer(part, dtype=np.uint8) for part in stripe.parts]) for stripe in encoded]
    decoded = np.zeros_like(data)
    copied = np.zeros_like(data)
    outs = [decoded[start : start + STRIPE_BYTES_DEFAULT] for start in range(0, data.size, STRIPE_BYTES_DEFAULT)]

    def copy_arm(_: int) -> float:
        started = time.perf_counter()
        np.copyto(copied, data)
        return data.size / (time.perf_counter() - started) / 1e9

    def encode_arm(_: int) -> float:
        started = time.perf_counter()
        for stripe in stripes:
            _encode(stripe)
        return data.size / (time.perf_counter() - started) / 1e9

    def decode_arm(_: int) -> float:
        started = time.perf_counter()
        for part, stripe, out in zip(stored, encoded, outs, strict=True):
            decode_stripe(part, stripe.entry, out, ELEMENT_BYTES)
        return data.size / (time.perf_counter() - started) / 1e9

    decode_arm(0)
    void = None if np.array_equal(decoded, data) else "decoded bytes differ from what was encoded"
    facts = {"data": DATA_NOTE}
    ratio = data.size / sum(stripe.stored_length for stripe in encoded)
    encode_rates = abba(setting.rounds, setting.step("codec.encode", encode_arm), copy_arm)
    decode_rates = abba(setting.rounds, setting.step("codec.decode", decode_arm), copy_arm)
    return [
        value_item("compression.ratio", [ratio], unit="raw/stored", bar=None, facts=facts, void=void),
        ratio_item("codec.encode", *encode_rates, bar=None, facts=facts, void=void),
        ratio_item("codec.decode", *decode_rates, bar=None, facts=facts, void=void),
    ]


def _encode(stripe: ByteArray) -> EncodedStripe:
    return encode_stripe(stripe, Codec.PLANES_ZSTD, ELEMENT_BYTES)
