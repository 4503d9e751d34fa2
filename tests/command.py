"""Running the ``kvlode`` command in tests: in this process where that will do, else in one of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from kvlode.tools import cli


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        answer = json.loads(self.out.splitlines()[-1])
        assert isinstance(answer, dict)
        return answer


def run_here(*arguments: object, columns: int | None = None) -> Done:
    """The command in this process, as if its output were a pipe; ``columns`` is the width of the terminal it believes in."""
    out, err = io.StringIO(), io.StringIO()
    before, argv = os.environ.get("COLUMNS"), sys.argv
    sys.argv = ["kvlode", *map(str, arguments)]
    if columns is None:
        os.environ.pop("COLUMNS", None)
    else:
        os.environ["COLUMNS"] = str(columns)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
        raise AssertionError("the command ends with an exit code")
    except SystemExit as end:
        assert isinstance(end.code, int)
        return Done(end.code, out.getvalue(), err.getvalue())
    finally:
        sys.argv = argv
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def command_line(*arguments: object) -> list[str]:
    """The words that start the command in a process of its own."""
    return [sys.executable, "-c", "from kvlode.tools.cli import main; main()", *map(str, arguments)]


def run_apart(*arguments: object, **environment: str) -> Done:
    """The command in a process of its own."""
    done = subprocess.run(
        command_line(*arguments),
        capture_output=True,
        text=True,
        timeout=100,
        stdin=subprocess.DEVNULL,
        check=False,
        env=os.environ | environment,
    )
    return Done(done.returncode, done.stdout, done.stderr)
