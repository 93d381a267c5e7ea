"""Weights from which the fresh network of a new run starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastsam.longtail.checkpoint import FORMAT, Checkpoint, weights_hash
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.errors import CheckpointError, UsageError
from fastsam.longtail.models import HEADS, MODELS
from fastsam.longtail.models.classifier import Classifier
from fastsam.longtail.models.pretrained import adapted_filters
from fastsam.longtail.weight_files import read_file, state_dict_in

_PREFIXES = ("", "features.", "features.network.")
"""Places of a network's weights in a :class:`Classifier`: all of it, or its feature extractor."""
_LINEAR = {"head.weight", "head.bias"}
"""Entries of a linear head."""


@dataclass(frozen=True, eq=False)
class Start:
    """Weights for the fresh network of a new run.

    Attributes:
        name: where they come from, for messages.
        weights: state dict with the names of the network, of its feature extractor, or of the network of a
            library in it.
        record: further entries of the record that checkpoints and results store.
        class_names: classes of the head among the weights; empty if they are unknown.
    """

    name: str
    weights: Mapping[str, Tensor]
    record: Mapping[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> Start:
        """Load the weights of a run, or of a file with a state dict.

        Args:
            path: folder of a run or checkpoint file, of which the evaluated weights are used; a file that
                ``torch.save`` wrote; or a ``.safetensors`` file.

        Raises:
            UsageError: if there is no such file.
            CheckpointError: if it is damaged or contains no state dict.
            ImportError: if safetensors is required and not installed.
        """
        path, name = Path(path), str(path)
        if path.is_dir():
            return cls.of_checkpoint(Checkpoint.load(path), name)
        content = read_file(path)
        if isinstance(content, dict) and content.get("format") == FORMAT:
            return cls.of_checkpoint(Checkpoint.from_dict(content, path), name)
        return cls(name, state_dict_in(content, path))

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, name: str) -> Start:
        """Return the evaluated weights of a checkpoint.

        Args:
            checkpoint: the checkpoint.
            name: where it comes from, for messages.
        """
        record = {"epoch": checkpoint.judged_epoch, "config": checkpoint.config.as_dict()}
        names = tuple(checkpoint.class_names)
        return cls(name, checkpoint.judged_weights(), record, names)


def configured_start(config: TrainConfig) -> Start | None:
    """Return the weights that the settings ``init`` or ``pretrained`` name; None if neither is set.

    Raises:
        UsageError: if both are set, or the weights are unknown or cannot be downloaded.
        CheckpointError: if a file is damaged.
    """
    if config.init is not None and config.pretrained is not None:
        raise UsageError(
            f"init {config.init} and pretrained {config.pretrained} both name the weights to start from; "
            "pass one of them"
        )
    if config.init is not None:
        return Start.load(config.init)
    if config.pretrained is None:
        return None
    read = MODELS[config.model].weights
    if read is None:
        raise AssertionError("only networks with pretrained weights have the setting")
    return Start(f"pretrained {config.pretrained}", read(config.parts["model"]))


def load_start(
    network: Classifier,
    start: Start,
    class_names: Sequence[str],
    *,
    keeps_head: bool = True,
    head: str = "linear",
) -> dict[str, Any]:
    """Load weights into a fresh network, which is changed in place.

    All weights of the feature extractor must be there, except for those that the tuning of the run adds.
    Weights of a head that does not fit are left out, and so are those of parts that the network does not
    have, such as the classifier of a library's network, and buffers that belong to one run.
    Filters of the first layer are adapted to the number of channels.

    Args:
        network: the network.
        start: the weights.
        class_names: classes of the data set.
        keeps_head: load the head too, if it fits.
        head: name of the network's head. It takes over the weights of a linear head if it can.

    Returns:
        The record of the start for checkpoints and results: ``name``, ``sha256`` of the weights, ``left_out``
        and ``fresh`` (names of weights that were not loaded, and entries of the network without one), and
        ``adapted`` (number of channels of filters that were adapted, by name).

    Raises:
        CheckpointError: if weights of the feature extractor are missing, too many, or of other shapes.
        UsageError: if the head among the weights belongs to other classes, and ``keeps_head``.
    """
    own = network.state_dict()
    given = _placed(start.weights, own)
    parts = {name for name in own if name.startswith("head.")}
    converts = head != "linear" and not parts.issuperset(_LINEAR)
    if converts and given.keys() >= _LINEAR:
        given, parts = _taken_over(given, head)
    if keeps_head and parts & given.keys():
        _check_classes(start, class_names)
    shared = own.keys() & given.keys() - {*network.run_buffers}
    fits = {name: _adapted(name, given[name], own[name], network) for name in shared}
    wrong = sorted(name for name, value in fits.items() if value.shape != own[name].shape)
    if not keeps_head or not parts <= fits.keys() or any(name in parts for name in wrong):
        fits = {name: value for name, value in fits.items() if not name.startswith("head.")}
        wrong = [name for name in wrong if not name.startswith("head.")]
    _check_fit(network, start, given, fits, wrong)
    network.load_state_dict(fits, strict=False)
    network.adopt(fits.keys())
    return {
        "name": start.name,
        "sha256": weights_hash(start.weights),
        **start.record,
        "left_out": sorted(given.keys() - fits.keys()),
        "fresh": sorted(name for name in own.keys() - fits.keys() if own[name].ndim),
        "adapted": {k: given[k].shape[1] for k, v in fits.items() if v.shape != given[k].shape},
    }


def _taken_over(given: dict[str, Tensor], head: str) -> tuple[dict[str, Tensor], set[str]]:
    """Return weights with those of a linear head as entries of another head, and the names of these.

    The other entries of that head keep their initial values.
    """
    convert = HEADS[head].from_linear
    if convert is None:
        return given, set()
    made = convert({name.removeprefix("head."): given[name] for name in _LINEAR})
    taken = {f"head.{name}": value for name, value in made.items()}
    return {**{k: v for k, v in given.items() if k not in _LINEAR}, **taken}, set(taken)


def _placed(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names of the network, whichever part of it they were saved from."""
    placed = ({f"{prefix}{name}": value for name, value in weights.items()} for prefix in _PREFIXES)
    return max(placed, key=lambda named: len(named.keys() & own.keys()))


def _adapted(name: str, value: Tensor, own: Tensor, network: Classifier) -> Tensor:
    """Return a filter of the first layer with the network's number of channels; other weights unchanged."""
    filters = own.ndim == value.ndim == 4 and own.shape[2:] == value.shape[2:]
    if own.shape == value.shape or not filters or len(own) != len(value):
        return value
    first = next(k for k, v in network.features.state_dict().items() if v.ndim == 4)
    return adapted_filters(value, own.shape[1]) if name == f"features.{first}" else value


def _check_classes(start: Start, class_names: Sequence[str]) -> None:
    known, wanted = start.class_names, tuple(class_names)
    if not known or known == wanted:
        return
    what = f"{len(known)} classes, the data set {len(wanted)}"
    if len(known) == len(wanted):
        place = next(
            i for i, pair in enumerate(zip(known, wanted, strict=True)) if len({*pair}) > 1
        )
        what = f"class {place} {known[place]!r}, the data set {wanted[place]!r}"
    raise UsageError(
        f"the head of {start.name} belongs to other classes: it has {what}. Pass --head-from fresh for a "
        "random head, --head-from class-means, or --head-from FILE"
    )


def _check_fit(
    network: Classifier,
    start: Start,
    given: Mapping[str, Tensor],
    fits: Mapping[str, Tensor],
    wrong: Sequence[str],
) -> None:
    """Check that the feature extractor gets all of its weights, and no other network's."""
    own = network.state_dict()
    fresh = frozenset[str]() if network.added & given.keys() else network.added
    needed = [n for n, v in own.items() if n.startswith("features.") and v.ndim and n not in fresh]
    missing = [name for name in needed if name not in fits]
    extra = [name for name in given if name not in own and _belongs(name, network)]
    problems = []
    if wrong:
        name = wrong[0]
        shapes = f"{_size(given[name])} instead of {_size(own[name])}"
        problems.append(f"{_few(wrong)} of another shape ({shapes})")
    if missing:
        problems.append(f"lacking {_few(missing)}")
    if extra:
        problems.append(f"with {_few(extra)}, which the network does not have")
    if problems:
        raise CheckpointError(
            f"the weights of {start.name} do not fit the network: {'; '.join(problems)}. Choose the network "
            f"that they were saved from with {_options(start)}"
        )


def _options(start: Start) -> str:
    """Return the options of the network from which weights were saved, as far as they are known."""
    saved = start.record.get("config", {})
    known = [
        name for name in ("model", "tune", "adapter_width") if saved.get(name) not in (None, "all")
    ]
    shown = (f"--{name.replace('_', '-')} {saved[name]}" for name in known)
    return " ".join(shown) or "--model (and --tune)"


def _belongs(name: str, network: nn.Module) -> bool:
    """Return whether a weight that the network lacks would lie inside one of its parts with weights."""
    if not name.startswith("features."):
        return False
    module = network
    for place, part in enumerate(name.split(".")[:-1]):
        children = dict(module.named_children())
        if part not in children:
            return place > 2 or isinstance(module, nn.Sequential | nn.ModuleList)
        module = children[part]
    return bool(module.state_dict())


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _size(value: Tensor) -> str:
    return " x ".join(map(str, value.shape)) or "a number"
