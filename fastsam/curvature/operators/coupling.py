"""Checks that the loss of a batch is the sum of the losses of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastsam.curvature.data import one_batch
from fastsam.curvature.products.passes import JOINED_SAMPLES, joined, pieces
from fastsam.curvature.products.pure import PureLoss
from fastsam.curvature.structure import sample_count


def refuse_coupled(loss: PureLoss, first: list[Any], *, alone: bool) -> None:
    """Raise ValueError if samples depend on each other, unless the data are one whole batch.

    Batches are split, joined and distributed over ranks, which does not change the sum of a
    separable criterion. The loss of a contrastive criterion, or of one that divides by its own
    weights, changes with every split. It is defined only on a single batch, which is then never
    split: ``loss.model_loss.separable`` becomes False.

    Args:
        loss: the loss.
        first: the first batches. The first is compared with its halves, and all of them with the
            joined batch.
        alone: whether the data are one batch that was not split.

    Raises:
        ValueError: also if the criterion returns a sum over the samples, where a mean is expected.
    """
    if not first or not loss.model_loss.separable:
        return
    half = -(-sample_count(first[0]) // 2)
    several = replace(one_batch(first[0]), source=first)
    cuts = [
        (first[:1], list(pieces(one_batch(first[0]), half))),
        (list(joined(several, JOINED_SAMPLES)), first),
    ]
    eps = torch.finfo(loss.dtype).eps
    for whole, parts in cuts:
        if len(whole) == len(parts):
            continue
        try:
            losses, weights = _evaluate(loss, whole)
            separate, counts = _evaluate(loss, parts)
        except Exception:  # the model or loss accepts only batches of one size: never split
            loss.model_loss.separable = False
            return
        size = max(map(abs, (*losses, *separate)))
        if abs(sum(losses) - sum(separate)) > eps**0.5 * size + 100 * eps * sum(weights):
            break
    else:
        return
    _refuse_sum(_quotients(losses, weights), _quotients(separate, counts), eps**0.5)
    if not alone:
        raise ValueError(
            "the samples of a batch depend on each other: the loss of whole batches is "
            f"{sum(losses):.6g}, the sum over their parts {sum(separate):.6g}, so the loss over all "
            "data depends on how it is split into batches. Check whether the criterion compares "
            "samples or divides by its own weights. Pass a single batch, or use "
            "fastsam.curvature.BatchLoss(lambda model, batch: (loss_sum, weight)), whose batches "
            "are never split"
        )
    loss.model_loss.separable = False


def _refuse_sum(whole: list[float], parts: list[float], tolerance: float) -> None:
    """Raise ValueError if the values of a criterion on parts of the data add up to that on the whole."""
    if abs(sum(whole) - sum(parts)) <= tolerance * max(map(abs, (*whole, *parts))):
        raise ValueError(
            "the criterion returns the sum of the losses of the samples, expected their mean: its "
            f"value on whole batches is {sum(whole):.6g}, the sum over their parts {sum(parts):.6g}. "
            "Return the mean, or use fastsam.curvature.BatchLoss(lambda model, batch: (loss_sum, "
            "weight))"
        )


def _evaluate(loss: PureLoss, batches: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Return the sums of the losses and the weights of batches."""
    found = [loss(loss.leaves(), loss.place(batch)) for batch in batches]
    return [float(total.detach()) for total, _ in found], [float(weight) for _, weight in found]


def _quotients(losses: list[float], weights: list[float]) -> list[float]:
    return [loss / weight for loss, weight in zip(losses, weights, strict=True) if weight]
