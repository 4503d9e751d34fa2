"""How long a store keeps another Python thread from running: the interpreter lock held, or handed on too late."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from ...engine.index_rocksdb import destroy
from ...gds.buffers import ByteArray
from .bare import touched_memory
from .figures import Bar, Item, value_item
from .full_rate import FullRate
from .keys_store import PUTS_PER_JOB, KeysStore
from .processes import Say, child_process, wait_for
from .setting import Setting
from .workload import MIB, SMALL_BLOCK_BYTES, opened

NAME = "gil_stall_p99"
P99_BAR = Bar(5.0, "at most")
MAX_BAR = Bar(20.0, "at most")
TICK_S = 0.0002
ROUNDS = 3
PHASE_S = 2.0
REOPENINGS = 3
BLOCK_BYTES = 2 * MIB
BYTES_MAX = 6 << 30
IDLE = "idle"


@dataclass(frozen=True, slots=True)
class Phase:
    """When something was under way, in seconds of ``time.perf_counter``, which is the same clock in all processes."""

    name: str
    start_s: float
    end_s: float


class StallWatch:
    """A thread that only wants to run every ``TICK_S``, and remembers how much later it did. A context manager.

    It keeps plain numbers: objects of its own would make Python collect garbage more often. ``collections`` are when it did.
    """

    def __init__(self) -> None:
        self._ticks = array("d")
        self._collections = array("d")
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="bench-stalls", daemon=True)

    def __enter__(self) -> StallWatch:
        gc.callbacks.append(self._note_collection)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopping = True
        self._thread.join()
        gc.callbacks.remove(self._note_collection)

    def _run(self) -> None:
        clock, sleep, note = time.perf_counter, time.sleep, self._ticks.append
        while not self._stopping:
            note(clock())
            sleep(TICK_S)
            note(clock())

    def _note_collection(self, moment: str, _: object) -> None:
        """Called by the collector, which nothing interrupts: "start" and "stop" come in turn."""
        self._collections.append(time.perf_counter())

    def stalls_ms(self, phase: Phase) -> list[float]:
        """The delays of all ticks that overlap with the phase. Once it has ended."""
        return [(lasted_s - TICK_S) * 1e3 for lasted_s in lengths_s(self._ticks, phase)]

    def collection_ms_max(self, phase: Phase) -> float:
        """The longest garbage collection that overlaps with the phase: no Python thread runs meanwhile. Once it has ended."""
        return max(lengths_s(self._collections, phase), default=0.0) * 1e3


def lengths_s(moments: Sequence[float], phase: Phase) -> list[float]:
    """How long each part lasted that overlaps with the phase. ``moments``: from, to, from, to, ..."""
    pairs = zip(moments[::2], moments[1::2], strict=False)
    return [to - since for since, to in pairs if since < phase.end_s and to > phase.start_s]


def witness(say: Say) -> None:
    """The step of a process that shares nothing with the store but the machine: a line of phases comes in, their stalls go out."""
    with StallWatch() as watch:
        say(event="ready")
        phases = [Phase(*phase) for phase in json.loads(sys.stdin.readline())]
    say(event="stalls", stalls_ms=[_summary(watch.stalls_ms(phase)) for phase in phases])


def _summary(stalls_ms: list[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum in milliseconds."""
    middle, high = np.percentile(stalls_ms, [50, 99]) if stalls_ms else (0.0, 0.0)
    return {"p50_ms": round(float(middle), 3), "p99_ms": round(float(high), 3), "max_ms": round(max(stalls_ms, default=0.0), 3)}


class Stalls:
    """``gil_stall_p99``: phases of work at full rate, each seen by a thread of this process and by a process beside it."""

    def __init__(self, keys: KeysStore, setting: Setting) -> None:
        self._keys = keys
        self._setting = setting
        self._phase_s = 0.1 if setting.quick else PHASE_S
        self._never = threading.Event()
        self._phases: list[Phase] = []
        self._rates: dict[str, float] = {}

    def measure(self) -> list[Item]:
        """The worst phase's percentile (median of the rounds) and the longest stop of all."""
        rounds = min(1 if self._setting.quick else ROUNDS, self._setting.rounds)
        with child_process("witness") as process:
            wait_for(process, "ready")
            with StallWatch() as watch:
                starts = []
                for number in range(rounds):
                    self._setting.console.print(f"{NAME}: round {number + 1} of {rounds}", highlight=False)
                    starts.append(len(self._phases))
                    self._round()
            machine = self._ask(process)
        seen = [watch.stalls_ms(phase) for phase in self._phases]
        rounds_p99_ms = []
        for start, stop in zip(starts, [*starts[1:], len(self._phases)], strict=True):
            part = zip(self._phases[start:stop], seen[start:stop], strict=True)
            rounds_p99_ms.append(max(_summary(stalls_ms)["p99_ms"] for phase, stalls_ms in part if phase.name != IDLE))
        longest_ms = max(max(stalls_ms) for phase, stalls_ms in zip(self._phases, seen, strict=True) if phase.name != IDLE)
        facts = self._facts(watch, seen, machine)
        return [
            value_item(f"{NAME}.p99", rounds_p99_ms, unit="ms", bar=P99_BAR, facts=facts),
            value_item(f"{NAME}.max", [longest_ms], unit="ms", bar=MAX_BAR, facts=facts),
        ]

    def _ask(self, process: subprocess.Popen[str]) -> list[dict[str, float]]:
        assert process.stdin is not None
        process.stdin.write(json.dumps([(phase.name, phase.start_s, phase.end_s) for phase in self._phases]) + "\n")
        process.stdin.flush()
        answer: list[dict[str, float]] = wait_for(process, "stalls")["stalls_ms"]
        return answer

    def _facts(self, watch: StallWatch, seen: list[list[float]], machine: list[dict[str, float]]) -> dict[str, Any]:
        """By phase: the thread's stops over all rounds, and the worst of what the process beside it saw at the same time."""
        facts: dict[str, Any] = {"tick_ms": TICK_S * 1e3, "switch_interval_ms": sys.getswitchinterval() * 1e3, "rates": self._rates}
        for name in dict.fromkeys(phase.name for phase in self._phases):
            places = [place for place, phase in enumerate(self._phases) if phase.name == name]
            stalls_ms = [value for place in places for value in seen[place]]
            beside = {f"machine_{what}": max(machine[place][what] for place in places) for what in ("p99_ms", "max_ms")}
            collection_ms = round(max(watch.collection_ms_max(self._phases[place]) for place in places), 3)
            facts[name] = {"ticks": len(stalls_ms), **_summary(stalls_ms), **beside, "garbage_collection_max_ms": collection_ms}
        return facts

    # --- the phases ---------------------------------------------------------------------------------------------------

    def _round(self) -> None:
        bytes_max = flush_bytes_max(self._setting)
        block_bytes = MIB // 4 if self._setting.quick else BLOCK_BYTES
        raw = list(touched_memory(16 * block_bytes).reshape(16, -1))
        kv = list(_like_kv(16 * block_bytes).reshape(16, -1))
        self._flush("flush_raw", raw, 1, bytes_max)
        self._flush("flush_encoded", kv, 1, bytes_max)
        self._flush("commit", [bytes(SMALL_BLOCK_BYTES)], PUTS_PER_JOB, bytes_max, buffer_bytes=(2 if self._setting.quick else 16) * MIB)
        for _ in range(1 if self._setting.quick else REOPENINGS):
            self._open("reopen")
        destroy(self._keys.index_folder)
        self._open("rebuild")

    def _open(self, name: str) -> None:
        started = time.perf_counter()
        with self._keys.opened():
            self._phases.append(Phase(name, started, time.perf_counter()))

    def _wait(self, name: str) -> None:
        """The thread that is watched has the interpreter to itself, as far as the store goes."""
        started = time.perf_counter()
        self._never.wait(self._phase_s)
        self._phases.append(Phase(name, started, time.perf_counter()))

    def _flush(self, name: str, blocks: Sequence[Any], per_call: int, bytes_max: int, *, buffer_bytes: int | None = None) -> None:
        """An idle store, then the same while it writes and commits at its full rate."""
        path = self._setting.folder("stalls")
        buffer_bytes = buffer_bytes or (16 * MIB if self._setting.quick else 256 * MIB)
        with opened(path, capacity=3 * bytes_max + 512 * MIB, buffer=buffer_bytes, codec="auto") as store:
            self._setting.settle(store)
            self._wait(IDLE)
            with FullRate(store, blocks, blocks_per_call=per_call, bytes_max=bytes_max) as load:
                self._wait(name)
            self._rates[f"{name}_blocks_per_s"] = round(load.rate_GB_s * 1e9 / len(blocks[0]))
        shutil.rmtree(path)


def flush_bytes_max(setting: Setting) -> int:
    """What is flushed at most in one phase; it is deleted afterwards."""
    return 64 * MIB if setting.quick else BYTES_MAX


def _like_kv(size_bytes: int) -> ByteArray:
    """bf16 numbers of a normal distribution: they are encoded, and take two thirds of their size then."""
    numbers = np.random.default_rng(6).standard_normal(size_bytes // 2, dtype=np.float32)
    return np.ascontiguousarray((numbers.view(np.uint32) >> 16).astype("<u2")).view(np.uint8)
