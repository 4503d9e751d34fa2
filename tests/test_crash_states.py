"""Power cuts at every moment of a store: each state that may be on the drive is opened and compared with what was promised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.crash_states import KIB, MIB, Expectation, Run, State, open_state, read_all, record, states
from kvlode.engine.index_memory import MemoryIndex
from kvlode.engine.testing import STORE_PATH
from kvlode.format.layout import SUPERBLOCK_NAME, page_count
from kvlode.gds.memory import MemoryDevice
from kvlode.tools.fsck.options import CheckOptions, Level
from kvlode.tools.fsck.problems import Severity
from kvlode.tools.fsck.run import check_store
from kvlode.tools.index_access import GivenSource

SIZES = (1, 3000, 9000, 40_001)
ROOMY: dict[str, Any] = {
    **{"capacity": 16 * MIB, "buffer": MIB, "segment_bytes": 256 * KIB, "batch_bytes": 128 * KIB, "bounce_bytes": MIB},
    **{"io_threads": 2, "encode_threads": 1},  # starting a thread takes as long as reading a block, and each state starts them all
}
SMALL: dict[str, Any] = ROOMY | {"capacity": 2560 * KIB, "segment_bytes": 128 * KIB, "codec": "raw"}
STATES_MIN = 2400
"""Distinct states of each of the four runs."""
THOROUGH_EVERY = 40
"""One state in so many is checked to its last byte, before it is opened and afterwards, and written to."""


def roomy(run: Run) -> None:
    """Everything a host does, without reclaim: puts, chains, expiry, deletes, drops, flushes, clean reopening."""
    for step in range(100):
        name = run.chance.choice(("one", "two"))
        ident = (name, b"k%d" % run.chance.randrange(9))
        kind = run.chance.choices(("put", "delete", "flush", "drop", "time", "reopen"), (50, 14, 24, 4, 4, 4))[0]
        if kind == "put":
            run.put(ident, run.chance.choice(SIZES), ttl=run.chance.choice((None, None, None, 30.0)))
        elif kind == "delete":
            run.delete(ident)
        elif kind == "flush":
            run.flush()
        elif kind == "drop":
            run.drop(name)
        elif kind == "time":
            run.clock.advance(20.0)
        else:
            run.reopen()
        if step % 2:
            run.look()
    run.flush()


def reclaiming(run: Run) -> None:
    """A store that frees segments all the time: reinsertion of used blocks, tombstones, deletes of blocks that were copied forward."""
    for step in range(110):
        ident = ("one", b"b%02d" % run.chance.randrange(110))
        run.put(ident, 20_001)
        if step % 6 == 0:
            run.touch(ident)
        if step % 7 == 3:
            run.delete(run.chance.choice(run.idents))
        if step % 4 == 1:
            run.flush()
            run.look()
    run.flush()


RUNS: list[tuple[Callable[[Run], None], dict[str, Any], int, int]] = [
    (roomy, ROOMY, 11, 22),
    (roomy, ROOMY, 12, 26),
    (reclaiming, SMALL, 13, 2),
    (reclaiming, SMALL, 14, 2),
]
"""Workload, options, seed, and random subsets of what was not synced at each moment."""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("workload", "options", "seed", "randoms"), RUNS, ids=[f"{work.__name__}-{seed}" for work, _, seed, _ in RUNS])
def test_every_state_after_a_power_cut_keeps_the_promises(
    workload: Callable[[Run], None], options: dict[str, Any], seed: int, randoms: int, tmp_path: Path
) -> None:
    log, run = record(workload, seed, **options)
    checked = 0
    for state in states(log, randoms=randoms, seed=seed):
        check_state(state, log, run, tmp_path, thorough=checked % THOROUGH_EVERY == 0)
        checked += 1
    print(f"{workload.__name__}, seed {seed}: {len(log)} operations, {checked} distinct states")
    assert checked >= STATES_MIN


def check_state(state: State, log: list[Any], run: Run, artifacts: Path, *, thorough: bool) -> None:
    expected = Expectation.at(log, state.moment.position, run.idents)
    wrong = looks_damaged(state, expected.now_ns, Level.FULL if thorough else Level.QUICK)
    index = MemoryIndex(state.index_entries)
    store = open_state(state, run, index, expected.now_ns)
    try:
        wrong += read_all(store, run, expected)
        if thorough:
            wrong += use(store, run)
    finally:
        closed = store.close(60.0)
    assert closed, f"{state.moment}: the store did not close"
    if state.natural and thorough:
        left = findings(state.device, index.reopen(), expected.now_ns, Severity.DEGRADED, Level.FULL)
        wrong += [f"after opening: {text}" for text in left]
    if wrong:
        keep(state, artifacts)
    assert not wrong, f"{state.moment}: {'; '.join(wrong)} (the drive is kept in {artifacts})"


def looks_damaged(state: State, now_ns: int, level: Level) -> list[str]:
    """A power cut may leave things for the next open to do, but nothing that looks like damage."""
    if state.device.status(f"{STORE_PATH}/{SUPERBLOCK_NAME}") is None:
        return []  # the store was not made yet
    found = findings(state.device, MemoryIndex(state.index_entries), now_ns, Severity.DAMAGE, level)
    return [f"before opening: {text}" for text in found]


SEVERITIES = list(Severity)


def findings(device: MemoryDevice, index: MemoryIndex, now_ns: int, least: Severity, level: Level) -> list[str]:
    """What a check finds that is at least so bad, and what it could not do."""
    options = CheckOptions(level=level, now_ns=now_ns)
    report = check_store(device, STORE_PATH, options, GivenSource(device, STORE_PATH, index))
    bad = [f for f in report.findings if SEVERITIES.index(f.problem.severity) >= SEVERITIES.index(least)]
    return [f"{finding.id} {finding.text}" for finding in bad] + report.errors


def use(store: Any, run: Run) -> list[str]:
    """A store that was opened after a power cut takes new blocks and makes them durable."""
    space = store.namespace(run.descriptor("one"))
    out = bytearray(5000)
    stored = space.put(b"new", b"n" * 5000)
    if not stored or not store.flush(60.0) or space.get_into(b"new", out) or bytes(out) != b"n" * 5000:
        return ["the store takes no new block"]
    return []


def keep(state: State, folder: Path) -> None:
    """Write the files of a state to a folder, so that ``kvlode inspect`` can look at it."""
    for path, content in state.device._names.files():
        target = folder / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        data = bytearray(content.size_bytes)
        for page in range(page_count(content.size_bytes)):
            part = content.pages.get(page, b"")[: content.size_bytes - page * 4096]
            data[page * 4096 : page * 4096 + len(part)] = part
        target.write_bytes(data)
