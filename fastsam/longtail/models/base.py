"""Registry of networks, and construction of classifiers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastsam.longtail.errors import UsageError
from fastsam.longtail.models.classifier import Classifier
from fastsam.longtail.models.heads import HEADS, Head, HeadInit
from fastsam.longtail.registry import Registry, RunPart
from fastsam.longtail.seeds import global_seed
from fastsam.longtail.settings import Entry, Layer, Settings, layer, settings_of

_SOURCE = "code of Cao et al. 2019 (CIFAR), torch's own elsewhere"
HE_HEAD: Layer = layer(_SOURCE, head_init="he")
TORCH_HEAD: Layer = layer(_SOURCE, head_init="torch")
"""Initial weights of a linear head: torch's have a standard deviation 2.4 times smaller than He's."""


@dataclass(frozen=True, kw_only=True)
class Model(RunPart):
    """A network. Once it is registered, ``--model NAME`` trains it.

    Attributes:
        build: ``build(settings, channels)`` creates a module that maps images ``[B, channels, H, W]``
            to features ``[B, out_features]`` and has the attribute ``out_features``.
    """

    build: Callable[..., nn.Module]
    recipe: Layer = field(default_factory=lambda: TORCH_HEAD)


MODELS: Registry[Model] = Registry("model", "fastsam.longtail.models")
register_model = MODELS.add


def build_model(
    name: str,
    num_classes: int,
    *,
    head: str = "linear",
    head_init: HeadInit | None = None,
    head_settings: Settings | None = None,
    channels: int = 3,
    seed: int = 0,
    settings: Settings | None = None,
) -> Classifier:
    """Create a freshly initialized classifier.

    Convolutions of the CIFAR networks are sampled from He et al.'s normal distribution, and vectors of
    cosine heads from a uniform distribution. Other networks keep the initialization of their library. The
    initial weights depend only on ``seed``.

    Args:
        name: one of :data:`MODELS`, such as ``resnet32`` or ``timm:NAME``.
        num_classes: number of classes C.
        head: one of :data:`HEADS`, such as ``linear`` or ``cosine``.
        head_init: initial weights of a linear head: ``he`` or ``torch``; None for the default of the
            network's recipe.
        head_settings: all settings of the head; None for their defaults and ``head_init``.
        channels: channels of the input images.
        seed: seed of the initial weights; the global generator is not changed.
        settings: settings of the network, if it has any.

    Raises:
        UsageError: if the name or the head is unknown, or there are fewer than 2 classes.

    Example:
        >>> sum(p.numel() for p in build_model("resnet32", 10).parameters())
        464154
    """
    model, classifier_head = MODELS[name], HEADS[head]
    if num_classes < 2:
        raise UsageError(f"num_classes must be at least 2, got {num_classes}")
    if head_settings is None:
        init = Entry(head_init, "") if head_init else model.recipe["head_init"]
        head_settings = _defaults(classifier_head, {"head_init": init})
    with global_seed(seed):
        features = model.build(settings, channels)
        width: int = features.out_features  # type: ignore[assignment]
        return Classifier(features, classifier_head.build(head_settings, width, num_classes), width)


def _defaults(head: Head, layer: Layer) -> Settings:
    """Return the settings of a head: the values in ``layer``, or their defaults."""
    chosen: dict[str, Any] = {}
    for item in settings_of(head.settings):
        entry = layer.get(item.name, item.metadata["default"])
        chosen[item.name] = entry.value
    return head.settings(**chosen)
