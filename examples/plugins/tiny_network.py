"""A network as a plug-in: a module that maps images to features of length ``out_features``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fastsam.longtail.models import Model, register_model
from fastsam.longtail.settings import Entry, Settings, setting


class TinyFeatures(nn.Module):
    """Two convolutions and global average pooling."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.out_features = width
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map images ``[B, channels, H, W]`` to features ``[B, width]``."""
        return self.layers(inputs).mean(dim=(2, 3))


@dataclass(frozen=True, kw_only=True)
class TinySettings(Settings):
    """Settings of the network."""

    tiny_net_width: int = setting(
        "number of channels of the convolutions", default=Entry(16, "an example"), low=1, high=4096
    )


register_model(
    Model(
        name="tiny-net",
        build=lambda settings, channels: TinyFeatures(channels, settings.tiny_net_width),
        settings=TinySettings,
        summary="two convolutions",
    )
)
