"""The calls most people need: the spectrum of a model's loss, of each class, or of any operator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from typing_extensions import Unpack

from fastsam.curvature.data import read_batches
from fastsam.curvature.hessian import HessianOperator
from fastsam.curvature.isolation import undisturbed
from fastsam.curvature.lanczos import REORTHOGONALIZE, lanczos, sphere_probes
from fastsam.curvature.losses import BatchLoss, LossFunction
from fastsam.curvature.operators import Operator
from fastsam.curvature.products import STRATEGIES
from fastsam.curvature.spectrum import Spectrum


def spectral_density(
    model: nn.Module,
    loss_fn: LossFunction | BatchLoss,
    data: Any,
    *,
    steps: int = 80,
    probes: int = 1,
    params: Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    reorthogonalize: str = "full",
    strategy: str = "auto",
    freeze: int | None = None,
    verify_data: bool = True,
    progress: bool = True,
    description: str = "Lanczos",
) -> Spectrum:
    """Spectrum of the Hessian of a model's mean loss, from one batched Lanczos run.

    The operator is the Hessian of (sum of losses) / (sum of weights) over all of ``data``, with the
    model in evaluation mode. Model, gradients and random state are afterwards as they were before,
    whatever happens.

    Args:
        model: any module; its parameters must be on one device.
        loss_fn: a criterion ``loss_fn(outputs, targets)`` with mean reduction.
            ``nn.CrossEntropyLoss`` and ``nn.NLLLoss`` are recognised with their class weights,
            ``ignore_index`` and any reduction. Anything else is a :class:`BatchLoss`.
        data: one batch (a tuple, a dict, or a list that begins with a tensor) or an iterable of
            batches, such as a ``DataLoader``. An iterable is read twice first: a new order of the
            samples is accepted, samples that change are refused. A one-shot iterator is held in
            memory.
        steps: Lanczos steps, at least 1; at most n are taken. The extremes converge first.
        probes: independent random start vectors, advanced together.
        params: names of parameters or layers; None for all that require a gradient.
        dtype: torch.float32 or torch.float64, of weights, data and vectors; None for that of the
            parameters, at least float32.
        seed: of the probes. Same seed, same probes, on every device.
        reorthogonalize: ``"full"`` or ``"none"``; see :func:`fastsam.curvature.lanczos.lanczos`.
        strategy: how Hessian-vector products are computed; ``"auto"`` chooses, and the choice is
            recorded in ``Spectrum.settings``.
        freeze: hold this many draws of every sample of a loader whose samples change.
        verify_data: False skips the comparison and reads the data anew at every product. With
            re-drawn augmentation the result is then *wrong*: noise makes the Ritz values symmetric
            about 0.
        progress: show a progress bar on a terminal.
        description: its label.

    Raises:
        TypeError, ValueError: arguments, data or a loss that cannot be used; the message says what
            to do.
        FloatingPointError: a product held NaN or infinity.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> spectral_density(model, nn.CrossEntropyLoss(), batch, steps=4).dimension
        8
    """
    _check(steps, probes, reorthogonalize, strategy)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    with undisturbed(model):
        batches = read_batches(data, freeze=freeze, verify=verify_data)
        operator = HessianOperator(
            model, loss_fn, batches, params=params, dtype=dtype, strategy=strategy
        )
        spectrum = operator_spectrum(
            operator,
            steps=steps,
            probes=probes,
            seed=seed,
            reorthogonalize=reorthogonalize,
            progress=progress,
            description=description,
        )
    return Spectrum(
        alpha=spectrum.alpha,
        beta=spectrum.beta,
        order=spectrum.order,
        dimension=spectrum.dimension,
        eps=spectrum.eps,
        loss=operator.loss,
        gradient_norm=operator.gradient_norm,
        weight_norm=operator.weight_norm,
        weight=operator.weight,
        settings={
            **spectrum.settings,
            "strategy": operator.strategy,
            "samples": batches.samples,
            "data_fingerprint": batches.fingerprint,
            "data_verified": batches.fingerprint is not None,
            "freeze": freeze,
        },
    )


class SpectrumOptions(TypedDict, total=False):
    """The options of :func:`spectral_density` that :func:`class_spectra` passes on."""

    steps: int
    probes: int
    params: Iterable[str] | None
    dtype: torch.dtype | None
    seed: int
    reorthogonalize: str
    strategy: str
    freeze: int | None
    verify_data: bool
    progress: bool


def class_spectra(
    model: nn.Module,
    loss_fn: LossFunction | BatchLoss,
    dataset: Dataset[Any] | tuple[Tensor, Tensor],
    classes: Iterable[int] | None = None,
    *,
    targets: Sequence[int] | Tensor | None = None,
    batch_size: int = 256,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    **options: Unpack[SpectrumOptions],
) -> dict[int, Spectrum]:
    """Spectrum of each class's own mean loss: class Hessians add up, ``sum(W_c H_c) / W = H``.

    Args:
        model: as in :func:`spectral_density`.
        loss_fn: likewise; with class weights, the weights of a single class cancel in its mean.
        dataset: a map-style dataset of ``(input, target)`` samples, or a pair of tensors ``(inputs,
            targets)``.
        classes: which classes; None for all that occur, in ascending order.
        targets: the class of every sample; None to take it from the dataset (``TensorDataset``,
            ``Subset``, an attribute ``targets`` of the right length, else by reading every sample
            once).
        batch_size: samples in one pass.
        collate_fn: as for ``DataLoader``.
        **options: as in :func:`spectral_density`.

    Raises:
        ValueError: a class with no sample; otherwise as :func:`spectral_density`.

    Example:
        >>> inputs, targets = torch.randn(8, 3), torch.arange(8) % 2
        >>> spectra = class_spectra(nn.Linear(3, 2), nn.CrossEntropyLoss(), (inputs, targets),
        steps=4) >>> sorted(spectra)
        [0, 1]
    """
    if isinstance(dataset, (tuple, list)):
        dataset = TensorDataset(*dataset)
    labels = _class_of_samples(dataset, targets)
    present = np.unique(labels)
    chosen = present.tolist() if classes is None else [int(label) for label in classes]
    missing = [label for label in chosen if label not in present]
    if missing:
        raise ValueError(
            f"class {missing[0]} has no sample in the dataset; classes present: {present.tolist()}"
        )
    spectra = {}
    for label in chosen:
        subset = Subset(dataset, np.flatnonzero(labels == label).tolist())
        loader: DataLoader[Any] = DataLoader(subset, batch_size=batch_size, collate_fn=collate_fn)
        spectra[label] = spectral_density(
            model, loss_fn, loader, description=f"class {label}", **options
        )
    return spectra


def operator_spectrum(
    operator: Operator,
    *,
    steps: int = 80,
    probes: int = 1,
    seed: int = 0,
    reorthogonalize: str = "full",
    progress: bool = True,
    description: str = "Lanczos",
) -> Spectrum:
    """Spectrum of any symmetric operator; arguments as in :func:`spectral_density`.

    Example:
        >>> from fastsam.curvature import MatrixOperator
        >>> operator = MatrixOperator(torch.diag(torch.tensor([1.0, 2.0, 5.0])))
        >>> round(operator_spectrum(operator, steps=3).lambda_max, 4)
        5.0
    """
    _check(steps, probes, reorthogonalize, "auto")
    dimension = operator.shape[0]
    began = time.perf_counter()
    start = sphere_probes(
        dimension, range(probes), seed=seed, dtype=operator.dtype, device=operator.device
    )
    matrices = lanczos(
        operator,
        start,
        steps=min(steps, dimension),
        reorthogonalize=reorthogonalize,
        progress=progress,
        description=description,
    )
    return Spectrum(
        alpha=matrices.alpha,
        beta=matrices.beta,
        order=matrices.order,
        dimension=dimension,
        eps=torch.finfo(operator.dtype).eps,
        settings={
            "steps": steps,
            "probe_indices": list(range(probes)),
            "seed": seed,
            "dtype": str(operator.dtype).removeprefix("torch."),
            "device": str(operator.device),
            "reorthogonalize": reorthogonalize,
            "seconds": time.perf_counter() - began,
            "torch": torch.__version__,
        },
    )


def _check(steps: int, probes: int, reorthogonalize: str, strategy: str) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    if reorthogonalize not in REORTHOGONALIZE:
        raise ValueError(
            f"reorthogonalize must be one of {', '.join(REORTHOGONALIZE)}, got {reorthogonalize!r}"
        )
    if strategy != "auto" and strategy not in STRATEGIES:
        raise ValueError(
            f"strategy must be 'auto' or one of {', '.join(STRATEGIES)}, got {strategy!r}"
        )


def _class_of_samples(dataset: Any, targets: Any) -> np.ndarray[Any, Any]:
    if targets is None:
        targets = _find_targets(dataset)
    labels = targets.cpu().numpy() if isinstance(targets, Tensor) else np.asarray(targets)
    if labels.ndim != 1 or len(labels) != len(dataset):
        raise ValueError(
            f"targets must hold one class per sample: expected shape ({len(dataset)},), got "
            f"{labels.shape}"
        )
    return labels


def _find_targets(dataset: Any) -> Any:
    if isinstance(dataset, Subset):
        parent = np.asarray(_find_targets(dataset.dataset))
        return parent[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[-1]
    known = getattr(dataset, "targets", None)
    if known is not None and len(known) == len(dataset):
        return known
    return [int(dataset[index][1]) for index in range(len(dataset))]
