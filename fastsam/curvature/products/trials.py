"""Trials of strategies: whether their products agree, and how long they take."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from fastsam.curvature.products.captured import device_product
from fastsam.curvature.products.graphs import GraphBuilder
from fastsam.curvature.products.pure import PureLoss
from fastsam.curvature.products.strategies import HESSIAN_ONLY, HOLDING, make_product

AGREEMENT = 1e3
"""Largest difference of the products of two strategies, in units of eps times the operator's norm.

Rounding makes them differ by a few eps of the norm: at most 66 eps in 489 products of 150 random
networks, in float32 and float64. A wrong derivative differs by percents, which is 1e5 eps in float32.
"""


_LOG = logging.getLogger(__name__)


def trial(
    strategy: str, loss: PureLoss, batch: Any, build: GraphBuilder, probes: int
) -> tuple[float, float]:
    """Measure the seconds of set-up and of a block of products; infinite for an unfit strategy."""
    if strategy not in HESSIAN_ONLY:
        return _time(strategy, loss, batch, build, probes)
    reason = _unfit(strategy, loss, batch, build)
    if reason is None:
        try:
            return _time(strategy, loss, batch, build, probes)
        except Exception as error:
            reason = _in_a_line(error)
    _LOG.debug("strategy %r is not used: %s", strategy, reason)
    return float("inf"), float("inf")


def _time(
    strategy: str, loss: PureLoss, batch: Any, build: GraphBuilder, probes: int
) -> tuple[float, float]:
    vectors = torch.ones(probes, loss.dimension, dtype=loss.dtype, device=loss.device)
    began = _now(loss.device)
    product = device_product(strategy, loss, [batch], build, held=True)
    product(vectors)
    ready = _now(loss.device)
    product(vectors)
    return ready - began, _now(loss.device) - ready


def _unfit(strategy: str, loss: PureLoss, batch: Any, build: GraphBuilder) -> str | None:
    """Return the reason why a strategy may not be used for this loss, or None.

    Two random products must agree with those of the kept graph. The operator's norm is estimated by
    a power iteration: products with these products, which favor the largest eigenvalues.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, loss.dimension, generator=generator, dtype=loss.dtype, device="cpu")
    vectors = vectors.to(loss.device)
    kept = make_product("kept-graph", loss, [batch], build, kept=0)
    expected = kept(vectors)
    scale = expected.norm(dim=1)
    norm = float(
        (kept(expected).norm(dim=1) / scale.clamp(min=torch.finfo(scale.dtype).tiny)).max()
    )
    try:
        found = make_product(strategy, loss, [batch], build, kept=0)(vectors)
    except Exception as error:
        return _in_a_line(error)
    difference = float(((found - expected).norm(dim=1) / vectors.norm(dim=1)).max())
    if not difference <= AGREEMENT * torch.finfo(loss.dtype).eps * norm:
        return f"its products differ from those of the kept graph by {difference:.1e} at norm {norm:.1e}"
    return None


def refuse_unfit(strategy: str, loss: PureLoss, batch: Any, build: GraphBuilder) -> None:
    """Raise ValueError for a requested strategy that fails or computes wrong products."""
    if strategy not in HESSIAN_ONLY:
        return
    reason = _unfit(strategy, loss, batch, build)
    if reason is not None:
        other = "kept-graph" if strategy in HOLDING else "rebuild"
        raise ValueError(
            f"strategy {strategy!r} does not work for this model and loss: {reason}. "
            f"Use strategy={other!r} or 'auto'"
        )


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
