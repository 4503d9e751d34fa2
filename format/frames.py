"""zstd frames: a nearly pure entropy coder on the way in, and on the way out nothing that was not asked for.

Contexts belong to the calling thread; the work runs outside the GIL. Any number of threads may encode and decode at once.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import zstandard

from .checksum import Buffer
from .errors import CorruptRecord
from .planes import Bytes

FRAME_WINDOW_BYTES_MIN = 1024
"""Smallest window a zstd frame can declare."""

_WINDOW_LOG = 15
"""Blocks of 32 KiB, each with a Huffman code of its own: the heads and layers of a KV cache differ. Smaller ones saved a little
more and took longer both ways; with one code for 128 KiB a stripe is 1.5 % larger."""
_HASH_LOG, _MIN_MATCH, _STRATEGY = 6, 7, zstandard.STRATEGY_FAST
"""Hardly a search for matches: on the byte planes of a KV cache more of it is slower and saves less."""
_STEP = 64
"""Repeated content is looked for at every so-manieth place only. zstd then leaves literals as they are, unless told otherwise ..."""
_LITERALS = 1002
"""... by this parameter of libzstd (``ZSTD_c_literalCompressionMode``). Python's modules pass it on but have no name for it, ``zstandard``
does not know it."""
_LITERALS_ENCODED = 1


def _zstd_module() -> Any:
    """The module of Python 3.14 or its backport; ``None`` when neither is there."""
    for name in ("compression.zstd", "backports.zstd"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None


def _sparse_compressor(zstd: Any) -> Callable[[Buffer], bytes]:
    """A context that encodes literals and hardly looks for anything else: half as fast again as ``_thorough_compressor``."""
    parameter = zstd.CompressionParameter
    options = {
        parameter.strategy: int(_STRATEGY),
        parameter.window_log: _WINDOW_LOG,
        parameter.hash_log: _HASH_LOG,
        parameter.min_match: _MIN_MATCH,
        parameter.target_length: _STEP,
        parameter.content_size_flag: 1,
        parameter.checksum_flag: 0,
        parameter.dict_id_flag: 0,
        _LITERALS: _LITERALS_ENCODED,
    }
    compressor = zstd.ZstdCompressor(options=options)
    return lambda plain: cast(bytes, compressor.compress(plain, compressor.FLUSH_FRAME))


def _thorough_compressor() -> Callable[[Buffer], bytes]:
    """What ``zstandard`` can be told: it looks for matches at every other place as soon as it has met one."""
    parameters = zstandard.ZstdCompressionParameters(
        strategy=_STRATEGY,
        window_log=_WINDOW_LOG,
        hash_log=_HASH_LOG,
        min_match=_MIN_MATCH,
        target_length=0,
        write_content_size=1,
        write_checksum=0,
        write_dict_id=0,
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress


class _Contexts(threading.local):
    """zstd contexts of one thread."""

    def __init__(self) -> None:
        self.compress = _thorough_compressor() if _zstd is None else _sparse_compressor(_zstd)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _zstd_module()
_contexts = _Contexts()


def encode_frame(plain: Bytes) -> bytes:
    """The zstd frame of ``plain`` (1-D contiguous), whether it is shorter or not."""
    return _contexts.compress(plain.data)


def decode_frame(frame: Bytes, plain_bytes: int, *, where: object = None) -> Bytes:
    """What one frame holds, if it is exactly ``plain_bytes``: new, read-only memory.

    Raises ``CorruptRecord`` for anything but exactly one standard frame (no second one, no other bytes behind it) that declares this
    length, no dictionary, and no window beyond it; the header is looked at before memory is spent.
    """
    actual: object = "another header"
    try:
        if _header_fits(frame, plain_bytes):
            plain = _contexts.decompressor.decompress(frame.data, allow_extra_data=False)
            if len(plain) == plain_bytes:
                return np.frombuffer(plain, dtype=np.uint8)
            actual = f"{len(plain)} bytes"  # a skippable frame passes for one with content until it is decoded
    except zstandard.ZstdError as error:
        actual = error
    raise CorruptRecord("stripe-frame", where=where, expected=f"one zstd frame of {plain_bytes} bytes", actual=str(actual))


def _header_fits(frame: Bytes, plain_bytes: int) -> bool:
    parameters = zstandard.get_frame_parameters(frame.data)
    window_bytes_max = max(plain_bytes, FRAME_WINDOW_BYTES_MIN)
    return parameters.content_size == plain_bytes and not parameters.dict_id and parameters.window_size <= window_bytes_max
