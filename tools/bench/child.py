"""Processes of their own for the items about a million keys: one to fill a store and be killed, one whose memory is measured.

Run by ``tools.bench.million`` as ``python -m kvlode.tools.bench.child STEP JSON``; each line of output is a JSON object.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from ...engine.contract import BlockSpace
from ...format.errors import KvlodeError
from .machine import anonymous_bytes
from .workload import BLOCK_BYTES, SMALL_BLOCK_BYTES, Blocks, bench_key, bench_namespace, opened

PUTS_PER_JOB = 500
MEMORY_LOOKUPS = 64
MEMORY_LOOKUP_KEYS = 4096


def say(**facts: Any) -> None:
    """One line for the parent."""
    print(json.dumps(facts), flush=True)


def put_small(space: BlockSpace, numbers: range) -> None:
    """Put the small blocks ``numbers``. Raises ``KvlodeError`` when one was refused."""
    block = bytes(SMALL_BLOCK_BYTES)
    for start in range(numbers.start, numbers.stop, PUTS_PER_JOB):
        part = range(start, min(start + PUTS_PER_JOB, numbers.stop))
        job = space.submit_put([bench_key(number) for number in part], [block] * len(part), chained=False)
        refused = [status for status in job.statuses if not status]
        if refused:
            raise KvlodeError("a put was refused", actual=refused[0].reason)


def fill(path: str, start: int, count: int, options: dict[str, Any]) -> None:
    """Put ``count`` keys from number ``start`` on, say so when they are durable, and go on putting until somebody kills us."""
    with opened(path, **options) as store:
        space = store.namespace(bench_namespace(SMALL_BLOCK_BYTES))
        step = 50_000
        for position in range(start, start + count, step):
            put_small(space, range(position, min(position + step, start + count)))
            say(event="progress", keys=min(position + step, start + count))
        if not store.flush():
            raise KvlodeError("the keys could not be flushed", where=path, actual=store.stats()["counters"])
        say(event="durable", keys=start + count)
        surplus = start + count
        while True:  # killed in the middle of its work
            put_small(space, range(surplus, surplus + PUTS_PER_JOB))
            surplus += PUTS_PER_JOB


def memory(path: str, start: int, count: int, options: dict[str, Any]) -> None:
    """What the store takes beside its buffer once everything was used: buffer, read and write memory, lookups all over the index."""
    import torch  # noqa: F401  an engine has it loaded; it belongs to the baseline

    blocks = Blocks(2 * options["buffer"] // BLOCK_BYTES + 1, BLOCK_BYTES)
    outs = list(np.full((min(32, blocks.count), BLOCK_BYTES), 0xEE, dtype=np.uint8))
    generator = np.random.default_rng(start)
    numbers = [generator.integers(0, count, MEMORY_LOOKUP_KEYS).tolist() for _ in range(MEMORY_LOOKUPS)]
    baseline_bytes = anonymous_bytes()
    with opened(path, **options) as store:
        blocks.put_all(store)
        large = store.namespace(bench_namespace(BLOCK_BYTES))
        statuses = large.get_many_into(blocks.keys[: len(outs)], outs)
        small = store.namespace(bench_namespace(SMALL_BLOCK_BYTES))
        found = sum(sum(small.contains([bench_key(number) for number in part])) for part in numbers)
        beyond_bytes = anonymous_bytes() - baseline_bytes - store.config.buffer_bytes
        say(
            event="memory",
            beyond_bytes=beyond_bytes,
            correct=sum(s == 0 and blocks.is_block(n, out) for n, (s, out) in enumerate(zip(statuses, outs, strict=True))),
            asked=len(outs),
            found=found,
            looked_up=MEMORY_LOOKUPS * MEMORY_LOOKUP_KEYS,
        )


STEPS = {"fill": fill, "memory": memory}


def main(arguments: list[str]) -> int:
    """``STEP JSON``, the object being the step's keyword arguments."""
    try:
        STEPS[arguments[0]](**json.loads(arguments[1]))
    except KvlodeError as error:
        say(event="error", text=str(error))
        return 8
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
