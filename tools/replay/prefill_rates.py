"""How fast GPUs compute prompts, by published figures: what the tokens of a hit would have cost.

Published rates are of whole runs of input-heavy loads, in which the same GPUs also generated the answers, except where prefill ran on
GPUs of its own. So prefill alone is a little faster, and the seconds that follow are a little too many. Where nothing was published,
the rate follows from FLOPs: ``peak * MFU / (2 * parameters)``, attention left out, with the utilisation stated here.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...format.errors import InvalidConfig

MFU = 0.5
"""Share of a GPU's peak that prefill is assumed to reach in computed rates; well-tuned engines are said to reach 0.3 to 0.6."""

_TENSORRT_LLM = (
    "NVIDIA, TensorRT-LLM 1.0, docs/source/performance/perf-overview.md: output tokens/s of requests with 2,048 tokens in and 128 out, "
    "times 16, by GPUs"
)
_SGLANG_H100 = "LMSYS, https://lmsys.org/blog/2025-05-05-large-scale-ep/: 52,300 input tokens/s per node of 8, prefill on GPUs of its own"
_SGLANG_GB200 = "LMSYS, https://lmsys.org/blog/2025-09-25-gb200-part-2: input tokens/s per GPU, prefill on GPUs of its own"


@dataclass(frozen=True, slots=True)
class PrefillRate:
    """Prompt tokens a second that one GPU computes."""

    model: str
    gpu: str
    tokens_per_s: float
    source: str
    computed: bool = False
    """From FLOPs, not from a published run."""


def _published(model: str, gpu: str, output_tokens_per_s: int, gpus: int) -> PrefillRate:
    return PrefillRate(model, gpu, output_tokens_per_s * 2048 / 128 / gpus, _TENSORRT_LLM)


def _computed(model: str, gpu: str, parameters: float, peak_flops: float, what: str) -> PrefillRate:
    peak = f"{peak_flops / 1e12:.0f} TFLOPS ({what}, dense, NVIDIA's data sheet)"
    source = f"computed, not measured: {peak} * {MFU} / (2 * {parameters / 1e9:.1f}e9 parameters)"
    return PrefillRate(model, gpu, peak_flops * MFU / (2 * parameters), source, computed=True)


PREFILL_RATES = (
    _published("llama-3.3-70b-fp8", "H100", 762, 2),
    _published("llama-3.3-70b-fp8", "H200", 442, 1),
    _published("llama-3.3-70b-fp4", "B200", 1339, 1),
    _published("llama-3.1-8b-fp8", "H100", 3450, 1),
    _published("llama-3.1-8b-fp8", "H200", 3538, 1),
    _published("llama-3.1-405b-fp8", "H100", 453, 8),
    _published("llama-3.1-405b-fp8", "H200", 456, 8),
    PrefillRate("deepseek-v3", "H100", 52_300 / 8, _SGLANG_H100),
    PrefillRate("deepseek-v3", "GB200", 26_156, _SGLANG_GB200),
    _computed("llama-3.1-8b-bf16", "A100", 8.0e9, 312e12, "BF16"),
    _computed("llama-3.3-70b-bf16", "A100", 70.6e9, 312e12, "BF16"),
    _computed("llama-3.3-70b-bf16", "H100", 70.6e9, 989e12, "BF16"),
    _computed("qwen2.5-32b-bf16", "H100", 32.5e9, 989e12, "BF16"),
)
DEFAULT_RATE = "llama-3.3-70b-fp8@H100"


def prefill_rate(name: str) -> PrefillRate:
    """The rate of ``MODEL@GPU``, in any case. Raises ``InvalidConfig`` for one that is not in the table."""
    for rate in PREFILL_RATES:
        if f"{rate.model}@{rate.gpu}".lower() == name.lower():
            return rate
    raise InvalidConfig(
        "no prefill rate is known for this model and GPU",
        expected=f"one of {', '.join(f'{rate.model}@{rate.gpu}' for rate in PREFILL_RATES)}",
        actual=name,
    )
