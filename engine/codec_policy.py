"""Which share of the blocks is encoded: as many as the cores manage while the drive is busy anyway.

Encoding spends cores to save the drive's time. Where cores are plenty, every block is worth it; where the drive is so fast that the cores
would be what everything waits for, none is; in between, some are, and both are busy until the end. Pure functions of what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

STORE_BYTES_PER_CORE_S = 4e9
"""Raw bytes a second that a core takes through the store besides any codec: copies, checksums, index, system calls (0.25 s a GB)."""
TRUSTED = 0.85
"""A core is taken to do this much of what it was measured to do: others need it too, and too little encoding costs less than too much."""


@dataclass(frozen=True, slots=True)
class CodecRates:
    """What a codec makes of blocks of one kind. Rates in raw bytes a second of one core."""

    ratio: float
    """Raw by stored bytes."""
    encode_bytes_per_s: float
    decode_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Resources:
    """What a store has to work with. Rates in bytes a second of all drives below its folder together."""

    cores: float
    write_bytes_per_s: float
    read_bytes_per_s: float


def encoded_share(rates: CodecRates, resources: Resources) -> float:
    """The share of blocks to encode, from 0 to 1, at which neither writing nor reading delivers less than with none.

    Both get faster with every block encoded until the cores are the slower part; this stops where the first of the two gets there.
    """
    if rates.ratio <= 1:
        return 0.0
    writing = _balanced_share(rates.ratio, rates.encode_bytes_per_s, resources.write_bytes_per_s, resources.cores)
    reading = _balanced_share(rates.ratio, rates.decode_bytes_per_s, resources.read_bytes_per_s, resources.cores)
    return min(writing, reading)


def _balanced_share(ratio: float, codec_bytes_per_s: float, drive_bytes_per_s: float, cores: float) -> float:
    """Where the time of the drive, which falls with the share, meets the time of the cores, which grows with it."""
    codec_s = 1 / (codec_bytes_per_s * cores * TRUSTED)
    drive_s, store_s = 1 / drive_bytes_per_s, 1 / (STORE_BYTES_PER_CORE_S * cores * TRUSTED)
    saved_s = drive_s * (1 - 1 / ratio)
    return min(1.0, max(0.0, (drive_s - store_s) / (codec_s + saved_s)))


def delivered_bytes_per_s(share: float, ratio: float, codec_bytes_per_s: float, drive_bytes_per_s: float, cores: float) -> float:
    """Raw bytes a second with this share of blocks encoded: what the slower of drive and cores lets through."""
    drive_s = (1 - share * (1 - 1 / ratio)) / drive_bytes_per_s
    cores_s = (1 / STORE_BYTES_PER_CORE_S + share / codec_bytes_per_s) / cores
    return 1 / max(drive_s, cores_s)
