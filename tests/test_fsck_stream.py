"""What a check's stream hands out where a drive fails and the file is shorter than it was."""

from __future__ import annotations

from device_conformance import noise
from kvlode.format.errors import DeviceError
from kvlode.gds.buffers import ByteArray
from kvlode.gds.faulty import Fault, FaultyDevice
from kvlode.gds.memory import MemoryDevice
from kvlode.tools.fsck.stream import RETRY_BYTES, WINDOW_BYTES, ByteStream, Windows


def test_nothing_behind_the_end_is_handed_out_after_an_error_in_the_same_window() -> None:
    plain = MemoryDevice()
    plain.make_folder("/x")
    data = noise(1, WINDOW_BYTES + 3 * RETRY_BYTES)
    file = plain.open("/x/a", "create")
    file.write(0, [data]).result()
    file.close()
    errors: list[DeviceError] = []
    windows = Windows(1)
    with_faults = FaultyDevice(plain, [Fault("read", nth=2)])
    stream = ByteStream(with_faults.open("/x/a", "read"), 0, WINDOW_BYTES + 9 * RETRY_BYTES, windows, errors.append)
    first: ByteArray = stream.take(WINDOW_BYTES).data
    assert first.size == WINDOW_BYTES and not errors
    rest = stream.take(9 * RETRY_BYTES)
    assert len(errors) == 1
    assert rest.data.tobytes() == data[WINDOW_BYTES:].tobytes()
    stream.close()
    windows.close()
