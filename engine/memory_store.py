"""A store that lives in memory: the contract without a drive, for adapters, their tests, and as a model of the real one.

It keeps the same rules, statuses and errors as the store on disk. What differs follows from having no drive: work is
finished when the call returns, "durable" means that ``flush`` was called, nothing survives ``close``, and at capacity
the least recently used blocks go one by one instead of segment by segment.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ..format.errors import InvalidConfig, StoreClosed
from ..format.keys import check_key, check_meta, tag_digest
from ..format.layout import ZERO_DIGEST
from ..format.namespace import Namespace
from .blocks import BlockView, check_start, view_block
from .config import Clock, SystemClock, parse_bytes
from .contract import Block, BlockInfo, LoadEstimate, PurgeReport, PutStatus, Refusal, Status
from .events import EventBatch, EventKind, EventLog
from .jobs import ACCEPTED, DURABLE, EXISTS, ReadJob, WriteJob, refused
from .memory_block import MemoryBlock
from .memory_purge import checked_tag, purge_memory
from .read_rate import MEMORY_BYTES_PER_S
from .stats import Counters


class MemoryStore:
    """A ``contract.Store`` of at most ``capacity`` bytes of blocks ("1GiB", or a number). Thread-safe.

    ``clock`` is what blocks expire by. With ``pending_first`` the first ``lookup_nowait`` of every key answers
    ``PENDING``, as a store on disk does for keys it has to look up. Raises ``InvalidConfig``.
    """

    def __init__(self, capacity: int | str = "1GiB", *, clock: Clock | None = None, pending_first: bool = False) -> None:
        self.capacity_bytes = parse_bytes(capacity, "capacity")
        self.clock: Clock = clock or SystemClock()
        self.pending_first = pending_first
        self.lock = threading.RLock()
        self.counters = Counters()
        self.told = EventLog()
        self.raw_bytes = 0
        # Least recently used first: what capacity takes away next stands at the front.
        self.blocks: OrderedDict[bytes, MemoryBlock] = OrderedDict()
        self._spaces: dict[bytes, MemorySpace] = {}
        self._closed = False

    def namespace(self, descriptor: Namespace) -> MemorySpace:
        """See ``contract.Store.namespace``. Raises ``InvalidConfig`` when not one such block would fit."""
        self.check_usable()
        if not isinstance(descriptor, Namespace):
            raise InvalidConfig("namespace takes a kvlode.Namespace", expected="Namespace", actual=type(descriptor).__name__)
        if descriptor.block_bytes_max > self.capacity_bytes:
            raise InvalidConfig(
                "the store is too small for a block of this namespace",
                expected=f"a capacity of at least {descriptor.block_bytes_max} bytes",
                actual=f"{self.capacity_bytes} bytes",
                action="Raise capacity, or use smaller blocks.",
            )
        with self.lock:
            return self._spaces.setdefault(descriptor.digest, MemorySpace(self, descriptor))

    def flush(self, timeout: float | None = None) -> bool:
        """Every accepted block counts as durable from now on; never waits, always True."""
        self.check_usable()
        with self.lock:
            for ident, block in self.blocks.items():
                if not block.durable:
                    block.settle(DURABLE)
                    self.told.add(EventKind.STORED, [ident])
        return True

    def purge(self, tag: str | bytes, *, physical: bool = False, timeout: float | None = None) -> PurgeReport:
        """See ``contract.Store.purge``: ``physical`` overwrites the blocks."""
        self.check_usable()
        return purge_memory(self, checked_tag(tag), physical=physical)

    def events(self, since: object = None) -> EventBatch:
        """See ``contract.Store.events``."""
        self.check_usable()
        return self.told.batch(since)

    def stats(self) -> Mapping[str, Any]:
        """Counters and gauges; see ``contract.Store.stats``."""
        self.check_usable()
        with self.lock:
            used = {"capacity_bytes": self.capacity_bytes, "used_bytes": self.raw_bytes, "blocks": len(self.blocks)}
        return {"role": "memory", **used, "counters": self.counters.snapshot()}

    def close(self, timeout: float | None = 30.0) -> bool:
        """Forget everything; jobs are settled as ``flush`` would. Closing twice is allowed."""
        with self.lock:
            if not self._closed:
                self.flush()
                self._closed = True
                self.blocks.clear()
                self.raw_bytes = 0
        return True

    def __enter__(self) -> MemoryStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def check_usable(self) -> None:
        """Raise ``StoreClosed`` after ``close``."""
        if self._closed:
            raise StoreClosed("the store is closed", where="a MemoryStore", action="Make a new one; its blocks are gone.")

    def live(self, ident: bytes) -> MemoryBlock | None:
        """The block under a key unless it is absent or expired; call under ``lock``."""
        block = self.blocks.get(ident)
        return None if block is None or self.expired(block) else block

    def expired(self, block: MemoryBlock) -> bool:
        """Whether a block's time has passed, by the store's clock."""
        return block.expires_at_ns != 0 and self.clock.now_ns() >= block.expires_at_ns

    def insert(self, ident: bytes, block: MemoryBlock) -> PutStatus:
        """Add a filled block, making room for it; call under ``lock``."""
        if self.live(ident) is not None:
            return EXISTS
        self.remove(ident)
        if not self._make_room(block.data.nbytes):
            self.counters.add("refused_puts")
            return refused(Refusal.NO_SPACE)
        self.blocks[ident] = block
        self.raw_bytes += block.data.nbytes
        self.counters.add_many({"put_blocks": 1, "put_bytes": block.data.nbytes})
        return ACCEPTED

    def remove(self, ident: bytes, status: PutStatus = DURABLE) -> None:
        """Forget a block, if it is there; call under ``lock``.

        ``status`` is how a put ends that no flush has settled: a real store would have written the block before losing it.
        """
        block = self.blocks.pop(ident, None)
        if block is not None:
            self.raw_bytes -= block.data.nbytes
            if block.durable:
                self.told.add(EventKind.REMOVED, [ident])
            else:
                block.settle(status)

    def clear(self, digest: bytes) -> None:
        """Forget the blocks of a namespace; call under ``lock``."""
        for ident in [ident for ident in self.blocks if ident.startswith(digest)]:
            block = self.blocks.pop(ident)
            self.raw_bytes -= block.data.nbytes
            if not block.durable:
                block.settle(refused(Refusal.DELETED))
        self.told.add(EventKind.CLEARED, [digest])

    def _make_room(self, nbytes: int) -> bool:
        """Take away least recently used blocks that nobody pinned; False (and nothing taken) when that would not do."""
        missing = self.raw_bytes + nbytes - self.capacity_bytes
        leaving: list[bytes] = []
        for ident, block in self.blocks.items():
            if missing <= 0:
                break
            if block.pins == 0:
                leaving.append(ident)
                missing -= block.data.nbytes
        if missing > 0:
            return False
        for ident in leaving:
            self.remove(ident)
        self.counters.add("reclaimed_blocks", len(leaving))
        return True

    def use(self, digest: bytes, keys: Sequence[bytes]) -> None:
        """Count a use of each key and of its ancestors. From the tail, so that the head of a chain is the last to go."""
        seen: set[bytes] = set()
        for tail in reversed(keys):
            key: bytes | None = tail
            while key is not None and key not in seen:
                seen.add(key)
                block = self.blocks.get(digest + key)
                if block is None:
                    break
                self.blocks.move_to_end(digest + key)
                key = block.parent


class MemorySpace:
    """See ``contract.BlockSpace``. Made by ``MemoryStore.namespace``; thread-safe.

    Jobs are done when they are handed out, no read is ever ``PENDING``, and a borrowed block is copied and at once durable.
    """

    def __init__(self, store: MemoryStore, descriptor: Namespace) -> None:
        self._store = store
        self.descriptor = descriptor
        self.digest: bytes = descriptor.digest
        self._looked_up: set[bytes] = set()

    def put(
        self,
        key: bytes,
        block: Block,
        *,
        parent: bytes | None = None,
        ttl: float | None = None,
        tag: str | bytes | None = None,
        meta: bytes = b"",
    ) -> PutStatus:
        self._store.check_usable()
        view = self._checked_view(key, block)
        return self._put_one(key, view, self._new_block(parent, ttl, tag, meta))

    def submit_put(
        self,
        keys: Sequence[bytes],
        blocks: Sequence[Block],
        *,
        parent: bytes | None = None,
        ttl: float | None = None,
        tag: str | bytes | None = None,
        metas: Sequence[bytes] | None = None,
        own: Literal["copy", "borrow"] = "copy",
        chained: bool = True,
        queue: Any | None = None,
    ) -> WriteJob:
        self._store.check_usable()
        _check_lengths("blocks", len(keys), len(blocks))
        metas = [b""] * len(keys) if metas is None else metas
        _check_lengths("metas", len(keys), len(metas))
        if own not in ("copy", "borrow"):
            raise InvalidConfig("own is unknown", expected="'copy' or 'borrow'", actual=repr(own))
        views = [self._checked_view(key, block) for key, block in zip(keys, blocks, strict=True)]
        parents = [parent, *keys][: len(keys)] if chained else [parent] * len(keys)
        fresh = [self._new_block(above, ttl, tag, meta) for above, meta in zip(parents, metas, strict=True)]
        borrow = own == "borrow"
        job = WriteJob(len(keys), queue, borrow=borrow)
        for position, (key, view, block) in enumerate(zip(keys, views, fresh, strict=True)):
            block.on_durable = job.settler(position)
            job.decide(position, self._put_one(key, view, block, durable=borrow))
        return job

    def _checked_view(self, key: bytes, block: Block) -> BlockView:
        check_key(key)
        return view_block(block, writable=False, dtype=self.descriptor.dtype, bytes_max=self.descriptor.block_bytes_max)

    def _new_block(self, parent: bytes | None, ttl: float | None, tag: str | bytes | None, meta: bytes) -> MemoryBlock:
        check_meta(meta)
        if parent is not None:
            check_key(parent)
        now_ns = self._store.clock.now_ns()
        expires_at_ns = 0
        if ttl is not None:
            if not (ttl > 0 and math.isfinite(ttl)):
                raise InvalidConfig("ttl cannot be used", expected="a positive number of seconds, or None", actual=ttl)
            expires_at_ns = now_ns + int(ttl * 1e9)
        return MemoryBlock(parent, now_ns, expires_at_ns, tag_digest(tag) if tag is not None else ZERO_DIGEST, meta)

    def _put_one(self, key: bytes, view: BlockView, block: MemoryBlock, *, durable: bool = False) -> PutStatus:
        store, ident = self._store, self.digest + key
        with store.lock:
            if store.live(ident) is not None:
                store.use(self.digest, [key])
                return EXISTS
        block.fill(view)
        with store.lock:
            store.check_usable()
            if block.parent is not None:
                above = store.live(self.digest + block.parent)
                block.depth = 1 if above is None else above.depth + 1
            status = store.insert(ident, block)
            if durable and status is ACCEPTED:
                block.settle(DURABLE)
            return status

    def match_prefix(self, keys: Sequence[bytes]) -> int:
        present = self.contains(keys)
        return present.index(False) if False in present else len(present)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        self._store.check_usable()
        with self._store.lock:
            return [self._store.live(self.digest + key) is not None for key in keys]

    def lookup_nowait(self, keys: Sequence[bytes]) -> list[Status]:
        answers = [Status.HIT if present else Status.MISS for present in self.contains(keys)]
        if not self._store.pending_first:
            return answers
        with self._store.lock:
            unknown = [key not in self._looked_up for key in keys]
            self._looked_up.update(keys)
        return [Status.PENDING if new else answer for new, answer in zip(unknown, answers, strict=True)]

    def info(self, keys: Sequence[bytes]) -> list[BlockInfo | None]:
        self._store.check_usable()
        with self._store.lock:
            return [None if block is None else block.info() for block in (self._store.live(self.digest + key) for key in keys)]

    def estimate(self, keys: Sequence[bytes]) -> LoadEstimate:
        self._store.check_usable()
        with self._store.lock:
            live = [block for key in keys if (block := self._store.live(self.digest + key)) is not None]
        size_bytes = sum(block.data.nbytes for block in live)
        return LoadEstimate(size_bytes, size_bytes, size_bytes / MEMORY_BYTES_PER_S)

    def submit_get(self, keys: Sequence[bytes], outs: Sequence[Block], *, stream: Any | None = None, queue: Any | None = None) -> ReadJob:
        return self._submit_get(keys, outs, None, stream, queue)

    def submit_get_range(
        self, keys: Sequence[bytes], outs: Sequence[Block], start_bytes: int, *, stream: Any | None = None, queue: Any | None = None
    ) -> ReadJob:
        check_start(start_bytes)
        return self._submit_get(keys, outs, start_bytes, stream, queue)

    def _submit_get(self, keys: Sequence[bytes], outs: Sequence[Block], part_start: int | None, stream: Any, queue: Any) -> ReadJob:
        self._store.check_usable()
        _check_lengths("destinations", len(keys), len(outs))
        for key in keys:
            check_key(key)
        views = [view_block(out, writable=True, dtype=self.descriptor.dtype) for out in outs]
        job = ReadJob(len(keys), queue)
        for position, (key, view) in enumerate(zip(keys, views, strict=True)):
            job.settle(position, self._read(key, view, part_start, stream))
        return job

    def get_into(self, key: bytes, out: Block, *, timeout: float | None = None) -> Status:
        return self.submit_get([key], [out]).statuses[0]

    def get_many_into(self, keys: Sequence[bytes], outs: Sequence[Block], *, timeout: float | None = None) -> list[Status]:
        return list(self.submit_get(keys, outs).statuses)

    def _read(self, key: bytes, view: BlockView, part_start: int | None, stream: Any) -> Status:
        store, ident = self._store, self.digest + key
        with store.lock:
            block = store.blocks.get(ident)
            if block is None:
                store.counters.add("misses")
                return Status.MISS
            if store.expired(block):
                store.remove(ident)
                store.counters.add("expired_blocks")
                return Status.EXPIRED
            start = part_start or 0
            if (part_start is None and block.data.nbytes != view.nbytes) or start + view.nbytes > block.data.nbytes:
                store.counters.add("wrong_size_reads")
                return Status.WRONG_SIZE
            store.use(self.digest, [key])
        status = block.deliver(view, start, stream)
        if status is Status.CORRUPT:
            with store.lock:
                if store.blocks.get(ident) is block:
                    store.remove(ident)
            store.counters.add("corrupt_blocks")
        elif status is Status.HIT:
            store.counters.add_many({"hits": 1, "get_bytes": view.nbytes})
        return status

    def touch(self, keys: Sequence[bytes]) -> None:
        self._store.check_usable()
        with self._store.lock:
            self._store.use(self.digest, keys)

    @contextlib.contextmanager
    def pin(self, keys: Sequence[bytes]) -> Iterator[int]:
        self._store.check_usable()
        with self._store.lock:
            held = [block for key in keys if (block := self._store.live(self.digest + key)) is not None]
            for block in held:
                block.pins += 1
        try:
            yield len(held)
        finally:
            with self._store.lock:
                for block in held:
                    block.pins -= 1

    def delete(self, keys: Sequence[bytes]) -> int:
        self._store.check_usable()
        for key in keys:
            check_key(key)
        with self._store.lock:
            present = {key for key in keys if self._store.live(self.digest + key) is not None}
            for key in keys:
                self._store.remove(self.digest + key, refused(Refusal.DELETED))
        self._store.counters.add("deleted_blocks", len(present))
        return len(present)

    def drop(self) -> None:
        self._store.check_usable()
        with self._store.lock:
            self._store.clear(self.digest)
        self._store.counters.add("dropped_namespaces")


def _check_lengths(name: str, keys: int, others: int) -> None:
    if keys != others:
        raise InvalidConfig(f"keys and {name} differ in number", expected=f"{keys} {name}", actual=others)
