"""Steps of the bench that need a process of their own: to be killed, to have its memory measured, to share no interpreter lock."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ...format.errors import KvlodeError


class Say(Protocol):
    """How a step tells the parent something: one line of JSON."""

    def __call__(self, **facts: Any) -> None: ...


@contextmanager
def child_process(step: str, **arguments: Any) -> Iterator[subprocess.Popen[str]]:
    """``child.STEPS[step]`` with these arguments, which is gone afterwards. Its standard input is a pipe to it."""
    command = [sys.executable, "-m", f"{__package__}.child", step, json.dumps(arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def events_of(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """What the step says, until it ends. Raises ``KvlodeError`` when it says that it failed."""
    assert process.stdout is not None
    for line in process.stdout:
        event: dict[str, Any] = json.loads(line)
        if event["event"] == "error":
            raise KvlodeError("a process of the bench failed", actual=event["text"])
        yield event


def wait_for(process: subprocess.Popen[str], name: str) -> dict[str, Any]:
    """The next event of this name. Raises ``KvlodeError`` when the process ends without it."""
    for event in events_of(process):
        if event["event"] == name:
            return event
    raise KvlodeError("a process of the bench ended early", expected=f"an event {name!r}", actual=f"exit code {process.wait()}")
