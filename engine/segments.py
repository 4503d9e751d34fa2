"""The segments of a store as the engine knows them: which exist, how large, who reads them, which are being freed."""

from __future__ import annotations

import contextlib
import errno
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from ..format.errors import DeviceError
from ..format.layout import SEGMENTS_FOLDER, segment_name
from ..gds.device import Device, DeviceFile
from ..gds.monitor import Monitor


@dataclass(slots=True)
class Segment:
    """One segment file. ``size_bytes`` counts against the capacity from creation (preallocated) to removal."""

    segment_id: int
    size_bytes: int
    sealed: bool
    retired_at_s: float | None = None
    """Monotonic time at which its entries had left the index; the file follows after the grace."""
    any_order: bool = False
    """Whether its file may go before those of older segments: it holds no deletes."""
    pins: int = 0
    removing: bool = False


class SegmentTable:
    """Thread-safe table of segments and a bounded cache of their open files.

    A reader pins the segment for as long as it reads; a retired segment's file is removed only unpinned. Freed
    segments that hold deletes leave only as the oldest, the folder synced in between, so that a tombstone never
    disappears before the records that it kills.
    """

    def __init__(self, device: Device, store_path: str, *, open_files_max: int, learns: bool = False) -> None:
        self.device = device
        self.folder = f"{store_path}/{SEGMENTS_FOLDER}"
        self._changed = Monitor()
        self._lock = self._changed.lock
        self._segments: dict[int, Segment] = {}
        self._files: OrderedDict[int, DeviceFile] = OrderedDict()
        self._open_files_max = open_files_max
        self._learns = learns  # a follower meets segments first in the index

    def path(self, segment_id: int) -> str:
        return f"{self.folder}/{segment_name(segment_id)}"

    def add(self, segment: Segment) -> None:
        with self._lock:
            self._segments[segment.segment_id] = segment

    def resize(self, segment_id: int, size_bytes: int, *, sealed: bool) -> None:
        with self._lock:
            segment = self._segments.get(segment_id)
            if segment is not None:  # else its file vanished from under us
                segment.size_bytes, segment.sealed = size_bytes, sealed

    def get(self, segment_id: int) -> Segment | None:
        with self._lock:
            return self._segments.get(segment_id)

    def all(self) -> list[Segment]:
        """Every segment, oldest first."""
        with self._lock:
            return [self._segments[segment_id] for segment_id in sorted(self._segments)]

    def total_bytes(self) -> int:
        with self._lock:
            return sum(segment.size_bytes for segment in self._segments.values())

    def oldest_live_id(self) -> int:
        """Smallest id that is not being freed; 0 when there is none."""
        with self._lock:
            return min((s.segment_id for s in self._segments.values() if s.retired_at_s is None), default=0)

    def retire(self, segment_id: int, now_s: float, *, any_order: bool = False) -> None:
        with self._lock:
            segment = self._segments[segment_id]
            segment.retired_at_s, segment.any_order = now_s, any_order

    def claim_removable(self, now_s: float, grace_s: float) -> int | None:
        """A retired segment that is unpinned, past its grace and next in turn; nobody can pin it from then on."""
        with self._lock:
            for position, segment_id in enumerate(sorted(self._segments)):
                segment = self._segments[segment_id]
                in_turn = position == 0 or segment.any_order
                if segment.retired_at_s is None or not in_turn or segment.pins or now_s < segment.retired_at_s + grace_s:
                    continue
                segment.removing = True
                return segment_id
            return None

    def remove(self, segment_id: int) -> None:
        """Unlink a claimed segment and make that durable. Raises ``DeviceError``; it can be tried again."""
        with self._lock:
            file = self._files.pop(segment_id, None)
        if file is not None:
            file.close()
        try:
            self.device.remove(self.path(segment_id))
        except DeviceError as error:
            if error.errno != errno.ENOENT:  # someone removed it for us: the space is free all the same
                raise
        self.device.sync_folder(self.folder)
        with self._lock:
            self._segments.pop(segment_id, None)
            self._changed.notify_all()

    def forget(self, segment_id: int) -> None:
        """A file that vanished from under us: stop counting it."""
        with self._lock:
            self._segments.pop(segment_id, None)

    def pin(self, segment_id: int) -> DeviceFile | None:
        """The open file of a segment, which stays until ``unpin``; ``None`` when the segment is gone (nothing to unpin).

        Raises ``DeviceError`` when the file cannot be opened for another reason.
        """
        with self._lock:
            segment = self._segments.get(segment_id)
            if segment is None:
                if not self._learns:
                    return None
                segment = self._segments[segment_id] = Segment(segment_id, 0, sealed=False)
            if segment.removing:
                return None
            segment.pins += 1
            file = self._files.get(segment_id)
            if file is not None:
                self._files.move_to_end(segment_id)
                return file
        try:
            opened = self.device.open(self.path(segment_id), "read")
        except DeviceError as error:
            self.unpin(segment_id)
            if error.errno == errno.ENOENT:
                self.forget(segment_id)
                return None
            raise
        except BaseException:
            self.unpin(segment_id)
            raise
        return self._keep_open(segment_id, opened)

    def unpin(self, segment_id: int) -> None:
        with self._lock:
            segment = self._segments.get(segment_id)
            if segment is not None:
                segment.pins -= 1
                self._changed.notify_all()

    def wait_readers(self, segment_id: int, own_pins: int, timeout_s: float) -> bool:
        """Wait until nobody but the caller, who has ``own_pins``, reads a segment; False when the time passed first."""

        def alone() -> bool:
            segment = self._segments.get(segment_id)
            return segment is None or segment.pins <= own_pins

        return self._changed.wait_for(alone, timeout_s)

    def wait_gone(self, segment_id: int, timeout_s: float | None) -> bool:
        """Wait until a segment whose removal has begun is no more; False when the time passed first."""
        return self._changed.wait_for(lambda: segment_id not in self._segments, timeout_s)

    @contextlib.contextmanager
    def reading(self, segment_id: int) -> Iterator[DeviceFile | None]:
        """``pin`` for the length of a ``with``."""
        file = self.pin(segment_id)
        try:
            yield file
        finally:
            if file is not None:
                self.unpin(segment_id)

    def _keep_open(self, segment_id: int, opened: DeviceFile) -> DeviceFile:
        closing: list[DeviceFile] = []
        with self._lock:
            file = self._files.get(segment_id)
            if file is None:
                file = self._files[segment_id] = opened
            else:
                closing.append(opened)
            closing += self._pop_surplus_files()
        for surplus in closing:
            surplus.close()
        return file

    def _pop_surplus_files(self) -> list[DeviceFile]:
        surplus: list[DeviceFile] = []
        for segment_id in list(self._files):
            if len(self._files) <= self._open_files_max:
                break
            segment = self._segments.get(segment_id)
            if segment is None or segment.pins == 0:
                surplus.append(self._files.pop(segment_id))
        return surplus

    def close_files(self, *, unpinned_only: bool = False) -> None:
        """Close cached files; a follower does so at each catch-up, since its open files hold the space of removed segments."""
        with self._lock:
            chosen = [i for i in self._files if not unpinned_only or i not in self._segments or self._segments[i].pins == 0]
            files = [self._files.pop(segment_id) for segment_id in chosen]
        for file in files:
            file.close()
