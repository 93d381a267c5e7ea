"""The programs under examples/ train."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.slow


def losses_of(name: str) -> list[float]:
    """These packages warn of their own settings, which is not what is tested here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return runpy.run_path(str(EXAMPLES / name))["main"]()


def test_lightning() -> None:
    pytest.importorskip("lightning", exc_type=ImportError)
    losses = losses_of("lightning_sam.py")
    assert len(losses) == 40
    assert losses[-1] < 0.6 * losses[0]


def test_accelerate() -> None:
    pytest.importorskip("accelerate", exc_type=ImportError)
    losses = losses_of("accelerate_sam.py")
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_local_ascent(ranks: int) -> None:
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    output = subprocess.run(
        [*launcher, f"--nproc-per-node={ranks}", str(EXAMPLES / "ddp_local.py")],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    losses = re.findall(r"rank \d: loss ([\d.]+) -> ([\d.]+)", output)
    assert len(losses) == ranks
    assert all(float(last) < float(first) for first, last in losses)
