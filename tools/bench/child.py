"""The steps of the bench that run in processes of their own; ``processes`` starts them.

``python -m kvlode.tools.bench.child STEP JSON``, the object being the step's keyword arguments; each line of output is a JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from ...format.errors import KvlodeError
from .keys_store import fill, make_up
from .kv_model import compute_kv
from .memory_use import measure_memory
from .stalls import witness

STEPS: dict[str, Callable[..., None]] = {
    "fill": fill,
    "make_up": make_up,
    "memory": measure_memory,
    "real_kv": compute_kv,
    "witness": witness,
}


def say(**facts: Any) -> None:
    """See ``processes.Say``."""
    print(json.dumps(facts), flush=True)


def main(arguments: list[str]) -> int:
    """Run a step. Returns 8 after an error that the parent was told of."""
    try:
        STEPS[arguments[0]](say, **json.loads(arguments[1]))
    except KvlodeError as error:
        say(event="error", text=str(error))
        return 8
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
