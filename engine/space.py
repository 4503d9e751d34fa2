"""The put/get surface of one namespace of a store on disk (``contract.BlockSpace``)."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash

from ..format.checksum import xxh3_64
from ..format.errors import InvalidBlock, InvalidConfig, KvlodeError, StoreFailed
from ..format.keys import check_key, check_meta, key_digest, tag_digest
from ..format.layout import ZERO_DIGEST
from ..format.namespace import Namespace
from .block_facts import block_info
from .blocks import BlockView, check_start, cut_spans, pairs_of, view_block
from .contract import Block, BlockInfo, LoadEstimate, PutStatus, Refusal, Status
from .entry import Entry, Kind
from .jobs import ACCEPTED, EXISTS, ReadJob, WriteJob, refused
from .lookups import prefix_run
from .namespaces import NamespaceState
from .read_rate import MEMORY_BYTES_PER_S
from .reading import read_blocks

if TYPE_CHECKING:
    from .core import Core

COPY_PIECE_BYTES = 256 << 10
"""Blocks are copied and hashed in pieces of this size, so that the hash reads what is still in the CPU's cache."""


class Space:
    """See ``contract.BlockSpace``. Made by ``DiskStore.namespace``."""

    def __init__(self, core: Core, state: NamespaceState) -> None:
        self._core = core
        self._state = state
        self.descriptor: Namespace = state.descriptor
        self.digest = state.digest

    # --- putting ----------------------------------------------------------------------------------------------

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
        self._core.check_usable()
        view = self._checked_view(key, block)
        entry = self._entry(key, parent, ttl, tag, meta)
        if self._present([entry.ident])[0]:
            self.touch([key])
            return EXISTS
        return self._put_one(entry, view, copy=True)

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
        self._core.check_usable()
        if len(keys) != len(blocks) or (metas is not None and len(metas) != len(keys)):
            raise InvalidConfig("keys, blocks and metas differ in number", expected=len(keys), actual=len(blocks))
        if own not in ("copy", "borrow"):
            raise InvalidConfig("own is unknown", expected="'copy' or 'borrow'", actual=repr(own))
        views = [self._checked_view(key, block) for key, block in zip(keys, blocks, strict=True)]
        parents = [parent, *keys][: len(keys)] if chained else [parent] * len(keys)
        metas = metas if metas is not None else [b""] * len(keys)
        entries = [self._entry(key, above, ttl, tag, meta) for key, above, meta in zip(keys, parents, metas, strict=True)]
        present = self._present([entry.ident for entry in entries])
        self.touch([key for key, known in zip(keys, present, strict=True) if known])
        borrow = own == "borrow"
        job = WriteJob(len(keys), queue, borrow=borrow)
        stored: set[bytes] = set()  # a key that comes twice may have left the buffer for the log before its second turn
        for position, (entry, view, known) in enumerate(zip(entries, views, present, strict=True)):
            entry.on_settled = job.settler(position)
            known = known or entry.key in stored
            try:
                status = EXISTS if known else self._put_one(entry, view, copy=not borrow or view.is_device)
            except KvlodeError:
                if not position:
                    raise
                status = refused(Refusal.STORE_FAILED)  # earlier blocks are taken, and lent perhaps: the host must get their job
            if status:
                stored.add(entry.key)
            job.decide(position, status)
        return job

    def _checked_view(self, key: bytes, block: Block) -> BlockView:
        check_key(key)
        view = view_block(block, writable=False, dtype=self.descriptor.dtype)
        if view.nbytes > self.descriptor.block_bytes_max:
            raise InvalidBlock(
                "block too large for its namespace",
                where=f"key {key.hex()}",
                expected=f"at most {self.descriptor.block_bytes_max} bytes (block_bytes_max)",
                actual=f"{view.nbytes} bytes",
                action="Open the namespace with a larger block_bytes_max.",
            )
        return view

    def _entry(self, key: bytes, parent: bytes | None, ttl: float | None, tag: str | bytes | None, meta: bytes) -> Entry:
        check_meta(meta)
        now_ns = self._core.clock.now_ns()
        entry = Entry(Kind.BLOCK, self._state, key, written_at_ns=now_ns)
        entry.meta = bytes(meta)
        entry.tag = tag_digest(tag)
        if ttl is None:
            ttl = self._core.admission.ttl_s(self.digest)
        if ttl is not None:
            if not (ttl > 0 and math.isfinite(ttl)):
                raise InvalidConfig("ttl cannot be used", expected="a positive number of seconds, or None", actual=ttl)
            entry.expires_at_ns = now_ns + int(ttl * 1e9)
        if parent is not None:
            check_key(parent)
            entry.parent, entry.parent_key = key_digest(parent), bytes(parent)
        return entry

    def _put_one(self, entry: Entry, view: BlockView, *, copy: bool) -> PutStatus:
        core, began_s = self._core, time.perf_counter()
        core.miss_ratio.use([entry.ident], lambda _: view.nbytes)
        reason = core.refusal()
        if reason is None:
            reason = core.admission.refusal(self.digest, entry.ident, view.nbytes)
        if reason is not None:
            core.counters.add_many({"refused_puts": 1, f"refused_{reason.name.lower()}": 1})
            return refused(reason)
        if entry.parent_key is not None:
            above = core.buffer.entries.get(self.digest + entry.parent_key)
            entry.depth = above.depth + 1 if above is not None and above.kind is Kind.BLOCK and above.depth >= 0 else -1
        try:
            reserved = core.buffer.reserve(entry, view.nbytes, core.config.put_timeout_s, now_ns=entry.written_at_ns, own_memory=copy)
            if reserved:
                entry.raw_checksum = _fill(entry, view) if copy else _lend(entry, view)
                core.buffer.publish(entry)
                core.lookups.invalidate(entry.ident)  # after it: a lookup that starts now finds the block in the buffer
        except BaseException:  # an interrupt in the middle of the copy must not leave a half-filled block behind
            core.buffer.withdraw(entry)
            raise
        if reserved is None:
            return EXISTS
        if not reserved:
            core.counters.add_many({"refused_puts": 1, "refused_buffer_full": 1})
            return refused(Refusal.BUFFER_FULL)
        core.heat.link(core.slot(entry.ident), core.digest_slot(self.digest, entry.parent) if entry.parent != ZERO_DIGEST else 0)
        core.counters.add_for(self.digest, {"put_blocks": 1, "put_bytes": view.nbytes})
        core.counters.latency.observe("put", time.perf_counter() - began_s)
        return ACCEPTED

    # --- looking up -------------------------------------------------------------------------------------------

    def match_prefix(self, keys: Sequence[bytes]) -> int:
        self._core.check_usable()
        return prefix_run(keys, lambda batch: self._present([self.digest + key for key in batch]))

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        self._core.check_usable()
        return self._present([self.digest + key for key in keys])

    def _present(self, idents: list[bytes]) -> list[bool]:
        """Presence of each key: the buffer's word first, the index's for the rest."""
        core = self._core
        now_ns = core.clock.now_ns()
        entries = core.buffer.entries
        if not entries:
            return core.live(idents)
        answers: list[bool | None] = [self._buffered(entries.get(ident), now_ns) for ident in idents]
        unknown = [position for position, answer in enumerate(answers) if answer is None]
        for position, live in zip(unknown, core.live([idents[p] for p in unknown]) if unknown else (), strict=True):
            answers[position] = live
        return [bool(answer) for answer in answers]

    def _buffered(self, entry: Entry | None, now_ns: int) -> bool | None:
        if entry is None:
            return None
        return self._core.buffer.readable(entry) and (entry.expires_at_ns == 0 or now_ns < entry.expires_at_ns)

    def lookup_nowait(self, keys: Sequence[bytes]) -> list[Status]:
        self._core.check_usable()
        core = self._core
        now_ns = core.clock.now_ns()
        idents = [self.digest + key for key in keys]
        buffered = [self._buffered(core.buffer.entries.get(ident), now_ns) for ident in idents]
        asked = iter(core.lookups.ask([ident for ident, known in zip(idents, buffered, strict=True) if known is None]))
        return [next(asked) if known is None else (Status.HIT if known else Status.MISS) for known in buffered]

    # --- getting ----------------------------------------------------------------------------------------------

    def submit_get(self, keys: Sequence[bytes], outs: Sequence[Block], *, stream: Any | None = None, queue: Any | None = None) -> ReadJob:
        return self._submit_get(keys, outs, None, stream, queue)

    def submit_get_range(
        self, keys: Sequence[bytes], outs: Sequence[Block], start_bytes: int, *, stream: Any | None = None, queue: Any | None = None
    ) -> ReadJob:
        check_start(start_bytes)
        return self._submit_get(keys, outs, start_bytes, stream, queue)

    def _submit_get(self, keys: Sequence[bytes], outs: Sequence[Block], part_start: int | None, stream: Any, queue: Any) -> ReadJob:
        core = self._core
        core.check_usable()
        views = self._destinations(keys, outs)
        job = ReadJob(len(keys), queue)
        core.start_job(job, lambda: read_blocks(core, self.digest, job, keys, views, direct=True, stream=stream, part_start=part_start))
        return job

    def get_into(self, key: bytes, out: Block, *, timeout: float | None = None) -> Status:
        return self.get_many_into([key], [out], timeout=timeout)[0]

    def get_many_into(self, keys: Sequence[bytes], outs: Sequence[Block], *, timeout: float | None = None) -> list[Status]:
        core = self._core
        core.check_usable()
        views = self._destinations(keys, outs)
        job = ReadJob(len(keys))
        if timeout is None:
            try:
                pending = read_blocks(core, self.digest, job, keys, views, direct=True, inline=True)
                if pending is not None:
                    core.track(job)
                    pending()  # hands the reads to their threads, and waits for nothing
                    job.wait()
            except BaseException:
                core.buffer.release()
                job.cancel()  # the destinations are the caller's again only when no I/O targets them
                raise
        else:
            try:
                core.start_job(job, lambda: read_blocks(core, self.digest, job, keys, views, direct=False))
                finished = job.wait(timeout)
            except BaseException:
                job.abandon()
                raise
            if not finished:
                job.abandon()
        return list(job.statuses)

    def _destinations(self, keys: Sequence[bytes], outs: Sequence[Block]) -> list[BlockView]:
        if len(keys) != len(outs):
            raise InvalidConfig("keys and destinations differ in number", expected=len(keys), actual=len(outs))
        for key in keys:
            check_key(key)
        return [view_block(out, writable=True, dtype=self.descriptor.dtype) for out in outs]

    def info(self, keys: Sequence[bytes]) -> list[BlockInfo | None]:
        self._core.check_usable()
        return self._core.in_background(lambda: [block_info(self._core, self.digest + key) for key in keys])

    def estimate(self, keys: Sequence[bytes]) -> LoadEstimate:
        core = self._core
        core.check_usable()
        now_ns = core.clock.now_ns()
        buffered_bytes, unknown = 0, []
        for key in keys:
            ident = self.digest + key
            entry = core.buffer.entries.get(ident)
            known = self._buffered(entry, now_ns)
            if known is None:
                unknown.append(ident)
            elif known and entry is not None:
                buffered_bytes += entry.size_bytes
        found = [entry for entry in core.find(unknown) if entry is not None] if unknown else []
        live = [entry for entry in found if not 0 < entry.expires_at_ns <= now_ns]
        stored_bytes = sum(entry.stored_length for entry in live)
        seconds = core.reader.rate.seconds_for(stored_bytes) + buffered_bytes / MEMORY_BYTES_PER_S
        return LoadEstimate(buffered_bytes + sum(entry.raw_length for entry in live), buffered_bytes + stored_bytes, seconds)

    # --- keeping and removing -----------------------------------------------------------------------------------

    def touch(self, keys: Sequence[bytes]) -> None:
        self._core.check_usable()
        if keys:
            self._core.heat.credit([self._core.slot(self.digest + key) for key in keys], self._core.clock.now_ns() // 10**9)
            self._core.miss_ratio.use([self.digest + key for key in keys], lambda _: 0, counted=False)

    @contextlib.contextmanager
    def pin(self, keys: Sequence[bytes]) -> Iterator[int]:
        self._core.check_usable()
        idents = [self.digest + key for key in keys]
        held: dict[bytes, None] = {}
        try:
            self._core.pins.hold(idents, held)
            present = self._present(idents)
            yield sum(1 for ident, here in zip(idents, present, strict=True) if here and ident in held)
        finally:
            self._core.pins.release(held)

    def delete(self, keys: Sequence[bytes]) -> int:
        self._core.check_usable()
        self._check_writable("delete")
        for key in keys:
            check_key(key)
        present = self._present([self.digest + key for key in keys])
        for key in keys:  # absent ones too: a record that the index has given up may still lie in a segment, for an index rebuilt from it
            entry = Entry(Kind.TOMBSTONE, self._state, key, written_at_ns=self._core.clock.now_ns())
            self._core.lookups.invalidate(entry.ident)
            self._core.buffer.enqueue_tombstone(entry)
        self._core.counters.add_for(self.digest, {"deleted_blocks": sum(present)})
        self._core.counters.decisions.note("blocks_deleted", "asked by the host", namespace=self.digest.hex(), blocks=sum(present))
        return sum(present)

    def drop(self) -> None:
        self._core.check_usable()
        self._check_writable("drop")
        entry = Entry(Kind.DROP, self._state, b"", written_at_ns=self._core.clock.now_ns())
        self._core.buffer.enqueue_drop(entry, self._core.catalog.raise_floor)
        self._core.lookups.clear()
        self._core.counters.add("dropped_namespaces")
        self._core.counters.decisions.note("namespace_dropped", "asked by the host", namespace=self.digest.hex())

    def _check_writable(self, operation: str) -> None:
        reason = self._core.refusal()
        if reason in (Refusal.READ_ONLY, Refusal.STORE_FAILED):
            raise StoreFailed(
                f"{operation} needs a store that can write",
                where=self._core.path,
                expected="an open writer",
                actual=str(reason),
                action="Open the store for writing, or close and reopen it after a failure.",
            )


def _fill(entry: Entry, view: BlockView) -> int:
    """Copy a block into its buffer memory and hash what arrived there; the last page is padded with zeros."""
    spans = entry.spans
    padded_bytes = sum(span.size for span in spans)
    for tail in cut_spans(spans, view.nbytes, padded_bytes):
        tail[:] = 0
    if view.is_device:
        view.copy_to_host(cut_spans(spans, 0, view.nbytes))
        return xxh3_64(*cut_spans(spans, 0, view.nbytes))
    hasher = xxhash.xxh3_64()
    for source, target in pairs_of(view.spans, cut_spans(spans, 0, view.nbytes)):
        for start in range(0, source.nbytes, COPY_PIECE_BYTES):
            piece = target[start : start + COPY_PIECE_BYTES]
            np.copyto(piece, source[start : start + COPY_PIECE_BYTES])
            hasher.update(piece)
    return int(hasher.intdigest())


def _lend(entry: Entry, view: BlockView) -> int:
    """Use the caller's memory as the block until the job is done."""
    entry.spans = tuple(view.spans)
    return xxh3_64(*view.spans)
