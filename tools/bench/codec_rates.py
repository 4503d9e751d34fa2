"""What the codec does of some blocks when nothing else runs: on one core, and on all cores at once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ...format.checksum import xxh3_64
from ...format.codec import EncodedStripe, choose_codec, decode_stripe, encode_stripe, encoded_bytes_max
from ...format.layout import STRIPE_BYTES_DEFAULT, stripe_bytes_for
from ...format.stripe import StripeEntry
from ...gds.buffers import ByteArray, aligned_array
from .workload import Blocks


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


class CodecRates:
    """The distinct ones of ``blocks``, cut into stripes as the store cuts them, with the codec that sampling chooses for them.

    ``threads`` work at once, each on a block of its own. The rates are GB/s of raw bytes.
    """

    def __init__(self, blocks: Blocks, *, threads: int) -> None:
        self.raw_bytes = blocks.memory.size
        self.threads = threads
        self._element_bytes = blocks.namespace.element_size
        self._stripe_bytes = stripe_bytes_for(blocks.block_bytes, blocks.namespace.layer_bytes or STRIPE_BYTES_DEFAULT)
        self._room_bytes = encoded_bytes_max(self._stripe_bytes)
        self._rows: list[ByteArray] = list(blocks.memory)
        self.codec = choose_codec(self._rows[0][: self._stripe_bytes], self._element_bytes)
        self._decoded = aligned_array(self.raw_bytes).reshape(blocks.memory.shape)
        self._checksums = [xxh3_64(row) for row in self._rows]
        self._stored: list[list[ByteArray]] = []
        self._entries: list[list[StripeEntry]] = []
        room = self._room()
        for row in self._rows:
            encoded = self._encode(row, room)
            self._stored.append([_joined(stripe) for stripe in encoded])
            self._entries.append([stripe.entry for stripe in encoded])
        self.ratio = self.raw_bytes / sum(part.size for parts in self._stored for part in parts)
        """Raw by stored bytes, without headers."""

    def encode_rate(self) -> float:
        return self._rate(lambda number, room: self._encode(self._rows[number], room))

    def decode_rate(self) -> float:
        return self._rate(lambda number, _: self._decode(number))

    def differs(self) -> str | None:
        """Why the figures are void: what was decoded last is not what was encoded at first. ``None`` when it is."""
        same = all(xxh3_64(decoded) == checksum for decoded, checksum in zip(self._decoded, self._checksums, strict=True))
        return None if same else "decoded bytes differ from what was encoded"

    def _stripes(self, row: ByteArray) -> list[ByteArray]:
        return [row[start : start + self._stripe_bytes] for start in range(0, row.size, self._stripe_bytes)]

    def _room(self) -> ByteArray:
        """Memory for one encoded block, which the next one uses again, as in the store."""
        return aligned_array(len(self._stripes(self._rows[0])) * self._room_bytes)

    def _encode(self, row: ByteArray, room: ByteArray) -> list[EncodedStripe]:
        return [
            encode_stripe(stripe, self.codec, self._element_bytes, room[index * self._room_bytes : (index + 1) * self._room_bytes])
            for index, stripe in enumerate(self._stripes(row))
        ]

    def _decode(self, number: int) -> None:
        outs = self._stripes(self._decoded[number])
        for part, entry, out in zip(self._stored[number], self._entries[number], outs, strict=True):
            decode_stripe(part, entry, out, self._element_bytes)

    def _rate(self, work: Callable[[int, ByteArray], Any]) -> float:
        waiting = iter(range(len(self._rows)))
        ready = threading.Barrier(self.threads + 1)

        def take_turns() -> None:
            room = self._room()
            room[:] = 0  # there before it is needed
            ready.wait()
            for number in waiting:
                work(number, room)

        with ThreadPoolExecutor(self.threads) as pool:
            turns = [pool.submit(take_turns) for _ in range(self.threads)]
            ready.wait()
            started = time.perf_counter()
            for turn in turns:
                turn.result()
            return self.raw_bytes / (time.perf_counter() - started) / 1e9


def _joined(stripe: EncodedStripe) -> ByteArray:
    return np.concatenate([np.frombuffer(part, dtype=np.uint8) for part in stripe.parts])
