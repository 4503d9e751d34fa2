"""No bytes crash a parser: the kept inputs again, and a fixed number of new ones from the printed seed; the fuzzer itself."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
from pathlib import Path

import pytest

import kvlode
from fuzz import run
from fuzz.mutate import case
from fuzz.targets import TARGETS, Target
from kvlode.engine.config import parse_bytes
from kvlode.format.errors import InvalidConfig
from kvlode.tools.fsck.options import Sample

NAMES = sorted(TARGETS)
CASES = 700
CASES_SLOW = 20_000
FIRST_OF_SLOW = 1_000_000
"""The slow run takes other case numbers than the default one."""

# --- the parsers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_kept_inputs_and_seeds_are_parsed_or_refused_within_their_memory(name: str) -> None:
    report = run.replay(TARGETS[name])
    assert report.cases == len(run.pool_of(TARGETS[name])) > 0


@pytest.mark.parametrize("name", NAMES)
def test_new_inputs_are_parsed_or_refused_and_nothing_else(name: str, seed: int) -> None:
    report = run.fuzz(TARGETS[name], range(CASES), seed)
    assert report.cases == CASES


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_many_new_inputs_are_parsed_or_refused_and_nothing_else(name: str, seed: int) -> None:
    report = run.fuzz(TARGETS[name], range(FIRST_OF_SLOW, FIRST_OF_SLOW + CASES_SLOW), seed)
    assert report.cases == CASES_SLOW


@pytest.mark.parametrize("name", ["superblock", "segment-header", "trailer", "record-header", "table-of-contents", "segment", "codec-zstd"])
def test_mutated_inputs_get_behind_the_checksums_and_are_accepted_at_times(name: str, seed: int) -> None:
    outcomes = run.fuzz(TARGETS[name], range(CASES), seed).outcomes
    at_the_door = sum(
        count for outcome, count in outcomes.items() if outcome.endswith(("length", "magic", "checksum", "not a kvlode store"))
    )
    assert at_the_door < CASES * 0.8
    assert any(outcome.startswith("accepted") for outcome in outcomes) and len(outcomes) > 3


CHECKED_ELSEWHERE = {"stripe-checksum"}
"""The targets of the codecs compute the checksum of what they decode: test_codecs and test_flips have it."""


def test_the_kept_inputs_reach_every_check_of_the_format() -> None:
    """A check without an input here is one that fuzzing starts far from."""
    outcomes = {outcome for target in TARGETS.values() for outcome in run.replay(target).outcomes}
    reached = {word for outcome in outcomes for word in outcome.removeprefix("accepted: ").removeprefix("CorruptRecord: ").split(", ")}
    checks = set()
    for path in (Path(kvlode.__file__).parent / "format").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("CorruptRecord", "_corrupt") and node.args:
                checks |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    assert len(checks) > 30
    assert checks - CHECKED_ELSEWHERE <= reached


# --- what fuzzing has found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["9" * 400 + "GiB", "9" * 5000, "0.1", "0.00001kb", "0", "1" + "0" * 30, "٣ GiB", "1.5.5"])
def test_a_text_that_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidConfig, match="capacity is not a size") as caught:
        parse_bytes(text, "capacity")
    assert len(str(caught.value)) < 300


def test_a_size_is_exact() -> None:
    assert parse_bytes("9007199254740993") == 9007199254740993
    assert parse_bytes("0.1 GB") == 10**8
    assert parse_bytes("1.5KiB") == 1536


@pytest.mark.parametrize("text", ["9" * 400 + "GiB", "1/" + "9" * 5000, "9" * 5000 + "%"])
def test_a_sample_of_many_digits_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidConfig, match="sample"):
        Sample.parse(text)


# --- the fuzzer --------------------------------------------------------------------------------------------------------------


def planted(target: Target, bug: object) -> Target:
    """The target with a bug in a rare place."""

    def faulty(data: bytes) -> str:
        if data and hashlib.sha256(data).digest()[0] < 16:
            bug(data)  # type: ignore[operator]
        return target.run(data)

    return dataclasses.replace(target, run=faulty)


def test_a_crash_is_reported_with_the_seed_and_the_case_that_repeat_it(seed: int) -> None:
    target = planted(TARGETS["superblock"], lambda data: {}[data[0]])
    with pytest.raises(run.FuzzFailed, match="KeyError") as caught:
        run.fuzz(target, range(CASES), seed)
    words = str(caught.value).split("--case ")
    number = int(words[1].split(":")[0])
    assert words[0].endswith(f"superblock --seed {seed} ")
    assert case(target, run.pool_of(target), seed, number) == caught.value.data
    with pytest.raises(run.FuzzFailed, match=f"--case {number}:"):
        run.fuzz(target, [number], seed)


def test_an_undocumented_error_of_kvlode_is_a_crash_too(seed: int) -> None:
    def bug(data: bytes) -> None:
        raise InvalidConfig("an error for options, not for bytes")

    with pytest.raises(run.FuzzFailed, match="an error for options"):
        run.fuzz(planted(TARGETS["trailer"], bug), range(CASES), seed)


def test_a_parser_that_loops_is_ended_and_reported(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(data: bytes) -> None:
        while data:
            pass

    monkeypatch.setattr(run, "HANG_S", 0.2)
    with pytest.raises(run.FuzzFailed, match="no answer"):
        run.fuzz(planted(TARGETS["trailer"], bug), range(CASES), seed)


def test_a_parser_that_allocates_what_an_input_claims_is_reported(seed: int) -> None:
    target = dataclasses.replace(TARGETS["trailer"], run=lambda data: str(len(bytearray(1 << 24))))
    with pytest.raises(run.FuzzFailed, match=r"16777\d+ bytes allocated"):
        run.fuzz(target, range(CASES), seed)


def test_cases_follow_from_seed_target_and_number_alone(seed: int) -> None:
    for target in TARGETS.values():
        pool = run.pool_of(target)
        inputs = [case(target, pool, seed, number) for number in range(40)]
        assert inputs == [case(target, pool, seed, number) for number in range(40)]
        assert all(len(data) <= target.input_bytes_max for data in inputs)
        assert len(set(inputs)) > 15


def test_growing_keeps_a_short_input_for_each_new_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(run, "CORPUS", tmp_path)
    target = TARGETS["codec-zstd"]
    known = {run.outcome(target, data) for data in target.seeds()}
    with run.hang_guard():
        kept = run.grow(target, range(300), seed)
    found = run.corpus(target)
    assert kept == len(found) > 0
    assert known.isdisjoint(run.outcome(target, data) for data in found)
    assert all(len(data) < 100 for data in found)


def test_the_corpus_has_no_stray_folders_and_stays_small() -> None:
    files = [path for path in run.CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} <= set(TARGETS)
    assert sum(path.stat().st_size for path in files) < 1 << 20


def test_the_command_repeats_one_case_and_says_what_it_ran(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["trailer", "--seed", "5", "--case", "7"]) == 0
    out = capsys.readouterr().out
    assert "seed 5" in out and "trailer: 1 cases" in out
    with pytest.raises(SystemExit):
        run.main(["no-such-parser"])
