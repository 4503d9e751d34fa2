"""From keys to bytes: buffer hits are copied, the rest is looked up and handed to the reader."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .blocks import BlockView, cut_spans, neighbours
from .contract import Status
from .delivery import ReadRequest
from .entry import Entry
from .index_entry import IndexEntry
from .jobs import ReadJob
from .ranges import read_parts
from .stats import Counters

if TYPE_CHECKING:
    from .core import Core

GROUP_BYTES = 32 << 20
"""Buffer hits that are copied in one step, between one look at the buffer and one settlement: copying a block drives code out of the
processor's caches, so what runs between two of them is slow. A deadline waits for one such step."""
GROUP_BLOCKS_MAX = 256


def read_blocks(
    core: Core,
    namespace: bytes,
    job: ReadJob,
    keys: Sequence[bytes],
    outs: Sequence[BlockView],
    *,
    direct: bool,
    stream: Any = None,
    inline: bool = False,
    part_start: int | None = None,
) -> Callable[[], None] | None:
    """Serve a job. With ``inline`` only what is in the buffer, the answer being the function that reads the rest (if any).

    ``part_start``: the destinations are for the bytes from there on, not for whole blocks.
    """
    pending: list[int] = []
    for group in neighbours([out.nbytes for out in outs], GROUP_BYTES, GROUP_BLOCKS_MAX):
        pending += _serve_from_buffer(core, namespace, job, group, keys, outs, stream, part_start)
    idents = [namespace + keys[position] for position in pending]
    found = core.find(idents) if pending else []
    requests: list[ReadRequest] = []
    misses = 0
    for position, entry in zip(pending, found, strict=True):
        request = _request(core, namespace, job, position, keys[position], outs[position], entry, part_start)
        if isinstance(request, ReadRequest):
            requests.append(request)
        else:
            misses += request is Status.MISS
    core.usage.note_use({request.entry.segment_id for request in requests}, core.clock.monotonic_s())
    core.counters.add_for(namespace, {"get_blocks": len(keys), "misses": misses})
    absent = set(pending) - {request.position for request in requests}
    used = [p for p in range(len(keys)) if p not in absent]
    core.heat.credit([core.slot(namespace + keys[p]) for p in used], core.clock.now_ns() // 10**9)
    core.miss_ratio.use([namespace + keys[p] for p in used], lambda at: outs[used[at]].nbytes)
    if not requests:
        core.counters.latency.observe("get_buffer", time.perf_counter() - job.began_s)
        return None
    job.on_answered = functools.partial(_note_drive_call, core.counters, job.began_s)

    def read_rest() -> None:
        if part_start is None:
            core.reader.run(job, requests, direct=direct, stream=stream)
        else:
            read_parts(core, job, requests, part_start, stream)

    if inline:
        return read_rest
    read_rest()
    return None


def _note_drive_call(counters: Counters, began_s: float) -> None:
    counters.latency.observe("get_drive", time.perf_counter() - began_s)


def _fits(size_bytes: int, out: BlockView, part_start: int | None) -> bool:
    return size_bytes == out.nbytes if part_start is None else part_start + out.nbytes <= size_bytes


def _serve_from_buffer(
    core: Core,
    namespace: bytes,
    job: ReadJob,
    group: Sequence[int],
    keys: Sequence[bytes],
    outs: Sequence[BlockView],
    stream: Any,
    part_start: int | None,
) -> list[int]:
    """Settle the keys that the buffer answers; the positions of those for which the index has to be asked."""
    if job.cancelled:
        return []
    idents = [namespace + keys[position] for position in group]
    start, now_ns = part_start or 0, core.clock.now_ns()
    answered: list[int] = []
    statuses: list[Status] = []
    rest: list[int] = []
    try:
        with job.delivering() as allowed:
            for position, ident, entry in zip(group, idents, core.buffer.acquire_many(idents), strict=True):
                status = _status_of(core, ident, entry, now_ns, outs[position], part_start)
                if status is None:
                    rest.append(position)
                    continue
                if status is Status.HIT and entry is not None and allowed:
                    outs[position].copy_from_host(cut_spans(entry.spans, start, start + outs[position].nbytes), stream)
                answered.append(position)
                statuses.append(status)
    finally:
        core.buffer.release()
    hit_bytes = [outs[position].nbytes for position, status in zip(answered, statuses, strict=True) if status is Status.HIT]
    counts = {"buffer_hits": len(hit_bytes), "buffer_hit_bytes": sum(hit_bytes)}
    if len(hit_bytes) < len(answered):
        others = (("misses", Status.MISS), ("expired_blocks", Status.EXPIRED), ("wrong_size_reads", Status.WRONG_SIZE))
        counts |= {name: statuses.count(status) for name, status in others}
    core.counters.add_for(namespace, counts)
    job.settle_many(answered, statuses)
    return rest


def _status_of(core: Core, ident: bytes, entry: Entry | None, now_ns: int, out: BlockView, part_start: int | None) -> Status | None:
    """What the buffer says of a key; ``None`` when it does not know."""
    if entry is None:
        return Status.MISS if core.buffer.hides(ident) else None
    if entry.expires_at_ns and now_ns >= entry.expires_at_ns:
        return Status.EXPIRED
    return Status.HIT if _fits(entry.size_bytes, out, part_start) else Status.WRONG_SIZE


def _request(
    core: Core,
    namespace: bytes,
    job: ReadJob,
    position: int,
    key: bytes,
    out: BlockView,
    entry: IndexEntry | None,
    part_start: int | None,
) -> ReadRequest | Status:
    """What to read; or the answer, where there is nothing to read."""
    if entry is None:
        job.settle(position, Status.MISS)
        return Status.MISS
    if entry.expires_at_ns and core.clock.now_ns() >= entry.expires_at_ns:
        core.forget_entry(namespace + key, entry, "expired_blocks")
        job.settle(position, Status.EXPIRED)
        return Status.EXPIRED
    if not _fits(entry.raw_length, out, part_start):
        core.counters.add_for(namespace, {"wrong_size_reads": 1})
        job.settle(position, Status.WRONG_SIZE)
        return Status.WRONG_SIZE
    return ReadRequest(position, namespace, key, out, entry)
