"""Check an installed fastsam without extras: a SAM step, a spectrum, a path as str, the commands.

    python .ci/smoke.py

Exits with 0 if all checks pass. It does not run with the fastsam of the checkout that contains this file.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import fastsam

CHECKOUT = Path(__file__).resolve().parents[1]


def check_sam_step() -> None:
    """Compare one step on the loss ``w A w / 2`` with its closed form."""
    matrix = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
    start = torch.linspace(-1, 1, 5, dtype=torch.float64)
    weights = nn.Parameter(start.clone())
    optimizer = fastsam.SAM([weights], torch.optim.SGD, rho=0.05, lr=0.1)
    for step in (optimizer.first_step, optimizer.second_step):
        torch.autograd.backward(weights @ matrix @ weights / 2)
        step(zero_grad=True)
    gradient = matrix @ start
    expected = start - 0.1 * matrix @ (start + 0.05 * gradient / gradient.norm())
    torch.testing.assert_close(weights.detach(), expected, rtol=0, atol=1e-14)


def check_spectrum() -> None:
    """Compare the extremes of a linear regression with the eigenvalues of ``2 X^T X / N``."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 4, dtype=torch.float64, generator=generator)
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    data = (inputs, torch.zeros(40, 1, dtype=torch.float64))
    spectrum = fastsam.spectral_density(model, nn.MSELoss(), data, steps=4, progress=False)
    exact = torch.linalg.eigvalsh(2 * inputs.T @ inputs / len(inputs))
    torch.testing.assert_close(spectrum.lambda_max, exact[-1].item(), rtol=1e-9, atol=0)
    torch.testing.assert_close(spectrum.lambda_min, exact[0].item(), rtol=1e-9, atol=0)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/spectrum.json"
        spectrum.save(path)
        assert fastsam.curvature.Spectrum.load(path).lambda_max == spectrum.lambda_max


def check_commands() -> None:
    """Run the commands that require no extra."""
    for arguments in (["--version"], ["--help"], ["train", "--help"], ["doctor"]):
        with tempfile.TemporaryDirectory() as outside:
            command = [sys.executable, "-m", "fastsam", *arguments]
            done = subprocess.run(command, cwd=outside, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert "fastsam" in done.stdout, command


if __name__ == "__main__":
    place = Path(fastsam.__file__)
    assert CHECKOUT / "fastsam" not in place.parents, (
        f"{place} is the checkout, not an installation"
    )
    check_sam_step()
    check_spectrum()
    check_commands()
    print(f"fastsam {fastsam.__version__} works with torch {torch.__version__} from {place.parent}")
