"""Classifiers: a feature extractor and a linear or cosine head.

The CIFAR networks follow He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016),
section 4.2: 3x3 convolutions throughout, three stages, and parameter-free shortcuts (option A).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.seeds import global_seed

Head = Literal["linear", "cosine"]
HEADS: tuple[Head, ...] = ("linear", "cosine")
HeadInit = Literal["he", "torch"]
HEAD_INITS: tuple[HeadInit, ...] = ("he", "torch")


class CosineHead(nn.Module):
    """Logits that are cosines between the features and one unit vector per class; no bias.

    Args:
        in_features: length D of the feature vector.
        num_classes: number of classes C.

    Example:
        >>> CosineHead(64, 10)(torch.ones(2, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        weight = torch.empty(in_features, num_classes).uniform_(-1, 1)
        # Unit columns: renorm_ only shortens, so the bound is tiny and is scaled away again.
        self.weight = nn.Parameter(weight.renorm_(2, 1, 1e-5).mul_(1e5))  # [D, C]

    def forward(self, features: Tensor) -> Tensor:
        """Features ``[B, D]`` to cosines ``[B, C]``."""
        return functional.normalize(features, dim=1) @ functional.normalize(self.weight, dim=0)


class Classifier(nn.Module):
    """A feature extractor followed by a classification head.

    Attributes:
        features: maps images ``[B, channels, H, W]`` to features ``[B, D]``.
        head: maps features ``[B, D]`` to logits ``[B, C]``.
        feature_width: D.
    """

    def __init__(self, features: nn.Module, head: nn.Module, feature_width: int) -> None:
        super().__init__()
        self.features = features
        self.head = head
        self.feature_width = feature_width

    def forward(self, inputs: Tensor) -> Tensor:
        """Images ``[B, channels, H, W]`` to logits ``[B, C]``."""
        logits: Tensor = self.head(self.features(inputs))
        return logits


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions around an option-A shortcut: subsample, pad new channels with zeros."""

    def __init__(self, in_width: int, out_width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, out_width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_width)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_width)
        self.stride = stride
        self.new_channels = out_width - in_width

    def forward(self, inputs: Tensor) -> Tensor:
        residual = functional.relu(self.bn1(self.conv1(inputs)))
        residual = self.bn2(self.conv2(residual))
        shortcut = inputs[:, :, :: self.stride, :: self.stride]
        before = self.new_channels // 2
        shortcut = functional.pad(shortcut, (0, 0, 0, 0, before, self.new_channels - before))
        return functional.relu(residual + shortcut)


class CifarResNet(nn.Module):
    """The features of a CIFAR ResNet: stem, stages at falling resolution, global average pooling.

    Args:
        blocks: basic blocks of each stage; ``(5, 5, 5)`` is ResNet-32.
        widths: channels of each stage; 16, 32, 64 in He et al.
        channels: channels of the input images.
    """

    def __init__(
        self, blocks: tuple[int, ...], widths: tuple[int, ...] = (16, 32, 64), *, channels: int = 3
    ) -> None:
        super().__init__()
        self.out_features = widths[-1]
        layers: list[nn.Module] = [
            nn.Conv2d(channels, widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        ]
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            for block in range(count):
                downsample = stage > 0 and block == 0
                previous = widths[stage - 1] if downsample else width
                layers.append(_BasicBlock(previous, width, stride=2 if downsample else 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: Tensor) -> Tensor:
        """Images ``[B, channels, H, W]`` to features ``[B, widths[-1]]``."""
        maps: Tensor = self.layers(inputs)
        return maps.mean(dim=(2, 3))


class TorchvisionFeatures(nn.Module):
    """A torchvision ResNet or ResNeXt without its last layer, from random weights.

    Args:
        name: name in ``torchvision.models``.
        channels: channels of the input images; 3.
    """

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        import torchvision

        if channels != 3:
            raise UsageError(f"{name} reads colour images, these have {channels} channel(s)")
        self.network = torchvision.models.get_model(name, weights=None)
        self.out_features: int = self.network.fc.in_features
        self.network.fc = nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` to features ``[B, out_features]``."""
        features: Tensor = self.network(inputs)
        return features


class TimmFeatures(nn.Module):
    """Any network of timm without its classifier, from random weights.

    Args:
        name: name in timm.
        channels: channels of the input images.
    """

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        try:
            timm = import_module("timm")
        except ImportError as error:
            raise UsageError(f"timm:{name} needs timm: pip install timm") from error
        if not timm.is_model(name):
            raise UsageError(f"timm has no network {name!r}; timm.list_models() names them")
        self.network = timm.create_model(name, num_classes=0, in_chans=channels)
        # Some networks widen their features once more before the classifier.
        width = getattr(self.network, "head_hidden_size", None)
        self.out_features: int = width or self.network.num_features

    def forward(self, inputs: Tensor) -> Tensor:
        """Images ``[B, channels, H, W]`` to features ``[B, out_features]``."""
        features: Tensor = self.network(inputs)
        return features


# A network's features, given the channels of its input images; they say how many they are.
Backbone = Callable[[int], Any]
TIMM = "timm:"
_TORCHVISION = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)


def _cifar(depth: int, widths: tuple[int, ...] = (16, 32, 64)) -> Backbone:
    blocks = ((depth - 2) // (2 * len(widths)),) * len(widths)
    return lambda channels: CifarResNet(blocks, widths, channels=channels)


MODELS: dict[str, Backbone] = {
    "resnet8": _cifar(8),
    "resnet20": _cifar(20),
    "resnet32": _cifar(32),
    "resnet44": _cifar(44),
    "resnet56": _cifar(56),
    "resnet8-w32": _cifar(8, (32, 64, 128)),
    # The networks that later long-tail papers run under the names resnet32 and resnet34.
    "resnet32-w64": _cifar(32, (64, 128, 256)),
    "resnet34-w64": lambda channels: CifarResNet(
        (3, 4, 6, 3), (64, 128, 256, 512), channels=channels
    ),
    **{name: partial(TorchvisionFeatures, name) for name in _TORCHVISION},
}


def check_model(name: str) -> None:
    """Raise :class:`UsageError` unless ``name`` is in :data:`MODELS` or begins with ``timm:``."""
    if name not in MODELS and not name.startswith(TIMM):
        raise unknown("model", name, (*MODELS, f"{TIMM}NAME"))


def default_head_init(name: str) -> HeadInit:
    """Return how published code initializes the linear head of a network.

    He et al.'s normal distribution for the CIFAR networks (code of Cao et al. 2019), and torch's
    default, whose standard deviation is 2.4 times smaller, for those of torchvision and timm.
    """
    return "torch" if name in _TORCHVISION or name.startswith(TIMM) else "he"


def build_model(
    name: str,
    num_classes: int,
    *,
    head: Head = "linear",
    head_init: HeadInit | None = None,
    channels: int = 3,
    seed: int = 0,
) -> Classifier:
    """A freshly initialised classifier.

    Convolutions of the CIFAR networks are drawn from He et al.'s normal distribution, cosine heads
    from uniform directions; other networks keep the initialization of their library. All of it
    comes from ``seed`` alone.

    Args:
        name: one of :data:`MODELS`, or ``timm:`` and a name of timm.
        num_classes: number of classes C.
        head: ``linear``, or ``cosine`` for normalised features and class vectors.
        head_init: initial weights of a linear head: ``he`` or ``torch``; None for
            :func:`default_head_init`.
        channels: channels of the input images.
        seed: seed of the initial weights; the global generator is left alone.

    Raises:
        UsageError: for an unknown name or head, or fewer than 2 classes.

    Example:
        >>> sum(p.numel() for p in build_model("resnet32", 10).parameters())
        464154
    """
    check_model(name)
    if head not in HEADS:
        raise unknown("head", head, HEADS)
    if head_init is not None and head_init not in HEAD_INITS:
        raise unknown("head_init", head_init, HEAD_INITS)
    if num_classes < 2:
        raise UsageError(f"a classifier needs at least 2 classes, got {num_classes}")
    with global_seed(seed):
        features: Any
        if name in MODELS:
            features = MODELS[name](channels)
        else:
            features = TimmFeatures(name.removeprefix(TIMM), channels)
        width = features.out_features
        if isinstance(features, CifarResNet):
            for module in features.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)
        if head == "cosine":
            return Classifier(features, CosineHead(width, num_classes), width)
        linear = nn.Linear(width, num_classes)
        if (head_init or default_head_init(name)) == "he":
            nn.init.kaiming_normal_(linear.weight)
        return Classifier(features, linear, width)


def resnet20(num_classes: int, head: Head = "linear", *, seed: int = 0) -> Classifier:
    """CIFAR ResNet-20 (0.27 million parameters)."""
    return build_model("resnet20", num_classes, head=head, seed=seed)


def resnet32(num_classes: int, head: Head = "linear", *, seed: int = 0) -> Classifier:
    """CIFAR ResNet-32 (0.46 million parameters), the network of all CIFAR-LT results here."""
    return build_model("resnet32", num_classes, head=head, seed=seed)


def resnet44(num_classes: int, head: Head = "linear", *, seed: int = 0) -> Classifier:
    """CIFAR ResNet-44 (0.66 million parameters)."""
    return build_model("resnet44", num_classes, head=head, seed=seed)


def resnet56(num_classes: int, head: Head = "linear", *, seed: int = 0) -> Classifier:
    """CIFAR ResNet-56 (0.85 million parameters)."""
    return build_model("resnet56", num_classes, head=head, seed=seed)
