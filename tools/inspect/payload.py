"""Payloads of records: every stripe checked and decoded with ``format`` alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import xxhash

from ...format.checksum import xxh3_64
from ...format.codec import decode_stripe
from ...format.errors import CorruptRecord, FormatError
from ...format.layout import PAGE_BYTES, RecordType, segment_name
from ...format.record import RecordHeader
from ...format.stripe import stripe_offsets, stripe_raw_bytes
from ...format.walk import Read, check_payload

Bytes = npt.NDArray[np.uint8]


def decode_stripes(read: Read, header: RecordHeader) -> Iterator[tuple[int, str | None]]:
    """For each stripe of a record its number and what is wrong with it (``None``: it matches and decodes).

    Holds one stripe in memory. With the last one the raw checksum of the whole is compared, if all were good. The payload of a
    seal has no stripes: it is compared as a whole, and raises ``CorruptRecord``.
    """
    whole, good = xxhash.xxh3_64(), 0
    for number, raw, problem in _stripes(read, header):
        if raw is not None:
            whole.update(raw.data)
            good += 1
        if good == len(header.stripes) and whole.intdigest() != header.raw_checksum:
            problem = str(_raw_error(header, whole.intdigest()))
        yield number, problem


def decode_block(read: Read, header: RecordHeader) -> Bytes:
    """The raw bytes of a block, every stripe checked, the whole compared with its raw checksum. Raises ``FormatError``."""
    raw = np.empty(header.raw_length, dtype=np.uint8)
    for number, start in enumerate(stripe_offsets(header.stripes).tolist()):
        first = number * header.stripe_bytes
        out = raw[first : first + stripe_raw_bytes(header.raw_length, header.stripe_bytes, number)]
        _decode(read, header, number, start, out)
    actual = xxh3_64(raw)
    if actual != header.raw_checksum:
        raise _raw_error(header, actual)
    return raw


def _stripes(read: Read, header: RecordHeader) -> Iterator[tuple[int, Bytes | None, str | None]]:
    if header.record_type == RecordType.SEAL:
        check_payload(read, header)
        return
    for number, start in enumerate(stripe_offsets(header.stripes).tolist()):
        out = np.empty(stripe_raw_bytes(header.raw_length, header.stripe_bytes, number), dtype=np.uint8)
        try:
            _decode(read, header, number, start, out)
        except FormatError as error:
            yield number, None, str(error)
        else:
            yield number, out, None


def _decode(read: Read, header: RecordHeader, number: int, start: int, out: Bytes) -> None:
    where = f"{segment_name(header.segment_id)} offset {header.offset} stripe {number}"
    length = int(header.stripes["stored_length"][number])
    stored = np.frombuffer(read(header.offset + PAGE_BYTES + start, length), dtype=np.uint8)
    if len(stored) != length:
        raise CorruptRecord("stripe-end", where=where, expected=f"{length} bytes", actual=f"{len(stored)} before the file ends")
    decode_stripe(stored, header.stripes[number], out, header.element_size, where=where)


def _raw_error(header: RecordHeader, actual: int) -> CorruptRecord:
    where = f"{segment_name(header.segment_id)} offset {header.offset}"
    return CorruptRecord("raw-checksum", where=where, expected=f"{header.raw_checksum:016x}", actual=f"{actual:016x}")
