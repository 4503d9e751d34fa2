"""The README's code as text, for the tests that run it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def fenced(name: str, language: str) -> list[str]:
    """The fenced blocks of one language in a Markdown file, named relative to the root."""
    return [body for found, body in _FENCE.findall((ROOT / name).read_text()) if found == language]


def prose(name: str) -> str:
    """A Markdown file without its fenced blocks."""
    return _FENCE.sub("", (ROOT / name).read_text())
