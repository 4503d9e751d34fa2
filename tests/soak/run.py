"""A long mixed workload near the capacity cap, with kills: ``python tests/soak/run.py --minutes 60``.

Rounds of one writing and one following process on one store. Most rounds end with SIGKILL, the others with a clean end;
sometimes the index is deleted in between. It fails when a read is wrong, a flushed delete comes back, the folder outgrows
its capacity, memory or descriptors grow within a round, or ``kvlode fsck --full`` is not clean at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
MEMORY_GROWTH_MAX_BYTES = 64 * MIB
DESCRIPTOR_GROWTH_MAX = 16
END_S = 120.0
"""How long a process may take to end."""


class SoakFailed(Exception):
    """What went wrong, in one line."""


@dataclass
class Options:
    folder: Path
    minutes: float
    round_s: float
    seed: int
    capacity_mib: int


@dataclass
class Totals:
    """What the whole run did."""

    rounds: int = 0
    kills: int = 0
    indexes_deleted: int = 0
    operations: int = 0
    hits: int = 0
    follower_hits: int = 0
    segments_freed: int = 0
    reinserted_blocks: int = 0
    disk_bytes_max: int = 0
    memory_growth_bytes_max: int = 0
    descriptors_max: int = 0
    samples: list[dict[str, int]] = field(default_factory=list)


class Soak:
    def __init__(self, options: Options) -> None:
        self.options = options
        self.chance = random.Random(options.seed)
        self.totals = Totals()
        self.store = options.folder / "store"
        self.journal = options.folder / "journal"

    def run(self) -> Totals:
        end_s = time.monotonic() + self.options.minutes * 60
        while time.monotonic() < end_s:
            self._round(min(self.options.round_s, max(5.0, end_s - time.monotonic())))
        self._check_files()
        return self.totals

    # --- one round --------------------------------------------------------------------------------------------

    def _round(self, seconds: float) -> None:
        totals = self.totals
        totals.rounds += 1
        seed = self.options.seed * 1000 + totals.rounds
        print(f"round {totals.rounds}: seed {seed}, {seconds:.0f} s", file=sys.stderr)
        writer = self._start("writer.py", str(self.store), str(self.journal), str(seed), f"{self.options.capacity_mib}MiB")
        samples: list[dict[str, int]] = []
        first = writer.stdout.readline() if writer.stdout else ""  # the store is open and what it holds was compared
        if not first:
            raise SoakFailed(f"round {totals.rounds}: the writer ended at once with exit code {writer.wait(END_S)}")
        samples.append(json.loads(first))
        collector = threading.Thread(target=self._collect, args=(writer, samples))
        collector.start()
        follower = self._start("follower.py", str(self.store), str(seed))
        self._watch(writer, follower, time.monotonic() + seconds * self.chance.uniform(0.6, 1.0))
        killed = self.chance.random() < 0.7
        self._end(follower, "follower", signal.SIGTERM)
        self._end(writer, "writer", signal.SIGKILL if killed else signal.SIGTERM)
        collector.join(END_S)
        totals.follower_hits += json.loads(follower.stdout.read().splitlines()[-1])["hits"] if follower.stdout else 0
        self._account(samples)
        if killed:
            totals.kills += 1
        if self.chance.random() < 0.15:
            shutil.rmtree(self.store / "index")
            totals.indexes_deleted += 1

    @staticmethod
    def _start(script: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, str(HERE / script), *arguments], stdout=subprocess.PIPE, text=True)

    @staticmethod
    def _collect(writer: subprocess.Popen[str], samples: list[dict[str, int]]) -> None:
        assert writer.stdout is not None
        for line in writer.stdout:
            if line.endswith("}\n"):
                samples.append(json.loads(line))

    def _watch(self, writer: subprocess.Popen[str], follower: subprocess.Popen[str], end_s: float) -> None:
        """Until the round is over: both processes live, and the folder stays within its capacity."""
        pause = threading.Event()
        while time.monotonic() < end_s:
            for name, process in (("writer", writer), ("follower", follower)):
                if process.poll() is not None:
                    raise SoakFailed(f"round {self.totals.rounds}: the {name} ended with exit code {process.returncode}")
            used_bytes = allocated_bytes(self.store)
            self.totals.disk_bytes_max = max(self.totals.disk_bytes_max, used_bytes)
            if used_bytes > self.options.capacity_mib * MIB:
                raise SoakFailed(f"round {self.totals.rounds}: {used_bytes} bytes in the folder, capacity {self.options.capacity_mib} MiB")
            pause.wait(0.2)  # the size of a folder cannot be waited for

    def _end(self, process: subprocess.Popen[str], name: str, number: signal.Signals) -> None:
        process.send_signal(number)
        try:
            code = process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            raise SoakFailed(f"round {self.totals.rounds}: the {name} did not end within {END_S:.0f} s") from None
        expected = -signal.SIGKILL if number is signal.SIGKILL else 0
        if code != expected:
            raise SoakFailed(f"round {self.totals.rounds}: the {name} ended with exit code {code}, expected {expected}")

    def _account(self, samples: list[dict[str, int]]) -> None:
        totals, last = self.totals, samples[-1]
        totals.operations += last["operations"]
        totals.hits += last["hits"]
        totals.segments_freed += last["segments_freed"]
        totals.reinserted_blocks += last["reinserted_blocks"]
        totals.samples = samples
        totals.descriptors_max = max(totals.descriptors_max, *(sample["descriptors"] for sample in samples))
        steady = samples[len(samples) // 4 :]  # caches fill in the first quarter
        if len(steady) < 9:
            return
        third = len(steady) // 3
        for name, limit in (("anon_bytes", MEMORY_GROWTH_MAX_BYTES), ("descriptors", DESCRIPTOR_GROWTH_MAX)):
            early, late = (statistics.median(sample[name] for sample in part) for part in (steady[:third], steady[-third:]))
            if name == "anon_bytes":
                totals.memory_growth_bytes_max = max(totals.memory_growth_bytes_max, int(late - early))
            if late - early > limit:
                raise SoakFailed(f"round {totals.rounds}: {name} grew from {early:.0f} to {late:.0f}")

    # --- the end ----------------------------------------------------------------------------------------------

    def _check_files(self) -> None:
        """One clean open and close, after which the check of all bytes must find nothing."""
        writer = self._start("writer.py", str(self.store), str(self.journal), str(self.options.seed), f"{self.options.capacity_mib}MiB")
        if writer.stdout is None or not writer.stdout.readline():
            raise SoakFailed("the store could not be opened at the end")
        self._end(writer, "writer", signal.SIGTERM)
        command = [str(Path(sys.executable).with_name("kvlode")), "fsck", "--full", str(self.store)]
        checked = subprocess.run(command, capture_output=True, text=True, timeout=600)
        print(checked.stdout, file=sys.stderr)
        if checked.returncode != 0:
            raise SoakFailed(f"fsck ended with exit code {checked.returncode}: {checked.stdout}{checked.stderr}")


def allocated_bytes(folder: Path) -> int:
    """Bytes of blocks that the file system has given to the files below a folder; files may vanish meanwhile."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(path, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def soak(options: Options) -> Totals:
    """Raises ``SoakFailed``; the folder is kept then, with the journal."""
    return Soak(options).run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--round-s", type=float, default=180.0, help="length of a round at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--capacity-mib", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="where (default: a new folder below the current one, removed after success)")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix=".soak-", dir="."))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        totals = soak(Options(folder, arguments.minutes, arguments.round_s, arguments.seed, arguments.capacity_mib))
    except SoakFailed as error:
        print(f"soak failed (seed {arguments.seed}, everything is kept in {folder}): {error}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    facts = {name: value for name, value in vars(totals).items() if name != "samples"}
    print(json.dumps({"seed": arguments.seed, "minutes": arguments.minutes} | facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
