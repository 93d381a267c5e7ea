"""Spectra of a model's loss, of each class, group or layer, and of any operator."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from fastsam.curvature.data import DATA_MEMORY, read_batches
from fastsam.curvature.isolation import undisturbed
from fastsam.curvature.lanczos import LanczosSettings, Reorthogonalize, lanczos
from fastsam.curvature.losses import BatchLoss, LossFunction
from fastsam.curvature.operators import Operator
from fastsam.curvature.planning import Measurements
from fastsam.curvature.prepared import prepared_run
from fastsam.curvature.sharding import gather_probes
from fastsam.curvature.spectrum import Spectrum
from fastsam.kernels.backends import backend_of, widened

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastsam.curvature.options import LanczosOptions, SpectrumOptions

GroupName = TypeVar("GroupName", bound=Hashable)


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
    reorthogonalize: Reorthogonalize = "full",
    strategy: str = "auto",
    curvature: str = "hessian",
    tolerance: float | None = None,
    basis: str | Path = "device",
    checkpoint: str | Path | None = None,
    checkpoint_interval: float = 60.0,
    memory_limit: int | None = None,
    micro_batch: int | None = None,
    freeze: int | None = None,
    verify_data: bool = True,
    data_memory: int = DATA_MEMORY,
    shard: str | None = None,
    measurements: Measurements | None = None,
    probe_indices: range | None = None,
    progress: bool = True,
    description: str = "Lanczos",
) -> Spectrum:
    """Compute the spectrum of the Hessian of a model's mean loss, with one batched Lanczos run.

    The operator is the Hessian of (sum of losses) / (sum of weights) over all of ``data``, with the
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
        steps: number of Lanczos steps, at least 1; never more than the number of parameters n. The
            extreme eigenvalues converge first. Default 80.
        probes: number of independent random start vectors, advanced together. Default 1.
        params: names of parameters or layers. Default None: all that require a gradient.
        dtype: dtype of weights, data and vectors: torch.float32 or torch.float64. Default None: that
            of the parameters, at least float32.
        seed: seed of the probes, which it determines on every device.
        reorthogonalize: ``"full"`` (default) or ``"none"``; see
            :class:`fastsam.curvature.lanczos.LanczosSettings`.
        strategy: method for the products, one of :data:`fastsam.curvature.products.STRATEGIES`.
            Default ``"auto"``: the fastest by predicted time among those that fit in memory and agree
            with the kept graph. ``Spectrum.settings`` records the choice, which is the only source
            of rounding differences between equal calls.
        curvature: ``"hessian"`` (default), ``"gauss-newton"``, ``"fisher"`` or ``"fisher-mc"``; see
            :data:`fastsam.curvature.factored.CURVATURES`.
        tolerance: stop early when the Ritz residuals of both extremes are at most ``tolerance *
            ||T||``. Default None: make all steps.
        basis: location of the basis: ``"device"`` (default), ``"host"``, or a ``pathlib.Path`` of a
            folder for a memory-mapped file.
        checkpoint: folder for checkpoints. A run found there is resumed, with bitwise equal results.
        checkpoint_interval: seconds between two checkpoints; 0 writes one after every step. Default
            60.
        memory_limit: bytes that the run may use on its device. Default None: 80 % of free memory.
        micro_batch: maximum number of samples in one pass; larger batches are split. Default None:
            split only if memory requires it.
        freeze: number of copies of every sample to hold in memory, for a loader whose samples change
            at every read.
        verify_data: whether to compare two reads of the data, and the operator with its transpose.
            With False, the data is read again at every product. With random augmentation the result
            is then *wrong*: noise makes the Ritz values symmetric about 0.
        data_memory: bytes of batches that may be held in main memory; the batches of a larger loader
            are read at every product. Default 2 GiB.
        probe_indices: indices of the seed's probes to run. Default None: the first ``probes``. Runs
            with different indices can be merged.
        shard: under torchrun, ``"samples"`` splits every batch over the ranks and ``"probes"`` splits
            the probes. Every rank passes the whole data and gets the whole spectrum.
        measurements: object to share between calls with the same model and loss, so that the
            measurements for the choice of the strategy are made once. Runs over classes and groups
            share one.
        progress: show progress: a bar on a terminal, one line per minute elsewhere.
        description: label of the progress bar.

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
    with prepared_run(
        model,
        loss_fn,
        data,
        steps=steps,
        probes=probes,
        params=params,
        dtype=dtype,
        seed=seed,
        reorthogonalize=reorthogonalize,
        strategy=strategy,
        curvature=curvature,
        tolerance=tolerance,
        basis=basis,
        checkpoint=checkpoint,
        checkpoint_interval=checkpoint_interval,
        memory_limit=memory_limit,
        micro_batch=micro_batch,
        freeze=freeze,
        verify_data=verify_data,
        data_memory=data_memory,
        shard=shard,
        measurements=measurements,
        probe_indices=probe_indices,
        progress=progress,
        description=description,
    ) as run:
        operator = run.operator
        spectrum = _run(operator, run.settings, operator.identity)
    if shard == "probes":
        spectrum = gather_probes(spectrum, run.world)
    return replace(
        spectrum,
        loss=operator.loss,
        gradient_norm=float(widened(operator.gradient).norm()),
        weight_norm=operator.weight_norm,
        weight=operator.weight,
        settings={
            **spectrum.settings,
            "curvature": curvature,
            "params": operator.params,
            "strategy": operator.strategy,
            "micro_batch": operator.micro_batch,
            "cuda_graph": operator.replayed,
            "predicted_bytes": operator.predicted_bytes,
            "predicted_seconds": operator.predicted_seconds,
            "samples": run.batches.samples,
            "data_fingerprint": run.batches.fingerprint,
            "data_verified": run.batches.fingerprint is not None,
            "freeze": freeze,
            "shard": shard,
            "world_size": run.world.world_size,
        },
    )


def class_spectra(
    model: nn.Module,
    loss_fn: LossFunction | BatchLoss,
    dataset: Dataset[Any] | DataLoader[Any] | tuple[Tensor, Tensor],
    classes: Iterable[int] | None = None,
    *,
    targets: Sequence[int] | Tensor | None = None,
    batch_size: int = 256,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    **options: Unpack[SpectrumOptions],
) -> dict[int, Spectrum]:
    """Compute the spectrum of the mean loss of each class.

    The Hessians H_c of the classes add up to that of the whole loss: ``sum(W_c H_c) / W = H``, with
    W_c the sum of the weights of a class's samples.

    Args:
        model: as in :func:`spectral_density`.
        loss_fn: as in :func:`spectral_density`. A class weight cancels in the mean of its class.
        dataset: a map-style dataset of ``(input, target)`` samples, a ``DataLoader`` over one, or a
            pair of tensors ``(inputs, targets)``.
        classes: classes to compute. Default None: all that occur, in ascending order.
        targets: the class of every sample. Default None: taken from the dataset (``TensorDataset``,
            ``Subset``, an attribute ``targets`` of the right length, else by reading every sample
            once).
        batch_size: number of samples in a batch. Default 256.
        collate_fn: as in ``DataLoader``.
        **options: as in :func:`spectral_density`; ``checkpoint`` gets a subfolder per class.

    Returns:
        The spectra by class.

    Raises:
        ValueError: a class has no sample; otherwise as in :func:`spectral_density`.

    Example:
        >>> inputs, targets = torch.randn(8, 3), torch.arange(8) % 2
        >>> model, criterion = nn.Linear(3, 2), nn.CrossEntropyLoss()
        >>> spectra = class_spectra(model, criterion, (inputs, targets), steps=4)
        >>> sorted(spectra)
        [0, 1]
    """
    labels = _class_of_samples(_as_dataset(dataset), targets)
    chosen = np.unique(labels).tolist() if classes is None else [int(label) for label in classes]
    return group_spectra(
        model,
        loss_fn,
        dataset,
        {label: [label] for label in chosen},
        targets=torch.from_numpy(labels),
        batch_size=batch_size,
        collate_fn=collate_fn,
        **options,
    )


def group_spectra(
    model: nn.Module,
    loss_fn: LossFunction | BatchLoss,
    dataset: Dataset[Any] | DataLoader[Any] | tuple[Tensor, Tensor],
    groups: Mapping[GroupName, Iterable[int]],
    *,
    targets: Sequence[int] | Tensor | None = None,
    batch_size: int = 256,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    **options: Unpack[SpectrumOptions],
) -> dict[GroupName, Spectrum]:
    """Compute the spectrum of the mean loss of each group of classes, such as head, mid and tail.

    Args:
        model: as in :func:`spectral_density`.
        loss_fn: as in :func:`spectral_density`.
        dataset: as in :func:`class_spectra`.
        groups: the classes of each group, by the group's name.
        targets: as in :func:`class_spectra`.
        batch_size: as in :func:`class_spectra`.
        collate_fn: as in :func:`class_spectra`.
        **options: as in :func:`spectral_density`; ``checkpoint`` gets a subfolder per group.

    Returns:
        The spectra by name of the group.

    Raises:
        ValueError: a class has no sample; otherwise as in :func:`spectral_density`.

    Example:
        >>> data = torch.randn(8, 3), torch.arange(8) % 4
        >>> groups = {"head": [0, 1], "tail": [2, 3]}
        >>> spectra = group_spectra(nn.Linear(3, 4), nn.CrossEntropyLoss(), data, groups, steps=4)
        >>> list(spectra)
        ['head', 'tail']
    """
    samples = _as_dataset(dataset)
    if collate_fn is None and isinstance(dataset, DataLoader):
        collate_fn = dataset.collate_fn
    labels = _class_of_samples(samples, targets)
    members = {name: [int(label) for label in classes] for name, classes in groups.items()}
    present = np.unique(labels).tolist()
    for label in (label for classes in members.values() for label in classes):
        if label not in present:
            raise ValueError(
                f"class {label} has no sample in the dataset; choose among the classes {present}"
            )
    rest: dict[str, Any] = {**options}
    folder = rest.pop("checkpoint", None)
    rest.pop("description", None)
    rest.setdefault("measurements", Measurements())
    spectra = {}
    for name, classes in members.items():
        subset = Subset(samples, np.flatnonzero(np.isin(labels, classes)).tolist())
        loader: DataLoader[Any] = DataLoader(subset, batch_size=batch_size, collate_fn=collate_fn)
        spectra[name] = spectral_density(
            model,
            loss_fn,
            loader,
            description=f"class {name}" if classes == [name] else str(name),
            checkpoint=None if folder is None else Path(folder) / f"group-{name}",
            **rest,
        )
    return spectra


def layer_spectra(
    model: nn.Module,
    loss_fn: LossFunction | BatchLoss,
    data: Any,
    layers: Iterable[str] | None = None,
    **options: Unpack[SpectrumOptions],
) -> dict[str, Spectrum]:
    """Compute the spectrum of each layer's diagonal block of the Hessian.

    Args:
        model: as in :func:`spectral_density`.
        loss_fn: as in :func:`spectral_density`.
        data: as in :func:`spectral_density`.
        layers: names of modules or parameters. Default None: every module that directly has a
            parameter that requires a gradient.
        **options: as in :func:`spectral_density`, without ``params``; ``checkpoint`` gets a
            subfolder per layer.

    Returns:
        The spectra by name of the layer.

    Raises:
        ValueError: ``params`` is passed; otherwise as in :func:`spectral_density`.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> list(layer_spectra(model, nn.CrossEntropyLoss(), batch, steps=4))
        ['0', '2']
    """
    if "params" in options:
        raise ValueError("layer_spectra does not accept params=; pass the names as layers=")
    selections: dict[str, list[str]] = {}
    if layers is None:
        for name, value in model.named_parameters():
            if value.requires_grad:
                selections.setdefault(name.rpartition(".")[0] or name, []).append(name)
    else:
        selections = {layer: [layer] for layer in layers}
    rest: dict[str, Any] = {**options}
    folder = rest.pop("checkpoint", None)
    rest.pop("description", None)
    with undisturbed(model):  # read once for all layers: an iterator cannot be read again
        batches = read_batches(
            data,
            freeze=options.get("freeze"),
            verify=options.get("verify_data", True),
            memory_limit=options.get("data_memory", DATA_MEMORY),
        )
    return {
        layer: spectral_density(
            model,
            loss_fn,
            batches,
            params=names,
            description=layer,
            checkpoint=None if folder is None else Path(folder) / f"layer-{layer}",
            **rest,
        )
        for layer, names in selections.items()
    }


def operator_spectrum(operator: Operator, **options: Unpack[LanczosOptions]) -> Spectrum:
    """Compute the spectrum of any symmetric operator.

    Args:
        operator: an object with ``shape``, ``dtype``, ``device`` and ``matmat``; see
            :class:`Operator`.
        **options: see :class:`fastsam.curvature.lanczos.LanczosSettings`.

    Raises:
        ValueError: an option is invalid, or the basis does not fit in memory.
        FloatingPointError: a product contains NaN or infinity.

    Example:
        >>> from fastsam.curvature import MatrixOperator
        >>> operator = MatrixOperator(torch.diag(torch.tensor([1.0, 2.0, 5.0])))
        >>> round(operator_spectrum(operator, steps=3).lambda_max, 4)
        5.0
    """
    return _run(operator, LanczosSettings(**options), getattr(operator, "identity", {}))


def _run(operator: Operator, settings: LanczosSettings, identity: Mapping[str, Any]) -> Spectrum:
    began = time.perf_counter()
    with lanczos(operator, settings, identity=identity) as run:
        return Spectrum(
            alpha=run.alpha,
            beta=run.beta,
            order=run.order,
            dimension=operator.shape[0],
            eps=torch.finfo(operator.dtype).eps,
            settings={
                "steps": settings.steps,
                "probe_indices": list(settings.indices),
                "seed": settings.seed,
                "dtype": str(operator.dtype).removeprefix("torch."),
                "device": str(operator.device),
                "backend": backend_of(operator.device),
                "reorthogonalize": settings.reorthogonalize,
                "tolerance": settings.tolerance,
                "seconds": time.perf_counter() - began,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            },
        )


def _as_dataset(dataset: Any) -> Any:
    if isinstance(dataset, DataLoader):
        dataset = dataset.dataset
    if isinstance(dataset, (tuple, list)) and all(isinstance(part, Tensor) for part in dataset):
        return TensorDataset(*dataset)
    no_samples = isinstance(dataset, (tuple, list, dict, Tensor))
    if not no_samples and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return dataset
    raise TypeError(
        "spectra of classes require samples that can be indexed: expected a map-style dataset of (input, "
        f"target), a DataLoader over one, or a pair of tensors, got {type(dataset).__name__}"
    )


def _class_of_samples(dataset: Any, targets: Any) -> NDArray[Any]:
    if targets is None:
        targets = _find_targets(dataset)
    labels = targets.cpu().numpy() if isinstance(targets, Tensor) else np.asarray(targets)
    if labels.ndim != 1 or len(labels) != len(dataset):
        raise ValueError(
            f"targets must have one class per sample: expected shape ({len(dataset)},), "
            f"got {labels.shape}"
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
    labels = []
    for index in range(len(dataset)):
        sample = dataset[index]
        try:
            labels.append(int(sample[1]))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"sample {index} of the dataset is a {type(sample).__name__}, not a pair (input, "
                "target) with an integer class; pass the class of every sample, such as "
                "targets=[sample['label'] for sample in dataset]"
            ) from error
    return labels
