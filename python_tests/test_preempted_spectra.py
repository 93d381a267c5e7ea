"""Spectra whose process is killed or asked to stop at random moments end on the uninterrupted bits.

``FASTSAM_INTERRUPTIONS`` multiplies the number of interruptions.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastsam.cli import main
from fastsam.longtail.landscape import ClassSpectrum

pytestmark = pytest.mark.slow

SCALE = int(os.environ.get("FASTSAM_INTERRUPTIONS", "1"))
SEED = int(os.environ.get("FASTSAM_TEST_SEED", "25"))
SCRIPT = Path(__file__).with_name("counted_spectra.py")
STEPS, CLASSES = 40, ("0", "9")
PRODUCTS = STEPS * len(CLASSES)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    tiny = ["--epochs", "1", "--batch-size", "200", "--threads", "1", "--quiet"]
    assert main(["train", "--method", "ce", "--optimizer", "sgd", *tiny, "--out", str(out)]) == 0
    return out


def start(run: Path, out: Path, *, interval: float) -> subprocess.Popen[str]:
    command = ["spectrum", str(run), "--classes", *CLASSES, "--steps", str(STEPS), "--quiet"]
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(interval), *command, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def products(out: Path) -> int:
    file = out.with_name(f"{out.name}-products.txt")
    return file.read_text().count("\n") if file.exists() else 0


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted spectra."""
    out = tmp_path_factory.mktemp("whole") / "spectra"
    process = start(run, out, interval=60)
    error = process.communicate(timeout=600)[1]
    assert process.returncode == 0, error
    assert products(out) == PRODUCTS
    return out


@pytest.mark.parametrize(
    ("number", "count", "interval"),
    [(signal.SIGKILL, 4, 0.0), (signal.SIGTERM, 2, 1e9), (signal.SIGINT, 1, 1e9)],
)
def test_interrupted_at_random_moments(
    number: int, count: int, interval: float, run: Path, whole: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng([SEED, number])
    left, chain, interruptions = count * SCALE, 0, 0
    while left > 0:
        out = tmp_path / f"spectra-{chain}"
        chain += 1
        kills = 0
        while True:
            process = start(run, out, interval=interval)
            reach = products(out) + int(rng.integers(0, PRODUCTS // 2))
            end = time.monotonic() + 240
            while left > 0 and process.poll() is None and products(out) <= reach:
                assert time.monotonic() < end
                time.sleep(0.01)
            if left > 0 and process.poll() is None:
                time.sleep(float(rng.uniform(0, 0.05)))
                process.send_signal(number)
            error = process.communicate(timeout=600)[1]
            if process.returncode == 0:
                break
            left -= 1
            kills += 1
            if number == signal.SIGKILL:
                assert process.returncode == -signal.SIGKILL, error
                assert error == ""
            else:
                assert process.returncode == 75, error
                assert "same command again" in error.lower(), error
        for label in CLASSES:
            name = f"class-{label}-train-ce-none.json"
            one, other = (ClassSpectrum.load(folder / name) for folder in (out, whole))
            assert one.subject == other.subject
            assert np.array_equal(one.spectrum.alpha, other.spectrum.alpha)
            assert np.array_equal(one.spectrum.beta, other.spectrum.beta)
        assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())
        # A killed process may repeat the product that it had not saved yet.
        assert products(out) <= PRODUCTS + (kills if number == signal.SIGKILL else 0)
        interruptions += kills
    assert interruptions >= count * SCALE
