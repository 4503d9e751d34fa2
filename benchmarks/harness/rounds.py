"""Rounds: in each, every store does the same once, one after the other, in an order that is another one in every round."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from stores.steps import Order

from .children import Child
from .data import Data

Record: TypeAlias = dict[str, Any]
"""What one store did in one round with one kind of blocks; ``error`` in it where it failed. The first of a file is the run's settings."""

KILL_BLOCKS_MIN = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """How much and where."""

    folder: Path
    """For stores; on the drive that is measured."""
    size_bytes: int
    data: Sequence[Data]
    codec: str
    console: Console

    def order(self, data: Data, folder: Path, number: int, *, share: int = 1) -> Order:
        count = max(KILL_BLOCKS_MIN, self.size_bytes // data.block_bytes // share)
        return Order(str(folder), str(data.path), data.block_bytes, count, data.namespace, number, self.codec)


def run_round(plan: Plan, stores: Sequence[Child], number: int) -> Iterator[Record]:
    """Everything once."""
    turn = number % len(stores)
    order = [*stores[turn:], *stores[:turn]]
    for data in plan.data:
        for store in order:
            if store.missing is None:
                plan.console.print(f"round {number + 1}: {data.kind}, {store.peer.title}", highlight=False)
                yield {"round": number, "data": data.kind, "peer": store.peer.name, **measure(plan, store, data, number)}


def measure(plan: Plan, store: Child, data: Data, number: int) -> Record:
    """Write, read cold in another process; then be killed while writing, and open that. Nothing is left behind."""
    folder = plan.folder / store.peer.name
    order = plan.order(data, folder, number)
    try:
        folder.mkdir()
        written = store.ask("write", order)
        if "error" in written:
            return written
        cold = store.ask("read", replace(order, stored_bytes=written["stored_bytes"]))
        shutil.rmtree(folder)
        folder.mkdir()
        small = plan.order(data, folder, number, share=4)
        killed = store.ask("be_killed", small)
        opened = killed if "error" in killed else store.ask("open_killed", small)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    failed = {f"{name}_error": answer["error"] for name, answer in (("read", cold), ("kill", opened)) if "error" in answer}
    return {"raw_bytes": order.count * order.block_bytes, **written, **cold, **opened, **failed}


def load(path: Path) -> list[Record]:
    """The records of a results file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: Record) -> None:
    """One line more, written at once: a run that is cut off keeps the rounds before."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
