"""Error and coverage of stochastic estimators on the curvature of small trained networks.

The explicit matrix in float64 is the oracle. Probes and sketches are rotation invariant, so the estimators
run on the diagonal matrix of its eigenvalues, where a product costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.machine import save
from fastsam.curvature import (
    CallableOperator,
    Estimate,
    Operator,
    curvature_operator,
    frobenius_norm,
    log_determinant,
    trace,
)
from fastsam.curvature.estimators.trace import TraceMethod
from fastsam.threads import cpu_threads

KINDS = ("hessian", "ggn")
PRODUCTS = (60, 120)
DAMPING = 0.1
"""Shift of the smallest eigenvalue or of 0 in the log-determinant, in units of the largest."""


@dataclass(frozen=True, kw_only=True)
class Estimators:
    """Measure estimators of the trace, the Frobenius norm and the log-determinant against exact values."""

    seeds: int = 200
    """Number of seeds of each estimator."""
    epochs: int = 150
    """Training epochs of each network on digits."""
    samples: int = 200
    """Number of digits for training and curvature."""
    device: str = "cpu"
    """Device of the networks, of their matrices and of fastsam's estimators."""
    save: bool = False
    """Write the results to benchmarks/results/."""
    out: Path | None = None
    """Write the results to this folder instead."""

    def run(self) -> None:
        """Train the networks, compute their matrices, and compare."""
        rows = []
        with cpu_threads(1):
            for network, make in NETWORKS.items():
                for kind, matrix in self._matrices(make).items():
                    rows.append({"network": network, "kind": kind, **self._row(matrix)})
                    print(rows[-1], flush=True)
            if self.save or self.out is not None:
                settings = {"seeds": self.seeds, "epochs": self.epochs, "samples": self.samples}
                content = {"settings": settings, "rows": rows}
                print(save("estimators", content, device=self.device, folder=self.out))

    def _matrices(self, make: Callable[[], nn.Module]) -> dict[str, Tensor]:
        """Train a network and return its explicit curvature matrices in float64."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.data[: self.samples]).float().to(self.device) / 16
        labels = torch.from_numpy(digits.target[: self.samples]).to(self.device)
        torch.manual_seed(0)
        model, criterion = make().to(self.device), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        for _ in range(self.epochs):
            for batch in torch.split(torch.randperm(len(images)).to(self.device), 50):
                optimizer.zero_grad()
                criterion(model(images[batch]), labels[batch]).backward()
                optimizer.step()
        model.double()
        data = images.double(), labels
        return {
            kind: curvature_operator(model, criterion, data, kind=kind, products=64).to_dense()
            for kind in KINDS
        }

    def _row(self, matrix: Tensor) -> dict[str, Any]:
        values = torch.linalg.eigvalsh((matrix + matrix.T).cpu() / 2)
        there = values.to(self.device)
        operator = CallableOperator(
            lambda rows: rows * there, dimension=len(values), device=self.device
        )
        squares = values.square().sort(descending=True).values
        lowest = float(values.min())
        shift = DAMPING * float(values.max()) - min(lowest, 0.0)
        exact = {
            "trace": float(values.sum()),
            "frobenius_norm": float(values.norm()),
            "log_determinant": float((values + shift).log().sum()),
        }
        row: dict[str, Any] = {"dimension": len(values), "exact": exact}
        row["frobenius_share_beyond"] = {
            rank: math.sqrt(float(squares[rank:].sum() / squares.sum())) for rank in (10, 30, 60)
        }
        for products in PRODUCTS:
            contestants: dict[str, Callable[[int], Estimate]] = {
                "hutchinson": partial(_trace, operator, products, "hutchinson"),
                "fastsam": partial(_trace, operator, products, "hutch++"),
                "hutch++ of the paper": partial(range_hutchpp, values, products),
                "xtrace": partial(xtrace, values, products),
            }
            found = {
                name: self._measured(exact["trace"], estimate)
                for name, estimate in contestants.items()
            }
            for entry in found.values():
                entry["gain"] = found["hutchinson"]["rms"] / entry["rms"]
            row[f"trace, {products} products"] = found
        row["frobenius_norm, 60 products"] = self._measured(
            exact["frobenius_norm"], lambda seed: frobenius_norm(operator, seed=seed)
        )
        row["log_determinant, 4 probes of 40 steps"] = self._measured(
            exact["log_determinant"],
            lambda seed: log_determinant(
                operator, shift=shift, lowest=lowest, seed=seed, progress=False
            ),
        )
        return row

    def _measured(self, exact: float, estimate: Callable[[int], Estimate]) -> dict[str, float]:
        """Return root-mean-square error, mean standard error and coverage over the seeds."""
        found = [estimate(seed) for seed in range(self.seeds)]
        errors = np.array([one.value - exact for one in found])
        covers = [low <= exact <= high for low, high in (one.interval(0.95) for one in found)]
        return {
            "rms": float(np.sqrt(np.mean(errors**2))),
            "mean": float(np.mean(errors)),
            "stderr": float(np.mean([one.stderr for one in found])),
            "coverage": float(np.mean(covers)),
        }


def _trace(operator: Operator, products: int, method: TraceMethod, seed: int) -> Estimate:
    return trace(operator, products=products, method=method, seed=seed)


def range_hutchpp(values: Tensor, products: int, seed: int) -> Estimate:
    """Estimate a trace by Hutch++ as published: a third of the products each for range, trace and rest."""
    generator = torch.Generator().manual_seed(seed)
    third = products // 3
    columns = torch.randn(len(values), third, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(values[:, None] * columns).Q
    # Gaussian probes, because random signs would have no variance on a diagonal matrix.
    count = products - 2 * third
    probes = torch.randn(len(values), count, generator=generator, dtype=torch.float64)
    rest = probes - basis @ (basis.T @ probes)
    samples = (values @ rest.square()).numpy()
    known = float((values @ basis.square()).sum())
    stderr = float(np.std(samples, ddof=1)) / math.sqrt(len(samples))
    return Estimate(known + float(samples.mean()), stderr, degrees=len(samples) - 1)


def xtrace(values: Tensor, products: int, seed: int) -> Estimate:
    """Estimate a trace by XTrace (arXiv 2301.07825) with its normalized probes and error estimate."""
    generator = torch.Generator().manual_seed(seed)
    n, count = len(values), products // 2
    probes = torch.randn(n, count, generator=generator, dtype=torch.float64)
    probes *= math.sqrt(n) / probes.norm(dim=0)
    basis, corner = torch.linalg.qr(values[:, None] * probes)
    # Column i: the direction that the range loses without probe i.
    lost = torch.linalg.inv(corner).T
    lost = lost / lost.norm(dim=0)
    inner = basis.T @ (values[:, None] * basis)
    parts = basis.T @ probes
    parts = parts - lost * (lost * parts).sum(dim=0)
    rest = probes - basis @ parts
    forms = (values @ rest.square()) * (n - count + 1) / rest.square().sum(dim=0)
    samples = (inner.trace() - (lost * (inner @ lost)).sum(dim=0) + forms).numpy()
    stderr = float(np.std(samples, ddof=1)) / math.sqrt(count)
    return Estimate(float(samples.mean()), stderr, degrees=count - 1)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tanh MLP": lambda: nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)),
    "CNN": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 6, 3),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 10, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(10, 10),
    ),
}
"""Networks on digits of 8 x 8 pixels."""
