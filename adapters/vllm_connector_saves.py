"""Stores of the vLLM connector, worked off on one thread beside the one that runs the model.

A store asks the index which blocks are there, which may take as long as the drive likes. So the model's thread only queues it, and a
drive that hangs below the index holds up this one thread. Blocks stay where they are until their turn: vLLM leaves them alone until
the store is reported, so no memory has to be as large as a prompt. When it is their turn they are copied to memory of the adapter
(as much as the store's ``buffer``), and the store borrows the copy.

That copy is what makes giving up safe. A store that is withdrawn before it is copied never reaches the drive, and one that is copied
has the right bytes whatever vLLM does with its memory afterwards; so there is nothing to delete, and no wait for a store that hangs.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine.blocks import view_block
from ..engine.contract import PutJob, Refusal
from ..gds.buffers import ByteArray, SlotPool
from ..gds.monitor import Monitor
from .attached import QuietSpace

logger = logging.getLogger("kvlode")

QUEUED_MAX = 4096
"""Stores that wait for their turn; beyond that they are refused."""
PIECE_BYTES = 32 << 20
"""Copied and handed to the store at a time, so that the drive writes one piece while the next is copied."""
ROOM_STEP_S = 0.05
"""How often the thread looks, while it waits for memory, whether the store was withdrawn."""
STOP_S = 1.0


@dataclass(slots=True, eq=False)
class Save:
    """One store: blocks of one request, each the parent of the next."""

    request_id: str
    keys: Sequence[bytes]
    sources: Sequence[list[Any]]
    """The runs of bytes of each block in vLLM's memory."""
    parent: bytes | None = None
    computed: Any = None
    """A CUDA event behind the step that computes the blocks; ``None`` on a CPU."""
    started_s: float = field(default_factory=time.monotonic)
    free_blocks: int = 0
    """How many from the front need vLLM's memory no longer."""
    withdrawn: bool = False
    over: bool = False
    """The store has it, or refused it, or it was withdrawn."""


class _Lent:
    """Copies that the store borrows; it takes the place of a completion queue, to be told when the store is done with them."""

    def __init__(self, pool: SlotPool, slots: Sequence[ByteArray]) -> None:
        self._pool = pool
        self.slots = slots

    def push(self, job: PutJob) -> None:
        self.give_back()

    def give_back(self) -> None:
        for slot in self.slots:
            self._pool.release(slot)


class Saver:
    """The stores of one worker. All methods are for the model's thread; only ``wait`` and ``close`` wait, both with a deadline.

    ``space``: where blocks go. ``memory_bytes``: for copies, at least one block whatever it says. ``device``: of vLLM's memory.
    """

    def __init__(self, space: QuietSpace, *, block_bytes: int, memory_bytes: int, device: Any) -> None:
        self.space: QuietSpace | None = space
        """Where blocks are read from; ``None`` from ``renew`` until the new namespace is there."""
        self._opened = space
        self._block_bytes = block_bytes
        self._device = device
        self._stream: Any = None
        self._memory = SlotPool(block_bytes, memory_bytes, page_lock=device.type == "cuda")
        self._piece_blocks = max(1, min(PIECE_BYTES, memory_bytes // 4) // block_bytes)
        self._changed = Monitor()
        self._queue: deque[Save] = deque()
        self._running: Save | None = None
        self._renewals: deque[Callable[[], QuietSpace]] = deque()
        self._busy = self._stopping = self._read_only = self._refusing = False
        self._moved_s = time.monotonic()
        self._counts = {"given_up_blocks": 0, "refused_blocks": 0}
        self._thread = threading.Thread(target=self._run, name="kvlode-vllm-saves", daemon=True)
        self._thread.start()

    # --- for the model's thread -----------------------------------------------------------------------------------------

    def submit(self, save: Save, stall_s: float) -> bool:
        """Queue a store. False, and counted, where too many wait or the thread has not got on for ``stall_s``."""
        with self._changed.lock:
            refusing = self._stopping or len(self._queue) >= QUEUED_MAX or self._stalled(stall_s)
            if not refusing:
                self._queue.append(save)
                self._changed.notify_all()
            else:
                self._counts["refused_blocks"] += len(save.keys)
            first, self._refusing = refusing and not self._refusing, refusing
        if first:
            logger.warning("blocks are not stored: the store does not keep up, or its drive does not answer")
        return not refusing

    def stalled(self, timeout_s: float) -> bool:
        """Whether the thread has waited for the store, in one place, for longer than this."""
        with self._changed.lock:
            return self._stalled(timeout_s)

    def _stalled(self, timeout_s: float) -> bool:
        return self._busy and time.monotonic() - self._moved_s > timeout_s

    def withdraw(self, saves: Iterable[Save]) -> int:
        """Their memory is vLLM's from now on, and what of it was not copied never reaches the store; how many blocks that is."""
        lost = 0
        with self._changed.lock:
            for save in saves:
                if not save.over:
                    save.withdrawn = save.over = True
                    lost += len(save.keys) - save.free_blocks
            self._queue = deque(save for save in self._queue if not save.withdrawn)
            self._changed.notify_all()
        return lost

    def give_up(self, saves: Iterable[Save]) -> None:
        """Withdraw what did not end in time; counted."""
        lost = self.withdraw(saves)
        if lost:
            with self._changed.lock:
                self._counts["given_up_blocks"] += lost
            logger.warning("%d blocks were not stored in time and are given up", lost)

    def renew(self, open_space: Callable[[], QuietSpace]) -> None:
        """Forget every block, then go on in another namespace; before any store that is queued later. Until then there is nothing to
        read. What is queued already should be withdrawn."""
        with self._changed.lock:
            self.space = None
            self._renewals.append(open_space)
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until ``condition`` holds, which may look at saves; False at the deadline."""
        return self._changed.wait_for(condition, timeout_s)

    @property
    def idle(self) -> bool:
        return not (self._queue or self._renewals or self._busy)

    def counts(self) -> Mapping[str, int]:
        """Blocks that were not stored because it took too long, and those that were not even queued."""
        with self._changed.lock:
            return dict(self._counts)

    def close(self, timeout_s: float) -> bool:
        """Work off what is queued, as long as that may take, and stop. Afterwards nothing reads vLLM's memory for the store."""
        drained = self.wait(lambda: self.idle, timeout_s)
        with self._changed.lock:
            left = [save for save in (self._running, *self._queue) if save is not None]
            self._stopping = True
            self._changed.notify_all()
        self.give_up(left)
        self._thread.join(STOP_S)
        return drained and not self._thread.is_alive()

    # --- the thread -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._changed.wait_for(lambda: not self._may_sleep())
            with self._changed.lock:
                if self._stopping:
                    return
                renewal = self._renewals[0] if self._renewals else None
                save = self._running = None if renewal is not None else self._queue.popleft()
                self._busy, self._moved_s = True, time.monotonic()
            try:
                if renewal is not None:
                    self._renew(renewal)
                elif save is not None:
                    self._save(save)
            except Exception as error:  # the next one is another one, and the engine must not end because of its cache
                logger.error("a store of blocks failed: %s", error)
                self.give_up([save] if save is not None else [])
            with self._changed.lock:
                if save is not None:
                    save.over = True
                self._running = save = None  # it names vLLM's memory, and the thread may now sleep for long
                self._busy = False
                self._changed.notify_all()

    def _may_sleep(self) -> bool:
        return not (self._queue or self._renewals or self._stopping)

    def _renew(self, open_space: Callable[[], QuietSpace]) -> None:
        old, descriptor = self._opened, self._opened.descriptor
        self._opened = QuietSpace(None, descriptor)  # should the other one not open
        try:
            old.drop()
            self._opened = open_space()
        finally:
            with self._changed.lock:
                self._renewals.popleft()
                if not self._renewals:
                    self.space = self._opened

    def _save(self, save: Save) -> None:
        if self._read_only:
            return
        space = self._opened
        present = space.contains(save.keys)
        position = present.index(False) if False in present else len(present)
        if position:  # a use of them, of vLLM's own copy
            space.touch(save.keys[:position])
            self._freed(save, position)
        while position < len(save.keys):
            lent = self._copy(save, position)
            if lent is None:
                return
            stop = position + len(lent.slots)
            blocks = [slot[: self._block_bytes] for slot in lent.slots]
            above = save.keys[position - 1] if position else save.parent
            job = space.submit_put(save.keys[position:stop], blocks, own="borrow", chained=True, parent=above, queue=lent)
            self._read_only = all(status.reason is Refusal.READ_ONLY for status in job.statuses)  # another engine has the folder
            if self._read_only:
                return
            position = stop

    def _copy(self, save: Save, start: int) -> _Lent | None:
        """Copies of the next blocks; ``None`` when the save was withdrawn, be it while they were copied: then nobody knows of what."""
        slots = self._slots(save, min(self._piece_blocks, len(save.keys) - start))
        lent = _Lent(self._memory, slots)
        with contextlib.ExitStack() as unused:
            unused.callback(lent.give_back)
            stream = self._stream_behind(save.computed)
            for slot, runs in zip(slots, save.sources[start:], strict=False):
                view_block(runs, writable=False, dtype="").copy_to_host([slot[: self._block_bytes]], stream)
            if not slots or not self._freed(save, start + len(slots)):
                return None
            unused.pop_all()
        return lent

    def _slots(self, save: Save, count: int) -> list[ByteArray]:
        """Memory for up to ``count`` blocks, for one at least; none when the save was withdrawn."""
        slots: list[ByteArray] = []
        while len(slots) < count and not save.withdrawn:
            slot = self._memory.acquire(timeout_s=0.0 if slots else ROOM_STEP_S)
            if slot is not None:
                slots.append(slot)
            elif slots:
                break
        return slots

    def _freed(self, save: Save, count: int) -> bool:
        """So many blocks from the front need vLLM's memory no longer; False when vLLM had it back before."""
        with self._changed.lock:
            if save.withdrawn:
                return False
            save.free_blocks = count
            self._moved_s = time.monotonic()
            self._changed.notify_all()
            return True

    def _stream_behind(self, computed: Any) -> Any:
        """A CUDA stream of this thread on which copies come behind the step that computes the blocks; ``None`` on a CPU."""
        if computed is None:
            return None
        import torch

        cuda: Any = torch.cuda
        if self._stream is None:
            self._stream = cuda.Stream(self._device)
        self._stream.wait_event(computed)
        return self._stream
