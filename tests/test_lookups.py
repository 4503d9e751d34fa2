"""Lookups in the background beside puts: what is put while the index is asked is never remembered as absent."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from kvlode import Namespace, Status
from kvlode.engine.testing import open_on_device
from kvlode.gds.memory import MemoryDevice
from rig import eventually

WAIT_S = 30.0


def test_a_block_that_is_put_while_its_lookup_waits_is_found_after_the_flush() -> None:
    store = open_on_device(MemoryDevice(), serve_clean=False)
    space = store.namespace(Namespace(model="m", revision="1", dtype="uint8", layout="l", tokens_per_block=1, block_bytes_max=4096))
    resolve, may_resolve, resolved = store._core.lookups._resolve, threading.Event(), threading.Event()

    def late(idents: Sequence[bytes]) -> Sequence[bool]:
        may_resolve.wait(WAIT_S)
        found = resolve(idents)
        resolved.set()
        return found

    store._core.lookups._resolve = late
    assert space.lookup_nowait([b"other"]) == [Status.PENDING]  # keeps the thread busy
    assert space.lookup_nowait([b"key"]) == [Status.PENDING]
    assert space.put(b"key", np.ones(4096, np.uint8))
    may_resolve.set()
    assert resolved.wait(WAIT_S)
    assert eventually(lambda: not store._core.lookups._wanted and not store._core.lookups._running)
    assert store.flush(WAIT_S)
    assert eventually(lambda: space.lookup_nowait([b"key"]) != [Status.PENDING])
    assert space.lookup_nowait([b"key"]) == [Status.HIT]
    store.close()
