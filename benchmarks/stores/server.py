"""A process in a store's environment that has imported it and forks for every step: each starts alike, at once, and can be killed.

``python -m stores.server MODULE CLASS``: a line of JSON in (a step and its order), a line out. What libraries print goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from .base import Store
from .steps import STEPS, Order

STEP_TIMEOUT_S = 120.0
KILL_AFTER_S = 0.03
"""How long a process that is to be killed goes on writing: well within what its second half takes."""


class Worker:
    """A fork that runs one step. Kill it or read its answers to the end."""

    def __init__(self, kind: type[Store], step: str, order: Order) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            run(kind, step, order, os.fdopen(writing, "w"))
        os.close(writing)
        self._answers = os.fdopen(reading)

    def answer(self) -> dict[str, Any]:
        """The next line; an error where the step ended or takes too long."""
        ready, _, _ = select.select([self._answers], [], [], STEP_TIMEOUT_S)
        line = self._answers.readline() if ready else ""
        if not line:
            return {"error": "the step ended without an answer" if ready else f"not finished after {STEP_TIMEOUT_S:.0f} s"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._answers.close()


def run(kind: type[Store], step: str, order: Order, answers: TextIO) -> None:
    """In the fork: answer, and leave without cleaning up after the parent's libraries."""

    def say(**facts: Any) -> None:
        print(json.dumps(facts), file=answers, flush=True)

    try:
        say(**STEPS[step](kind, order, say))
    except BaseException as error:  # the parent reports it: whatever a library raises is this store's result
        say(error=f"{type(error).__name__}: {error}"[:500])
    finally:
        os._exit(0)


def serve(kind: type[Store], step: str, order: Order) -> dict[str, Any]:
    """The answer of one step; of a kill, how many blocks were durable before."""
    worker = Worker(kind, step, order)
    try:
        answer = worker.answer()
        if step == "be_killed" and "error" not in answer:
            time.sleep(KILL_AFTER_S)
        return answer
    finally:
        worker.end()


def main(module: str, name: str, tell: Callable[[dict[str, Any]], None]) -> int:
    try:
        kind: type[Store] = getattr(importlib.import_module(f".{module}", __package__), name)
    except ImportError as error:
        tell({"missing": f"{error}"})
        return 0
    tell({"version": kind.version})
    for line in sys.stdin:
        asked = json.loads(line)
        tell(serve(kind, asked["step"], Order(**asked["order"])))
    return 0


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(facts: dict[str, Any]) -> None:
        print(json.dumps(facts), file=out, flush=True)

    sys.exit(main(sys.argv[1], sys.argv[2], tell))
