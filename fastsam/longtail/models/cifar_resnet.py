"""ResNets for CIFAR.

They follow He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2: 3x3
convolutions throughout, stages of falling resolution, and parameter-free shortcuts (option A).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from fastsam.longtail.models.base import HE_HEAD, Model, register_model


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and an option-A shortcut, which subsamples and pads new channels with zeros."""

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
    """Feature extractor of a CIFAR ResNet: stem, stages of falling resolution, global average pooling.

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
        """Map images ``[B, channels, H, W]`` to features ``[B, widths[-1]]``."""
        maps: Tensor = self.layers(inputs)
        return maps.mean(dim=(2, 3))


def _resnet(blocks: tuple[int, ...], widths: tuple[int, ...]) -> Callable[..., CifarResNet]:
    def build(settings: object, channels: int) -> CifarResNet:
        features = CifarResNet(blocks, widths, channels=channels)
        for module in features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        return features

    return build


_NARROW = (16, 32, 64)
for _name, _blocks, _widths in (
    ("resnet8", (1, 1, 1), _NARROW),
    ("resnet20", (3, 3, 3), _NARROW),
    ("resnet32", (5, 5, 5), _NARROW),
    ("resnet44", (7, 7, 7), _NARROW),
    ("resnet56", (9, 9, 9), _NARROW),
    ("resnet8-w32", (1, 1, 1), (32, 64, 128)),
    # Later long-tail papers call these networks resnet32 and resnet34.
    ("resnet32-w64", (5, 5, 5), (64, 128, 256)),
    ("resnet34-w64", (3, 4, 6, 3), (64, 128, 256, 512)),
):
    register_model(
        Model(
            name=_name,
            build=_resnet(_blocks, _widths),
            summary=f"CIFAR ResNet with stages of {_blocks} blocks and {_widths} channels",
            recipe=HE_HEAD,
        )
    )
