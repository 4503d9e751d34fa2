"""Inputs from inputs: each case follows from (seed, target, number) alone, so a case that fails is repeated by its number."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from fuzz.targets import Target

_INTERESTING = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    15,
    16,
    17,
    24,
    63,
    64,
    120,
    127,
    128,
    129,
    255,
    256,
    512,
    513,
    1023,
    1024,
    4095,
    4096,
    4097,
    8192,
    12288,
)
_LARGE = (
    1 << 16,
    1 << 18,
    1 << 20,
    1 << 24,
    1 << 28,
    1 << 30,
    1 << 31,
    1 << 32,
    1 << 40,
    1 << 48,
    1 << 63,
    (1 << 64) - 1,
    (1 << 64) - 4096,
)
_MUTATIONS_MAX = 6
_MENDED_SHARE = 0.8
_SAME_LENGTH_SHARE = 0.7

Mutation = Callable[[random.Random, bytearray, Target, Sequence[bytes]], None]


def case(target: Target, pool: Sequence[bytes], seed: int, number: int) -> bytes:
    """Input ``number``: one of ``pool``, changed a few times and, mostly, with its checksums made right again."""
    rng = random.Random(f"{seed} {target.name} {number}")
    source = pool[rng.randrange(len(pool))]
    data = bytearray(source)
    for _ in range(rng.randint(1, _MUTATIONS_MAX)):
        weights = [weight for weight, _ in MUTATIONS]
        rng.choices([mutation for _, mutation in MUTATIONS], weights)[0](rng, data, target, pool)
        del data[target.input_bytes_max :]
    if target.fields and rng.random() < _SAME_LENGTH_SHARE:  # a page of another length is refused at once
        data = data[: len(source)].ljust(len(source), b"\0")
    if rng.random() < _MENDED_SHARE:
        target.mend(data)
    return bytes(data)


def _number(rng: random.Random, now: int, size_bytes: int) -> int:
    """A value for an integer field: near what it was, interesting, or anything."""
    way = rng.random()
    if way < 0.3:
        value = now + rng.choice((-4096, -16, -8, -1, 1, 8, 16, 4096))
    elif way < 0.5:
        value = now ^ 1 << rng.randrange(8 * size_bytes)
    elif way < 0.9:
        value = rng.choice(_INTERESTING + _LARGE) + rng.choice((0, 0, -1, 1))
    else:
        value = rng.getrandbits(8 * size_bytes)
    return value & (1 << 8 * size_bytes) - 1


def _set_field(rng: random.Random, data: bytearray, target: Target, pool: Sequence[bytes]) -> None:
    fields = [(offset, size) for offset, size in target.fields if offset + size <= len(data)]
    if fields:
        offset, size = rng.choice(fields)
        data[offset : offset + size] = _number(rng, int.from_bytes(data[offset : offset + size], "little"), size).to_bytes(size, "little")


def _set_integer(rng: random.Random, data: bytearray, target: Target, pool: Sequence[bytes]) -> None:
    size = rng.choice((1, 2, 4, 8))
    if len(data) >= size:
        offset = rng.randrange(len(data) - size + 1)
        offset -= offset % size if rng.random() < 0.7 else 0
        data[offset : offset + size] = _number(rng, int.from_bytes(data[offset : offset + size], "little"), size).to_bytes(size, "little")


def _flip_bit(rng: random.Random, data: bytearray, target: Target, pool: Sequence[bytes]) -> None:
    if data:
        bit = rng.randrange(8 * (len(data) if rng.random() < 0.5 else min(len(data), 256)))
        data[bit >> 3] ^= 1 << (bit & 7)


def _set_byte(rng: random.Random, data: bytearray, target: Target, pool: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice(b"\0\1\x7f\x80\xff 09AZaz\"',.:/%{}[]\\") if rng.random() < 0.7 else rng.randrange(256)


def _span(rng: random.Random, data: bytearray) -> tuple[int, int]:
    """A part of the data: short ones mostly, whole pages at times."""
    if len(data) >= 8192 and rng.random() < 0.4:
        start = 4096 * rng.randrange(len(data) // 4096)
        return start, start + 4096
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.randint(1, rng.choice((4, 16, 64, 1024))))


def _delete(rng: random.Random, data: bytearray, target: Target, pool: Sequence[bytes]) -> None:
    start, stop = _span(rng, data)
    del data[start:stop]


def _clear(rng: random.Random, data: bytearray, target: Target, pool: Sequence[bytes]) -> None:
    start, stop = _span(rng, data)
    data[start:stop] = bytes(stop - start)


def _repeat(rng: random.Random, data: bytearray, target: Target, pool: Sequence[bytes]) -> None:
    start, stop = _span(rng, data)
    data[stop:stop] = data[start:stop] * rng.randint(1, 3)


def _insert(rng: random.Random, data: bytearray, target: Target, pool: Sequence[bytes]) -> None:
    start, _ = _span(rng, data)
    data[start:start] = rng.randbytes(rng.randint(1, 16))


def _splice(rng: random.Random, data: bytearray, target: Target, pool: Sequence[bytes]) -> None:
    """Overwrite a part with the same part of another input."""
    other = pool[rng.randrange(len(pool))]
    start, stop = _span(rng, data)
    data[start:stop] = other[start:stop]


def _cut(rng: random.Random, data: bytearray, target: Target, pool: Sequence[bytes]) -> None:
    del data[rng.randrange(len(data) + 1) :]


MUTATIONS: Sequence[tuple[int, Mutation]] = (
    *((12, _set_field), (4, _set_integer), (5, _flip_bit), (4, _set_byte)),
    *((2, _delete), (2, _clear), (2, _repeat), (2, _insert), (2, _splice), (1, _cut)),
)
"""(weight, mutation)."""
