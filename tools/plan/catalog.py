"""Models, GPUs and drives that ``kvlode plan`` knows, each with where its figures are published, and what was measured of the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from . import formulas

GB = 10**9
TB = 10**12


@dataclass(frozen=True, slots=True)
class Model:
    """What decides the size of a model's KV cache and the time to compute it."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    heads: int | None
    """Query heads; ``None`` when unknown: attention is then left out of the time to compute."""
    params: float
    params_active: float
    """Weights that one token meets: fewer than ``params`` for mixtures of experts. 0 when unknown."""
    dtype_bytes: float = 2
    """Bytes of an element of the KV cache as engines keep it by default."""
    weight_bytes: float = 2
    """Bytes of a weight as published."""
    latent_dim: int = 0
    """``kv_lora_rank`` of multi-head latent attention; 0 for others."""
    rope_dim: int = 0
    query_dim: int = 0
    """Where query and key differ from ``head_dim``; 0 where they do not."""
    source: str = "options"

    @property
    def bytes_per_token(self) -> float:
        """Bytes of KV of one token, over all layers."""
        if self.latent_dim:
            return formulas.latent_bytes_per_token(self.layers, self.latent_dim, self.rope_dim, self.dtype_bytes)
        return formulas.kv_bytes_per_token(self.layers, self.kv_heads, self.head_dim, self.dtype_bytes)

    @property
    def flops_per_pair(self) -> float:
        return formulas.flops_per_pair(self.layers, self.heads or 0, self.query_dim or self.head_dim, self.head_dim)


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peak of dense bf16 (not the figure with sparsity), memory, and one direction of its link to the host, as published."""

    name: str
    flops_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    source: str


@dataclass(frozen=True, slots=True)
class Drive:
    """A class of NVMe drives, sequential rates, or what options say."""

    name: str
    read_bytes_per_s: float
    write_bytes_per_s: float
    size_bytes: float
    writes_per_day: float
    """Rated drive writes per day over five years."""
    source: str


def _hub(repository: str) -> str:
    return f"huggingface.co/{repository}, config.json"


def _dense(name: str, layers: int, kv_heads: int, head_dim: int, heads: int, billions: float, repository: str) -> Model:
    return Model(name, layers, kv_heads, head_dim, heads, billions * 1e9, billions * 1e9, source=_hub(repository))


def _sparse(name: str, layers: int, kv_heads: int, heads: int, billions: tuple[float, float], repository: str) -> Model:
    """Mixtures of experts with heads of 128: all and active weights, in billions, are from the model card."""
    return Model(name, layers, kv_heads, 128, heads, billions[0] * 1e9, billions[1] * 1e9, source=_hub(repository) + " and model card")


def _by_name(*things: Model) -> Mapping[str, Model]:
    return {thing.name: thing for thing in things}


MODELS = _by_name(
    _dense("smollm2-135m", 30, 3, 64, 9, 0.1345, "HuggingFaceTB/SmolLM2-135M-Instruct"),
    _dense("mistral-7b", 32, 8, 128, 32, 7.25, "mistralai/Mistral-7B-v0.3"),
    _dense("qwen2.5-7b", 28, 4, 128, 28, 7.62, "Qwen/Qwen2.5-7B"),
    _dense("llama-3-8b", 32, 8, 128, 32, 8.03, "meta-llama/Meta-Llama-3-8B"),
    _dense("qwen3-8b", 36, 8, 128, 32, 8.19, "Qwen/Qwen3-8B"),
    _dense("qwen3-32b", 64, 8, 128, 64, 32.8, "Qwen/Qwen3-32B"),
    _dense("llama-3-70b", 80, 8, 128, 64, 70.6, "meta-llama/Meta-Llama-3-70B"),
    _dense("qwen2.5-72b", 80, 8, 128, 64, 72.7, "Qwen/Qwen2.5-72B"),
    _dense("llama-3.1-405b", 126, 8, 128, 128, 405.9, "meta-llama/Llama-3.1-405B"),
    _sparse("mixtral-8x7b", 32, 8, 32, (46.7, 12.9), "mistralai/Mixtral-8x7B-v0.1"),
    _sparse("qwen3-30b-a3b", 48, 4, 32, (30.5, 3.3), "Qwen/Qwen3-30B-A3B"),
    _sparse("qwen3-235b-a22b", 94, 4, 64, (235, 22), "Qwen/Qwen3-235B-A22B"),
    Model(
        "deepseek-v3",
        layers=61,
        kv_heads=128,
        head_dim=128,
        heads=128,
        params=671e9,
        params_active=37e9,
        weight_bytes=1,
        latent_dim=512,
        rope_dim=64,
        query_dim=192,
        source=_hub("deepseek-ai/DeepSeek-V3") + "; arXiv:2412.19437",
    ),
)

_NVIDIA = "NVIDIA data sheet, half of the figure with sparsity"
_GEN4, _GEN5 = 32 * GB, 64 * GB
"""One direction of PCIe x16, as data sheets give it."""

GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("l4", 121e12, 24 * GB, _GEN4, _NVIDIA),
        Gpu("l40s", 362e12, 48 * GB, _GEN4, "NVIDIA data sheet"),
        Gpu("rtx-4090", 165.2e12, 24 * GB, _GEN4, "NVIDIA Ada GPU architecture white paper"),
        Gpu("a100-80gb", 312e12, 80 * GB, _GEN4, "NVIDIA data sheet"),
        Gpu("h100-sxm", 989e12, 80 * GB, _GEN5, _NVIDIA),
        Gpu("h200", 989e12, 141 * GB, _GEN5, _NVIDIA),
        Gpu("b200", 2250e12, 180 * GB, _GEN5, "NVIDIA HGX B200 data sheet, an eighth of eight GPUs, half of the figure with sparsity"),
        Gpu("mi300x", 1307e12, 192 * GB, _GEN5, "AMD data sheet"),
    )
}

_CLASS = "generic class, not one product"
DRIVES: Mapping[str, Drive] = {
    drive.name: drive
    for drive in (
        Drive("gen3", 3.2 * GB, 2 * GB, 3.84 * TB, 1, _CLASS),
        Drive("gen4", 7 * GB, 4 * GB, 3.84 * TB, 1, _CLASS),
        Drive("gen4-mixed", 7 * GB, 5 * GB, 3.2 * TB, 3, _CLASS + ", for mixed use"),
        Drive("gen5", 14 * GB, 7 * GB, 7.68 * TB, 1, _CLASS),
        Drive("gen5-mixed", 14 * GB, 8 * GB, 6.4 * TB, 3, _CLASS + ", for mixed use"),
        Drive("network", 1 * GB, 0.5 * GB, 4 * TB, 1, _CLASS + ", a volume over a network"),
    )
}

MEASURED_ON = "docs/performance.md, second machine (two virtual EPYC cores): the slower of the two, so the careful choice"
READ_SHARE = 0.74
"""Share of a bare loop's reading rate that the store reached (``read_raw.aligned``; 0.98 on the first machine)."""
WRITE_SHARE = 0.88
"""The same for writing (``write_raw``; 0.95 on the first machine)."""
ENCODE_BYTES_PER_S = 0.42 * GB
DECODE_BYTES_PER_S = 0.79 * GB
"""Raw bytes that one core encodes and decodes with planes+zstd (``codec_core``; 1.78 and 1.80 GB/s on the first machine)."""
READ_CORE_S_PER_BYTE = 0.39 / GB
WRITE_CORE_S_PER_BYTE = 0.99 / GB
"""CPU time of reading and writing raw blocks, checksums and copies included (``cpu_per_gb``)."""
LOAD_FIXED_S = 3.5e-3
"""The 99th percentile of one 2 MiB read on an idle drive: what a load waits before its first bytes are there."""
LOOKUP_S_PER_BLOCK = 2.9e-6
"""One present key in a batched lookup (``match_1m``, warm)."""
RATIO_BF16 = 1.45
RATIO_FP8 = 1.19
"""Raw by stored bytes of real KV (``compression_ratio``)."""
EFFICIENCY = 0.5
"""Share of the GPUs' peak that a prefill reaches: an assumption, not a measurement. Give --prefill-tokens-per-s where you know it."""
