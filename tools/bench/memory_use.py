"""What a store takes beside its buffer, and which part of it takes how much."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from ...engine.store import DiskStore
from ...format.errors import KvlodeError
from ...gds.buffers import ByteArray, SlotPool, address_of
from .figures import Bar, Item, value_item
from .keys_store import KeysStore
from .machine import anonymous_bytes
from .processes import Say, child_process, wait_for
from .workload import BLOCK_BYTES, MIB, SMALL_BLOCK_BYTES, Blocks, bench_key, bench_namespace, opened

LOOKUPS = 64
LOOKUP_KEYS = 4096
PAGE_BYTES = 4096
_PRESENT = np.uint64(1 << 63)
_ROCKSDB = {
    "rocksdb_cache": "rocksdb.block-cache-usage",
    "rocksdb_memtables": "rocksdb.size-all-mem-tables",
    "rocksdb_filters_and_table_indexes": "rocksdb.estimate-table-readers-mem",
}


def memory_item(name: str, keys: KeysStore, bar: Bar, *, quick: bool) -> Item:
    """Anonymous memory of a process of its own, in MiB, and among the facts how much of it each part has (also in MiB)."""
    with child_process("memory", path=keys.path, count=keys.count, options=keys.options, quick=quick) as process:
        measured = wait_for(process, "memory")
        if process.wait() != 0:
            raise KvlodeError("the process whose memory is measured failed", where=keys.path, actual=f"exit code {process.returncode}")
    void = None
    if measured["correct"] != measured["asked"] or measured["found"] != measured["looked_up"]:
        void = f"{measured['correct']} of {measured['asked']} blocks and {measured['found']} of {measured['looked_up']} keys came back"
    facts = {"keys": keys.count, "buffer_bytes": keys.options["buffer"], "modules_imported_later": measured["modules"]}
    facts |= {f"{part}_MiB": part_bytes / MIB for part, part_bytes in measured["parts"].items()}
    return value_item(name, [measured["beyond_bytes"] / MIB], unit="MiB", bar=bar, facts=facts, void=void)


def measure_memory(say: Say, path: str, count: int, options: dict[str, Any], quick: bool) -> None:
    """The step of that process: everything is used once (buffer, read and write memory), and lookups go all over the index."""
    if not quick:
        import torch  # noqa: F401  an engine has it loaded, and what the store allocates lies among its memory
    blocks = Blocks(2 * options["buffer"] // BLOCK_BYTES + 1, BLOCK_BYTES)
    outs = list(np.full((min(32, blocks.count), BLOCK_BYTES), 0xEE, dtype=np.uint8))
    generator = np.random.default_rng(0)
    lookups = 1 if quick else LOOKUPS
    numbers = [generator.integers(0, count, LOOKUP_KEYS).tolist() for _ in range(lookups)]
    modules = set(sys.modules)
    baseline_bytes = anonymous_bytes()
    with opened(path, **options) as store:
        blocks.put_all(store)
        statuses = store.namespace(bench_namespace(BLOCK_BYTES)).get_many_into(blocks.keys[: len(outs)], outs)
        small = store.namespace(bench_namespace(SMALL_BLOCK_BYTES))
        found = sum(sum(small.contains([bench_key(number) for number in part])) for part in numbers)
        parts = parts_of(store)
        beyond_bytes = anonymous_bytes() - baseline_bytes - store.config.buffer_bytes
        say(
            event="memory",
            beyond_bytes=beyond_bytes,
            parts=parts | {"rest": beyond_bytes - sum(parts.values()), "heap_free": _heap_free_bytes()},
            modules=len(set(sys.modules) - modules),
            correct=sum(s == 0 and blocks.is_block(n, out) for n, (s, out) in enumerate(zip(statuses, outs, strict=True))),
            asked=len(outs),
            found=found,
            looked_up=lookups * LOOKUP_KEYS,
        )


def parts_of(store: DiskStore) -> dict[str, int]:
    """Resident bytes of each part of a store that is open for writing. It looks inside, which no host needs to."""
    core = store._core
    handle: Any = core.catalog.index._handle  # type: ignore[attr-defined]
    return {
        "bounce": resident_bytes(_slots(core._bounce)),
        "staging": resident_bytes(_slots(core._staging)),
        "heat": resident_bytes([core.heat.area]),
        **{part: int(handle.property_int_value(name) or 0) for part, name in _ROCKSDB.items()},
    }


def _slots(pool: SlotPool) -> list[ByteArray]:
    """The memory of a pool that lends nothing now."""
    return list(pool._free)


def resident_bytes(arrays: Iterable[ByteArray]) -> int:
    """How much of some memory is really there, by the kernel's page map; all of it where the map cannot be read."""
    total = 0
    for array in arrays:
        first, last = address_of(array) // PAGE_BYTES, (address_of(array) + array.size - 1) // PAGE_BYTES
        try:
            with open("/proc/self/pagemap", "rb", buffering=0) as pages:
                pages.seek(8 * first)
                entries = np.frombuffer(pages.read(8 * (last + 1 - first)), np.uint64)
        except OSError:
            total += array.size
            continue
        total += int(np.count_nonzero(entries & _PRESENT)) * PAGE_BYTES
    return total


class _HeapFacts(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


def _heap_free_bytes() -> int:
    """What the C library's heap has kept after it was freed, a part of the rest; 0 where it does not say."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is None:
        return 0
    function.restype = _HeapFacts
    return int(function().fordblks)
