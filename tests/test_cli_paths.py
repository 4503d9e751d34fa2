"""Paths of the command line that cannot work, each before any work is done: one line that says what, where and what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvlode
from command import Done, run_here
from model import descriptor


@pytest.fixture(scope="module")
def store() -> Iterator[Path]:
    """A closed store in a folder that everybody may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "store"
        with kvlode.open(path, capacity="256MiB", buffer="16MiB") as opened:
            assert opened.namespace(descriptor()).put(b"key", np.arange(50_000, dtype=np.uint8)) and opened.flush()
        yield path


@pytest.fixture
def locked(store: Path) -> Iterator[Path]:
    mode = store.stat().st_mode
    store.chmod(0)
    yield store
    store.chmod(mode)


def assert_one_line(done: Done, code: int, *words: object) -> None:
    assert (done.code, done.out) == (code, ""), done
    assert len(done.err.splitlines()) == 1 and done.err.startswith("kvlode: ") and "[Errno" not in done.err, done.err
    for word in words:
        assert str(word) in done.err


@pytest.mark.parametrize("below", ["", "below"])
@pytest.mark.parametrize("words", [["doctor"], ["demo", "--store"], ["bench"], ["gpu-check"]])
def test_a_file_where_a_folder_is_needed_is_said_at_once(words: list[str], below: str, store: Path) -> None:
    path = store / "STORE" / below
    assert_one_line(run_here(*words, path), 16, path, "folder")


def test_places_that_nothing_can_be_written_to_are_said_at_once(store: Path, tmp_path: Path) -> None:
    absent, key = tmp_path / "absent" / "x", b"key".hex()
    for target in (absent, tmp_path):
        assert_one_line(run_here("inspect", store, "--html", target), 16, target, "the page")
        assert_one_line(run_here("inspect", "export", store, key, "--to", target), 16, target, "the export")
        assert_one_line(run_here("inspect", "import", store, target, "--capacity", "64MiB"), 16, target, "the export")
    assert not absent.parent.exists() and list(tmp_path.iterdir()) == []


AS_NOBODY = """
import contextlib, io, os
from kvlode.tools import cli
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    cli.main()
os.geteuid() or os.setresuid(65534, 65534, 65534)
cli.main()
"""
"""The command twice, the second time without the rights of root: what it imports may lie where only root may read."""


def run_as_nobody(*arguments: object) -> Done:
    words = [sys.executable, "-c", AS_NOBODY, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("words", [["stat"], ["inspect", "store"], ["fsck"], ["fsck", "--live"], ["scrub", "--once"]], ids=" ".join)
def test_a_store_without_permission_is_a_matter_of_operation(words: list[str], locked: Path) -> None:
    assert_one_line(run_as_nobody(*words, locked), 8, locked, "Permission denied", "rights")
