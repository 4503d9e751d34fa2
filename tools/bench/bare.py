"""The ceiling: a bare O_DIRECT loop that does what a store was seen to do, without a store.

The same places in the same order, with the same bytes in flight, preallocation and sync cadence; no checksums, no headers,
no index, one contiguous and page-aligned memory that was touched before.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from ...gds.buffers import ByteArray, aligned_array
from ...gds.os_calls import set_direct
from ...gds.posix import CHUNK_BYTES_DEFAULT, NOW_BYTES_MAX
from .trace import Operation, Trace

MEMORY_BYTES_MIN, MEMORY_BYTES_MAX = 32 << 20, 256 << 20


def touched_memory(size_bytes: int, seed: int = 0) -> ByteArray:
    """Page-aligned memory full of incompressible bytes."""
    memory = aligned_array(size_bytes)
    generator = np.random.default_rng(seed)
    for start in range(0, size_bytes, 1 << 24):
        part = memory[start : start + (1 << 24)]
        part[:] = np.frombuffer(generator.bytes(part.size), dtype=np.uint8)
    return memory


def bare_memory(data_bytes: int) -> ByteArray:
    """What the bare loop writes from and reads into: as much as the blocks, but neither less than a request nor more than is of use."""
    return touched_memory(min(MEMORY_BYTES_MAX, max(MEMORY_BYTES_MIN, data_bytes)), seed=1)


class _Gate:
    """At most ``bytes_max`` in flight; a single larger request passes alone."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._condition = threading.Condition()

    def enter(self, length: int) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._bytes == 0 or self._bytes + length <= self._bytes_max)
            self._bytes += length

    def leave(self, length: int) -> None:
        with self._condition:
            self._bytes -= length
            self._condition.notify_all()


def replay_writes(trace: Trace, folder: str, memory: ByteArray, *, threads: int) -> float:
    """Do the trace's writes, preallocations, syncs and truncations in ``folder``; returns the seconds. Removes its files."""
    os.makedirs(folder, exist_ok=True)
    with _Replay(trace, folder, memory, threads) as replay:
        replay.run(trace.operations[: trace.prepared])
        started = time.perf_counter()
        replay.run(trace.operations[trace.prepared :])
        seconds = time.perf_counter() - started
    os.rmdir(folder)
    return seconds


class _Replay:
    """Every lane of the trace runs on one thread, as in the store; a write waits for its file, a sync for its writes."""

    def __init__(self, trace: Trace, folder: str, memory: ByteArray, threads: int) -> None:
        self._trace = trace
        self._folder = folder
        self._memory = memory
        self._pool = ThreadPoolExecutor(threads)
        self._lanes: dict[str, ThreadPoolExecutor] = {}
        self._gate = _Gate(trace.in_flight_bytes_max)
        self._files: dict[int, Future[int]] = {}
        self._writes: list[list[Future[int]]] = []
        self._written_bytes = 0

    def __enter__(self) -> _Replay:
        return self

    def __exit__(self, *exception: object) -> None:
        for executor in (self._pool, *self._lanes.values()):
            executor.shutdown()
        for number, opened in self._files.items():
            os.close(opened.result())
            os.unlink(self._path(number))

    def run(self, operations: list[Operation]) -> None:
        pending: list[Future[Any]] = []
        for operation in operations:
            if operation.kind == "create":
                self._files[operation.file] = self._lane(operation).submit(self._create, operation.file)
            elif operation.kind == "write":
                self._write(operation)
            elif operation.kind in ("sync", "truncate", "preallocate"):
                pending.append(self._lane(operation).submit(self._control, operation, self._covered(operation)))
        for future in (*pending, *(chunk for chunks in self._writes for chunk in chunks)):
            future.result()

    def _lane(self, operation: Operation) -> ThreadPoolExecutor:
        return self._lanes.setdefault(operation.lane, ThreadPoolExecutor(1))

    def _path(self, number: int) -> str:
        return f"{self._folder}/{number}.bare"

    def _create(self, number: int) -> int:
        descriptor = os.open(self._path(number), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC)
        set_direct(descriptor)
        return descriptor

    def _opened(self, number: int) -> int:
        return self._files[number].result()

    def _covered(self, operation: Operation) -> list[Future[int]]:
        """The writes that had ended when the store synced: no sync here may start before them."""
        return [chunk for chunks in self._writes[: operation.after] for chunk in chunks]

    def _control(self, operation: Operation, after: list[Future[int]]) -> None:
        descriptor = self._opened(operation.file)
        if operation.kind == "preallocate":
            os.posix_fallocate(descriptor, 0, operation.length)
            return
        for write in after:
            write.result()
        if operation.kind == "sync":
            os.fdatasync(descriptor)
        else:
            os.ftruncate(descriptor, operation.length)

    def _write(self, operation: Operation) -> None:
        descriptor = self._opened(operation.file)
        self._gate.enter(operation.length)
        left = _Countdown(-(-operation.length // CHUNK_BYTES_DEFAULT), functools.partial(self._gate.leave, operation.length))
        chunks = []
        for position in range(0, operation.length, CHUNK_BYTES_DEFAULT):
            length = min(CHUNK_BYTES_DEFAULT, operation.length - position)
            source = self._source(length)
            chunks.append(self._pool.submit(_transfer, os.pwritev, descriptor, source, operation.offset + position))
            chunks[-1].add_done_callback(left)
        self._writes.append(chunks)

    def _source(self, length: int) -> ByteArray:
        start = self._written_bytes % (self._memory.size - CHUNK_BYTES_DEFAULT)
        self._written_bytes += CHUNK_BYTES_DEFAULT
        return self._memory[start - start % 4096 :][:length]


class _Countdown:
    """Calls ``last`` with the last of ``count`` ends."""

    def __init__(self, count: int, last: Callable[[], None]) -> None:
        self._count = count
        self._last = last
        self._lock = threading.Lock()

    def __call__(self, _: object) -> None:
        with self._lock:
            self._count -= 1
            ended = self._count == 0
        if ended:
            self._last()


def replay_reads(trace: Trace, memory: ByteArray, *, threads: int) -> float:
    """Do the trace's reads, from the store's own files, into memory of the same size; returns the seconds.

    As many threads as the store had requests in flight take the next read each, and do nothing else: what the interpreter adds to
    a small read is a few microseconds. A request that the device cuts up is cut up here, over ``threads``.
    """
    reads = trace.of_kind("read")
    cut_up = any(operation.length > NOW_BYTES_MAX for operation in reads)
    with _opened_files({operation.file: trace.paths[operation.file] for operation in reads}) as files:
        transfers = []
        position = 0
        for operation in reads:
            chunk_bytes = CHUNK_BYTES_DEFAULT if operation.length > NOW_BYTES_MAX else operation.length
            for start in range(0, operation.length, chunk_bytes):
                length = min(chunk_bytes, operation.length - start)
                if position + length > memory.size:
                    position = 0
                transfers.append((files[operation.file], [memory[position : position + length].data], operation.offset + start))
                position += length
        waiting = iter(transfers)

        def take_turns() -> None:
            for descriptor, views, offset in waiting:  # each is taken once: the interpreter lets one thread into an iterator at a time
                os.preadv(descriptor, views, offset)

        lanes = max(1, threads if cut_up else trace.in_flight_max)
        with ThreadPoolExecutor(lanes) as pool:
            started = time.perf_counter()
            for turn in [pool.submit(take_turns) for _ in range(lanes)]:
                turn.result()
            return time.perf_counter() - started


@contextmanager
def _opened_files(paths: dict[int, str]) -> Iterator[dict[int, int]]:
    with ExitStack() as closing:
        files = {}
        for number, path in paths.items():
            files[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            closing.callback(os.close, files[number])
            set_direct(files[number])
        yield files


def _transfer(call: Callable[[int, list[Any], int], int], descriptor: int, memory: ByteArray, offset: int) -> int:
    """One chunk; a short transfer (the end of a file) is not repeated: the ceiling may only be too high."""
    return call(descriptor, [memory.data], offset)
