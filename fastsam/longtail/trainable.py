"""Which parameters of a network are trained, and the parameter groups of its optimizer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fastsam.longtail.config import TrainConfig
from fastsam.longtail.errors import UsageError
from fastsam.longtail.models.blocks import layer_depths
from fastsam.longtail.models.classifier import Classifier
from fastsam.longtail.tunings import TUNINGS
from fastsam.optim.batch_norm import batch_norm_layers

VECTORS = "vectors"
"""Word in ``no_decay`` for the parameters with at most one dimension."""


def freeze(network: Classifier, config: TrainConfig) -> None:
    """Exclude the parameters from training that the settings freeze, and set the batch normalization.

    Call it before the optimizer is built and the network is wrapped or sharded.

    Args:
        network: the network, which is changed in place.
        config: settings of the run.

    Raises:
        UsageError: if a pattern matches no parameter, no parameter would be trained, the tuning does not fit
            the network, or ``batch_norm`` is ``statistics`` and the network has no batch normalization.
    """
    parameters = dict(network.named_parameters())
    frozen = {name for p in config.freeze for name in matching_names("freeze", p, parameters)}
    tuned = TUNINGS[config.tune].trained
    if tuned is not None:
        kept = {f"features.{name}" for name in tuned(network.features)}
        frozen |= {n for n in parameters if n.startswith("features.") and n not in kept}
    if config.batch_norm != "train":
        norms = {id(value) for layer in batch_norm_layers(network) for value in layer.parameters()}
        if not norms and config.batch_norm == "statistics":
            raise UsageError(
                f"batch_norm {config.batch_norm} requires batch normalization, but {config.model} has none; "
                "omit batch_norm"
            )
        frozen |= {name for name, value in parameters.items() if id(value) in norms}
    network.batch_norm = config.batch_norm
    network.frozen = frozenset(frozen)
    for name in frozen:
        parameters[name].requires_grad_(False)
    if not any(value.requires_grad for value in parameters.values()):
        tuning = "" if tuned is None else f" with tune {config.tune}"
        raise UsageError(
            f"freeze {' '.join(config.freeze)}{tuning} leaves no parameter to train; freeze fewer, for "
            "instance only 'features.*'"
        )


def trained_count(network: Classifier) -> str:
    """Describe how many parameters are trained, for instance ``trains 85 of 650 parameters``."""
    sizes = [(value.numel(), value.requires_grad) for value in network.parameters()]
    trained = sum(size for size, requires_grad in sizes if requires_grad)
    return f"trains {trained:,} of {sum(size for size, _ in sizes):,} parameters"


def trained_parameters(
    network: Classifier, config: TrainConfig
) -> list[tuple[str, Tensor]] | list[dict[str, Any]]:
    """Return the parameters to train by name, or parameter groups of them.

    The groups differ in the factor on the learning rate, ``lr_scale``, and in whether they have weight decay.
    There are none if all parameters have factor 1 and weight decay.

    Args:
        network: the network, after :func:`freeze`.
        config: settings of the run.

    Raises:
        UsageError: if a pattern matches no trained parameter, or is not valid.
    """
    trained: dict[str, Tensor] = {
        name: value for name, value in network.named_parameters() if value.requires_grad
    }
    scales = _scales(network, config, trained)
    spared = {name for p in config.no_decay for name in _without_decay(p, trained)}
    if not spared and all(scale == 1 for scale in scales.values()):
        return list(trained.items())
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, value in trained.items():
        key = scales[name], name in spared
        if key not in groups:
            groups[key] = {
                "params": [],
                "lr": config.lr * scales[name],
                "lr_scale": scales[name],
                "weight_decay": 0.0 if name in spared else config.weight_decay,
            }
        groups[key]["params"].append((name, value))
    return list(groups.values())


def set_options(optimizer: Optimizer, options: Mapping[str, float]) -> None:
    """Set options of all parameter groups; the learning rate is multiplied by a group's ``lr_scale``.

    Args:
        optimizer: the optimizer.
        options: values by name, with ``lr``.
    """
    for group in optimizer.param_groups:
        group.update(options)
        group["lr"] = options["lr"] * group.get("lr_scale", 1.0)


def _scales(network: Classifier, config: TrainConfig, trained: Iterable[str]) -> dict[str, float]:
    """Return the factor on the learning rate of each trained parameter."""
    scales = dict.fromkeys(trained, 1.0)
    if config.layer_decay != 1:
        depths = {f"features.{k}": depth for k, depth in layer_depths(network.features).items()}
        top = depths["features."]
        scales = {name: config.layer_decay ** (top - depths.get(name, top)) for name in scales}
    chosen: dict[str, float] = {}
    for setting in config.lr_scale:
        pattern, equals, text = setting.rpartition("=")
        try:
            factor = float(text)
        except ValueError:
            equals = ""
        if not equals or not pattern or not 0 < factor < float("inf"):
            raise UsageError(
                f"lr_scale must be PATTERN=FACTOR with a factor above 0, such as 'features.*=0.1', got "
                f"{setting!r}; to train no parameter of a pattern, use freeze"
            )
        chosen |= dict.fromkeys(matching_names("lr_scale", pattern, scales), factor)
    return {name: scale * chosen.get(name, 1.0) for name, scale in scales.items()}


def _without_decay(pattern: str, trained: Mapping[str, Tensor]) -> Collection[str]:
    if pattern == VECTORS:
        return [name for name, value in trained.items() if value.ndim <= 1]
    return matching_names("no_decay", pattern, trained)


def matching_names(setting: str, pattern: str, names: Collection[str]) -> list[str]:
    """Return the names that match a pattern.

    Raises:
        UsageError: if there are none; the message lists the parts of the network.
    """
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        parts = dict.fromkeys(".".join(name.split(".")[:3]) for name in names)
        shown = ", ".join(list(parts)[:12]) + (", ..." if len(parts) > 12 else "")
        raise UsageError(
            f"{setting} pattern {pattern!r} matches no parameter to train; the names begin with {shown}. "
            f"Write for instance '{next(iter(parts), 'features')}*'"
        )
    return found
