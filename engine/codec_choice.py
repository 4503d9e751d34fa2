"""The codec of a namespace's blocks: forced by configuration, or chosen from a sample of them and from what is scarce."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..format.codec import EncodedStripe, decode_stripe, encode_stripe, sampled_ranges, suited_codec
from ..format.layout import Codec
from .arena import Bytes, one_span
from .blocks import cut_spans
from .codec_policy import CodecRates, Resources, encoded_share
from .entry import Entry

SAMPLE_INTERVAL_BYTES_MIN, SAMPLE_INTERVAL_BYTES_MAX = 4 << 20, 128 << 20
"""Raw bytes from one sample to the next, twice as many each time that the codec is the same: less than a hundredth of encoding them."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What suits blocks like the sample, and what it makes of them; no ``rates`` for raw."""

    codec: Codec
    rates: CodecRates | None


class CodecChoice:
    """See the module. ``resources`` is asked at each sample; until it knows, every block that a codec suits is encoded. Thread-safe.

    ``core_clock_s`` is the time that the calling thread has had of a core.
    """

    def __init__(
        self,
        forced: Codec | None,
        element_size: int,
        resources: Callable[[], Resources | None] | None = None,
        core_clock_s: Callable[[], float] = time.thread_time,
    ) -> None:
        self._forced = forced
        self._element_size = element_size
        self._resources = resources
        self._core_clock_s = core_clock_s
        self._lock = threading.Lock()
        self._codec = Codec.RAW
        self._share = 0.0
        self._owed = 0.0
        self._interval_bytes = SAMPLE_INTERVAL_BYTES_MIN
        self._remaining_bytes = 0

    def choose(self, entry: Entry) -> Codec:
        """The codec of this block, the next one to be encoded."""
        if self._forced is not None:
            return self._forced
        with self._lock:
            if self._remaining_bytes <= 0:
                self._look_at(_sample_of(entry))
            self._remaining_bytes -= entry.size_bytes
            self._owed += self._share
            if self._owed < 1.0:
                return Codec.RAW
            self._owed -= 1.0
            return self._codec

    def _look_at(self, sample: Bytes) -> None:
        sampled = sample_codecs(sample, self._element_size, self._core_clock_s)
        same = sampled.codec is self._codec
        self._interval_bytes = min(2 * self._interval_bytes, SAMPLE_INTERVAL_BYTES_MAX) if same else SAMPLE_INTERVAL_BYTES_MIN
        self._remaining_bytes = self._interval_bytes
        self._codec = sampled.codec
        resources = self._resources() if self._resources is not None else None
        if sampled.rates is None:
            self._share = 0.0
        else:
            self._share = 1.0 if resources is None else encoded_share(sampled.rates, resources)


def sample_codecs(sample: Bytes, element_size: int, core_clock_s: Callable[[], float] = time.thread_time) -> Sampled:
    """Encode a sample with every codec, decode it with the one that suits it, and see how long that takes."""
    tries: dict[Codec, EncodedStripe] = {}
    seconds: dict[Codec, float] = {}
    for codec in Codec:
        started_s = core_clock_s()
        tries[codec] = encode_stripe(sample, codec, element_size)
        seconds[codec] = core_clock_s() - started_s
    suited = suited_codec({codec: stripe.stored_length for codec, stripe in tries.items()}, sample.size, element_size)
    if suited is Codec.RAW:
        return Sampled(suited, None)
    stripe = tries[suited]
    stored, out = one_span([np.frombuffer(part, dtype=np.uint8) for part in stripe.parts]), np.empty_like(sample)
    started_s = core_clock_s()
    decode_stripe(stored, stripe.entry, out, element_size)
    decode_s = core_clock_s() - started_s
    rates = CodecRates(sample.size / stripe.stored_length, _rate(sample.size, seconds[suited]), _rate(sample.size, decode_s))
    return Sampled(suited, rates)


def _rate(size_bytes: int, seconds: float) -> float:
    return size_bytes / max(seconds, 1e-9)


def _sample_of(entry: Entry) -> Bytes:
    return one_span([span for start, stop in sampled_ranges(entry.size_bytes) for span in cut_spans(entry.spans, start, stop)])
