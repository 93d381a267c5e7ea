"""AdaptFormer: a small trained network in parallel to the MLP of each transformer block."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsam.longtail.errors import UsageError
from fastsam.longtail.settings import Entry, Settings, setting
from fastsam.longtail.tunings.base import NetworkTuning, register_tuning
from fastsam.longtail.tunings.transformer_blocks import TransformerBlock, transformer_blocks

_SOURCE = "code of Shi et al. 2024 (shijxcs/LIFT)"


class Adapter(nn.Module):
    """A bottleneck ``s Up(ReLU(Down(LN(h))))`` of the hidden state ``h``, in parallel to the MLP of a block.

    Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition" (NeurIPS 2022),
    in the form of the code of Shi et al. (ICML 2024): the adapter has its own layer normalization, and the
    scale ``s`` is trained. ``Up`` starts at zero, so the network starts unchanged.

    Args:
        width: length D of the vectors.
        bottleneck: width of the bottleneck R.
        scale: initial scale s.

    Example:
        >>> sum(p.numel() for p in Adapter(768, 4).parameters())  # 2 R D + 3 D + R + 1
        8453
    """

    def __init__(self, width: int, bottleneck: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.scale = nn.Parameter(torch.full((1,), scale))
        nn.init.kaiming_normal_(self.down.weight, a=math.sqrt(5))
        for value in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(value)
        self._hidden: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states ``[..., D]`` to what is added to them, ``[..., D]``."""
        added: Tensor = self.scale * self.up(functional.relu(self.down(self.norm(hidden))))
        return added

    def attach(self, place: TransformerBlock) -> None:
        """Become the part ``adapter`` of a block, and add the output to that of its MLP's branch.

        Layer scale and stochastic depth of the block change the MLP's output only, as in the code of LIFT.

        Hooks do so, because every other part of the block must keep its name. As bound methods, they are
        copied together with the block.
        """
        place.block.add_module("adapter", self)
        place.norm.register_forward_pre_hook(self._keep)
        place.last.register_forward_hook(self._add)

    def _keep(self, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._hidden = inputs[0]

    def _add(self, last: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            raise UsageError(
                "tune 'adapters' requires transformer blocks that call the MLP after its normalization, but "
                "this network normalizes the output of the MLP; choose another network or tune='bias-norm'"
            )
        changed: Tensor = output + self(hidden)
        return changed


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(Settings):
    """Settings of the tuning ``adapters``."""

    adapter_width: int | None = setting(
        "width of the bottleneck of each adapter",
        optional=True,
        default_text="the largest power of 2 up to classes / (2 * blocks), at least 1",
        low=1,
        high=2**14,
    )
    adapter_scale: float = setting(
        "initial factor on the output of each adapter, which is trained",
        default=Entry(1.0, _SOURCE),
        low=-1000,
        high=1000,
    )


def default_width(num_classes: int, blocks: int) -> int:
    """Return the width of the bottleneck in the code of LIFT.

    Example:
        >>> [default_width(classes, 12) for classes in (10, 100, 365, 1000, 8142)]
        [1, 4, 8, 32, 256]
    """
    return 1 << max(0, (num_classes // (2 * blocks)).bit_length() - 1)


def _build(settings: AdapterSettings, features: nn.Module, num_classes: int) -> None:
    places = transformer_blocks(features)
    width = settings.adapter_width or default_width(num_classes, len(places))
    for place in places:
        Adapter(place.width, width, scale=settings.adapter_scale).attach(place)


def _trained(features: nn.Module) -> Collection[str]:
    return [
        f"{name}.{part}"
        for name, module in features.named_modules()
        if isinstance(module, Adapter)
        for part, _ in module.named_parameters()
    ]


register_tuning(
    NetworkTuning(
        name="adapters",
        summary="train the head, and an adapter in each transformer block (AdaptFormer, Chen et al. 2022)",
        build=_build,
        settings=AdapterSettings,
        trained=_trained,
    )
)
