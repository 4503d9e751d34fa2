"""Page-locking host memory for CUDA, off the caller's thread.

Registering memory with CUDA pins and maps it: about a second per GiB, too long for a caller that wants to put a
block. So it happens on one background thread, and memory is usable meanwhile (copies from and to a GPU are only slower).
It is done in processes that already use CUDA: registering would otherwise create a CUDA context of some hundred
MiB in, for example, an engine's scheduler process.
"""

from __future__ import annotations

import sys
import threading
from concurrent.futures import Future
from typing import Any

from ..format.errors import StoreClosed
from .threads import WorkerPool

_REGISTER_PORTABLE = 1
"""cudaHostRegisterPortable: page-locked for the contexts of all GPUs."""

_guard = threading.Lock()
_leaked: list[PageLock] = []
_worker: WorkerPool | None = None


def cuda_runtime() -> Any:
    """``torch.cuda.cudart()`` when this process already uses CUDA through torch, else ``None``. Never initialises CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return torch.cuda.cudart()


class PageLock:
    """One registered range. ``keep`` (the owner of the memory) stays alive until the range is unregistered."""

    def __init__(self, runtime: Any, address: int, size_bytes: int, keep: object) -> None:
        self._runtime = runtime
        self._address = address
        self._size_bytes = size_bytes
        self._keep: object = keep
        self.locked = False
        """Whether CUDA took it; a refusal (memlock limit) leaves ordinary memory."""
        self._done: Future[None] | None = None

    def start(self, worker: WorkerPool) -> None:
        self._done = worker.submit(self._register)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the registration; whether the memory is page-locked."""
        if self._done is not None:
            self._done.result(timeout_s)
        return self.locked

    def release(self) -> None:
        """Unregister in the background, after a registration that is still under way."""
        try:
            _background().submit(self._unregister)
        except StoreClosed:
            # The interpreter is ending, or this is a forked child whose CUDA is unusable: the process's end unpins the memory,
            # which must not be unmapped before.
            _leaked.append(self)

    def _register(self) -> None:
        self.locked = int(self._runtime.cudaHostRegister(self._address, self._size_bytes, _REGISTER_PORTABLE)) == 0

    def _unregister(self) -> None:
        if self.locked:
            self._runtime.cudaHostUnregister(self._address)
            self.locked = False
        self._keep = None


def _background() -> WorkerPool:
    global _worker
    with _guard:
        if _worker is None:
            _worker = WorkerPool("kvlode-page-lock", 1)
        return _worker


def page_lock_in_background(address: int, size_bytes: int, keep: object) -> PageLock | None:
    """Start page-locking ``size_bytes`` at ``address``; ``None`` where CUDA is not in use in this process."""
    runtime = cuda_runtime()
    if runtime is None:
        return None
    lock = PageLock(runtime, address, size_bytes, keep)
    lock.start(_background())
    return lock
