"""Touching a large memory before it is needed, on a thread of its own.

The first write to fresh memory waits for the kernel to find and clear a page, and on a virtual machine often for its host
to do the same: measured between 0.5 and 8 GB/s, where a copy into touched memory runs at 7 to 12 GB/s. A store's buffer is
therefore populated from its start on while the first blocks arrive.
"""

from __future__ import annotations

import ctypes
import os
import threading

from .buffers import ByteArray, address_of

MADV_POPULATE_WRITE = 23
"""Linux 5.14: fault pages in for writing; what they hold stays as it is."""
STEP_BYTES = 4 << 20
"""One call: short enough to stop promptly, and to hold up nobody who maps memory meanwhile."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int


class Prefault:
    """Populates a page-aligned array from its first byte to its last; the interpreter lock is free meanwhile.

    Where the kernel does not know the call, or has no memory to give, nothing happens: the first writes are slower then.
    The array may be used by anybody at any time.
    """

    def __init__(self, array: ByteArray, *, step_bytes: int = STEP_BYTES) -> None:
        self.populated_bytes = 0
        self._array = array
        self._step_bytes = step_bytes
        self._stopping = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvlode-prefault", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the work is over, done or given up; False when the deadline passed."""
        return self._ended.wait(timeout_s)

    def stop(self, timeout_s: float | None = None) -> bool:
        """Give up what is not done and end the thread; False when it did not end in time."""
        self._stopping = True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            start, total_bytes = address_of(self._array), self._array.size
            while self.populated_bytes < total_bytes and not self._stopping:
                length = min(self._step_bytes, total_bytes - self.populated_bytes)
                if not _populate(start + self.populated_bytes, length):
                    return
                self.populated_bytes += length
        finally:
            self._ended.set()


def _populate(address: int, length: int) -> bool:
    """One call of the kernel; False when it refused."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    first = address - address % page_bytes
    return bool(_libc.madvise(first, address + length - first, MADV_POPULATE_WRITE) == 0)
