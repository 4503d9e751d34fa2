"""Stores with very many keys, for what depends on their number: real small blocks, or an index of places that do not exist."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rocksdict import AccessType

from ...engine.catalog import Catalog
from ...engine.config import StoreConfig
from ...engine.contract import BlockSpace
from ...engine.index_entry import pack_table
from ...engine.index_open import open_index
from ...engine.index_rocksdb import RocksTuning, open_handle
from ...engine.stats import Counters
from ...engine.store import DiskStore
from ...format.errors import KvlodeError
from ...format.layout import INDEX_FOLDER
from .page_cache import forget_pages
from .processes import Say, child_process, events_of, wait_for
from .setting import Setting
from .workload import MIB, SMALL_BLOCK_BYTES, bench_key, bench_namespace, check_accepted, flush, opened

BYTES_A_KEY = 8192
"""A small block in the log: its header's page and its own."""
INDEX_BYTES_A_KEY = 200
FILL_STEP_KEYS = 50_000
PUTS_PER_JOB = 500
SEGMENT_KEYS = 4096
MADE_UP_SEGMENT_ID = 1 << 32
"""The first segment that made-up entries point to: no store gives so high an id."""
SETTLE_S = 300.0


class KeysStore:
    """One such store, closed between the calls, and how many keys are in it."""

    def __init__(self, setting: Setting, name: str, capacity_keys: int) -> None:
        self.path = setting.folder(name)
        self.count = 0
        self.entries = ""
        """Where the entries of its index came from."""
        self.options: dict[str, Any] = {
            "capacity": 2 * capacity_keys * BYTES_A_KEY + 1024 * MIB,
            "buffer": 16 * MIB if setting.quick else 256 * MIB,
            "codec": "raw",
        }
        self._console = setting.console

    @property
    def index_folder(self) -> Path:
        return Path(self.path, INDEX_FOLDER)

    @contextmanager
    def opened(self) -> Iterator[DiskStore]:
        with opened(self.path, **self.options) as store:
            yield store

    def opening_s(self, *, cold: bool = True) -> float:
        """Seconds of opening; ``cold``: with the index's files dropped from the page cache before."""
        if cold:
            forget_pages(self.index_folder)
        started = time.perf_counter()
        with self.opened():
            return time.perf_counter() - started

    def fill_and_kill(self, count: int) -> None:
        """A process puts ``count`` more keys and is killed while it puts others."""
        with child_process("fill", path=self.path, start=self.count, count=count, options=self.options) as process:
            for event in events_of(process):
                if event["event"] == "durable":
                    break
                self._console.print(f"filling a store: {event['keys']:,} keys", highlight=False)
            else:
                raise KvlodeError("the process that fills a store ended early", where=self.path, actual=f"exit code {process.wait()}")
            process.kill()
        self.count += count
        self.entries = "blocks that were put"

    def make_up(self, count: int) -> None:
        """An index of ``count`` keys of blocks that nobody wrote: it can be asked for them, they cannot be read."""
        self._console.print(f"filling an index with {count:,} made-up entries", highlight=False)
        with child_process("make_up", path=self.path, count=count, options=self.options) as process:
            wait_for(process, "made_up")
        self.count = count
        self.entries = "made up, put into the index by the catalog"

    def remove(self) -> None:
        shutil.rmtree(self.path)


def fill(say: Say, path: str, start: int, count: int, options: dict[str, Any]) -> None:
    """Put ``count`` keys from number ``start`` on, say so when they are durable, and go on putting until somebody kills this process."""
    with opened(path, **options) as store:
        space = store.namespace(bench_namespace(SMALL_BLOCK_BYTES))
        for position in range(start, start + count, FILL_STEP_KEYS):
            put_small(space, range(position, min(position + FILL_STEP_KEYS, start + count)))
            say(event="progress", keys=min(position + FILL_STEP_KEYS, start + count))
        flush(store)
        say(event="durable", keys=start + count)
        surplus = start + count
        while True:  # killed in the middle of its work
            put_small(space, range(surplus, surplus + PUTS_PER_JOB))
            surplus += PUTS_PER_JOB


def put_small(space: BlockSpace, numbers: range) -> None:
    """Put the small blocks ``numbers``. Raises ``KvlodeError`` when one was refused."""
    block = bytes(SMALL_BLOCK_BYTES)
    for start in range(numbers.start, numbers.stop, PUTS_PER_JOB):
        part = range(start, min(start + PUTS_PER_JOB, numbers.stop))
        job = space.submit_put([bench_key(number) for number in part], [block] * len(part), chained=False)
        check_accepted(job.statuses)


def make_up(say: Say, path: str, count: int, options: dict[str, Any]) -> None:
    """Fill the index of a new store as the engine does it, through its catalog, and wait until RocksDB has it in order."""
    with opened(path, **options) as store:
        digest = store.namespace(bench_namespace(SMALL_BLOCK_BYTES)).digest
    index = open_index(path, StoreConfig.build(**options), None, Counters())
    catalog = Catalog(index, Counters())
    for start in range(0, count, SEGMENT_KEYS):
        numbers = range(start, min(start + SEGMENT_KEYS, count))
        idents = [digest + bench_key(number) for number in numbers]
        if not catalog.change(dict(zip(idents, _made_up_entries(numbers), strict=True))):
            raise KvlodeError("the index takes no more entries", where=path, actual=f"{start} of {count} keys")
    catalog.sync()
    index.close()
    _wait_compacted(f"{path}/{INDEX_FOLDER}")
    say(event="made_up", keys=count)


def _made_up_entries(numbers: range) -> list[bytes]:
    """Entries as a segment full of small blocks would give them."""
    rows = np.arange(len(numbers), dtype=np.uint64)
    columns: dict[str, Any] = dict.fromkeys(("depth", "expires_at_ns", "codec"), np.zeros(len(rows), np.uint8))
    columns |= dict.fromkeys(("raw_length", "stored_length"), np.full(len(rows), SMALL_BLOCK_BYTES))
    columns |= dict.fromkeys(("version_seq", "record_seq", "written_at_ns", "payload_checksum"), rows + np.uint64(numbers.start))
    columns |= {"page": 1 + 2 * rows, "record_pages": np.full(len(rows), 2), "parent": np.zeros(len(rows), "V16")}
    return pack_table(SimpleNamespace(**columns), MADE_UP_SEGMENT_ID + numbers.start // SEGMENT_KEYS)


def _wait_compacted(folder: str) -> None:
    """Entries came faster than blocks ever do: what RocksDB put off until later is done before anything is measured."""
    handle = open_handle(folder, folder, RocksTuning(), AccessType.read_write())
    deadline_s = time.monotonic() + SETTLE_S
    pause = threading.Event()  # never set: RocksDB tells nobody when it is done
    busy = ("compaction-pending", "num-running-compactions", "mem-table-flush-pending", "num-running-flushes")
    while any(handle.property_int_value(f"rocksdb.{name}") for name in busy) and time.monotonic() < deadline_s:
        pause.wait(0.05)
    handle.close()
