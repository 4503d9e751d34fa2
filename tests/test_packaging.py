"""The wheel and the sdist as a stranger gets them: built from the tracked files, installed into clean environments, used."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from readme import ROOT, fenced

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PACKAGE_FOLDERS = ("format", "gds", "engine", "tools", "adapters")
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
"""Where this environment keeps torch and the other dependencies; the clean environments read them from here."""


def run(*command: object, cwd: Path) -> str:
    """Run a command with a bare environment; its output, or a failed test that shows it."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the sdist, built from a copy so that no build folder appears in the checkout."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("needs a git checkout to know which files are the project's")
    for name in filter(None, tracked.stdout.split("\0")):
        original, copy = ROOT / name, source / name
        if original.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(original.read_bytes())
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", "--outdir", out, source, cwd=source)
    return {"wheel": next(out.glob("*.whl")), "sdist": next(out.glob("*.tar.gz"))}


def clean_environment(folder: Path) -> Path:
    """A new environment that has kvlode's dependencies but not kvlode; returns its interpreter.

    The dependencies come through a .pth file, so nothing is downloaded. Only folders named in a .pth are added, the .pth files
    inside them are not read: this checkout's editable installation stays out.
    """
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    python = folder / "bin" / "python"
    packages = next((folder / "lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text(f"{SITE_PACKAGES}\n")
    return python


def install(artefact: Path, python: Path, cwd: Path) -> None:
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, artefact, cwd=cwd)


def test_the_wheel_holds_the_five_packages_and_nothing_else(artefacts: dict[str, Path]) -> None:
    with zipfile.ZipFile(artefacts["wheel"]) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert {"kvlode/__init__.py", "kvlode/py.typed", "kvlode/SPEC.md", "kvlode/tools/cli.py"} <= set(names)
    for name in names:
        parts = Path(name).parts
        assert parts[0] == "kvlode"
        assert len(parts) == 2 or parts[1] in PACKAGE_FOLDERS, name
    assert sorted(name for name in names if len(Path(name).parts) == 2) == ["kvlode/SPEC.md", "kvlode/__init__.py", "kvlode/py.typed"]


def test_the_wheel_has_every_module_of_the_checkout(artefacts: dict[str, Path]) -> None:
    tracked = subprocess.run(["git", "ls-files", *PACKAGE_FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    with zipfile.ZipFile(artefacts["wheel"]) as wheel:
        shipped = set(wheel.namelist())
    missing = [name for name in tracked if name.endswith(".py") and (ROOT / name).is_file() and f"kvlode/{name}" not in shipped]
    assert not missing, "packages that pyproject.toml does not list"


def test_the_sdist_holds_what_a_build_needs(artefacts: dict[str, Path]) -> None:
    with tarfile.open(artefacts["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "SPEC.md", "__init__.py", "format/layout.py"} <= names


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_the_readme_example_runs_from_an_installation(kind: str, artefacts: dict[str, Path], tmp_path: Path) -> None:
    python = clean_environment(tmp_path / "env")
    install(artefacts[kind], python, tmp_path)
    where = run(python, "-c", "import kvlode; print(kvlode.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path / "env"), "the checkout shadows the installation"
    for number, example in enumerate(fenced("README.md", "python")):
        folder = tmp_path / f"example-{number}"
        folder.mkdir()
        (folder / "example.py").write_text(example)
        run(python, "-W", "error::ResourceWarning", "example.py", cwd=folder)


def test_the_installed_command_starts(artefacts: dict[str, Path], tmp_path: Path) -> None:
    python = clean_environment(tmp_path / "env")
    install(artefacts["wheel"], python, tmp_path)
    assert "inspect" in run(tmp_path / "env" / "bin" / "kvlode", "--help", cwd=tmp_path)
