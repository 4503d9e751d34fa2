"""The demo: a table or a JSON object of what its two processes found out, and the whole of it on a short prompt.

How prefixes are stored and restored is tested in ``test_transformers_adapter.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvlode.tools import demo
from kvlode.tools.demo import JSON_KEYS, run_demo

FACTS: dict[str, dict[str, Any]] = {
    "store": {"blocks": 2, "raw_bytes": 3000, "stored_bytes": 2000},
    "restore": {
        "tokens_equal": True,
        "prompt_tokens": 540,
        "restored_tokens": 512,
        "ttft_recompute_s": 2.0,
        "ttft_restore_s": 0.25,
        "io_path": "direct",
        "answer": "a",
    },
}


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("as_json", [True, False])
def test_the_demo_tells_what_its_processes_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, equal: bool, as_json: bool
) -> None:
    found = {step: facts | ({"tokens_equal": equal} if step == "restore" else {}) for step, facts in FACTS.items()}
    monkeypatch.setattr(demo, "_run_step", lambda name, options, console: dict(found[name]))
    code = run_demo(dtype="bfloat16", store=tmp_path, as_json=as_json, document_tokens=520, console=Console(stderr=True))
    assert code == (0 if equal else 1)
    output = capsys.readouterr().out
    if as_json:
        facts = json.loads(output.splitlines()[-1])
        assert tuple(facts) == JSON_KEYS
        assert facts["ttft_ratio"] == 8.0 and facts["compression_ratio"] == 1.5
    else:
        assert ("yes" if equal else "NO") in output and "8.0 x" in output


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_demo_restores_a_real_models_prefix_in_another_process(tmp_path: Path, dtype: str) -> None:
    command = [str(Path(sys.executable).with_name("kvlode")), "demo", "--json", "--document-tokens", "520", "--dtype", dtype]
    done = subprocess.run([*command, "--store", str(tmp_path / "store")], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert tuple(facts) == JSON_KEYS
    assert facts["tokens_equal"] is True
    assert facts["restored_tokens"] == 512 and 512 < facts["prompt_tokens"] < 600
    assert facts["compression_ratio"] > (1.35 if dtype == "bfloat16" else 1.0)
    assert facts["stored_bytes"] < facts["raw_bytes"] == 2 * 256 * 30 * 2 * 3 * 64 * (2 if dtype == "bfloat16" else 4)
