"""From keys to bytes: buffer hits are copied, the rest is looked up and handed to the reader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .blocks import BlockView, cut_spans
from .contract import Status
from .delivery import ReadRequest
from .index_entry import IndexEntry
from .jobs import ReadJob
from .ranges import read_parts

if TYPE_CHECKING:
    from .core import Core


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
    pending = [p for p in range(len(keys)) if not _serve_from_buffer(core, namespace, job, p, keys[p], outs[p], stream, part_start)]
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
    core: Core, namespace: bytes, job: ReadJob, position: int, key: bytes, out: BlockView, stream: Any, part_start: int | None
) -> bool:
    """Settle a key that the buffer answers; False when the index has to be asked."""
    ident = namespace + key
    if job.cancelled:
        job.settle(position, Status.CANCELLED)
        return True
    entry = core.buffer.acquire(ident)
    if entry is None:
        if core.buffer.hides(ident):
            job.settle(position, Status.MISS)
            return True
        return False
    try:
        if entry.expires_at_ns and core.clock.now_ns() >= entry.expires_at_ns:
            status = Status.EXPIRED
        elif not _fits(entry.size_bytes, out, part_start):
            status = Status.WRONG_SIZE
        else:
            status = Status.PENDING
            with job.delivering() as allowed:
                if allowed:
                    start = part_start or 0
                    out.copy_from_host(cut_spans(entry.spans, start, start + out.nbytes), stream)
                    status = Status.HIT
    finally:
        core.buffer.release()
    if status is not Status.PENDING:
        job.settle(position, status)
    return True


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
