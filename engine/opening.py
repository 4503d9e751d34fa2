"""Opening a store: the folder, the lock, the superblock, the index, recovery; and following one beside its writer."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

from ..format.errors import CorruptRecord, DeviceError, FormatError, StoreLocked, UnsupportedFormat
from ..format.layout import (
    INDEX_FOLDER,
    LOCK_NAME,
    PAGE_BYTES,
    QUARANTINE_FOLDER,
    SCRUB_NAME,
    SEGMENTS_FOLDER,
    STATS_FOLDER,
    STRIPE_BYTES_DEFAULT,
    SUPERBLOCK_NAME,
    parse_segment_name,
)
from ..format.superblock import Superblock
from ..gds.buffers import aligned_array
from ..gds.device import Device, DeviceLock
from ..gds.probe import open_device
from .capacity import Budget, budget_for
from .catalog import Catalog
from .config import MIB, Clock, StoreConfig, SystemClock
from .core import FOLLOWERS_NAME, Core, Parts
from .follower import open_follower_index
from .forward_clock import ForwardClock
from .heat import HeatTable, slots_for_capacity
from .heat_file import SharedHeat
from .incompatible import Replaced, is_kvlode_store, replace_store
from .index import Index
from .index_open import fresh_index, open_index, remove_damaged_indexes
from .recovery import list_segments, newest_time_ns, quarantined_ids, recover
from .registry import OpenStore, check_same_options, registry
from .segments import SegmentTable
from .stats import Counters
from .store import DiskStore

logger = logging.getLogger("kvlode")

FREE_BYTES_MIN = 16 * MIB
LOCK_POLL_S = 0.05
HEAT_NAME = "heat"


@dataclass(frozen=True, slots=True)
class Environment:
    """What tests replace: the device, the clock, and the index of a store."""

    device: Device | None = None
    clock: Clock | None = None
    index: Index | None = None


def open_store(path: str | os.PathLike[str], config: StoreConfig, environment: Environment | None = None) -> DiskStore:
    """Open or create the store in folder ``path`` for writing (or follow its writer, where ``on_locked`` says so)."""
    environment = environment or Environment()
    if environment.device is not None:
        return DiskStore(OpenStore(_open_core(os.fspath(path), config, environment)))
    folder = os.path.abspath(os.fspath(path))
    with registry.when_not_closing(folder, config.lock_timeout_s) as active:
        if active is None:
            active = OpenStore(_open_core(folder, config, environment))
            registry.add(active)
        else:
            check_same_options(folder, config, active.core.config, active.core.opened_with)
        return DiskStore(active)


def follow_store(path: str | os.PathLike[str], config: StoreConfig, environment: Environment | None = None) -> DiskStore:
    """Open a store for reading beside its writer. In the writer's own process this is one more handle of the writer's."""
    environment = environment or Environment()
    folder = os.path.abspath(os.fspath(path)) if environment.device is None else os.fspath(path)
    if environment.device is not None:
        return DiskStore(OpenStore(_open_follower(folder, config, environment)))
    with registry.when_not_closing(folder, config.lock_timeout_s) as active:
        if active is None:
            active = OpenStore(_open_follower(folder, config, environment))
            registry.add(active)
        return DiskStore(active)


def follow_beside(path: str | os.PathLike[str], config: StoreConfig, environment: Environment | None = None) -> DiskStore:
    """Follow a store by a handle that is shared with nobody.

    It does not keep this process from opening the store for writing later, and opening it holds up no other opening or closing, however
    long the drive takes to answer.
    """
    opened = OpenStore(_open_follower(os.path.abspath(os.fspath(path)), config, environment or Environment()))
    with registry.lock:
        registry.add(opened, shared=False)
        return DiskStore(opened)


def _open_core(path: str, config: StoreConfig, environment: Environment, replaced: Replaced | None = None) -> Core:
    """``replaced``: the incompatible store that was here a moment ago, and what became of it."""
    with contextlib.ExitStack() as undo:
        if environment.device is None:
            os.makedirs(path, exist_ok=True)
        device = environment.device or open_device(config.gds, path, threads=config.io_threads)
        if environment.device is None:
            undo.callback(device.close)
        _check_folder(device, path)
        lock = _take_lock(device, path, config)
        if lock is None:
            return _open_follower(path, config, environment)
        undo.callback(lock.release)
        clock = ForwardClock(environment.clock or SystemClock())
        try:
            core = _open_locked(path, config, environment, device, lock, clock)
        except (UnsupportedFormat, CorruptRecord) as error:
            if config.on_incompatible == "refuse" or replaced is not None or not _is_incompatible(device, path, error):
                raise
            replaced = replace_store(device, path, config.on_incompatible, error, clock.now_ns())
        else:
            if replaced is not None:
                core.counters.decisions.note("store_replaced", replaced.reason, how=replaced.how, moved_to=replaced.moved_to)
            undo.pop_all()
            return core
    return _open_core(path, config, environment, replaced)


def _is_incompatible(device: Device, path: str, error: FormatError) -> bool:
    """Whether this is a kvlode store that cannot be written; damage counts where it is in the superblock."""
    if isinstance(error, CorruptRecord):
        try:
            load_superblock(device, path)
        except FormatError:
            return is_kvlode_store(device, path)
        return False
    return is_kvlode_store(device, path)


def _open_locked(path: str, config: StoreConfig, environment: Environment, device: Device, lock: DeviceLock, clock: ForwardClock) -> Core:
    """Superblock, index, recovery. Raises ``UnsupportedFormat`` or ``CorruptRecord`` for a store that this version cannot write."""
    with contextlib.ExitStack() as undo:
        superblock = _load_or_create_superblock(device, path, clock)
        budget = budget_for(config)
        counters = Counters(path)
        segments = SegmentTable(device, path, open_files_max=config.open_files_max)
        listing = list_segments(device, segments.folder, superblock.store_uuid)
        clock.not_before(newest_time_ns(device, segments.folder, listing, superblock.store_uuid))
        taken = quarantined_ids(device, f"{path}/{QUARANTINE_FOLDER}")
        _make_room(device, path, segments, listing)
        index = open_index(path, config, environment.index, counters)
        undo.callback(index.close)
        heat = _open_heat(path, config, environment, superblock, counters, writer=True)
        undo.callback(heat.close)
        catalog = Catalog(index, counters)
        facts = (superblock.store_uuid, listing, clock, counters)
        recovered = recover(device, segments, catalog, *facts, ids_taken=taken)
        if recovered is None:  # the index is of another store, or unreadable: derive it again
            index.close()
            index = fresh_index(path, config, counters)
            undo.callback(index.close)
            catalog = Catalog(index, counters)
            recovered = recover(device, segments, catalog, *facts, ids_taken=taken, rebuild=True)
            assert recovered is not None
        remove_damaged_indexes(path, config)
        owns_device = environment.device is None
        parts = Parts(path, config, clock, device, superblock, catalog, segments, heat, counters, budget, recovered, lock, owns_device)
        core = Core(parts)
        undo.pop_all()
        return core


def _check_folder(device: Device, path: str) -> None:
    """A folder with something else in it is not a place for a store."""
    device.make_folder(path)
    names = device.list_folder(path)
    if names and SUPERBLOCK_NAME not in names and any(name not in _OWN_NAMES for name in names):
        raise UnsupportedFormat(
            "this folder is not a kvlode store",
            where=path,
            expected=f"a file {SUPERBLOCK_NAME}, or an empty folder",
            actual=", ".join(names[:5]),
            action="Give the store a folder of its own.",
        )


_OWN_NAMES = {SUPERBLOCK_NAME + ".tmp", LOCK_NAME, FOLLOWERS_NAME, SEGMENTS_FOLDER, INDEX_FOLDER, QUARANTINE_FOLDER, HEAT_NAME}
_OWN_NAMES |= {SCRUB_NAME, SCRUB_NAME + ".tmp", STATS_FOLDER}


def _take_lock(device: Device, path: str, config: StoreConfig) -> DeviceLock | None:
    """The writer's lock; ``None`` when somebody else has it and the store is to be followed instead."""
    deadline_s = time.monotonic() + config.lock_timeout_s
    waiting = threading.Event()
    while True:
        lock = device.lock(f"{path}/{LOCK_NAME}")
        if lock is not None:
            return lock
        if config.on_locked == "follow":
            return None
        if config.on_locked == "fail" or time.monotonic() >= deadline_s:
            raise StoreLocked(
                "another process writes to this store",
                where=path,
                expected="one writer",
                actual="its lock is held" + (f" for {config.lock_timeout_s:.0f} s" if config.on_locked == "wait" else ""),
                action="Stop the other writer, open with on_locked='wait' or 'follow', or use a folder per writing process.",
            )
        waiting.wait(LOCK_POLL_S)  # file locks cannot be waited for with a deadline


def _load_or_create_superblock(device: Device, path: str, clock: Clock) -> Superblock:
    """Read the superblock, or make one (temp file, rename, sync of the folder) in an empty folder."""
    place = f"{path}/{SUPERBLOCK_NAME}"
    if device.status(place) is not None:
        superblock = load_superblock(device, path)
        if superblock.read_only:
            raise UnsupportedFormat(
                "a newer kvlode wrote this store in a way that this version can read but not write",
                where=place,
                action="Open it with kvlode.follow, or upgrade kvlode.",
            )
    else:
        _check_no_segments(device, path)
        superblock = Superblock(uuid.uuid4().bytes, clock.now_ns(), STRIPE_BYTES_DEFAULT)
        _write_superblock(device, path, superblock)
    for folder in (SEGMENTS_FOLDER, QUARANTINE_FOLDER):
        device.make_folder(f"{path}/{folder}")
    device.sync_folder(path)
    return superblock


def _check_no_segments(device: Device, path: str) -> None:
    """A store that has lost its superblock must not be made anew: under another uuid its segments would count as empty and be removed."""
    folder = f"{path}/{SEGMENTS_FOLDER}"
    names = device.list_folder(folder) if device.status(folder) is not None else []
    segments = [name for name in names if parse_segment_name(name) is not None]
    if segments:
        raise UnsupportedFormat(
            "the superblock of this store is gone",
            where=path,
            expected=f"a file {SUPERBLOCK_NAME}, or no segments",
            actual=f"{len(segments)} segments and no {SUPERBLOCK_NAME}",
            action="Run kvlode fsck --repair: it writes the superblock anew. To start empty, remove the folder.",
        )


def _write_superblock(device: Device, path: str, superblock: Superblock) -> None:
    temporary = f"{path}/{SUPERBLOCK_NAME}.tmp"
    if device.status(temporary) is not None:
        device.remove(temporary)
    page = aligned_array(PAGE_BYTES)
    page[:] = memoryview(superblock.pack())
    file = device.open(temporary, "create")
    try:
        file.write(0, [page]).result()
        file.sync()
    finally:
        file.close()
    device.rename(temporary, f"{path}/{SUPERBLOCK_NAME}")
    device.sync_folder(path)


def load_superblock(device: Device, path: str) -> Superblock:
    """The checked superblock of a store. Raises ``UnsupportedFormat`` or ``CorruptRecord``."""
    place = f"{path}/{SUPERBLOCK_NAME}"
    if device.status(place) is None:
        raise UnsupportedFormat(
            "this folder is not a kvlode store", where=path, expected=f"a file {SUPERBLOCK_NAME}", actual="none", action="Check the path."
        )
    page = aligned_array(PAGE_BYTES)
    file = device.open(place, "read")
    try:
        count = file.read(0, [page]).result()
    finally:
        file.close()
    return Superblock.parse(page[:count], where=place)


def _make_room(device: Device, path: str, segments: SegmentTable, listing: list[Any]) -> None:
    """RocksDB cannot open on a full file system: give up the oldest segments until it can."""
    while len(listing) > 1 and device.free_bytes(path) < FREE_BYTES_MIN:
        oldest = listing.pop(0)
        logger.warning("the file system is full: freed segment %016x to open the store", oldest.segment_id)
        device.remove(segments.path(oldest.segment_id))
        device.sync_folder(segments.folder)


def _open_heat(
    path: str, config: StoreConfig, environment: Environment, superblock: Superblock, counters: Counters, *, writer: bool
) -> SharedHeat:
    slot_count = slots_for_capacity(config.capacity_bytes)
    if environment.device is not None:
        return SharedHeat(HeatTable(slot_count), None, counters, writer=writer)
    return SharedHeat.open(f"{path}/{HEAT_NAME}", superblock.store_uuid, slot_count, counters, writer=writer)


def _open_follower(path: str, config: StoreConfig, environment: Environment) -> Core:
    with contextlib.ExitStack() as undo:
        if environment.device is None and not os.path.isdir(path):
            raise UnsupportedFormat("there is no such folder", where=path, expected="the folder of a store", action="Check the path.")
        device = environment.device or open_device(config.gds, path, threads=config.io_threads)
        owns_device = environment.device is None
        if owns_device:
            undo.callback(device.close)
        superblock = load_superblock(device, path)
        clock = environment.clock or SystemClock()
        counters = Counters(path)
        segments = SegmentTable(device, path, open_files_max=config.open_files_max, learns=True)
        try:
            lock = device.lock(f"{path}/{FOLLOWERS_NAME}", shared=True)
        except DeviceError as error:  # a read-only file system: nobody reclaims there either
            logger.info("following without announcing it: %s", error)
            lock = None
        if lock is not None:
            undo.callback(lock.release)
        index, catch_up = open_follower_index(path, environment.index, segments, counters)
        undo.callback(index.close)
        heat = _open_heat(path, config, environment, superblock, counters, writer=False)
        undo.callback(heat.close)
        budget = Budget(config.capacity_bytes, 0)
        catalog = Catalog(index, counters)
        core = Core(
            Parts(path, config, clock, device, superblock, catalog, segments, heat, counters, budget, None, lock, owns_device, catch_up)
        )
        undo.pop_all()
        return core
