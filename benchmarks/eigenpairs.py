"""Eigenpairs by thick-restart Lanczos, compared with ARPACK (``scipy.sparse.linalg.eigsh``).

Both get the same start vector, subspace and tolerance. ARPACK's tolerance is relative to each eigenvalue,
that of fastsam to the norm. Runs of ARPACK that do not converge, or that miss a copy of a multiple
eigenvalue, are counted but not compared. On the Hessian of a network, ARPACK runs on the products of fastsam
and, with ``--peers``, on those of curvlinops.
"""

from __future__ import annotations

import importlib
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.machine import save
from fastsam import curvature_operator
from fastsam.curvature import ConvergenceWarning, MatrixOperator, eigenpairs
from fastsam.curvature.eigenpairs import subspace_size
from fastsam.curvature.lanczos.thick_restart import Which, ranking
from fastsam.curvature.operators.base import Operator
from fastsam.longtail.models import build_model
from fastsam.threads import cpu_threads

Floats = NDArray[np.floating[Any]]
Product = Callable[[Floats], Floats]

ENDS: dict[Which, str] = {"largest": "LA", "smallest": "SA", "magnitude": "LM"}
"""Names of the ends, and those of ARPACK."""

NETWORK_TOLERANCE = 1e-3
"""Tolerance of the eigenpairs of the network."""


@dataclass(frozen=True, kw_only=True)
class EigenpairRuns:
    """Count the products and time the runs of eigenpairs and of ARPACK."""

    dimension: int = 400
    """Dimension of the 30 explicit spectra; 0 to skip them."""
    counts: tuple[int, ...] = (1, 5)
    """Numbers of eigenpairs."""
    tolerance: float = 1e-6
    """Residual of a converged pair in the explicit spectra."""
    most_products: int = 10_000
    """Products after which a run ends unconverged."""
    model: str = "resnet8"
    """Network whose Hessian is compared."""
    images: int = 8
    """Number of images in the curvature of the network, gray and of 28 x 28 pixels."""
    rounds: int = 3
    """Timed runs on the network; they alternate."""
    device: str = "cpu"
    """Device of the network; the explicit spectra are computed on the CPU."""
    peers: Path | None = None
    """Folder with curvlinops; None to compare without it."""
    save: bool = False
    """Write the results to benchmarks/results/."""
    out: Path | None = None
    """Write the results to this folder instead."""

    def run(self) -> None:
        """Compare on explicit spectra by products, and on the Hessian of a network by time."""
        with cpu_threads(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            products = self._spectra() if self.dimension else {}
            timed = self._network()
            if self.save or self.out is not None:
                settings = {"dimension": self.dimension, "tolerance": self.tolerance}
                results = {"settings": settings, "spectra": products, "network": timed}
                print(save("eigenpairs", results, device=self.device, folder=self.out))

    def _spectra(self) -> dict[str, Any]:
        generator = np.random.default_rng(0)
        rows: list[dict[str, Any]] = []
        for name, values in spectra(self.dimension, generator).items():
            rotation, _ = np.linalg.qr(generator.normal(size=(len(values), len(values))))
            matrix = (rotation * values) @ rotation.T
            operator = MatrixOperator(torch.from_numpy((matrix + matrix.T) / 2))
            for count, which in itertools.product(self.counts, ENDS):
                start = generator.normal(size=len(values))
                row = self._row(operator, values, count, which, start)
                rows.append({"spectrum": name, "k": count, "which": which, **row})
                print(rows[-1], flush=True)
        compared = [row["ratio"] for row in rows if row["ratio"] is not None]
        summary = {
            "compared": len(compared),
            "median": statistics.median(compared),
            "largest": max(compared),
            "fastsam unconverged": sum(not row["fastsam"]["converged"] for row in rows),
            "fastsam wrong": sum(not row["fastsam"]["right"] for row in rows),
            "eigsh unconverged": sum(not row["eigsh"]["converged"] for row in rows),
            "eigsh wrong": sum(row["eigsh"]["right"] is False for row in rows),
        }
        print(summary)
        return {"summary": summary, "rows": rows}

    def _row(
        self, operator: Operator, values: Floats, count: int, which: Which, start: Floats
    ) -> dict[str, Any]:
        """Compare one end of one spectrum."""
        exact = values[ranking(np.asarray(values, np.float64), which)[:count]]
        allowed = 2 * self.tolerance * float(np.abs(values).max())

        def is_right(found: Floats) -> bool:
            if which == "magnitude":  # values of equal magnitude have no order
                return bool(np.allclose(_sorted(np.abs(found)), _sorted(np.abs(exact)), 0, allowed))
            return bool(np.allclose(_sorted(found), _sorted(exact), rtol=0, atol=allowed))

        ours = self._ours(operator, count, which, start, tolerance=self.tolerance)
        product = product_of(operator)
        found, products = self._theirs(product, count, which, start, tolerance=self.tolerance)
        right = None if found is None else is_right(found)
        return {
            "fastsam": {
                "products": ours.products,
                "converged": ours.converged,
                "right": is_right(ours.values.numpy()),
            },
            "eigsh": {"products": products, "converged": found is not None, "right": right},
            "ratio": ours.products / products if right else None,
        }

    def _network(self) -> list[dict[str, Any]]:
        """Time both on the Hessian of a network at its initial weights."""
        torch.manual_seed(0)
        model = build_model(self.model, 10, channels=1).to(self.device)
        inputs = torch.randn(self.images, 1, 28, 28).to(self.device)
        data = inputs, torch.arange(self.images, device=self.device) % 10
        operator = curvature_operator(model, nn.CrossEntropyLoss(), data)
        start = torch.randn(operator.shape[0]).numpy()
        products_of = {"eigsh": product_of(operator)}
        if self.peers is not None:
            products_of["eigsh, curvlinops"] = curvlinops_product(model, data, self.peers)
        exact = products_of["eigsh"](start)
        for name, product in products_of.items():
            difference = float(np.linalg.norm(product(start) - exact) / np.linalg.norm(exact))
            if difference > 1e-3:
                raise AssertionError(f"{name} computes a different product: {difference}")
        rows = []
        ends: tuple[Which, ...] = ("largest", "smallest")
        for count, which in itertools.product(self.counts, ends):
            contestants: dict[str, Callable[[], Any]] = {
                "fastsam": partial(
                    self._ours, operator, count, which, start, tolerance=NETWORK_TOLERANCE
                ),
                **{
                    name: partial(
                        self._theirs, product, count, which, start, tolerance=NETWORK_TOLERANCE
                    )
                    for name, product in products_of.items()
                },
            }
            seconds: dict[str, list[float]] = {name: [] for name in contestants}
            products = {}
            for _, (name, run) in itertools.product(range(self.rounds), contestants.items()):
                began = self._seconds()
                result = run()
                seconds[name].append(self._seconds() - began)
                products[name] = result[1] if isinstance(result, tuple) else result.products
            medians = {name: statistics.median(each) for name, each in seconds.items()}
            ratios = {
                name: statistics.median(
                    ours / theirs for ours, theirs in zip(seconds["fastsam"], each, strict=True)
                )
                for name, each in seconds.items()
                if name != "fastsam"
            }
            rows.append(
                {
                    "k": count,
                    "which": which,
                    "products": products,
                    "CPU seconds" if self.device == "cpu" else "seconds": medians,
                    "ratio": ratios,
                }
            )
            print(rows[-1], flush=True)
        return rows

    def _seconds(self) -> float:
        """Return CPU time, or wall time after the work of a GPU."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def _ours(
        self, operator: Operator, count: int, which: Which, start: Floats, *, tolerance: float
    ) -> Any:
        return eigenpairs(
            operator,
            count,
            which=which,
            tol=tolerance,
            start=torch.from_numpy(start),
            max_products=self.most_products,
            progress=False,
        )

    def _theirs(
        self, product: Product, count: int, which: Which, start: Floats, *, tolerance: float
    ) -> tuple[Floats | None, int]:
        """Return ARPACK's eigenvalues, None if it did not converge, and its number of products."""
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

        products = 0

        def counted(vector: Floats) -> Floats:
            nonlocal products
            products += 1
            return product(vector)

        linear = LinearOperator((len(start), len(start)), matvec=counted, dtype=start.dtype)
        size = subspace_size(count, None)
        # Each restart takes at most as many products as the subspace has vectors besides the wanted ones.
        restarts = self.most_products // (size - count)
        try:
            values, _ = eigsh(
                linear,
                count,
                which=ENDS[which],
                ncv=size,
                v0=start,
                tol=tolerance,
                maxiter=restarts,
            )
        except ArpackNoConvergence:
            return None, products
        return values, products


def product_of(operator: Operator) -> Product:
    """Return the product of an operator with one vector, as a function of arrays."""
    return lambda vector: (
        operator.matmat(torch.from_numpy(vector)[None].to(operator.device))[0].cpu().numpy()
    )


def curvlinops_product(model: nn.Module, batch: tuple[Tensor, Tensor], folder: Path) -> Product:
    """Return the product of curvlinops' Hessian with one vector."""
    sys.path.insert(0, str(folder))
    peer = importlib.import_module("curvlinops")
    linear = peer.HessianLinearOperator(
        model.eval(),
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [batch],
        check_deterministic=False,
    )
    device = batch[0].device
    return lambda vector: (linear @ torch.from_numpy(vector).to(device)).cpu().numpy()


def spectra(n: int, generator: np.random.Generator) -> dict[str, Floats]:
    """Return 30 spectra with n eigenvalues: dense and isolated ends, clusters, multiples, decays."""
    normal, uniform, index = generator.normal, generator.uniform, np.arange(1, n + 1)
    tall, wide = normal(size=(2 * n, n)), normal(size=(n // 2, n))
    return {
        "normal": normal(size=n),
        "uniform": uniform(-1, 1, n),
        "equidistant": np.linspace(0, 1, n),
        "semicircle ends": np.cos(np.pi * (index - 0.5) / n),
        "Laplacian": 2 - 2 * np.cos(np.pi * index / (n + 1)),
        "Student, 3 degrees": generator.standard_t(3, size=n),
        "Cauchy": generator.standard_cauchy(size=n),
        "lognormal": np.exp(2 * normal(size=n)),
        "exponential, negative": -generator.exponential(size=n),
        "far from 0": 100 + normal(size=n),
        "both signs, gap": np.concatenate([uniform(-2, -1, n // 2), uniform(1, 2, n - n // 2)]),
        "gap below 20": np.concatenate([uniform(0, 1, n - 20), uniform(2, 3, 20)]),
        "outliers": np.concatenate([0.1 * normal(size=n - 7), uniform(1, 10, 7)]),
        "opposite outliers": np.concatenate([[7.0, -7.0], uniform(-1, 1, n - 2)]),
        "cluster": np.concatenate([1 + 1e-6 * normal(size=5), uniform(0, 0.9, n - 5)]),
        "every value twice": np.repeat(uniform(-1, 1, n // 2), 2),
        "triple ends": np.concatenate([[5.0] * 3, [-4.0] * 3, uniform(-3, 4, n - 6)]),
        "rank 30": np.concatenate([np.zeros(n - 30), uniform(0.5, 3, 30)]),
        "rank n/2, Wishart": np.linalg.eigvalsh(wide.T @ wide / n),
        "Wishart": np.linalg.eigvalsh(tall.T @ tall / (2 * n)),
        "0.7^j": 0.7**index,
        "0.9^j": 0.9**index,
        "0.98^j": 0.98**index,
        "1/j": 1.0 / index,
        "1/j^2": 1.0 / index**2,
        "1/sqrt(j)": index**-0.5,
        "six decades": np.logspace(-6, 0, n),
        "three decades": np.logspace(-3, 0, n),
        "Hessian-like, slow": _hessian_like(n, generator, bulk=0.05, top=10 * 0.7 ** np.arange(10)),
        "Hessian-like, fast": _hessian_like(n, generator, bulk=0.01, top=20 * 0.5 ** np.arange(9)),
    }


def _hessian_like(n: int, generator: np.random.Generator, *, bulk: float, top: Floats) -> Floats:
    """Return a bulk around 0, half of it negative, and separate large eigenvalues."""
    negative = -bulk * generator.exponential(size=n // 2)
    positive = bulk * generator.exponential(size=n - n // 2 - len(top))
    return np.concatenate([negative, positive, top])


def _sorted(values: Floats) -> Floats:
    return np.sort(values)
