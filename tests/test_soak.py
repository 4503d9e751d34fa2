"""The soak, shortened: a writer near its capacity, a follower, kills and reopening, then a check of every byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("soak") / "run.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_store_near_its_capacity_survives_an_eventful_while(tmp_path: Path) -> None:
    command = [sys.executable, str(RUN), "--minutes", "1.2", "--round-s", "16", "--seed", "7", "--capacity-mib", "128", "--folder"]
    done = subprocess.run([*command, str(tmp_path / "soak")], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    print(facts)
    assert facts["rounds"] >= 4 and facts["kills"] >= 1
    assert facts["segments_freed"] > 0, "the store never had to free a segment: the workload is too small"
    assert facts["hits"] > 0 and facts["follower_hits"] > 0
