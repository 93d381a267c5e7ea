"""``torch.set_default_device`` moves no memory of optimizers and spectra away from the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastsam import SAM, spectral_density
from fastsam.curvature import curvature_operator, diagonal, eigenpairs, trace
from fastsam.optim import LPFSGD, PGD, EntropySGD, LookSAM
from python_tests.optim.trajectories import assert_same_bits

Make = Callable[[Optimizer], Optimizer]
MAKE: dict[str, Make] = {
    "SAM": lambda base: SAM(optimizer=base, closure="both_passes"),
    "LookSAM": lambda base: LookSAM(base, every=2),
    "PGD": lambda base: PGD(base, sigma=0.1),
    "LPFSGD": LPFSGD,
    "EntropySGD": lambda base: EntropySGD(base, steps=2),
}


@pytest.fixture
def elsewhere() -> Iterator[Callable[[], None]]:
    """Return a function after which tensors without a device are created on the device ``meta``."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


def problem(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, torch.randn(8, 3), torch.arange(8) % 2


def trained(make: Make, problem: tuple[nn.Module, Tensor, Tensor]) -> list[Tensor]:
    model, inputs, targets = problem
    optimizer = make(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", MAKE)
def test_optimizers(name: str, seed: int, elsewhere: Callable[[], None]) -> None:
    expected, other = trained(MAKE[name], problem(seed)), problem(seed)
    elsewhere()
    assert_same_bits(trained(MAKE[name], other), expected)


def test_spectra(seed: int, elsewhere: Callable[[], None]) -> None:
    model, inputs, targets = problem(seed)
    criterion = nn.CrossEntropyLoss()

    def numbers() -> list[float]:
        spectrum = spectral_density(model, criterion, (inputs, targets), steps=4, progress=False)
        operator = curvature_operator(model, criterion, (inputs, targets))
        pair = eigenpairs(operator, progress=False)
        return [
            spectrum.lambda_max,
            spectrum.trace,
            float(pair.values[0]),
            trace(operator, products=6).value,
            float(diagonal(operator, products=6).values.sum()),
        ]

    expected = numbers()
    elsewhere()
    assert numbers() == expected
