"""What the README and the pages in docs/ show must work: examples run, commands exist, links lead somewhere."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvlode
from kvlode.tools.cli import app
from readme import ROOT, fenced, prose

PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
EXAMPLES = [(page, number) for page in PAGES for number in range(len(fenced(page, "python")))]
LINK = re.compile(r"\[[^\]]*\]\(([^)#]+)(?:#[^)]*)?\)")
MENTIONED_TEST = re.compile(r"`(tests/[\w/.]+|test_\w+(?:\.py)?)`")
MENTIONED_COMMAND = re.compile(r"`((?:kvlode|make) [a-z-]+)[^`]*`")


def shown_commands() -> set[str]:
    """Every ``kvlode x`` and ``make x`` of the pages, from shell blocks and from inline code."""
    found = set()
    for page in PAGES:
        found.update(MENTIONED_COMMAND.findall(prose(page)))
        for block in fenced(page, "sh"):
            found.update(re.findall(r"^\s*(?:\.venv/bin/)?((?:kvlode|make) [a-z-]+)", block, re.MULTILINE))
    return found


def test_the_readme_has_an_embedding_example() -> None:
    assert len(fenced("README.md", "python")) == 1


@pytest.mark.parametrize(("page", "number"), EXAMPLES)
def test_an_example_runs_as_shown(page: str, number: int, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(fenced(page, "python")[number])
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", sorted(shown_commands()))
def test_a_command_that_is_shown_exists(command: str) -> None:
    program, name = command.split()
    if program == "make":
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no such target: {command}"
    else:
        result = CliRunner().invoke(app, [name, "--help"])
        assert result.exit_code == 0, f"no such command: {command}\n{result.output}"


def test_every_target_of_the_makefile_has_one_recipe() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):", text, re.MULTILINE)
    phony = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert sorted(targets) == sorted(phony[0].split())


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_of_the_repository(page: str) -> None:
    targets = [target for target in LINK.findall(prose(page)) if "://" not in target]
    missing = [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_are_named_exist(page: str) -> None:
    known = {path.name for path in (ROOT / "tests").rglob("*.py")}
    missing = [name for name in MENTIONED_TEST.findall(prose(page)) if f"{name.removesuffix('.py').rpartition('/')[2]}.py" not in known]
    assert not missing


def test_every_option_of_open_is_documented() -> None:
    text = (ROOT / "docs/operating.md").read_text()
    missing = [field.name for field in dataclasses.fields(kvlode.StoreConfig) if f"`{field.name}`" not in text]
    assert not missing
