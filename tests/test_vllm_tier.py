"""The secondary tier of vLLM, with stand-ins for vLLM's classes (tests/engines has the same with the real ones)."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter_conformance import LOAD_TIMEOUT_S, PREFIX, WAIT_S, AdapterConformance
from kvlode import InvalidConfig, Status
from kvlode.adapters import vllm_identity, vllm_tier
from kvlode.adapters.vllm_identity import kv_element_type, model_revision, tier_namespace
from kvlode.adapters.vllm_tier import METRIC
from kvlode.adapters.vllm_tier_jobs import Part, Rows, TierJobs
from kvlode.engine import lookups
from kvlode.gds.late import LateDevice
from kvlode.gds.memory import MemoryDevice
from kvlode.tools.damage import damage_payloads
from rig import eventually
from vllm_tier_engine import ROW_BYTES, Lookup, Setting, TierEngine, content, key_of, poll, stand_in_spec


class TestVllmTier(AdapterConformance):
    takes_sets = True

    def start(self, options: dict[str, Any], *, model: str = "model", dtype: str = "bfloat16", rank: int = 0, world: int = 1) -> TierEngine:
        # The tier has the bytes of all ranks, so there is no rank: what sets engines apart is how many there are.
        quick = {"load_timeout_s": LOAD_TIMEOUT_S, "flush_after_s": 0.01}
        return TierEngine(options | quick, Setting(model=model, dtype=dtype, tp_size=world))

    def content(self, block: int) -> np.ndarray:
        return content(block)


@pytest.fixture
def engine(options: dict[str, Any]) -> Any:
    engine = TierEngine(options)
    yield engine
    engine.stop()


# --- lookups -------------------------------------------------------------------------------------------------------------------


def test_lookups_of_many_keys_are_answered_and_their_time_is_printed(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    engine = TierEngine(options)
    for start in range(0, 128, 32):
        engine.store(range(start, start + 32))
    engine.flush()
    context = engine.request()
    keys = [key_of(block) for block in range(4096)]
    answers: dict[bytes, Lookup] = {}
    durations_s: list[float] = []
    cpu_s: list[float] = []
    for _ in range(3):
        unanswered = keys
        while unanswered:
            for key in unanswered:
                started_s, started_cpu_s = time.perf_counter(), time.thread_time()
                answers[key] = engine.tier.lookup(key, context)
                cpu_s.append(time.thread_time() - started_cpu_s)
                durations_s.append(time.perf_counter() - started_s)
            unanswered = [key for key in unanswered if answers[key] is Lookup.RETRY]
    assert [answers[key] for key in keys] == [Lookup.HIT] * 128 + [Lookup.MISS] * (4096 - 128)
    p50_s, p99_s, p999_s = np.percentile(durations_s, [50, 99, 99.9])
    with capsys.disabled():
        print(
            f"\nvLLM tier: {len(durations_s)} lookups, p50 {p50_s * 1e6:.1f} us, p99 {p99_s * 1e6:.1f} us, p99.9 {p999_s * 1e6:.1f} us, "
            f"longest {max(durations_s) * 1e6:.0f} us, of these {max(cpu_s) * 1e6:.0f} us computing"
        )
    engine.stop()


def test_submitting_and_touching_leave_the_work_to_the_tier(engine: TierEngine, capsys: pytest.CaptureFixture[str]) -> None:
    context = engine.request()
    keys = [key_of(block) for block in range(64)]
    durations_s = []
    for is_load in (False, True):
        started_s = time.perf_counter()
        job = engine.submit(keys, range(64), context, is_load=is_load)
        engine.tier.touch(keys, context)
        durations_s.append(time.perf_counter() - started_s)
        assert engine.wait(job).success
    with capsys.disabled():
        print(f"\nvLLM tier: a store of 64 blocks handed over in {durations_s[0] * 1e6:.0f} us, a load in {durations_s[1] * 1e6:.0f} us")


def test_an_index_that_does_not_answer_is_a_miss_after_a_while(engine: TierEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    context = engine.request()
    space = engine.tier._space(0)
    monkeypatch.setattr(space, "lookup_nowait", lambda keys: [Status.PENDING] * len(keys))
    monkeypatch.setattr(engine.tier, "_lookup_timeout_s", 0.05)
    assert engine.tier.lookup(key_of(1), context) is Lookup.RETRY
    assert engine.answer(key_of(1), context) is Lookup.MISS
    assert engine.tier.get_stats().counters[METRIC + "lookups_given_up", ("KvlodeTier",)] == 1
    assert engine.tier.lookup(key_of(1), engine.request()) is Lookup.RETRY, "another request asks anew"


def test_an_answer_waits_for_a_scheduler_whose_steps_are_long(engine: TierEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.store([1])
    monkeypatch.setattr(lookups, "ANSWER_AGE_S_MAX", 0.0)  # every step takes longer than an answer lives
    context = engine.request()
    assert engine.tier.lookup(key_of(1), context) is Lookup.RETRY
    asked = engine.tier._attached.store._core.lookups
    poll(lambda: bool(asked._answers))
    assert engine.tier.lookup(key_of(1), context) is Lookup.HIT
    assert engine.tier.lookup(key_of(1), context) is Lookup.RETRY, "it is given once"


# --- loads that fail --------------------------------------------------------------------------------------------------------------


def test_a_key_whose_load_failed_is_missing_for_the_requests_of_that_time(engine: TierEngine) -> None:
    context, waiting = engine.request(), engine.request()
    engine.store([1, 3])
    keys = [key_of(block) for block in (1, 2, 3)]
    result = engine.wait(engine.submit(keys, [0, 1, 2], context, is_load=True))
    assert not result.success
    assert list(result.successful_keys or ()) == [keys[0], keys[2]]
    assert np.array_equal(engine.row(2), content(3))
    engine.store([2])  # another request has computed it meanwhile
    for request in (context, waiting):
        assert engine.answer(keys[1], request) is Lookup.MISS, "it would be tried over and over"
        assert engine.answer(keys[0], request) is Lookup.HIT
    assert engine.answer(keys[1], engine.request()) is Lookup.HIT
    engine.tier.on_request_finished(context)
    assert engine.tier._lost
    engine.tier.on_request_finished(waiting)
    assert not engine.tier._lost, "nothing is kept of requests that are over"


def test_chunks_that_there_are_not_fail_alone(engine: TierEngine) -> None:
    context = engine.request()
    engine.fill(0, content(1))
    keys = [key_of(1), key_of(2), key_of(3)]
    assert not engine.wait(engine.submit(keys, [0, 64, -1], context, is_load=False)).success
    assert engine.answer(keys[0], context) is Lookup.HIT
    assert engine.answer(keys[1], context) is Lookup.MISS
    result = engine.wait(engine.submit(keys[:2], [1, 1 << 20], context, is_load=True))
    assert (result.success, list(result.successful_keys or ())) == (False, [keys[0]])


def test_outcomes_are_counted(options: dict[str, Any]) -> None:
    engine = TierEngine(options)
    engine.store([1, 2])
    engine.stop()
    damage_payloads(Path(options["path"]))
    engine = TierEngine(options)
    assert engine.tier.get_stats() is None
    engine.load([1, 2, 3])
    engine.store([1])
    assert engine.tier.get_stats().counters == {
        (METRIC + "load_failures", ("KvlodeTier", "corrupt")): 2,
        (METRIC + "load_failures", ("KvlodeTier", "miss")): 1,
        (METRIC + "stored_blocks", ("KvlodeTier",)): 1,
    }
    assert engine.tier.get_stats() is None
    assert set(type(engine.tier).build_metric_definitions({})) == set(vllm_tier.METRICS)
    assert set(engine.tier.config_info()) == set(type(engine.tier).config_info_keys({}))
    engine.stop()


# --- groups and identity ---------------------------------------------------------------------------------------------------------------


def test_cache_groups_are_namespaces(options: dict[str, Any]) -> None:
    groups = ((0, 16, ("full",)), (2, 32, ("window",)))
    engine = TierEngine(options, Setting(groups=groups, blocks_per_chunk=4))
    context = engine.request()
    keys = [key_of(1, 0), key_of(1, 2), key_of(2, 0)]
    for chunk in range(3):
        engine.fill(chunk, content(chunk))
    assert engine.wait(engine.submit(keys, range(3), context, is_load=False)).success
    assert engine.answer(key_of(2, 2), context) is Lookup.MISS
    assert engine.wait(engine.submit(keys, [10, 11, 12], context, is_load=True)).success
    for chunk in range(3):
        assert np.array_equal(engine.row(10 + chunk), content(chunk))
    spaces = engine.tier._spaces
    assert {group: space.descriptor.tokens_per_block for group, space in spaces.items()} == {0: 64, 2: 128}
    engine.stop()


SETTINGS = {
    "model": Setting(model="other"),
    "dtype": Setting(dtype="float16"),
    "ranks": Setting(tp_size=2),
    "layout": Setting(layout="LBHNC"),
    "canonical": Setting(canonical=True),
    "replicated": Setting(replicated=True),
    "portable": Setting(portable=True),
    "layers": Setting(groups=((0, 16, ("layer.0", "layer.2")),)),
    "block": Setting(groups=((0, 32, ("layer.0", "layer.1")),)),
    "chunk": Setting(blocks_per_chunk=2),
    "fp8": Setting(dtype="fp8"),
    "fp8_e4m3": Setting(dtype="fp8_e4m3"),
}


def digest_of(setting: Setting, **values: Any) -> bytes:
    return tier_namespace(stand_in_spec(setting).config, 0, **({"row_bytes": ROW_BYTES, "revision": "1"} | values)).digest


def test_whatever_changes_the_bytes_is_another_namespace() -> None:
    digests = [digest_of(setting) for setting in (Setting(), *SETTINGS.values())]
    digests += [digest_of(Setting(), revision="2"), digest_of(Setting(), row_bytes=4096), digest_of(Setting(), epoch="later")]
    assert len(set(digests)) == len(digests)


def test_bytes_that_do_not_depend_on_the_ranks_are_shared() -> None:
    for portable in ({"portable": True}, {"replicated": True}):
        assert digest_of(Setting(tp_size=2, **portable)) == digest_of(Setting(tp_size=4, **portable))
    assert digest_of(Setting(tp_size=2)) != digest_of(Setting(tp_size=4))


@pytest.mark.parametrize(
    ("name", "element"),
    [("torch.bfloat16", "bfloat16"), ("fp8", "float8_e4m3fn"), ("fp8_e5m2", "float8_e5m2"), ("fp8_ds_mla", "uint8"), ("auto", "uint8")],
)
def test_element_types(name: str, element: str) -> None:
    assert kv_element_type(name) == element


def test_the_revision_of_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshots = tmp_path / "models--org--name" / "snapshots"
    unknown = model_revision("org/name")
    (snapshots / ("a" * 40)).mkdir(parents=True)
    known = model_revision("org/name")
    assert known != unknown
    (snapshots / ("b" * 40)).mkdir()
    with pytest.raises(InvalidConfig, match="weights"):
        model_revision("org/name")
    assert model_revision("org/name", revision="a" * 40) != model_revision("org/name", revision="b" * 40)
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    assert model_revision("org/name", revision="main") == model_revision("org/name", revision="a" * 40)
    assert model_revision("org/name", revision="main", settings={"quantization": "fp8"}) != model_revision("org/name", revision="main")


def model_folder(folder: Path, weights: bytes) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return str(folder)


def test_weights_that_were_replaced_in_their_folder_hit_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    setting = Setting(model=model_folder(tmp_path / "model", b"one"))
    engine = TierEngine(options | {"on_reset": "keep"}, setting)
    engine.store(PREFIX)
    engine.tier.drain_jobs()
    assert engine.lookup(PREFIX) == len(PREFIX), "a reset with the same weights keeps what is stored"
    model_folder(tmp_path / "model", b"others")
    engine.tier.drain_jobs()
    assert engine.lookup(PREFIX) == 0
    engine.stop()
    engine = TierEngine(options, setting)
    assert engine.lookup(PREFIX) == 0
    engine.stop()


def test_a_reset_forgets_for_weights_may_have_been_replaced_in_memory(options: dict[str, Any]) -> None:
    engine = TierEngine(options)
    engine.store(PREFIX)
    engine.tier.drain_jobs()
    assert engine.lookup(PREFIX) == 0
    engine.store(PREFIX)
    assert engine.lookup(PREFIX) == len(PREFIX)
    engine.stop()


# --- settings, events, the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"capacty": "1GiB"}, {"path": ""}, {"on_reset": "maybe"}, {"identity": 3}, {"capacity": "1MiB"}], ids=lambda w: next(iter(w))
)
def test_wrong_settings_stop_the_engine_at_its_start(options: dict[str, Any], wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig):
        TierEngine(options | wrong)


def test_events_tell_what_came_into_the_store_and_left_it(options: dict[str, Any]) -> None:
    engine = TierEngine(options | {"enable_kv_events": True, "locality": "LOCAL"}, kv_events=True)
    engine.store([1, 2])
    engine.load([1])
    told: list[Any] = []

    def all_told() -> bool:
        told.extend(engine.tier.take_events())
        return sum(len(event.keys) for event in told) == 2

    poll(all_told)
    assert sorted(key for event in told for key in event.keys) == sorted([key_of(1), key_of(2)])
    assert {(event.medium, event.removed, event.locality) for event in told} == {("STORAGE", False, "LOCAL")}
    engine.tier._space(0).delete([key_of(1)[:-4]])
    engine.flush()
    removed = list(engine.tier.take_events())
    assert [(event.keys, event.removed) for event in removed] == [([key_of(1)], True)]
    engine.stop()


def test_no_events_unless_vllm_publishes_them(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    engine = TierEngine(options | {"enable_kv_events": True})
    assert "enable_kv_events" in caplog.text
    engine.store([1])
    assert list(engine.tier.take_events()) == []
    engine.stop()


def test_the_engine_keeps_polling_while_jobs_run(engine: TierEngine) -> None:
    assert not engine.tier.has_pending_work()
    job = engine.submit([key_of(1)], [0], engine.request(), is_load=False)
    assert engine.tier.has_pending_work()
    engine.tier.drain_jobs()
    assert engine.tier.has_pending_work(), "its result was not fetched yet"
    assert [result.job_id for result in engine.tier.get_finished_jobs()] == [job]
    assert not engine.tier.has_pending_work()


def test_an_empty_job_is_over_at_once(engine: TierEngine) -> None:
    assert engine.wait(engine.submit([], [], engine.request(), is_load=False)).success


def test_a_drain_ends_at_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = LateDevice(MemoryDevice(), holding=())
    engine = TierEngine(TestVllmTier().on_device(monkeypatch, late) | {"drain_timeout_s": 0.2, "load_timeout_s": LOAD_TIMEOUT_S})
    engine.store(PREFIX)
    late.hold("read")
    job = engine.submit([key_of(block) for block in PREFIX], range(8), engine.request(), is_load=True)
    with pytest.raises(TimeoutError, match="drive"):
        engine.tier.drain_jobs()
    late.hold()
    late.release()
    engine.tier.drain_jobs()
    assert [result.job_id for result in engine.tier.get_finished_jobs()] == [job]
    engine.stop()


def test_an_end_with_a_drive_that_hangs_has_a_deadline_and_keeps_the_rows_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    late = LateDevice(MemoryDevice(), holding=())
    engine = TierEngine(TestVllmTier().on_device(monkeypatch, late) | {"close_timeout_s": 0.3, "load_timeout_s": LOAD_TIMEOUT_S})
    engine.store(PREFIX)
    late.hold("read")
    engine.submit([key_of(block) for block in PREFIX], range(8), engine.request(), is_load=True)
    started_s = time.monotonic()
    engine.tier.shutdown()
    assert time.monotonic() - started_s < WAIT_S / 2
    engine._view.release()
    with pytest.raises(BufferError):
        engine.memory.close()
    late.hold()
    late.release()
    poll(engine._unmapped)


def test_nothing_fails_after_the_end(engine: TierEngine) -> None:
    engine.store([1])
    context = engine.request()
    engine.tier.shutdown()
    engine.tier.shutdown()
    assert engine.tier.lookup(key_of(1), context) is Lookup.MISS
    engine.tier.touch([key_of(1)], context)
    result = engine.wait(engine.submit([key_of(1)], [0], context, is_load=True))
    assert (result.success, result.successful_keys) == (False, None)
    engine.tier.drain_jobs()


def test_the_module_imports_without_vllm() -> None:
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "import kvlode.adapters.vllm_tier as tier\n"
        "try:\n    tier.KvlodeTier\nexcept ImportError:\n    print('not here')\n"
        "assert not hasattr(tier, 'SomethingElse')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "not here"
    assert vllm_identity.vllm_series() == "unknown" or "vllm" in sys.modules


def test_a_load_that_waits_behind_a_store_that_hangs_has_its_deadline() -> None:
    class Hanging:
        """A space whose puts wait for the test."""

        def __init__(self) -> None:
            self.gate = threading.Event()
            self.entered = threading.Event()

        def submit_put(self, keys: Any, blocks: Any, **_: Any) -> Any:
            self.entered.set()
            self.gate.wait(WAIT_S)
            raise RuntimeError("the test is over")

    space: Any = Hanging()
    jobs = TierJobs(Rows(memoryview(bytearray(4 * 4096)).cast("b", (4, 4096))), load_timeout_s=0.05)
    jobs.submit(1, [Part(space, [b"a"], [0], [0])], 1, is_load=False)
    assert space.entered.wait(WAIT_S)
    jobs.submit(2, [Part(space, [b"b"], [1], [0])], 1, is_load=True)
    found: list[Any] = []
    assert eventually(lambda: bool(found.extend(jobs.finished()) or found))
    assert [(job.job_id, job.good) for job in found] == [(2, [False])]
    space.gate.set()
    jobs.close(WAIT_S)
