"""LADE: the loss compared with NumPy, its gradient, and whole runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastsam.longtail import Trainer, recipe
from fastsam.longtail.data import load_digits_lt
from fastsam.longtail.errors import UsageError
from fastsam.longtail.losses.lade import LADELoss

COUNTS = np.array([50.0, 9.0, 3.0, 1.0])


def lade_in_numpy(z: np.ndarray, y: np.ndarray, alpha: float, regularization: float) -> float:
    """Compute equations 8 to 10 of Hong et al. 2021 class by class."""
    share = COUNTS / COUNTS.sum()
    adjusted = z + np.log(share)
    entropy = [
        np.log(np.exp(row).sum()) - row[label] for row, label in zip(adjusted, y, strict=True)
    ]
    bound = 0.0
    for c in range(len(COUNTS)):
        own = z[y == c, c].mean() if (y == c).any() else 0.0
        s = np.log(np.mean(np.exp(z[:, c]) / share[c] / len(COUNTS)))
        bound += share[c] * (own - s - regularization * s**2)
    return float(np.mean(entropy) - alpha * bound)


def test_loss_is_the_formula_and_its_gradient_is_right(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for size in (1, 2, 7):
        z = torch.randn(size, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(4, (size,), generator=generator)
        loss = LADELoss(COUNTS, alpha=0.3, regularization=0.2)
        expected = lade_in_numpy(z.numpy(), y.numpy(), 0.3, 0.2)
        assert float(loss(z, y)) == pytest.approx(expected, rel=1e-12)
        assert torch.autograd.gradcheck(lambda z, y=y, loss=loss: loss(z, y), z.requires_grad_())


def test_without_the_bound_it_is_a_balanced_softmax(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, y = torch.randn(5, 4, generator=generator), torch.randint(4, (5,), generator=generator)
    expected = torch.nn.functional.cross_entropy(
        z + torch.from_numpy(np.log(COUNTS / COUNTS.sum())).float(), y
    )
    assert torch.allclose(LADELoss(COUNTS, alpha=0.0)(z, y), expected)


@pytest.mark.filterwarnings("ignore:classes are balanced")
@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_runs_log_the_formula(optimizer: str) -> None:
    data = load_digits_lt()
    config = recipe("digits-lt", "lade-rs", optimizer, epochs=1, batch_size=100, lr=0.02).config()
    seen = []
    Trainer(config, data=data, on_step=seen.append, progress=False).fit()
    loss = LADELoss(data.counts)
    for step in seen:
        assert float(step.loss) == pytest.approx(float(loss(step.logits, step.targets)), rel=1e-5)


def test_invalid_input_is_rejected() -> None:
    for options in ({"alpha": -1.0}, {"regularization": float("nan")}):
        with pytest.raises(UsageError):
            LADELoss(COUNTS, **options)
    with pytest.raises(UsageError, match="balances classes twice"):
        recipe("digits-lt", "lade-drw", "sgd")
    with pytest.raises(UsageError, match="class indices"):
        LADELoss(COUNTS)(torch.zeros(2, 4), torch.zeros(2, 4))
