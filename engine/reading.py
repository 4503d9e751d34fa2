"""From keys to bytes: buffer hits are copied, the rest is looked up and handed to the reader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .blocks import BlockView, cut_spans, neighbours
from .contract import Status
from .delivery import ReadRequest
from .entry import Entry
from .index_entry import IndexEntry
from .jobs import ReadJob
from .ranges import read_parts

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
    requests = []
    for position, entry in zip(pending, found, strict=True):
        request = _request(core, namespace, job, position, keys[position], outs[position], entry, part_start)
        if request is not None:
            requests.append(request)
    missed = len(pending) - len(requests)
    core.counters.add_many({"get_blocks": len(keys), "buffer_hits": len(keys) - len(pending), "misses": missed})
    absent = set(pending) - {request.position for request in requests}
    core.heat.credit([core.slot(namespace + keys[p]) for p in range(len(keys)) if p not in absent])
    if not requests:
        return None

    def read_rest() -> None:
        if part_start is None:
            core.reader.run(job, requests, direct=direct, stream=stream)
        else:
            read_parts(core, job, requests, part_start, stream)

    if inline:
        return read_rest
    read_rest()
    return None


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
) -> ReadRequest | None:
    if entry is None:
        job.settle(position, Status.MISS)
        return None
    if entry.expires_at_ns and core.clock.now_ns() >= entry.expires_at_ns:
        core.forget_entry(namespace + key, entry, "expired_blocks")
        job.settle(position, Status.EXPIRED)
        return None
    if not _fits(entry.raw_length, out, part_start):
        core.counters.add("wrong_size_reads")
        job.settle(position, Status.WRONG_SIZE)
        return None
    return ReadRequest(position, namespace, key, out, entry)
