"""ResNets and ResNeXts of torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastsam.extras import requires_extra
from fastsam.longtail.data.normalization import Normalization
from fastsam.longtail.errors import unknown
from fastsam.longtail.models.base import Model, register_model
from fastsam.longtail.models.pretrained import DEFAULT, PretrainedSettings, downloading
from fastsam.longtail.weight_files import is_file, read_file, state_dict_in


class TorchvisionFeatures(nn.Module):
    """A torchvision ResNet or ResNeXt without its last layer, with random initial weights.

    Args:
        name: name in ``torchvision.models``.
        channels: channels of the input images.
    """

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        with requires_extra("longtail", name):
            import torchvision

        self.network = torchvision.models.get_model(name, weights=None)
        self.out_features: int = self.network.fc.in_features
        self.network.fc = nn.Identity()
        if channels != 3:
            first = self.network.conv1
            self.network.conv1 = nn.Conv2d(
                channels, first.out_channels, 7, stride=2, padding=3, bias=False
            )
            nn.init.kaiming_normal_(self.network.conv1.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, inputs: Tensor) -> Tensor:
        """Map images ``[B, channels, H, W]`` to features ``[B, out_features]``."""
        features: Tensor = self.network(inputs)
        return features


def _build(name: str, settings: object, channels: int) -> TorchvisionFeatures:
    return TorchvisionFeatures(name, channels)


def _named(name: str, pretrained: str) -> Any:
    """Return the pretrained weights of torchvision that a setting names."""
    with requires_extra("longtail", name):
        import torchvision

    known = torchvision.models.get_model_weights(name)
    if pretrained == DEFAULT:
        return known.DEFAULT
    if pretrained not in known.__members__:
        raise unknown(f"pretrained weights of {name}", pretrained, [DEFAULT, *known.__members__])
    return known[pretrained]


def _weights(name: str, settings: PretrainedSettings) -> Mapping[str, Tensor]:
    chosen = settings.pretrained or DEFAULT
    if is_file(chosen):
        return state_dict_in(read_file(chosen), chosen)
    with downloading(f"the weights {chosen} of torchvision's {name}"):
        weights: Mapping[str, Tensor] = _named(name, chosen).get_state_dict(
            progress=False, check_hash=True
        )
    return weights


def _normalization(name: str, settings: PretrainedSettings) -> Normalization:
    chosen = settings.pretrained or DEFAULT
    transforms = _named(name, DEFAULT if is_file(chosen) else chosen).transforms()
    return Normalization(tuple(transforms.mean), tuple(transforms.std))


for _name in (
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
):
    register_model(
        Model(
            name=_name,
            build=partial(_build, _name),
            weights=partial(_weights, _name),
            normalization=partial(_normalization, _name),
            settings=PretrainedSettings,
            summary=f"torchvision's {_name}",
        )
    )
