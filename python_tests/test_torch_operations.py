"""The suites of SAM and of spectra on PyTorch operations: a part in every run, the rest as slow tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastsam.kernels.backends import VARIABLE

TESTS = Path(__file__).parent


def run(*paths: str) -> None:
    """Run tests of other files in a separate process, with ``FASTSAM_KERNELS=torch``."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, *(str(TESTS / path) for path in paths)],
        env={**os.environ, VARIABLE: "torch"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_a_part_of_the_suites() -> None:
    run("optim/test_gradients.py", "optim/test_rounding.py", "curvature/test_lanczos.py")


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["kernels", "optim", "curvature"])
def test_the_whole_suites(folder: str) -> None:
    run(folder)
