"""What is stored: blocks that cannot be compressed, and real KV of the demo's model. Each is one file of distinct blocks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from kvlode.format.namespace import Namespace
from kvlode.tools.bench.real_kv import real_kv
from kvlode.tools.bench.setting import Setting
from kvlode.tools.bench.workload import bench_namespace

INCOMPRESSIBLE, REAL_KV = "incompressible", "real_kv"
KINDS = (INCOMPRESSIBLE, REAL_KV)
DISTINCT_BLOCKS = 64
DTYPE = "bfloat16"


@dataclass(frozen=True, slots=True)
class Data:
    """Blocks of one kind; ``path`` holds the distinct ones."""

    kind: str
    path: Path
    block_bytes: int
    namespace: dict[str, Any]
    text: str


def incompressible(folder: Path, block_bytes: int) -> Data:
    """Random blocks, written anew where there are none of this size."""
    path = folder / f"incompressible-{block_bytes}.kv"
    if not path.exists():
        np.random.default_rng(1).integers(0, 256, DISTINCT_BLOCKS * block_bytes, np.uint8).tofile(path)
    return Data(INCOMPRESSIBLE, path, block_bytes, plain(bench_namespace(block_bytes)), "random bytes")


def real(folder: Path, *, quick: bool, console: Console) -> Data | str:
    """Real KV in bf16, computed where it is not there yet; or why there is none."""
    where = folder / ("quick" if quick else "full")
    where.mkdir(exist_ok=True)
    setting = Setting(root=str(where), size_bytes=0, rounds=1, quick=quick, console=console)
    blocks = real_kv(setting)
    if isinstance(blocks, str):
        return blocks
    namespace = blocks.namespace(DTYPE)
    text = f"KV of {blocks.model}, {blocks.block_tokens} tokens a block, {DTYPE}"
    return Data(REAL_KV, blocks.folder / f"{DTYPE}.kv", namespace.block_bytes_max, plain(namespace), text)


def plain(namespace: Namespace) -> dict[str, Any]:
    """Its keyword arguments, for another process."""
    values = {field.name: getattr(namespace, field.name) for field in fields(namespace) if field.init}
    return values | {"extra": dict(namespace.extra)}
