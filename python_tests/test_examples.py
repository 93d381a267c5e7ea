"""The programs under examples/ that need no other library train."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
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
