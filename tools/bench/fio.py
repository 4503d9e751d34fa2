"""fio, where it is installed: what others would measure here, beside the bare loop. A fact, and no bar."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ...gds.posix import ALIGNMENT_BYTES
from .setting import Setting
from .trace import Trace

RUNS = 3
BYTES_MAX = 1 << 30
TIMEOUT_S = 60.0
COMMON = ("--name=kvlode", "--direct=1", "--ioengine=libaio", "--output-format=json", "--thread")


def read_rate(trace: Trace, setting: Setting, order: Literal["read", "randread"]) -> float | None:
    """GB/s of reads from the store's segments, in requests as long and as many at once as the store had; ``None`` without fio."""
    paths = sorted({trace.paths[operation.file] for operation in trace.of_kind("read")})
    if not paths or any(":" in path for path in paths):  # fio's own separator
        return None
    io_bytes = min(trace.total_bytes("read"), BYTES_MAX)
    return _rate("read", (f"--filename={':'.join(paths)}", f"--rw={order}", "--readonly", f"--io_size={io_bytes}"), trace, setting)


def write_rate(trace: Trace, setting: Setting) -> float | None:
    """GB/s of writes into a new, preallocated file, its final sync included; ``None`` without fio."""
    path = setting.folder("fio.file")
    if ":" in path:
        return None
    options = (f"--filename={path}", "--rw=write", "--fallocate=posix", "--end_fsync=1", f"--size={min(setting.size_bytes, BYTES_MAX)}")
    try:
        return _rate("write", options, trace, setting)
    finally:
        Path(path).unlink(missing_ok=True)


def _rate(kind: Literal["read", "write"], options: Sequence[str], trace: Trace, setting: Setting) -> float | None:
    """The median of a few runs: one alone may meet a drive that is held back for a moment."""
    program = shutil.which("fio")
    if program is None:
        return None
    block_bytes = max(ALIGNMENT_BYTES, trace.typical_bytes(kind) // ALIGNMENT_BYTES * ALIGNMENT_BYTES)
    command = [program, *COMMON, *options, f"--bs={block_bytes}", f"--iodepth={max(1, trace.in_flight_max)}"]
    rates = []
    try:
        for _ in range(1 if setting.quick else RUNS):
            answer = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout
            rates.append(bytes_per_s(json.loads(answer[answer.index("{") :]), kind) / 1e9)
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, IndexError):
        return None
    return statistics.median(rates)


def bytes_per_s(answer: dict[str, Any], kind: Literal["read", "write"]) -> float:
    """The bandwidth in fio's JSON. Raises ``KeyError`` or ``IndexError`` for another program's."""
    return float(answer["jobs"][0][kind]["bw_bytes"])
