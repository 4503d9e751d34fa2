"""``kvlode fsck`` as a command: from options to a report on standard output and an exit code, whatever happens in between."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from ...format.errors import InvalidConfig, KvlodeError, PathUnavailable
from ...gds.device import Device
from ...gds.posix import PosixDevice
from .consent import agrees
from .findings import ExitBit, Report
from .index_view import IndexSource
from .options import CheckOptions, Progress, Silence, Stop
from .plan import make_plan
from .progress import BarProgress, JsonProgress
from .repair import repair_store
from .run import check_store
from .show import explanations, problem_json, report_lines, summary_json

SourceMaker = Callable[[Device, str], IndexSource | None]


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for."""

    path: str
    options: CheckOptions
    repair: str | None = None
    """``lossless`` or ``lossy``."""
    yes: bool = False
    as_json: bool = False
    progress_json: bool = False


def explain(wanted: str) -> int:
    """Print the explanation of a problem id, or of all."""
    text = explanations(wanted)
    if text is None:
        print(f"kvlode: no problem has the id {wanted!r}; kvlode fsck --explain all lists them", file=sys.stderr)
        return int(ExitBit.USAGE)
    print(text, end="")
    return 0


def run_fsck(request: Request, make_source: SourceMaker) -> int:
    """Check, repair if that was asked for and agreed to, print; returns the exit code. The summary appears in any case."""
    stop = Stop()
    with interrupts_ask(stop):
        session = _Session(request, stop)
        try:
            session.run(make_source)
        except KeyboardInterrupt:
            session.report.interrupted = True
        except KvlodeError as error:
            session.fail(error)
        finally:
            session.close()
        return session.print_report()


class _Session:
    """One run of the command."""

    def __init__(self, request: Request, stop: Stop) -> None:
        self.report = Report(request.path, request.options.level)
        self._request = request
        self._stop = stop
        self._usage = False
        self._only_failure = False
        self._device = PosixDevice()
        self._bars: BarProgress | None = None

    def run(self, make_source: SourceMaker) -> None:
        request, options = self._request, self._request.options
        if request.repair is not None:
            if options.live:
                raise InvalidConfig("a store in use cannot be repaired", expected="either --repair or --live", actual="both")
            if os.path.isfile(request.path):
                raise InvalidConfig("one segment file cannot be repaired by itself", where=request.path, action="Name the store's folder.")
        path = os.path.abspath(request.path)
        progress = self._progress()
        source = make_source(self._device, path)
        self.report = check_store(self._device, path, options, source, progress, self._stop)
        if request.repair is None or self.report.interrupted:
            return
        lossy = request.repair == "lossy"
        plan = make_plan(self.report, lossy=lossy, has_index=source is not None)
        if agrees(plan, yes=request.yes, show=self._show_plan, ask=self._ask if sys.stdin.isatty() else None):
            now_ns = options.now_ns if options.now_ns is not None else time.time_ns()
            self.report = repair_store(
                self._device, path, self.report, options, source, lossy=lossy, now_ns=now_ns, progress=progress, stop=self._stop
            )

    def _progress(self) -> Progress:
        if self._request.progress_json:
            return JsonProgress(lambda line: print(line, file=sys.stderr, flush=True))
        if self._request.as_json:
            return JsonProgress(lambda line: print(line, flush=True))
        if sys.stderr.isatty():
            self._bars = BarProgress(sys.stderr)
            return self._bars
        return Silence()

    def _show_plan(self, text: str) -> None:
        """On standard error where standard output is for a program."""
        if self._bars is not None:
            self._bars.close()
        print(text, file=sys.stderr if self._request.as_json else sys.stdout, flush=True)

    def _ask(self, question: str) -> str:
        print(question, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line

    def fail(self, error: KvlodeError) -> None:
        """The run ended in an error: a wrong request, or one that could not be carried out. Where nothing was checked, that is all."""
        self._usage = isinstance(error, InvalidConfig | PathUnavailable)
        self._only_failure = self._usage or not self.report.passes
        self.report.errors.append(str(error))

    def close(self) -> None:
        if self._bars is not None:
            self._bars.close()
        self._device.close()

    def print_report(self) -> int:
        """To standard output; whoever reads it may stop reading. A request that cannot work is that alone, whatever was found before."""
        code = int(ExitBit.USAGE) if self._usage else self.report.exit_code
        if self._only_failure:
            print(f"kvlode: {self.report.errors[-1]}", file=sys.stderr)
        try:
            if self._request.as_json:
                for finding in self.report.findings:
                    print(problem_json(finding))
                print(summary_json(self.report, code), flush=True)
            elif not self._only_failure:
                print("\n".join(report_lines(self.report, code)), flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it ends
        return code


@contextlib.contextmanager
def interrupts_ask(stop: Stop) -> Iterator[None]:
    """SIGINT and SIGTERM ask the check to end at the next safe place; a second SIGINT does not wait for that."""

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.interrupt()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
