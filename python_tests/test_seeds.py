"""Random numbers of the tests are equal in every run, and differ by FASTSAM_TEST_SEED."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

DRAWS = """
import random

import numpy as np
import torch
from hypothesis import given, strategies


def test_first(seed):
    print("DRAWN", torch.rand(1).item(), np.random.rand(), random.random(), seed)


def test_second(seed):
    print("DRAWN", torch.rand(1).item(), np.random.rand(), random.random(), seed)


@given(strategies.integers())
def test_hypothesis(number):
    print("DRAWN", number)
"""


def drawn(folder: Path, *tests: str, seed: str | None = None) -> list[str]:
    """Return the numbers that the tests drew, one line per draw."""
    environment = {k: v for k, v in os.environ.items() if k != "FASTSAM_TEST_SEED"}
    if seed is not None:
        environment["FASTSAM_TEST_SEED"] = seed
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-sq", "-p", "python_tests.conftest", *tests],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return re.findall(r"DRAWN (.*)", run.stdout)


@pytest.mark.slow
def test_a_test_draws_the_same_numbers_in_every_run_and_alone(tmp_path: Path) -> None:
    (tmp_path / "test_draws.py").write_text(DRAWS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    every = drawn(tmp_path)
    assert every[0] != every[1]
    assert every[1:] == drawn(tmp_path, "-k", "second or hypothesis")
    other = drawn(tmp_path, seed="7")
    assert not set(other[:2]) & set(every[:2])
    assert other[2:] != every[2:]


def test_no_test_draws_from_the_operating_system() -> None:
    unseeded = re.compile(r"default_rng\(\)|\.seed\(\)|secrets\.|SystemRandom|os\.urandom")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / "python_tests").rglob("*.py"))
        if path.name != Path(__file__).name
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if unseeded.search(line)
    ]
    assert found == []
