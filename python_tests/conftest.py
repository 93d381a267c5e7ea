"""Settings of all tests: seeds, and skipping of tests that need a GPU."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator

import hypothesis
import hypothesis.core
import numpy as np
import pytest
import torch

from fastsam.threads import cpu_threads

BASE_SEED = int(os.environ.get("FASTSAM_TEST_SEED", "0"))
"""Seed of all tests. A test gets the same random numbers in every run with the same value."""


def seed_of(nodeid: str) -> int:
    """Return the seed in [0, 2^31) of the test with this id."""
    digest = hashlib.sha256(f"{BASE_SEED} {nodeid}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 2**31


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Return the seed of this test, for generators that it creates."""
    return seed_of(request.node.nodeid)


@pytest.fixture(autouse=True)
def _seed_global_generators(request: pytest.FixtureRequest) -> None:
    value = seed_of(request.node.nodeid)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one CPU thread in torch during the test."""
    with cpu_threads(1):
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Let hypothesis draw the same examples in every run, or those of FASTSAM_TEST_SEED."""
    hypothesis.settings.register_profile("fixed", derandomize=BASE_SEED == 0)
    hypothesis.settings.load_profile("fixed")
    if BASE_SEED != 0:
        hypothesis.core.global_force_seed = BASE_SEED


def pytest_report_header() -> str:
    """Name the seed that reproduces this run."""
    return f"FASTSAM_TEST_SEED={BASE_SEED}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` on machines without a GPU."""
    if torch.cuda.is_available():
        return
    without = pytest.mark.skip(reason="no NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(without)
