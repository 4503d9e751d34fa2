"""Files through cuFile (kvikio): GPUDirect Storage between drive and GPU memory, or cuFile's compat mode where GDS is missing.

Metadata, durability and locks are those of ``PosixDevice``, and so are transfers of host memory (kvikio would do the
same pread and pwrite with fewer options). GPU memory goes through kvikio. A byte counts as GDS only when that was
proven for its file system (``gds.gds_proof``): cuFile may be configured to copy through host memory without saying so.

This project has not run the GPU paths yet; see ``docs/gpu.md``. kvikio's compat path is tested, on host memory.

GPU memory must be ready when a transfer is issued (synchronise the stream that wrote it, or use ``read_on_stream`` and
``write_on_stream``, which a CUDA stream orders); a future that is done means that the data has arrived.
"""

from __future__ import annotations

import errno
import math
import os
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import kvikio
import kvikio.cufile_driver
import kvikio.defaults

from ..format.errors import DeviceError, PathUnavailable, StoreClosed, device_error
from .device import DeviceLock, FileStatus, IoBuffer, IoCounter, IoPath, OpenMode
from .gds_proof import why_not_gds
from .posix import ALIGNMENT_BYTES, CHUNK_BYTES_DEFAULT, CLOSE_TIMEOUT_S, THREADS_DEFAULT, PosixDevice, PosixFile
from .threads import WorkerPool
from .transfer import Gather, PathCounters, Uses, byte_views, finished, split

_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOENT, errno.EACCES, errno.EMFILE, errno.EINVAL)
_defaults_guard = threading.Lock()
"""kvikio's settings belong to the process: they are changed by one thread at a time."""


@dataclass(frozen=True, slots=True)
class DeviceRange:
    """A part of a GPU buffer as kvikio takes it; keeps the whole buffer alive."""

    address: int
    nbytes: int
    owner: object

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3, "strides": None, "stream": None}


@dataclass(frozen=True, slots=True)
class _Piece:
    """One call of kvikio: one piece of memory, at most a chunk long, so that kvikio makes one task of it."""

    memory: Any
    nbytes: int
    offset: int


def is_device_buffer(buffer: object) -> bool:
    """Whether a buffer lies in GPU memory."""
    return hasattr(buffer, "__cuda_array_interface__")


def device_range(buffer: Any) -> DeviceRange:
    """All bytes of a GPU buffer. Raises ``ValueError`` when they are not contiguous."""
    interface = buffer.__cuda_array_interface__
    shape, strides = interface["shape"], interface.get("strides")
    item_bytes = int(re.sub(r"\D", "", interface["typestr"]) or 1)
    if strides is not None:
        expected = item_bytes
        for length, stride in zip(reversed(shape), reversed(strides), strict=True):
            if length != 1 and stride != expected:
                raise ValueError(f"a GPU buffer of shape {shape} and strides {strides} is not contiguous")
            expected *= length
    return DeviceRange(int(interface["data"][0]), item_bytes * math.prod(shape), buffer)


class CuFileDevice:
    """See the module. With ``require_gds`` a file whose bytes do not provably travel by GDS is refused.

    ``host`` says who moves host memory: ``posix``, or ``kvikio`` (this is how its compat path is tested without a GPU).
    """

    alignment = ALIGNMENT_BYTES

    def __init__(
        self,
        *,
        threads: int = THREADS_DEFAULT,
        chunk_bytes: int = CHUNK_BYTES_DEFAULT,
        require_gds: bool = False,
        host: Literal["posix", "kvikio"] = "posix",
    ) -> None:
        _configure_kvikio(threads)
        self.chunk_bytes = chunk_bytes
        self.host_through_kvikio = host == "kvikio"
        self.accepts_device_memory = not self.host_through_kvikio
        self._require_gds = require_gds
        self._posix = PosixDevice(threads=threads, chunk_bytes=chunk_bytes)
        self._pool = WorkerPool("kvlode-cufile", threads)
        self._counters = PathCounters()
        self._guard = threading.Lock()
        self._why_not_gds: dict[int, str] = {}
        self._device_path = IoPath.GDS if require_gds else IoPath.CUFILE_COMPAT

    # --- files ------------------------------------------------------------------------------------------------

    def open(self, path: str, mode: OpenMode) -> CuFileFile:
        return CuFileFile(self, self._posix.open(path, mode), writable=mode != "read")

    def register(self, file: PosixFile, *, writable: bool) -> tuple[Any, IoPath]:
        """kvikio's handle for an open file, and the path that its bytes take."""
        reason = self._reason(os.fstat(file.fileno()).st_dev, os.path.dirname(file.path))
        if reason and self._require_gds:
            raise _gds_required(file.path, reason)
        path = IoPath.CUFILE_COMPAT if reason else IoPath.GDS
        try:
            handle = _open_handle(file, writable=writable, compat_mode=kvikio.CompatMode.ON if reason else kvikio.CompatMode.OFF)
        except RuntimeError as error:
            raise device_error("register with cuFile", file.path, _os_error(error)) from error
        self._device_path = path
        return handle, path

    def prove_gds(self, folder: str) -> None:
        """Move a megabyte between GPU and a temporary file in the folder; ``PathUnavailable`` when that was not by GDS."""
        reason = self._reason(os.stat(folder).st_dev, folder)
        if reason:
            raise _gds_required(folder, reason)

    def _reason(self, file_system: int, folder: str) -> str:
        """Why bytes do not travel by GDS, found out once per file system."""
        with self._guard:
            if file_system not in self._why_not_gds:
                self._why_not_gds[file_system] = why_not_gds(folder)
            return self._why_not_gds[file_system]

    def submit(self, file: CuFileFile, piece: _Piece, *, write: bool) -> Future[int]:
        run = file.run_write if write else file.run_read
        try:
            return self._pool.submit(run, piece)
        except StoreClosed as error:
            raise DeviceError("submit", file.path, errno=errno.ESHUTDOWN, detail=error.what) from error

    def count(self, path: IoPath, size_bytes: int, *, write: bool) -> None:
        self._counters.add(path, size_bytes, write=write)

    # --- names ------------------------------------------------------------------------------------------------

    def status(self, path: str) -> FileStatus | None:
        return self._posix.status(path)

    def list_folder(self, path: str) -> list[str]:
        return self._posix.list_folder(path)

    def make_folder(self, path: str) -> None:
        self._posix.make_folder(path)

    def remove(self, path: str) -> None:
        self._posix.remove(path)

    def rename(self, source: str, target: str) -> None:
        self._posix.rename(source, target)

    def sync_folder(self, path: str) -> None:
        self._posix.sync_folder(path)

    def free_bytes(self, path: str) -> int:
        return self._posix.free_bytes(path)

    def lock(self, path: str, *, shared: bool = False) -> DeviceLock | None:
        return self._posix.lock(path, shared=shared)

    # --- what happened ----------------------------------------------------------------------------------------

    def counters(self) -> Mapping[IoPath, IoCounter]:
        return {**self._posix.counters(), **self._counters.snapshot()}

    def paths(self) -> Mapping[str, IoPath]:
        """``device``: GDS once a file system has proven it, else compat; decided at a file's first transfer of GPU memory."""
        if self.host_through_kvikio:
            return {"host": self._device_path}
        return {**self._posix.paths(), "device": self._device_path}

    def close(self) -> None:
        self._pool.shutdown(CLOSE_TIMEOUT_S)
        self._posix.close()


class CuFileFile:
    """One open file of a ``CuFileDevice``. It is registered with cuFile at its first transfer of GPU memory."""

    def __init__(self, device: CuFileDevice, file: PosixFile, *, writable: bool) -> None:
        self.path = file.path
        self._device = device
        self._file = file
        self._writable = writable
        self._uses = Uses(file.path)
        self._guard = threading.Lock()
        self._handle: Any = None
        self._io_path = IoPath.CUFILE_COMPAT

    def read(self, offset: int, buffers: Sequence[IoBuffer]) -> Future[int]:
        return self._start(offset, buffers, write=False)

    def read_now(self, offset: int, buffers: Sequence[IoBuffer]) -> int:
        return self.read(offset, buffers).result()

    def write(self, offset: int, buffers: Sequence[IoBuffer]) -> Future[int]:
        return self._start(offset, buffers, write=True)

    def read_on_stream(self, offset: int, buffer: IoBuffer, stream: int) -> StreamTransfer:
        """Read into GPU memory in the order of a CUDA stream (its raw handle): after what was issued there before."""
        return self._on_stream(offset, buffer, stream, write=False)

    def write_on_stream(self, offset: int, buffer: IoBuffer, stream: int) -> StreamTransfer:
        """Write GPU memory once the work issued to a CUDA stream before is done."""
        return self._on_stream(offset, buffer, stream, write=True)

    def sync(self) -> None:
        self._file.sync()

    def preallocate(self, size_bytes: int) -> None:
        self._file.preallocate(size_bytes)

    def truncate(self, size_bytes: int) -> None:
        self._file.truncate(size_bytes)

    def punch(self, offset: int, length: int) -> None:
        self._file.punch(offset, length)

    def status(self) -> FileStatus:
        return self._file.status()

    def close(self) -> None:
        if not self._uses.close():
            return
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()
        self._file.close()

    # --- transfers --------------------------------------------------------------------------------------------

    def _start(self, offset: int, buffers: Sequence[IoBuffer], *, write: bool) -> Future[int]:
        if not self._device.host_through_kvikio and not any(is_device_buffer(buffer) for buffer in buffers):
            return self._file.write(offset, buffers) if write else self._file.read(offset, buffers)
        if offset < 0:
            raise ValueError(f"offset {offset} is negative")
        operation = "write" if write else "read"
        requests = self._requests(offset, buffers, write=write)
        if not requests:
            with self._uses.using(operation):
                return finished(0)
        self._uses.begin(operation)
        gather = Gather(len(requests), operation, self.path)
        gather.future.add_done_callback(lambda _: self._uses.end())
        for number, request in enumerate(requests):
            try:
                gather.add(self._submit(request, write=write))
            except DeviceError as error:
                gather.fail_unsubmitted(len(requests) - number, error)
                break
        return gather.future

    def _requests(self, offset: int, buffers: Sequence[IoBuffer], *, write: bool) -> list[_Piece]:
        """The request as calls of kvikio and, for host memory, of the POSIX file."""
        pieces: list[_Piece] = []
        for buffer in buffers:
            if is_device_buffer(buffer):
                whole = device_range(buffer)
                for start in range(0, whole.nbytes, self._device.chunk_bytes):
                    nbytes = min(self._device.chunk_bytes, whole.nbytes - start)
                    pieces.append(_Piece(DeviceRange(whole.address + start, nbytes, whole.owner), nbytes, offset + start))
                offset += whole.nbytes
                continue
            for chunk in split(offset, byte_views([buffer], writable=not write), self._device.chunk_bytes, views_max=1):
                pieces.append(_Piece(chunk.views[0], chunk.length, chunk.offset))
                offset += chunk.length
        return pieces

    def _submit(self, piece: _Piece, *, write: bool) -> Future[int]:
        if isinstance(piece.memory, memoryview) and not self._device.host_through_kvikio:
            request = self._file.write if write else self._file.read
            return request(piece.offset, [piece.memory])
        return self._device.submit(self, piece, write=write)

    def run_read(self, piece: _Piece) -> int:
        """On a thread of the device: read one piece, less at the end of the file (kvikio fails there)."""
        nbytes = min(piece.nbytes, max(0, self._file.status().size_bytes - piece.offset))
        return self._run("read", piece, nbytes) if nbytes else 0

    def run_write(self, piece: _Piece) -> int:
        """On a thread of the device: write one piece."""
        return self._run("write", piece, piece.nbytes)

    def _run(self, operation: str, piece: _Piece, nbytes: int) -> int:
        handle = self._kvikio_handle()
        transfer = handle.pwrite if operation == "write" else handle.pread
        try:
            done = int(transfer(piece.memory, nbytes, piece.offset, nbytes).get())
        except RuntimeError as error:
            failure = device_error(operation, self.path, _os_error(error), offset=piece.offset, length=nbytes)
        else:
            self._device.count(self._io_path, done, write=operation == "write")
            return done
        raise failure  # here, so that it carries no reference to the buffer

    def _kvikio_handle(self) -> Any:
        with self._guard:
            if self._handle is None:
                self._handle, self._io_path = self._device.register(self._file, writable=self._writable)
            return self._handle

    def _on_stream(self, offset: int, buffer: IoBuffer, stream: int, *, write: bool) -> StreamTransfer:
        operation = "write on a stream" if write else "read on a stream"
        memory = device_range(buffer)
        self._uses.begin(operation)
        try:
            handle = self._kvikio_handle()
            issue = handle.raw_write_async if write else handle.raw_read_async
            future = issue(memory, stream, memory.nbytes, offset)
        except RuntimeError as error:
            self._uses.end()
            raise device_error(operation, self.path, _os_error(error), offset=offset, length=memory.nbytes) from error
        except BaseException:
            self._uses.end()
            raise

        def ended(done: int) -> None:
            self._device.count(self._io_path, max(0, done), write=write)
            self._uses.end()

        return StreamTransfer(future, memory, ended, operation, self.path)


class StreamTransfer:
    """A transfer in a CUDA stream. It must be waited for before its file is closed and its memory reused."""

    def __init__(self, future: Any, memory: DeviceRange, ended: Any, operation: str, path: str) -> None:
        self._future = future
        self._memory: DeviceRange | None = memory
        self._ended = ended
        self._operation = operation
        self._path = path
        self._done = 0

    def wait(self) -> int:
        """Synchronise the stream; the number of bytes moved. Raises ``DeviceError``. May be called again."""
        if self._memory is None:
            return self._done
        done = -1
        try:
            done = int(self._future.check_bytes_done())
        except RuntimeError as error:
            raise device_error(self._operation, self._path, _os_error(error)) from error
        finally:
            self._memory = None
            self._ended(done)
        self._done = done
        return done


def _configure_kvikio(threads: int) -> None:
    """Threads for our requests, and no page cache where kvikio copies through host memory."""
    with _defaults_guard:
        if kvikio.defaults.get("num_threads") < threads:
            kvikio.defaults.set("num_threads", threads)
        kvikio.defaults.set({"auto_direct_io_read": True, "auto_direct_io_write": True})


def _open_handle(file: PosixFile, *, writable: bool, compat_mode: Any) -> Any:
    # Through /proc, so that a file that was renamed or removed meanwhile is still the same file.
    name = f"/proc/self/fd/{file.fileno()}"
    with _defaults_guard, kvikio.defaults.set("compat_mode", compat_mode):
        return kvikio.CuFile(name, "r+" if writable else "r")


def _os_error(error: RuntimeError) -> OSError:
    """kvikio's errors are texts; the code is found by the system's own words."""
    text = str(error)
    for code in _ERRNOS:
        if os.strerror(code) in text:
            return OSError(code, text)
    if "Operation not permitted" in text:  # kvikio's words for EBADF: the file is not open for this
        return OSError(errno.EBADF, text)
    return OSError(errno.EIO, text)


def _gds_required(where: str, reason: str) -> PathUnavailable:
    return PathUnavailable(
        "GPUDirect Storage was required and is not what bytes here would take",
        where=where,
        expected="transfers between drive and GPU without host memory",
        actual=reason,
        action="See docs/gpu.md, or open with gds='auto'.",
    )
