"""``kvlode gpu-check``: on a machine with a GPU, do transfers keep every byte, and how fast is each path.

The project has not run this on a GPU yet; see ``docs/gpu.md``. Without one it says what is missing and writes that down.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..engine.config import StoreConfig
from ..engine.contract import Status
from ..engine.opening import open_store
from ..format.errors import InvalidConfig, KvlodeError
from ..format.namespace import Namespace
from ..gds.device import Device
from ..gds.posix import PosixDevice
from ..gds.probe import probe

MIB = 1 << 20
TRANSFER_BYTES = 64 * MIB
BLOCK_BYTES = 4 * MIB
ROUNDS = 9
CANARY = 0xA5
EXIT_NO_GPU = 3


@dataclass(frozen=True, slots=True)
class Check:
    """One check: whether it held, and the error or the figures."""

    name: str
    passed: bool
    detail: Any


def run_gpu_check(path: Path | None, json_path: Path | None, console: Console) -> int:
    """Run all checks in a new folder below ``path`` (default: the current folder), which is removed again.

    Writes the report to ``json_path``. Returns 0 when all checks held, 1 when one failed, 3 without a usable GPU.
    Raises ``InvalidConfig`` when one of the two folders is not there.
    """
    above = Path(path or ".")
    for folder, purpose in ((above, "to check in"), (None if json_path is None else json_path.parent, "for the report")):
        if folder is not None and not folder.is_dir():
            raise InvalidConfig(f"there is no folder {purpose}", where=folder, action="Make it, or name another one.")
    report: dict[str, Any] = {"machine": probe(str(above)).to_dict(), "gpu": _gpu(), "checks": []}
    if report["gpu"] is None:
        console.print("no usable GPU; nothing was checked. Missing for GPUDirect Storage:")
        for missing in report["machine"]["gds_missing"]:
            console.print(f"  - {missing}", markup=False, highlight=False)
        code = EXIT_NO_GPU
    else:
        folder = Path(tempfile.mkdtemp(prefix="kvlode-gpu-check-", dir=above))
        try:
            checks = [_checked(name, check, folder, console) for name, check in CHECKS.items()]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        report["checks"] = [asdict(check) for check in checks]
        code = 0 if all(check.passed for check in checks) else 1
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2, default=str) + "\n")
        console.print(f"report: {json_path}", highlight=False)
    return code


def _gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda, "torch": torch.__version__}


def _checked(name: str, check: Callable[[Path], Any], folder: Path, console: Console) -> Check:
    try:
        result = Check(name, True, check(folder))
    except (AssertionError, KvlodeError, OSError, RuntimeError, ValueError, ImportError) as error:
        result = Check(name, False, f"{type(error).__name__}: {error}")
    console.print(f"{'ok    ' if result.passed else 'FAILED'} {name}: {result.detail}", markup=False, highlight=False)
    return result


def _require(held: bool, what: str) -> None:
    if not held:
        raise AssertionError(what)


# --- devices ------------------------------------------------------------------------------------------------------------


def _cufile() -> Device:
    from ..gds.cufile import CuFileDevice

    return CuFileDevice()


def _device_memory_round_trip(folder: Path) -> dict[str, Any]:
    """GPU memory to the drive and back, in odd pieces, with canaries around the destination."""
    import torch

    device = _cufile()
    try:
        file = device.open(str(folder / "round-trip"), "create")
        file.preallocate(TRANSFER_BYTES)
        source = torch.randint(0, 256, (TRANSFER_BYTES,), dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        _require(file.write(0, [source]).result() == TRANSFER_BYTES, "the whole buffer was written")
        file.sync()
        padded = torch.full((TRANSFER_BYTES + 2 * MIB,), CANARY, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        inner = padded[MIB : MIB + TRANSFER_BYTES]
        _require(file.read(0, [inner[: 3 * MIB], inner[3 * MIB :]]).result() == TRANSFER_BYTES, "the whole buffer was read")
        torch.cuda.synchronize()
        _require(bool(torch.equal(inner, source)), "what was read is what was written")
        around = torch.cat((padded[:MIB], padded[MIB + TRANSFER_BYTES :]))
        _require(bool((around == CANARY).all()), "memory around the destination is untouched")
        file.close()
        return {"paths": {name: str(value) for name, value in device.paths().items()}, "counters": _plain(device)}
    finally:
        device.close()


def _store_round_trip(folder: Path) -> dict[str, Any]:
    """CUDA tensors through a store: put on a stream of their own, flush, reopen, get into CUDA tensors."""
    import torch

    config = StoreConfig.build(capacity="2GiB", buffer="256MiB")
    descriptor = Namespace(
        model="gpu-check", revision="1", dtype="bfloat16", layout="flat", tokens_per_block=16, block_bytes_max=BLOCK_BYTES
    )
    keys = [b"block %d" % index for index in range(16)]
    stream: Any = torch.cuda.Stream(device=0)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        blocks = [torch.randn(BLOCK_BYTES // 2, device="cuda").to(torch.bfloat16) for _ in keys]
        with open_store(str(folder / "store"), config) as store:
            statuses = store.namespace(descriptor).submit_put(keys, blocks).statuses
            _require(all(statuses), f"every block is accepted: {statuses}")
            _require(store.flush(60.0), "the blocks are flushed")
        outs = [torch.full_like(block, float("nan")) for block in blocks]
    with open_store(str(folder / "store"), config) as store:
        job = store.namespace(descriptor).submit_get(keys, outs, stream=stream)
        _require(job.wait(60.0), "the read ends")
        _require(all(status is Status.HIT for status in job.statuses), f"every block is a hit: {job.statuses}")
        stream.synchronize()
        equal = all(torch.equal(out.view(torch.int16), block.view(torch.int16)) for out, block in zip(outs, blocks, strict=True))
        _require(equal, "every block comes back exactly")
        return {"io": {name: dict(value) for name, value in store.stats()["io"].items()}}


def _bandwidth(folder: Path) -> dict[str, Any]:
    """Median GB/s of each path for one large read: GPU memory through cuFile, and O_DIRECT into host memory and a copy."""
    import torch

    cufile, posix = _cufile(), PosixDevice()
    try:
        file = cufile.open(str(folder / "bandwidth"), "create")
        file.preallocate(TRANSFER_BYTES)
        target = torch.randint(0, 256, (TRANSFER_BYTES,), dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        file.write(0, [target]).result()
        file.sync()
        direct = posix.open(str(folder / "bandwidth"), "read")
        host = torch.empty(TRANSFER_BYTES, dtype=torch.uint8, pin_memory=True)

        def through_host() -> None:
            direct.read(0, [host.numpy()]).result()
            target.copy_(host, non_blocking=True)
            torch.cuda.synchronize()

        def through_cufile() -> None:
            file.read(0, [target]).result()
            torch.cuda.synchronize()

        seconds: dict[str, list[float]] = {"cufile": [], "o_direct_and_copy": []}
        for _ in range(ROUNDS):
            for name, transfer in (("cufile", through_cufile), ("o_direct_and_copy", through_host)):
                started = time.perf_counter()
                transfer()
                seconds[name].append(time.perf_counter() - started)
        direct.close()
        file.close()
        figures: dict[str, Any] = {f"{name}_gbytes_s": TRANSFER_BYTES / statistics.median(times) / 1e9 for name, times in seconds.items()}
        return figures | {"cufile_counters": _plain(cufile)}
    finally:
        cufile.close()
        posix.close()


def _plain(device: Device) -> dict[str, Any]:
    return {str(path): str(counter) for path, counter in device.counters().items()}


CHECKS: dict[str, Callable[[Path], Any]] = {
    "GPU memory to the drive and back": _device_memory_round_trip,
    "CUDA tensors through a store": _store_round_trip,
    "bandwidth by path": _bandwidth,
}
