"""The optimizers by name, and how each of them takes a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from fastsam.longtail.config import TrainConfig, given
from fastsam.longtail.data import Batch
from fastsam.longtail.seeds import Stream, derived_seed
from fastsam.optim import SAM, OuterOptimizer, frozen_batch_norm_statistics, kept_if_skipped
from fastsam.optim.variants.entropy_sgd import EntropySGD
from fastsam.optim.variants.looksam import LookSAM
from fastsam.optim.variants.lpf_sgd import LPFSGD
from fastsam.optim.variants.pgd import PGD


def build_optimizer(config: TrainConfig, model: nn.Module) -> Optimizer:
    """The optimizer that ``config`` names for the trained parameters of ``model``, on torch's SGD.

    All of them step by a closure that clears the gradients and makes one pass.
    """
    sgd = SGD(
        [(name, value) for name, value in model.named_parameters() if value.requires_grad],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )
    noise_seed = derived_seed(config.seed, Stream.NOISE)
    match config.optimizer:
        case "sgd":
            return sgd
        case "sam":
            return SAM(optimizer=sgd, rho=given(config.rho)[0], closure="both_passes")
        case "asam":
            return SAM(
                optimizer=sgd, rho=given(config.rho)[0], adaptive="weights", closure="both_passes"
            )
        case "looksam":
            return LookSAM(
                sgd,
                rho=given(config.rho)[0],
                every=given(config.look_every),
                alpha=given(config.look_alpha),
            )
        case "pgd":
            return PGD(
                sgd,
                sigma=given(config.noise_sigma),
                noise_on=given(config.noise_on),
                seed=noise_seed,
            )
        case "lpf-sgd":
            return LPFSGD(
                sgd, gamma=given(config.lpf_gamma), parts=given(config.lpf_parts), seed=noise_seed
            )
        case "entropy-sgd":
            return EntropySGD(
                sgd,
                steps=given(config.entropy_steps),
                inner_lr=given(config.entropy_lr),
                gamma=given(config.entropy_gamma),
                noise=given(config.entropy_noise),
                alpha=given(config.entropy_alpha),
                seed=noise_seed,
            )
    raise AssertionError(f"TrainConfig accepted the optimizer {config.optimizer!r}")


def batches_for_steps(
    optimizer: Optimizer, batches: Iterator[Batch]
) -> Iterator[list[tuple[int, Batch]]]:
    """What each step works on: numbered batches or parts of them, one for each first pass.

    Most optimizers use one batch a step. LPF-SGD cuts it into parts of two images or more, and a small
    batch into fewer of them, since one image has no variance for batch normalization. Entropy-SGD takes
    a new batch for every inner step (the last step of an epoch goes round those that are left).
    """
    number = 0
    waiting: list[tuple[int, Batch]] = []
    needed = optimizer.inner_steps if isinstance(optimizer, EntropySGD) else 1
    for batch in batches:
        for piece in _parts(optimizer, batch):
            waiting.append((number, piece))
            number += 1
        if isinstance(optimizer, LPFSGD) or len(waiting) == needed:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _parts(optimizer: Optimizer, batch: Batch) -> Iterator[Batch]:
    if not isinstance(optimizer, LPFSGD):
        yield batch
        return
    images = len(batch.targets)
    for part in torch.arange(images).tensor_split(max(min(optimizer.parts, images // 2), 1)):
        second = None if batch.second_view is None else batch.second_view[part]
        yield Batch(batch.inputs[part], batch.targets[part], batch.indices[part], second)


def set_schedule(optimizer: Optimizer, *, lr: float, rho: float | None) -> None:
    """Set learning rate and, where there is one, rho of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if rho is not None:
            group["rho"] = rho


def skips_nonfinite_steps(optimizer: Optimizer) -> bool:
    """Whether a step with an infinite or NaN gradient leaves the weights as they were."""
    return isinstance(optimizer, OuterOptimizer) and optimizer.skips_nonfinite_steps


def skipped_steps(optimizer: Optimizer) -> int:
    """Updates that were skipped so far because a gradient was not finite; waits for the device."""
    return int(optimizer.skipped_steps) if isinstance(optimizer, OuterOptimizer) else 0


def unless_skipped(optimizer: Optimizer, tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """:func:`fastsam.optim.kept_if_skipped` for optimizers that skip steps; most never do."""
    if isinstance(optimizer, OuterOptimizer) and optimizer.skips_nonfinite_steps:
        return kept_if_skipped(optimizer, tensors)
    return nullcontext()


def take_step(
    optimizer: Optimizer, model: nn.Module, gradients: Sequence[Callable[[], Tensor]]
) -> None:
    """One step of any of the optimizers.

    Args:
        optimizer: as from :func:`build_optimizer`.
        model: the network being trained.
        gradients: for each piece of data forward and backward, which add to ``.grad`` and return the
            loss. Passes go round them; all after the first round leave batch statistics alone.
    """
    passes = 0

    def closure() -> Tensor:
        nonlocal passes
        optimizer.zero_grad()
        again = passes >= len(gradients)
        with frozen_batch_norm_statistics(model) if again else nullcontext():
            loss = gradients[passes % len(gradients)]()
        passes += 1
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
