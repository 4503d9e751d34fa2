"""Files of the operating system: O_DIRECT from many threads, buffered where that is refused, always counted.

A request is cut into chunks that run on the device's threads, so that one large read or write keeps several
transfers in flight at the drive. A request that O_DIRECT cannot take (address, offset or length not aligned) goes
through a second, buffered descriptor of the same file; the kernel keeps both views of a file coherent. Whatever went
through the page cache is dropped from it afterwards: a store would otherwise fill the memory of its container.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress

from ..format.errors import DeviceError, StoreClosed, device_error
from .device import DeviceLock, FileStatus, HostBuffer, IoCounter, IoPath, OpenMode
from .os_calls import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    MEMORY_FILE_SYSTEMS,
    direct_alignment,
    fallocate,
    file_system_of,
    set_direct,
)
from .posix_lock import take_lock
from .threads import WorkerPool
from .transfer import ByteView, Chunk, Gather, PathCounters, Uses, byte_views, finished, is_aligned, rest_of, split
from .write_window import WriteWindow

ALIGNMENT_BYTES = 4096
THREADS_DEFAULT = 16
CHUNK_BYTES_DEFAULT = 4 << 20
IOV_MAX = 1024
"""Pieces of memory per system call (Linux)."""
NOW_BYTES_MAX = 16 << 20
"""A read of up to this much is one system call of the thread that asked: it alone keeps a drive's queue busy. More is cut up."""
CLOSE_TIMEOUT_S = 30.0
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_ZEROS = bytes(1 << 20)


class PosixDevice:
    """Files below any root of the local file system. See ``gds.device`` for the rules; paths are absolute.

    ``threads`` transfers of at most ``chunk_bytes`` run at the same time. ``direct=False`` uses the page cache throughout.
    """

    alignment = ALIGNMENT_BYTES
    accepts_device_memory = False

    def __init__(
        self,
        *,
        threads: int = THREADS_DEFAULT,
        chunk_bytes: int = CHUNK_BYTES_DEFAULT,
        direct: bool = True,
    ) -> None:
        if chunk_bytes < ALIGNMENT_BYTES or chunk_bytes % ALIGNMENT_BYTES:
            raise ValueError(f"chunk_bytes must be a multiple of {ALIGNMENT_BYTES}, not {chunk_bytes}")
        self.chunk_bytes = chunk_bytes
        self._direct = direct
        self._pool = WorkerPool("kvlode-posix", threads)
        self._counters = PathCounters()
        self.write_window = WriteWindow()
        self._host_path = IoPath.DIRECT if direct else IoPath.BUFFERED

    # --- files ------------------------------------------------------------------------------------------------

    def open(self, path: str, mode: OpenMode) -> PosixFile:
        flags = {"read": os.O_RDONLY, "write": os.O_RDWR, "create": os.O_RDWR | os.O_CREAT | os.O_EXCL}[mode]
        try:
            descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)  # a pipe in the place of a file must not hold us up
        except OSError as error:
            raise device_error(f"open for {mode}", path, error) from error
        if stat.S_IFMT(os.fstat(descriptor).st_mode) in (stat.S_IFIFO, stat.S_IFDIR):
            os.close(descriptor)
            raise DeviceError(f"open for {mode}", path, errno=errno.EINVAL, detail="not a regular file")
        try:
            os.set_blocking(descriptor, True)
            direct = self._direct and file_system_of(descriptor) not in MEMORY_FILE_SYSTEMS and set_direct(descriptor)
            return PosixFile(self, path, descriptor, writable=mode != "read", direct=direct)
        except OSError as error:
            os.close(descriptor)
            raise device_error(f"open for {mode}", path, error) from error

    def note_buffered(self) -> None:
        """A file that should use O_DIRECT cannot: ``paths`` says so from now on."""
        self._host_path = IoPath.BUFFERED

    def count(self, path: IoPath, size_bytes: int, *, write: bool) -> None:
        self._counters.add(path, size_bytes, write=write)

    def submit(self, run: Callable[[Chunk, bool, bool], int], chunk: Chunk, write: bool, direct: bool) -> Future[int]:
        return self._pool.submit(run, chunk, write, direct)

    # --- names ------------------------------------------------------------------------------------------------

    def status(self, path: str) -> FileStatus | None:
        try:
            return _file_status(os.stat(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise device_error("stat", path, error) from error

    def list_folder(self, path: str) -> list[str]:
        with _naming("list folder", path):
            return sorted(os.listdir(path))

    def make_folder(self, path: str) -> None:
        missing: list[str] = []
        folder = os.path.abspath(path)
        while not os.path.isdir(folder) and os.path.dirname(folder) != folder:
            missing.append(folder)
            folder = os.path.dirname(folder)
        for folder in reversed(missing):
            with _naming("make folder", folder), suppress(FileExistsError):
                os.mkdir(folder)
            self._sync_parent(folder)
        if not os.path.isdir(path):
            raise DeviceError("make folder", path, errno=errno.ENOTDIR, action="Remove the file that has this name.")

    def _sync_parent(self, path: str) -> None:
        try:
            self.sync_folder(os.path.dirname(path))
        except DeviceError as error:
            if error.errno not in (errno.EACCES, errno.EPERM):  # a parent that may be entered but not read
                raise

    def remove(self, path: str) -> None:
        with _naming("remove", path):
            os.unlink(path)

    def rename(self, source: str, target: str) -> None:
        with _naming(f"rename to {target}", source):
            os.replace(source, target)

    def sync_folder(self, path: str) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise device_error("open folder to sync", path, error) from error
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # network file systems without the operation
                raise device_error("sync folder", path, error) from error
        finally:
            os.close(descriptor)

    def free_bytes(self, path: str) -> int:
        with _naming("read the free space of", path):
            state = os.statvfs(path)
        return state.f_bavail * state.f_frsize

    def lock(self, path: str, *, shared: bool = False) -> DeviceLock | None:
        return take_lock(path, shared=shared)

    # --- what happened ----------------------------------------------------------------------------------------

    def counters(self) -> Mapping[IoPath, IoCounter]:
        return self._counters.snapshot()

    def paths(self) -> Mapping[str, IoPath]:
        """``host``: O_DIRECT until a file refused it. Memory of a GPU is not taken."""
        return {"host": self._host_path}

    def close(self) -> None:
        self._pool.shutdown(CLOSE_TIMEOUT_S)


class PosixFile:
    """One open file of a ``PosixDevice``. Do not call ``close`` from a future's callback: it waits for other futures."""

    def __init__(self, device: PosixDevice, path: str, descriptor: int, *, writable: bool, direct: bool) -> None:
        self.path = path
        self.direct = direct
        """Whether aligned requests use O_DIRECT; false from the start, or from the first transfer that was refused."""
        self._device = device
        self._writable = writable
        self._descriptor = descriptor
        self._buffered = -1 if direct else descriptor
        self._memory_alignment, self._offset_alignment = direct_alignment(descriptor) or (ALIGNMENT_BYTES, ALIGNMENT_BYTES)
        self._uses = Uses(path)
        self._lock = threading.Lock()
        self._cached_end = 0
        self._sync_error: OSError | None = None
        if not direct:
            device.note_buffered()

    def read(self, offset: int, buffers: Sequence[HostBuffer]) -> Future[int]:
        return self._start(offset, byte_views(buffers, writable=True), write=False)

    def read_now(self, offset: int, buffers: Sequence[HostBuffer]) -> int:
        """On the calling thread, unless it is a long one."""
        views = byte_views(buffers, writable=True)
        length = sum(view.nbytes for view in views)
        if offset < 0 or length > NOW_BYTES_MAX or len(views) > IOV_MAX:
            return self._start(offset, views, write=False).result()
        direct = self.direct and is_aligned(offset, views, self._memory_alignment, self._offset_alignment)
        self._uses.begin("read")
        try:
            with self._device.write_window.reading():
                return self._run(Chunk(offset, length, views), False, direct)
        finally:
            self._uses.end()

    def write(self, offset: int, buffers: Sequence[HostBuffer]) -> Future[int]:
        return self._start(offset, byte_views(buffers, writable=False), write=True)

    def sync(self) -> None:
        with self._uses.using("sync"):
            if self._sync_error is not None:  # the kernel reports a lost write once; a second fdatasync would claim success
                raise device_error("sync after a failed sync", self.path, self._sync_error)
            try:
                os.fdatasync(self._descriptor)
            except OSError as error:
                self._sync_error = error
                raise device_error("sync", self.path, error) from error
            self._drop_cached_writes()

    def preallocate(self, size_bytes: int) -> None:
        with self._uses.using("preallocate"):
            before = os.fstat(self._descriptor).st_size
            try:
                fallocate(self._descriptor, 0, 0, size_bytes)
            except OSError as error:
                if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                    os.ftruncate(self._descriptor, max(before, size_bytes))  # nothing is reserved: a later write may find no space
                    return
                os.ftruncate(self._descriptor, before)  # give back what was reserved before the space ran out
                raise

    def truncate(self, size_bytes: int) -> None:
        with self._uses.using("truncate"):
            os.ftruncate(self._descriptor, size_bytes)

    def punch(self, offset: int, length: int) -> None:
        with self._uses.using("punch"):
            try:
                fallocate(self._descriptor, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, offset, length)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                self._write_zeros(offset, length)

    def status(self) -> FileStatus:
        with self._uses.using("stat"):
            return _file_status(os.fstat(self._descriptor))

    def fileno(self) -> int:
        """The descriptor, for calls that need one; it is valid until ``close``."""
        return self._descriptor

    def close(self) -> None:
        if not self._uses.close():
            return
        descriptors = {self._descriptor, self._buffered} - {-1}
        self._descriptor = self._buffered = -1
        for descriptor in descriptors:
            os.close(descriptor)

    def __del__(self) -> None:
        # Pending operations refer to the file, so none is left when this runs.
        for descriptor in {getattr(self, "_descriptor", -1), getattr(self, "_buffered", -1)} - {-1}:
            with suppress(OSError):
                os.close(descriptor)

    # --- transfers --------------------------------------------------------------------------------------------

    def _start(self, offset: int, views: list[ByteView], *, write: bool) -> Future[int]:
        operation = "write" if write else "read"
        if offset < 0:
            raise ValueError(f"offset {offset} is negative")
        if not views:
            with self._uses.using(operation):
                return finished(0)
        direct = self.direct and is_aligned(offset, views, self._memory_alignment, self._offset_alignment)
        chunks = list(split(offset, views, self._device.chunk_bytes, IOV_MAX))
        gather = Gather(len(chunks), operation, self.path)
        if not write:  # from now on: its chunks come behind those of writes that wait for their turn
            self._device.write_window.begin_read(gather.future)
            gather.future.add_done_callback(self._device.write_window.end_read)
        for number, chunk in enumerate(chunks):
            try:
                self._uses.begin(operation)
                gather.add(self._submit(chunk, write, direct))
            except DeviceError as error:
                if number == 0:
                    raise
                gather.fail_unsubmitted(len(chunks) - number, error)
                break
        return gather.future

    def _submit(self, chunk: Chunk, write: bool, direct: bool) -> Future[int]:
        try:
            future = self._device.submit(self._run, chunk, write, direct)
        except StoreClosed as error:
            self._uses.end()
            raise DeviceError("submit", self.path, errno=errno.ESHUTDOWN, detail=error.what) from error
        future.add_done_callback(self._chunk_ended)
        return future

    def _chunk_ended(self, _: Future[int]) -> None:
        self._uses.end()

    def _run(self, chunk: Chunk, write: bool, direct: bool) -> int:
        """One chunk on a thread of the pool. Raises only errors without a traceback into buffers."""
        try:
            if direct:
                try:
                    return self._write_in_turn(chunk) if write else self._transfer(self._descriptor, chunk, False, IoPath.DIRECT)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    # The file system took the flag and refuses the transfer (a larger block size, a network mount).
                    self.direct = False
                    self._device.note_buffered()
            return self._transfer(self._buffered_descriptor(), chunk, write, IoPath.BUFFERED)
        except OSError as error:
            failure = device_error("write" if write else "read", self.path, error, offset=chunk.offset, length=chunk.length)
        raise failure

    def _write_in_turn(self, chunk: Chunk) -> int:
        window, written_bytes = self._device.write_window, 0
        for piece in split(chunk.offset, chunk.views, window.piece_bytes, IOV_MAX):
            with window.turn(piece.length):
                written_bytes += self._transfer(self._descriptor, piece, True, IoPath.DIRECT)
        return written_bytes

    def _transfer(self, descriptor: int, chunk: Chunk, write: bool, path: IoPath) -> int:
        """Repeat the system call until the chunk is through or the file ends."""
        views, done_bytes = chunk.views, 0
        while views:
            if write:
                moved = os.pwritev(descriptor, views, chunk.offset + done_bytes)
                if moved == 0:
                    raise OSError(errno.EIO, "the system wrote nothing and gave no reason")
            else:
                moved = os.preadv(descriptor, views, chunk.offset + done_bytes)
            done_bytes += moved
            if moved == 0 or done_bytes == chunk.length or (not write and path is IoPath.DIRECT and moved % self._offset_alignment):
                break  # through, or at the end of the file
            views = rest_of(views, moved)
        if path is IoPath.BUFFERED:
            self._leave_cache(descriptor, chunk.offset, done_bytes, write=write)
        self._device.count(path, done_bytes, write=write)
        return done_bytes

    def _buffered_descriptor(self) -> int:
        """The descriptor without O_DIRECT, opened when it is first needed (most files never need it)."""
        with self._lock:
            if self._buffered < 0:
                mode = os.O_RDWR if self._writable else os.O_RDONLY
                # Through /proc, so that a file that was renamed or removed meanwhile is still the same file.
                self._buffered = os.open(f"/proc/self/fd/{self._descriptor}", mode | os.O_CLOEXEC)
            return self._buffered

    def _write_zeros(self, offset: int, length: int) -> None:
        """What ``punch`` does where holes are not supported: the space stays used, the bytes are gone."""
        descriptor = self._buffered_descriptor()
        end = min(offset + length, os.fstat(descriptor).st_size)
        while offset < end:
            offset += os.pwrite(descriptor, _ZEROS[: end - offset], offset)

    def _leave_cache(self, descriptor: int, offset: int, length: int, *, write: bool) -> None:
        """Let the page cache go of a finished buffered transfer. Written pages only start on their way: ``sync`` drops them."""
        if write:
            with self._lock:
                self._cached_end = max(self._cached_end, offset + length)
        start = offset // _PAGE_BYTES * _PAGE_BYTES
        end = -(-(offset + length) // _PAGE_BYTES) * _PAGE_BYTES
        with suppress(OSError):  # advice: a file system may know none
            os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)

    def _drop_cached_writes(self) -> None:
        with self._lock:
            end, self._cached_end = self._cached_end, 0
        if end:
            with suppress(OSError):
                os.posix_fadvise(self._buffered, 0, end, os.POSIX_FADV_DONTNEED)


def _file_status(state: os.stat_result) -> FileStatus:
    return FileStatus(size_bytes=state.st_size, allocated_bytes=state.st_blocks * 512)


@contextmanager
def _naming(operation: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise device_error(operation, path, error) from error
