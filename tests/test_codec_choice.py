"""Which blocks are encoded: the policy by itself, the choice that follows it, and stores simulated on drives of 7 to 28 GB/s."""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlode import InvalidConfig, Status
from kvlode.engine.arena import one_span
from kvlode.engine.codec_choice import SAMPLE_INTERVAL_BYTES_MAX, SAMPLE_INTERVAL_BYTES_MIN, CodecChoice, sample_codecs
from kvlode.engine.codec_policy import STORE_BYTES_PER_CORE_S, CodecRates, Resources, delivered_bytes_per_s, encoded_share
from kvlode.engine.config import StoreConfig
from kvlode.engine.drive_rate import WINDOW_BYTES, WINDOW_BYTES_MIN, WINDOWS_KEPT, DriveRate, resources_now
from kvlode.engine.entry import Entry, Kind
from kvlode.engine.namespaces import NamespaceState
from kvlode.engine.testing import ManualClock
from kvlode.format.codec import decode_stripe, encode_stripe
from kvlode.format.layout import Codec
from kvlode.gds.memory import MemoryDevice
from kvlode.gds.throttled import SimulatedTime, ThrottledDevice
from model import descriptor
from rig import Rig

GB = 1e9
KIB, MIB = 1 << 10, 1 << 20
BLOCK_BYTES = 64 * KIB


def bfloat16_block(size_bytes: int, seed: int = 1) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(size_bytes // 2, dtype=np.float32)
    return (values.view("<u4") >> 16).astype("<u2").view(np.uint8)


def noise_block(size_bytes: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size_bytes, dtype=np.uint8)


def entry_of(*spans: np.ndarray) -> Entry:
    entry = Entry(Kind.BLOCK, NamespaceState(descriptor(), None), b"key")
    entry.spans = spans
    entry.size_bytes = sum(span.size for span in spans)
    return entry


class CoreClock:
    """Time of a core that encodes and decodes every sample at the same rates."""

    def __init__(self, encode_s: float, decode_s: float) -> None:
        self._encode_s = encode_s
        self._decode_s = decode_s
        self._calls = 0
        self._now_s = 0.0

    def __call__(self) -> float:
        """Two calls around each of three codecs, two around decoding."""
        step = self._calls % 8
        self._calls += 1
        self._now_s += (0.0 if step % 2 == 0 else self._decode_s if step == 7 else self._encode_s)
        return self._now_s


# --- the policy ------------------------------------------------------------------------------------------------------------

RATES = st.builds(CodecRates, st.floats(0.9, 20), st.floats(1e7, 2e10), st.floats(1e7, 2e10))
RESOURCES = st.builds(Resources, st.floats(0.1, 128), st.floats(1e7, 1e11), st.floats(1e7, 1e11))


@settings(max_examples=400)
@given(RATES, RESOURCES)
def test_no_share_delivers_less_than_raw_in_either_direction(rates: CodecRates, resources: Resources) -> None:
    share = encoded_share(rates, resources)
    assert 0 <= share <= 1
    for codec, drive in (
        (rates.encode_bytes_per_s, resources.write_bytes_per_s),
        (rates.decode_bytes_per_s, resources.read_bytes_per_s),
    ):
        raw = delivered_bytes_per_s(0, rates.ratio, codec, drive, resources.cores)
        assert delivered_bytes_per_s(share, rates.ratio, codec, drive, resources.cores) >= raw * (1 - 1e-9)


@given(RATES, RESOURCES)
def test_more_cores_never_mean_less_encoding_and_a_faster_drive_never_more(rates: CodecRates, resources: Resources) -> None:
    share = encoded_share(rates, resources)
    more_cores = Resources(2 * resources.cores, resources.write_bytes_per_s, resources.read_bytes_per_s)
    faster_drive = Resources(resources.cores, 2 * resources.write_bytes_per_s, 2 * resources.read_bytes_per_s)
    assert encoded_share(rates, more_cores) >= share - 1e-12
    assert encoded_share(rates, faster_drive) <= share + 1e-12


@pytest.mark.parametrize(
    ("cores", "drive_gb_s", "least", "most"),
    [
        *[(2, 0.6, 1, 1), (2, 1.4, 0.5, 0.9), (2, 7, 0, 0), (4, 7, 0.05, 0.4), (16, 7, 1, 1)],
        *[(8, 28, 0, 0), (16, 28, 0.01, 0.4), (96, 28, 1, 1)],
    ],
)
def test_the_share_follows_what_is_scarce(cores: float, drive_gb_s: float, least: float, most: float) -> None:
    rates = CodecRates(1.46, 1.0 * GB, 1.6 * GB)
    assert least <= encoded_share(rates, Resources(cores, drive_gb_s * GB, drive_gb_s * GB)) <= most


def test_the_slower_of_writing_and_reading_decides() -> None:
    rates = CodecRates(1.46, 1.0 * GB, 1.6 * GB)
    slow, fast = 0.6 * GB, 3.3 * GB
    by_reading = encoded_share(rates, Resources(2, slow, fast))
    assert encoded_share(rates, Resources(2, slow, slow)) == 1
    assert 0 < encoded_share(rates, Resources(2, fast, fast)) < by_reading < 1
    assert by_reading == encoded_share(rates, Resources(2, slow / 2, fast))


def test_what_does_not_shrink_is_never_encoded() -> None:
    assert encoded_share(CodecRates(1.0, 100 * GB, 100 * GB), Resources(128, 0.1 * GB, 0.1 * GB)) == 0


# --- the rate of the drive ---------------------------------------------------------------------------------------------------


class Now:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def transfer(rate: DriveRate, now: Now, size_bytes: int, seconds: float) -> None:
    with rate.measuring(size_bytes):
        now.now_s += seconds


def test_time_in_which_nothing_moves_does_not_count() -> None:
    now = Now()
    rate = DriveRate(now)
    assert rate.bytes_per_s is None
    for _ in range(2):
        transfer(rate, now, WINDOW_BYTES_MIN // 2, 0.5)
        now.now_s += 100
    assert rate.bytes_per_s == WINDOW_BYTES_MIN


def test_transfers_at_the_same_time_add_up() -> None:
    now = Now()
    rate = DriveRate(now)
    rate.begin()
    now.now_s += 1
    rate.begin()
    now.now_s += 1
    rate.end(WINDOW_BYTES_MIN)
    now.now_s += 2
    rate.end(WINDOW_BYTES_MIN)
    assert rate.bytes_per_s == 2 * WINDOW_BYTES_MIN / 4


def test_a_drive_that_is_never_idle_is_looked_at_all_the_same() -> None:
    now = Now()
    rate = DriveRate(now)
    rate.begin()
    for _ in range(WINDOW_BYTES // WINDOW_BYTES_MIN):
        rate.begin()
        now.now_s += 0.5
        rate.end(WINDOW_BYTES_MIN)
    assert rate.bytes_per_s == 2 * WINDOW_BYTES_MIN


def test_the_best_of_the_last_windows_counts_and_is_forgotten_in_the_end() -> None:
    now = Now()
    rate = DriveRate(now)
    transfer(rate, now, WINDOW_BYTES_MIN, 1)
    for _ in range(WINDOWS_KEPT - 1):
        transfer(rate, now, WINDOW_BYTES_MIN, 4)
    assert rate.bytes_per_s == WINDOW_BYTES_MIN
    transfer(rate, now, WINDOW_BYTES_MIN, 4)
    assert rate.bytes_per_s == WINDOW_BYTES_MIN / 4


def test_a_failed_transfer_takes_time_and_moves_nothing() -> None:
    now = Now()
    rate = DriveRate(now)
    with pytest.raises(OSError), rate.measuring(WINDOW_BYTES):
        now.now_s += 1
        raise OSError
    transfer(rate, now, WINDOW_BYTES_MIN, 1)
    assert rate.bytes_per_s == WINDOW_BYTES_MIN / 2


def test_a_drive_that_was_only_written_to_is_taken_to_read_as_fast() -> None:
    now = Now()
    writes, reads = DriveRate(now), DriveRate(now)
    assert resources_now(2, writes, reads) is None
    transfer(writes, now, WINDOW_BYTES_MIN, 0.25)
    assert resources_now(2, writes, reads) == Resources(2, 4 * WINDOW_BYTES_MIN, 4 * WINDOW_BYTES_MIN)
    transfer(reads, now, WINDOW_BYTES_MIN, 0.125)
    assert resources_now(2, writes, reads) == Resources(2, 4 * WINDOW_BYTES_MIN, 8 * WINDOW_BYTES_MIN)


# --- the choice ---------------------------------------------------------------------------------------------------------------


def test_a_forced_codec_is_never_questioned() -> None:
    choice = CodecChoice(Codec.ZSTD, 2, lambda: Resources(1, 1e12, 1e12))
    assert choice.choose(entry_of(noise_block(4 * KIB))) is Codec.ZSTD


@pytest.mark.parametrize("resources", [None, lambda: None], ids=["nobody to ask", "an unknown drive"])
def test_until_the_drive_is_known_every_block_that_shrinks_is_encoded(resources: Callable[[], Resources | None] | None) -> None:
    choice = CodecChoice(None, 2, resources)
    assert {choice.choose(entry_of(bfloat16_block(BLOCK_BYTES))) for _ in range(20)} == {Codec.PLANES_ZSTD}
    assert CodecChoice(None, 2).choose(entry_of(noise_block(BLOCK_BYTES))) is Codec.RAW


@pytest.mark.parametrize("cores", [0.5, 2, 3, 5, 8, 64])
def test_the_share_is_kept_from_the_first_blocks_on(cores: float) -> None:
    resources = Resources(cores, 7 * GB, 7 * GB)
    sample = entry_of(bfloat16_block(BLOCK_BYTES))
    choice = CodecChoice(None, 2, lambda: resources, CoreClock(BLOCK_BYTES / GB, BLOCK_BYTES / (1.6 * GB)))
    chosen = [choice.choose(sample) for _ in range(50)]
    ratio = BLOCK_BYTES / encode_stripe(sample.spans[0], Codec.PLANES_ZSTD, 2).stored_length
    share = encoded_share(CodecRates(ratio, GB, 1.6 * GB), resources)
    for count in range(1, 51):
        assert abs(chosen[:count].count(Codec.PLANES_ZSTD) - share * count) <= 1
    assert set(chosen) <= {Codec.RAW, Codec.PLANES_ZSTD}


def test_samples_become_rare_and_frequent_again_when_the_blocks_change() -> None:
    asked: list[int] = []
    written_bytes = 0

    def resources() -> Resources:
        asked.append(written_bytes)
        return Resources(64, GB, GB)

    choice = CodecChoice(None, 2, resources)
    size_bytes = 2 * MIB
    kv, noise = entry_of(bfloat16_block(size_bytes)), entry_of(noise_block(size_bytes))
    for _ in range(3 * SAMPLE_INTERVAL_BYTES_MAX // size_bytes):
        choice.choose(kv)
        written_bytes += size_bytes
    gaps = np.diff(asked).tolist()
    assert gaps[0] == SAMPLE_INTERVAL_BYTES_MIN and gaps[-1] == SAMPLE_INTERVAL_BYTES_MAX and gaps == sorted(gaps)
    while choice.choose(noise) is not Codec.RAW:
        pass
    assert [choice.choose(kv) for _ in range(SAMPLE_INTERVAL_BYTES_MIN // size_bytes)][-1] is Codec.PLANES_ZSTD


def test_a_sample_is_taken_from_the_start_the_middle_and_the_end_of_a_block_of_many_spans() -> None:
    size_bytes = 4 * MIB
    for place in (0, size_bytes // 2 - 64 * KIB, size_bytes - 64 * KIB):
        block = noise_block(size_bytes)
        block[place : place + 64 * KIB] = 0
        cuts = [0, 10_000, size_bytes // 2 + 1, size_bytes]
        spans = [block[start:stop] for start, stop in itertools.pairwise(cuts)]
        assert CodecChoice(None, 1).choose(entry_of(*spans)) is Codec.ZSTD, place


def test_a_sample_says_what_a_core_does() -> None:
    block = bfloat16_block(BLOCK_BYTES)
    sampled = sample_codecs(block, 2, CoreClock(0.25, 0.125))
    assert sampled.codec is Codec.PLANES_ZSTD and sampled.rates is not None
    assert sampled.rates.encode_bytes_per_s == 4 * BLOCK_BYTES and sampled.rates.decode_bytes_per_s == 8 * BLOCK_BYTES
    assert sampled.rates.ratio == BLOCK_BYTES / encode_stripe(block, Codec.PLANES_ZSTD, 2).stored_length
    assert sample_codecs(noise_block(BLOCK_BYTES), 2).rates is None


def test_threads_that_choose_at_once_keep_the_share() -> None:
    resources = Resources(4, 7 * GB, 7 * GB)
    choice = CodecChoice(None, 2, lambda: resources, CoreClock(BLOCK_BYTES / GB, BLOCK_BYTES / (1.6 * GB)))
    sample = entry_of(bfloat16_block(BLOCK_BYTES))
    chosen: list[Codec] = []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        chosen.extend(choice.choose(sample) for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ratio = BLOCK_BYTES / encode_stripe(sample.spans[0], Codec.PLANES_ZSTD, 2).stored_length
    assert abs(chosen.count(Codec.PLANES_ZSTD) - 40 * encoded_share(CodecRates(ratio, GB, 1.6 * GB), resources)) <= 1


# --- stores on drives that this machine does not have ----------------------------------------------------------------------------

BLOCKS = 240
STEADY = (BLOCKS // 3, 2 * BLOCKS // 3)
"""Rates are taken between the ends of these blocks: how a pipeline fills and empties says nothing about a store that runs for days."""
IN_FLIGHT_PER_CORE = 2
IN_FLIGHT_MIN = 8


class SimulatedStore:
    """Cores that encode or decode real blocks in simulated time, before or behind a throttled drive. Only the time is not real."""

    def __init__(self, cores: int, drives: int, encode_bytes_per_s: float, choose: Callable[[Entry], Codec]) -> None:
        self.cores = cores
        self.codec_bytes_per_s = {"write": encode_bytes_per_s, "read": 1.6 * encode_bytes_per_s}
        self.time = SimulatedTime()
        rate = drives * 7 * GB
        self.device = ThrottledDevice(MemoryDevice(), self.time, read_bytes_per_s=rate, write_bytes_per_s=rate)
        self.device.make_folder("/store")
        self.file = self.device.open("/store/log", "create")
        block = bfloat16_block(BLOCK_BYTES)
        self.entry = entry_of(block)
        self.stripe = encode_stripe(block, Codec.PLANES_ZSTD, 2)
        self.stored = one_span([np.frombuffer(part, dtype=np.uint8) for part in self.stripe.parts])
        self.codecs = [choose(self.entry) for _ in range(BLOCKS)]
        self.payloads = [self.entry.spans[0] if codec is Codec.RAW else self.stored for codec in self.codecs]
        self.offsets = [0, *np.cumsum([payload.size for payload in self.payloads]).tolist()]

    def core_s(self, index: int, operation: str) -> float:
        codec_s = 0 if self.codecs[index] is Codec.RAW else BLOCK_BYTES / self.codec_bytes_per_s[operation]
        return BLOCK_BYTES / STORE_BYTES_PER_CORE_S + codec_s

    def write(self) -> float:
        """Encode, then write; so many blocks under way at most. Raw bytes a second."""
        return self._run([self._on_core("write"), lambda index, then: self._on_drive("write", index, then)])

    def read(self) -> float:
        """Read what was written, then decode."""
        self.write()
        rate = self._run([lambda index, then: self._on_drive("read", index, then), self._on_core("read")])
        for index, payload in enumerate(self.read_payloads):
            out = np.empty(BLOCK_BYTES, dtype=np.uint8)
            if self.codecs[index] is Codec.RAW:
                out[:] = payload
            else:
                decode_stripe(payload, self.stripe.entry, out, 2)
            assert np.array_equal(out, self.entry.spans[0])
        return rate

    def _run(self, stages: Sequence[Callable[[int, Callable[[], None]], None]]) -> float:
        waiting = deque(range(BLOCKS))
        self.read_payloads = [np.empty_like(payload) for payload in self.payloads]
        first, second = stages
        done_at_s: list[float] = []

        def start_next() -> None:
            if waiting:
                index = waiting.popleft()
                first(index, lambda: second(index, lambda: end(index)))

        def end(index: int) -> None:
            done_at_s.append(self.time.now_s)
            start_next()

        for _ in range(max(IN_FLIGHT_MIN, IN_FLIGHT_PER_CORE * self.cores)):
            start_next()
        self.time.run()
        assert len(done_at_s) == BLOCKS
        return (STEADY[1] - STEADY[0]) * BLOCK_BYTES / (done_at_s[STEADY[1]] - done_at_s[STEADY[0]])

    def _on_core(self, operation: str) -> Callable[[int, Callable[[], None]], None]:
        free_at_s = [self.time.now_s] * self.cores

        def work(index: int, then: Callable[[], None]) -> None:
            core = int(np.argmin(free_at_s))
            free_at_s[core] = max(free_at_s[core], self.time.now_s) + self.core_s(index, operation)
            self.time.at(free_at_s[core], then)

        return work

    def _on_drive(self, operation: str, index: int, then: Callable[[], None]) -> None:
        offset = self.offsets[index]
        if operation == "write":
            future = self.file.write(offset, [self.payloads[index]])
        else:
            future = self.file.read(offset, [self.read_payloads[index]])
        future.add_done_callback(lambda done: (done.result(), then()))


@pytest.mark.parametrize("drives", [1, 2, 4])
@pytest.mark.parametrize("cores", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("encode_gb_s", [0.5, 1.0, 2.0])
def test_auto_delivers_at_least_what_raw_does(drives: int, cores: int, encode_gb_s: float) -> None:
    encode_bytes_per_s = encode_gb_s * GB
    resources = Resources(cores, drives * 7 * GB, drives * 7 * GB)
    clock = CoreClock(BLOCK_BYTES / encode_bytes_per_s, BLOCK_BYTES / (1.6 * encode_bytes_per_s))

    def raw() -> SimulatedStore:
        return SimulatedStore(cores, drives, encode_bytes_per_s, lambda _: Codec.RAW)

    def auto() -> SimulatedStore:
        return SimulatedStore(cores, drives, encode_bytes_per_s, CodecChoice(None, 2, lambda: resources, clock).choose)

    gains = auto().write() / raw().write(), auto().read() / raw().read()
    print(f"{drives=} {cores=} {encode_gb_s=} write x{gains[0]:.3f} read x{gains[1]:.3f}")
    assert min(gains) >= 0.995  # a block more or less in the pipeline when it starts and ends


@pytest.mark.parametrize("drives", [1, 2, 4])
def test_with_cores_enough_auto_delivers_more_than_the_drives(drives: int) -> None:
    resources = Resources(64, drives * 7 * GB, drives * 7 * GB)
    clock = CoreClock(BLOCK_BYTES / GB, BLOCK_BYTES / (1.6 * GB))
    store = SimulatedStore(64, drives, GB, CodecChoice(None, 2, lambda: resources, clock).choose)
    assert store.write() > 1.25 * drives * 7 * GB and store.read() > 1.25 * drives * 7 * GB


@pytest.mark.parametrize("drives", [1, 2, 4])
def test_with_few_cores_encoding_everything_would_have_been_slower(drives: int) -> None:
    raw = SimulatedStore(2 * drives, drives, GB, lambda _: Codec.RAW)
    encoded = SimulatedStore(2 * drives, drives, GB, lambda _: Codec.PLANES_ZSTD)
    assert encoded.write() < 0.6 * raw.write() and encoded.read() < 0.7 * raw.read()


# --- a store that follows what it measures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cpu_budget", "in_the_end"), [(0.001, Codec.RAW), (1000.0, Codec.PLANES_ZSTD)])
def test_a_store_encodes_until_it_knows_its_drive_and_then_what_its_cores_manage(cpu_budget: float, in_the_end: Codec) -> None:
    count = 4 * WINDOW_BYTES_MIN // MIB
    block = bfloat16_block(MIB)
    options = {"capacity": 512 * MIB, "buffer": 8 * MIB, "segment_bytes": 32 * MIB, "put_timeout_s": 30.0, "serve_clean": False}
    rig = Rig(ManualClock(), cpu_budget=cpu_budget, **options)
    space, core = rig.store.namespace(descriptor()), rig.store._core
    keys = [b"%d" % number for number in range(count)]
    for key in keys:
        space.put(key, block)
    assert rig.store.flush()
    assert core.writer.drive_rate.bytes_per_s is not None
    codecs = [Codec(entry.codec) for entry in core.find([space.digest + key for key in keys]) if entry is not None]
    assert len(codecs) == count and codecs[0] is Codec.PLANES_ZSTD and codecs[-1] is in_the_end
    outs = [np.empty(MIB, dtype=np.uint8) for _ in keys]
    assert set(space.get_many_into(keys, outs)) == {Status.HIT}
    assert all(np.array_equal(out, block) for out in outs)
    assert core.reader.drive_rate.bytes_per_s is not None
    rig.close()


@pytest.mark.parametrize("cpu_budget", [0, -1, float("inf"), float("nan")])
def test_a_budget_that_is_no_number_of_cores_is_refused(cpu_budget: float) -> None:
    with pytest.raises(InvalidConfig, match="cpu_budget"):
        StoreConfig.build(cpu_budget=cpu_budget)


def test_the_budget_is_all_cores_unless_told_otherwise() -> None:
    assert StoreConfig.build().cpu_budget == len(os.sched_getaffinity(0))
    assert StoreConfig.build(cpu_budget=1.5).cpu_budget == 1.5
