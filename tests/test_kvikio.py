"""The cuFile device keeps every promise of a device: real kvikio on host memory, in a process that has a CUDA driver.

Without a GPU that driver is ``stub_libcuda``, compiled here: kvikio needs one even to copy between files and host memory.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
STUB = TESTS / "stub_libcuda" / "libcuda_stub.c"


@pytest.fixture(scope="session")
def stub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1 that kvikio can load, for ``LD_LIBRARY_PATH``."""
    if importlib.util.find_spec("kvikio") is None:
        pytest.skip("kvikio is not installed (tests/requirements-kvikio.txt)")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to make the stub of libcuda with")
    folder = tmp_path_factory.mktemp("stub")
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1"), str(STUB)]
    subprocess.run(command, check=True, timeout=60)
    return folder


def with_driver(stub_folder: Path, *command: str, timeout_s: float = 110.0) -> subprocess.CompletedProcess[str]:
    """Run a Python command where ``libcuda.so.1`` is the stub."""
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"LD_LIBRARY_PATH": os.pathsep.join([str(stub_folder), os.environ.get("LD_LIBRARY_PATH", "")])},
        cwd=TESTS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_the_cufile_device_passes_the_conformance_suite_on_host_memory(stub_folder: Path) -> None:
    run = with_driver(stub_folder, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(TESTS / "kvikio_devices.py"))
    assert run.returncode == 0, run.stdout
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped|failed|error)", run.stdout)}
    assert counts.get("passed", 0) > 90 and set(counts) == {"passed"}, run.stdout


def test_without_a_driver_kvikio_refuses_transfers_with_an_error_of_the_device(tmp_path: Path) -> None:
    """Why the POSIX device exists beside cuFile: machines without a GPU."""
    if importlib.util.find_spec("kvikio") is None:
        pytest.skip("kvikio is not installed (tests/requirements-kvikio.txt)")
    from kvlode.gds import machine

    if machine.has_cuda_driver():
        pytest.skip("this machine has a CUDA driver")
    from kvlode.format.errors import DeviceError
    from kvlode.gds.buffers import aligned_array
    from kvlode.gds.cufile import CuFileDevice

    device = CuFileDevice(threads=2, host="kvikio")
    file = device.open(str(tmp_path / "a"), "create")
    with pytest.raises(DeviceError) as caught:
        file.write(0, [aligned_array(4096)]).result(30)
    assert str(tmp_path / "a") in str(caught.value)
    file.close()
    device.close()
