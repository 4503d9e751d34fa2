"""Whether certain words are anywhere on a drive in memory."""

from __future__ import annotations

import contextlib

import numpy as np

from kvlode import DeviceError
from kvlode.engine.testing import STORE_PATH
from kvlode.gds.memory import MemoryDevice


def files_on(memory: MemoryDevice, words: bytes) -> list[str]:
    """Files on a drive in memory that hold these words; the store may be running."""
    found = []
    for folder in ("segments", "quarantine", "."):
        for name in memory.list_folder(f"{STORE_PATH}/{folder}".removesuffix("/.")):
            path = f"{STORE_PATH}/{folder}/{name}".replace("/./", "/")
            with contextlib.suppress(DeviceError):  # a folder, or a file that was removed meanwhile
                file = memory.open(path, "read")
                area = np.zeros(max(1, file.status().size_bytes), np.uint8)
                file.read(0, [area]).result()
                file.close()
                if words in area.tobytes():
                    found.append(path)
    return found
