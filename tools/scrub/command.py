"""``kvlode scrub`` as a command: from options to lines on standard output and an exit code."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

from ...format.errors import DeviceError
from ...gds.posix import PosixDevice
from ..fsck.command import interrupts_ask
from ..fsck.findings import ExitBit, Finding, Report
from ..fsck.options import Progress, Silence
from ..fsck.progress import SCHEMA, BarProgress
from ..fsck.show import finding_line, problem_json
from ..fsck.source import SegmentRef
from ..output import bytes_text, count_text, printable
from .pace import Pace, PacedDevice, WaitingStop
from .scrubber import Scrubber, ScrubOptions


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for."""

    path: str
    options: ScrubOptions
    rate_bytes_s: int | None
    as_json: bool = False


class _Lines:
    """``Output`` on standard output, remarks on standard error. Keeps the streams: bars on a terminal redirect them."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._out = sys.stdout
        self._err = sys.stderr

    def finding(self, finding: Finding) -> None:
        """See ``Output``."""
        self._print(problem_json(finding) if self._as_json else finding_line(finding))

    def error(self, text: str) -> None:
        """See ``Output``."""
        self._print(json.dumps({"type": "error", "schema": SCHEMA, "text": text}) if self._as_json else printable(f"error: {text}"))

    def remark(self, text: str) -> None:
        """See ``Output``."""
        print(printable(f"kvlode: {text}"), file=self._err, flush=True)

    def segment(self, ref: SegmentRef, report: Report, left: int) -> None:
        """See ``Output``; people are told of findings only."""
        coverage = report.coverage
        if self._as_json:
            line: dict[str, Any] = {
                "type": "segment",
                "schema": SCHEMA,
                "segment": f"{ref.segment_id:016x}",
                "path": ref.name,
                "counts": dict(sorted(report.counts.items())),
                "errors": report.errors,
                "records_checked": coverage.records_checked,
                "bytes_checked": coverage.bytes_checked,
                "bytes_present": coverage.bytes_present,
                "left": left,
            }
            self._print(json.dumps(line))

    def summary(self, request: Request, scrubber: Scrubber, exit_code: int, duration_s: float) -> None:
        """The last line."""
        totals, damaged, unsealed = scrubber.totals, scrubber.damaged_segments(), scrubber.survey.unsealed
        if self._as_json:
            line = {
                "type": "summary",
                "schema": SCHEMA,
                "path": request.path,
                "exit_code": exit_code,
                "segments_checked": totals.segments,
                "segments_damaged": damaged,
                "segments_vanished": totals.vanished,
                "segments_unsealed": unsealed,
                "records_checked": totals.records,
                "bytes_checked": totals.bytes_checked,
                "errors": totals.errors,
                "interrupted": scrubber.interrupted,
                "duration_s": round(duration_s, 3),
            }
            self._print(json.dumps(line))
            return
        checked = f"{count_text(totals.segments, 'segment')}, {count_text(totals.records, 'record')}, {bytes_text(totals.bytes_checked)}"
        text = f"{request.path}: checked {checked} in {duration_s:.1f} s; damage is known in {count_text(damaged, 'segment')}"
        text += f", {unsealed:,} not sealed yet" if unsealed else ""
        text += f", {totals.vanished:,} freed meanwhile" if totals.vanished else ""
        text += ", interrupted" if scrubber.interrupted else ""
        self._print(printable(f"{text} (exit code {exit_code})"))

    def _print(self, line: str) -> None:
        print(line, file=self._out, flush=True)


def run_scrub(request: Request) -> int:
    """Scrub and print; returns the exit code. Raises ``PathUnavailable`` where there is no store, ``DeviceError`` if it cannot be read."""
    started_s = time.monotonic()
    stop, lines, device = WaitingStop(), _Lines(request.as_json), PosixDevice()
    bars = BarProgress(sys.stderr) if sys.stderr.isatty() else None
    progress: Progress = bars if bars is not None else Silence()
    paced = PacedDevice(device, Pace(request.rate_bytes_s, time.monotonic, stop.pause))
    scrubber = Scrubber(paced, os.path.abspath(request.path), request.options, lines, progress, stop)
    code = 0
    with interrupts_ask(stop):
        try:
            scrubber.run()
        except DeviceError as error:
            if not scrubber.begun:
                raise
            lines.error(str(error))
            code = int(ExitBit.OPERATIONAL)
        finally:
            scrubber.close()
            if bars is not None:
                bars.close()
            device.close()
        code |= scrubber.exit_code()
        lines.summary(request, scrubber, code, time.monotonic() - started_s)
    return code
