"""The soak's reading process: follows the store; every hit must be whole, and versions of a key never go back. ``FOLDER SEED``"""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
from pathlib import Path

import numpy as np

import kvlode
from kvlode import Status

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from writer import KEY_COUNT

from model import descriptor, version_of


def main(folder: str, seed: int) -> None:
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    chance = random.Random(seed)
    newest: dict[bytes, int] = {}
    hits = 0
    with kvlode.follow(folder) as store:
        space = store.namespace(descriptor("soak"))
        while not stopping.is_set():
            key = b"key %04d" % chance.randrange(KEY_COUNT)
            info = space.info([key])[0]
            if info is None:
                continue
            out = np.zeros(info.raw_bytes, np.uint8)
            status = space.get_into(key, out)
            if status is Status.HIT:
                version = version_of(key, out)
                assert version >= newest.get(key, 0), f"key {key!r}: version {version} after {newest[key]}"
                newest[key] = version
                hits += 1
            else:
                assert status is not Status.CORRUPT, f"key {key!r} is corrupt"
    print(json.dumps({"hits": hits}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
