"""Spectra of a model's loss, of each class, group or layer, and of any operator."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastsam.curvature.lanczos.options import LanczosKeywords, LanczosOptions
from fastsam.curvature.lanczos.run import lanczos
from fastsam.curvature.losses import BatchLoss, LossFunction, OutputLoss
from fastsam.curvature.operators.base import Operator
from fastsam.curvature.operators.curvature import CurvatureOperator
from fastsam.curvature.options import (
    OperatorKeywords,
    SpectrumKeywords,
    SpectrumOptions,
    operator_options,
)
from fastsam.curvature.prepared import prepared_run
from fastsam.curvature.sharding import gather_probes
from fastsam.curvature.spectrum import Spectrum
from fastsam.distributed import World
from fastsam.kernels.backends import backend_of, widened

if TYPE_CHECKING:
    from typing_extensions import Unpack


def spectral_density(
    model: nn.Module,
    loss_fn: LossFunction | OutputLoss | BatchLoss,
    data: Any,
    **options: Unpack[SpectrumKeywords],
) -> Spectrum:
    """Compute the spectrum of the Hessian of a model's mean loss, with one batched Lanczos run.

    The operator is the Hessian of (sum of losses) / (sum of loss weights) over all of ``data``, with the
    model in evaluation mode. Model, gradients and random state are restored afterwards, also after
    an error and if runs overlap in threads. Scaled-dot-product attention runs on its math backend,
    the only one that can be differentiated twice.

    Args:
        model: any module with all parameters on one device.
        loss_fn: a criterion ``loss_fn(outputs, targets)`` with mean reduction over independent
            samples; ``outputs`` is the result of the model. ``nn.CrossEntropyLoss`` and
            ``nn.NLLLoss`` are recognized with their class weights, ``ignore_index`` and any
            reduction. Pass any other loss as a :class:`BatchLoss`.
        data: one batch (a tuple, a mapping, a list that begins with a tensor, or an object that
            has tensors, such as a dataclass) or an iterable of batches, such as a ``DataLoader``.
            An iterable is first read twice: the samples may be reordered but must not change. A
            one-shot iterator is held in memory.
        **options: fields of :class:`fastsam.curvature.SpectrumOptions`. Most used: ``steps``, ``probes``,
            ``params``, ``dtype``, ``seed``, ``kind``, ``freeze``, ``checkpoint``, ``progress``.

    Returns:
        The spectrum, with loss, gradient norm and weight norm at the weights.

    Raises:
        TypeError, ValueError: the arguments, the data or the loss cannot be used, or the second
            derivatives are not symmetric; the message explains the fix.
        OSError: the disk has no room for the basis or the checkpoint.
        FloatingPointError: a product contains NaN or infinity.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> spectral_density(model, nn.CrossEntropyLoss(), batch, steps=4).dimension
        8
    """
    chosen = SpectrumOptions(**options)
    with prepared_run(model, loss_fn, data, chosen) as run:
        operator = run.operator
        world = run.world if chosen.shard == "samples" else World()
        spectrum = _run(operator, run.options, operator.identity, world)
    if chosen.shard == "probes":
        spectrum = gather_probes(spectrum, run.world)
    return replace(
        spectrum,
        loss=operator.loss,
        gradient_norm=float(widened(operator.gradient).norm()),
        weight_norm=operator.weight_norm,
        weight=operator.weight,
        settings={
            **spectrum.settings,
            "kind": chosen.kind,
            "params": operator.params,
            "strategy": operator.strategy,
            "micro_batch": operator.micro_batch,
            "cuda_graph": operator.replayed,
            "predicted_bytes": operator.predicted_bytes,
            "predicted_seconds": operator.predicted_seconds,
            "samples": run.batches.samples,
            "data_fingerprint": run.batches.fingerprint,
            "data_verified": run.batches.fingerprint is not None,
            "freeze": chosen.freeze,
            "shard": chosen.shard,
            "world_size": run.world.world_size,
        },
    )


def curvature_operator(
    model: nn.Module,
    loss_fn: LossFunction | OutputLoss | BatchLoss,
    data: Any,
    *,
    seed: int = 0,
    products: int = 1,
    **options: Unpack[OperatorKeywords],
) -> CurvatureOperator:
    """Return the curvature of a model's mean loss as a linear operator.

    The matrix is divided by the sum of the weights over all of ``data``, as a mean loss is: for
    ``nn.CrossEntropyLoss()`` by the number of samples. The Fisher matrix of cross-entropy is its
    Gauss-Newton matrix, so ``kind="ggn"`` gives it exactly and ``"mc-fisher"`` estimates it.

    Args:
        model: as in :func:`fastsam.spectral_density`.
        loss_fn: as in :func:`fastsam.spectral_density`.
        data: as in :func:`fastsam.spectral_density`.
        seed: seed of the targets that ``kind="mc-fisher"`` draws.
        products: number of products to expect, for the choice of a strategy.
        **options: fields of :class:`fastsam.curvature.SpectrumOptions` that describe the operator:
            ``kind``, ``params``, ``dtype``, ``strategy``, ``micro_batch``, ``freeze``,
            ``verify_data``, ``data_memory``, ``memory_limit``, ``shard``, ``measurements``.

    Raises:
        TypeError, ValueError: as in :func:`fastsam.spectral_density`.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> hessian = curvature_operator(model, nn.CrossEntropyLoss(), batch)
        >>> hessian.shape, (hessian @ torch.ones(8)).shape
        ((8, 8), torch.Size([8]))
        >>> list(hessian @ {"weight": torch.ones(2, 3), "bias": torch.ones(2)})
        ['weight', 'bias']
    """
    if options.get("shard") == "probes":
        raise ValueError("an operator has no probes to split over ranks; pass shard='samples'")
    chosen = operator_options(options, seed=seed, steps=products, progress=False)
    with prepared_run(model, loss_fn, data, chosen) as run:
        return CurvatureOperator(run.operator, model)


def operator_spectrum(operator: Operator, **options: Unpack[LanczosKeywords]) -> Spectrum:
    """Compute the spectrum of any symmetric operator.

    Args:
        operator: an object with ``shape``, ``dtype``, ``device`` and ``matmat``; see
            :class:`Operator`.
        **options: see :class:`fastsam.curvature.lanczos.run.LanczosOptions`.

    Raises:
        ValueError: an option is invalid, or the basis does not fit in memory.
        FloatingPointError: a product contains NaN or infinity.

    Example:
        >>> from fastsam.curvature import MatrixOperator
        >>> operator = MatrixOperator(torch.diag(torch.tensor([1.0, 2.0, 5.0])))
        >>> round(operator_spectrum(operator, steps=3).lambda_max, 4)
        5.0
    """
    return _run(operator, LanczosOptions(**options), getattr(operator, "identity", {}))


def _run(
    operator: Operator,
    options: LanczosOptions,
    identity: Mapping[str, Any],
    world: World = World(),  # noqa: B008 (frozen)
) -> Spectrum:
    began = time.perf_counter()
    run = lanczos(operator, options, identity=identity, world=world)
    return Spectrum(
        alpha=run.alpha,
        beta=run.beta,
        order=run.order,
        dimension=operator.shape[0],
        eps=torch.finfo(operator.dtype).eps,
        asymmetry=run.asymmetry,
        settings={
            "steps": options.steps,
            "probe_indices": list(options.indices),
            "seed": options.seed,
            "dtype": str(operator.dtype).removeprefix("torch."),
            "device": str(operator.device),
            "backend": backend_of(operator.device),
            "reorthogonalize": options.reorthogonalize,
            "tolerance": options.tolerance,
            "seconds": time.perf_counter() - began,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
    )
