"""Reading a trace: line by line, in the format that its first usable line shows, bad lines counted or refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ...format.errors import InvalidConfig, device_error
from .formats import PARSERS, LineError, Parser, detect
from .request import Request

LINE_BYTES_MAX = 64 << 20
"""A longer line is no line of a trace; it is passed over without being held in memory."""
NAMED_LINES_MAX = 5
"""Bad lines that are named one by one; the others are counted."""
UNKNOWN_LINES_MAX = 100
"""So many lines that no format knows, and the file is no trace."""
_SHOWN_CHARS = 80


@dataclass(slots=True)
class Trace:
    """The requests of a trace in the order of time, and what was passed over."""

    path: Path
    format_name: str
    block_tokens: int
    """Tokens of a full block."""
    requests: list[Request]
    skipped: int = 0
    """Lines that could not be used."""
    skipped_lines: list[str] = field(default_factory=list)
    """The first of them: line number and reason."""
    notes: list[str] = field(default_factory=list)
    unique_blocks: int = 0
    block_uses: int = 0

    @property
    def duration_s(self) -> float:
        """From the first request to the last."""
        return self.requests[-1].time_s - self.requests[0].time_s if self.requests else 0.0


def read_trace(
    path: Path, format_name: str | None = None, *, strict: bool = False, advance: Callable[[int], None] = lambda size_bytes: None
) -> Trace:
    """The trace in a file of JSON lines. ``advance`` is told the bytes of every line that was read.

    Raises ``InvalidConfig`` for a format that is not known and, with ``strict``, for the first line that cannot be used;
    ``DeviceError`` when the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _Reader(path, format_name, strict).read(file, advance)
    except OSError as error:
        raise device_error("read", path, error) from error


class _Reader:
    def __init__(self, path: Path, format_name: str | None, strict: bool) -> None:
        self._parser: Parser | None = None
        self._strict = strict
        self._first_unknown = ""
        if format_name is not None:
            if format_name not in PARSERS:
                raise InvalidConfig("no such format of a trace", expected=" or ".join(sorted(PARSERS)), actual=format_name)
            self._parser = PARSERS[format_name]()
        self._trace = Trace(path, format_name or "", 0, [])

    def read(self, file: BinaryIO, advance: Callable[[int], None]) -> Trace:
        trace, requests = self._trace, self._trace.requests
        for number, line in _lines(file):
            advance(len(line))
            try:
                requests.extend(self._requests(line))
            except LineError as error:
                self._skip(number, error)
        parser = self._parser
        if parser is None:
            if not trace.skipped:
                raise InvalidConfig("the trace is empty", where=trace.path, expected="at least one request, one JSON value a line")
            raise self._unknown()
        requests.extend(parser.rest())
        trace.format_name, trace.block_tokens = parser.name, parser.block_tokens
        trace.notes += parser.notes()
        if trace.skipped and not requests:
            raise InvalidConfig(
                "no line of the trace can be used",
                where=trace.path,
                expected=f"requests in the format {parser.name}",
                actual=trace.skipped_lines[0],
                action="Name the format with --format.",
            )
        _put_in_order(trace)
        trace.block_uses = sum(len(request.blocks) for request in requests)
        trace.unique_blocks = 1 + max((max(request.blocks) for request in requests if request.blocks), default=-1)  # ids are dense
        return trace

    def _requests(self, line: bytes) -> Iterator[Request]:
        value = _parsed(line)
        if self._parser is None:
            name = detect(value)
            if name is None:
                self._first_unknown = self._first_unknown or line[:_SHOWN_CHARS].decode(errors="replace")
                raise LineError("of no known format")
            self._parser = PARSERS[name]()
        return iter(self._parser.requests(value))

    def _skip(self, number: int, error: LineError) -> None:
        trace = self._trace
        if self._strict:
            raise InvalidConfig(
                f"line {number} of the trace cannot be used: {error}",
                where=trace.path,
                action="Leave --strict out to pass over such lines.",
            )
        trace.skipped += 1
        if len(trace.skipped_lines) < NAMED_LINES_MAX:
            trace.skipped_lines.append(f"line {number}: {error}")
        if self._parser is None and trace.skipped >= UNKNOWN_LINES_MAX:
            raise self._unknown()

    def _unknown(self) -> InvalidConfig:
        return InvalidConfig(
            "the format of the trace is not known",
            where=self._trace.path,
            expected=f"JSON lines as in one of {', '.join(sorted(PARSERS))}",
            actual=repr(self._first_unknown) if self._first_unknown else f"{self._trace.skipped} lines that are not JSON",
            action="docs/replay.md shows a line of each format.",
        )


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Number and text of each line that is not blank; of an overlong one the first bytes, which do not parse."""
    number = 0
    while line := file.readline(LINE_BYTES_MAX):
        number += 1
        overlong = len(line) == LINE_BYTES_MAX and not line.endswith(b"\n")
        while overlong and (more := file.readline(LINE_BYTES_MAX)) and not more.endswith(b"\n"):
            continue
        if line.strip():
            yield number, line[:_SHOWN_CHARS] if overlong else line


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise LineError("nested too deeply") from None
    except ValueError as error:  # not JSON, not UTF-8, a number of thousands of digits
        raise LineError(f"not JSON ({str(error)[:_SHOWN_CHARS]})") from None


def _put_in_order(trace: Trace) -> None:
    """Time runs forward, from 0: the lines of several processes may be a little out of order."""
    requests = trace.requests
    backwards = sum(later.time_s < earlier.time_s for earlier, later in itertools.pairwise(requests))
    if backwards:
        requests.sort(key=lambda request: request.time_s)
        trace.notes.append(f"{backwards:,} requests were earlier than the one before; they were put in order")
    begin_s = requests[0].time_s if requests else 0.0
    for request in requests:
        request.time_s -= begin_s
