"""`kvlode plan` as a person and as a script call it."""

from __future__ import annotations

import re
import shlex

import pytest

from command import run_here
from kvlode.tools.plan import catalog
from readme import ROOT, fenced

WORK = ("plan", "--model", "llama-3-70b", "--context", "32k", "--hit-rate", "0.8", "--requests-per-s", "0.2", "--horizon", "6h")


def test_people_get_the_answer_first() -> None:
    done = run_here(*WORK)
    assert done.code == 0 and done.err == ""
    assert done.out.startswith("LOAD: ")
    for words in ("time to first token", "break-even", "DWPD", "320.0 KiB of KV a token", "drives needed for"):
        assert words in done.out


def test_scripts_get_every_figure_in_one_object() -> None:
    answer = run_here(*WORK, "--json").json
    assert answer["loading_pays"] is True and answer["sizes"]["kv_bytes_per_token"] == 327_680
    assert answer["inputs"]["horizon_s"] == 6 * 3600 and answer["inputs"]["context_tokens"] == 32768
    assert answer["ttft_with_s"] == pytest.approx(answer["load_hit_s"] + answer["compute_rest_s"])
    assert {"formulas", "warnings", "needs", "verdict", "break_even_tokens"} <= set(answer)
    assert all(set(line) == {"name", "formula", "numbers", "value"} for line in answer["formulas"])


def test_each_formula_is_explained_with_its_numbers() -> None:
    done = run_here(*WORK, "--explain")
    for line in run_here(*WORK, "--json").json["formulas"]:
        assert line["name"] in done.out and line["formula"] in done.out and line["numbers"] in done.out
    assert "2 x 80 x 8 x 128 x 2 = 327,680" in done.out and "docs/performance.md" in done.out


def test_the_comparison_has_every_gpu_and_drive() -> None:
    compared = run_here(*WORK, "--compare", "--json").json["compare"]
    assert {(row["gpu"], row["drive"]) for row in compared} == {(gpu, drive) for gpu in catalog.GPUS for drive in catalog.DRIVES}
    assert "recompute" not in run_here(*WORK, "--compare", "--gpu", "l4").out.splitlines()[0]


def test_the_catalogue_names_its_sources() -> None:
    listed = run_here("plan", "--list", "--json").json
    assert {row["name"] for row in listed["models"]} == set(catalog.MODELS)
    assert all(row["source"] for kind in listed.values() for row in kind)
    shown = run_here("plan", "--list").out
    assert all(name in shown for names in (catalog.MODELS, catalog.GPUS, catalog.DRIVES) for name in names)


def test_a_model_from_options() -> None:
    own = ("plan", "--layers", 80, "--kv-heads", 8, "--head-dim", 128, "--heads", 64, "--params", "70.6B", "--gpus", 4)
    mine, known = (run_here(*words, "--json").json for words in (own, ("plan", "--model", "llama-3-70b", "--gpus", 4)))
    assert mine["ttft_with_s"] == known["ttft_with_s"] and mine["break_even_tokens"] == known["break_even_tokens"]


def test_options_replace_the_catalogue() -> None:
    answer = run_here(
        *WORK, "--dtype-bytes", 1, "--drive-read", "10GB/s", "--drive-size", "7.68TB", "--dwpd", 3, "--prefill-tokens-per-s", 5000, "--json"
    ).json
    assert answer["sizes"]["kv_bytes_per_token"] == 163_840 and answer["inputs"]["ratio"] == catalog.RATIO_FP8
    drive = answer["inputs"]["drive"]
    assert (drive["read_bytes_per_s"], drive["write_bytes_per_s"], drive["size_bytes"], drive["writes_per_day"]) == (1e10, 4e9, 7.68e12, 3)
    assert answer["ttft_without_s"] == pytest.approx(32768 / 5000)


def test_the_load_as_tokens_a_second() -> None:
    assert (
        run_here("plan", "--model", "qwen3-8b", "--context", "8k", "--tokens-per-s", 16384, "--json").json["inputs"]["requests_per_s"] == 2
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no model is given"),
        (("--layers", 3), "--kv-heads, --head-dim"),
        (("--model", "nope"), "unknown model"),
        (("--model", "qwen3-8b", "--gpu", "nope"), "unknown GPU"),
        (("--model", "qwen3-8b", "--drive", "nope"), "unknown drive"),
        (("--model", "qwen3-8b", "--drive-read", "7"), "with its unit"),
        (("--model", "qwen3-8b", "--hit-rate", "80"), "no share"),
        (("--model", "qwen3-8b", "--context", "0"), "no number of tokens"),
        (("--model", "qwen3-8b", "--horizon", "soon"), "7d, 12h"),
        (("--model", "qwen3-8b", "--requests-per-s", 1, "--tokens-per-s", 1), "given twice"),
        (("--model", "qwen3-8b", "--drives", 0), "--drives"),
        (("--model", "qwen3-8b", "--cores", "nan"), "--cores"),
        (("--model", "qwen3-8b", "--efficiency", 1.5), "--efficiency"),
        (("--model", "qwen3-8b", "--ratio", 0.5), ">= 1"),
        (("--model", "deepseek-v3", "--kv-heads", 8), "one latent"),
        (("--layers", 3, "--kv-heads", 1, "--head-dim", 64), "--params"),
        (("--layers", 3, "--kv-heads", 1, "--head-dim", 64, "--params", "many"), "--params"),
        (("--model", "qwen3-8b", "--codec", "zip"), "--codec"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(words: tuple[object, ...], said: str) -> None:
    done = run_here("plan", *words)
    assert (done.code, done.out) == (16, "") and len(done.err.splitlines()) == 1 and said in done.err, done


def commands_of_the_page() -> list[str]:
    return [line for block in fenced("docs/plan.md", "sh") for line in block.splitlines() if line.startswith("kvlode ")]


@pytest.mark.parametrize("line", commands_of_the_page())
def test_a_command_of_the_page_runs(line: str) -> None:
    assert run_here(*shlex.split(line, comments=True)[1:]).code == 0


def test_the_worked_example_is_what_the_command_prints() -> None:
    text = (ROOT / "docs/plan.md").read_text()
    command, shown = re.findall(r"```sh\n(kvlode plan [^\n]+)\n```\n\n```text\n(.*?)```", text, re.DOTALL)[0]
    printed = "\n".join(line.rstrip() for line in run_here(*shlex.split(command)[1:]).out.splitlines())
    assert printed.strip() == shown.strip()


def test_the_page_has_the_measured_figures_of_the_code() -> None:
    text = (ROOT / "docs/plan.md").read_text()
    for figure in (
        f"{catalog.READ_SHARE:g}",
        f"{catalog.WRITE_SHARE:g}",
        f"{catalog.ENCODE_BYTES_PER_S / 1e9:g} GB/s",
        f"{catalog.DECODE_BYTES_PER_S / 1e9:g} GB/s",
        f"{catalog.READ_CORE_S_PER_BYTE * 1e9:g} s",
        f"{catalog.WRITE_CORE_S_PER_BYTE * 1e9:g} s",
        f"{catalog.LOAD_FIXED_S * 1e3:g} ms",
        f"{catalog.LOOKUP_S_PER_BLOCK * 1e6:g} us",
        f"{catalog.RATIO_BF16:g}",
        f"{catalog.RATIO_FP8:g}",
        f"{catalog.EFFICIENCY:g}",
    ):
        assert figure in text, figure
