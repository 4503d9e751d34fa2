"""A process that writes until it is killed: journals, outside of the store, what a successful flush promised. ``FOLDER JOURNAL SEED``"""

from __future__ import annotations

import json
import os
import random
import sys

import kvlode
from model import block_bytes, descriptor

SIZES = (3_000, 70_000, 900_001)


def main(folder: str, journal_path: str, seed: int) -> None:
    chance = random.Random(seed)
    journal = os.open(journal_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with kvlode.open(folder, capacity="2GiB", buffer="16MiB") as store:
        spaces = {name: store.namespace(descriptor(name)) for name in ("one", "two")}
        version = seed * 1_000_000
        while True:
            promised = []
            for _ in range(chance.randint(1, 12)):
                name, version, size = chance.choice(list(spaces)), version + 1, chance.choice(SIZES)
                key = b"%d" % version
                if spaces[name].put(key, block_bytes(key, version, size)):
                    promised.append([name, version, size])
            deleted = [entry for entry in promised if chance.random() < 0.2]
            for name, gone, _ in deleted:
                spaces[name].delete([b"%d" % gone])
            if store.flush(30.0):
                os.write(journal, (json.dumps({"kept": [e for e in promised if e not in deleted], "deleted": deleted}) + "\n").encode())
                os.fsync(journal)
                print("flushed", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
