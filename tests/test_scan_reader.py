"""The reader that recovery walks a segment with: always the file's bytes, in few reads where records are close together."""

from __future__ import annotations

import numpy as np
import pytest

from kvlode import DeviceError
from kvlode.engine.reinsertion import SCAN_NEAR_BYTES, SCAN_WINDOW_BYTES, file_reader, scan_reader
from kvlode.gds.device import DeviceFile, IoBuffer
from kvlode.gds.memory import MemoryDevice
from kvlode.gds.wrapping import WrappingFile

PAGE = 4096
SIZE = 3 * SCAN_WINDOW_BYTES + 5 * PAGE


class Watched(WrappingFile):
    """Notes reads; those that cover a page of ``bad`` fail."""

    def __init__(self, inner: DeviceFile) -> None:
        super().__init__(inner)
        self.reads: list[tuple[int, int]] = []
        self.bad: set[int] = set()

    def read(self, offset: int, buffers: list[IoBuffer]):  # type: ignore[no-untyped-def, override]
        length = sum(buffer.nbytes for buffer in buffers)
        self.reads.append((offset, length))
        if any(offset <= page * PAGE < offset + length for page in self.bad):
            raise DeviceError("read", self.path, detail="a bad sector", offset=offset)
        return super().read(offset, buffers)


@pytest.fixture
def file(rng: np.random.Generator) -> Watched:
    device = MemoryDevice()
    device.make_folder("/d")
    made = device.open("/d/f", "create")
    made.write(0, [np.frombuffer(rng.bytes(SIZE), dtype=np.uint8)]).result()
    return Watched(made)


def test_any_walk_sees_the_bytes_of_the_file(file: Watched, rng: np.random.Generator) -> None:
    exact, scan = file_reader(file), scan_reader(file)
    offset = 0
    for step in rng.choice([PAGE, 2 * PAGE, 9 * PAGE, 40 * PAGE, -3 * PAGE], 400).tolist():
        length = int(rng.choice([PAGE, 3 * PAGE, 100 * PAGE]))
        assert bytes(scan(offset, length)) == bytes(exact(offset, length)), (offset, length)
        offset = (offset + step) % (SIZE + 2 * PAGE) // PAGE * PAGE


def test_close_records_cost_one_read_for_many(file: Watched) -> None:
    scan = scan_reader(file)
    for offset in range(0, SIZE, 2 * PAGE):
        scan(offset, PAGE)
    assert len(file.reads) <= 2 + SIZE // SCAN_WINDOW_BYTES + 1


def test_records_far_apart_cost_no_more_than_their_pages(file: Watched) -> None:
    scan = scan_reader(file)
    step = SCAN_NEAR_BYTES + PAGE
    for offset in range(0, SIZE, step):
        scan(offset, PAGE)
    assert file.reads == [(offset, PAGE) for offset in range(0, SIZE, step)]


def test_a_bad_sector_beside_a_record_does_not_hide_it(file: Watched) -> None:
    scan = scan_reader(file)
    file.bad = {5}
    expected = bytes(file_reader(file.inner)(2 * PAGE, PAGE))
    scan(0, PAGE)
    assert bytes(scan(2 * PAGE, PAGE)) == expected
    with pytest.raises(DeviceError, match="bad sector"):
        scan(5 * PAGE, PAGE)
