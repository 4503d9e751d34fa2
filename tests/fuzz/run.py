"""Fuzz the parsers: ``python tests/fuzz/run.py --seconds 60``, or one of them by name.

Without ``--seconds`` it runs a fixed number of cases. Every case follows from seed, target and number, and a failure prints the
three: ``--case NUMBER`` repeats it. ``--grow`` keeps an input for every kind of outcome that the corpus does not have yet.
``--atheris`` lets atheris (``pip install atheris``, not needed otherwise) choose the inputs by coverage.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import itertools
import random
import signal
import sys
import tempfile
import time
import tracemalloc
import types
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:
    sys.path.insert(0, str(HERE.parent))

from fuzz.mutate import case  # noqa: E402
from fuzz.targets import TARGETS, Target  # noqa: E402

CORPUS = HERE / "corpus"
COMPRESSED_SUFFIX = ".zz"
PLAIN_BYTES_MAX = 512
HANG_S = 20
"""An input that keeps a parser busy for so long is reported as a hang; the parsers need milliseconds."""
MEMORY_EVERY = 16
"""Every so many cases are measured for what they allocate, which slows a case down."""
MINIMISING_STEPS_MAX = 300


class FuzzFailed(Exception):
    """A parser did what it must not do; the message says which, with which input, and how to repeat it."""

    def __init__(self, message: str, target: Target, data: bytes) -> None:
        super().__init__(message)
        self.target = target
        self.data = data


class HangError(Exception):
    """A parser did not come back."""


@dataclass
class Report:
    """Outcomes of a run, by name."""

    target: str
    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        shown = ", ".join(f"{count} {name}" for name, count in self.outcomes.most_common(6))
        return f"{self.target}: {self.cases} cases, {len(self.outcomes)} kinds of outcome: {shown}"


def corpus(target: Target) -> list[bytes]:
    """The kept inputs of a target, in the order of their names."""
    return [read_entry(path) for path in sorted((CORPUS / target.name).glob("*"))]


def read_entry(path: Path) -> bytes:
    """A kept input; most pages are zeros, so the large ones are compressed."""
    data = path.read_bytes()
    return zlib.decompress(data) if path.suffix == COMPRESSED_SUFFIX else data


def write_entry(folder: Path, label: str, data: bytes) -> None:
    """Keep an input under its label."""
    folder.mkdir(parents=True, exist_ok=True)
    if len(data) > PLAIN_BYTES_MAX:
        (folder / f"{label}{COMPRESSED_SUFFIX}").write_bytes(zlib.compress(data, 9))
    else:
        (folder / label).write_bytes(data)


def pool_of(target: Target) -> list[bytes]:
    """What inputs are made from: the seeds, which follow from the test vectors, and the corpus."""
    return [*target.seeds(), *corpus(target)]


def outcome(target: Target, data: bytes) -> str:
    """What a parser made of the input, in a few words. Raises what is not documented."""
    try:
        return f"accepted: {target.run(data)}"
    except target.refusals as error:
        check = getattr(error, "check", None) or getattr(error, "what", "")
        return f"{type(error).__name__}: {check}"[:80]


def measured(target: Target, data: bytes) -> str:
    """The outcome, and an error when more memory was allocated at once than the size of the input allows."""
    tracemalloc.start()
    try:
        result = outcome(target, data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    limit = target.memory_bytes_max(len(data))
    if peak > limit:
        raise MemoryError(f"{peak} bytes allocated for an input of {len(data)} bytes, the limit is {limit}")
    return result


def _alarmed(signum: int, frame: object) -> None:
    raise HangError(f"no answer within {HANG_S} s")


@contextlib.contextmanager
def hang_guard() -> Iterator[None]:
    """While it holds, ``checked`` ends an input that hangs. In the main thread only: it works by an alarm."""
    previous = signal.signal(signal.SIGALRM, _alarmed)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, previous)


def checked(target: Target, data: bytes, name: str, *, memory: bool) -> str:
    """The outcome of one input. Raises ``FuzzFailed`` with the name of the case for a crash, a hang or wasted memory.

    Call it under ``hang_guard``.
    """
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        return measured(target, data) if memory else outcome(target, data)
    except Exception as error:
        shown = data.hex() if len(data) <= 64 else f"{data[:64].hex()}... ({len(data)} bytes)"
        raise FuzzFailed(f"{target.name}, {name}: {type(error).__name__}: {error}; input {shown}", target, data) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def numbers(cases: int, seconds: float | None) -> Iterator[int]:
    """Case numbers: so many, or as many as the time allows."""
    if seconds is None:
        yield from range(cases)
        return
    end = time.monotonic() + seconds
    for number in itertools.count():
        if time.monotonic() >= end:
            return
        yield number


def fuzz(target: Target, case_numbers: Iterable[int], seed: int) -> Report:
    """Run the cases of these numbers. Raises ``FuzzFailed``."""
    report, pool = Report(target.name), pool_of(target)
    with hang_guard():
        for number in case_numbers:
            name = f"repeat with: python tests/fuzz/run.py {target.name} --seed {seed} --case {number}"
            data = case(target, pool, seed, number)
            report.outcomes[checked(target, data, name, memory=number % MEMORY_EVERY == 0)] += 1
            report.cases += 1
    return report


def replay(target: Target) -> Report:
    """Run the seeds and the corpus, each measured. Raises ``FuzzFailed``."""
    report = Report(target.name)
    with hang_guard():
        for index, data in enumerate(pool_of(target)):
            report.outcomes[checked(target, data, f"seed or corpus entry {index}", memory=True)] += 1
            report.cases += 1
    return report


def keep_failure(error: FuzzFailed) -> Path:
    """Write the input of a failure to the working folder; with a fix, it belongs into the corpus."""
    path = Path(f"crash-{error.target.name}-{hashlib.sha256(error.data).hexdigest()[:8]}")
    path.write_bytes(error.data)
    return path


# --- growing the corpus -------------------------------------------------------------------------------------------------------


def minimised(target: Target, data: bytes, wanted: str) -> bytes:
    """A shorter input with the same outcome: parts are left out as long as it stays. Raises ``FuzzFailed``."""
    size, steps = len(data) // 2, 0
    while size and steps < MINIMISING_STEPS_MAX:
        start = 0
        while start < len(data) and steps < MINIMISING_STEPS_MAX:
            shorter = data[:start] + data[start + size :]
            steps += 1
            if checked(target, shorter, f"while minimising {wanted!r}", memory=False) == wanted:
                data = shorter
            else:
                start += size
        size //= 2
    return data


def grow(target: Target, case_numbers: Iterable[int], seed: int) -> int:
    """Keep an input for every outcome that neither seeds nor corpus have; the number of inputs kept. Raises ``FuzzFailed``."""
    pool, kept = pool_of(target), 0
    known = {outcome(target, data) for data in pool}
    for number in case_numbers:
        data = case(target, pool, seed, number)
        found = checked(target, data, f"case {number} of seed {seed}", memory=False)
        if found not in known:
            known.add(found)
            data = minimised(target, data, found)
            label = "".join(letter if letter.isalnum() else "-" for letter in found.lower()).strip("-")[:48]
            write_entry(CORPUS / target.name, f"{label}-{hashlib.sha256(data).hexdigest()[:8]}", data)
            kept += 1
    return kept


# --- atheris -------------------------------------------------------------------------------------------------------------------


def run_atheris(target: Target, arguments: Sequence[str], seed: int) -> None:
    """Hand the target to atheris, with the mutations and the checksums of this package; ends the process."""
    import atheris

    pool = pool_of(target)

    def mutator(data: bytes, size_max: int, mutation_seed: int) -> bytes:
        mutated = bytearray(atheris.Mutate(data, size_max))
        if random.Random(mutation_seed).random() < 0.5:
            mutated = bytearray(case(target, [data or b"\0", *pool], seed, mutation_seed))
        target.mend(mutated)
        return bytes(mutated[:size_max])

    def one_input(data: bytes) -> None:
        outcome(target, data)

    with tempfile.TemporaryDirectory() as folder:
        for index, data in enumerate(pool):
            (Path(folder) / str(index)).write_bytes(data)
        for function in gc.get_objects():
            if isinstance(function, types.FunctionType) and (function.__module__ or "").startswith("kvlode.format"):
                atheris.instrument_func(function)
        atheris.Setup([sys.argv[0], *arguments, folder], one_input, custom_mutator=mutator)
        atheris.Fuzz()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"all by default: {', '.join(TARGETS)}")
    parser.add_argument("--seed", type=int, help="drawn by default, and printed")
    parser.add_argument("--cases", type=int, default=10_000, help="cases for each target, without --seconds")
    parser.add_argument("--seconds", type=float, help="time for each target")
    parser.add_argument("--case", type=int, help="run the case of this number alone")
    parser.add_argument("--grow", action="store_true", help="add inputs with new outcomes to the corpus")
    parser.add_argument("--atheris", action="store_true", help="choose inputs by coverage; needs one target")
    options, rest = parser.parse_known_args(arguments)
    unknown = [name for name in options.targets if name not in TARGETS]
    if unknown or (rest and not options.atheris) or (options.atheris and len(options.targets) != 1):
        parser.error(f"unknown {unknown or rest}" if unknown or rest else "--atheris needs exactly one target")
    options.rest = rest
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    chosen = [TARGETS[name] for name in options.targets] or list(TARGETS.values())
    print(f"seed {seed}", flush=True)
    if options.atheris:
        run_atheris(chosen[0], options.rest, seed)
    failures = 0
    for target in chosen:
        cases = [options.case] if options.case is not None else numbers(options.cases, options.seconds)
        try:
            if options.grow:
                with hang_guard():
                    print(f"{target.name}: {grow(target, cases, seed)} inputs kept", flush=True)
            else:
                print(fuzz(target, cases, seed), flush=True)
        except FuzzFailed as error:
            failures += 1
            print(f"{error}; kept as {keep_failure(error)}", file=sys.stderr, flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
