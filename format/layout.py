"""Sizes, limits, names and enumerations of the on-disk format: the constants that SPEC.md parts 2 and 3 list.

Everything on disk is little-endian and starts on a multiple of ``PAGE_BYTES``, so that O_DIRECT and GDS can
move it without a copy. Limits exist so that a reader can bound every length before it uses it.
"""

from __future__ import annotations

import enum
import re

from .errors import InvalidBlock, InvalidConfig

FORMAT_VERSION = 1
"""Version of every structure of this format; a reader refuses structures with a higher one."""

PAGE_BYTES = 4096
ALIGNMENT_LOG2 = 12
STRIPE_ALIGNMENT_BYTES = 16
"""Stripes, and the planes inside them, start on multiples of this inside a payload (nvCOMP's requirement)."""

KEY_BYTES_MAX = 255
META_BYTES_MAX = 512
DIGEST_BYTES = 16
ZERO_DIGEST = bytes(DIGEST_BYTES)
"""Stands for "none" where a digest field is optional (tag, parent)."""

STRIPES_MAX = 128
STRIPE_BYTES_DEFAULT = 256 << 10
BLOCK_BYTES_MAX = 1 << 30
STORED_BYTES_MAX = BLOCK_BYTES_MAX + STRIPES_MAX * STRIPE_ALIGNMENT_BYTES
"""Longest payload: an encoded stripe is never longer than its raw bytes, plus the padding between stripes."""
SEGMENT_BYTES_MAX = 1 << 40
SEGMENT_RECORDS_MAX = SEGMENT_BYTES_MAX // PAGE_BYTES
NAMESPACE_BYTES_MAX = 64 << 10
"""Longest canonical JSON of a namespace descriptor."""

SUPERBLOCK_NAME = "STORE"
LOCK_NAME = "LOCK"
FOLLOWERS_NAME = "FOLLOWERS"
HEAT_NAME = "heat"
SCRUB_NAME = "SCRUB"
"""What a scrub has checked, and when: derived, may be deleted at any time."""
STATS_FOLDER = "stats"
"""What running processes say of the store: derived, may be deleted at any time."""
SEGMENTS_FOLDER = "segments"
INDEX_FOLDER = "index"
QUARANTINE_FOLDER = "quarantine"

SEQUENCE_COUNTER_BITS = 40
EPOCH_MAX = (1 << 24) - 1

_SEGMENT_NAME = re.compile(r"([0-9a-f]{16})\.seg")


class RecordType(enum.IntEnum):
    """What a record says. Zero is not a type, so that zeros are never a record."""

    BLOCK = 1
    TOMBSTONE = 2
    NAMESPACE = 3
    NAMESPACE_DROP = 4
    SEAL = 5


class Codec(enum.IntEnum):
    """How a stripe is stored."""

    RAW = 0
    ZSTD = 1
    PLANES_ZSTD = 2


class ChecksumId(enum.IntEnum):
    """Which algorithm made the checksums of a record."""

    XXH3_64 = 1
    DEVICE = 2
    """Reserved for a checksum computed on the device; no writer uses it yet."""


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def page_count(size_bytes: int) -> int:
    """Pages needed for ``size_bytes``."""
    return -(-size_bytes // PAGE_BYTES)


def round_up_pages(size_bytes: int) -> int:
    """Bytes of the pages needed for ``size_bytes``."""
    return page_count(size_bytes) * PAGE_BYTES


def segment_name(segment_id: int) -> str:
    """File name of a segment: its id as 16 lower-case hexadecimal digits."""
    if not 0 <= segment_id < 1 << 64:
        raise InvalidConfig("a segment id has no name", expected="0 <= id < 2**64", actual=segment_id)
    return f"{segment_id:016x}.seg"


def parse_segment_name(name: str) -> int | None:
    """The segment id of a file name, ``None`` when it is not the name of a segment."""
    match = _SEGMENT_NAME.fullmatch(name)
    return int(match.group(1), 16) if match else None


def sequence(epoch: int, counter: int) -> int:
    """A sequence number: the epoch in the high 24 bits, so that a reopened store continues above everything before."""
    if not 0 <= epoch <= EPOCH_MAX or not 0 <= counter < 1 << SEQUENCE_COUNTER_BITS:
        raise InvalidConfig(
            "sequence numbers are used up",
            expected=f"epoch <= {EPOCH_MAX} and counter < 2**{SEQUENCE_COUNTER_BITS}",
            actual=f"epoch {epoch}, counter {counter}",
            action="Make a new store.",
        )
    return epoch << SEQUENCE_COUNTER_BITS | counter


def stripe_bytes_for(raw_length: int, wanted: int = STRIPE_BYTES_DEFAULT) -> int:
    """Stripe size of a block of ``raw_length`` bytes: a multiple of the page, at most ``STRIPES_MAX`` stripes.

    It is ``wanted`` (rounded up to a page) or, when that would make too many stripes, the smallest multiple of it
    that does not, so that stripe boundaries stay on layer boundaries.
    """
    if not 0 <= raw_length <= BLOCK_BYTES_MAX or not 0 < wanted <= BLOCK_BYTES_MAX:
        raise InvalidBlock(
            "no stripe size fits",
            expected=f"a block of at most {BLOCK_BYTES_MAX} bytes and stripes of 1 to {BLOCK_BYTES_MAX} bytes",
            actual=f"block {raw_length}, stripe {wanted}",
        )
    unit = round_up_pages(wanted)
    stripes = -(-raw_length // unit)
    return unit * max(1, -(-stripes // STRIPES_MAX))
