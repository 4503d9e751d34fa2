"""The safetensors container, written and read one tensor at a time: an 8-byte length, a JSON header, the tensors' bytes."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ...format.errors import InvalidConfig
from ...format.namespace import ELEMENT_SIZES

HEADER_BYTES_MAX = 100_000_000
"""The limit that readers of the format set."""
METADATA = "__metadata__"
_LENGTH = struct.Struct("<Q")
_NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "bfloat16": "BF16", "float16": "F16", "int16": "I16", "uint16": "U16",
    "float32": "F32", "int32": "I32", "uint32": "U32", "float64": "F64", "int64": "I64", "uint64": "U64",
}  # fmt: skip
"""dtype names of the container by those of a namespace. Other types are written as bytes; the metadata has their name."""


def tensor_type(dtype: str, raw_length: int) -> tuple[str, list[int]]:
    """Name and shape (one dimension) under which a block of a namespace's dtype is written."""
    size_bytes = ELEMENT_SIZES.get(dtype, 1)
    if dtype in _NAMES and raw_length % size_bytes == 0:
        return _NAMES[dtype], [raw_length // size_bytes]
    return "U8", [raw_length]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of a header; ``start`` and ``end`` are offsets behind the header."""

    name: str
    start: int
    end: int


class TensorWriter:
    """Writes a new file beside its name and puts it in place at ``finish``. The header's room is kept free at the front.

    ``header_bytes`` is an upper bound of the header's JSON; what is left over becomes spaces, which the format allows.
    """

    def __init__(self, path: Path, header_bytes: int) -> None:
        if header_bytes > HEADER_BYTES_MAX:
            raise InvalidConfig(
                "too many blocks for one file",
                expected=f"a header of at most {HEADER_BYTES_MAX} bytes",
                actual=header_bytes,
                action="Export fewer keys.",
            )
        self._path = path
        self._temporary = path.with_name(path.name + ".part")
        self._header_bytes = -(-header_bytes // 8) * 8
        self._entries: dict[str, Any] = {}
        self._position = 0
        self._file: BinaryIO = open(self._temporary, "xb")  # noqa: SIM115 - closed by finish or abandon
        self._file.seek(_LENGTH.size + self._header_bytes)

    def add(self, name: str, dtype: str, shape: list[int], data: memoryview) -> None:
        """Append a tensor."""
        self._file.write(data)
        self._entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [self._position, self._position + data.nbytes]}
        self._position += data.nbytes

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header, sync, and give the file its name."""
        header = json.dumps({METADATA: dict(metadata)} | self._entries).encode()
        if len(header) > self._header_bytes:
            raise ValueError(f"header of {len(header)} bytes, {self._header_bytes} were kept free")
        self._file.seek(0)
        self._file.write(_LENGTH.pack(self._header_bytes) + header.ljust(self._header_bytes))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.rename(self._temporary, self._path)

    def abandon(self) -> None:
        """Remove what was written; after ``finish`` nothing happens."""
        if not self._file.closed:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


def read_header(file: BinaryIO, where: object) -> tuple[dict[str, str], list[Tensor], int]:
    """Metadata, tensors, and where their bytes begin. Every length is bounded by the file. Raises ``InvalidConfig``."""
    size_bytes = os.fstat(file.fileno()).st_size
    length_bytes = file.read(_LENGTH.size)
    length = _LENGTH.unpack(length_bytes)[0] if len(length_bytes) == _LENGTH.size else 0
    if not 2 <= length <= min(HEADER_BYTES_MAX, size_bytes - _LENGTH.size):
        raise InvalidConfig("this is not a safetensors file", where=where, expected="the length of a header inside the file", actual=length)
    start = _LENGTH.size + length
    try:
        header = json.loads(file.read(length).decode())
        metadata = header.pop(METADATA, {})
        tensors = [Tensor(str(name), *map(int, entry["data_offsets"])) for name, entry in header.items()]
        good = all(0 <= tensor.start <= tensor.end <= size_bytes - start for tensor in tensors) and isinstance(metadata, dict)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidConfig("this is not a safetensors file", where=where, expected="a JSON header", actual=str(error)[:200]) from None
    if not good:
        raise InvalidConfig(
            "this safetensors file is cut or damaged", where=where, expected=f"tensors inside {size_bytes} bytes", actual="others"
        )
    return {str(name): str(value) for name, value in metadata.items()}, tensors, start
