"""Registry of networks, and construction of classifiers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fastsam.longtail.data.normalization import Normalization
from fastsam.longtail.errors import UsageError
from fastsam.longtail.models.classifier import Classifier
from fastsam.longtail.models.heads import HEADS, Head, HeadInit
from fastsam.longtail.models.own import OWN, copied, is_given, unavailable
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
            to features ``[B, out_features]`` and has the attribute ``out_features``. Its optional method
            ``layer_depths()`` defines the layers of ``layer_decay``; see
            :func:`fastsam.longtail.models.layer_depths`.
        weights: ``weights(settings)`` reads or downloads the state dict that the setting ``pretrained``
            names; None for networks without this setting.
        normalization: ``normalization(settings)`` returns what these weights expect of their inputs; None
            likewise.
    """

    build: Callable[..., nn.Module]
    weights: Callable[[Any], Mapping[str, Tensor]] | None = None
    normalization: Callable[[Any], Normalization] | None = None
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
    size: tuple[int, int] | None = None,
    module: nn.Module | None = None,
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
        size: height and width of the input images, for your module; None if unknown.
        module: your module for a ``name`` that begins with ``own:``. It is copied.

    Raises:
        UsageError: if the name or the head is unknown, or there are fewer than 2 classes.

    Example:
        >>> sum(p.numel() for p in build_model("resnet32", 10).parameters())
        464154
    """
    model, classifier_head = MODELS[name], HEADS[head]
    if module is not None and not is_given(name):
        raise UsageError(
            f"a module was passed for the network {name!r}; name it own:NAME, for instance "
            "recipe(..., model='own:net')"
        )
    if num_classes < 2:
        raise UsageError(f"num_classes must be at least 2, got {num_classes}")
    if head_settings is None:
        init = Entry(head_init, "") if head_init else model.recipe["head_init"]
        head_settings = _defaults(classifier_head, {"head_init": init})
    with global_seed(seed):
        features = (
            model.build(settings, channels) if module is None else copied(module, channels, size)
        )
        width: int = features.out_features  # type: ignore[assignment]
        return Classifier(features, classifier_head.build(head_settings, width, num_classes), width)


def _defaults(head: Head, layer: Layer) -> Settings:
    """Return the settings of a head: the values in ``layer``, or their defaults."""
    chosen: dict[str, Any] = {}
    for item in settings_of(head.settings):
        entry = layer.get(item.name, item.metadata["default"])
        chosen[item.name] = entry.value
    return head.settings(**chosen)


def pretrained_normalization(name: str, pretrained: str = "default") -> Normalization:
    """Return mean and standard deviation of the images with which a network was pretrained.

    Nothing is downloaded.

    Args:
        name: network of torchvision or timm, such as ``resnet50`` or ``timm:NAME``.
        pretrained: value of the setting of this name. The weights in a file have those of ``default``.

    Raises:
        UsageError: if the network or the weights are unknown, or the network has none.

    Example:
        >>> pretrained_normalization("resnet50").mean
        (0.485, 0.456, 0.406)
    """
    model = MODELS[name]
    if model.normalization is None:
        having = [known for known, part in MODELS.examples().items() if part.normalization]
        raise UsageError(
            f"network {name} has no pretrained weights; choose one of {', '.join(having)}, or give mean and "
            "standard deviation yourself"
        )
    return model.normalization(model.settings(pretrained=pretrained))  # type: ignore[call-arg]


def _given(name: str) -> Model:
    def build(settings: Settings, channels: int) -> nn.Module:
        raise unavailable(name)

    return Model(name=name, build=build, summary="your own module, passed from Python")


MODELS.add_family(OWN, _given, listed=False)  # a command cannot build them
