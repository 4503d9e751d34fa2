"""Small healthy stores for tests of ``kvlode fsck``: on a device in memory or in a folder, with everything a store may hold.

A store is built by the real engine and closed. ``StoreUnderTest`` remembers what was put, reads and changes bytes of its files
behind the engine's back, checks it, and opens it again to see what it serves.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvlode import DiskStore, Namespace, Status
from kvlode.engine.config import StoreConfig
from kvlode.engine.index_memory import MemoryIndex
from kvlode.engine.opening import Environment, open_store
from kvlode.engine.testing import STORE_PATH, ManualClock, open_on_device
from kvlode.format.layout import SEGMENTS_FOLDER, SUPERBLOCK_NAME, parse_segment_name, segment_name
from kvlode.gds.buffers import aligned_array
from kvlode.gds.device import Device
from kvlode.gds.memory import MemoryDevice
from kvlode.gds.posix import PosixDevice
from kvlode.tools.fsck.findings import Report
from kvlode.tools.fsck.index_view import IndexSource
from kvlode.tools.fsck.options import CheckOptions, Level
from kvlode.tools.fsck.run import check_store
from kvlode.tools.index_access import GivenSource, RocksSource
from model import block_bytes, descriptor

KIB = 1 << 10
SEGMENT_BYTES = 128 * KIB
BLOCK_BYTES_MAX = 32 * KIB
CLOSE_S = 30.0
OPTIONS: dict[str, Any] = {
    "capacity": 64 << 20,
    "buffer": 8 << 20,
    "segment_bytes": SEGMENT_BYTES,
    "batch_bytes": 64 * KIB,
    "codec": "planes+zstd",
    "flush_after_s": 0.02,
    "put_timeout_s": 10.0,
    "reclaim_grace_s": 0.0,
}
"""For ``kvlode.open``; segments of 128 KiB, so that a few dozen blocks fill several."""


@dataclass
class StoreUnderTest:
    """A closed store, what it must serve, and ways to look at it and to damage it."""

    device: Device
    path: str
    index: MemoryIndex | None
    """``None`` for a store in a folder: its index is RocksDB there."""
    clock: ManualClock = field(default_factory=ManualClock)
    options: dict[str, Any] = field(default_factory=lambda: dict(OPTIONS))
    blocks: dict[tuple[Namespace, bytes], np.ndarray] = field(default_factory=dict)
    """What a get must answer, by namespace and key."""
    gone: set[tuple[Namespace, bytes]] = field(default_factory=set)
    """Deleted, dropped and expired blocks: never served again."""

    # --- the engine ---------------------------------------------------------------------------------------------------

    def open(self, **options: Any) -> DiskStore:
        """Open the store for writing; close it with ``close``."""
        merged = self.options | options
        if self.index is not None:
            return open_on_device(self.device, index=self.index, clock=self.clock, path=self.path, **merged)
        return open_store(self.path, StoreConfig.build(**merged), Environment(clock=self.clock))

    def close(self, store: DiskStore) -> None:
        """Close it in bounded time; the index can be looked at afterwards."""
        assert store.close(CLOSE_S)
        if self.index is not None:
            self.index = self.index.reopen()

    def put(self, store: DiskStore, namespace: Namespace, key: bytes, version: int, size: int, **options: Any) -> None:
        """Put one block and remember it."""
        data = block_bytes(key, version, size)
        status = store.namespace(namespace).put(key, data, **options)
        assert status, f"{key!r}: {status}"
        self.blocks[namespace, key] = data

    def forget(self, namespace: Namespace, key: bytes) -> None:
        """This block is gone from now on."""
        self.blocks.pop((namespace, key), None)
        self.gone.add((namespace, key))

    def statuses(self, store: DiskStore) -> dict[tuple[Namespace, bytes], Status]:
        """Read every block that was put; bytes of a HIT must be those that were put."""
        found: dict[tuple[Namespace, bytes], Status] = {}
        for (namespace, key), data in self.blocks.items():
            out = np.full(data.nbytes, 0xA5, np.uint8)
            status = found[namespace, key] = store.namespace(namespace).get_into(key, out)
            assert status is not Status.HIT or np.array_equal(out, data), f"{key!r}: other bytes than were put"
        for namespace, key in self.gone:
            assert store.namespace(namespace).contains([key]) == [False], f"{key!r} is back"
        return found

    def assert_serves_everything(self, but: set[tuple[Namespace, bytes]] | None = None) -> None:
        """Open it: every block but those in ``but`` is a HIT, and nothing that was deleted is back."""
        store = self.open()
        try:
            lost = {block for block, status in self.statuses(store).items() if status is not Status.HIT}
        finally:
            self.close(store)
        assert lost <= (but or set()), f"not served: {sorted(key for _, key in lost - (but or set()))}"

    # --- its files ----------------------------------------------------------------------------------------------------

    def segment_ids(self) -> list[int]:
        """Ids of the segment files, oldest first."""
        names = self.device.list_folder(f"{self.path}/{SEGMENTS_FOLDER}")
        return sorted(found for name in names if (found := parse_segment_name(name)) is not None)

    def segment_path(self, segment_id: int) -> str:
        return f"{self.path}/{SEGMENTS_FOLDER}/{segment_name(segment_id)}"

    @property
    def superblock_path(self) -> str:
        return f"{self.path}/{SUPERBLOCK_NAME}"

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of a file as they are on the device."""
        file = self.device.open(path, "read")
        try:
            size = file.status().size_bytes - offset if length is None else length
            if size <= 0:
                return b""
            area = aligned_array(size)
            return bytes(area[: file.read(offset, [area]).result()])
        finally:
            file.close()

    def write(self, path: str, offset: int, data: bytes) -> None:
        """Change bytes behind the engine's back, durably."""
        file = self.device.open(path, "write")
        try:
            file.write(offset, [np.frombuffer(data, np.uint8).copy()]).result()
            file.sync()
        finally:
            file.close()

    def flip(self, path: str, offset: int, mask: int = 0x01) -> None:
        """Invert bits of one byte; twice is not at all."""
        self.write(path, offset, bytes([self.read(path, offset, 1)[0] ^ mask]))

    def replace(self, path: str, data: bytes) -> None:
        """Give a file this content, whatever it was."""
        if self.device.status(path) is not None:
            self.device.remove(path)
        file = self.device.open(path, "create")
        try:
            if data:
                file.write(0, [np.frombuffer(data, np.uint8).copy()]).result()
            file.sync()
        finally:
            file.close()
        self.device.sync_folder(path.rpartition("/")[0])

    def truncate(self, path: str, size_bytes: int) -> None:
        """Cut or extend a file."""
        file = self.device.open(path, "write")
        try:
            file.truncate(size_bytes)
            file.sync()
        finally:
            file.close()

    # --- the check ----------------------------------------------------------------------------------------------------

    def source(self) -> IndexSource:
        """The index for a check or a repair. After a rebuild take ``source.index`` over into ``index``."""
        return GivenSource(self.device, self.path, self.index) if self.index is not None else RocksSource(self.device, self.path)

    def check(self, level: Level = Level.FULL, *, source: IndexSource | None = None, **options: Any) -> Report:
        """Check it, at the time of its clock."""
        chosen = CheckOptions(level=level, now_ns=self.clock.now_ns(), **options)
        return check_store(self.device, self.path, chosen, source or self.source())

    def copy(self) -> StoreUnderTest:
        """The same store on a device of its own (only in memory): damage to one leaves the other alone."""
        assert isinstance(self.device, MemoryDevice) and self.index is not None
        return dataclasses.replace(
            self,
            device=self.device.crash(keep="all"),
            index=MemoryIndex(dict(self.index.scan())),
            options=dict(self.options),
            blocks=dict(self.blocks),
            gone=set(self.gone),
        )


ONE = descriptor("one", block_bytes_max=BLOCK_BYTES_MAX)
TWO = descriptor("two", block_bytes_max=BLOCK_BYTES_MAX, dtype="float32", layer_bytes=8 * KIB)
DROPPED = descriptor("dropped", block_bytes_max=BLOCK_BYTES_MAX)


def in_memory(**options: Any) -> StoreUnderTest:
    """An empty, closed store on a device in memory."""
    target = StoreUnderTest(MemoryDevice(), STORE_PATH, MemoryIndex())
    target.options |= options
    target.close(target.open())
    return target


def in_folder(folder: Path, **options: Any) -> StoreUnderTest:
    """An empty, closed store in a folder, with RocksDB."""
    target = StoreUnderTest(PosixDevice(threads=4), str(folder), None)
    target.options |= options
    target.close(target.open())
    return target


def fill(target: StoreUnderTest, blocks: int = 30) -> StoreUnderTest:
    """Several segments with all there is: both namespaces, every codec, deletes, a drop, expiry, metadata, parents, tags.

    The store is closed afterwards, and healthy.
    """
    store = target.open()
    for number in range(blocks):
        namespace = (ONE, TWO)[number % 2]
        key = b"key %03d" % number
        size = (BLOCK_BYTES_MAX, 4 * KIB, 10_000, 100)[number % 4]
        parent = b"key %03d" % (number - 2) if number > 1 else None
        target.put(store, namespace, key, number, size, parent=parent, meta=b"meta %d" % number, tag="tenant" if number % 3 else None)
        if number in (2, 7):
            target.put(store, DROPPED, key, number, 5000)
    target.put(store, ONE, b"short-lived", 5, 9000, ttl=10.0)
    assert store.flush()
    for key in (b"key 004", b"key 010"):
        assert store.namespace(ONE).delete([key]) == ((ONE, key) in target.blocks)
        target.forget(ONE, key)
    store.namespace(DROPPED).drop()
    target.forget(DROPPED, b"key 002")
    target.forget(DROPPED, b"key 007")
    assert store.flush()
    target.close(store)
    target.clock.advance(60.0)
    target.forget(ONE, b"short-lived")
    return target


def tiny(**options: Any) -> StoreUnderTest:
    """One sealed segment in memory with one namespace, three blocks (raw, planes, zstd) and a tombstone: for exhaustive damage."""
    target = in_memory(**options)
    store = target.open()
    for number, size in enumerate((300, 5000, 9000)):
        target.put(store, ONE, b"key %d" % number, number, size)
    target.put(store, ONE, b"deleted", 3, 500)
    assert store.flush()
    store.namespace(ONE).delete([b"deleted"])
    target.forget(ONE, b"deleted")
    assert store.flush()
    target.close(store)
    return target
