"""The programs under examples/ train."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.amp import GradScaler

EXAMPLES = Path(__file__).parents[1] / "examples"


def losses_of(name: str) -> list[float]:
    """These packages warn of their own settings, which is not what is tested here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return runpy.run_path(str(EXAMPLES / name))["main"]()


@pytest.mark.slow
def test_lightning() -> None:
    pytest.importorskip("lightning", exc_type=ImportError)
    losses = losses_of("lightning_sam.py")
    assert len(losses) == 40
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.slow
def test_accelerate() -> None:
    pytest.importorskip("accelerate", exc_type=ImportError)
    losses = losses_of("accelerate_sam.py")
    assert losses[-1] < 0.6 * losses[0]


class ScalingAccelerator:
    """What the example uses of Accelerate, which makes a scaler for fp16 on a GPU alone."""

    def __init__(self, *, cpu: bool, mixed_precision: str) -> None:
        self.scaler = GradScaler("cpu", init_scale=2.0**12) if mixed_precision == "fp16" else None

    def prepare(self, *prepared: Any) -> tuple[Any, ...]:
        return prepared

    def backward(self, loss: torch.Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler else loss).backward()


def test_accelerate_with_a_scaler_trains_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale is a power of two: the bits are the same."""
    stand_in = SimpleNamespace(Accelerator=ScalingAccelerator)
    monkeypatch.setitem(sys.modules, "accelerate", stand_in)
    main = runpy.run_path(str(EXAMPLES / "accelerate_sam.py"))["main"]
    losses = main()
    assert losses[-1] < 0.6 * losses[0]
    assert main(mixed_precision="fp16") == losses


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
