"""ResNets and ResNeXts of torchvision."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from fastsam.extras import requires_extra
from fastsam.longtail.errors import UsageError
from fastsam.longtail.models.base import Model, register_model


class TorchvisionFeatures(nn.Module):
    """A torchvision ResNet or ResNeXt without its last layer, with random initial weights.

    Args:
        name: name in ``torchvision.models``.
        channels: channels of the input images; must be 3.

    Raises:
        UsageError: if ``channels`` is not 3.
    """

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        with requires_extra("longtail", name):
            import torchvision

        if channels != 3:
            raise UsageError(
                f"{name} requires images with 3 channels, got {channels}; choose another network, such "
                "as resnet32 or timm:NAME"
            )
        self.network = torchvision.models.get_model(name, weights=None)
        self.out_features: int = self.network.fc.in_features
        self.network.fc = nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        """Map images ``[B, 3, H, W]`` to features ``[B, out_features]``."""
        features: Tensor = self.network(inputs)
        return features


def _build(name: str, settings: object, channels: int) -> TorchvisionFeatures:
    return TorchvisionFeatures(name, channels)


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
        Model(name=_name, build=partial(_build, _name), summary=f"torchvision's {_name}")
    )
