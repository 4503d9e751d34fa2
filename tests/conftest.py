"""What every test runs under: one reproducible seed, printed, and hypothesis profiles."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

SEED = int(os.environ.get("KVLODE_TEST_SEED", "20261124"))

# Deadlines measure the machine, not the code. CI and the default run are derandomised: a red run is red again.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", derandomize=True, **_COMMON)
settings.register_profile("search", derandomize=False, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("KVLODE_HYPOTHESIS", "default"))


ROOT = Path(__file__).resolve().parent.parent


class _RootIsNoTestPackage:
    """Collect the root as a plain folder.

    It has an ``__init__.py``, so pytest would import it as a package named after the checkout's folder: a second copy of
    kvlode, or no valid name at all. Registered as a plugin because a conftest's hooks apply only below its own folder.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_RootIsNoTestPackage())


def pytest_report_header(config: pytest.Config) -> str:
    profile = settings.get_current_profile_name()
    return f"kvlode: seed {SEED} (KVLODE_TEST_SEED), hypothesis profile {profile} (KVLODE_HYPOTHESIS=search explores)"


@pytest.fixture
def seed() -> int:
    """The run's seed; tests that draw numbers use it, so that a failure can be repeated."""
    return SEED


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """A NumPy generator that gives every test the same numbers in every run."""
    return np.random.default_rng(seed)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Settings of an adapter with a small store in a folder of the test's own."""
    return {"path": os.fspath(tmp_path / "store"), "capacity": "256MiB", "buffer": "32MiB", "gds": "off"}


@pytest.fixture(autouse=True)
def _seed_global_generators() -> None:
    random.seed(SEED)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run."""
    if os.geteuid() != 0:
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason="needs the rights of root"))
