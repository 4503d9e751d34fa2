"""What a host (an inference engine) sees of any kvlode store: statuses, jobs, and the two protocols.

``Store`` and ``BlockSpace`` are implemented by the store on disk (``engine.store``) and by ``MemoryStore``
(``engine.memory_store``); ``tests/conformance.py`` is inherited by the tests of both, and adapters and
their tests are written against this module alone.

Rules that hold for every implementation:

* All methods are thread-safe. Nothing here raises because a block is missing, damaged or unreadable.
* ``keys`` are ordered from the head of a prefix to its tail; results come in the order of the keys.
* A block passed to ``put`` may be reused by the caller as soon as the call returns. Blocks passed to
  ``submit_put(own="borrow")`` and destinations passed to ``submit_get`` belong to the job until ``done()``.
* A destination has meaningful bytes only where its status is ``HIT``.
* A ``timeout`` is in seconds; ``None`` waits without limit. No wait happens where none is documented.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from ..format.namespace import Namespace
from .events import EventBatch

Block: TypeAlias = Any
"""A contiguous CPU or CUDA ``torch.Tensor``, any C-contiguous buffer-protocol object (NumPy array, memoryview,
bytes), or a list of those whose concatenation is the block (scatter/gather)."""


class Status(enum.IntEnum):
    """Outcome of reading one key."""

    HIT = 0
    """The destination holds exactly the bytes that were put, checked against their checksums (``GetJob.verified``)."""
    MISS = 1
    """Nothing is stored under this key."""
    EXPIRED = 2
    """The block's time to live has passed."""
    CORRUPT = 3
    """The stored bytes failed a check; the entry is dropped so that the next lookup is a miss."""
    IO_ERROR = 4
    """The drive failed to deliver the block; it may come back."""
    PENDING = 5
    """Not known yet: the deadline passed, or a lookup is still running in the background."""
    WRONG_SIZE = 6
    """The destination's length differs from the block's raw length."""
    CANCELLED = 7
    """``cancel()`` stopped the job before this key was read."""


class PutState(enum.IntEnum):
    """Where one block of a put has got to."""

    ACCEPTED = 0
    """In the buffer: readable, not yet durable."""
    DURABLE = 1
    """Synced to the drive."""
    EXISTS = 2
    """The key was present already; the call counted as a touch."""
    REFUSED = 3
    """Not stored; ``PutStatus.reason`` says why."""


class Refusal(enum.StrEnum):
    """Why a put was refused, or a block that was accepted did not become durable."""

    BUFFER_FULL = "buffer full"
    NO_SPACE = "no space"
    STORE_FAILED = "store failed"
    READ_ONLY = "read only"
    DELETED = "deleted before it was durable"
    BUFFER_DAMAGED = "bytes changed between put and flush"
    QUOTA = "quota of the namespace used up"
    WRITE_SHARE = "share of writes of the namespace used up"
    NOT_ADMITTED = "not worth a write"
    """The admission policy leaves it out; put it again when it is computed again, and it may be taken in."""


@dataclass(frozen=True, slots=True)
class PutStatus:
    """Outcome of one put; truthy when the block is, or will be, stored."""

    state: PutState
    reason: Refusal | None = None

    def __bool__(self) -> bool:
        return self.state is not PutState.REFUSED


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """What is known of a stored block without reading its payload."""

    raw_bytes: int
    stored_bytes: int
    """Payload bytes on disk; equal to ``raw_bytes`` while the block is only in the buffer."""
    written_at_ns: int
    """UTC, nanoseconds since the epoch."""
    expires_at_ns: int | None
    depth: int
    """Position in its prefix chain; 0 for a block without a parent."""
    tag: bytes
    """16-byte digest of the tag given at put, all zero without one."""
    meta: bytes
    durable: bool


@dataclass(frozen=True, slots=True)
class LoadEstimate:
    """What loading some blocks would take, as far as that can be told without reading them."""

    raw_bytes: int
    """Bytes in the destinations."""
    stored_bytes: int
    """Payload bytes to be read from the drive, and ``raw_bytes`` for blocks that are served from memory."""
    seconds: float
    """At the rate of recent reads, those of other jobs included; before the first read, at that of a common NVMe drive (1 GB/s)."""


@dataclass(frozen=True, slots=True)
class PurgeReport:
    """What a purge found and did (``Store.purge``)."""

    tag: bytes
    """16-byte digest of the tag, as in ``BlockInfo.tag``."""
    physical: bool
    blocks: int
    """Keys that were deleted by this call. Those that an earlier purge had deleted are not counted again."""
    records_erased: int
    """Records whose bytes this call took off the drive (for a store in memory: blocks that were overwritten)."""
    bytes_erased: int
    quarantine_files_erased: int
    complete: bool
    """Nothing of the tag that was put before the call is left. Otherwise ``reasons`` says why; the same call goes on from there."""
    reasons: tuple[str, ...] = ()


class PutJob(Protocol):
    """Handle of a ``submit_put``."""

    @property
    def statuses(self) -> Sequence[PutStatus]:
        """One status a key, as of now; ``ACCEPTED`` turns into ``DURABLE`` (or ``REFUSED``) later."""
        ...

    def done(self) -> bool:
        """True once the caller's memory is free again: at once with ``own="copy"``, else when all keys are settled."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for ``done``; False when the deadline passed."""
        ...


class GetJob(Protocol):
    """Handle of a ``submit_get``."""

    @property
    def statuses(self) -> Sequence[Status]:
        """One status a key; ``PENDING`` where the read has not finished."""
        ...

    @property
    def verified(self) -> Sequence[bool]:
        """For each HIT whether its bytes passed a checksum; False only for bytes that went straight to a GPU."""
        ...

    def done(self) -> bool:
        """True once every status is final and no I/O targets the destinations any more."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for ``done``; False when the deadline passed (the destinations still belong to the job)."""
        ...

    def cancel(self, timeout: float | None = None) -> bool:
        """Call the job off and wait for ``done``; keys that were not delivered become ``CANCELLED``.

        What the drive is already reading straight into the destinations cannot be called back: only then is there anything to wait
        for. False when the deadline passed first; the job is done, and told to its queue, as soon as that is over. With
        ``timeout=0`` it never waits.
        """
        ...


class CompletionQueue(Protocol):
    """Collects finished jobs for hosts with a poll loop; see ``engine.jobs.CompletionQueue``."""

    def fileno(self) -> int:
        """An eventfd that is readable while ``pop`` would return a job."""
        ...

    def pop(self) -> Any | None:
        """The next finished job, or ``None``."""
        ...


@runtime_checkable
class BlockSpace(Protocol):
    """The put/get surface of one namespace of a store."""

    descriptor: Namespace
    digest: bytes

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
        """Copy one block into the buffer (one copy, no I/O). Raises ``InvalidKey`` or ``InvalidBlock`` for what no store could take."""
        ...

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
        queue: CompletionQueue | None = None,
    ) -> PutJob:
        """Put several blocks; ``chained`` makes each key the parent of the next, ``parent`` is that of the first.

        ``own="borrow"`` copies nothing: the blocks' memory belongs to the job until it is done. An error means that nothing was
        taken; a store that fails or closes half way answers with a job that refuses the rest.
        """
        ...

    def match_prefix(self, keys: Sequence[bytes]) -> int:
        """Number of leading keys that are present and not expired."""
        ...

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Presence of each key."""
        ...

    def lookup_nowait(self, keys: Sequence[bytes]) -> list[Status]:
        """``HIT``, ``MISS`` or ``PENDING`` a key, from memory alone; pending keys are resolved in the background. Never runs I/O."""
        ...

    def submit_get(
        self,
        keys: Sequence[bytes],
        outs: Sequence[Block],
        *,
        stream: Any | None = None,
        queue: CompletionQueue | None = None,
    ) -> GetJob:
        """Read blocks into the destinations in the background. ``stream``: a CUDA stream that the copies are ordered on."""
        ...

    def submit_get_range(
        self,
        keys: Sequence[bytes],
        outs: Sequence[Block],
        start_bytes: int,
        *,
        stream: Any | None = None,
        queue: CompletionQueue | None = None,
    ) -> GetJob:
        """Read the same part of each block: its bytes from ``start_bytes`` on, as many as its destination takes.

        Only that part is read from the drive, in whole stripes (256 KiB of raw bytes, more in very long blocks). ``WRONG_SIZE``
        for a block that ends before the part does. Also for tensors ``start_bytes`` counts bytes.

        What is read is checked by the checksums of its stripes, not by that of the whole block.
        """
        ...

    def get_into(self, key: bytes, out: Block, *, timeout: float | None = None) -> Status:
        """Read one block."""
        ...

    def get_many_into(self, keys: Sequence[bytes], outs: Sequence[Block], *, timeout: float | None = None) -> list[Status]:
        """Read blocks; what is not finished at the deadline is ``PENDING`` and its destination will not be touched again."""
        ...

    def info(self, keys: Sequence[bytes]) -> list[BlockInfo | None]:
        """Facts about each key (reads one page a block that is on disk); ``None`` when it is not stored."""
        ...

    def estimate(self, keys: Sequence[bytes]) -> LoadEstimate:
        """What loading these blocks would take; keys that are not stored count nothing. Asks the index, and reads no block.

        Loading is not always faster than computing: a host that knows what computing would take compares, and computes instead.
        """
        ...

    def touch(self, keys: Sequence[bytes]) -> None:
        """Count a use of each key and of its ancestors, so that reclaim keeps them."""
        ...

    def pin(self, keys: Sequence[bytes]) -> AbstractContextManager[int]:
        """Keep blocks from being reclaimed inside the ``with``; yields how many of the keys are present."""
        ...

    def delete(self, keys: Sequence[bytes]) -> int:
        """Remove blocks at once for every reader of this process, durably after the next flush; returns how many were present.

        Each key costs a page in the log, absent ones too: a segment may still hold a block that the index has given up.
        """
        ...

    def drop(self) -> None:
        """Remove every block of the namespace, like ``delete``."""
        ...


@runtime_checkable
class Store(Protocol):
    """A store as a host sees it."""

    def namespace(self, descriptor: Namespace) -> BlockSpace:
        """The surface of one namespace; the same descriptor gives the same blocks in any process."""
        ...

    def flush(self, timeout: float | None = None) -> bool:
        """Make everything accepted before the call durable. False when the deadline passed or any block was dropped (see ``stats``).

        Durable means in the log: an index that could not be synced (``index_write_errors``) is brought up to date from there by
        the next open, also after a crash, and does not make the answer False.
        """
        ...

    def purge(self, tag: str | bytes, *, physical: bool = False, timeout: float | None = None) -> PurgeReport:
        """Delete every block that was put with this tag (a tenant, a session) before the call; durable when it returns.

        It goes by tables of contents, not by the index, so that it also reaches what the index has given up: about 120 bytes and
        the key are read for each record of the store, and each key found costs a page in the log. A key that ever held a block of
        the tag is deleted whatever it holds now. Works beside everything else; a block that is being put meanwhile may stay.

        ``physical``: the bytes go too, payload and metadata, from the drive (holes are punched, or zeros written), from the store's
        memory and from quarantine. Keys stay in tombstones and tables of contents. A read that is under way may end as ``CORRUPT``.

        After a crash, a time-out or an error the same call finishes the work. Raises ``StoreFailed`` where nothing can be written
        (a follower), ``InvalidKey`` for what is no tag.
        """
        ...

    def events(self, since: object = None) -> EventBatch:
        """What became durable, was removed or was cleared since an earlier call (``EventBatch.next``); ``None``: all that is remembered.

        Only what this process wrote and reclaimed: a follower's writer tells of the rest. Raises ``InvalidConfig`` for a place that
        no call gave.
        """
        ...

    def stats(self) -> Mapping[str, Any]:
        """Counters and gauges as one nested mapping of plain values."""
        ...

    def close(self, timeout: float | None = 30.0) -> bool:
        """Flush and stop; False when the deadline passed first. Closing twice is allowed."""
        ...
