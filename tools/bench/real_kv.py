"""Blocks of real KV, computed once a run: as many distinct ones as that takes in reasonable time, repeated under other keys."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...format.errors import InvalidConfig, KvlodeError
from ...format.namespace import Namespace
from ...gds.buffers import aligned_array
from ..demo_model import weights_path
from .kv_model import DTYPES
from .processes import child_process, events_of
from .setting import Setting
from .workload import Blocks

LAYOUT = "transformers:layer,kv,head,token,dim"
BLOCK_TOKENS, SEQUENCES, TOKENS = 128, 2, 2048
QUICK_BLOCK_TOKENS, QUICK_SEQUENCES, QUICK_TOKENS = 16, 1, 128
FACTS_FILE = "facts.json"
PACKAGES = ("torch", "transformers")
BFLOAT16, FLOAT8 = DTYPES


@dataclass(frozen=True, slots=True)
class RealKv:
    """Where the blocks of this run lie, and what they are."""

    folder: Path
    model: str
    revision: str
    shapes: tuple[int, ...]
    """Layers, then heads and dimension of K, heads and dimension of V."""
    block_tokens: int

    def namespace(self, dtype: str) -> Namespace:
        """As the transformers adapter describes such blocks: a stripe is a layer."""
        layers, key_heads, key_dim, value_heads, value_dim = self.shapes
        element_bytes = 2 if dtype == BFLOAT16 else 1
        layer_bytes = element_bytes * self.block_tokens * (key_heads * key_dim + value_heads * value_dim)
        return Namespace(
            model=self.model,
            revision=self.revision,
            dtype=dtype,
            layout=LAYOUT,
            tokens_per_block=self.block_tokens,
            block_bytes_max=layers * layer_bytes,
            layer_bytes=layer_bytes,
            extra={"shapes": json.dumps(list(self.shapes))},
        )

    def blocks(self, dtype: str, size_bytes: int) -> Blocks:
        """Blocks of about ``size_bytes`` in all, at least every distinct one once."""
        namespace = self.namespace(dtype)
        stored = np.fromfile(self.folder / f"{dtype}.kv", dtype=np.uint8)
        memory = aligned_array(stored.size)
        np.copyto(memory, stored)
        rows = memory.reshape(-1, namespace.block_bytes_max)
        count = max(len(rows), size_bytes // namespace.block_bytes_max)
        return Blocks(count, namespace.block_bytes_max, memory=rows, namespace=namespace)

    def facts(self, blocks: Blocks) -> dict[str, object]:
        """What a figure of these blocks is about."""
        return {
            "data": f"KV of {self.model}, computed in float32, rounded to {blocks.namespace.dtype}",
            "dtype": blocks.namespace.dtype,
            "block_bytes": blocks.block_bytes,
            "block_tokens": self.block_tokens,
            "distinct_bytes": blocks.memory.size,
        }


def real_kv(setting: Setting) -> RealKv | str:
    """The run's blocks, computed when they are first asked for; or why there are none here."""
    folder = Path(setting.folder("real-kv"))
    if not (folder / FACTS_FILE).exists():
        folder.mkdir(exist_ok=True)
        (folder / FACTS_FILE).write_text(json.dumps(_computed(setting, folder)))
    facts = json.loads((folder / FACTS_FILE).read_text())
    if "missing" in facts:
        return str(facts["missing"])
    return RealKv(folder, facts["model"], facts["revision"], tuple(facts["shapes"]), facts["block_tokens"])


def _computed(setting: Setting, folder: Path) -> dict[str, object]:
    missing = _missing()
    if missing is not None:
        return {"missing": missing}
    block_tokens, sequences, tokens = BLOCK_TOKENS, SEQUENCES, TOKENS
    if setting.quick:
        block_tokens, sequences, tokens = QUICK_BLOCK_TOKENS, QUICK_SEQUENCES, QUICK_TOKENS
    setting.console.print(f"computing the KV cache of {sequences * tokens:,} tokens", highlight=False)
    options = {"folder": str(folder), "sequences": sequences, "tokens": tokens, "block_tokens": block_tokens}
    with child_process("real_kv", **options) as process:
        try:
            computed = next((event for event in events_of(process) if event["event"] == "computed"), None)
        except KvlodeError as error:
            return {"missing": str(error)}
        code = process.wait()
    if computed is None:
        return {"missing": f"the process that computes real KV ended early with exit code {code}"}
    return {name: computed[name] for name in ("model", "revision", "shapes")} | {"block_tokens": block_tokens}


def _missing() -> str | None:
    """What would have to be installed for real KV."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        return f"real KV needs {' and '.join(absent)}: pip install 'kvlode[demo]'"
    try:
        weights_path()
    except InvalidConfig as error:
        return str(error)
    return None


def needed_bytes(setting: Setting) -> int:
    """Free space for the files of the run's blocks."""
    return 64 << 20 if setting.quick else 256 << 20
