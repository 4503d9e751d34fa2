"""``kvlode gpu-check``: honest where there is no GPU, and a failed check is never a good exit code."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvlode.format.errors import DeviceError, InvalidConfig
from kvlode.tools import gpu_check
from kvlode.tools.gpu_check import CHECKS, EXIT_NO_GPU, run_gpu_check
from test_kvikio import stub_folder, with_driver

__all__ = ["stub_folder"]  # a fixture, used by name


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


needs_no_gpu = pytest.mark.skipif("has_gpu()", reason="this machine has a GPU")


def checked(folder: Path, report_path: Path | None) -> tuple[int, str]:
    """Exit code and what was printed."""
    text = io.StringIO()
    code = run_gpu_check(folder, report_path, Console(file=text, width=200))
    return code, text.getvalue()


@needs_no_gpu
def test_without_a_gpu_it_says_what_is_missing_checks_nothing_and_writes_that_down(tmp_path: Path) -> None:
    code, text = checked(tmp_path, tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == EXIT_NO_GPU == 3
    assert "nothing was checked" in text
    assert report["gpu"] is None and report["checks"] == []
    assert any("GPU" in missing for missing in report["machine"]["gds_missing"])
    assert all(missing in text for missing in report["machine"]["gds_missing"])
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"], "nothing else is left behind"


@needs_no_gpu
def test_the_command_ends_with_that_code_and_no_traceback(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from kvlode.tools.cli import main; main()", "gpu-check", str(tmp_path), "--json", str(tmp_path / "r.json")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == EXIT_NO_GPU, run.stderr
    assert "no usable GPU" in run.stderr + run.stdout and "Traceback" not in run.stderr


@needs_no_gpu
def test_a_driver_without_a_gpu_changes_what_is_missing_and_not_the_answer(stub_folder: Path, tmp_path: Path) -> None:
    command = "from kvlode.tools.cli import main; main()"
    run = with_driver(stub_folder, "-c", command, "gpu-check", str(tmp_path), "--json", str(tmp_path / "r.json"))
    report = json.loads((tmp_path / "r.json").read_text())
    assert run.returncode == EXIT_NO_GPU, run.stdout
    assert "no usable GPU" in run.stdout and "the NVIDIA driver" not in run.stdout
    assert report["checks"] == []


def test_failed_checks_are_named_with_their_error_and_make_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []

    def good(folder: Path) -> dict[str, int]:
        folders.append(folder)
        (folder / "left behind").write_text("x")
        return {"gbytes_s": 7}

    def wrong(folder: Path) -> Any:
        gpu_check._require(False, "what was read is what was written")

    def broken(folder: Path) -> Any:
        raise DeviceError("read", "/x", errno=5)

    monkeypatch.setattr(gpu_check, "_gpu", lambda: {"name": "a GPU"})
    monkeypatch.setattr(gpu_check, "CHECKS", {"one": good, "two": wrong, "three": broken})
    code, text = checked(tmp_path, tmp_path / "report.json")
    assert code == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(check["name"], check["passed"]) for check in report["checks"]] == [("one", True), ("two", False), ("three", False)]
    assert report["checks"][0]["detail"] == {"gbytes_s": 7}
    assert "what was read is what was written" in text and "Input/output error" in text
    assert folders and not folders[0].exists()
    monkeypatch.setattr(gpu_check, "CHECKS", {"one": good})
    assert checked(tmp_path, None)[0] == 0


@needs_no_gpu
def test_the_real_checks_fail_where_there_is_no_gpu_instead_of_passing_vacuously(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_gpu", lambda: {"name": "pretended"})
    code, text = checked(tmp_path, None)
    assert code == 1
    assert text.count("FAILED") == len(CHECKS)
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="no folder"):
        run_gpu_check(tmp_path, tmp_path / "no folder" / "report.json", Console(file=io.StringIO()))
    with pytest.raises(InvalidConfig, match="not here"):
        run_gpu_check(tmp_path / "not here", None, Console(file=io.StringIO()))


@pytest.mark.gpu
@pytest.mark.skipif("not has_gpu()", reason="needs an NVIDIA GPU with its driver")
def test_every_check_holds_on_a_gpu(tmp_path: Path) -> None:
    code, text = checked(tmp_path, tmp_path / "report.json")
    assert code == 0, text
