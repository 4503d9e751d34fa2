"""A store's process: started once a run, asked for one step at a time."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stores.steps import Order

from .peers import Peer

BENCHMARKS = Path(__file__).resolve().parents[1]
LOG_LINES = 3


@dataclass
class Child:
    """A running store, or why there is none (``missing``)."""

    peer: Peer
    process: subprocess.Popen[str] | None
    log: Path
    missing: str | None = None

    def begin(self) -> None:
        """Wait until the store's libraries are imported."""
        if self.missing is None:
            answer = self._read()
            self.missing = answer.get("missing") or answer.get("error")

    def ask(self, step: str, order: Order) -> dict[str, Any]:
        """One step's answer; ``error`` in it says what went wrong."""
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"step": step, "order": asdict(order)}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"error": f"its process ended: {self._last_words()}"}
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            return {"error": f"its process ended: {self._last_words()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return " / ".join(lines[-LOG_LINES:]) or "it said nothing"


@contextmanager
def child(peer: Peer, folder: Path) -> Iterator[Child]:
    """The process of one store, whose output goes to a file in ``folder``."""
    log = folder / f"{peer.name}.log"
    if peer.missing is not None:
        yield Child(peer, None, log, peer.missing)
        return
    command = [peer.python, "-m", "stores.server", peer.module, peer.kind]
    paths = [os.fspath(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | peer.variables | {"PYTHONPATH": os.pathsep.join(paths)}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True, env=environment, cwd=folder
        )
    try:
        yield Child(peer, process, log)
    finally:
        process.kill()
        process.communicate()


@contextmanager
def children(peers: Sequence[Peer], folder: Path) -> Iterator[list[Child]]:
    """The processes of all of them, imported side by side."""
    with ExitStack() as stack:
        started = [stack.enter_context(child(peer, folder)) for peer in peers]
        for each in started:
            each.begin()
        yield started
