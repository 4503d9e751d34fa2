"""A writer is killed again and again: everything that a flush promised is there, exactly, and what was deleted stays deleted."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kvlode
from kvlode import Status
from model import block_bytes, descriptor

WORKER = Path(__file__).with_name("worker_writer.py")


def write_until_killed(folder: Path, journal: Path, seed: int, flushes: int) -> None:
    """Let a writer run for some flushes and kill it right behind the last, while it goes on."""
    command = [sys.executable, str(WORKER), str(folder), str(journal), str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for _ in range(flushes):
            assert process.stdout.readline() == "flushed\n", "the writer ended by itself"
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()


def check(folder: Path, journal: Path) -> int:
    """Compare the store with the journal; returns how many blocks were compared."""
    compared = 0
    lines = [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")]
    with kvlode.open(folder, capacity="2GiB", buffer="16MiB") as store:
        for line in lines:
            for name, version, size in line["kept"]:
                key, out = b"%d" % version, np.zeros(size, np.uint8)
                assert store.namespace(descriptor(name)).get_into(key, out) is Status.HIT, f"{name} {version} was flushed and is gone"
                assert np.array_equal(out, block_bytes(key, version, size)), f"{name} {version}: wrong bytes"
                compared += 1
            for name, version, _ in line["deleted"]:
                assert store.namespace(descriptor(name)).contains([b"%d" % version]) == [False], f"{name} {version} came back"
    return compared


def kill_rounds(tmp_path: Path, rounds: int, seed: int) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    folder, journal = tmp_path / "store", tmp_path / "journal"
    before = 0
    for number in range(1, rounds + 1):
        write_until_killed(folder, journal, seed + number, chance.randint(1, 12))
        if chance.random() < 0.3:
            shutil.rmtree(folder / "index")
        compared = check(folder, journal)
        assert compared > before
        before = compared


def test_flushed_blocks_survive_kills_of_the_writer(tmp_path: Path) -> None:
    kill_rounds(tmp_path, 4, seed=20_261_124)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_flushed_blocks_survive_many_kills_of_the_writer(tmp_path: Path) -> None:
    kill_rounds(tmp_path, 40, seed=77)
