"""Spectra of classes, of groups of classes and of layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from fastsam.curvature.api import spectral_density
from fastsam.curvature.data import DATA_MEMORY, read_batches
from fastsam.curvature.isolation import undisturbed
from fastsam.curvature.losses import BatchLoss, LossFunction, OutputLoss, unwrapped
from fastsam.curvature.products.planning import Measurements
from fastsam.curvature.spectrum import Spectrum

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastsam.curvature.options import SpectrumKeywords


GroupName = TypeVar("GroupName", bound=Hashable)


def class_spectra(
    model: nn.Module,
    loss_fn: LossFunction | OutputLoss | BatchLoss,
    dataset: Dataset[Any] | DataLoader[Any] | tuple[Tensor, Tensor],
    classes: Iterable[int] | None = None,
    *,
    targets: Sequence[int] | Tensor | None = None,
    batch_size: int = 256,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    **options: Unpack[SpectrumKeywords],
) -> dict[int, Spectrum]:
    """Compute the spectrum of the mean loss of each class.

    The Hessians H_c of the classes add up to that of the whole loss: ``sum(W_c H_c) / W = H``, with
    W_c the sum of the weights of a class's samples.

    Args:
        model: as in :func:`spectral_density`.
        loss_fn: as in :func:`spectral_density`. A class weight cancels in the mean of its class.
        dataset: a map-style dataset of ``(input, target)`` samples, a pair of tensors ``(inputs,
            targets)``, or a ``DataLoader`` that reads each sample of such a dataset once.
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
        ValueError: a class has no sample, the targets are not integers, or the loader does not read
            each sample once; otherwise as in :func:`spectral_density`.

    Example:
        >>> inputs, targets = torch.randn(8, 3), torch.arange(8) % 2
        >>> model, criterion = nn.Linear(3, 2), nn.CrossEntropyLoss()
        >>> spectra = class_spectra(model, criterion, (inputs, targets), steps=4)
        >>> sorted(spectra)
        [0, 1]
    """
    labels = _class_of_samples(_as_dataset(dataset), targets)
    chosen = (
        np.unique(labels).tolist() if classes is None else [_as_class(label) for label in classes]
    )
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
    loss_fn: LossFunction | OutputLoss | BatchLoss,
    dataset: Dataset[Any] | DataLoader[Any] | tuple[Tensor, Tensor],
    groups: Mapping[GroupName, Iterable[int]],
    *,
    targets: Sequence[int] | Tensor | None = None,
    batch_size: int = 256,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    **options: Unpack[SpectrumKeywords],
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
        ValueError: as in :func:`class_spectra`.

    Example:
        >>> data = torch.randn(8, 3), torch.arange(8) % 4
        >>> groups = {"head": [0, 1], "tail": [2, 3]}
        >>> spectra = group_spectra(nn.Linear(3, 4), nn.CrossEntropyLoss(), data, groups, steps=4)
        >>> list(spectra)
        ['head', 'tail']
    """
    members = {name: [_as_class(label) for label in classes] for name, classes in groups.items()}
    loaders = group_loaders(
        dataset, members, targets=targets, batch_size=batch_size, collate_fn=collate_fn
    )
    rest: dict[str, Any] = {**options}
    folder = rest.pop("checkpoint", None)
    rest.pop("description", None)
    rest.setdefault("measurements", Measurements())
    return {
        name: spectral_density(
            model,
            loss_fn,
            loader,
            description=f"class {name}" if members[name] == [name] else str(name),
            checkpoint=None if folder is None else Path(folder) / f"group-{name}",
            **rest,
        )
        for name, loader in loaders.items()
    }


def layer_spectra(
    model: nn.Module,
    loss_fn: LossFunction | OutputLoss | BatchLoss,
    data: Any,
    layers: Iterable[str] | None = None,
    **options: Unpack[SpectrumKeywords],
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
        for name, value in unwrapped(model).named_parameters():
            if value.requires_grad:
                selections.setdefault(name.rpartition(".")[0] or name, []).append(name)
    else:
        names = [layers] if isinstance(layers, str) else layers
        selections = {layer: [layer] for layer in names}
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


def group_loaders(
    dataset: Dataset[Any] | DataLoader[Any] | tuple[Tensor, Tensor],
    groups: Mapping[GroupName, Iterable[int]],
    *,
    targets: Sequence[int] | Tensor | None = None,
    batch_size: int = 256,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    most_samples: int | None = None,
    seed: int = 0,
) -> dict[GroupName, DataLoader[Any]]:
    """Return a loader of the samples of each group of classes, in their order in the dataset.

    Args:
        dataset: as in :func:`class_spectra`.
        groups: the classes of each group, by the group's name.
        targets: as in :func:`class_spectra`.
        batch_size: as in :func:`class_spectra`.
        collate_fn: as in :func:`class_spectra`.
        most_samples: number of samples to which a larger group is reduced. Default None: all.
        seed: seed of the choice of these samples.

    Raises:
        ValueError: a class has no sample, or the loader does not read each sample once.
    """
    samples = _as_dataset(dataset)
    if collate_fn is None and isinstance(dataset, DataLoader):
        collate_fn = dataset.collate_fn
    labels = _class_of_samples(samples, targets)
    present = np.unique(labels).tolist()
    loaders = {}
    for name, classes in groups.items():
        classes = list(classes)
        for label in classes:
            if label not in present:
                raise ValueError(
                    f"class {label} has no sample in the dataset; choose among the classes {present}"
                )
        chosen = np.flatnonzero(np.isin(labels, classes))
        if most_samples is not None and len(chosen) > most_samples:
            drawn = np.random.default_rng(seed).choice(chosen, most_samples, replace=False)
            chosen = np.sort(drawn)
        subset = Subset(samples, chosen.tolist())
        loaders[name] = DataLoader(subset, batch_size=batch_size, collate_fn=collate_fn)
    return loaders


def _as_dataset(dataset: Any) -> Any:
    loader = dataset if isinstance(dataset, DataLoader) else None
    if loader is not None:
        dataset = loader.dataset
    if isinstance(dataset, (tuple, list)) and all(isinstance(part, Tensor) for part in dataset):
        return TensorDataset(*dataset)
    no_samples = isinstance(dataset, (tuple, list, dict, Tensor))
    if not no_samples and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        if loader is not None:
            _refuse_partial(loader, len(dataset))
        return dataset
    raise TypeError(
        "spectra of classes require samples that can be indexed: expected a map-style dataset of (input, "
        f"target), a DataLoader over one, or a pair of tensors, got {type(dataset).__name__}"
    )


def _refuse_partial(loader: DataLoader[Any], samples: int) -> None:
    """Refuse a loader that may not read every sample of its dataset once.

    The samples of a class are chosen from the dataset, so a sampler would have no effect.
    """
    batches: Any = loader.batch_sampler
    custom = batches is not None and type(batches) is not BatchSampler
    sampler: Any = loader.sampler if batches is None else getattr(batches, "sampler", None)
    ordered = type(sampler) is SequentialSampler
    shuffled = type(sampler) is RandomSampler and not sampler.replacement
    if custom:
        problem = f"a {type(batches).__name__} as batch_sampler"
    elif not (ordered or shuffled) or len(sampler) != samples:
        problem = f"a {type(sampler).__name__} as sampler"
    elif batches is not None and batches.drop_last and samples % batches.batch_size:
        problem = f"drop_last=True, which leaves {samples % batches.batch_size} samples out"
    else:
        return
    raise ValueError(
        f"spectra of classes require a DataLoader that reads each of its {samples} samples once, got "
        f"one with {problem}; pass the dataset, or torch.utils.data.Subset(dataset, indices) for some "
        "of its samples"
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
    try:
        with np.errstate(invalid="ignore"):
            classes = labels.astype(np.int64)
        wrong = labels[classes != labels]
    except (TypeError, ValueError):  # strings and other objects
        wrong = labels
    if len(wrong):
        raise ValueError(
            f"the targets must be integers, the classes of the samples, got {wrong[0]!r}; pass the "
            "class of every sample with targets="
        )
    return classes


def _find_targets(dataset: Any) -> Any:
    if isinstance(dataset, Subset):
        parent = np.asarray(_find_targets(dataset.dataset))
        return parent[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, TensorDataset):
        if len(dataset.tensors) != 2:
            raise ValueError(
                f"the dataset has {len(dataset.tensors)} tensors, expected (inputs, targets); pass the "
                "class of every sample with targets="
            )
        return dataset.tensors[1]
    known = getattr(dataset, "targets", None)
    if known is not None and len(known) == len(dataset):
        return known
    labels = []
    for index in range(len(dataset)):
        sample = dataset[index]
        try:
            labels.append(_as_class(sample[1]))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"sample {index} of the dataset is a {type(sample).__name__}, not a pair (input, "
                "target) with an integer class; pass the class of every sample, such as "
                "targets=[sample['label'] for sample in dataset]"
            ) from error
    return labels


def _as_class(label: Any) -> int:
    if int(label) != label:
        raise ValueError(f"expected integers as classes, got {label}")
    return int(label)
